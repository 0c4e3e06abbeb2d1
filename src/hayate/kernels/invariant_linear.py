"""Matrix product whose every sum has one order: y = residual + act(x @ W^T + b), for any number of rows.

For `batch_invariant`: a row's result must not change, to the last bit, with the rows beside it. Each
element is therefore one chain of tensor core instructions along the whole of K, never split:

- On cards with wgmma (9.0) the sum of an instruction over its 16 terms is the same for wgmma of
  every width and for mma.m16n8k16, and the step along K that the tile is cut into does not matter
  either. Tiles may thus follow the number of rows (`tests/gpu/test_batch_invariant.py` compares
  their bits): at decode 16 rows and narrow column tiles, many of them on the way.
- Elsewhere, and in fp32, one tile serves every number of rows.

Bias, activation and residual cost no pass of their own, so that for some sizes it is faster than the
library with the kernels around it: there `linear` always uses it (`faster_than_library`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hayate.kernels._triton import (
    TensorDescriptor,
    cdiv,
    gdc_launch_dependents,
    gdc_wait,
    launch,
    prefetch_l2,
    register_compile,
    tl,
    triton,
)
from hayate.kernels.gemv import finish

__all__ = ["InvariantCut", "faster_than_library", "invariant_cut", "launch_invariant_linear"]

# Row tiles that share their columns' weights, from L2, before the next columns are taken.
_GROUP_M = 8
# 128-byte lines of each row of W to prefetch before the wait, while there is one row tile only.
_PREFETCH_LINES = 4


class InvariantCut(NamedTuple):
    """Rows, columns (gate and up together) and depth of a tile, and how it is pipelined.

    `tma`: tiles are fetched by the card's copy engine; those of x only where there are rows enough,
    as filling up a tile with zeros takes it longer than fetching one.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    tma: bool = False


_FP32_CUT = InvariantCut(32, 32, 32, 4, 2)
_MMA_CUT = InvariantCut(64, 64, 64, 4, 3)  # 48 KB of shared memory
_HEAD_CUT = InvariantCut(64, 128, 64, 4, 4, True)


def invariant_cut(
    rows: int, n: int, capability: tuple[int, int], dtype: torch.dtype
) -> InvariantCut:
    """The tile for `rows` rows and a weight of n rows on a card of this compute capability."""
    if dtype == torch.float32:
        return _FP32_CUT
    if capability != (9, 0):
        return _MMA_CUT
    if rows <= 16:
        # Narrow tiles, so that all multiprocessors read.
        if n <= 8192:
            return InvariantCut(16, 32, 128, 4, 8, True)
        return InvariantCut(16, 64, 128, 4, 6, True) if n <= 32768 else _HEAD_CUT
    if rows <= 64:
        if n <= 4096:
            return InvariantCut(64, 32, 256, 4, 4, True)
        return InvariantCut(64, 64, 128, 4, 6, True) if n <= 32768 else _HEAD_CUT
    if rows <= 256:
        return InvariantCut(64, 128, 64, 4, 4, True)
    return InvariantCut(128, 256, 64, 8, 4, True)


def faster_than_library(rows: int, weight: Tensor, activation: str | None) -> bool:
    """Whether this product, in 16 bits on a GPU, is faster than cuBLAS and what it leaves to do.

    Measured on an H200 (TFLOP/s, ours and cuBLAS): 23040 x 4096 with silu_and_mul, 688 and 689 at
    1,000 rows, 768 and 727 at 2,048, 731 and 743 at 8,192. With fewer rows the host, which needs
    0.1 ms to launch a kernel with tensor descriptors, would be the slower one.
    """
    n, k = weight.shape
    if torch.cuda.get_device_capability(weight.device) != (9, 0) or min(n, k) < 2048:
        return False
    return activation == "silu_and_mul" and 1536 < rows <= 4096


@triton.jit(do_not_specialize=["rows"])
def _invariant_linear_kernel(
    x_ref,  # (rows, K): a pointer, or a tensor descriptor
    w_ref,  # (N, K), or (2 * N_out, K) when gated
    w_ptr,
    bias_ptr,  # None or (N,)
    residual_ptr,  # None or (rows, N_out)
    out_ptr,
    rows,
    N_out,
    x_stride,
    residual_stride,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,  # columns of the result a program makes
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    GROUP_M: tl.constexpr,
    PREFETCH_LINES: tl.constexpr,
    TMA: tl.constexpr,
    X_TMA: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
):
    gdc_launch_dependents(PDL)
    GATED: tl.constexpr = ACTIVATION == "silu_and_mul"
    EVEN: tl.constexpr = K % BK == 0
    # Programs in groups of GROUP_M row tiles, column after column of each group.
    row_tiles = tl.cdiv(rows, BM)
    group = tl.program_id(0) // (GROUP_M * tl.cdiv(N_out, BN))
    group_rows = tl.minimum(row_tiles - group * GROUP_M, GROUP_M)
    inside_group = tl.program_id(0) % (GROUP_M * tl.cdiv(N_out, BN))
    first_row = (group * GROUP_M + inside_group % group_rows) * BM
    first_column = inside_group // group_rows * BN
    m = first_row + tl.arange(0, BM)
    n = first_column + tl.arange(0, BN)
    n_inside = tl.minimum(n, N_out - 1)  # a row past the end repeats the last and is not stored
    x_rows = m[:, None].to(tl.int64) * x_stride
    w_rows = w_ptr + n_inside[:, None].to(tl.int64) * K
    up_rows = w_ptr + (N_out + n_inside)[:, None].to(tl.int64) * K
    if PREFETCH_LINES > 0:
        LINE: tl.constexpr = 1024 // w_ptr.dtype.element_ty.primitive_bitwidth
        line = tl.minimum(tl.arange(0, PREFETCH_LINES) * LINE, K - 1)[None, :]
        prefetch_l2(w_rows + line, PDL)
        if GATED:
            prefetch_l2(up_rows + line, PDL)
    gdc_wait(PDL)

    acc = tl.zeros((BM, BN), tl.float32)
    acc_up = tl.zeros((BM, BN), tl.float32)
    for start in tl.range(0, K, BK, num_stages=STAGES):
        k = start + tl.arange(0, BK)[None, :]
        if X_TMA:
            x = x_ref.load([first_row, start])
        else:
            exists = (m[:, None] < rows) if EVEN else (m[:, None] < rows) & (k < K)
            x = tl.load(x_ref + x_rows + k, mask=exists, other=0.0)
        if TMA:
            w = w_ref.load([first_column, start])
        else:
            w = tl.load(w_rows + k) if EVEN else tl.load(w_rows + k, mask=k < K, other=0.0)
        acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
        if GATED:
            if TMA:
                up = w_ref.load([N_out + first_column, start])
            elif EVEN:
                up = tl.load(up_rows + k)
            else:
                up = tl.load(up_rows + k, mask=k < K, other=0.0)
            acc_up = tl.dot(x, tl.trans(up), acc_up, input_precision="ieee")
    finish(
        acc, acc_up, bias_ptr, residual_ptr, out_ptr,
        m, n, rows, N_out, residual_stride, ACTIVATION,
    )  # fmt: skip


