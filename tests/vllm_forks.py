"""A process that has imported vLLM and forks for each job: importing takes longer than most jobs.

``python vllm_forks.py`` reads requests from its standard input, a line of JSON each, and answers with the exit status
of the job. It ends with its input. Processes that vLLM starts by itself import what they need, as for users.
"""

from __future__ import annotations

import atexit
import gc
import importlib.util
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HELD = ("vllm_milo.config", "vllm.model_executor.model_loader", "vllm.v1.worker.cpu_worker")
"""What every engine imports beside vLLM's front, where a version has it."""


class Forks:
    """The process on this side; started by the first job, and again after one that had to be killed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        atexit.register(self.close)

    def run(self, arguments: list[str], folder: Path, log: Path, environment: dict[str, str], timeout: float) -> int:
        """Run vllm_runner.py with these arguments; return its exit status, negative for a signal.

        Raises:
            subprocess.TimeoutExpired: it took longer than ``timeout`` seconds, and was killed.
            RuntimeError: vLLM could not be imported.
        """
        request = {"arguments": arguments, "folder": str(folder), "log": str(log), "environment": environment}
        process = self._process or self._start(environment)
        self._process = process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            with selectors.DefaultSelector() as selector:
                selector.register(process.stdout, selectors.EVENT_READ)
                if not selector.select(timeout):
                    raise subprocess.TimeoutExpired(arguments, timeout)
            answer = process.stdout.readline()
        except BaseException:
            self._kill()
            raise
        if not answer:
            self._kill()
            raise RuntimeError("the process that imports vLLM ended:\n" + self._said.read_text()[-6000:])
        return int(answer)

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.communicate()
            self._process = None

    def _start(self, environment: dict[str, str]) -> subprocess.Popen[str]:
        descriptor, name = tempfile.mkstemp(suffix=".log", prefix="vllm-forks-")
        self._said = Path(name)
        atexit.register(self._said.unlink, missing_ok=True)
        with os.fdopen(descriptor, "w") as said:
            return subprocess.Popen(
                [sys.executable, __file__],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
                start_new_session=True,  # so that a job is killed with all that it started
            )

    def _kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.communicate()
            self._process = None


FORKS = Forks()


def serve() -> None:
    """Import vLLM, then fork for each request."""
    sys.path.append(str(Path(__file__).parent))  # where PYTHONSAFEPATH leaves it out
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what imports print is no answer
    import torch._dynamo
    import vllm.lora.request
    import vllm_runner
    from vllm.model_executor.models import registry

    vllm.LLM  # noqa: B018 - imported where it is asked for
    for name in HELD:
        if importlib.util.find_spec(name):
            importlib.import_module(name)
    torch._dynamo.config.disable = True  # vLLM compiles a function of its own though all jobs are eager
    registry._run_in_subprocess = lambda load: load()  # else an import of vLLM for each model that is new to it
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if not child:
            answers.close()
            _job(request, vllm_runner)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)


def _job(request: dict[str, Any], runner: Any) -> None:
    """Run a job in this process, which ends with it."""
    with open(request["log"], "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.argv = ["vllm_runner.py", *request["arguments"]]
    # engines collect garbage a dozen times, through all that the imports have made wherever vLLM thaws it
    gc.freeze()
    gc.unfreeze = lambda: None
    status = 1
    try:
        runner.main()
        status = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    serve()
