"""Attention over pages against a plain float64 loop over queries.

Pages are shuffled, unused slots and unused pages hold NaN, and unused entries of the page table are
far out of range, so anything read beyond a sequence shows.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hayate.kernels._dispatch import use
from hayate.kernels.attention import attention, attention_scores
from hayate.kernels.decode_attention import _decode_attention_triton
from hayate.kernels.decode_tuning import Tuning, decode_tuning
from hayate.kernels.flash_attention import (
    Tiles,
    flash_attention,
    flash_tiles,
    launch_flash_attention,
)
from hayate.kernels.invariant_attention import launch_invariant_attention


@dataclass(frozen=True)
class Case:
    """Sequences as (new tokens, length); the other sizes by their letters."""

    sequences: tuple[tuple[int, int], ...]
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    page_size: int = 16
    window: int | None = None


@dataclass
class Inputs:
    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    page_table: Tensor
    cu_seqlens_q: Tensor
    seq_lens: Tensor
    keys: list[Tensor]
    values: list[Tensor]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (
            self.q,
            self.k_cache,
            self.v_cache,
            self.page_table,
            self.cu_seqlens_q,
            self.seq_lens,
        )


def make_inputs(case: Case, dtype: torch.dtype, *, in_order: bool = False) -> Inputs:
    torch.manual_seed(0)
    G, K, B = case.num_kv_heads, case.head_dim, case.page_size
    lens = [length for _, length in case.sequences]
    starts = torch.tensor([0] + [new for new, _ in case.sequences]).cumsum(0)
    needed = [-(-length // B) for length in lens]
    num_pages = sum(needed) + 3
    order = torch.arange(num_pages) if in_order else torch.randperm(num_pages)
    # The caches are interleaved by page, so each is contiguous in all axes but the first.
    caches = torch.full((num_pages, 2, B, G, K), float("nan"), dtype=dtype)
    page_table = torch.full((len(lens), max(needed, default=0) + 2), 2**30, dtype=torch.int32)
    keys, values, used = [], [], 0
    for s, length in enumerate(lens):
        pages = order[used : used + needed[s]]
        used += needed[s]
        page_table[s, : needed[s]] = pages
        both = torch.randn(2, length, G, K).to(dtype)
        keys.append(both[0])
        values.append(both[1])
        for j in range(length):
            caches[pages[j // B], :, j % B] = both[:, j]
    q = torch.randn(int(starts[-1]), case.num_heads, K).to(dtype)
    return Inputs(
        q,
        caches[:, 0],
        caches[:, 1],
        page_table,
        starts.to(torch.int32),
        torch.tensor(lens, dtype=torch.int32),
        keys,
        values,
    )


def expected_output(case: Case, inputs: Inputs, scale: float) -> Tensor:
    """One query and one head at a time, in float64."""
    out = torch.zeros(inputs.q.shape, dtype=torch.float64)
    group, t = case.num_heads // case.num_kv_heads, 0
    for s, (new, length) in enumerate(case.sequences):
        for i in range(new):
            position = length - new + i
            first = 0 if case.window is None else max(position - case.window + 1, 0)
            for h in range(case.num_heads):
                if position >= 0:
                    k = inputs.keys[s][first : position + 1, h // group].double()
                    v = inputs.values[s][first : position + 1, h // group].double()
                    out[t, h] = (k @ inputs.q[t, h].double() * scale).softmax(0) @ v
            t += 1
    return out


def max_new(case: Case) -> int:
    return max(new for new, _ in case.sequences)


def check(case: Case, inputs: Inputs, found: Tensor, scale: float) -> None:
    assert found.dtype == inputs.q.dtype
    expected = expected_output(case, inputs, scale)
    largest = max((float(v.abs().max()) for v in inputs.values if v.numel()), default=1.0)
    if found.dtype == torch.float32:
        # Scores of up to 256 products below 40, each term rounded to 6e-8 of the running sum: 1e-5
        # absolute, and so relative in a weight; then as many for the sum over the keys.
        atol = 2e-5 * largest
    else:
        # Weights and output are each rounded once to half a unit; the weights sum to one, so either
        # error is at most that fraction of the largest value. One more for scores kept in the dtype
        # (PyTorch's masked form in bf16).
        atol = 3 * torch.finfo(found.dtype).eps / 2 * largest
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=atol)


def run(case: Case, dtype: torch.dtype, how: str, *, in_order: bool = False) -> None:
    inputs = make_inputs(case, dtype, in_order=in_order)
    scale = 1.3 * case.head_dim**-0.5
    with use(how):  # type: ignore[arg-type]
        found = attention(
            *inputs.tensors,
            max_seqlen_q=max_new(case),
            max_seqlen_k=max(length for _, length in case.sequences),
            scale=scale,
            window=case.window,
        )
    check(case, inputs, found, scale)


DECODE = {
    "one sequence": Case(((1, 37),)),
    "one key": Case(((1, 1),)),
    "page boundary": Case(((1, 16), (1, 17), (1, 15))),
    "lengths differ, padding": Case(((1, 70), (1, 3), (1, 0), (1, 33), (1, 0))),
    "without queries": Case(((1, 9), (0, 0), (0, 5), (1, 20))),
    "mha": Case(((1, 21), (1, 40)), num_heads=3, num_kv_heads=3),
    "group 3": Case(((1, 21), (1, 40)), num_heads=9, num_kv_heads=3),
    "group 12": Case(((1, 21),), num_heads=12, num_kv_heads=1),
    "width 80": Case(((1, 40),), head_dim=80),
    "width 96": Case(((1, 40),), head_dim=96),
    "width 128": Case(((1, 40),), head_dim=128),
    "width 256": Case(((1, 40),), head_dim=256),
    "page 64": Case(((1, 130), (1, 64)), page_size=64),
    "page 128": Case(((1, 130), (1, 64)), page_size=128),
    "window": Case(((1, 100), (1, 7), (1, 33)), window=10),
    "window of one": Case(((1, 100), (1, 1)), window=1),
    "window beyond": Case(((1, 40),), window=1000),
    "several queries": Case(((4, 50), (1, 8), (3, 3), (0, 0)), num_heads=6),
    "several queries, window": Case(((4, 70), (2, 9)), window=5, page_size=64),
}

PREFILL = {
    "from the start": Case(((40, 40),)),
    "one token over": Case(((33, 33),), num_heads=2),
    "chunk": Case(((21, 90),)),
    "chunks at the edges of tiles": Case(
        ((20, 34), (20, 35), (20, 36), (20, 50), (20, 51), (20, 52)), num_heads=2
    ),
    "lengths differ": Case(((37, 37), (1, 50), (18, 70), (0, 0), (17, 17))),
    "mha": Case(((19, 40),), num_heads=3, num_kv_heads=3),
    "group 12": Case(((19, 40),), num_heads=12, num_kv_heads=1),
    "width 80": Case(((19, 40),), head_dim=80),
    "width 96": Case(((19, 40),), head_dim=96),
    "width 128": Case(((19, 40),), head_dim=128),
    "width 256": Case(((19, 40),), head_dim=256),
    "page 64": Case(((70, 135),), page_size=64, num_heads=2),
    "window": Case(((60, 90), (20, 20)), window=10),
    "window wider than a tile": Case(((60, 120),), window=50, page_size=64),
    "window of one": Case(((20, 50),), window=1),
    "window beyond": Case(((40, 40),), window=1000),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_order", [False, True], ids=["shuffled", "in order"])
@pytest.mark.parametrize("case", [*DECODE.values(), *PREFILL.values()], ids=[*DECODE, *PREFILL])
def test_reference(case: Case, in_order: bool, dtype: torch.dtype) -> None:
    run(case, dtype, "reference", in_order=in_order)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("few", [True, False], ids=["few keys", "many keys"])
@pytest.mark.parametrize("name", DECODE)
def test_decode_kernel(
    name: str, few: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the page table could hold chooses between two kernels; each must take every case."""
    attention_module = sys.modules["hayate.kernels.attention"]
    monkeypatch.setattr(attention_module, "takes_short_kernel", lambda *_: few)
    run(DECODE[name], dtype, "triton")


