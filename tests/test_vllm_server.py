"""One OpenAI-compatible server on the bundled model: completions, chat, streaming, concurrent requests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
from serving import ServerError, post, serve
from tiny_models import logprobs
from transformers import AutoTokenizer

from vllm_milo.offline.convert import Conversion, convert
from vllm_milo.offline.evaluate import load_model
from vllm_milo.offline.milo import Recipe
from vllm_milo.offline.ranks import parse_policies

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]
ARGUMENTS = ["--quantization", "milo", "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "16"]
EXACT = ["--dtype", "float32"]  # batching then tips no near-tie
PROMPTS = ["The function returns", "In the morning the old man", "To install the package, run", "The definition of"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, bundled_model: Path) -> Path:
    conversion = Conversion(Recipe(max_rounds=4), parse_policies("dense=16,kurtosis=8"))
    return convert(bundled_model, tmp_path_factory.mktemp("server") / "milo", conversion, progress=False).out


@pytest.fixture(scope="module")
def url(checkpoint: Path) -> Iterator[str]:
    with serve(checkpoint, *ARGUMENTS, *EXACT, log=checkpoint.parent / "server.log") as url:
        yield url


def complete(url: str, prompt: str, **options) -> dict:
    return post(url, "/v1/completions", prompt=prompt, temperature=0, **{"max_tokens": 16, **options})["choices"][0]


def test_logprobs_are_those_of_the_dequantized_model(url: str, checkpoint: Path):
    choice = complete(url, PROMPTS[1], max_tokens=8, echo=True, logprobs=0)
    ids = AutoTokenizer.from_pretrained(checkpoint)(choice["text"], add_special_tokens=False)["input_ids"]
    table = logprobs(load_model(checkpoint, torch.float32), ids)
    found = choice["logprobs"]["token_logprobs"]
    assert len(found) == len(ids)
    expected = [float(table[i, token]) for i, token in enumerate(ids[1:])]
    assert found[1:] == pytest.approx(expected, abs=2e-3)


def test_chat(url: str):
    message = [{"role": "user", "content": "The function returns"}]
    answer = post(url, "/v1/chat/completions", messages=message, max_tokens=8, temperature=0)
    assert answer["choices"][0]["message"]["content"]
    assert answer["usage"]["completion_tokens"] == 8


def test_streaming_gives_the_same_text(url: str):
    whole = complete(url, PROMPTS[0])["text"]
    body = {"model": "milo", "prompt": PROMPTS[0], "max_tokens": 16, "temperature": 0, "stream": True}
    pieces = []
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as response:
        for line in response.iter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                pieces.append(json.loads(line[6:])["choices"][0]["text"])
    assert len(pieces) > 4
    assert "".join(pieces) == whole


def test_concurrent_requests(url: str):
    alone = [complete(url, prompt, max_tokens=6)["text"] for prompt in PROMPTS]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda prompt: complete(url, prompt, max_tokens=6)["text"], PROMPTS * 2))
    assert len(set(alone)) == len(PROMPTS)
    assert together == alone * 2


@pytest.mark.slow
def test_serves_without_the_flag(checkpoint: Path, tmp_path: Path):
    with serve(checkpoint, *ARGUMENTS[2:], log=tmp_path / "server.log") as url:
        assert complete(url, PROMPTS[0])["text"]


@pytest.mark.slow
def test_broken_checkpoint_stops_the_server_with_the_reason(checkpoint: Path, tmp_path: Path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in checkpoint.iterdir():
        content = file.read_bytes()
        (broken / file.name).write_bytes(content[:-1000] if file.suffix == ".safetensors" else content)
    server = serve(broken, *ARGUMENTS, log=tmp_path / "server.log")
    with pytest.raises(ServerError, match=r"model-00001-of-00001\.safetensors: truncated"), server:
        pass
