"""Starts vLLM's OpenAI-compatible server on a checkpoint and stops it again."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import httpx

CPU_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


class ServerError(RuntimeError):
    """The server did not come up; the message ends with its log."""


class Server(NamedTuple):
    """A server that answers: its base URL, and its process, which leads a session of its own."""

    url: str
    process: subprocess.Popen[bytes]


@contextlib.contextmanager
def serve(
    model: Path, *arguments: str, log: Path, timeout: float = 300, environment: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Serve a model and yield the server's base URL; see :func:`start`."""
    with start(model, *arguments, log=log, timeout=timeout, environment=environment) as server:
        yield server.url


@contextlib.contextmanager
def start(
    model: Path, *arguments: str, log: Path, timeout: float = 300, environment: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """Serve a model and yield the server.

    ``python -m vllm.entrypoints.openai.api_server`` is what ``vllm serve`` runs; builds of vLLM for CPUs lack
    the metadata that the ``vllm`` command itself needs.

    Args:
        model: the model or checkpoint folder.
        arguments: further arguments of ``vllm serve``.
        log: file that takes the server's output.
        timeout: seconds to wait until the server answers.
        environment: variables to add.

    Raises:
        ServerError: the server ended, or did not answer in time.
    """
    port = _free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "milo", *arguments]
    variables = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    variables |= CPU_ENVIRONMENT | dict(environment or {})
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=variables, cwd=log.parent, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(url, process, log, timeout)
        yield Server(url, process)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def post(url: str, path: str, **body: Any) -> dict[str, Any]:
    """Send one request to the server's OpenAI API and return the answer."""
    response = httpx.post(f"{url}{path}", json={"model": "milo", **body}, timeout=120)
    response.raise_for_status()
    return response.json()


def _wait(url: str, process: subprocess.Popen[bytes], log: Path, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServerError(f"the server ended with {process.returncode}:\n{log.read_text()[-4000:]}")
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        time.sleep(0.5)
    raise ServerError(f"the server did not answer within {timeout:.0f} s:\n{log.read_text()[-4000:]}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
