"""Engine: owns the loop. Requests in, chunks of text out, one step at a time.

On a GPU, decode steps of an unchanged set of sequences are pipelined: step n + 1 is launched before the tokens of
step n are read. A sequence found to have ended by then has run one step too many; that token is dropped.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from hayate.config import EnginePlan
from hayate.errors import ModelError
from hayate.models.decoder import CausalLM
from hayate.runtime.device import device_errors
from hayate.runtime.graphs import DecodeGraphs, PendingTokens
from hayate.runtime.outputs import PositionLogprobs, StreamChunk, TokenLogprob
from hayate.runtime.page_allocator import PageAllocator
from hayate.runtime.request import Request, Sample
from hayate.runtime.runner import Runner
from hayate.runtime.sampler import Sampler
from hayate.runtime.scheduler import Scheduler, Step
from hayate.runtime.sequence import Sequence

Event = tuple[Request, StreamChunk]


class Engine:
    """Runs requests over one model. Not safe for use from several threads."""

    def __init__(self, model: CausalLM, plan: EnginePlan) -> None:
        self.plan = plan
        self.runner = Runner(model, plan)
        self.pages = PageAllocator(plan.num_pages, plan.page_size)
        self.scheduler = Scheduler(
            self.pages,
            max_num_seqs=plan.max_num_seqs,
            max_num_batched_tokens=plan.max_num_batched_tokens,
        )
        self.sampler = Sampler()
        self.graphs = DecodeGraphs(self.runner) if self.runner.device.type == "cuda" else None
        self._owners: dict[Sequence, tuple[Request, Sample]] = {}
        self._pending: PendingTokens | None = None

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def submit(self, request: Request) -> None:
        """Queue all samples of `request`. OutOfMemory if its prompt can never fit the cache."""
        for sample in request.samples:
            self.scheduler.add(sample.sequence)
        for sample in request.samples:
            self._owners[sample.sequence] = (request, sample)

    def abort(self, request: Request) -> None:
        """Drop what is left of `request`, now. Nothing happens to a finished one."""
        for sample in request.samples:
            if sample.output.finish_reason is None and sample.sequence in self._owners:
                sample.output.finish_reason = "abort"
                sample.output.text += sample.stops.finish()
                self._finish(sample.sequence)

    def run(self, request: Request) -> Iterator[StreamChunk]:
        """Submit `request` and yield its chunks until it has finished; abort it if the caller stops early."""
        request.streaming = True
        self.submit(request)
        try:
            while request.chunks or not request.finished:
                if request.chunks:  # also those of steps that another caller ran
                    yield request.chunks.popleft()
                else:
                    self.step()
        finally:
            self.abort(request)

    def step(self) -> list[Event]:
        """Run one step and return what it produced (on a GPU, what the step before produced).

        When it raises, every sequence that was running starts over with the tokens it has.
        """
        try:
            with device_errors(self.runner.device, doing="running"):
                return self._step()
        except BaseException:
            self._pending = None
            if self.graphs is not None:
                self.graphs.reset()
            self.scheduler.restart_running()
            raise

    def _step(self) -> list[Event]:
        if self._pending is not None:
            pending, self._pending = self._pending, None
            if self._can_launch_ahead(pending):
                self._pending = self._launch(pending.sequences)
            return self._receive(pending)
        step = self.scheduler.next_batch()
        if step is None:
            return []
        if (
            step.kind == "decode"
            and self.graphs is not None
            and all(map(_graphable, step.sequences))
        ):
            self._pending = self._launch(step.sequences)
            return []
        if self.graphs is not None:
            self.graphs.reset()
        return self._sample(step, self.runner.forward(step))

    # -- pipelined decoding -----------------------------------------------------------------------

    def _can_launch_ahead(self, pending: PendingTokens) -> bool:
        """The same sequences can take one more step before the host knows their last token."""
        assert self.graphs is not None
        if self.scheduler.waiting or len(self.scheduler.running) != len(pending.sequences):
            return False
        if not self.graphs.continues(pending.sequences):
            return False
        if any(
            s.status != "running" or s.num_in_flight >= _tokens_left(s) for s in pending.sequences
        ):
            return False
        return self.pages.num_free >= len(pending.sequences)

    def _launch(self, sequences: tuple[Sequence, ...]) -> PendingTokens:
        assert self.graphs is not None
        has_next_slots = True
        for sequence in sequences:
            # The graph also finds the slot of the token after this one, where there will be one.
            room = min(sequence.num_computed + 2, sequence.max_len)
            has_next_slots = self.pages.extend(sequence, room) and has_next_slots
        pending = self.graphs.step(sequences)
        if not has_next_slots:
            self.graphs.reset()  # the next step begins with the slots written by the host
        return pending

    def _receive(self, pending: PendingTokens) -> list[Event]:
        events = []
        for sequence, token in zip(pending.sequences, pending.wait(), strict=True):
            sequence.num_in_flight -= 1
            if sequence.status == "running":
                events.append(self._append(sequence, token, None))
        return events

    # -- tokens -----------------------------------------------------------------------------------

    def _sample(self, step: Step, logits: torch.Tensor) -> list[Event]:
        rows = [self._owners[s][1].row for s in step.sequences]
        sampled = self.sampler.sample(logits, rows)
        logprobs = self._logprobs(step, logits, sampled.tokens)
        return [
            self._append(sequence, token, logprob)
            for sequence, token, logprob in zip(
                step.sequences, sampled.to_list(), logprobs, strict=True
            )
        ]

    def _logprobs(
        self, step: Step, logits: torch.Tensor, tokens: torch.Tensor
    ) -> list[PositionLogprobs | None]:
        """What the rows that ask for log-probabilities get."""
        counts = [s.params.logprobs for s in step.sequences]
        asked = [c for c in counts if c is not None]
        if not asked:
            return [None] * len(counts)
        found = self.sampler.logprobs(logits, tokens, max(asked))
        columns = (tokens, found.token, found.top_ids, found.top)
        result: list[PositionLogprobs | None] = []
        for count, token, logprob, top_ids, top in zip(
            counts, *(c.tolist() for c in columns), strict=True
        ):
            best = tuple(TokenLogprob(*pair) for pair in zip(top_ids, top, strict=True))
            taken = TokenLogprob(token, logprob)
            result.append(None if count is None else PositionLogprobs(taken, best[:count]))
        return result

    def _append(self, sequence: Sequence, token: int, logprobs: PositionLogprobs | None) -> Event:
        """Add a sampled token; emit the text it completes; finish the sequence if it stops here."""
        request, sample = self._owners[sequence]
        if token < 0:
            raise ModelError(
                "the model produced logits that are not finite (NaN); its weights or its dtype are not sound: "
                "try --dtype bfloat16 or float32"
            )
        if request.first_token is None:
            request.first_token = time.perf_counter()
        sequence.output_ids.append(token)
        emission = sample.stops.push(token)
        output = sample.output
        output.token_ids.append(token)
        output.text += emission.text
        if output.logprobs is not None and logprobs is not None:
            output.logprobs.append(logprobs)
        if emission.finish_reason is not None:
            output.finish_reason, output.stop_reason = emission.finish_reason, emission.stop_reason
            self._finish(sequence)
            if request.finished:
                request.end = time.perf_counter()
        chunk = StreamChunk(
            output.index,
            emission.text,
            (token,),
            emission.finish_reason,
            emission.stop_reason,
            (logprobs,) if logprobs is not None else (),
            request.result() if request.finished else None,
        )
        if request.streaming:
            request.chunks.append(chunk)
        return request, chunk

    def _finish(self, sequence: Sequence) -> None:
        self.scheduler.finish(sequence)
        del self._owners[sequence]


def _graphable(sequence: Sequence) -> bool:
    """Sampling options that the device applies by itself."""
    p = sequence.params
    return (
        p.repetition_penalty == 1
        and not (p.presence_penalty or p.frequency_penalty or p.logit_bias)
        and p.logprobs is None
        and len(sequence.output_ids) >= p.min_tokens
    )


def _tokens_left(sequence: Sequence) -> int:
    """Tokens the sequence may still take, in flight or not, beyond those the host knows."""
    assert sequence.params.max_tokens is not None
    return sequence.params.max_tokens - len(sequence.output_ids)
