"""`batch_invariant` on the CPU: the bits of a row do not depend on the rows beside it."""

from __future__ import annotations

import itertools

import pytest
import torch

from hayate.kernels import batch_invariant, cpu
from hayate.kernels.attention import attention, attention_reference
from hayate.kernels.linear import linear, linear_reference
from hayate.kernels.moe import moe_mlp, moe_route
from hayate.kernels.norm import Norm

pytestmark = pytest.mark.skipif(
    not cpu.native_status().startswith("ready"), reason="no C compiler on this machine"
)
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k", "activation"), [(77, 200, None), (192, 576, "silu_and_mul")])
def test_linear(n: int, k: int, activation: str | None, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(40, k).to(dtype), (torch.randn(n, k) * k**-0.5).to(dtype)
    norm = Norm("rmsnorm", torch.rand(k).to(dtype), None, 1e-5)
    options = {"norm": norm, "activation": activation}
    with batch_invariant():
        whole = linear(x, weight, **options)
        for rows in range(1, 20):
            for begin in (0, 40 - rows):
                part = linear(x[begin : begin + rows], weight, **options)
                assert torch.equal(part, whole[begin : begin + rows]), (rows, begin)
    # The reference rounds norm(x), and gate and up, where the native kernel does not.
    rounding = 1e-5 if dtype == torch.float32 else 0.05
    expected = linear_reference(x, weight, **options)
    torch.testing.assert_close(whole, expected, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 700])
def test_attention(window: int | None, dtype: torch.dtype) -> None:
    """A sequence of 1,300 tokens in one step, in chunks, and beside another one."""
    torch.manual_seed(0)
    H, G, K, B, length = 4, 2, 32, 64, 1300
    caches = torch.randn(2, 64, B, G, K).to(dtype)
    table = torch.randperm(64, dtype=torch.int32).view(2, 32)
    q = torch.randn(length, H, K).to(dtype)

    def run(sequences: list[tuple[int, int]], queries: torch.Tensor) -> torch.Tensor:
        new = [count for count, _ in sequences]
        return attention(
            queries,
            *caches,
            table[: len(sequences)],
            torch.tensor([0, *itertools.accumulate(new)], dtype=torch.int32),
            torch.tensor([n for _, n in sequences], dtype=torch.int32),
            max_seqlen_q=max(new),
            max_seqlen_k=max(n for _, n in sequences),
            scale=K**-0.5,
            window=window,
        )

    with batch_invariant():
        whole = run([(length, length)], q)
        for begin, end in ((0, 1), (511, 512), (1299, 1300), (600, 604), (1000, 1300), (3, 700)):
            assert torch.equal(run([(end - begin, end)], q[begin:end]), whole[begin:end])
        both = run([(1, 1300), (40, 900)], torch.cat([q[-1:], q[:40]]))
        assert torch.equal(both[:1], whole[-1:])
    starts = torch.tensor([0, length], dtype=torch.int32)
    expected = attention_reference(
        q,
        *caches,
        table[:1],
        starts,
        starts[1:],
        max_seqlen_q=length,
        max_seqlen_k=length,
        scale=K**-0.5,
        window=window,
    )
    # fp32: sums of up to 1,300 terms in another order. bf16: PyTorch keeps scores and weights in it.
    atol = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(whole, expected, rtol=0, atol=atol)


def test_experts() -> None:
    torch.manual_seed(0)
    E, A, D, F, T = 8, 2, 64, 96, 37
    x, router = torch.randn(T, D), torch.randn(E, D)
    gate_up, down = torch.randn(E, 2 * F, D) * D**-0.5, torch.randn(E, D, F) * F**-0.5
    norm = Norm("rmsnorm", torch.rand(D), None, 1e-5)

    def run(x: torch.Tensor) -> torch.Tensor:
        weights, experts = moe_route(x, router, norm=norm, num_active=A, renormalize=True)
        return moe_mlp(x, norm, weights, experts, gate_up, down, residual=x)

    with batch_invariant():
        whole = run(x)
        for begin, end in ((0, 1), (36, 37), (5, 9), (0, 20)):
            assert torch.equal(run(x[begin:end]), whole[begin:end])
