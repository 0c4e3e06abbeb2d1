"""AsyncLLM: many callers at once over one engine, for asyncio."""

from __future__ import annotations

import asyncio
import functools
import weakref
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import aclosing, contextmanager
from types import TracebackType
from typing import NamedTuple, TypeVar

from hayate.errors import UsageError, to_raise
from hayate.runtime.conversation import has_parts
from hayate.runtime.engine import Event
from hayate.runtime.engine_thread import EngineThread
from hayate.runtime.loaded_model import LoadedModel
from hayate.runtime.outputs import RequestOutput, StreamChunk
from hayate.runtime.request import Request
from hayate.runtime.request_builder import Messages, Params, Prompt
from hayate.sampling_params import SamplingParams

Tagged = tuple[int, StreamChunk]  # a chunk, and which of several prompts it belongs to
_T = TypeVar("_T")
_Self = TypeVar("_Self", bound="AsyncLLM")
_LONG_TEXT = (
    4096  # characters; encoding more takes milliseconds, for which an event loop must not wait
)


class AsyncLLM(LoadedModel):
    """A model ready to generate for many callers; the arguments are those of `LoadedModel`.

    One thread runs the engine; the methods may be called from any number of event loops and threads. Requests join
    and leave the running batch at every step. Cancelling a task, or closing an iterator, ends its request and frees
    its memory before the next step. A reader that falls behind holds up nobody: its chunks, at most one a token,
    wait for it.

    priority: lower runs earlier. timeout: seconds from the call; what is not finished by then ends as it is, with
    the finish reason "timeout". A request that fails raises its error (see `hayate.errors`) and does not touch the
    others. If the engine itself dies, as when the GPU fails, every waiting call raises the reason, and so does
    every later one.

    An async context manager: leaving it waits for what runs, or drops it when leaving by an exception.
    """

    def _start(self, *args: object) -> None:
        super()._start(*args)  # type: ignore[arg-type]
        self._mail = _Mail()
        self._thread = EngineThread(self.engine, self._mail.deliver)
        self._by_id: dict[str, Request] = {}
        weakref.finalize(self, _stop, self._thread)  # also when the interpreter ends

    async def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: Params = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
    ) -> list[RequestOutput]:
        """Complete each prompt (text or token ids); results in the order of the prompts.

        params: for all prompts, or a list with one for each. When some fail the others still finish; then the
        first error is raised, with `outputs` of all.
        """
        build = functools.partial(
            self.requests.of_prompts, prompts, params, priority=priority, timeout=timeout
        )
        return await self._run(await _built(build, prompts, params))

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
        request_id: str | None = None,
    ) -> AsyncIterator[StreamChunk]:
        """Complete one prompt, piece by piece. request_id: a name for `abort`, of no other running request."""
        build = functools.partial(
            self.requests.of_prompt, prompt, params, priority=priority, timeout=timeout
        )
        return self._stream(build, prompt, params, request_id)

    async def open_streams(
        self,
        prompts: Sequence[Prompt],
        params: Params = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
    ) -> AsyncGenerator[list[Tagged], None]:
        """`stream` of several prompts together, in lists of (index of the prompt, chunk): all that came since the last.

        For servers: what is wrong with the requests is raised here, before anything runs; a reader that falls behind
        gets longer lists; closing the iterator ends all of them.
        """
        build = functools.partial(
            self.requests.of_prompts, prompts, params, priority=priority, timeout=timeout
        )
        return self._batches(await _built(build, prompts, params))

    async def chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
        max_slices: int | None = None,
    ) -> list[RequestOutput]:
        """Answer a conversation; messages and max_slices are those of `LLM.chat`."""
        build = functools.partial(
            self.requests.of_messages,
            messages,
            params,
            priority=priority,
            timeout=timeout,
            max_slices=max_slices,
        )
        return await self._run([await _built(build, messages, params)])

    def stream_chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
        max_slices: int | None = None,
        request_id: str | None = None,
    ) -> AsyncIterator[StreamChunk]:
        """`chat`, piece by piece."""
        build = functools.partial(
            self.requests.of_messages,
            messages,
            params,
            priority=priority,
            timeout=timeout,
            max_slices=max_slices,
        )
        return self._stream(build, messages, params, request_id)

    @property
    def dead(self) -> BaseException | None:
        """What ended the engine for good, as a failure of the GPU does; every call raises it from then on."""
        return self._thread.error or self.engine.dead

    def abort(self, request_id: str) -> bool:
        """End the stream of that name: its last chunk has the finish reason "abort". False if there is none."""
        request = self._by_id.get(request_id)
        if request is not None:
            self._thread.abort([request])
        return request is not None

    async def shutdown(self, drain: bool = True) -> None:
        """Refuse new requests and end the thread, when what runs has finished or, without `drain`, at once.

        What is dropped ends with the finish reason "abort". A second call may drop what the first waits for, and
        so does cancelling it.
        """
        self._thread.close(drain)
        try:
            await asyncio.to_thread(self._thread.join)
        except asyncio.CancelledError:
            self._thread.close(drain=False)
            raise

    async def __aenter__(self: _Self) -> _Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.shutdown(drain=kind is None)

    async def _run(self, requests: list[Request]) -> list[RequestOutput]:
        inbox = _Inbox()
        with self._submitted(requests, inbox, every_chunk=False):
            left = len(requests)
            while left:
                left -= len(await inbox.take())
        outputs = [r.result() for r in requests]
        if failed := [r.error for r in requests if r.error is not None]:
            raise to_raise(failed[0], outputs)
        return outputs

    async def _stream(
        self, build: Callable[[], Request], prompt: object, params: Params, request_id: str | None
    ) -> AsyncIterator[StreamChunk]:
        request = await _built(build, prompt, params)
        with self._named(request, request_id):
            async with aclosing(self._batches([request])) as batches:
                async for batch in batches:
                    for _, chunk in batch:
                        yield chunk

    async def _batches(self, requests: list[Request]) -> AsyncGenerator[list[Tagged], None]:
        """What arrived since the last batch, at least one chunk, until all have ended."""
        inbox = _Inbox()
        index = {request: i for i, request in enumerate(requests)}
        left = len(requests)
        with self._submitted(requests, inbox, every_chunk=True):
            while left:
                batch = await inbox.take()
                left -= sum(chunk.request is not None for _, chunk in batch)
                yield [(index[request], chunk) for request, chunk in batch]
        if failed := [r.error for r in requests if r.error is not None]:
            raise to_raise(failed[0], [r.result() for r in requests])

    @contextmanager
    def _submitted(
        self, requests: list[Request], inbox: _Inbox, *, every_chunk: bool
    ) -> Iterator[None]:
        """While inside, chunks of the requests arrive in `inbox`; at the end what is unfinished is dropped."""
        box = _Box(asyncio.get_running_loop(), inbox, every_chunk)
        try:
            self._mail.boxes.update(dict.fromkeys(requests, box))
            self._thread.submit(requests)
            yield
        finally:
            for request in requests:
                del self._mail.boxes[request]
            if unfinished := [r for r in requests if not r.finished]:
                self._thread.abort(unfinished)

    @contextmanager
    def _named(self, request: Request, request_id: str | None) -> Iterator[None]:
        if request_id is None:
            yield
            return
        if self._by_id.setdefault(request_id, request) is not request:
            raise UsageError(f"request_id {request_id!r} is that of a request still running")
        try:
            yield
        finally:
            del self._by_id[request_id]


