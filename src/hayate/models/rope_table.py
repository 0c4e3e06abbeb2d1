"""cos and sin of every position, for RoPE types whose frequencies change with the length too.

Dynamic NTK and longrope choose frequencies by the current length of the sequence. A decode step at position p has
length p + 1, so row p of one static table serves all decode steps of all sequences. A prompt is rotated
with the frequencies of its full length; when these differ from the static rows it gets rows of its own, appended.
Keys already in the cache keep their rotation, as in transformers.
"""

from __future__ import annotations

import numpy as np
import torch

from hayate.kernels.rope import RopeParameters, rope_table
from hayate.kernels.rope_frequencies import dynamic_frequencies, rope_frequencies


class RopeTable:
    def __init__(self, rope: RopeParameters, max_len: int, *, device: torch.device) -> None:
        self.rope = rope
        lengths = {"dynamic": rope.max_position_embeddings, "longrope": rope.original_length}
        self.switch_len = lengths.get(rope.rope_type, max_len)
        self.cos_sin = self._static(max_len).to(device)

    def rows(
        self, positions: np.ndarray, begins: np.ndarray, ends: np.ndarray, prompt_lens: np.ndarray
    ) -> tuple[torch.Tensor, np.ndarray]:
        """Table and row of each position: sequence i computes its positions begins[i] .. ends[i] - 1.

        `positions` (T,) int64 is the concatenation of these spans. The row depends on the position and the length of
        the prompt alone, not on how the prompt is cut into steps.
        """
        special = np.flatnonzero((prompt_lens > self.switch_len) & (begins < prompt_lens))
        if not len(special):
            return self.cos_sin, positions
        tables, next_row = [self.cos_sin], self.cos_sin.shape[0]
        rows = positions.copy()
        first_row = np.concatenate([[0], np.cumsum(ends - begins)])
        for i in special:
            length, begin = int(prompt_lens[i]), int(begins[i])
            table = self._table(length, seq_len=length)[begin : int(ends[i])]
            tables.append(table.to(self.cos_sin.device))
            rows[first_row[i] : first_row[i] + len(table)] = next_row + np.arange(len(table))
            next_row += len(table)
        return torch.cat(tables), rows

    def _table(self, num_rows: int, seq_len: int) -> torch.Tensor:
        inv_freq, factor = rope_frequencies(self.rope, seq_len)
        return rope_table(inv_freq, factor, num_rows)

    def _static(self, max_len: int) -> torch.Tensor:
        """Row p with the frequencies of length p + 1."""
        short = self._table(min(self.switch_len, max_len), seq_len=1)
        if max_len <= self.switch_len:
            return short
        if self.rope.rope_type == "longrope":
            return torch.cat([short, self._table(max_len, seq_len=max_len)[self.switch_len :]])
        positions = torch.arange(self.switch_len, max_len)
        angles = dynamic_frequencies(self.rope, positions + 1) * positions[:, None]
        return torch.cat([short, torch.cat([angles.cos(), angles.sin()], dim=-1)])
