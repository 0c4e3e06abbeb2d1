"""The token mask against a loop over bits; and the sampler's GPU form against its CPU form."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hayate.errors import UsageError
from hayate.kernels import apply_token_mask
from hayate.kernels._dispatch import Implementation, use
from hayate.runtime.sampler import Sampler
from hayate.runtime.sampling_row import SamplingRow
from hayate.sampling_params import SamplingParams
from hayate.text.tokenizer import GenerationDefaults

IMPLEMENTATIONS: tuple[Implementation, ...] = ("reference", "triton")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("V", "words"), [(1, 1), (31, 1), (32, 1), (33, 2), (1500, 49), (2048, 64)]
)
def test_against_a_loop(
    V: int, words: int, dtype: torch.dtype, implementation: Implementation
) -> None:
    rng = np.random.default_rng(V)
    mask = rng.integers(-(2**31), 2**31, (3, words + 2)).astype(np.int32)[:, :words]
    mask[0] = -1
    rows = [4, 0, 2]
    wide = torch.randn(6, V + 3).to(dtype)
    logits = wide[:, :V]  # rows further apart than they are long
    expected = wide.clone()
    for r, row in enumerate(rows):
        for i in range(V):
            if not (int(mask[r, i // 32]) >> (i % 32)) & 1:
                expected[row, i] = -torch.inf
    with use(implementation):
        apply_token_mask(logits, torch.from_numpy(mask), torch.tensor(rows))
    assert torch.equal(wide, expected)


def test_a_mask_of_another_vocabulary_is_refused() -> None:
    logits, rows = torch.zeros(2, 65), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(UsageError, match="65 tokens"):
        apply_token_mask(logits, torch.zeros(1, 2, dtype=torch.int32), rows)
    with pytest.raises(UsageError, match="int64"):
        apply_token_mask(logits, torch.zeros(1, 3, dtype=torch.int64), rows)


def sampled(logits: torch.Tensor, implementation: Implementation) -> list[list[int]]:
    options = [
        {"temperature": 1.0},
        {},
        {"temperature": 0.7, "top_k": 5},
        {"temperature": 1.2, "top_p": 0.7, "repetition_penalty": 1.3},
        {"temperature": 0.9, "min_p": 0.1, "frequency_penalty": 0.5},
        {"logit_bias": {11: 30.0}},
        {"temperature": 1.0, "top_k": 50, "top_p": 0.9, "min_tokens": 3},
        {"temperature": 1e-40},
    ]
    rows = [
        SamplingRow(
            SamplingParams(**o).resolved(GenerationDefaults()),  # type: ignore[arg-type]
            seed=2**40 + i,
            prompt_ids=[1, 2, 3],
            output_ids=[4, 4, 9][: i % 4],
            stop_ids=frozenset({0, 5}),
            sample_index=i % 2,
        )
        for i, o in enumerate(options)
    ]
    drafts = [[7], [], [1, 2], [9, 8], [], [3], [], []]
    with use(implementation):
        return Sampler().sample(logits, rows, drafts).packed.tolist()


def test_the_sampler_draws_the_same_on_both_devices() -> None:
    """Random logits are far from any border of a decision, so rounding changes no token."""
    logits = torch.randn(14, 700) * 3
    before = logits.clone()
    assert sampled(logits, "triton") == sampled(logits, "reference")
    assert torch.equal(logits, before)
    logits[5, 3] = torch.nan
    logits[9] = -torch.inf
    tokens, finite = sampled(logits, "triton")
    assert finite == sampled(logits, "reference")[1]
    assert [i for i, ok in enumerate(finite) if not ok] == [5, 9]
    assert min(tokens) >= 0 and max(tokens) < 700


def test_greedy_rows_alone_take_the_argmax() -> None:
    logits = torch.randn(2, 700)
    logits[1, [4, 600]] = 9.0
    params = SamplingParams(temperature=0).resolved(GenerationDefaults())
    with use("triton"):
        tokens = Sampler().sample(logits, [SamplingRow(params, 0), SamplingRow(params, 0)])
    assert tokens.to_list() == [int(logits[0].numpy().argmax()), 4]
