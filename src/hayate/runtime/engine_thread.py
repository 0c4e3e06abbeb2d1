"""EngineThread: an engine in a thread of its own, fed and read from any other."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterable

from hayate.errors import UsageError, to_raise
from hayate.runtime.engine import Engine, Event
from hayate.runtime.outputs import StreamChunk
from hayate.runtime.request import Request


class EngineThread:
    """Runs one engine. Every method may be called from any thread; none waits for a step, but `join`.

    `deliver` is called in the engine thread, after each step, with the chunks of that step; it returns the requests
    that nobody waits for any more, which are then aborted. The last chunk of a request, the one with
    `chunk.request`, comes exactly once, whatever happens: a request that cannot run, an abort, an engine that dies.

    The thread starts with the first request, sleeps while there is nothing to do, and ends with `close`.
    """

    def __init__(self, engine: Engine, deliver: Callable[[list[Event]], Iterable[Request]]) -> None:
        self._engine = engine
        self._deliver = deliver
        self._wake = threading.Condition()  # guards all below but `_live`
        self._submitted: list[Request] = []
        self._aborted: list[Request] = []
        self._closing = False
        self._dropping = False  # closing without finishing what runs
        self.error: BaseException | None = None  # what killed the engine
        self._thread: threading.Thread | None = None
        # The engine thread's own, in order: submitted, last chunk not delivered.
        self._live: dict[Request, None] = {}

    def submit(self, requests: Iterable[Request]) -> None:
        """Queue requests. Raises the error of a dead engine; UsageError after `close`."""
        with self._wake:
            if self.error is not None:
                raise to_raise(self.error)
            if self._closing:
                raise UsageError("this AsyncLLM was shut down; make a new one")
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="hayate-engine", daemon=True)
                self._thread.start()
            self._submitted += requests
            self._wake.notify()

    def abort(self, requests: Iterable[Request]) -> None:
        """End requests before the next step; nothing happens to finished ones."""
        with self._wake:
            self._aborted += requests
            self._wake.notify()

    def close(self, drain: bool) -> None:
        """Accept no more requests; end the thread when those here have finished, or, without `drain`, now."""
        with self._wake:
            self._closing = True
            self._dropping = self._dropping or not drain
            self._wake.notify()

    def join(self) -> None:
        """Wait until the thread has ended, after `close`, and close the engine."""
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        self._engine.close()

    # -- in the engine thread -----------------------------------------------------------------------

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            while self._turn():
                pass
        except BaseException as caught:  # nobody above would see it: the callers get it
            error = caught
        with self._wake:
            self._closing, self.error = True, error
            self._live |= dict.fromkeys(self._submitted)
            self._submitted = []
        for request in list(self._live):
            if error is None:
                self._hand_out(self._drop(request))
            else:
                self._hand_out(_failed(request, error))

    def _turn(self) -> bool:
        """Take in what came, and run one step. False when the thread is to end."""
        with self._wake:
            self._wake.wait_for(self._has_something)
            submitted, self._submitted = self._submitted, []
            aborted, self._aborted = self._aborted, []
            closing = self._closing
        for request in submitted:
            self._admit(request)
        if self._dropping:
            return False
        for request in aborted:
            self._hand_out(self._drop(request))
        worked = self._engine.has_work
        if worked:
            self._hand_out(self._engine.step())
        if self._engine.dead is not None:
            raise self._engine.dead
        return worked or not closing

    def _has_something(self) -> bool:
        return bool(self._submitted or self._aborted or self._closing or self._engine.has_work)

    def _admit(self, request: Request) -> None:
        self._live[request] = None
        try:
            self._engine.submit(request)
        except Exception as error:
            self._hand_out(_failed(request, error))

    def _drop(self, request: Request) -> list[Event]:
        """Abort a request that has not finished; its last chunks."""
        if request not in self._live:
            return []
        shown = {s: len(s.output.text) for s in request.samples if s.output.finish_reason is None}
        self._engine.abort(request)
        chunks = [
            StreamChunk(s.output.index, s.output.text[length:], (), "abort")
            for s, length in shown.items()
        ]
        return [(request, chunk) for chunk in chunks[:-1]] + [
            (request, dataclasses.replace(chunks[-1], request=request.result()))
        ]

    def _hand_out(self, events: list[Event]) -> None:
        for request, chunk in events:
            if chunk.request is not None:
                self._live.pop(request, None)
        for request in self._deliver(events):
            self._drop(request)
            self._live.pop(request, None)


def _failed(request: Request, error: BaseException) -> list[Event]:
    """Close what is left of a request that cannot go on; its last chunks."""
    chunks = [
        request.close(sample, "error", error)
        for sample in request.samples
        if sample.output.finish_reason is None
    ]
    if not chunks:  # it had ended, but its last chunk was lost with the step
        chunks = [StreamChunk(0, "", (), "error", request=request.result())]
    return [(request, chunk) for chunk in chunks]