class _Inbox:
    """Chunks for one task of an event loop. It is much used: a queue of asyncio would take several times as long."""

    def __init__(self) -> None:
        self._chunks: list[tuple[Request, StreamChunk]] = []
        self._waiter: asyncio.Future[None] | None = None

    def put(self, request: Request, chunk: StreamChunk) -> None:
        self._chunks.append((request, chunk))
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> list[tuple[Request, StreamChunk]]:
        """All there are, when there is one."""
        if not self._chunks:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        taken, self._chunks = self._chunks, []
        return taken


class _Box(NamedTuple):
    """Where the chunks of a request go."""

    loop: asyncio.AbstractEventLoop
    inbox: _Inbox
    every_chunk: bool  # or only the last


class _Mail:
    """Carries chunks from the engine thread to the event loops; one wake-up a loop and step."""

    def __init__(self) -> None:
        self.boxes: dict[Request, _Box] = {}  # written by the loops, read by the engine thread

    def deliver(self, events: list[Event]) -> list[Request]:
        """Hand the chunks on; returns the requests whose loop has been closed."""
        batches: dict[asyncio.AbstractEventLoop, list[tuple[Request, _Box, StreamChunk]]] = {}
        for request, chunk in events:
            box = self.boxes.get(request)
            if box is not None and (box.every_chunk or chunk.request is not None):
                batches.setdefault(box.loop, []).append((request, box, chunk))
        gone: list[Request] = []
        for loop, batch in batches.items():
            try:
                loop.call_soon_threadsafe(_put, batch)
            except RuntimeError:  # the loop is closed
                gone += [request for request, _, _ in batch]
        return gone


def _put(batch: Iterable[tuple[Request, _Box, StreamChunk]]) -> None:
    for request, box, chunk in batch:
        box.inbox.put(request, chunk)


async def _built(build: Callable[[], _T], prompt: object, params: Params) -> _T:
    """`build()`, in a thread of its own where it takes long: much text to encode, images, a grammar to compile."""
    texts = [prompt] if isinstance(prompt, str) else prompt if isinstance(prompt, Iterable) else ()
    contents = [t.get("content") if isinstance(t, Mapping) else t for t in texts]
    length = sum(len(text) for text in contents if isinstance(text, str))
    slow = length > _LONG_TEXT or has_parts(texts)
    structured = params is not None and (
        not isinstance(params, SamplingParams) or params.structured is not None
    )
    return await asyncio.to_thread(build) if structured or slow else build()


def _stop(thread: EngineThread) -> None:
    thread.close(drain=False)
    thread.join()
