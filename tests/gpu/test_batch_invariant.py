"""`batch_invariant` on the GPU: the bits of a row do not depend on the rows beside it."""

from __future__ import annotations

import itertools

import pytest
import torch

from hayate.kernels import batch_invariant
from hayate.kernels.attention import attention
from hayate.kernels.linear import linear
from hayate.kernels.moe import moe_mlp, moe_route
from hayate.kernels.norm import Norm

BF16 = torch.bfloat16
ROWS = (*range(1, 9), 16, 17, 33, 64, 65, 100, 256, 257, 1000)


def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, device="cuda") * scale).to(BF16)


@pytest.mark.parametrize(
    ("n", "k", "activation"),
    [
        (6144, 4096, None),
        (23040, 4096, "silu_and_mul"),
        (4096, 11520, None),
        (960, 576, None),
        (77, 200, None),
    ],
)
def test_linear(n, k, activation):
    """All tiles of the table, at both ends of the rows."""
    x, weight = draw(2048, k), draw(n, k, scale=k**-0.5)
    norm = Norm("rmsnorm", 1 + draw(k, scale=0.1), None, 1e-5)
    with batch_invariant():
        whole = linear(x, weight, norm=norm, activation=activation)
        for rows in ROWS:
            for begin in (0, 2048 - rows):
                some = slice(begin, begin + rows)
                part = linear(x[some], weight, norm=norm, activation=activation)
                assert torch.equal(part, whole[some]), (rows, begin)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(32, 8, 128), (9, 3, 64), (8, 8, 80), (16, 2, 256)]
)
@pytest.mark.parametrize("window", [None, 300])
def test_attention(heads, kv_heads, head_dim, window):
    """A sequence of 1,300 tokens at once, in chunks, as verified drafts, and beside another one."""
    length = 1300
    caches = draw(2, 64, 64, kv_heads, head_dim)
    table = torch.randperm(64, device="cuda").int().view(2, 32)
    q = draw(length, heads, head_dim)

    def run(sequences, queries, num_decode=0):
        new = [count for count, _ in sequences]
        return attention(
            queries,
            *caches,
            table[: len(sequences)],
            torch.tensor([0, *itertools.accumulate(new)], dtype=torch.int32, device="cuda"),
            torch.tensor([n for _, n in sequences], dtype=torch.int32, device="cuda"),
            max_seqlen_q=max(new),
            max_seqlen_k=max(n for _, n in sequences),
            scale=head_dim**-0.5,
            window=window,
            num_decode=num_decode,
        )

    with batch_invariant():
        whole = run([(length, length)], q)
        for count in (*range(1, 9), 63, 64, 65, 300):
            for end in (count, 64, 512, 513, 650, length):
                if count <= end:
                    part = run([(count, end)], q[end - count : end])
                    assert torch.equal(part, whole[end - count : end]), (count, end)
        for others, num_decode in ((1, 0), (8, 0), (500, 0), (500, 1)):
            both = run([(1, length), (others, 900)], torch.cat([q[-1:], q[:others]]), num_decode)
            assert torch.equal(both[:1], whole[-1:]), (others, num_decode)


def test_experts():
    E, A, D, F = 16, 4, 768, 640
    x, router = draw(300, D), draw(E, D, scale=D**-0.5)
    gate_up, down = draw(E, 2 * F, D, scale=D**-0.5), draw(E, D, F, scale=F**-0.5)
    norm = Norm("rmsnorm", 1 + draw(D, scale=0.1), None, 1e-5)

    def run(x):
        weights, experts = moe_route(x, router, norm=norm, num_active=A, renormalize=True)
        return moe_mlp(x, norm, weights, experts, gate_up, down, residual=x)

    with batch_invariant():
        whole = run(x)
        for rows in (*range(1, 9), 33, 64, 100):
            for begin in (0, 300 - rows):
                part = run(x[begin : begin + rows])
                assert torch.equal(part, whole[begin : begin + rows]), (rows, begin)
