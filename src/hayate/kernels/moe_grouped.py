"""Mixture of experts for many tokens: rows sorted by expert, two grouped products, weighted sum.

    sort      order[i]: the routed row (r = t * A + a) at place i, expert by expert, tokens in order
              place[r]: its inverse;  ends[e]: the places of the experts up to e end here
    gather    x_sorted[i] = norm(x)[order[i] // A]
    product   h[i] = silu(gate) * up, [gate; up] = gate_up[e] @ x_sorted[i]
    product   y[i] = down[e] @ h[i]
    combine   out[t] = residual[t] + sum_a weights[t, a] * y[place[t * A + a]]

The number of rows of each expert stays on the GPU. A product is launched for as many row tiles as
the experts can need at most; a program finds its expert and its rows in `ends`, or has none.

With few rows an expert (a decode batch) the products are bound by reading weights, each once: small
row tiles, and the first stages of the weights are prefetched before `gdc_wait`. That needs `ends`
early: `gather` and the products let the next kernel start only after their own wait, so whatever
runs before a later kernel's wait comes after `sort`.

With many rows an expert, in bf16 on sm_90 and sm_100, the products are PyTorch's `grouped_mm`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hayate.kernels._dispatch import is_batch_invariant
from hayate.kernels._triton import (
    gdc_launch_dependents,
    gdc_wait,
    launch,
    next_power_of_2,
    num_sms,
    prefetch_l2,
    register_compile,
    tl,
    triton,
)
from hayate.kernels.elementwise import activate, silu_and_mul
from hayate.kernels.norm import Norm, apply_norm

__all__ = ["ProductTile", "Sorted", "moe_mlp_grouped", "product_tile", "sort_by_expert"]

_SORT_BLOCK = 1024
# From this many rows an expert on (on average) grouped_mm is faster than our product.
_LIBRARY_MIN_ROWS = 128
# 128-byte lines of each row of a weight tile to prefetch: the stages a program starts with.
_PREFETCH_LINES = 4


class Sorted(NamedTuple):
    """Routed rows by expert, see the head of the file."""

    order: Tensor  # (R,) int32
    place: Tensor  # (R,) int32
    ends: Tensor  # (E,) int32


class ProductTile(NamedTuple):
    """Rows, columns (gate and up together) and depth of a tile, and how it is pipelined."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def product_tile(
    rows: int, num_experts: int, n: int, k: int, element_size: int, sms: int
) -> ProductTile:
    """The tile for `rows` routed rows over experts with weights (n, k)."""
    mean = -(-rows // num_experts)
    if is_batch_invariant():  # one tile: its instructions decide in which order a sum is taken
        return ProductTile(32, 32, 32, 4, 2) if element_size > 2 else ProductTile(64, 64, 64, 4, 4)
    if element_size > 2:  # no tensor cores, and twice the shared memory
        return ProductTile(16 if mean <= 16 else 32, 32, 32, 4, 2)
    if mean <= 32:
        # One row tile an expert mostly, so that its weights are read once.
        block_m = 16 if mean <= 8 else 32 if mean <= 20 else 64
        programs = min(rows, num_experts) * -(-n // 64)
        block_n = 64 if programs >= 2 * sms else 32
        return ProductTile(block_m, block_n, 128 if block_m < 64 else 64, 4, 4)
    if mean <= 64:
        return ProductTile(64, 128, 64, 4, 4)
    return ProductTile(128, 128, 64, 8, 3)


@triton.jit
def _sort_kernel(
    experts_ptr,
    order_ptr,
    place_ptr,
    ends_ptr,
    R,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program e counts the rows of the experts below e, then places its own one after another."""
    gdc_launch_dependents(PDL)
    expert = tl.program_id(0)
    last = tl.num_programs(0) - 1
    gdc_wait(PDL)
    below = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, R, BLOCK):
        r = start + tl.arange(0, BLOCK)
        e = tl.load(experts_ptr + r, mask=r < R, other=2147483647)
        below += (e < expert).to(tl.int32)
    free = tl.sum(below, axis=0)
    for start in range(0, R, BLOCK):
        r = start + tl.arange(0, BLOCK)
        e = tl.load(experts_ptr + r, mask=r < R, other=-1)
        # An index past the experts (a row of NaN logits) would leave holes: the last one takes it.
        mine = (e == expert) | ((e > last) & (expert == last))
        place = free + tl.cumsum(mine.to(tl.int32), axis=0) - 1
        tl.store(order_ptr + place, r, mask=mine)
        tl.store(place_ptr + r, place, mask=mine)
        free += tl.sum(mine.to(tl.int32), axis=0)
    tl.store(ends_ptr + expert, free)


@triton.jit
def _gather_kernel(
    x_ptr,
    order_ptr,
    norm_weight_ptr,  # None or (D,)
    out_ptr,  # (R, D)
    D,
    x_stride,
    eps,
    A: tl.constexpr,
    BLOCK: tl.constexpr,  # at least D
    PDL: tl.constexpr,
):
    i = tl.program_id(0)
    d = tl.arange(0, BLOCK)
    if norm_weight_ptr is not None:
        norm_weight = tl.load(norm_weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    gdc_wait(PDL)
    gdc_launch_dependents(PDL)  # after the wait, see the head of the file
    token = (tl.load(order_ptr + i) // A).to(tl.int64)
    x = tl.load(x_ptr + token * x_stride + d, mask=d < D, other=0.0).to(tl.float32)
    if norm_weight_ptr is not None:
        x = x * tl.rsqrt(tl.sum(x * x, axis=0) / D + eps) * norm_weight
    tl.store(out_ptr + i.to(tl.int64) * D + d, x.to(out_ptr.dtype.element_ty), mask=d < D)


@triton.jit
def _tile_rows(ends_ptr, tile, E: tl.constexpr, BLOCK_E: tl.constexpr, BM: tl.constexpr):
    """Expert of a row tile (E: there is no such tile), its first row, the end of the expert's."""
    e = tl.arange(0, BLOCK_E)
    end = tl.load(ends_ptr + e, mask=e < E, other=0, cache_modifier=".cg")
    begin = tl.load(ends_ptr + e - 1, mask=(e > 0) & (e < E), other=0, cache_modifier=".cg")
    tiles = (end - begin + BM - 1) // BM
    last_tile = tl.cumsum(tiles, axis=0)
    expert = tl.sum(((last_tile <= tile) & (e < E)).to(tl.int32), axis=0)
    own = e == expert
    first_row = tl.sum(tl.where(own, begin + (tile - last_tile + tiles) * BM, 0), axis=0)
    return expert, first_row, tl.sum(tl.where(own, end, 0), axis=0)


@triton.jit
def _product_kernel(
    x_ptr,  # (R, K)
    w_ptr,  # (E, N, K), or (E, 2N, K) when gated
    ends_ptr,
    out_ptr,  # (R, N)
    N,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    GATED: tl.constexpr,
    PREFETCH_LINES: tl.constexpr,
    PDL: tl.constexpr,
):
    expert, first_row, row_end = _tile_rows(ends_ptr, tl.program_id(0), E, BLOCK_E, BM)
    if expert >= E:
        return
    PLANES: tl.constexpr = 2 if GATED else 1
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    n_inside = tl.minimum(n, N - 1)  # a row past the end repeats the last and is not stored
    w_rows = w_ptr + (expert.to(tl.int64) * (PLANES * N) + n_inside)[:, None] * K
    up_rows = w_rows + N.to(tl.int64) * K
    if PREFETCH_LINES > 0:
        LINE: tl.constexpr = 1024 // w_ptr.dtype.element_ty.primitive_bitwidth
        line = tl.minimum(tl.arange(0, PREFETCH_LINES) * LINE, K - 1)[None, :]
        prefetch_l2(w_rows + line, PDL)
        if GATED:
            prefetch_l2(up_rows + line, PDL)
    gdc_wait(PDL)
    gdc_launch_dependents(PDL)  # after the wait, see the head of the file
    m = first_row + tl.arange(0, BM)
    x_rows = x_ptr + tl.minimum(m, row_end - 1)[:, None].to(tl.int64) * K
    acc = tl.zeros((BM, BN), tl.float32)
    acc_up = tl.zeros((BM, BN), tl.float32)
    for start in tl.range(0, K, BK, num_stages=STAGES):
        k = start + tl.arange(0, BK)[None, :]
        if K % BK == 0:
            x = tl.load(x_rows + k)
            w = tl.load(w_rows + k)
        else:
            x = tl.load(x_rows + k, mask=k < K, other=0.0)
            w = tl.load(w_rows + k, mask=k < K, other=0.0)
        acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
        if GATED:
            if K % BK == 0:
                up = tl.load(up_rows + k)
            else:
                up = tl.load(up_rows + k, mask=k < K, other=0.0)
            acc_up = tl.dot(x, tl.trans(up), acc_up, input_precision="ieee")
    if GATED:
        acc = activate(acc, "silu") * acc_up
    out = out_ptr + m[:, None].to(tl.int64) * N + n[None, :]
    mask = (m[:, None] < row_end) & (n[None, :] < N)
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _combine_kernel(
    y_ptr,  # (R, D)
    place_ptr,
    weights_ptr,
    residual_ptr,
    out_ptr,
    D,
    residual_stride,
    A: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    gdc_launch_dependents(PDL)
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gdc_wait(PDL)
    acc = tl.load(residual_ptr + token * residual_stride + d, mask=d < D, other=0.0).to(tl.float32)
    for a in tl.static_range(A):
        row = tl.load(place_ptr + token * A + a).to(tl.int64)
        y = tl.load(y_ptr + row * D + d, mask=d < D, other=0.0).to(tl.float32)
        acc += tl.load(weights_ptr + token * A + a) * y
    tl.store(out_ptr + token * D + d, acc.to(out_ptr.dtype.element_ty), mask=d < D)


def sort_by_expert(experts: Tensor, num_experts: int) -> Sorted:
    """Sort the routed rows of `experts` (T, A) int32 by expert; stable, without a wait."""
    rows, device = experts.numel(), experts.device
    order, place = torch.empty(2, rows, dtype=torch.int32, device=device)
    result = Sorted(order, place, torch.empty(num_experts, dtype=torch.int32, device=device))
    block = min(_SORT_BLOCK, max(32, next_power_of_2(rows)))
    launch(_sort_kernel, (num_experts,), experts, *result, rows, BLOCK=block)
    return result


def _product_constexprs(tile: ProductTile, num_experts: int, k: int, gated: bool) -> dict[str, Any]:
    return {
        "E": num_experts,
        "BLOCK_E": next_power_of_2(num_experts),
        "K": k,
        "BM": tile.block_m,
        "BN": tile.block_n // 2 if gated else tile.block_n,
        "BK": tile.block_k,
        "STAGES": tile.num_stages,
        "GATED": gated,
        "PREFETCH_LINES": _PREFETCH_LINES if tile.block_m <= 32 else 0,
    }


def _product(x: Tensor, weight: Tensor, ends: Tensor, *, gated: bool, dtype: torch.dtype) -> Tensor:
    """x (R, K) sorted by expert, times the experts' weights (E, N or 2N, K): (R, N) of `dtype`."""
    (rows, k), (num_experts, n, _) = x.shape, weight.shape
    n_out = n // 2 if gated else n
    tile = product_tile(rows, num_experts, n, k, x.element_size(), num_sms(x.device))
    constexprs = _product_constexprs(tile, num_experts, k, gated)
    out = torch.empty(rows, n_out, dtype=dtype, device=x.device)
    # Every expert with rows may need one tile that is not full.
    tiles = min(rows, triton.cdiv(rows, tile.block_m) + min(num_experts, rows) - 1)
    launch(
        _product_kernel,
        (tiles, triton.cdiv(n_out, constexprs["BN"])),
        x,
        weight,
        ends,
        out,
        n_out,
        **constexprs,
        num_warps=tile.num_warps,
    )
    return out


def _library_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return torch.nn.functional.grouped_mm(x, weight.transpose(1, 2), offs=ends)


def _library_fits(x: Tensor, down: Tensor, rows: int) -> bool:
    """grouped_mm has its fast path, which waits for nothing, and rows of multiples of 16 bytes."""
    num_experts, width, ffn = down.shape
    return (
        x.is_cuda
        and not is_batch_invariant()
        and x.dtype is torch.bfloat16
        and rows >= _LIBRARY_MIN_ROWS * num_experts
        and width % 8 == 0
        and ffn % 8 == 0
        and torch.cuda.get_device_capability(x.device)[0] in (9, 10)
        and hasattr(torch.nn.functional, "grouped_mm")
    )


def moe_mlp_grouped(
    x: Tensor,
    norm: Norm | None,
    weights: Tensor,
    experts: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    residual: Tensor,
) -> Tensor:
    """`moe.moe_mlp` for any number of tokens on the GPU."""
    if norm is not None and norm.kind != "rmsnorm":
        x, norm = apply_norm(x, norm), None
    x = x if x.stride(1) == 1 else x.contiguous()
    residual = residual if residual.stride(1) == 1 else residual.contiguous()
    assert gate_up.is_contiguous()
    assert down.is_contiguous()
    assert weights.is_contiguous()
    assert experts.is_contiguous()
    (num_tokens, num_active), (num_experts, width, _) = experts.shape, down.shape
    out = torch.empty(num_tokens, width, dtype=x.dtype, device=x.device)
    rows = num_tokens * num_active
    if rows == 0:
        return out
    order, place, ends = sort_by_expert(experts, num_experts)
    x_sorted = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    launch(
        _gather_kernel,
        (rows,),
        x,
        order,
        None if norm is None else norm.weight,
        x_sorted,
        width,
        x.stride(0),
        0.0 if norm is None else norm.eps,
        A=num_active,
        BLOCK=next_power_of_2(width),
        num_warps=max(1, min(8, next_power_of_2(width) // 512)),
    )
    if _library_fits(x, down, rows):
        h = silu_and_mul(_library_product(x_sorted, gate_up, ends))
        y = _library_product(h, down, ends)
    else:
        h = _product(x_sorted, gate_up, ends, gated=True, dtype=x.dtype)
        y = _product(h, down, ends, gated=False, dtype=torch.float32)
    block = min(1024, next_power_of_2(width))
    launch(
        _combine_kernel,
        (num_tokens, triton.cdiv(width, block)),
        y,
        place,
        weights,
        residual,
        out,
        width,
        residual.stride(0),
        A=num_active,
        BLOCK=block,
        num_warps=max(1, block // 256),
    )
    return out


def _register() -> None:
    """Our MoE (D 768, F 6144, E 16, A 4) from decode batch to prefill; a fine-grained one."""
    register_compile(
        _sort_kernel,
        "moe_sort",
        {"experts_ptr": "*i32", "order_ptr": "*i32", "place_ptr": "*i32", "ends_ptr": "*i32"}
        | {"R": "i32:16"},
        {"BLOCK": _SORT_BLOCK},
    )
    register_compile(
        _gather_kernel,
        "moe_gather_768",
        {"x_ptr": "*bf16", "order_ptr": "*i32", "norm_weight_ptr": "*bf16", "out_ptr": "*bf16"}
        | {"D": "i32:16", "x_stride": "i32:16", "eps": "fp32"},
        {"A": 4, "BLOCK": 1024},
        num_warps=2,
    )
    register_compile(
        _combine_kernel,
        "moe_combine_768",
        {"y_ptr": "*fp32", "place_ptr": "*i32", "weights_ptr": "*fp32", "residual_ptr": "*bf16"}
        | {"out_ptr": "*bf16", "D": "i32:16", "residual_stride": "i32:16"},
        {"A": 4, "BLOCK": 1024},
    )
    for name, dtype, D, F, E, rows in (
        ("768x6144_r32", "bf16", 768, 6144, 16, 32),
        ("768x6144_r256", "bf16", 768, 6144, 16, 256),
        ("768x6144_r1024", "bf16", 768, 6144, 16, 1024),
        ("768x6144_r8192", "bf16", 768, 6144, 16, 8192),
        ("2048x768_r512", "bf16", 2048, 768, 128, 512),
        ("768x6144_r256_fp32", "fp32", 768, 6144, 16, 256),
    ):
        for gated, n, k in ((True, 2 * F, D), (False, D, F)):
            tile = product_tile(rows, E, n, k, 2 if dtype == "bf16" else 4, 132)
            register_compile(
                _product_kernel,
                f"moe_product_{name}_{'up' if gated else 'down'}",
                {"x_ptr": f"*{dtype}", "w_ptr": f"*{dtype}", "ends_ptr": "*i32", "N": "i32:16"}
                | {"out_ptr": f"*{dtype}" if gated else "*fp32"},
                _product_constexprs(tile, E, k, gated),
                num_warps=tile.num_warps,
            )


_register()
