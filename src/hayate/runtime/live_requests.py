"""LiveRequests: the requests an engine works on. Tokens become text here, and samples end here."""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable, Iterable

from hayate.errors import ModelError
from hayate.runtime.outputs import FinishReason, PositionLogprobs, StreamChunk
from hayate.runtime.request import Request, Sample
from hayate.runtime.sampling_row import SamplingRow
from hayate.runtime.sequence import Sequence

Event = tuple[Request, StreamChunk]


class LiveRequests:
    """Every sequence that has not ended, and whose it is. What a sample gives is added to lists of events.

    on_end: called with each sequence as it ends, for whatever reason.
    """

    def __init__(self, on_end: Callable[[Sequence], None]) -> None:
        self._on_end = on_end
        self._owners: dict[Sequence, tuple[Request, Sample]] = {}
        self._on_host: set[Sequence] = set()  # whose next token needs the host's sampler
        self._deadlines: list[tuple[float, int, Request]] = []  # a heap
        self._numbers = itertools.count()
        self.num_tokens = 0  # generated, of all requests there were

    def add(self, request: Request) -> None:
        for sample in request.samples:
            self._owners[sample.sequence] = (request, sample)
            if _needs_host(sample):
                self._on_host.add(sample.sequence)
        if request.deadline is not None:
            heapq.heappush(self._deadlines, (request.deadline, next(self._numbers), request))

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._owners

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        return tuple(self._owners)

    def row_of(self, sequence: Sequence) -> SamplingRow:
        return self._owners[sequence][1].row

    def sample_on_device(self, sequences: Iterable[Sequence]) -> bool:
        """Whether the next tokens of all these depend on temperature, top-k, top-p and min-p alone."""
        return self._on_host.isdisjoint(sequences)

    def append(
        self,
        sequence: Sequence,
        token: int,
        logprobs: PositionLogprobs | None,
        events: list[Event],
    ) -> None:
        """Add a sampled token, -1 where the logits were not finite; end the sequence if it stops here."""
        request, sample = self._owners[sequence]
        matcher, output = sample.row.matcher, sample.output
        try:
            if token < 0:
                raise _not_finite(sample)
            if matcher is not None:
                matcher.accept(token)
            emission = sample.stops.push(token, matcher is not None and matcher.is_complete)
        except Exception as error:  # the sample's own: the others of the step go on
            self.end(sequence, "error", events, error)
            return
        if request.first_token is None:
            request.begin()
        sequence.output_ids.append(token)
        self.num_tokens += 1
        output.token_ids.append(token)
        output.text += emission.text
        if output.logprobs is not None and logprobs is not None:
            output.logprobs.append(logprobs)
        chunk = StreamChunk(
            output.index,
            emission.text,
            (token,),
            emission.finish_reason,
            emission.stop_reason,
            (logprobs,) if logprobs is not None else (),
        )
        if emission.finish_reason is not None:
            output.finish_reason, output.stop_reason = emission.finish_reason, emission.stop_reason
            self._remove(sequence)
            chunk = request.emit(chunk)
        else:
            if request.streaming:
                request.chunks.append(chunk)
            if sequence in self._on_host and not _needs_host(sample):
                self._on_host.discard(sequence)
        events.append((request, chunk))

    def end(
        self,
        sequence: Sequence,
        reason: FinishReason,
        events: list[Event],
        error: BaseException | None = None,
    ) -> None:
        """End a sequence from outside. Nothing happens to one that has ended."""
        if sequence not in self._owners:
            return
        request, sample = self._owners[sequence]
        self._remove(sequence)
        try:
            chunk = request.close(sample, reason, error)
        except Exception as broken:  # even the text held back cannot be had
            sample.output.finish_reason = "error"
            request.error = request.error or error or broken
            chunk = request.emit(StreamChunk(sample.output.index, "", (), "error"))
        events.append((request, chunk))

    def expire(self, events: list[Event]) -> None:
        """End the requests whose time is over."""
        while self._deadlines and self._deadlines[0][0] <= time.perf_counter():
            for sample in heapq.heappop(self._deadlines)[2].samples:
                self.end(sample.sequence, "timeout", events)

    def _remove(self, sequence: Sequence) -> None:
        self._on_end(sequence)
        self._on_host.discard(sequence)
        del self._owners[sequence]


def _needs_host(sample: Sample) -> bool:
    """Whether the next token depends on more than the device knows by itself."""
    row = sample.row
    return (
        row.matcher is not None
        or row.has_penalties
        or bool(row.params.logit_bias)
        or row.params.logprobs is not None
        or len(row.output_ids) < row.params.min_tokens
    )


def _not_finite(sample: Sample) -> ModelError:
    matcher = sample.row.matcher
    if matcher is not None and matcher.error is not None:
        return ModelError(f"structured output cannot go on: {matcher.error}")
    return ModelError(
        "the model produced logits that are not finite (NaN or infinity): its dtype overflows, or its weights are "
        "damaged; try dtype bfloat16 or float32, else download the weights again"
    )
