"""Clients of a server under load: they wait for answers, read streams, give up, or hang up in the middle."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import Any, NamedTuple

import httpx

ANSWER, STREAM, CANCEL, DISCONNECT = "answer", "stream", "cancel", "disconnect"
SHARES = {ANSWER: 0.5, STREAM: 0.3, CANCEL: 0.1, DISCONNECT: 0.1}
"""What clients do, and how many of them."""
ALTERNATIVES = 5
"""Likeliest tokens whose log-probabilities come with each token."""
_TOKEN = "token_id:"


class Request(NamedTuple):
    """A prompt, as token ids, and the number of tokens that are asked for, greedily."""

    prompt: list[int]
    max_tokens: int

    def body(self, stream: bool) -> dict[str, Any]:
        """Return the body of the request to ``/v1/completions``."""
        fixed = {"model": "milo", "temperature": 0, "ignore_eos": True, "return_tokens_as_token_ids": True}
        return fixed | {
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "logprobs": ALTERNATIVES,
            "stream": stream,
        }


class Answer(NamedTuple):
    """Token ids, and the log-probabilities of the likeliest tokens at each place, by token id."""

    tokens: list[int]
    likeliest: list[dict[int, float]]


class Outcome(NamedTuple):
    """What came of a client's request.

    Attributes:
        kind: what the client did.
        request: its number among the requests.
        answer: the whole answer; None where the client left or the request failed.
        error: why it failed; None where it did not.
        seconds: it took.
    """

    kind: str
    request: int
    answer: Answer | None
    error: str | None
    seconds: float


class RequestError(RuntimeError):
    """The server answered with an error, or with half an answer."""


@contextlib.asynccontextmanager
async def client(url: str) -> AsyncIterator[httpx.AsyncClient]:
    """Yield a client without limits of its own."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as opened:
        yield opened


async def ask(http: httpx.AsyncClient, request: Request) -> Answer:
    """Return the answer to a request.

    Raises:
        RequestError, httpx.HTTPError: there is none.
    """
    response = await http.post("/v1/completions", json=request.body(stream=False))
    if response.status_code != 200:
        raise RequestError(f"status {response.status_code}: {response.text[:200]}")
    return _read(response.json()["choices"][0])


async def stream(http: httpx.AsyncClient, request: Request) -> AsyncGenerator[Answer, None]:
    """Yield the pieces of an answer as they come.

    Raises:
        RequestError, httpx.HTTPError: the answer is not whole.
    """
    finished = False
    async with http.stream("POST", "/v1/completions", json=request.body(stream=True)) as response:
        if response.status_code != 200:
            raise RequestError(f"status {response.status_code}: {(await response.aread())[:200]!r}")
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise RequestError(f"in the stream: {str(event['error'])[:200]}")
            for choice in event.get("choices", []):
                finished |= choice.get("finish_reason") is not None
                yield _read(choice)
    if not finished:
        raise RequestError("the stream ended before the answer did")


async def run(
    url: str, requests: Sequence[Request], seconds: float, peak: int, seed: int, note: Callable[[Outcome], None]
) -> None:
    """Send waves of requests for some time, of 8 at once up to ``peak``.

    Args:
        url: of the server.
        requests: to choose from.
        seconds: in which all waves end, where none takes longer than the last of its size did.
        peak: most requests at once.
        seed: of the choices.
        note: takes what came of each request as soon as it came.
    """
    draw, lasted = random.Random(seed), dict[int, float]()
    deadline = time.monotonic() + seconds
    kinds, weights = list(SHARES), list(SHARES.values())
    async with client(url) as http:
        for size in itertools.cycle([min(size, peak) for size in (8, 32, max(8, peak // 4), peak)]):
            start = time.monotonic()
            if start + lasted.get(size, 0) >= deadline:
                return
            wave = [
                _client(http, requests, draw.randrange(len(requests)), kind, draw.random(), note)
                for kind in draw.choices(kinds, weights, k=size)
            ]
            await asyncio.gather(*wave)
            lasted[size] = time.monotonic() - start


async def _client(
    http: httpx.AsyncClient,
    requests: Sequence[Request],
    index: int,
    kind: str,
    patience: float,
    note: Callable[[Outcome], None],
) -> None:
    """Be one client; ``patience`` from 0 to 1 says how late it leaves, if it does."""
    start = time.monotonic()
    answer, error = None, None
    try:
        answer = await _behave(http, requests[index], kind, patience)
    except (RequestError, httpx.HTTPError) as failure:
        error = f"{type(failure).__name__}: {failure}"
    note(Outcome(kind, index, answer, error, time.monotonic() - start))


async def _behave(http: httpx.AsyncClient, request: Request, kind: str, patience: float) -> Answer | None:
    if kind == ANSWER:
        return await ask(http, request)
    if kind == CANCEL:
        with contextlib.suppress(TimeoutError):
            return await asyncio.wait_for(ask(http, request), 0.05 + patience / 2)
        return None
    pieces: list[Answer] = []
    async with contextlib.aclosing(stream(http, request)) as coming:
        async for piece in coming:
            pieces.append(piece)
            if kind == DISCONNECT and sum(len(one.tokens) for one in pieces) > patience * request.max_tokens:
                return None
    return Answer([token for one in pieces for token in one.tokens], [top for one in pieces for top in one.likeliest])


def _read(choice: dict[str, Any]) -> Answer:
    """Return the tokens of a choice, or of a piece of it."""
    found = choice.get("logprobs") or {"tokens": [], "top_logprobs": []}
    tops = [{_token(token): value for token, value in (top or {}).items()} for top in found["top_logprobs"] or []]
    return Answer([_token(token) for token in found["tokens"]], tops)


def _token(text: str) -> int:
    return int(text.removeprefix(_TOKEN))
