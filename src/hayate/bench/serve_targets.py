"""What `hayate bench serve` sends its requests to: an endpoint over HTTP, or an engine in this process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from threading import Thread
from typing import Any, Protocol

from hayate.bench.http_client import HttpClient, Refused
from hayate.errors import HayateError, UsageError
from hayate.runtime.async_llm import AsyncLLM
from hayate.sampling_params import SamplingParams

_CHOICE = re.compile(rb'"choices":\s?\[\{')  # an event that carries a piece of an answer
_TAIL = 8192  # bytes at the end of a stream that are read as JSON: the usage, or an error
_FAILURES = (Refused, HayateError, OSError, EOFError, ValueError, asyncio.LimitOverrunError)


@dataclass
class Answer:
    """What was seen of one request; times in seconds on one clock."""

    start: float  # when it was due
    times: list[float] = field(default_factory=list)  # when pieces with tokens came
    end: float | None = None  # None: it was not waited for
    num_prompt: int = 0
    num_generated: int = 0
    error: str | None = None

    @property
    def complete(self) -> bool:
        return self.end is not None and self.error is None

    @property
    def first_token(self) -> float:
        return self.times[0] - self.start

    @property
    def per_token(self) -> float:
        """Mean time of a token after the first; 0 when there is none."""
        return (self.times[-1] - self.times[0]) / max(self.num_generated - 1, 1)

    @property
    def gaps(self) -> list[float]:
        """Between pieces, each of which may hold several tokens."""
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]


class Target(Protocol):
    """Generates exactly so many tokens for a prompt, unless `exact` is False, and writes down when."""

    exact: bool

    async def generate(self, prompt: list[int], num_tokens: int, answer: Answer) -> None: ...

    async def close(self) -> None: ...


async def measure(target: Target, prompt: list[int], num_tokens: int, answer: Answer) -> None:
    """One request; what goes wrong is written into `answer`."""
    try:
        await target.generate(prompt, num_tokens, answer)
    except _FAILURES as error:
        answer.error = str(error) if isinstance(error, (Refused, HayateError)) else repr(error)
    else:
        answer.error = _complaint(answer, len(prompt), num_tokens if target.exact else None)
    answer.end = time.perf_counter()


def _complaint(answer: Answer, num_prompt: int, num_tokens: int | None) -> str | None:
    if answer.num_prompt != num_prompt:
        return f"{answer.num_prompt} prompt tokens were counted, {num_prompt} sent"
    if num_tokens is not None and answer.num_generated != num_tokens:
        return f"{answer.num_generated} tokens came, {num_tokens} were asked for"
    return None if answer.times else "nothing came"


class Endpoint:
    """POST /v1/completions of any server that speaks OpenAI's protocol."""

    def __init__(self, url: str, api_key: str | None, model: str | None) -> None:
        self._client = HttpClient(url, api_key)
        self._model = model
        self.url = self._client.url
        self.exact = True

    async def open(self, prompt: list[int]) -> None:
        """Find out what the endpoint serves and accepts. HayateError when it cannot be used."""
        try:
            if self._model is None:
                models: Any = await self._client.json("/v1/models")
                self._model = models["data"][0]["id"]
        except (*_FAILURES, LookupError) as error:
            raise HayateError(f"--url {self.url}: /v1/models does not answer: {error}") from None
        failure = await self._try(prompt)
        if failure is not None and failure.startswith("HTTP 4"):
            self.exact = False  # not everybody knows ignore_eos
            failure = await self._try(prompt)
        if failure is not None:
            raise HayateError(f"--url {self.url}: a first request failed: {failure}")

    async def _try(self, prompt: list[int]) -> str | None:
        answer = Answer(time.perf_counter())
        await measure(self, prompt, 2, answer)
        return answer.error

    async def generate(self, prompt: list[int], num_tokens: int, answer: Answer) -> None:
        body: dict[str, object] = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": num_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.exact:
            body["ignore_eos"] = True
        tail = b""
        async with aclosing(self._client.pieces("/v1/completions", body)) as pieces:
            async for piece in pieces:
                if _CHOICE.search(piece):
                    answer.times.append(time.perf_counter())
                tail = (tail + piece)[-_TAIL:]
        usage = _usage(tail)
        answer.num_prompt = usage["prompt_tokens"]
        answer.num_generated = usage["completion_tokens"]

    async def close(self) -> None:
        self._client.close()


def _usage(tail: bytes) -> dict[str, int]:
    """The `usage` among the last events. HayateError for an error among them, or no usage."""
    for line in reversed(tail.split(b"\n")):
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        if "error" in event:
            raise HayateError(f"in the stream: {event['error'].get('message', event['error'])}")
        if event.get("usage"):
            usage: dict[str, int] = event["usage"]
            return usage
    raise HayateError("the stream ended without usage (stream_options.include_usage)")


class InProcess:
    """An AsyncLLM without HTTP: what a server adds is the difference."""

    exact = True

    def __init__(self, llm: AsyncLLM) -> None:
        self._llm = llm

    async def generate(self, prompt: list[int], num_tokens: int, answer: Answer) -> None:
        params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        async with aclosing(await self._llm.open_streams([prompt], params)) as batches:
            async for batch in batches:
                answer.times.append(time.perf_counter())
                done = batch[-1][1].request
        assert done is not None
        answer.num_prompt = done.metrics.num_prompt_tokens
        answer.num_generated = done.metrics.num_generated_tokens

    async def close(self) -> None:
        await self._llm.shutdown(drain=False)


@contextlib.contextmanager
def own_server(model: str, options: list[str]) -> Iterator[str]:
    """The address of a `hayate serve` in a process of its own, once it is ready; it ends with the block."""
    command = [sys.executable, "-m", "hayate", "serve", model, "--port", "0", *options]
    process = subprocess.Popen(
        command,
        env={name: value for name, value in os.environ.items() if name != "HAYATE_API_KEY"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is for the benchmark, which then ends the server
    )
    assert process.stderr is not None
    lines: deque[str] = deque(maxlen=20)
    url = ""
    try:
        for line in process.stderr:
            lines.append(line)
            if listening := re.search(r"listening .*url=(\S+)", line):
                url = listening[1]
            if " ready " in line:
                break
        else:
            raise UsageError(f"`hayate serve {model}` ended: {''.join(lines).strip()}")
        # A pipe that nobody reads would stop the server.
        Thread(target=lines.extend, args=(process.stderr,), daemon=True).start()
        yield url
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
