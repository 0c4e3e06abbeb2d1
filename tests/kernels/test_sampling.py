"""Sampling: argmax, filters and draws against NumPy in float64; Philox against published words."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hayate.errors import UsageError
from hayate.kernels import sampling_search
from hayate.kernels._dispatch import Implementation, use
from hayate.kernels.sampling import (
    advance_decode,
    argmax,
    sample,
    uniform_reference,
)
from hayate.runtime.sampler import philox_uniform

IMPLEMENTATIONS: tuple[Implementation, ...] = ("reference", "triton")

# A weight is exp of an fp32 quotient: its relative error is that of the exponent, 28 * 2^-24 at
# most, times a few. Where a sum comes this close to the border of a decision, either is right.
BORDER = 1e-5


class Options(NamedTuple):
    """The sampling options of one row."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    step: int = 0


def draw(
    logits: Tensor, rows: list[Options], implementation: Implementation = "triton", **more
) -> list[int]:
    columns = list(zip(*rows, strict=True))
    kinds = (torch.float32, torch.int32, torch.float32, torch.float32, torch.int64, torch.int64)
    options = [torch.tensor(c, dtype=kind) for c, kind in zip(columns, kinds, strict=True)]
    with use(implementation):
        return sample(logits, *options, **more).tolist()


def kept_weights(logits: np.ndarray, options: Options) -> tuple[np.ndarray, float]:
    """Weights of the tokens kept, 0 for the others, and how far decisions were from a border."""
    x = logits.astype(np.float64)
    weights = np.exp((x - x.max()) / np.float64(np.float32(options.temperature)))
    threshold, margin = -np.inf, 1.0
    if 0 < options.top_k < len(x):
        threshold = sorted(x, reverse=True)[options.top_k - 1]
    if options.top_p < 1:
        target = np.float64(np.float32(options.top_p)) * weights[x >= threshold].sum()
        reached = 0.0
        for value in sorted(set(x[x >= threshold]), reverse=True):
            reached += weights[x == value].sum()
            margin = min(margin, abs(reached - target) / target if target else 1.0)
            if reached >= target:
                threshold = value
                break
    min_p = np.float32(options.min_p)
    if min_p > 0:
        margin = min(margin, np.abs(weights / min_p - 1).min())
    return np.where((x >= threshold) & (weights >= min_p), weights, 0.0), float(margin)


def expected_token(logits: np.ndarray, options: Options) -> int | None:
    """The token, or None where a border is too close."""
    weights, margin = kept_weights(logits, options)
    cumulative = weights.cumsum() / weights.sum()
    u = philox_uniform(options.seed, options.step, 0)
    if min(margin, np.abs(cumulative[:-1] - u).min(initial=1.0)) < BORDER:
        return None
    return int(np.argmax(cumulative > u))


def check(
    logits: Tensor, rows: list[Options], implementation: Implementation = "triton", **more
) -> int:
    """Compare a draw with NumPy's; returns how many rows were far enough from a border."""
    tokens = draw(logits, rows, implementation, **more)
    expected = [expected_token(x, o) for x, o in zip(logits.float().numpy(), rows, strict=True)]
    decided = [(t, e) for t, e in zip(tokens, expected, strict=True) if e is not None]
    assert [t for t, _ in decided] == [e for _, e in decided]
    return len(decided)


def test_uniform_is_philox() -> None:
    """The first words of Philox4x32-10 for counter 0 and key 0, published with Random123."""
    zero = torch.zeros(1, dtype=torch.int64)
    assert uniform_reference(zero, zero, zero).item() == (0x6627E8D5 >> 8) * 2.0**-24
    seeds = torch.randint(0, 2**63 - 1, (20,))
    steps, indices = torch.randint(0, 2**31, (20,)), torch.randint(0, 8, (20,))
    got = uniform_reference(seeds, steps, indices).tolist()
    arguments = zip(seeds.tolist(), steps.tolist(), indices.tolist(), strict=True)
    assert got == [philox_uniform(*a) for a in arguments]