# Tiles of 16 keys, so that short sequences reach every loop; a team of 2 merges in two rounds.
CUTS: dict[str, dict[str, int]] = {
    "one split": {"splits": 1},
    "two": {"splits": 2, "team": 2},
    "odd": {"splits": 7, "team": 8},
    "teams": {"splits": 7, "team": 4},
    "full teams": {"splits": 4, "team": 2},
    "tiles across pages": {"splits": 3, "team": 4, "block_n": 128},
}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("window", [None, 90])
def test_decode_splits(cut: dict[str, int], window: int | None) -> None:
    """Every number of splits, empty ones and partly filled teams occur."""
    case = Case(
        ((1, 203), (1, 33), (1, 0), (1, 120)), 3, 1, head_dim=32, page_size=64, window=window
    )
    inputs = make_inputs(case, torch.float32)
    options: dict[str, Any] = {"block_n": 16, **cut}
    scale = 0.2
    for _ in range(2):  # the arrival counters are left at zero
        found = _decode_attention_triton(
            *inputs.tensors, max_seqlen_q=1, scale=scale, window=window, **options
        )
        check(case, inputs, found, scale)


def test_decode_splits_of_several_queries() -> None:
    case = Case(((3, 90), (1, 100), (2, 33)), num_heads=3, num_kv_heads=1, head_dim=80)
    inputs = make_inputs(case, torch.float32)
    found = _decode_attention_triton(
        *inputs.tensors,
        max_seqlen_q=3,
        scale=0.1,
        window=None,
        block_n=16,
        splits=5,
        team=2,
    )
    check(case, inputs, found, 0.1)


