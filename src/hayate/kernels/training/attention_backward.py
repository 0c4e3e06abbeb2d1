"""Triton kernels of `document_attention`, the backward pass (FlashAttention, arXiv 2307.08691).

From what the forward pass kept, p_tj = 2^(s_tj - lse_t) is made again, tile by tile, and from it

    delta_t = dout_t . out_t               ds_tj = p_tj (dout_t . v_j - delta_t)
    dq_t = scale sum_j ds_tj k_j           dk_j = scale sum_t ds_tj q_t           dv_j = sum_t p_tj dout_t

in two kernels, one that owns query tiles and one that owns key tiles, so that no sum is shared. When several
query heads share a key head each writes its dk and dv in fp32, and they are added up afterwards, in order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hayate.kernels._triton import launch, tl, triton
from hayate.kernels.flash_attention import LOG2_E
from hayate.kernels.training.attention_forward import (
    AttentionTiles,
    attention_constexprs,
    first_key,
    grid,
    key_ranges,
    load_tile,
    max_tiles,
    register_attention,
    scores_of,
    store_tile,
    tiles_for,
)

__all__ = ["attention_backward"]


@triton.jit
def _dq_tiles(
    acc, q, dout, lse, delta, row, first, k_ptr, v_ptr, begin, end, stride, L, scale_log2,
    K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    for start in range(begin, end, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        k = load_tile(k_ptr, key, stride, L, K, BLOCK_K, MASKED)
        v = load_tile(v_ptr, key, stride, L, K, BLOCK_K, MASKED)
        scores = scores_of(
            q, k, row[:, None], key[None, :], first[:, None], scale_log2, MASKED, PRECISION
        )
        p = tl.exp2(scores - lse[:, None])
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["T", "L", "window"])
def _attention_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,  # (H, T), written
    dq_ptr,
    starts_ptr,
    T,
    L,
    scale,
    scale_log2,
    window,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (h, window, tile of rows), the last tiles first."""
    head = tl.program_id(0)
    base = tl.program_id(1) * L
    first_row = (tl.num_programs(2) - 1 - tl.program_id(2)) * BLOCK_M
    starts_ptr += base
    offset = base.to(tl.int64) * (H * K) + head * K
    kv_offset = base.to(tl.int64) * (G * K) + head // (H // G) * K
    k_ptr += kv_offset
    v_ptr += kv_offset

    row = first_row + tl.arange(0, BLOCK_M)
    first = first_key(starts_ptr, row, base, L, window, WINDOW)
    q = load_tile(q_ptr + offset, row, H * K, L, K, BLOCK_K, True)
    dout = load_tile(dout_ptr + offset, row, H * K, L, K, BLOCK_K, True)
    out = load_tile(out_ptr + offset, row, H * K, L, K, BLOCK_K, True)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), axis=1)
    statistics = head.to(tl.int64) * T + base + row
    tl.store(delta_ptr + statistics, delta, mask=row < L)
    lse = tl.load(lse_ptr + statistics, mask=row < L, other=float("inf"))

    begin, whole, diagonal, end = key_ranges(
        first_row, starts_ptr, base, L, window, WINDOW, BLOCK_M, BLOCK_N
    )
    acc = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
    acc = _dq_tiles(
        acc, q, dout, lse, delta, row, first, k_ptr, v_ptr, begin, whole, G * K, L, scale_log2,
        K, BLOCK_N, BLOCK_K, True, PRECISION,
    )  # fmt: skip
    acc = _dq_tiles(
        acc, q, dout, lse, delta, row, first, k_ptr, v_ptr, whole, diagonal, G * K, L, scale_log2,
        K, BLOCK_N, BLOCK_K, False, PRECISION,
    )  # fmt: skip
    acc = _dq_tiles(
        acc, q, dout, lse, delta, row, first, k_ptr, v_ptr, diagonal, end, G * K, L, scale_log2,
        K, BLOCK_N, BLOCK_K, True, PRECISION,
    )  # fmt: skip
    store_tile(dq_ptr + offset, row, H * K, L, acc * scale, K, BLOCK_K)


