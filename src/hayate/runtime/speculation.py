"""The engine's side of speculation: which sequences take drafts, how many, and what the speculator is told."""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Seq

from hayate.runtime.pending import Pending
from hayate.runtime.sequence import Sequence
from hayate.runtime.speculative import Speculator


class Speculation:
    """Asks a `Speculator` for drafts between steps.

    pads: (sequences, queries of each) -> whether a verify step of that shape runs faster when every sequence has
    exactly that many queries.
    """

    def __init__(self, speculator: Speculator, pads: Callable[[int, int], bool]) -> None:
        self.speculator = speculator
        self.stats = speculator.stats
        self.observe = speculator.observe
        self.forget = speculator.forget
        self._pads = pads
        # Of the verify step in hand: drafts proposed to each sequence, and its output before.
        self._proposed: dict[Sequence, tuple[int, int]] = {}
        self._last_received: float | None = None  # None: the next interval is not one of decoding

    def wants(self, running: Seq[Sequence]) -> bool:
        """Whether the next step should verify drafts: then nothing must be in flight."""
        return self.speculator.wants([s for s in running if s.num_uncomputed == 1])

    def propose(self, running: Seq[Sequence]) -> None:
        """Give drafts to the sequences that decode; nothing is in flight."""
        ready = [s for s in running if s.num_uncomputed == 1]
        drafts = self.speculator.propose(ready, [s.limit - s.num_tokens - 1 for s in ready])
        most = max(map(len, drafts), default=0)
        if not most:
            return
        # A verify step of few sequences is replayed in a few sizes: what is missing is made up. A token made up is
        # computed as any draft and accepted if it is right.
        size = next(k for k in self.speculator.draft_sizes if k >= most)
        pads = len(ready) == len(running) and self._pads(len(ready), size + 1)
        for sequence, ids in zip(ready, drafts, strict=True):
            self._proposed[sequence] = len(ids), len(sequence.output_ids)
            missing = size - len(ids) if pads else 0
            sequence.draft_ids = ids + [0] * missing

    def received(self, pending: Pending) -> None:
        """The tokens of a step have been appended."""
        now, step = time.perf_counter(), pending.step
        seconds = None if self._last_received is None else now - self._last_received
        if pending.launched.first_run:
            seconds = None
        verifies, tokens = any(step.num_drafts), sum(step.num_tokens)
        only_decodes = all(step.samples) and tokens == len(step.sequences) + sum(step.num_drafts)
        if verifies:
            self._record(pending, seconds if only_decodes else None)
        elif only_decodes and seconds is not None:
            self.speculator.record_decode(len(step.sequences), seconds)
        self._last_received = now if only_decodes else None
        self.withdraw()

    def _record(self, pending: Pending, seconds: float | None) -> None:
        drafted, accepted = [], []
        for sequence, count in zip(pending.sequences, pending.num_outputs, strict=True):
            proposed, before = self._proposed.get(sequence, (0, 0))
            drafted.append(min(proposed, count - 1))
            accepted.append(max(min(len(sequence.output_ids) - before - 1, drafted[-1]), 0))
        self.speculator.record_verify(pending.sequences, drafted, accepted, seconds)

    def withdraw(self) -> None:
        """The drafts have been verified, or cannot be in this step."""
        for sequence in self._proposed:
            sequence.draft_ids = []
        self._proposed.clear()

    def pause(self) -> None:
        """Nothing runs now: the time until the next step is not a step's."""
        self._last_received = None
        self.withdraw()
