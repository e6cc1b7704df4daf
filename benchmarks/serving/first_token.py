"""Starts vLLM and asks for one token; ``load.py`` starts it as a process, with a job file and one to write."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

PROMPT = [3, 5, 7, 11]


def main() -> None:
    """Run the job file named on the command line; seconds count from when its writer began."""
    job = json.loads(Path(sys.argv[1]).read_text())
    from vllm import LLM, SamplingParams

    imported = time.time()
    llm = LLM(model=job["folder"], skip_tokenizer_init=True, **job["engine"])
    started = time.time()
    sampling = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, detokenize=False)
    prompts: list[Any] = [{"prompt_token_ids": PROMPT}]
    (output,) = llm.generate(prompts, sampling, use_tqdm=False)
    answered = time.time()
    import torch

    from benchmarks.records import environment

    result = {
        "imports": imported - job["begun"],
        "engine": started - imported,
        "first_token": answered - job["begun"],
        "token": output.outputs[0].token_ids[0],
        "environment": environment(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
    }
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