def test_decode_into_a_given_tensor() -> None:
    """The rows of the sequences are written, the others kept."""
    case = Case(((1, 40), (1, 17)))
    inputs = make_inputs(case, torch.float32)
    q = torch.cat([inputs.q, torch.randn(3, *inputs.q.shape[1:])])
    out = torch.full_like(q, 7.0)
    found = _decode_attention_triton(
        q, *inputs.tensors[1:], max_seqlen_q=1, scale=0.1, window=None, out=out
    )
    assert found is out
    check(case, inputs, out[:2], 0.1)
    assert bool((out[2:] == 7.0).all())


def test_decode_tuning() -> None:
    """One sequence fills the card; many sequences are not split; short ones never."""

    def tuned(sequences: int, kv_heads: int, rows: int, max_len: int) -> Tuning:
        return decode_tuning(sequences, kv_heads, rows, 128, torch.bfloat16, max_len, 132)

    assert tuned(1, 8, 4, 4096).splits == 16
    assert tuned(1, 8, 4, 40_000).splits == 32
    assert tuned(1, 8, 4, 128).splits == 1
    assert tuned(256, 8, 4, 40_000).splits == 1
    for sequences in (1, 2, 8, 32, 64):
        assert 8 * sequences * tuned(sequences, 8, 4, 40_000).splits >= 128
    assert tuned(1, 1, 12, 40_000).team < tuned(1, 1, 12, 40_000).splits  # much to merge


SMALL_TILES = [Tiles(16, 16, 4, 1), Tiles(32, 16, 4, 1), Tiles(16, 32, 4, 1)]


