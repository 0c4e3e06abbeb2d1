"""Kernels over a list of tensors in one launch, and the norm of a list of gradients.

A table on the device holds the address and the size of every tensor. Each program takes one piece of one
tensor, so that a launch serves any number of tensors of any sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hayate.errors import UsageError
from hayate.kernels._triton import cdiv, launch, register_compile, tl, triton
from hayate.kernels.training._dispatch import implementation

__all__ = [
    "PIECE",
    "TRITON_TYPES",
    "TensorTable",
    "address",
    "grad_norm",
    "pointer",
    "tensor_table",
]

PIECE = 32768  # elements a program takes
TRITON_TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


class TensorTable(NamedTuple):
    rows: Tensor  # (N, columns) int64
    pieces: Tensor  # (programs, 2) int32: row, piece of it


@lru_cache(maxsize=64)
def tensor_table(
    rows: tuple[tuple[int, ...], ...], sizes: tuple[int, ...], device: Any
) -> TensorTable:
    """`rows` on the device, and the pieces their tensors of `sizes` elements are cut into."""
    counts = torch.tensor([cdiv(size, PIECE) for size in sizes])
    row = torch.arange(len(sizes)).repeat_interleave(counts)
    piece = torch.arange(len(row)) - (counts.cumsum(0) - counts)[row]
    return TensorTable(
        torch.tensor(rows, dtype=torch.int64).to(device),
        torch.stack([row, piece], dim=1).to(torch.int32).to(device),
    )


def address(x: Tensor | None) -> int:
    if x is None:
        return 0
    begin = x.data_ptr()
    if not x.is_contiguous() or begin % 16:
        raise UsageError(
            f"expected contiguous tensors that begin at a multiple of 16 bytes, got shape "
            f"{tuple(x.shape)} with strides {x.stride()} at {begin:#x}"
        )
    return begin


@triton.jit
def pointer(row, COLUMN: tl.constexpr, TYPE: tl.constexpr):
    """The pointer in a column of a row of the table."""
    # `address` has seen to the 16 bytes.
    return tl.multiple_of(tl.load(row + COLUMN).to(tl.pointer_type(TYPE)), 16)


@triton.jit
def _square_sum_kernel(
    rows_ptr,  # (N, 2): address, elements
    pieces_ptr,
    out_ptr,  # (programs,)
    TYPE: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tensor = tl.load(pieces_ptr + 2 * tl.program_id(0))
    begin = tl.load(pieces_ptr + 2 * tl.program_id(0) + 1).to(tl.int64) * PIECE
    x_ptr = pointer(rows_ptr + 2 * tensor, 0, TYPE) + begin
    left = tl.minimum(tl.load(rows_ptr + 2 * tensor + 1) - begin, PIECE).to(tl.int32)
    i = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    whole = left // BLOCK * BLOCK
    for done in range(0, whole, BLOCK):
        x = tl.load(x_ptr + done + i).to(tl.float32)
        total += x * x
    x = tl.load(x_ptr + whole + i, mask=whole + i < left, other=0.0).to(tl.float32)
    total += x * x
    tl.store(out_ptr + tl.program_id(0), tl.sum(total, axis=0))


@torch.no_grad()
def grad_norm(grads: Sequence[Tensor]) -> Tensor:
    """The square root of the sum of all squares, a scalar fp32 on the device; the same bits every time.

    grads: contiguous, any float dtype, on one device. Infinite or NaN when an element is.
    """
    if not grads:
        return torch.zeros(())
    if implementation(grads[0]) != "triton":
        return torch.stack([torch.linalg.vector_norm(g.float()) for g in grads]).norm()
    by_type: dict[torch.dtype, list[Tensor]] = {}
    for grad in grads:
        by_type.setdefault(grad.dtype, []).append(grad)
    sums = []
    for dtype, tensors in by_type.items():
        rows = tuple((address(g), g.numel()) for g in tensors)
        table = tensor_table(rows, tuple(g.numel() for g in tensors), grads[0].device)
        out = torch.empty(len(table.pieces), device=grads[0].device)
        launch(
            _square_sum_kernel,
            (len(table.pieces),),
            table.rows,
            table.pieces,
            out,
            TYPE=TRITON_TYPES[dtype],
            PIECE=PIECE,
            BLOCK=2048,
            num_warps=8,
        )
        sums.append(out.sum())
    return torch.stack(sums).sum().sqrt()


register_compile(
    _square_sum_kernel,
    "grad_square_sum",
    {"rows_ptr": "*i64", "pieces_ptr": "*i32", "out_ptr": "*fp32"},
    {"TYPE": tl.bfloat16, "PIECE": PIECE, "BLOCK": 2048},
    num_warps=8,
)
