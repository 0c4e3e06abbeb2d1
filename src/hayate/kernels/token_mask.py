"""Token mask: the logits of forbidden tokens become -inf.

    logits[rows[r], i] = -inf   where bit i % 32 of mask[r, i // 32] is 0

A grammar's mask is one bit a token, the form in which it is made on the host and uploaded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hayate.errors import UsageError
from hayate.kernels._dispatch import implementation_for
from hayate.kernels._triton import (
    gdc_launch_dependents,
    gdc_wait,
    launch,
    register_compile,
    tl,
    triton,
)

_TILE = 1024  # tokens a program


def apply_token_mask_reference(logits: Tensor, mask: Tensor, rows: Tensor) -> None:
    """`apply_token_mask` in PyTorch."""
    bits = torch.arange(32, dtype=torch.int32, device=mask.device)
    allowed = (mask[:, :, None] >> bits) & 1  # (R, words, 32)
    forbidden = allowed.flatten(1)[:, : logits.shape[1]] == 0
    logits[rows] = logits[rows].masked_fill(forbidden, -torch.inf)


@triton.jit
def _token_mask_kernel(
    logits_ptr,  # (S, V), written
    logits_stride,
    mask_ptr,  # (R, words) int32
    mask_stride,
    rows_ptr,  # (R,) int64
    V,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (b, r) does TILE tokens of row r of the mask. Logits are not read."""
    gdc_launch_dependents(PDL)
    r = tl.program_id(1)
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    gdc_wait(PDL)
    row = tl.load(rows_ptr + r).to(tl.int64)
    word = tl.load(mask_ptr + r.to(tl.int64) * mask_stride + (i >> 5), mask=i < V, other=0)
    forbidden = ((word >> (i & 31)) & 1) == 0
    minus_infinity = tl.full((TILE,), float("-inf"), tl.float32).to(logits_ptr.dtype.element_ty)
    tl.store(logits_ptr + row * logits_stride + i, minus_infinity, mask=forbidden & (i < V))


for _dtype in ("fp32", "bf16"):
    register_compile(
        _token_mask_kernel,
        f"token_mask_{_dtype}",
        {
            "logits_ptr": f"*{_dtype}",
            "logits_stride": "i32:16",
            "mask_ptr": "*i32",
            "mask_stride": "i32",
            "rows_ptr": "*i64",
            "V": "i32:16",
        },
        {"TILE": _TILE},
    )


def apply_token_mask(logits: Tensor, mask: Tensor, rows: Tensor) -> None:
    """Set the logits of forbidden tokens to -inf, in place; the other rows are left alone.

    Args:
        logits: (S, V), any float dtype, contiguous rows.
        mask: (R, words) int32, contiguous rows, words * 32 >= V. Bit i % 32 of word i // 32 is 1
            where token i is allowed; bits from V on are not used.
        rows: (R,) int64, which row of the logits each row of the mask is for; all different.
    """
    if mask.dtype != torch.int32 or mask.dim() != 2 or mask.shape[1] * 32 < logits.shape[1]:
        raise UsageError(
            f"a token mask must be (R, words) int32 with a bit for each of {logits.shape[1]} tokens, "
            f"got shape {tuple(mask.shape)} of {mask.dtype}"
        )
    assert logits.stride(1) == 1 and mask.stride(1) == 1
    assert rows.shape == mask.shape[:1]
    if implementation_for(logits) != "triton":
        apply_token_mask_reference(logits, mask, rows)
        return
    (R, _), V = mask.shape, logits.shape[1]
    launch(
        _token_mask_kernel,
        (triton.cdiv(V, _TILE), R),
        logits,
        logits.stride(0),
        mask,
        mask.stride(0),
        rows,
        V,
        TILE=_TILE,
        num_warps=4,
    )