def test_uniform_is_uniform() -> None:
    """Chi-square of 64 cells, 63 degrees of freedom: above 120 with probability 2e-5."""
    steps = torch.arange(65536)
    u = uniform_reference(torch.full_like(steps, 1234), steps, torch.zeros_like(steps))
    counts = torch.histc(u, 64, 0, 1)
    assert ((counts - 1024) ** 2 / 1024).sum() < 120


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("V", [1, 7, 1024, 2500])
def test_argmax(V: int, dtype: torch.dtype, implementation: Implementation) -> None:
    logits = (torch.randn(6, V) * 4).to(dtype)
    logits[1, V // 2 :] = 20.0  # ties: the lowest index
    logits[2, V - 1] = torch.nan
    logits[3, 0] = torch.inf
    logits[4] = -torch.inf
    logits[5, : V - 1] = -torch.inf
    with use(implementation):
        tokens = argmax(logits).tolist()
    first = int(logits[0].double().numpy().argmax())
    assert tokens == [first, V // 2, -1, -1, -1, V - 1]


def test_argmax_of_rows_apart() -> None:
    wide = torch.randn(3, 40)
    with use("triton"):
        assert torch.equal(argmax(wide[:, :24]), wide[:, :24].argmax(-1))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equal_logits_show_u(implementation: Implementation) -> None:
    """With V equal logits the token is floor(u * V), exactly."""
    V = 1000
    rows = [Options(temperature=0.7, seed=2**40 * i + 77 * i, step=i * i) for i in range(6)]
    tokens = draw(torch.full((len(rows), V), 3.25), rows, implementation)
    assert tokens == [int(philox_uniform(o.seed, o.step, 0) * V) for o in rows]


option_rows = st.builds(
    Options,
    temperature=st.sampled_from([0.05, 0.5, 1.0, 1.7, 5.0]),
    top_k=st.sampled_from([-1, 0, 1, 2, 5, 11, 10_000]),
    top_p=st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.99, 1.0]),
    min_p=st.sampled_from([0.0, 0.0, 0.003, 0.1, 1.0]),
    seed=st.integers(0, 2**62),
    step=st.integers(0, 2**20),
)


