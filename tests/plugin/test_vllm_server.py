"""One OpenAI-compatible server on the bundled model: completions, chat, streaming, concurrent requests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
from readme import readme_words
from tiny_models import logprobs, make_prompts
from transformers import AutoTokenizer

from benchmarks.serving.server import ServerError, post, serve
from vllm_milo.offline.conversion import Conversion
from vllm_milo.offline.convert import convert
from vllm_milo.offline.evaluation.model import load_model
from vllm_milo.offline.nouns import Recipe
from vllm_milo.offline.ranks.policies import parse_policies

ON_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="exact, so in float32, which GPUs do not serve")
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600), ON_GPU]
README_MODEL, *README_ARGUMENTS = readme_words("vllm serve ")[2:]
NAMES = ["--served-model-name", "milo", README_MODEL]
SMALL = ["--enforce-eager", "--max-num-seqs", "16", "--max-model-len", "512", "--num-gpu-blocks-override", "256"]
EXACT = ["--dtype", "float32"]  # batching then tips no near-tie
PROMPTS = ["The function returns", "In the morning the old man", "To install the package, run", "The definition of"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, bundled_model: Path) -> Path:
    conversion = Conversion(Recipe(max_rounds=4), parse_policies("dense=16,kurtosis=8"))
    return convert(bundled_model, tmp_path_factory.mktemp("server") / "milo", conversion, progress=False).out


@pytest.fixture(scope="module")
def url(checkpoint: Path) -> Iterator[str]:
    arguments = [*README_ARGUMENTS, *NAMES, *SMALL, *EXACT]
    with serve(checkpoint, *arguments, log=checkpoint.parent / "server.log") as url:
        yield url


def complete(url: str, prompt: str, **options) -> dict:
    return post(url, "/v1/completions", prompt=prompt, temperature=0, **{"max_tokens": 16, **options})["choices"][0]


def assert_exact(url: str, checkpoint: Path) -> None:
    """Assert that log-probabilities over HTTP, of prompts of 1 to 300 tokens, are those of the dequantized model."""
    model = load_model(checkpoint, torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    for prompt in [*make_prompts(checkpoint), tokenizer(PROMPTS[1], add_special_tokens=False)["input_ids"]]:
        answer = post(
            url,
            "/v1/completions",
            prompt=prompt,
            max_tokens=8,
            temperature=0,
            echo=True,
            logprobs=0,
            return_token_ids=True,
            ignore_eos=True,
        )
        choice = answer["choices"][0]
        ids = prompt + choice["token_ids"][-8:]
        table = logprobs(model, ids)
        found = choice["logprobs"]["token_logprobs"]
        assert len(found) == len(ids)
        assert found[1:] == pytest.approx([float(table[i, token]) for i, token in enumerate(ids[1:])], abs=2e-3)


def test_logprobs_are_those_of_the_dequantized_model(url: str, checkpoint: Path):
    assert_exact(url, checkpoint)


def test_readme_request(url: str):
    """The README's curl command, with this server's address and without curl."""
    _, address, *options = readme_words("curl ")
    path = address.removeprefix("http://localhost:8000")
    assert path.startswith("/v1/")
    body = json.loads(options[options.index("-d") + 1])
    answer = post(url, path, **body)
    assert 1 <= answer["usage"]["completion_tokens"] <= body["max_tokens"]


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
def test_serves_without_the_flag_and_compiled(checkpoint: Path, tmp_path: Path):
    """From config.json alone, and as vLLM runs by default: through torch.compile."""
    arguments = [*README_ARGUMENTS[2:], *SMALL[1:], *EXACT]
    with serve(checkpoint, *arguments, log=tmp_path / "server.log", timeout=500) as url:
        assert_exact(url, checkpoint)


@pytest.mark.slow
@pytest.mark.long
def test_serves_tensor_parallel(checkpoint: Path, tmp_path: Path):
    arguments = [*README_ARGUMENTS, *SMALL, *EXACT, "-tp", "2"]
    with serve(checkpoint, *arguments, log=tmp_path / "server.log") as url:
        assert_exact(url, checkpoint)


@pytest.mark.slow
def test_broken_checkpoint_stops_the_server_with_the_reason(checkpoint: Path, tmp_path: Path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in checkpoint.iterdir():
        content = file.read_bytes()
        (broken / file.name).write_bytes(content[:-1000] if file.suffix == ".safetensors" else content)
    server = serve(broken, *README_ARGUMENTS, *SMALL, log=tmp_path / "server.log")
    with pytest.raises(ServerError, match=r"model-00001-of-00001\.safetensors: truncated"), server:
        pass