@triton.jit
def _dkv_tiles(
    dk, dv, k, v, key, q_ptr, dout_ptr, lse_ptr, delta_ptr, starts_ptr, begin, end, base, stride,
    L, scale_log2, window, K: tl.constexpr, WINDOW: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    for start in range(begin, end, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        q = load_tile(q_ptr, row, stride, L, K, BLOCK_K, MASKED)
        dout = load_tile(dout_ptr, row, stride, L, K, BLOCK_K, MASKED)
        if MASKED:
            lse = tl.load(lse_ptr + row, mask=row < L, other=float("inf"))
            delta = tl.load(delta_ptr + row, mask=row < L, other=0.0)
            first = first_key(starts_ptr, row, base, L, window, WINDOW)
        else:
            lse = tl.load(lse_ptr + row)
            delta = tl.load(delta_ptr + row)
            first = row
        # Transposed: keys are the rows of these tiles, so that the accumulators are those of the keys.
        scores = scores_of(
            k, q, row[None, :], key[:, None], first[None, :], scale_log2, MASKED, PRECISION
        )
        p = tl.exp2(scores - lse[None, :])
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["T", "L", "window"])
def _attention_dkv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,  # (T, H, K), of each query head by itself
    dv_ptr,
    starts_ptr,
    T,
    L,
    scale,
    scale_log2,
    window,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILES: tl.constexpr,  # of rows in a window, up to a power of two
    PRECISION: tl.constexpr,
):
    """Program (h, window, tile of keys), the first tiles, which most rows see, first."""
    head = tl.program_id(0)
    base = tl.program_id(1) * L
    key_begin = tl.program_id(2) * BLOCK_N
    starts_ptr += base
    offset = base.to(tl.int64) * (H * K) + head * K
    kv_offset = base.to(tl.int64) * (G * K) + head // (H // G) * K
    lse_ptr += head.to(tl.int64) * T + base
    delta_ptr += head.to(tl.int64) * T + base

    # Rows [begin, diagonal) and [whole, end) see some of the keys, [diagonal, whole) all of them.
    tile_row = tl.arange(0, TILES) * BLOCK_M
    sees_some = first_key(starts_ptr, tile_row, base, L, window, WINDOW) < key_begin + BLOCK_N
    last_row = tile_row + BLOCK_M - 1
    sees_all = first_key(starts_ptr, last_row, base, L, window, WINDOW) <= key_begin
    begin = key_begin // BLOCK_M * BLOCK_M
    end = tl.sum((sees_some & (tile_row < L)).to(tl.int32), axis=0) * BLOCK_M
    diagonal = tl.minimum(tl.cdiv(key_begin + BLOCK_N - 1, BLOCK_M) * BLOCK_M, end)
    whole = tl.sum((sees_all & (last_row < L)).to(tl.int32), axis=0) * BLOCK_M
    whole = tl.maximum(whole, diagonal)

    key = key_begin + tl.arange(0, BLOCK_N)
    k = load_tile(k_ptr + kv_offset, key, G * K, L, K, BLOCK_K, True)
    v = load_tile(v_ptr + kv_offset, key, G * K, L, K, BLOCK_K, True)
    q_ptr += offset
    dout_ptr += offset
    dk = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    dk, dv = _dkv_tiles(
        dk, dv, k, v, key, q_ptr, dout_ptr, lse_ptr, delta_ptr, starts_ptr, begin, diagonal, base,
        H * K, L, scale_log2, window, K, WINDOW, BLOCK_M, BLOCK_K, True, PRECISION,
    )  # fmt: skip
    dk, dv = _dkv_tiles(
        dk, dv, k, v, key, q_ptr, dout_ptr, lse_ptr, delta_ptr, starts_ptr, diagonal, whole, base,
        H * K, L, scale_log2, window, K, WINDOW, BLOCK_M, BLOCK_K, False, PRECISION,
    )  # fmt: skip
    dk, dv = _dkv_tiles(
        dk, dv, k, v, key, q_ptr, dout_ptr, lse_ptr, delta_ptr, starts_ptr, whole, end, base,
        H * K, L, scale_log2, window, K, WINDOW, BLOCK_M, BLOCK_K, True, PRECISION,
    )  # fmt: skip
    store_tile(dk_ptr + offset, key, H * K, L, dk * scale, K, BLOCK_K)
    store_tile(dv_ptr + offset, key, H * K, L, dv, K, BLOCK_K)


def attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    document_starts: Tensor,
    *,
    sequence_length: int,
    scale: float,
    window: int | None,
    tiles: AttentionTiles | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of what `attention_forward` returned."""
    (T, H, K), G, L = q.shape, k.shape[1], sequence_length
    chosen = tiles or tiles_for(q)
    dq, delta = torch.empty_like(q), torch.empty_like(lse)
    numbers = (T, L, scale, scale * LOG2_E, window or 0)
    launch(
        _attention_dq_kernel,
        grid(q, L, chosen.dq.block_m),
        *(q, k, v, out, dout, lse, delta, dq, document_starts),
        *numbers,
        **attention_constexprs(q, k, window, chosen.dq),
    )
    dtype = q.dtype if H == G else torch.float32
    dk, dv = torch.empty(2, T, H, K, dtype=dtype, device=q.device)
    launch(
        _attention_dkv_kernel,
        grid(q, L, chosen.dkv.block_n),
        *(q, k, v, dout, lse, delta, dk, dv, document_starts),
        *numbers,
        TILES=max_tiles(L, chosen.dkv),
        **attention_constexprs(q, k, window, chosen.dkv),
    )
    if H != G:
        dk, dv = (x.view(T, G, H // G, K).sum(2).to(q.dtype) for x in (dk, dv))
    return dq, dk, dv


_SIGNATURE = {"delta_ptr": "*fp32", "dout_ptr": "*bf16", "scale": "fp32"}
register_attention("dq", _attention_dq_kernel, _SIGNATURE | {"dq_ptr": "*bf16"})
register_attention(
    "dkv", _attention_dkv_kernel, _SIGNATURE | {"dk_ptr": "*fp32", "dv_ptr": "*fp32"}
)
