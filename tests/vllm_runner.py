"""Runs vLLM on several checkpoints in a process of its own: ``python vllm_runner.py JOB.json OUT.json``.

JOB: {"models": {name: folder}, "prompts": {name: [[ids]]}, "max_tokens": n, "engine": {LLM arguments}}; with
"mend_router": true, on CPUs, vLLM's routers route as those of GPUs do, experts need no gate or may have Step-3.5's
activation, and Ling-2.5's and Kimi's linear attention and Mamba-1 are there; with "lora": folder, an adapter is on;
with "reload": true, weights are loaded once more after a first run; with "chooses": true, layers choose experts
themselves and gates are the plugin's, and a model whose layers do not, or whose gates are not, has an error.
OUT: {name: [{"prompt_logprobs": [...], "generated": [...], "logprobs": [...]}]}, the last those of what was generated,
or {name: {"error": text}}. With "rounds": n, prompts are answered n times by one engine and without their own
log-probabilities, which nothing could be taken from a cache for: {name: [[{"generated": [...], "logprobs": [...],
"cached": tokens}]]}, by round; with "sleep": level, the engine sleeps and wakes between rounds.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from vllm_forks import FORKS

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_MILO_WARM_UP": "0",  # a test uses few of the kernels that a server might; test_vllm_gpu has servers
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "TOKENIZERS_PARALLELISM": "false",
}


def run(job: dict[str, Any], folder: Path, timeout: float = 600) -> dict[str, Any]:
    """Run a job in a process of its own and return its results."""
    (folder / "job.json").write_text(json.dumps(job))
    environment = environment_of_vllm()
    arguments = [str(folder / "job.json"), str(folder / "out.json")]
    log = folder / "vllm.log"
    alone = all(job["engine"].get(f"{kind}_parallel_size", 1) == 1 for kind in ("tensor", "pipeline"))
    if alone:
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if alone and job["engine"]["enforce_eager"] and not torch.cuda.is_available():
        require_success(FORKS.run(arguments, folder, log, environment, timeout), log)
    else:
        run_script([__file__, *arguments], folder, log, environment, timeout)
    return json.loads((folder / "out.json").read_text())


def environment_of_vllm() -> dict[str, str]:
    """Return the variables of a process that runs vLLM, whose own processes find the tests' modules too."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | ENVIRONMENT
    paths = filter(None, [os.environ.get("PYTHONPATH"), str(Path(__file__).parent)])
    return environment | {"PYTHONPATH": os.pathsep.join(paths)}


def run_script(words: list[str], folder: Path, log: Path, environment: dict[str, str], timeout: float) -> None:
    """Run a script of the tests in a process of its own, in ``folder``; ``log`` takes what it prints.

    Raises:
        RuntimeError: it failed; the message has the end of the log.
    """
    with log.open("w") as file:
        code = subprocess.run(
            [sys.executable, *words],
            env=environment,
            cwd=folder,
            stdout=file,
            stderr=subprocess.STDOUT,
            timeout=timeout,
            check=False,
        ).returncode
    require_success(code, log)


def require_success(code: int, log: Path) -> None:
    """Raise RuntimeError with the end of the log unless a process ended well."""
    if code != 0:
        raise RuntimeError(f"vLLM ended with {code}:\n" + log.read_text()[-6000:])


