"""What changes logits before a token is chosen: bias, bans, penalties and grammars.

Gathered on the host for all positions of a step while the GPU computes their logits, and uploaded without a wait.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hayate.kernels import apply_token_mask
from hayate.runtime.sampling_row import Position
from hayate.runtime.structured import Matcher, fill_masks
from hayate.runtime.upload import upload


class _Entries(NamedTuple):
    """Single elements of the logits: `values` belong to `logits[rows, ids]`."""

    rows: Tensor
    ids: Tensor
    values: tuple[Tensor, ...]


class _Masks(NamedTuple):
    mask: Tensor  # (R, words) int32
    rows: Tensor  # (R,) int64


@dataclass(frozen=True)
class LogitsChanges:
    """All changes of a step, on the device. A position has each id at most once in each."""

    bias: _Entries | None  # values: (bias,)
    bans: _Entries | None
    penalties: _Entries | None  # values: (count, repetition, presence, frequency)
    masks: _Masks | None

    @classmethod
    def build(
        cls, positions: Sequence[Position], vocab_size: int, device: torch.device
    ) -> LogitsChanges:
        """Gather what the positions ask for. Does not wait for the device."""
        return cls(
            bias=_bias(positions, device),
            bans=_bans(positions, vocab_size, device),
            penalties=_penalties(positions, device),
            masks=_masks(positions, device),
        )

    def apply(self, logits: Tensor) -> None:
        """Change logits (S, V) float32, one row a position, in place."""
        if self.bias is not None:
            rows, ids, (bias,) = self.bias
            logits[rows, ids] += bias
        if self.bans is not None:
            # Assigning the number itself would copy it to the GPU, and wait.
            minus_infinity = logits.new_full((), -torch.inf)
            logits[self.bans.rows, self.bans.ids] = minus_infinity
        if self.penalties is not None:
            rows, ids, (count, repetition, presence, frequency) = self.penalties
            value = logits[rows, ids]
            value = torch.where(value > 0, value / repetition, value * repetition)
            logits[rows, ids] = value - frequency * count - presence * (count > 0)
        if self.masks is not None:
            apply_token_mask(logits, *self.masks)


def _entries(
    rows: Sequence[int], ids: Sequence[int], values: Sequence[float], device: torch.device
) -> _Entries | None:
    if not rows:
        return None
    index, column = upload([np.array([rows, ids], np.int64), np.array(values, np.float32)], device)
    return _Entries(index[0], index[1], (column,))


def _bias(positions: Sequence[Position], device: torch.device) -> _Entries | None:
    found = [
        (i, token_id, bias)
        for i, position in enumerate(positions)
        for token_id, bias in (position.row.params.logit_bias or {}).items()
    ]
    return _entries([f[0] for f in found], [f[1] for f in found], [f[2] for f in found], device)


def _bans(positions: Sequence[Position], vocab_size: int, device: torch.device) -> _Entries | None:
    """End tokens outside the vocabulary are left out: the model cannot produce them."""
    found = [
        (i, token_id)
        for i, position in enumerate(positions)
        for token_id in position.banned_ids
        if token_id < vocab_size
    ]
    return _entries([f[0] for f in found], [f[1] for f in found], [], device)


def _penalties(positions: Sequence[Position], device: torch.device) -> _Entries | None:
    row_parts: list[np.ndarray] = []
    id_parts: list[np.ndarray] = []
    value_parts: list[np.ndarray] = []
    for i, (row, drafts) in enumerate(positions):
        if row.has_penalties:
            ids, counts = row.token_counts(drafts)
            values = np.empty((4, len(ids)), np.float32)
            values[0] = counts
            values[1:] = np.array(row.penalties)[:, None]
            row_parts.append(np.full(len(ids), i))
            id_parts.append(ids)
            value_parts.append(values)
    if not row_parts:
        return None
    index = np.stack((np.concatenate(row_parts), np.concatenate(id_parts)))
    (rows, ids), columns = upload([index, np.concatenate(value_parts, axis=1)], device)
    return _Entries(rows, ids, columns.unbind(0))


def _masks(positions: Sequence[Position], device: torch.device) -> _Masks | None:
    """Positions of one row follow each other, the one with most drafts last."""
    masked = [(i, p) for i, p in enumerate(positions) if p.row.matcher is not None]
    if not masked:
        return None
    matchers: list[tuple[Matcher, Sequence[int]]] = []
    for row, group in itertools.groupby((p for _, p in masked), key=lambda p: p.row):
        assert row.matcher is not None
        matchers.append((row.matcher, list(group)[-1].drafts))
    mask = np.empty((len(masked), matchers[0][0].num_words), np.int32)
    fill_masks(matchers, mask)
    return _Masks(*upload([mask, np.array([i for i, _ in masked], np.int64)], device))
