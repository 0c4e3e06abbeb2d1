"""Attention of many queries: one pass over the keys, the softmax kept up to date (prefill).

For a query at position p of a sequence, with the keys j <= p, and j > p - window if there is one:

    out = sum_j softmax_j(scale * q . k_j) v_j

computed tile by tile with a running maximum and sum (FlashAttention, arXiv 2205.14135, 2307.08691).
Keys and values come from the pages of the KV cache, so a chunk of a prompt sees the chunks before
it, or from packed tensors. The specification is `attention.attention_reference`.

On compute capability 9.0 `hopper_attention` does it, in 16 bits; the kernel here is that of all
other cards, of fp32 and of the interpreter.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hayate.kernels._triton import (
    gdc_launch_dependents,
    gdc_wait,
    launch,
    next_power_of_2,
    register_compile,
    tl,
    triton,
)
from hayate.kernels.hopper_attention import hopper_attention_fits, launch_hopper_attention

LOG2_E = math.log2(math.e)


class Tiles(NamedTuple):
    """Queries and keys a program handles at a time, and how it is compiled."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# For head widths up to the key; 127 stands for the widths that are padded to 128, whose masks take
# registers. All of these compile without spills. Cards with wgmma or tcgen05 and 227 KB of shared
# memory for a program (9.0, 10.0), and the others, down to 99 KB (8.6, 8.9, 12.0).
_WIDE_TILES = {
    64: Tiles(128, 128, 8, 2),
    127: Tiles(128, 64, 8, 2),
    128: Tiles(128, 128, 8, 2),
    256: Tiles(128, 32, 8, 2),
}
_NARROW_TILES = {
    64: Tiles(128, 64, 8, 2),
    128: Tiles(128, 32, 8, 2),
    256: Tiles(64, 32, 8, 2),
}
# With pages, a key tile's address is itself loaded: one more stage of the software pipeline.
_PAGE_LOOKUP_STAGE = 1
_FP32_TILES = Tiles(32, 32, 4, 1)  # exact products, no tensor cores


def flash_tiles(capability: tuple[int, int], head_dim: int, dtype: torch.dtype) -> Tiles:
    """The tiles for a card of this compute capability. Raises ValueError beyond head width 256."""
    table = _WIDE_TILES if capability[0] in (9, 10, 11) else _NARROW_TILES
    widths = [width for width in table if head_dim <= width]
    if not widths:
        raise ValueError(f"head width {head_dim} is not supported; the largest is {max(table)}")
    return _FP32_TILES if dtype == torch.float32 else table[min(widths)]


