"""cos and sin of every position, for RoPE types whose frequencies change with the length too.

Dynamic NTK and longrope choose frequencies by the current length of the sequence. A decode step at position p has
length p + 1, so row p of one static table serves all decode steps of all sequences. A prompt is rotated as a whole
with the frequencies of its full length; when these differ from the static rows it gets rows of its own, appended.
Keys already in the cache keep their rotation, as in transformers.
"""

from __future__ import annotations

from collections.abc import Sequence

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
        self, positions: list[int], spans: Sequence[tuple[int, int]]
    ) -> tuple[torch.Tensor, list[int]]:
        """Table and row of each position, for sequences whose tokens `begin .. end - 1` are computed together.

        `positions` is the concatenation of the spans.
        """
        special = [s for s in spans if s[1] > self.switch_len and s[1] - s[0] > 1]
        if not special:
            return self.cos_sin, positions
        tables, next_row = [self.cos_sin], self.cos_sin.shape[0]
        rows: list[int] = []
        for begin, end in spans:
            if (begin, end) not in special:
                rows += range(begin, end)
                continue
            table = self._table(end, seq_len=end)[begin:]
            tables.append(table.to(self.cos_sin.device))
            rows += range(next_row, next_row + end - begin)
            next_row += end - begin
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
