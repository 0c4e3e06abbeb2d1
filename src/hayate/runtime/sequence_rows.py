"""SequenceRows: what the device keeps of every running sequence, one row each.

A sequence gets a row when it first runs and keeps it until it ends, so that a step uploads only what is new: the
options of new sequences and the pages added since. The last token sampled lies here too; the next step takes it
from here, before the host knows it.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence as Seq
from typing import Literal

import numpy as np
import torch

from hayate.config import EnginePlan
from hayate.kernels import sampling
from hayate.runtime.sequence import Sequence
from hayate.runtime.upload import upload

# How tokens are chosen: the largest logit; a draw from all; a draw after top-k and top-p.
Choice = Literal["greedy", "draw", "filtered draw"]
NOT_IN_USE = -2  # the position of a row that takes no part in a decode step


class SequenceRows:
    """Rows for `plan.max_num_seqs` sequences: as many as can run at once."""

    def __init__(self, plan: EnginePlan, device: torch.device) -> None:
        self.plan, self.device = plan, device
        num_rows = -(-plan.max_num_seqs // 64) * 64  # so that all of the state is aligned
        num_columns = -(-plan.max_model_len // plan.page_size)
        self.pages = np.zeros((num_rows, num_columns), np.int32)  # the host's copy of page_table
        self.page_table = upload([self.pages], device)[0]
        state = torch.zeros(4, num_rows, dtype=torch.int64, device=device)
        self.tokens, self.positions, self.steps, self.seeds = state
        self.options = torch.zeros(4, num_rows, dtype=torch.int32, device=device)
        self._temperature = np.zeros(num_rows, np.float32)
        self._is_filtered = np.zeros(num_rows, bool)
        self._row_of: dict[Sequence, int] = {}
        self._num_pages = [0] * num_rows  # of the row's sequence, uploaded
        self._num_preemptions = [
            0
        ] * num_rows  # of the row's sequence, when its pages were uploaded
        self._free = list(range(plan.max_num_seqs))

    def place(self, sequences: Seq[Sequence]) -> list[int]:
        """The row of each sequence, its pages and options uploaded."""
        row_of = self._row_of
        fresh = [s for s in sequences if s not in row_of]
        if fresh:
            self._assign(fresh)
        rows = [row_of[s] for s in sequences]
        for row, sequence in zip(rows, sequences, strict=True):
            if sequence.num_preemptions != self._num_preemptions[row]:
                self._num_pages[row] = 0  # it has other pages now
                self._num_preemptions[row] = sequence.num_preemptions
        self.add_pages(rows, sequences)
        return rows

    def add_pages(self, rows: Seq[int], sequences: Seq[Sequence]) -> None:
        """Upload the pages that the sequences, which have these rows, got since the last call."""
        known = self._num_pages
        grown = [
            (row, s.page_ids)
            for row, s in zip(rows, sequences, strict=True)
            if len(s.page_ids) != known[row]
        ]
        if not grown:
            return
        counts = [len(pages) - known[row] for row, pages in grown]
        first = np.array([row * self.pages.shape[1] + known[row] for row, _ in grown])
        ends = np.cumsum(counts)
        places = np.arange(ends[-1]) + np.repeat(first - ends + counts, counts)
        values = np.concatenate([np.array(p[known[row] :], np.int32) for row, p in grown])
        self.pages.reshape(-1)[places] = values
        for row, pages in grown:
            known[row] = len(pages)
        if self.device.type != "cpu":  # where page_table is `pages` itself
            index, new = upload([places, values], self.device)
            self.page_table.view(-1).index_copy_(0, index, new)

    def release(self, sequence: Sequence) -> None:
        """Free the row of a sequence that has ended. Nothing happens if it has none."""
        row = self._row_of.pop(sequence, None)
        if row is not None:
            heapq.heappush(self._free, row)

    def clear(self) -> None:
        """Free all rows: every sequence starts over."""
        for sequence in list(self._row_of):
            self.release(sequence)

    def move_below(self, limit: int, sequences: Seq[Sequence]) -> list[int]:
        """The rows of `sequences` after moving those at `limit` and above to free rows below, as far as there are."""
        row_of = self._row_of
        above = [s for s in sequences if row_of[s] >= limit]
        below = [row for row in sorted(self._free) if row < limit]
        moved = above[: len(below)]
        if moved:
            old = [row_of.pop(s) for s in moved]
            self._assign(moved)
            self.add_pages([row_of[s] for s in moved], moved)
            for row in old:
                heapq.heappush(self._free, row)
            index = [np.array(old), np.array([row_of[s] for s in moved])]
            source, target = upload(index, self.device)
            self.tokens.index_copy_(0, target, self.tokens.index_select(0, source))
        return [row_of[s] for s in sequences]

    def _assign(self, sequences: Seq[Sequence]) -> None:
        if len(self._free) < len(sequences):
            for sequence in [s for s in self._row_of if s.status != "running"]:
                self.release(sequence)  # preempted, and still waiting
        rows = [heapq.heappop(self._free) for _ in sequences]
        params = [s.params for s in sequences]
        options = np.zeros((4, len(rows)), np.int32)
        options[0] = np.array([p.temperature or 0.0 for p in params], np.float32).view(np.int32)
        options[1] = [min(p.top_k or 0, 2**31 - 1) for p in params]
        options[2] = np.array([p.top_p or 1.0 for p in params], np.float32).view(np.int32)
        options[3] = np.array([p.min_p or 0.0 for p in params], np.float32).view(np.int32)
        self._temperature[rows] = options[0].view(np.float32)
        self._is_filtered[rows] = (options[1] > 0) | (options[2].view(np.float32) < 1)
        for row, sequence in zip(rows, sequences, strict=True):
            self._row_of[sequence] = row
            self._num_pages[row] = 0
            self._num_preemptions[row] = sequence.num_preemptions
        seeds = np.array([s.seed for s in sequences], np.int64)
        index, seeds_there, options_there = upload([np.array(rows), seeds, options], self.device)
        self.seeds.index_copy_(0, index, seeds_there)
        self.options.index_copy_(1, index, options_there)

    # -- sampling on the device -------------------------------------------------------------------

    def choice(self, rows: Seq[int]) -> Choice:
        """The cheapest way of choosing tokens that serves all these rows."""
        index = np.array(rows)
        if not self._temperature[index].any():
            return "greedy"
        return "filtered draw" if self._is_filtered[index].any() else "draw"


def draw(
    logits: torch.Tensor,
    choice: Choice,
    options: torch.Tensor,
    seeds: torch.Tensor,
    steps: torch.Tensor,
) -> torch.Tensor:
    """One token a row of logits (R, V): (R,) int64, -1 where they are not finite.

    options: (4, R) int32: temperature, top_k, top_p and min_p, all but top_k the bits of a float32.
    seeds, steps: (R,) int64.
    """
    if choice == "greedy":
        return sampling.argmax(logits)
    temperature, _, top_p, min_p = options.view(torch.float32)
    filters = choice == "filtered draw"
    return sampling.sample(
        logits, temperature, options[1], top_p, min_p, seeds, steps, filters=filters
    )
