"""From NF4 to a matrix of floats on a GPU: the product with many rows then is the library's.

Decoding costs every weight 0.56 bytes read and 2 written, and 2 read again by the product: on an
H200 80 us for 37888 x 3584, of 540 with 1,024 rows.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from hayate.kernels._triton import (
    cdiv,
    gdc_launch_dependents,
    gdc_wait,
    launch,
    register_compile,
    tl,
    triton,
)
from hayate.kernels.nf4_lookup import lookup
from hayate.kernels.nf4_weight import GROUP, NF4_CODEBOOK, NF4Weight

__all__ = ["launch_nf4_dequantize"]

_BLOCK_N = 32


@triton.jit
def _nf4_dequantize_kernel(
    codes_ptr,  # int32 (N, GROUPS * 16)
    scales_ptr,  # (N, GROUPS * 128 / BLOCK)
    codebook_ptr,  # (16,) fp32
    out_ptr,  # (N, K)
    N,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    BN: tl.constexpr,
    PDL: tl.constexpr,
):
    gdc_launch_dependents(PDL)
    GROUPS: tl.constexpr = (K + 127) // 128
    group = tl.program_id(0) % GROUPS
    n = tl.program_id(0) // GROUPS * BN + tl.arange(0, BN)
    exists = n[:, None] < N
    word = tl.arange(0, 16)[None, :]
    rows = n[:, None].to(tl.int64)
    words = tl.load(
        codes_ptr + rows * (GROUPS * 16) + group * 16 + word,
        mask=exists, other=0, eviction_policy="evict_first",
    )  # fmt: skip
    # value[2 p + h] of word 4 t + r is column 32 r + 16 u + 4 t + 2 v + h, p = 2 u + v.
    values = lookup(words, codebook_ptr, tl.float32, "memory")
    scales = scales_ptr + rows * (GROUPS * (128 // BLOCK)) + group * (128 // BLOCK)
    first = word % 4 * 32
    low = tl.load(scales + first // BLOCK, mask=exists, other=0.0)[:, :, None]
    high = tl.load(scales + (first + 16) // BLOCK, mask=exists, other=0.0)[:, :, None]
    even = tl.join(tl.join(values[0], values[2]) * low, tl.join(values[4], values[6]) * high)
    odd = tl.join(tl.join(values[1], values[3]) * low, tl.join(values[5], values[7]) * high)
    w = tl.join(even, odd).to(out_ptr.dtype.element_ty)
    w = tl.reshape(w, (BN, 4, 4, 2, 2, 2))  # t, r, v, u, h
    w = tl.reshape(tl.permute(w, (0, 2, 4, 1, 3, 5)), (BN, 128))
    k = group * 128 + tl.arange(0, 128)[None, :]
    gdc_wait(PDL)  # nothing above is written by a kernel, but `out` may be in use by the last one
    tl.store(out_ptr + rows * K + k, w, mask=exists & (k < K))


@cache
def _codebook(device: torch.device) -> Tensor:
    return torch.tensor(NF4_CODEBOOK, device=device)


def launch_nf4_dequantize(weight: NF4Weight, dtype: torch.dtype) -> Tensor:
    """The matrix (N, K); the same bits as `nf4_dequantize_reference`."""
    n, k = weight.shape
    device = weight.codes.device
    out = torch.empty(n, k, dtype=dtype, device=device)
    launch(
        _nf4_dequantize_kernel,
        (cdiv(n, _BLOCK_N) * cdiv(k, GROUP),),
        weight.codes.view(torch.int32),
        weight.scales,
        _codebook(device),
        out,
        n,
        K=k,
        BLOCK=weight.block,
        BN=_BLOCK_N,
        num_warps=4,
    )
    return out


for _k, _block in ((3584, 64), (4304, 16)):
    register_compile(
        _nf4_dequantize_kernel,
        f"nf4_dequantize_k{_k}",
        {
            "codes_ptr": "*i32",
            "scales_ptr": "*fp32",
            "codebook_ptr": "*fp32",
            "out_ptr": "*bf16",
            "N": "i32:16",
        },
        {"K": _k, "BLOCK": _block, "BN": _BLOCK_N},
    )