@settings(max_examples=12, deadline=None)
@given(
    rows=st.lists(option_rows, min_size=4, max_size=4),
    V=st.integers(1, 90),
    # rounding makes ties; a spread of 30 makes weights of zero
    spread=st.sampled_from([0.1, 2.0, 30.0]),
    digits=st.integers(0, 6),
    seed=st.integers(0, 2**31),
)
def test_sample(rows: list[Options], V: int, spread: float, digits: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(rows), V, generator=generator).mul(spread).round(decimals=digits)
    logits[1:, : V // 3] = -torch.inf  # forbidden tokens
    check(logits, rows, "triton")
    check(logits, rows, "reference")


@pytest.mark.parametrize(
    "options",
    [
        Options(top_k=3),  # the third and fourth largest tie: both stay
        Options(top_k=1),
        Options(top_p=0.75),
        Options(top_p=0.2, temperature=2.0),
        Options(top_k=4, top_p=0.6),
        Options(top_k=8, top_p=0.9, min_p=0.2),
        Options(min_p=0.1),
    ],
)
def test_kept_set(options: Options) -> None:
    """Draws close to both ends of every kept token: another kept set would move the ends."""
    logits = torch.tensor([0.0, 2.5, 1.0, 3.0, 2.5, 0.5, 2.0, 1.5, -1.0, 1.0, -3.0, 2.25])
    weights, _ = kept_weights(logits.numpy(), options)
    ends = np.concatenate([[0.0], weights.cumsum() / weights.sum()])
    u = uniform_reference(
        torch.zeros(30_000, dtype=torch.int64),
        torch.arange(30_000),
        torch.zeros(30_000, dtype=torch.int64),
    ).numpy()
    rows, expected = [], []
    for token in weights.nonzero()[0]:
        for at in (ends[token] + 3e-4, ends[token + 1] - 3e-4):
            step = int(np.abs(u - at).argmin())
            assert ends[token] + BORDER < u[step] < ends[token + 1] - BORDER
            rows.append(options._replace(step=step))
            expected.append(int(token))
    assert draw(logits.expand(len(rows), -1).contiguous(), rows) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tiles", [1, 2])
def test_sample_over_many_programs(
    tiles: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling_search, "tiles_per_program", lambda logits: tiles)
    logits = (torch.randn(4, 4500) * 2.5).to(dtype)
    rows = [
        Options(0.8, top_k=50, top_p=0.9, seed=1),
        Options(1.0, top_p=0.95, seed=2),
        Options(1.3, seed=3),
        Options(0.0),
    ]
    tokens = draw(logits, rows)
    assert tokens[3] == int(logits[3].float().argmax())
    assert check(logits[:3], rows[:3]) == 3


def test_a_row_does_not_depend_on_the_batch() -> None:
    logits = torch.randn(3, 300) * 3
    rows = [Options(seed=i, top_k=20 * i, top_p=0.9) for i in range(3)]
    together = draw(logits, rows)
    assert together == [draw(logits[i : i + 1], rows[i : i + 1])[0] for i in range(3)]


def test_filters_off_and_sample_indices() -> None:
    logits = torch.randn(4, 200)
    rows = [Options(seed=5, min_p=0.05)] * 4
    indices = torch.arange(4)
    tokens = draw(logits, rows, sample_indices=indices, filters=False)
    for i, token in enumerate(tokens):
        weights, _ = kept_weights(logits[i].numpy(), rows[i])
        u = philox_uniform(5, 0, i)
        assert token == int(np.argmax(weights.cumsum() > u * weights.sum()))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_that_cannot_be_drawn(implementation: Implementation) -> None:
    logits = torch.randn(5, 50)
    logits[0, 7] = torch.nan
    logits[1, 7] = torch.inf
    logits[2] = -torch.inf
    logits[3] = -torch.inf
    logits[3, 31] = 0.0
    rows = [Options(top_k=5, top_p=0.5, seed=i) for i in range(5)]
    tokens = draw(logits, rows, implementation)
    assert tokens[:4] == [-1, -1, -1, 31]
    assert tokens[4] == expected_token(logits[4].numpy(), rows[4])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_extreme_scales(implementation: Implementation) -> None:
    """Logits far apart, tiny, huge; a temperature that leaves only the maximum."""
    logits = torch.zeros(4, 8)
    logits[0] = torch.linspace(-1e30, 1e30, 8)
    logits[1] = torch.linspace(0, 1e-30, 8)
    logits[2] = 3e38
    logits[3] = torch.arange(8)
    rows = [Options(top_k=3, top_p=0.9, step=i) for i in range(4)]
    rows[3] = rows[3]._replace(temperature=1e-20)
    tokens = draw(logits, rows, implementation)
    assert tokens[0] == 7
    assert tokens[3] == 7
    # All weights are equal in rows 1 and 2, but top-k still tells the logits of row 1 apart.
    assert 5 <= tokens[1] < 8
    assert 0 <= tokens[2] < 8


def test_draws_follow_the_distribution() -> None:
    """Chi-square of 20,000 draws, 7 degrees of freedom: above 33 with probability 3e-5."""
    num_draws = 20_000
    logits = torch.randn(1, 8)
    rows = [Options(temperature=0.9, step=i, seed=99) for i in range(num_draws)]
    tokens = draw(logits.expand(num_draws, -1), rows, "reference")
    weights, _ = kept_weights(logits[0].numpy(), rows[0])
    expected = num_draws * weights / weights.sum()
    counts = np.bincount(tokens, minlength=8)
    assert ((counts - expected) ** 2 / expected).sum() < 33


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_advance_decode(implementation: Implementation) -> None:
    page_size, columns = 4, 3
    tokens = torch.tensor([11, 12, 13, -1, 15, 16])
    positions = torch.tensor([2, 3, -2, 5, 11, -1])
    steps = torch.tensor([0, 7, 5, 2, 9, -1])
    table = torch.randint(1, 90, (6, columns + 2), dtype=torch.int32)[:, :columns]
    token_ids, rope_rows, slots = torch.full((3, 6), 99).unbind()
    seq_lens = torch.full((6,), 99, dtype=torch.int32)
    with use(implementation):
        advance_decode(
            tokens,
            positions,
            steps,
            table,
            token_ids,
            rope_rows,
            slots,
            seq_lens,
            page_size=page_size,
        )
    # Row 2 is not in use; a token of -1 is no index; row 5 has computed nothing yet.
    assert token_ids.tolist() == [11, 12, 0, 0, 15, 16]
    assert positions.tolist() == [3, 4, -2, 6, 12, 0]
    assert rope_rows.tolist() == [3, 4, 0, 6, 12, 0]
    assert seq_lens.tolist() == [4, 5, 0, 7, 13, 1]
    assert steps.tolist() == [1, 8, 5, 3, 10, 0]
    page = table.tolist()
    # Row 4 is past the end of the table.
    slot_of_row_5 = page[5][0] * 4
    assert slots.tolist() == [
        page[0][0] * 4 + 3, page[1][1] * 4, -1, page[3][1] * 4 + 2, -1, slot_of_row_5
    ]  # fmt: skip


def test_refused() -> None:
    with pytest.raises(UsageError, match="contiguous"):
        argmax(torch.zeros(4, 6).T)
    one = torch.ones(3)
    with pytest.raises(UsageError, match="top_k"):
        sample(torch.zeros(3, 5), one, torch.ones(2), one, one, one, one)