def _constexprs(cut: InvariantCut, k: int, rows: int, activation: str | None) -> dict[str, Any]:
    gated = activation == "silu_and_mul"
    return {
        "K": k,
        "BM": cut.block_m,
        "BN": cut.block_n // 2 if gated else cut.block_n,
        "BK": cut.block_k,
        "STAGES": cut.num_stages,
        "GROUP_M": _GROUP_M,
        "PREFETCH_LINES": _PREFETCH_LINES if rows <= cut.block_m else 0,
        "TMA": cut.tma,
        "X_TMA": cut.tma and rows >= cut.block_m,
        "ACTIVATION": activation,
    }


def launch_invariant_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    cut: InvariantCut | None = None,
) -> Tensor:
    """`linear` without the norm, for any number of rows.

    `weight` is contiguous, x and residual have contiguous rows. `cut` replaces the choice of
    `invariant_cut`, for measurements.
    """
    rows, k = x.shape
    n = weight.shape[0]
    gated = activation == "silu_and_mul"
    n_out = n // 2 if gated else n
    out = torch.empty(rows, n_out, dtype=x.dtype, device=x.device)
    if rows == 0:
        return out
    if cut is None:
        capability = torch.cuda.get_device_capability(x.device) if x.is_cuda else (9, 0)
        cut = invariant_cut(rows, n, capability, x.dtype)
    aligned = (
        k % 8 == 0 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == weight.data_ptr() % 16 == 0
    )
    if cut.tma and not aligned:
        cut = _MMA_CUT  # fetched by the threads; one tile for any number of rows
    constexprs = _constexprs(cut, k, rows, activation)
    x_ref: Any = x
    w_ref: Any = weight
    if constexprs["X_TMA"]:
        x_ref = TensorDescriptor(x, [rows, k], [x.stride(0), 1], [cut.block_m, cut.block_k])
    if cut.tma:
        w_ref = TensorDescriptor(weight, [n, k], [k, 1], [constexprs["BN"], cut.block_k])
    launch(
        _invariant_linear_kernel,
        (cdiv(rows, cut.block_m) * cdiv(n_out, constexprs["BN"]),),
        x_ref,
        w_ref,
        weight,
        bias,
        residual,
        out,
        rows,
        n_out,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        **constexprs,
        num_warps=cut.num_warps,
        num_stages=cut.num_stages,
    )
    return out


def _register(
    n: int, k: int, rows: int, activation: str | None = None, *, sm_90: bool = True
) -> None:
    cut = invariant_cut(rows, n, (9, 0) if sm_90 else (8, 0), torch.bfloat16)
    constexprs = _constexprs(cut, k, rows, activation)
    references = {"x_ref": "*bf16", "w_ref": "*bf16"}
    if constexprs["X_TMA"]:
        references["x_ref"] = f"tensordesc<bf16[{cut.block_m}, {cut.block_k}]>"
    if cut.tma:
        references["w_ref"] = f"tensordesc<bf16[{constexprs['BN']}, {cut.block_k}]>"
    parts = [f"invariant_linear_{n}x{k}_m{rows}", activation, "sm90" if sm_90 else None]
    register_compile(
        _invariant_linear_kernel,
        "_".join(part for part in parts if part),
        references
        | {"w_ptr": "*bf16", "out_ptr": "*bf16", "residual_ptr": "*bf16"}
        | {"rows": "i32", "N_out": "i32:16", "x_stride": "i32:16", "residual_stride": "i32:16"},
        {"bias_ptr": None} | constexprs,
        num_warps=cut.num_warps,
        num_stages=cut.num_stages,
        min_cc=90 if sm_90 else 80,
        max_cc=90 if sm_90 else 999,
    )


# An 8B model's layers from decode to prefill.
for _rows in (8, 64, 2048):
    _register(4096, 11520, _rows)
    _register(23040, 4096, _rows, activation="silu_and_mul")
_register(131072, 4096, 8)
_register(4096, 11520, 8, sm_90=False)
_register(23040, 4096, 8, activation="silu_and_mul", sm_90=False)
