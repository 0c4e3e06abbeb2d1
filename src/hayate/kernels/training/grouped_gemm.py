"""Matrix products of rows sorted by expert; `ends[e]` is where the rows of the experts up to e end.

    grouped_rows    out[i] = weight[e] @ x[i], or x[i] @ weight[e], e the expert of row i
    grouped_outer   out[e] = sum over the rows i of expert e of a[i]^T b[i]

The number of rows of each expert stays on the GPU: a product is launched for as many row tiles as the experts
can need at most, and a program finds its expert and its rows in `ends`, or has none. An expert without rows
has a gradient of zeros. In bf16 on sm_90 and sm_100 PyTorch's `grouped_mm` takes over where it is faster.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hayate.kernels._triton import cdiv, launch, next_power_of_2, register_compile, tl, triton

__all__ = ["GemmTile", "grouped_outer", "grouped_rows"]

# Row tiles that pass over all columns together, so that their rows stay in the L2 cache.
_GROUP = 8


class GemmTile(NamedTuple):
    """Rows, columns and depth of a tile, and how it is pipelined."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


_TILE = GemmTile(128, 128, 64, 8, 3)
_FP32_TILE = GemmTile(32, 32, 32, 4, 2)  # exact products, no tensor cores


@triton.jit
def _expert_of_tile(ends_ptr, tile, E: tl.constexpr, BLOCK_E: tl.constexpr, BM: tl.constexpr):
    """Expert of a row tile (E: there is no such tile), its first row, the end of the expert's."""
    e = tl.arange(0, BLOCK_E)
    end = tl.load(ends_ptr + e, mask=e < E, other=0)
    begin = tl.load(ends_ptr + e - 1, mask=(e > 0) & (e < E), other=0)
    tiles = (end - begin + BM - 1) // BM
    last_tile = tl.cumsum(tiles, axis=0)
    expert = tl.sum(((last_tile <= tile) & (e < E)).to(tl.int32), axis=0)
    own = e == expert
    first_row = tl.sum(tl.where(own, begin + (tile - last_tile + tiles) * BM, 0), axis=0)
    return expert, first_row, tl.sum(tl.where(own, end, 0), axis=0)


@triton.jit
def _rows_kernel(
    x_ptr,  # (R, K)
    w_ptr,  # (E, N, K), or (E, K, N)
    ends_ptr,
    out_ptr,  # (R, N)
    row_tiles,
    N,
    K,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    K_BY_N: tl.constexpr,  # weights are (E, K, N)
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    column_tiles = tl.cdiv(N, BN)
    group = tl.program_id(0) // (GROUP * column_tiles)
    within = tl.program_id(0) % (GROUP * column_tiles)
    size = tl.minimum(row_tiles - group * GROUP, GROUP)
    tile = group * GROUP + within % size
    expert, first_row, row_end = _expert_of_tile(ends_ptr, tile, E, BLOCK_E, BM)
    if expert >= E:
        return
    m = first_row + tl.arange(0, BM)
    n = within // size * BN + tl.arange(0, BN)
    n_inside = n < N
    x_rows = x_ptr + tl.minimum(m, row_end - 1)[:, None].to(tl.int64) * K
    w_ptr += expert.to(tl.int64) * N * K
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        x = tl.load(x_rows + k[None, :], mask=(k < K)[None, :], other=0.0)
        if K_BY_N:
            mask = (k < K)[:, None] & n_inside[None, :]
            w = tl.load(w_ptr + k[:, None] * N + n[None, :], mask=mask, other=0.0)
        else:
            mask = (k < K)[None, :] & n_inside[:, None]
            w = tl.trans(tl.load(w_ptr + n[:, None] * K + k[None, :], mask=mask, other=0.0))
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    out = out_ptr + m[:, None].to(tl.int64) * N + n[None, :]
    mask = (m[:, None] < row_end) & n_inside[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _outer_kernel(
    a_ptr,  # (R, M)
    b_ptr,  # (R, N)
    ends_ptr,
    out_ptr,  # (E, M, N)
    M,
    N,
    ACCUMULATE: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row_tiles, column_tiles = tl.cdiv(M, BM), tl.cdiv(N, BN)
    expert = tl.program_id(0) // (row_tiles * column_tiles)
    within = tl.program_id(0) % (row_tiles * column_tiles)
    group = within // (GROUP * column_tiles)
    within = within % (GROUP * column_tiles)
    size = tl.minimum(row_tiles - group * GROUP, GROUP)
    m = (group * GROUP + within % size) * BM + tl.arange(0, BM)
    n = within // size * BN + tl.arange(0, BN)
    begin = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends_ptr + expert)
    a_ptr += begin.to(tl.int64) * M + m[None, :]
    b_ptr += begin.to(tl.int64) * N + n[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, end - begin, BK):
        r = start + tl.arange(0, BK)
        inside = (r < end - begin)[:, None]
        rows = r[:, None].to(tl.int64)
        a = tl.load(a_ptr + rows * M, mask=inside & (m < M)[None, :], other=0.0)
        b = tl.load(b_ptr + rows * N, mask=inside & (n < N)[None, :], other=0.0)
        acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION)
    out = out_ptr + (expert.to(tl.int64) * M + m[:, None]) * N + n[None, :]
    mask = (m[:, None] < M) & (n[None, :] < N)
    if ACCUMULATE:
        acc += tl.load(out, mask=mask, other=0.0).to(tl.float32)
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=mask)