def _generate(folder: str, prompts: list[list[int]], job: dict[str, Any]) -> list[dict[str, Any]]:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(model=folder, skip_tokenizer_init=True, **job["engine"])
    if job.get("chooses") and not all(llm.apply_model(_which_choose)[0]):
        raise ValueError("vLLM chooses experts, or multiplies by gates")
    adapter = LoRARequest("adapter", 1, job["lora"]) if "lora" in job else None
    if job.get("reload"):
        llm.generate([{"prompt_token_ids": prompts[0]}], use_tqdm=False)
        llm.collective_rpc("reload_weights")
    if "rounds" in job:
        return _answer(llm, prompts, job)
    parameters = SamplingParams(
        max_tokens=job["max_tokens"], temperature=0, prompt_logprobs=0, logprobs=0, detokenize=False, ignore_eos=True
    )
    asked = [{"prompt_token_ids": ids} for ids in prompts]
    outputs = llm.generate(asked, parameters, use_tqdm=False, lora_request=adapter)
    return [
        {
            "prompt_logprobs": [
                table[token].logprob for token, table in zip(ids[1:], (output.prompt_logprobs or [])[1:], strict=True)
            ],
            **_answered(output.outputs[0]),
        }
        for ids, output in zip(prompts, outputs, strict=True)
    ]


def _which_choose(model: torch.nn.Module) -> list[bool]:
    """Return of each layer with experts whether it chooses among them itself, and whether as many gates are MiLo's."""
    methods = [getattr(module, "quant_method", None) for module in model.modules()]
    choose = [method._renormalizes is not None for method in methods if hasattr(method, "_renormalizes")]
    gates = sum(type(method).__name__ == "GateMethod" for method in methods)
    return [*choose, gates == len(choose) > 0]


def _answered(answer: Any) -> dict[str, Any]:
    tokens = list(answer.token_ids)
    values = [table[token].logprob for token, table in zip(tokens, answer.logprobs, strict=True)]
    return {"generated": tokens, "logprobs": values}


def _answer(llm: Any, prompts: list[list[int]], job: dict[str, Any]) -> list[Any]:
    """Return the answers of each round; between rounds the engine sleeps where the job says so."""
    from vllm import SamplingParams

    parameters = SamplingParams(
        max_tokens=job["max_tokens"], temperature=0, logprobs=0, detokenize=False, ignore_eos=True
    )
    rounds = []
    for number in range(job["rounds"]):
        if number and "sleep" in job:
            _sleep(llm, job["sleep"])
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], parameters, use_tqdm=False)
        rounds.append([_answered(output.outputs[0]) | {"cached": output.num_cached_tokens} for output in outputs])
    return rounds


def _sleep(llm: Any, level: int) -> None:
    """Sleep and wake as users do; level 2 discards the weights, which are loaded again before the cache is back."""
    llm.sleep(level=level)
    if level == 1:
        llm.wake_up()
        return
    llm.wake_up(tags=["weights"])
    llm.collective_rpc("reload_weights")
    llm.wake_up(tags=["kv_cache"])


def hide_amx() -> None:
    """Let vLLM's CPU build take the kernels that every CPU has: of those with AMX some compute in bf16 alone."""
    setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)  # noqa: B010 (mypy)


def main() -> None:
    """Run the job file named on the command line."""
    job = json.loads(Path(sys.argv[1]).read_text())
    results: dict[str, Any] = {}
    hide_amx()
    if job.get("mend_router") and not torch.cuda.is_available():
        sys.path.append(str(Path(__file__).parent))  # where PYTHONSAFEPATH leaves it out
        import cpu_delta_attention
        import cpu_experts
        import cpu_linear_attention
        import cpu_mamba
        import cpu_router

        cpu_router.mend()
        cpu_linear_attention.mend()
        cpu_mamba.mend()
        cpu_delta_attention.mend()
        cpu_experts.allow_without_gate()
        cpu_experts.allow_step()
    if job.get("chooses"):
        from vllm_milo import compat
        from vllm_milo.models import gates

        os.environ[gates.VARIABLE] = "1"
        compat.runs_on_nvidia = lambda: True
        gates._is_streamed = lambda weight: True
    for name, folder in job["models"].items():
        start = time.monotonic()
        try:
            results[name] = _generate(folder, job["prompts"][name], job)
        except Exception as error:  # the test of this model fails with it; the others still run
            results[name] = {"error": f"{type(error).__name__}: {error}"}
        print(name, "took", round(time.monotonic() - start, 1), flush=True)
        gc.collect()
    Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
