"""Answers as they are generated: pieces of samples, and the server-sent events made of them.

The path of every token leads through here, so it is short: one wake-up of a task for all the tokens that came since
the last, one string for each sample among them, one write. With many streams, each waits a little before it looks
again, so that all together write at most `_WRITES_PER_SECOND` times and the engine keeps its time.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from hayate.runtime.outputs import FinishReason, PositionLogprobs, RequestOutput, StreamChunk
from hayate.server.errors import ApiError, ClientGone, as_api_error
from hayate.server.generation import Generation
from hayate.server.logging import Context, log_failure

if TYPE_CHECKING:
    from hayate.runtime.async_llm import Tagged

_WRITES_PER_SECOND = 3000
_FREE_STREAMS = 16  # up to so many never wait

_T = TypeVar("_T")


@dataclass
class Piece:
    """What came of one sample since the last write."""

    index: int  # of the sample, over all prompts
    text: str
    logprobs: list[PositionLogprobs]
    num_tokens: int
    finish_reason: FinishReason | None
    stop_reason: str | int | None

    @classmethod
    def of(cls, index: int, chunks: list[StreamChunk]) -> Piece:
        """Chunks of one sample joined; a reader that fell behind has thousands of them."""
        return cls(
            index,
            "".join([chunk.text for chunk in chunks]),
            [position for chunk in chunks for position in chunk.logprobs],
            sum([len(chunk.token_ids) for chunk in chunks]),
            chunks[-1].finish_reason,
            chunks[-1].stop_reason,
        )


class Encoder(Protocol):
    """Writes one answer as events of its protocol; each method returns the text of some, or of none."""

    def begin(self) -> str: ...

    def piece(self, piece: Piece) -> str: ...

    def end(self, outputs: list[RequestOutput]) -> str: ...

    def error(self, error: ApiError) -> str: ...


def data(value: str) -> str:
    """An event without a name; `value` is JSON, which has no line ends."""
    return f"data: {value}\n\n"


def event(name: str, value: dict[str, Any]) -> str:
    """An event with a name."""
    return f"event: {name}\ndata: {json.dumps(value)}\n\n"


class EventStream(Response):
    """The response that streams a generation: an ASGI application. A client that leaves ends the generation."""

    def __init__(
        self, generation: Generation, batches: AsyncGenerator[list[Tagged], None], encoder: Encoder
    ) -> None:
        self.background = None
        self._generation = generation
        self._batches = batches
        self._encoder = encoder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        metrics = self._generation.service.metrics
        metrics.streams_open += 1
        try:
            await until_gone(receive, self._write(send, Context.of(scope)))
        except ClientGone:
            pass  # the head is out: there is nothing left to answer
        finally:
            metrics.streams_open -= 1
            await self._batches.aclose()

    async def _write(self, send: Send, context: Context) -> None:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),  # nginx: pass on at once
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        async def write(text: str, more: bool = True) -> None:
            if text or not more:
                message = {"type": "http.response.body", "body": text.encode(), "more_body": more}
                await send(message)

        await write(self._encoder.begin())
        try:
            async with aclosing(self._batches) as batches:
                async for pieces in self._pieces(batches):
                    await write("".join(map(self._encoder.piece, pieces)))
                    await self._pause()
            last = self._encoder.end(self._generation.outputs)
        except Exception as error:
            self._generation.service.note_failure()
            log_failure(context, error, self._generation.service.options.log_prompts)
            last = self._encoder.error(as_api_error(error))
        await write(last, more=False)

    async def _pause(self) -> None:
        streams = self._generation.service.metrics.streams_open
        if streams > _FREE_STREAMS:
            await asyncio.sleep(streams / _WRITES_PER_SECOND)

    async def _pieces(
        self, batches: AsyncIterator[list[Tagged]]
    ) -> AsyncGenerator[list[Piece], None]:
        """Each batch with the chunks of a sample joined, in the order of the samples."""
        per_prompt = self._generation.params.n
        async for batch in batches:
            found: dict[int, list[StreamChunk]] = {}
            for prompt, chunk in batch:
                if chunk.request is not None:
                    self._generation.finished(prompt, chunk.request)
                found.setdefault(prompt * per_prompt + chunk.index, []).append(chunk)
            yield [Piece.of(index, chunks) for index, chunks in found.items()]


async def until_gone(receive: Receive, work: Coroutine[Any, Any, _T]) -> _T:
    """The result of `work`, which is cancelled when the client closes the connection: then ClientGone."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        for future in (task, gone):
            future.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
