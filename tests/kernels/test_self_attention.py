"""Rotation, cache write and attention of single tokens in one kernel, against their formulas.

The expected output is a float64 softmax, sequence by sequence, over heads from
`rope_and_cache_reference`, which test_rope.py holds against float64. Unused slots and pages are NaN.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from hayate.kernels import self_attention as module
from hayate.kernels._dispatch import use
from hayate.kernels.decode_attention import Projection, _decode_attention_triton
from hayate.kernels.norm import Norm
from hayate.kernels.rope import rope_and_cache_reference, rope_table
from hayate.kernels.self_attention import self_attention, self_attention_reference


@dataclass
class Case:
    """Sequences by their lengths, the new token included; 0 is padding. Sizes are odd on purpose."""

    lengths: tuple[int, ...] = (37, 1, 0, 64, 65)
    num_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 32
    rotary_dim: int = 32
    norm: str | None = None
    clip: float | None = None
    window: int | None = None
    page_size: int = 16


CASES = {
    "plain": Case(),
    "one token": Case((1,)),
    "one sequence": Case((130,)),
    "mha": Case(num_heads=3, num_kv_heads=3),
    "group 12": Case((50,), num_heads=12, num_kv_heads=1),
    "partial": Case(rotary_dim=16),
    "odd width": Case(head_dim=80, rotary_dim=80),
    "odd partial": Case(head_dim=96, rotary_dim=48),
    "head norm": Case(norm="head", rotary_dim=16),
    "full norm": Case(norm="full"),  # not one kernel
    "clip": Case(clip=0.75, norm="head"),
    "window": Case(window=20),
    "window of one": Case(window=1),
    "page 64": Case((65, 129), page_size=64),
}


@dataclass
class Inputs:
    qkv: Tensor
    k_cache: Tensor
    v_cache: Tensor
    page_table: Tensor
    cu_seqlens_q: Tensor
    seq_lens: Tensor
    projection: Projection

    @property
    def operands(self) -> tuple[Any, ...]:
        caches = self.k_cache.clone(), self.v_cache.clone()
        return (
            self.qkv, *caches, self.page_table, self.cu_seqlens_q, self.seq_lens, self.projection
        )  # fmt: skip


def make_inputs(case: Case, dtype: torch.dtype) -> Inputs:
    S, G, K, B = len(case.lengths), case.num_kv_heads, case.head_dim, case.page_size
    needed = [-(-n // B) for n in case.lengths]
    order = torch.randperm(sum(needed) + 2)
    k_cache, v_cache = torch.full((2, len(order), B, G, K), float("nan"), dtype=dtype)
    page_table = torch.full((S, max(needed) + 2), 2**30, dtype=torch.int32)
    slots = torch.full((S,), -1)
    used = 0
    for s, n in enumerate(case.lengths):
        page_table[s, : needed[s]] = order[used : used + needed[s]]
        used += needed[s]
        for j in range(n - 1):
            for cache in (k_cache, v_cache):
                cache[page_table[s, j // B], j % B] = torch.randn(G, K)
        if n:
            slots[s] = int(page_table[s, (n - 1) // B]) * B + (n - 1) % B
    cos_sin = rope_table(
        100.0 ** (-torch.arange(0, case.rotary_dim, 2) / case.rotary_dim), 1.25, 200
    )
    norms: list[Norm | None] = [None, None]
    if case.norm is not None:
        widths = (K, K) if case.norm == "head" else (case.num_heads * K, G * K)
        norms = [Norm("rmsnorm", (torch.rand(w) + 0.5).to(dtype), None, 1e-3) for w in widths]
    return Inputs(
        torch.randn(S, (case.num_heads + 2 * G) * K).to(dtype),
        k_cache,
        v_cache,
        page_table,
        torch.arange(S + 1, dtype=torch.int32),
        torch.tensor(case.lengths, dtype=torch.int32),
        # Not the place in the sequence: a prompt may have been rescaled.
        Projection(slots, torch.randint(0, 200, (S,)), cos_sin, norms[0], norms[1], case.clip),
    )


def expected(case: Case, inputs: Inputs, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Output in float64, and the caches after the step."""
    k_cache, v_cache = inputs.k_cache.clone(), inputs.v_cache.clone()
    q = rope_and_cache_reference(
        inputs.qkv,
        k_cache,
        v_cache,
        **inputs.projection._asdict(),
        num_heads=case.num_heads,
        num_kv_heads=case.num_kv_heads,
        head_dim=case.head_dim,
    )
    out = torch.zeros(q.shape, dtype=torch.float64)
    group = case.num_heads // case.num_kv_heads
    for s, n in enumerate(case.lengths):
        pages = inputs.page_table[s, : -(-n // case.page_size)].long()
        k, v = (cache[pages].flatten(0, 1)[:n].double() for cache in (k_cache, v_cache))
        first = 0 if case.window is None else max(n - case.window, 0)
        for h in range(case.num_heads if n else 0):
            keys, values = k[first:, h // group], v[first:, h // group]
            out[s, h] = (keys @ q[s, h].double() * scale).softmax(0) @ values
    return out, k_cache, v_cache


# The package's attribute of this name is the function.
attention_module = sys.modules["hayate.kernels.attention"]


@pytest.fixture(params=["few keys", "many keys"])
def table(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the page table could hold decides which kernels run; each must take every case."""
    few = request.param == "few keys"
    for user in (module, attention_module):
        monkeypatch.setattr(user, "takes_short_kernel", lambda *_: few)
    return request.param


def check(case: Case, inputs: Inputs, operands: tuple[Any, ...], found: Tensor) -> None:
    out, k_cache, v_cache = expected(case, inputs, 0.2)
    eps = torch.finfo(inputs.qkv.dtype).eps
    # fp32: scores and sums of some hundred terms. Else the weights and the output are rounded once,
    # each by half a unit of at most 1, and so are queries and new keys where a sum taken in another
    # order falls on the other side: of a score of K products below 10 that is less than 2 units.
    largest = 6.0
    atol = (2e-5 if eps < 1e-6 else 3 * eps) * largest
    torch.testing.assert_close(found.double(), out, rtol=0, atol=atol)
    assert found.dtype == inputs.qkv.dtype
    # A new key is rounded once; the sum before it is taken in another order.
    for cache, wanted in zip(operands[1:3], (k_cache, v_cache), strict=True):
        torch.testing.assert_close(cache, wanted, rtol=eps, atol=4e-6, equal_nan=True)


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_kernel(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    inputs = make_inputs(case, dtype)
    operands = inputs.operands
    with use("triton"):
        found = self_attention(
            *operands, max_seqlen_q=1, max_seqlen_k=200, scale=0.2, window=case.window
        )
    check(case, inputs, operands, found)


@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize("window", [None, 40])
def test_splits(splits: int, window: int | None) -> None:
    """The new key meets the last of several splits, also when it begins a page."""
    case = Case((113, 1, 97, 64, 0), 3, 1, window=window)
    inputs = make_inputs(case, torch.float32)
    operands = inputs.operands
    *tensors, projection = operands
    found = _decode_attention_triton(
        *tensors,
        projection=projection,
        max_seqlen_q=1,
        scale=0.2,
        window=window,
        block_n=16,
        splits=splits,
        team=2,
    )
    check(case, inputs, operands, found)


@pytest.mark.parametrize("name", CASES)
def test_reference(name: str) -> None:
    case = CASES[name]
    inputs = make_inputs(case, torch.float32)
    operands = inputs.operands
    found = self_attention_reference(
        *operands, max_seqlen_q=1, max_seqlen_k=200, scale=0.2, window=case.window
    )
    check(case, inputs, operands, found)


@pytest.mark.usefixtures("table")
def test_padding_without_a_slot_is_not_cached() -> None:
    """Rows of a graph that no sequence has: NaN in, zero out, nothing written."""
    case = Case((20, 0, 0))
    inputs = make_inputs(case, torch.float32)
    inputs.qkv[1:] = float("nan")
    operands = inputs.operands
    with use("triton"):
        found = self_attention(*operands, max_seqlen_q=1, max_seqlen_k=64, scale=0.2)
    assert torch.equal(found[1:], torch.zeros_like(found[1:]))
    check(case, inputs, operands, found)


def test_what_one_kernel_takes(table: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Single tokens with norms over heads go to one kernel, several tokens, a full norm or few keys to two."""
    calls = []
    run = module._decode_attention_triton

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(kwargs["projection"])
        return run(*args, **kwargs)

    monkeypatch.setattr(module, "_decode_attention_triton", spy)
    for name, queries, fused in (
        ("head norm", 1, True),
        ("full norm", 1, False),
        ("plain", 2, False),
    ):
        calls.clear()
        with use("triton"):
            operands = make_inputs(CASES[name], torch.float32).operands
            self_attention(*operands, max_seqlen_q=queries, max_seqlen_k=200, scale=0.2)
        assert bool(calls) is (fused and table == "many keys"), name