@pytest.mark.parametrize("tiles", SMALL_TILES, ids=["16x16", "32x16", "16x32"])
@pytest.mark.parametrize("name", PREFILL)
def test_flash_kernel_in_small_tiles(name: str, tiles: Tiles) -> None:
    """Small tiles reach every loop: window edge, whole tiles, diagonal."""
    case = PREFILL[name]
    inputs = make_inputs(case, torch.float32)
    found = launch_flash_attention(
        inputs.q,
        inputs.k_cache,
        inputs.v_cache,
        inputs.page_table,
        inputs.cu_seqlens_q,
        inputs.seq_lens,
        max_seqlen_q=max_new(case),
        scale=0.15,
        window=case.window,
        tiles=tiles,
    )
    check(case, inputs, found, 0.15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", PREFILL)
def test_flash_kernel(name: str, dtype: torch.dtype) -> None:
    """The tiles of the card, through the public function."""
    case = replace(PREFILL[name], num_heads=2, num_kv_heads=1)
    run(case, dtype, "triton")


INVARIANT = {
    name: case
    for name, case in (DECODE | PREFILL).items()
    if name
    in (
        "lengths differ, padding",
        "group 12",
        "several queries, window",
        "lengths differ",
        "width 80",
        "window wider than a tile",
    )
}


@pytest.mark.parametrize("segment", [32, 64])
@pytest.mark.parametrize("name", INVARIANT)
def test_invariant_kernel(name: str, segment: int) -> None:
    """Segments so short that there are several, in the kernel's fp32 tiles of 32 keys."""
    case = INVARIANT[name]
    inputs = make_inputs(case, torch.float32)
    for _ in range(2):  # the arrival counters are left at zero
        found = launch_invariant_attention(
            *inputs.tensors,
            max_seqlen_q=max_new(case),
            scale=0.15,
            window=case.window,
            segment=segment,
        )
        check(case, inputs, found, 0.15)


@pytest.mark.parametrize("window", [None, 13])
def test_flash_without_pages(window: int | None) -> None:
    case = Case(((37, 37), (5, 50), (1, 1), (17, 17)), window=window)
    inputs = make_inputs(case, torch.float32)
    lens = torch.tensor([0] + [length for _, length in case.sequences], dtype=torch.int32)
    with use("triton"):
        found = flash_attention(
            inputs.q,
            torch.cat(inputs.keys),
            torch.cat(inputs.values),
            inputs.cu_seqlens_q,
            lens.cumsum(0).to(torch.int32),
            max_seqlen_q=37,
            scale=0.15,
            window=window,
        )
    check(case, inputs, found, 0.15)


def test_flash_of_all_keys() -> None:
    """Not causal: each query against every key of its own sequence."""
    case = Case(((37, 37), (5, 50), (17, 17), (3, 64)))
    inputs = make_inputs(case, torch.float32)
    ends = torch.tensor([0] + [length for _, length in case.sequences], dtype=torch.int32).cumsum(0)
    with use("triton"):
        found = flash_attention(
            inputs.q,
            torch.cat(inputs.keys),
            torch.cat(inputs.values),
            inputs.cu_seqlens_q,
            ends.to(torch.int32),
            max_seqlen_q=37,
            scale=0.15,
            causal=False,
        )
    expected, t = [], 0
    for s, (new, _) in enumerate(case.sequences):
        q = inputs.q[t : t + new].double()
        t += new
        k, v = (x[s].double().repeat_interleave(2, 1) for x in (inputs.keys, inputs.values))
        weights = (torch.einsum("qhk,nhk->hqn", q, k) * 0.15).softmax(-1)
        expected.append(torch.einsum("hqn,nhk->qhk", weights, v))
    # As in `check`: 1e-5 of the largest value for the scores, and as much for the sum.
    atol = 2e-5 * max(float(v.abs().max()) for v in inputs.values)
    torch.testing.assert_close(found.double(), torch.cat(expected), rtol=0, atol=atol)


def test_head_width_beyond_the_tables_is_refused() -> None:
    with pytest.raises(ValueError, match="320"):
        flash_tiles((9, 0), 320, torch.bfloat16)


@pytest.mark.parametrize("how", ["reference", "triton"])
def test_rows_of_padding_do_not_poison_others(how: str) -> None:
    """A graph's batch has more rows than tokens; their queries may be NaN."""
    case = Case(((1, 30), (1, 8), (1, 0), (1, 0)))
    inputs = make_inputs(case, torch.float32)
    inputs.q[2:] = float("nan")
    with use(how):  # type: ignore[arg-type]
        found = attention(
            *inputs.tensors,
            max_seqlen_q=1,
            max_seqlen_k=30,
            scale=0.1,
        )
    assert not found.isnan().any()
    assert torch.equal(found[2:], torch.zeros_like(found[2:]))
    check(case, inputs, found, 0.1)


@pytest.mark.parametrize("window", [None, 4])
def test_scores(window: int | None) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(5, 6, 16), torch.randn(12, 2, 16)
    scores = attention_scores(q, k, scale=0.3, window=window)
    assert scores.shape == (6, 5, 12)
    for i in range(5):
        position = 7 + i
        first = 0 if window is None else position - window + 1
        for h in range(6):
            seen = (k[first : position + 1, h // 3].double() @ q[i, h].double() * 0.3).softmax(0)
            expected = torch.zeros(12, dtype=torch.float64)
            expected[first : position + 1] = seen
            torch.testing.assert_close(scores[h, i].double(), expected, rtol=0, atol=1e-6)
