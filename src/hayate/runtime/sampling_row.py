"""What the sampler knows of a sequence: its options, its tokens, and what may come next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from hayate.runtime.structured import Matcher
from hayate.sampling_params import SamplingParams


class _TokenCounts:
    """The distinct tokens of prompt and output, and how often each occurs in the output."""

    def __init__(self, prompt_ids: Sequence[int]) -> None:
        distinct = dict.fromkeys(prompt_ids)
        self._slot = {token_id: i for i, token_id in enumerate(distinct)}
        self._ids = np.fromiter(distinct, dtype=np.int64, count=len(distinct))
        self._counts = np.zeros(len(distinct), dtype=np.int64)
        self._num_counted = 0

    def update(self, output_ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Count the tokens new in `output_ids`; returns all distinct ids, and their counts."""
        for token_id in output_ids[self._num_counted :]:
            slot = self._slot.setdefault(token_id, len(self._slot))
            if slot == len(self._ids):
                grow = max(64, slot)  # doubling, so that appending is O(1) amortised
                self._ids = np.pad(self._ids, (0, grow))
                self._counts = np.pad(self._counts, (0, grow))
            self._ids[slot] = token_id
            self._counts[slot] += 1
        self._num_counted = len(output_ids)
        return self._ids[: len(self._slot)], self._counts[: len(self._slot)]


@dataclass(eq=False)
class SamplingRow:
    """One sequence as the sampler sees it; keep the same object for the life of the sequence.

    params: resolved (`SamplingParams.resolved`). seed: of the request, also when the user gave
    none. output_ids: the tokens generated so far; the owner appends to this list. stop_ids: the
    tokens that would end the sequence (`stop_token_ids`, and the end tokens unless `ignore_eos`).
    sample_index: which of the request's n samples this is. matcher: for structured output; it has
    accepted the tokens of `output_ids`.
    """

    params: SamplingParams
    seed: int
    prompt_ids: Sequence[int] = ()
    output_ids: list[int] = field(default_factory=list)
    stop_ids: frozenset[int] = frozenset()
    sample_index: int = 0
    matcher: Matcher | None = None

    def __post_init__(self) -> None:
        params = self.params
        assert params.temperature is not None, "params must be resolved"
        assert params.top_k is not None
        assert params.top_p is not None
        assert params.min_p is not None
        assert params.repetition_penalty is not None
        self.temperature = params.temperature
        self.top_k = params.top_k
        self.top_p = params.top_p
        self.min_p = params.min_p
        self.penalties = (
            params.repetition_penalty,
            params.presence_penalty,
            params.frequency_penalty,
        )
        self.has_penalties = self.penalties != (1.0, 0.0, 0.0)
        repeats = self.has_penalties and params.repetition_penalty != 1.0
        self._counts = _TokenCounts(self.prompt_ids if repeats else ())

    def token_counts(self, drafts: Sequence[int] = ()) -> tuple[np.ndarray, np.ndarray]:
        """Distinct ids of prompt (if tokens of it are penalised), output and drafts; their counts."""
        ids, counts = self._counts.update(self.output_ids)
        if drafts:
            every = np.concatenate((ids, np.array(drafts, np.int64)))
            ids, place = np.unique(every, return_inverse=True)
            ones = np.ones(len(drafts), np.int64)
            counts = np.bincount(place, weights=np.concatenate((counts, ones))).astype(np.int64)
        return ids, counts


class Position(NamedTuple):
    """A token to be chosen: the one after the row's output and `drafts`, tokens guessed to follow it."""

    row: SamplingRow
    drafts: Sequence[int] = ()

    @property
    def step(self) -> int:
        """Number of the token in the output, from 0."""
        return len(self.row.output_ids) + len(self.drafts)

    @property
    def banned_ids(self) -> frozenset[int]:
        """The tokens that would end the sequence too early."""
        return self.row.stop_ids if self.step < self.row.params.min_tokens else frozenset()

    @property
    def changes_logits(self) -> bool:
        row = self.row
        return bool(row.matcher or row.has_penalties or row.params.logit_bias or self.banned_ids)


def positions_of(
    rows: Sequence[SamplingRow], drafts: Sequence[Sequence[int]] | None = None
) -> list[Position]:
    """The next position of each row; with drafts, 1 + len(drafts[i]) of row i in turn."""
    if drafts is None:
        return [Position(row) for row in rows]
    return [
        Position(row, ids[:i])
        for row, ids in zip(rows, drafts, strict=True)
        for i in range(len(ids) + 1)
    ]
