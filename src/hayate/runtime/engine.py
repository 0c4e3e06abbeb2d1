"""Engine: owns the loop. Requests in, chunks of text out, one step at a time.

On a GPU the steps are pipelined: step n + 1 is launched before the tokens of step n are read, whatever runs in them.
A sequence found to have ended by then has run one step too many; that token is dropped. What the choice of a token
needs from the host (penalties, grammars) is prepared while the GPU computes the logits. Only a step that verifies
drafts waits for the one before, and is waited for.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq

import torch

from hayate.config import EnginePlan
from hayate.errors import GpuFault, UsageError, to_raise
from hayate.models.decoder import CausalLM
from hayate.runtime.device import device_errors
from hayate.runtime.engine_stats import EngineStats
from hayate.runtime.image_encoder import ImageEncoder
from hayate.runtime.live_requests import Event, LiveRequests
from hayate.runtime.outputs import PositionLogprobs, StreamChunk
from hayate.runtime.page_allocator import PageAllocator
from hayate.runtime.pending import Pending, pending_tokens, sample_pending
from hayate.runtime.request import Request
from hayate.runtime.runner import Runner
from hayate.runtime.sampler import Sampler
from hayate.runtime.scheduler import Scheduler, Step
from hayate.runtime.sequence import Sequence
from hayate.runtime.speculation import Speculation
from hayate.runtime.speculative import make_speculator
from hayate.sampling_params import SamplingParams


class Engine:
    """Runs requests over one model. Not safe for use from several threads, save for `stats`.

    draft_model: guesses tokens, when `plan.speculative` names one.
    """

    def __init__(
        self, model: CausalLM, plan: EnginePlan, draft_model: CausalLM | None = None
    ) -> None:
        self.plan = plan
        self.runner = Runner(model, plan)
        self.pages = PageAllocator(plan.num_pages, plan.page_size, prefix_cache=plan.prefix_cache)
        self.scheduler = Scheduler(
            self.pages,
            max_num_seqs=plan.max_num_seqs,
            max_num_batched_tokens=plan.max_num_batched_tokens,
            max_chunk_tokens=plan.max_chunk_tokens,
        )
        self.images = ImageEncoder(model, model.config.hidden_size, plan)
        self.sampler = Sampler()
        self.speculation = self._speculation(model.config.vocab_size, draft_model)
        self._dead: GpuFault | None = None
        self._live = LiveRequests(self._forget)
        self._pending: Pending | None = None
        self._in_hand: tuple[Sequence, ...] = ()  # whose work fails if the next line fails
        self._pipelined = self.runner.graphs is not None
        self.num_steps = self.num_prompt_tokens = 0  # totals

    def _speculation(self, vocab_size: int, draft_model: CausalLM | None) -> Speculation | None:
        speculator = make_speculator(self.plan, vocab_size, draft_model)
        if speculator is None:
            return None
        speculator.matcher_of = lambda sequence: self._live.row_of(sequence).matcher
        return Speculation(speculator, self.runner.verifies_faster_padded)

    @property
    def dead(self) -> GpuFault | None:
        """Why nothing runs any more: the failure of the GPU."""
        return self._dead

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self.images.has_work

    @property
    def num_generated_tokens(self) -> int:
        return self._live.num_tokens

    @property
    def stats(self) -> EngineStats:
        """The figures of this moment; may be read from any thread."""
        return EngineStats.of(self)

    def submit(self, request: Request) -> None:
        """Queue all samples of `request`. RequestTooLarge if it could never fit the cache; GpuFault after one.

        One with images is scheduled when these are encoded.
        """
        if self.dead is not None:
            raise to_raise(self.dead)
        switch_len = self.runner.rope.switch_len
        for sample in request.samples:
            sample.sequence.shareable = len(sample.sequence.prompt_ids) <= switch_len
        if request.images:
            self.scheduler.check_fits(request.samples[0].sequence)
            self.images.add(request)
        else:
            self._schedule(request)
        self._live.add(request)

    def _schedule(self, request: Request) -> None:
        for sample in request.samples:
            self.scheduler.add(sample.sequence)

    def abort(self, request: Request) -> None:
        """Drop what is left of `request`, now. Nothing happens to a finished one."""
        for sample in request.samples:
            self._live.end(sample.sequence, "abort", [])

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

        A step that fails ends the requests in it, with the finish reason "error", and no others; a failure of the GPU
        ends all, and `dead` says so. Nothing is raised but what is no `Exception`, such as KeyboardInterrupt: then
        every sequence that was running starts over with the tokens it has.
        """
        events: list[Event] = []
        self._expire(events)
        try:
            with device_errors(self.runner.device, doing="running"):
                self._encode(events)
                self._step(events)
        except GpuFault as fault:
            self._die(fault, events)
        except Exception as error:
            self._recover(error, events)
        except BaseException:
            self._restart()
            raise
        return events

    def logits(self, ids: Seq[int]) -> torch.Tensor:
        """Logits (T, V) float32 on the CPU, after each of `ids`. UsageError if they do not fit the KV cache now."""
        params = SamplingParams(temperature=0)
        sequence = Sequence(list(ids), params, self.plan.max_model_len, 0)
        if not self.pages.extend(sequence, sequence.num_tokens):
            raise UsageError(
                f"{sequence.num_tokens} tokens do not fit the free part of the KV cache; raise kv_memory"
            )
        try:
            with device_errors(self.runner.device, doing="running"):
                return self.runner.all_logits(sequence).float().cpu()
        finally:
            self.pages.release(sequence)

    def close(self) -> None:
        """End what belongs to the engine alone. Nothing in one process: its memory goes with the object."""

    def _expire(self, events: list[Event]) -> None:
        """End the requests whose time is over, before a step."""
        self._live.expire(events)

    def _encode(self, events: list[Event]) -> None:
        """Encode some images; schedule the requests that have all of theirs. A failure ends its request alone."""
        before = self.images.num_images_encoded
        while self.images.num_images_encoded == before and (request := self.images.next()):
            try:
                with device_errors(self.runner.device, doing="encoding images"):
                    complete = self.images.encode(request)
            except GpuFault:
                raise
            except Exception as error:
                for sample in request.samples:
                    self._live.end(sample.sequence, "error", events, error)
                continue
            if not complete:
                break
            self._schedule(request)

    def _step(self, events: list[Event]) -> None:
        self._in_hand = tuple(self.scheduler.running)
        if self.speculation is not None and self.speculation.wants(self._in_hand):
            self._receive(events)
            self.speculation.propose(self.scheduler.running)
        step = self.scheduler.next_batch()
        if step is None:
            if self._pending is None and self.speculation is not None:
                self.speculation.pause()
            self._receive(events)
            return
        self._in_hand = step.sequences
        verifies = any(step.num_drafts)
        if self.speculation is not None and not verifies:
            self.speculation.withdraw()
        on_device = self._live.sample_on_device(step.sequences)
        launched = self.runner.launch(step, on_device=on_device)
        self._count(step)
        if launched.tokens is not None:
            ahead = pending_tokens(step, launched)
            self._receive(events)  # of the step before, while the device computes this one
        else:
            self._receive(events)
            self._in_hand = step.sequences
            ahead, tokens = sample_pending(step, launched, self.sampler, self._live.row_of)
            if self._pipelined and not verifies:
                self.runner.keep_tokens(ahead.sequences, tokens)
        self._pending = ahead
        if verifies or not self._pipelined:
            self._receive(events)
        elif not self.scheduler.has_work:
            self._pending = None  # all have ended: what is in flight belongs to nobody
            if self.speculation is not None:
                self.speculation.pause()

    def _count(self, step: Step) -> None:
        self.num_steps += 1
        if not step.is_decode:
            chunks = zip(step.num_tokens, step.num_drafts, strict=True)
            self.num_prompt_tokens += sum(n for n, drafts in chunks if n > 1 + drafts)

    # -- tokens -----------------------------------------------------------------------------------

    def _receive(self, events: list[Event]) -> None:
        """Take the tokens of the step in flight, if any; waits for them."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        self._in_hand = pending.sequences
        tokens, logprobs = pending.wait()
        start = 0
        for sequence, count in zip(pending.sequences, pending.num_outputs, strict=True):
            sequence.num_in_flight -= 1
            if sequence.status != "finished":
                if count == 1:
                    self._append(sequence, tokens[start], logprobs[start], events)
                else:
                    end = start + count
                    self._accept(sequence, tokens[start:end], logprobs[start:end], events)
            start += count
        if self.speculation is not None:
            self.speculation.received(pending)

    def _accept(
        self,
        sequence: Sequence,
        tokens: list[int],
        logprobs: list[PositionLogprobs | None],
        events: list[Event],
    ) -> None:
        """Of a verify step: the tokens up to the first that is not its draft, or that ends the sequence."""
        for i, token in enumerate(tokens):
            self._append(sequence, token, logprobs[i], events)
            if sequence.status == "finished" or sequence.draft_ids[i : i + 1] != [token]:
                break
        if sequence.status == "running":
            sequence.num_computed = sequence.num_tokens - 1

    def _append(
        self,
        sequence: Sequence,
        token: int,
        logprobs: PositionLogprobs | None,
        events: list[Event],
    ) -> None:
        if token < 0:
            self.pages.forget()  # what others would share may not be finite either
            self.images.forget()
        self._live.append(sequence, token, logprobs, events)
        if self.speculation is not None and sequence.status != "finished":
            self.speculation.observe(sequence, token)

    def _forget(self, sequence: Sequence) -> None:
        """The sequence has ended."""
        self.scheduler.finish(sequence)
        self.images.release(sequence)
        self.runner.release(sequence)
        if self.speculation is not None:
            self.speculation.forget(sequence)

    # -- failures ---------------------------------------------------------------------------------

    def _restart(self) -> None:
        self._pending = None
        self.scheduler.restart_running()
        self.runner.reset()
        if self.speculation is not None:
            self.speculation.pause()

    def _recover(self, error: Exception, events: list[Event]) -> None:
        """After a failed step: its requests end, the others go on."""
        failed = self._in_hand or self._live.sequences
        try:
            with device_errors(self.runner.device, doing="running"):
                self._receive(events)  # the step before is whole
        except GpuFault as fault:
            self._die(fault, events)
            return
        except Exception:
            failed += self._in_hand
        self._restart()
        for sequence in failed:
            self._live.end(sequence, "error", events, error)

    def _die(self, fault: GpuFault, events: list[Event]) -> None:
        self._dead, self._pending = fault, None
        for sequence in self._live.sequences:
            self._live.end(sequence, "error", events, fault)
