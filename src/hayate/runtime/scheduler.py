"""Scheduler: which sequences run in the next step, and how many of their tokens. No torch here.

Prompts first: waiting sequences are admitted in the order they came while pages and the token budget last, and
are prefilled together. Otherwise every running sequence decodes one token. When pages run out the youngest
running sequence is preempted: its pages are freed, and it is prefilled again, with what it has generated, later.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Literal

from hayate.errors import OutOfMemory
from hayate.runtime.page_allocator import PageAllocator
from hayate.runtime.sequence import Sequence


@dataclass(frozen=True)
class Step:
    """What runs: `num_tokens[i]` tokens of `sequences[i]`, from its `num_computed` on."""

    kind: Literal["prefill", "decode"]
    sequences: tuple[Sequence, ...]
    num_tokens: tuple[int, ...]


class Scheduler:
    def __init__(
        self, pages: PageAllocator, *, max_num_seqs: int, max_num_batched_tokens: int
    ) -> None:
        self.pages = pages
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence. OutOfMemory if it could never run, even alone."""
        capacity = self.pages.num_pages * self.pages.page_size
        if sequence.num_tokens + 1 > capacity:
            raise OutOfMemory(
                f"the prompt has {sequence.num_tokens} tokens and the KV cache holds {capacity} in all; "
                "shorten the prompt or raise --kv-memory"
            )
        self.waiting.append(sequence)

    def next_batch(self) -> Step | None:
        """The next step, its pages allocated; None when nothing can run."""
        return self._prefill() or self._decode()

    def finish(self, sequence: Sequence) -> None:
        """Remove a sequence, wherever it is, and free its pages."""
        if sequence.status == "running":
            self.running.remove(sequence)
        elif sequence.status == "waiting":
            self.waiting.remove(sequence)
        sequence.status = "finished"
        self.pages.release(sequence)

    def restart_running(self) -> None:
        """After a failed step: all running sequences give back their pages and wait, in their order."""
        for sequence in reversed(self.running.copy()):
            sequence.num_in_flight = 0
            self._preempt(sequence)

    def _prefill(self) -> Step | None:
        admitted: list[Sequence] = []
        counts: list[int] = []
        while self.waiting and len(self.running) < self.max_num_seqs:
            sequence = self.waiting[0]
            # A prompt longer than the budget runs alone; a batch of prompts stays within it.
            if counts and sum(counts) + sequence.num_uncomputed > self.max_num_batched_tokens:
                break
            # One more than needed now, so that the first decode step cannot fail at once.
            if not self.pages.extend(sequence, sequence.num_tokens + 1):
                break
            self.waiting.popleft()
            sequence.status = "running"
            self.running.append(sequence)
            admitted.append(sequence)
            counts.append(sequence.num_uncomputed)
        return Step("prefill", tuple(admitted), tuple(counts)) if admitted else None

    def _decode(self) -> Step | None:
        chosen: list[Sequence] = []
        for sequence in list(self.running):
            if sequence.status != "running":
                continue  # preempted on behalf of an older one in this loop
            while not self.pages.extend(sequence, sequence.num_computed + 1):
                youngest = self.running[-1]
                self._preempt(youngest)
                if youngest is sequence:
                    break
            else:
                chosen.append(sequence)
        return Step("decode", tuple(chosen), (1,) * len(chosen)) if chosen else None

    def _preempt(self, sequence: Sequence) -> None:
        assert sequence.num_in_flight == 0, "drain the pipeline before preempting"
        self.running.remove(sequence)
        self.pages.release(sequence)
        sequence.num_computed = 0
        sequence.status = "waiting"
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1
