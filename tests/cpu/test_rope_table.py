"""RopeTable: a token's rotation depends on its position and the length of its prompt, not on how steps are cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hayate.kernels.rope import rope_table
from hayate.kernels.rope_frequencies import RopeParameters, rope_frequencies
from hayate.models.rope_table import RopeTable

TYPES = {
    "default": RopeParameters(rotary_dim=8),
    "dynamic": RopeParameters(
        rotary_dim=8, rope_type="dynamic", factor=2.0, max_position_embeddings=16
    ),
    "longrope": RopeParameters(
        rotary_dim=8,
        rope_type="longrope",
        short_factor=(1.0, 1.1, 1.2, 1.3),
        long_factor=(2.0, 2.5, 3.0, 4.0),
        original_max_position_embeddings=16,
        max_position_embeddings=64,
    ),
}


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("prompt_len", [12, 16, 17, 40])
def test_chunks_and_outputs(name, prompt_len):
    rope = TYPES[name]
    table = RopeTable(rope, 64, device=torch.device("cpu"))
    for begin, end in [(0, prompt_len), (0, 7), (7, 12), (11, prompt_len + 6), (prompt_len, 50)]:
        # A second sequence, short, stands before it: rows are found by place, not by position.
        begins, ends = np.array([2, begin]), np.array([5, end])
        positions = np.concatenate([np.arange(2, 5), np.arange(begin, end)])
        cos_sin, rows = table.rows(positions, begins, ends, np.array([9, prompt_len]))
        found = cos_sin[torch.from_numpy(rows)]
        lengths = [9] * 3
        lengths += [prompt_len if p < prompt_len else p + 1 for p in range(begin, end)]
        for row, position, length in zip(found, positions.tolist(), lengths, strict=True):
            inv_freq, factor = rope_frequencies(rope, length)
            expected = rope_table(inv_freq, factor, position + 1)[position]
            torch.testing.assert_close(row, expected, rtol=1e-5, atol=1e-6)