def _options(dtype: torch.dtype, tile: GemmTile | None) -> dict[str, Any]:
    chosen = tile or (_FP32_TILE if dtype == torch.float32 else _TILE)
    return {
        "GROUP": _GROUP,
        "BM": chosen.block_m,
        "BN": chosen.block_n,
        "BK": chosen.block_k,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        "num_warps": chosen.num_warps,
        "num_stages": chosen.num_stages,
    }


def _library_fits(*operands: Tensor) -> bool:
    """grouped_mm has its fast path, which waits for nothing, and rows of multiples of 16 bytes."""
    x = operands[0]
    return (
        x.is_cuda
        and x.dtype is torch.bfloat16
        and torch.cuda.get_device_capability(x.device)[0] in (9, 10)
        and all(operand.shape[-1] % 8 == 0 for operand in operands)
    )


def grouped_rows_triton(
    x: Tensor, weight: Tensor, ends: Tensor, *, k_by_n: bool = False, tile: GemmTile | None = None
) -> Tensor:
    """`grouped_rows` by our kernel."""
    (rows, k), num_experts = x.shape, weight.shape[0]
    n = weight.shape[2 if k_by_n else 1]
    out = torch.empty(rows, n, dtype=x.dtype, device=x.device)
    options = _options(x.dtype, tile)
    block_m, block_n = options["BM"], options["BN"]
    # Every expert with rows may need one tile that is not full.
    row_tiles = min(rows, cdiv(rows, block_m) + min(num_experts, rows) - 1)
    launch(
        _rows_kernel,
        (row_tiles * cdiv(n, block_n),),
        x,
        weight,
        ends,
        out,
        row_tiles,
        n,
        k,
        E=num_experts,
        BLOCK_E=next_power_of_2(num_experts),
        K_BY_N=k_by_n,
        **options,
    )
    return out


def grouped_outer_triton(
    a: Tensor,
    b: Tensor,
    ends: Tensor,
    out: Tensor,
    *,
    accumulate: bool,
    tile: GemmTile | None = None,
) -> None:
    """`grouped_outer` by our kernel, written or added to `out` (E, M, N)."""
    num_experts, m, n = out.shape
    options = _options(a.dtype, tile)
    block_m, block_n = options["BM"], options["BN"]
    launch(
        _outer_kernel,
        (num_experts * cdiv(m, block_m) * cdiv(n, block_n),),
        a,
        b,
        ends,
        out,
        m,
        n,
        ACCUMULATE=accumulate,
        **options,
    )


def grouped_rows(x: Tensor, weight: Tensor, ends: Tensor, *, k_by_n: bool = False) -> Tensor:
    """Each row of x (R, K) times its expert's weight: (R, N) in x's dtype.

    weight is (E, N, K), or (E, K, N) with `k_by_n`; ends (E,) int32; all contiguous.
    """
    if _library_fits(x, weight):
        return torch.nn.functional.grouped_mm(
            x, weight if k_by_n else weight.transpose(1, 2), offs=ends
        )
    return grouped_rows_triton(x, weight, ends, k_by_n=k_by_n)


def grouped_outer(a: Tensor, b: Tensor, ends: Tensor, into: Tensor | None) -> Tensor | None:
    """Per expert a^T b of its rows: a new (E, M, N) of a's dtype, or added to `into`, of any dtype.

    a (R, M) and b (R, N), contiguous. The sum over the rows is in fp32; it is rounded once, after `into` is
    added, or, by `grouped_mm`, to bf16 before.
    """
    if _library_fits(a, b):
        out = torch.nn.functional.grouped_mm(a.t(), b, offs=ends)
        if into is None:
            return out
        into.add_(out)
        return None
    if into is not None:
        grouped_outer_triton(a, b, ends, into, accumulate=True)
        return None
    shape = (len(ends), a.shape[1], b.shape[1])
    out = torch.empty(shape, dtype=a.dtype, device=a.device)
    grouped_outer_triton(a, b, ends, out, accumulate=False)
    return out


def _register() -> None:
    """The products of our MoE (D 768, F 6144, E 16), in bf16 and fp32."""
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        options = _options(dtype, None)
        warps, stages = options.pop("num_warps"), options.pop("num_stages")
        pointer = f"*{name}"
        for k_by_n in (False, True):
            register_compile(
                _rows_kernel,
                f"grouped_rows_{'kn' if k_by_n else 'nk'}_{name}",
                {"x_ptr": pointer, "w_ptr": pointer, "ends_ptr": "*i32", "out_ptr": pointer}
                | {"row_tiles": "i32", "N": "i32:16", "K": "i32:16"},
                {"E": 16, "BLOCK_E": 16, "K_BY_N": k_by_n} | options,
                num_warps=warps,
                num_stages=stages,
            )
        for out in dict.fromkeys((pointer, "*fp32")):
            register_compile(
                _outer_kernel,
                f"grouped_outer_{name}_into_{out[1:]}",
                {"a_ptr": pointer, "b_ptr": pointer, "ends_ptr": "*i32", "out_ptr": out}
                | {"M": "i32:16", "N": "i32:16"},
                {"ACCUMULATE": True} | options,
                num_warps=warps,
                num_stages=stages,
            )


_register()
