"""Attention inside documents, with gradients, against a loop over rows in float64."""

from __future__ import annotations

import pytest
import torch
from tests import training_formulas as formulas
from tests.training_formulas import compare

from hayate.errors import UsageError
from hayate.kernels._dispatch import Implementation, use
from hayate.kernels.training import document_attention

F32 = torch.float32


def document_starts(windows: int, length: int, cuts: list[int]) -> torch.Tensor:
    """Every second window is cut into documents, the others are one."""
    starts = torch.zeros(windows, length, dtype=torch.int32)
    for row in starts[::2]:
        for cut in cuts:
            row[cut:] = cut
    return (starts + torch.arange(windows, dtype=torch.int32)[:, None] * length).flatten()


@pytest.mark.parametrize("implementation", ["reference", "triton", "auto"])
@pytest.mark.parametrize(
    ("windows", "length", "heads", "cuts", "window", "dtype"),
    [
        (2, 40, (4, 2, 16), [], None, F32),  # whole windows, one tile and a part of one
        (2, 70, (2, 1, 24), [10, 33, 64], None, F32),  # ends inside tiles and at a tile's end
        (1, 70, (2, 2, 16), [9, 50], 11, F32),
        (1, 100, (1, 1, 16), [], 40, F32),  # window wider than a tile
        (1, 130, (2, 1, 64), [50], None, torch.float16),  # tiles of the tensor cores
    ],
)
def test_document_attention(
    implementation: Implementation,
    windows: int,
    length: int,
    heads: tuple[int, int, int],
    cuts: list[int],
    window: int | None,
    dtype: torch.dtype,
) -> None:
    (H, G, K), T = heads, windows * length
    starts, scale = document_starts(windows, length, cuts), K**-0.5

    def ours(q, k, v):
        with use(implementation):
            return document_attention(
                q, k, v, starts, sequence_length=length, scale=scale, window=window,
                whole_windows=not cuts,
            )  # fmt: skip

    with use(implementation):
        compare(
            ours,
            lambda q, k, v: formulas.attention(q, k, v, starts.tolist(), scale, window),
            [torch.randn(T, heads, K).to(dtype) for heads in (H, G, G)],
            # fp32: sums of K products inside an exponential. Else p, ds, out and the result are rounded,
            # and dp - delta cancels to about half.
            roundings=64 if dtype == F32 else 8,
            dtype=dtype,
        )


@pytest.mark.parametrize("implementation", ["reference", "triton", "auto"])
@pytest.mark.parametrize("length", [1, 34])
def test_documents_of_one_token(implementation: Implementation, length: int) -> None:
    q, k, v = (torch.randn(length, heads, 16, requires_grad=True) for heads in (2, 1, 1))
    starts, dout = torch.arange(length, dtype=torch.int32), torch.randn(length, 2, 16)
    with use(implementation):
        out = document_attention(q, k, v, starts, sequence_length=length, scale=0.25)
        out.backward(dout)
    # The only probability is one, up to a rounding; it does not depend on the score.
    torch.testing.assert_close(out, v.expand(-1, 2, -1))
    torch.testing.assert_close(v.grad, dout.sum(1, keepdim=True))
    for x in (q, k):
        torch.testing.assert_close(x.grad, torch.zeros_like(x), rtol=0, atol=1e-5)


def test_other_documents_change_nothing() -> None:
    """The outputs and gradients of a document are the same bits whatever stands before and after it."""
    length, starts = 100, document_starts(1, 100, [40, 75])
    inside = slice(40, 75)
    tensors = [torch.randn(length, heads, 16) for heads in (2, 1, 1, 2)]
    results = []
    for others in (1.0, 1e4):
        q, k, v, dout = (torch.full_like(x, others) for x in tensors)
        for x, own in zip((q, k, v, dout), tensors, strict=True):
            x[inside] = own[inside]
        leaves = [x.requires_grad_() for x in (q, k, v)]
        with use("triton"):
            out = document_attention(*leaves, starts, sequence_length=length, scale=0.25)
            out.backward(dout)
        results.append([out[inside], *(x.grad[inside] for x in leaves)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_wrong_shapes_are_refused() -> None:
    q, starts = torch.zeros(12, 4, 16), torch.zeros(12, dtype=torch.int32)
    with pytest.raises(UsageError, match="H a multiple of G"):
        document_attention(q, q[:, :3], q[:, :3], starts, sequence_length=12, scale=1.0)
    with pytest.raises(UsageError, match="not whole windows of 5 rows"):
        document_attention(q, q, q, starts, sequence_length=5, scale=1.0)
    wide = torch.zeros(4, 1, 136)
    with use("triton"), pytest.raises(UsageError, match="at most 128 channels, got 136"):
        document_attention(wide, wide, wide, starts[:4], sequence_length=4, scale=1.0)