@triton.jit
def kv_tile(
    table_ptr,
    start,
    columns,
    end,
    stride_page,
    stride_token,
    BLOCK_N: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
):
    """Where the keys `start + columns` of a sequence lie: a scalar offset and one for each column.

    `start` is a multiple of BLOCK_N; nothing is looked up at or beyond `end`. PAGE_SIZE 0 stands
    for a sequence without pages. A tile within one page costs one scalar lookup, and its addresses
    are affine.
    """
    if PAGE_SIZE == 0:
        base = tl.cast(stride_token, tl.int64) * start
        offsets = columns * stride_token
    elif BLOCK_N <= PAGE_SIZE:
        base = tl.load(table_ptr + start // PAGE_SIZE).to(tl.int64) * stride_page
        base += start % PAGE_SIZE * stride_token
        offsets = columns * stride_token
    else:
        position = start + columns
        page = tl.load(table_ptr + position // PAGE_SIZE, mask=position < end, other=0)
        base = 0
        offsets = page.to(tl.int64) * stride_page + position % PAGE_SIZE * stride_token
    return base, offsets


@triton.jit
def attend(
    acc,  # (BLOCK_M, BLOCK_K) fp32, sum of p * v
    total,  # (BLOCK_M,) sum of p
    peak,  # (BLOCK_M,) largest score so far, in units of log2
    q,
    position,
    k_ptr,
    v_ptr,
    table_ptr,
    begin,
    end,
    limit,
    stride_page,
    stride_token,
    scale_log2,
    window,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add the key tiles from `begin` to `end`; without MASKED every query sees all of their keys.

    A masked tile reads nothing from `limit` on: unused slots of a page may hold anything, NaN too.
    """
    columns = tl.arange(0, BLOCK_N)
    channels = tl.arange(0, BLOCK_K)
    for start in range(begin, end, BLOCK_N):
        base, offsets = kv_tile(
            table_ptr, start, columns, limit, stride_page, stride_token, BLOCK_N, PAGE_SIZE
        )
        k_tile = k_ptr + base + (offsets[:, None] + channels[None, :])
        v_tile = v_ptr + base + (offsets[:, None] + channels[None, :])
        if MASKED:
            exists = (start + columns < limit)[:, None] & (channels < K)[None, :]
            k = tl.load(k_tile, mask=exists, other=0.0)
        elif BLOCK_K != K:
            k = tl.load(k_tile, mask=(channels < K)[None, :], other=0.0)
        else:
            k = tl.load(k_tile)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if MASKED:
            j = (start + columns)[None, :]
            visible = j <= position[:, None]
            if WINDOW:
                visible &= j > position[:, None] - window
            scores = tl.where(visible, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=1) * scale_log2)
        # The one rounding of fma is asked for: masked and whole tiles must give the same bits.
        p = tl.exp2(tl.fma(scores, scale_log2, -new_peak[:, None]))
        shrink = tl.exp2(peak - new_peak)
        total = tl.fma(total, shrink, tl.sum(p, axis=1))
        peak = new_peak
        if MASKED:
            v = tl.load(v_tile, mask=exists, other=0.0)
        elif BLOCK_K != K:
            v = tl.load(v_tile, mask=(channels < K)[None, :], other=0.0)
        else:
            v = tl.load(v_tile)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, total, peak


# Slices of a batch's tables begin anywhere, and their width changes from step to step.
@triton.jit(
    do_not_specialize=["table_stride", "window"],
    do_not_specialize_on_alignment=["table_ptr", "cu_seqlens_q_ptr", "kv_lens_ptr"],
)
def _flash_attention_kernel(
    q_ptr,  # (T, H, K)
    k_ptr,  # (P, B, G, K) with pages, else (T, G, K)
    v_ptr,
    out_ptr,  # (T, H, K), written
    table_ptr,  # (S, P) int32, with pages
    cu_seqlens_q_ptr,  # (S + 1,)
    kv_lens_ptr,  # (S,) lengths with pages, else (S + 1,) cumulative lengths
    q_stride,
    table_stride,
    stride_page,
    stride_token,
    scale_log2,
    window,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    CAUSAL: tl.constexpr,  # else every query sees all keys of its sequence
    WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (m, h, s): BLOCK_M queries of head h of sequence s, the last queries first.

    Late queries see the most keys; starting with them keeps the end of the grid short.
    """
    gdc_launch_dependents(PDL)
    gdc_wait(PDL)
    head = tl.program_id(1)
    sequence = tl.program_id(2)
    q_start = tl.load(cu_seqlens_q_ptr + sequence)
    q_len = tl.load(cu_seqlens_q_ptr + sequence + 1) - q_start
    first_query = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    if first_query >= q_len:
        return

    kv_offset = (head // (H // G) * K).to(tl.int64)
    if PAGE_SIZE == 0:
        kv_start = tl.load(kv_lens_ptr + sequence)
        kv_len = tl.load(kv_lens_ptr + sequence + 1) - kv_start
        kv_offset += kv_start.to(tl.int64) * stride_token
    else:
        kv_len = tl.load(kv_lens_ptr + sequence)
        table_ptr += sequence * table_stride
    k_ptr += kv_offset
    v_ptr += kv_offset

    rows = tl.arange(0, BLOCK_M)
    channels = tl.arange(0, BLOCK_K)
    exists = (first_query + rows < q_len)[:, None] & (channels < K)[None, :]
    token = (q_start + first_query + rows).to(tl.int64)
    q = tl.load(
        q_ptr + token[:, None] * q_stride + head * K + channels[None, :], mask=exists, other=0.0
    )
    first_position = kv_len - q_len + first_query
    position = first_position + rows
    acc = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    # Finite, so that a row without a visible key so far gives exp2(-inf - peak) = 0, not NaN.
    peak = tl.full([BLOCK_M], -1e30, dtype=tl.float32)

    # Keys [begin, whole) are seen by some of the queries (window), [whole, diagonal) by all,
    # [diagonal, end) by some (causality).
    if not CAUSAL:
        first_position = kv_len - 1
        position = first_position + 0 * rows
    end = tl.minimum(first_position + BLOCK_M, kv_len)
    diagonal = (first_position + 1) // BLOCK_N * BLOCK_N
    begin = 0
    if WINDOW:
        begin = tl.maximum(first_position - window + 1, 0) // BLOCK_N * BLOCK_N
        whole = tl.maximum(first_position + BLOCK_M - window, 0)
        whole = tl.cdiv(tl.minimum(whole, end), BLOCK_N) * BLOCK_N
        diagonal = tl.maximum(diagonal, whole)
        acc, total, peak = attend(
            acc, total, peak, q, position, k_ptr, v_ptr, table_ptr, begin, whole, end,
            stride_page, stride_token, scale_log2, window,
            K, BLOCK_N, BLOCK_K, PAGE_SIZE, True, WINDOW, PRECISION,
        )  # fmt: skip
        begin = whole
    acc, total, peak = attend(
        acc, total, peak, q, position, k_ptr, v_ptr, table_ptr, begin, diagonal, end,
        stride_page, stride_token, scale_log2, window,
        K, BLOCK_N, BLOCK_K, PAGE_SIZE, False, WINDOW, PRECISION,
    )  # fmt: skip
    acc, total, peak = attend(
        acc, total, peak, q, position, k_ptr, v_ptr, table_ptr, diagonal, end, end,
        stride_page, stride_token, scale_log2, window,
        K, BLOCK_N, BLOCK_K, PAGE_SIZE, True, WINDOW, PRECISION,
    )  # fmt: skip

    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(
        out_ptr + token[:, None] * (H * K) + head * K + channels[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=exists,
    )


def launch_flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    page_table: Tensor | None,
    cu_seqlens_q: Tensor,
    kv_lens: Tensor,
    *,
    max_seqlen_q: int,
    scale: float,
    window: int | None = None,
    causal: bool = True,
    out: Tensor | None = None,
    tiles: Tiles | None = None,
) -> Tensor:
    """Attention over pages (k, v (P, B, G, K), kv_lens (S,)) or, without a page table, over packed
    k and v (T, G, K), kv_lens (S + 1,) cumulative; on a GPU, or in Triton's interpreter.

    Writes the rows from cu_seqlens_q[0] on of `out`, a new tensor by default. `tiles` asks for the
    kernel of this file, cut so. A window is for causal attention.
    """
    num_tokens, H, K = q.shape
    G = k.shape[-2]
    assert k.stride() == v.stride()
    assert k.stride()[-2:] == q.stride()[1:] == (K, 1)
    assert causal or window is None
    if out is None:
        out = q.new_empty(num_tokens, H, K)
    num_sequences = cu_seqlens_q.numel() - 1
    if num_tokens == 0 or num_sequences == 0:
        return out
    operands = (q, k, v, page_table, cu_seqlens_q, kv_lens, out)
    if tiles is None and hopper_attention_fits(q, k, page_table):
        options: dict[str, Any] = {"scale": scale, "window": window, "causal": causal}
        if launch_hopper_attention(*operands, max_seqlen_q=max_seqlen_q, **options):
            return out
    if tiles is None:
        capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else (9, 0)
        tiles = flash_tiles(capability, K, q.dtype)
    launch(
        _flash_attention_kernel,
        (triton.cdiv(max_seqlen_q, tiles.block_m), H, num_sequences),
        q,
        k,
        v,
        out,
        cu_seqlens_q if page_table is None else page_table,
        cu_seqlens_q,
        kv_lens,
        q.stride(0),
        0 if page_table is None else page_table.stride(0),
        0 if page_table is None else k.stride(0),
        k.stride(-3),
        scale * LOG2_E,
        0 if window is None else window,
        H=H,
        G=G,
        K=K,
        PAGE_SIZE=0 if page_table is None else k.shape[1],
        CAUSAL=causal,
        WINDOW=window is not None,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        BLOCK_K=max(next_power_of_2(K), 16),
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages + _PAGE_LOOKUP_STAGE * (page_table is not None),
    )
    return out


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    max_seqlen_q: int,
    scale: float,
    window: int | None = None,
    causal: bool = True,
) -> Tensor:
    """Attention over packed keys and values, without a cache.

    q (T, H, K), k and v (N, G, K) on a GPU, or anywhere in Triton's interpreter, heads and channels
    contiguous; cu_seqlens_q and cu_seqlens_k (S + 1,) int32. The queries of a sequence are its last
    positions; without `causal` each sees all keys. Returns (T, H, K) in q's dtype.
    """
    return launch_flash_attention(
        q,
        k,
        v,
        None,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        scale=scale,
        window=window,
        causal=causal,
    )


for _width, _heads, _kv_heads, _page_size, _window in (
    (64, 9, 3, 64, False),
    (80, 32, 32, 64, False),
    (128, 32, 8, 64, False),
    (128, 32, 8, 128, True),
    (128, 32, 8, 0, False),
    (256, 16, 2, 64, False),
):
    for _capability, _min_cc, _max_cc in (((8, 0), 80, 89), ((9, 0), 90, 100), ((12, 0), 120, 120)):
        _tiles = flash_tiles(_capability, _width, torch.bfloat16)
        register_compile(
            _flash_attention_kernel,
            f"flash_attention_{_width}_page{_page_size}{'_window' if _window else ''}_sm{_min_cc}",
            {
                "q_ptr": "*bf16",
                "k_ptr": "*bf16",
                "v_ptr": "*bf16",
                "out_ptr": "*bf16",
                "table_ptr": "*i32",
                "cu_seqlens_q_ptr": "*i32",
                "kv_lens_ptr": "*i32",
                "q_stride": "i32:16",
                "table_stride": "i32",
                "stride_page": "i32:16",
                "stride_token": "i32:16",
                "scale_log2": "fp32",
                "window": "i32",
            },
            {
                "H": _heads,
                "G": _kv_heads,
                "K": _width,
                "PAGE_SIZE": _page_size,
                "CAUSAL": True,
                "WINDOW": _window,
                "BLOCK_M": _tiles.block_m,
                "BLOCK_N": _tiles.block_n,
                "BLOCK_K": next_power_of_2(_width),
                "PRECISION": "tf32",
            },
            num_warps=_tiles.num_warps,
            num_stages=_tiles.num_stages + _PAGE_LOOKUP_STAGE * (_page_size > 0),
            min_cc=_min_cc,
            max_cc=_max_cc,
        )
