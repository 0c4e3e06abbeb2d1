"""Attention whose every sum has one order, however the queries of a sequence are cut into steps.

For `batch_invariant`: a query's result must be the same to the last bit when it is computed alone
(decode), with a few others (verifying drafts) or in a prompt's chunk, and whatever else is in the
batch. So the keys of a sequence are cut at fixed positions, multiples of SEGMENT, and every query
walks each segment in the same key tiles, with a softmax of its own; the segments are merged in
order. Tiles that a query does not see add exact zeros, so it does not matter that its neighbours'
tiles are walked too. The rows of a tile are query heads that share a key/value head, token by token:

- with few rows a sequence, one program a segment; the last to finish merges them;
- with many, a program walks all segments of its rows and merges as it goes.

Both multiply by the same instructions (wgmma.m64 on sm_90, whose rows do not mix). The
specification is `attention.attention_reference`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hayate.kernels._triton import (
    cdiv,
    gdc_launch_dependents,
    gdc_wait,
    launch,
    next_power_of_2,
    register_compile,
    tl,
    triton,
)
from hayate.kernels.decode_attention import _arrival_counters
from hayate.kernels.flash_attention import LOG2_E, Tiles, attend

__all__ = ["launch_invariant_attention"]

SEGMENT = 512  # keys; what a program of a decode step walks one after another


def _tiles(capability: tuple[int, int], head_dim: int, dtype: torch.dtype, *, few: bool) -> Tiles:
    """The tile, `few`: for up to its number of rows a sequence.

    Keys of a tile, and on cards other than 9.0 all of it, are the same for few and many.
    """
    if dtype == torch.float32:
        return Tiles(32, 32, 4, 1)
    if capability != (9, 0):  # 64 rows of more than 64 channels spill on 8.9
        return Tiles(32 if head_dim > 64 else 64, 32, 8, 2)
    if head_dim > 128:
        return Tiles(64, 32, 8, 2)
    return Tiles(64, 64, 4, 3) if few else Tiles(128, 64, 8, 3)


@triton.jit
def _merge(acc, total, peak, other_acc, other_total, other_peak):
    """Add the softmax-weighted values of one more segment; exact where either has none."""
    top = tl.maximum(peak, other_peak)
    shrink = tl.exp2(peak - top)
    weight = tl.exp2(other_peak - top)
    total = tl.fma(other_total, weight, total * shrink)
    acc = tl.fma(other_acc, weight[:, None], acc * shrink[:, None])
    return acc, total, top


@triton.jit
def _attend_segment(
    q,
    position,
    k_ptr,
    v_ptr,
    table_ptr,
    segment,
    begin,
    end,
    stride_page,
    stride_token,
    scale_log2,
    window,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    SEGMENT: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Weighted values, sum and maximum of the segment's keys from `begin` to `end`.

    Every tile is masked, also where all rows see all of it: the loop without a mask rounds otherwise.
    A segment without a key gives 0, 0 and -1e30, which is finite, so that a row without a visible
    key gives exp2(-inf - peak) = 0, not NaN.
    """
    segment_begin = tl.maximum(segment * SEGMENT, begin)
    segment_end = tl.minimum((segment + 1) * SEGMENT, end)
    acc = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    peak = tl.full([BLOCK_M], -1e30, dtype=tl.float32)
    return attend(
        acc, total, peak, q, position, k_ptr, v_ptr, table_ptr, segment_begin, segment_end, end,
        stride_page, stride_token, scale_log2, window,
        K, BLOCK_N, BLOCK_K, PAGE_SIZE, True, WINDOW, PRECISION,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["table_stride", "window", "splits", "max_rows"],
    do_not_specialize_on_alignment=["table_ptr", "cu_seqlens_q_ptr", "seq_lens_ptr"],
)
def _invariant_attention_kernel(
    q_ptr,  # (T, H, K)
    k_ptr,  # (P, B, G, K)
    v_ptr,
    out_ptr,  # (T, H, K), written
    partial_ptr,  # (S, G, splits, max_rows, K) fp32, scratch
    stats_ptr,  # (S, G, splits, 2, max_rows) fp32, scratch: maximum and sum
    arrived_ptr,  # (S, G) int32, zero before and after
    table_ptr,  # (S, P) int32
    cu_seqlens_q_ptr,  # (S + 1,) int32
    seq_lens_ptr,  # (S,) int32
    table_stride,
    stride_page,
    stride_token,
    scale_log2,
    window,
    splits,  # segments a sequence may have
    max_rows,  # GROUP * largest number of query tokens
    G: tl.constexpr,
    GROUP: tl.constexpr,  # H / G
    K: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    SEGMENT: tl.constexpr,
    FEW: tl.constexpr,  # a tile holds all rows of a sequence: a program a segment
    WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (m, g, s): a tile of rows, or with FEW segment m, of kv head g and sequence s."""
    gdc_launch_dependents(PDL)
    gdc_wait(PDL)
    kv_head = tl.program_id(1)
    sequence = tl.program_id(2)
    q_start = tl.load(cu_seqlens_q_ptr + sequence)
    q_len = tl.load(cu_seqlens_q_ptr + sequence + 1) - q_start
    kv_len = tl.load(seq_lens_ptr + sequence)
    first_row = 0
    if not FEW:  # the last queries, which see most, first
        first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    if first_row >= q_len * GROUP:
        return

    rows = first_row + tl.arange(0, BLOCK_M)
    channels = tl.arange(0, BLOCK_K)
    token = q_start + rows // GROUP
    cell = (rows < q_len * GROUP)[:, None] & (channels < K)[None, :]
    offsets = (token.to(tl.int64) * (G * GROUP) + kv_head * GROUP + rows % GROUP) * K
    offsets = offsets[:, None] + channels[None, :]
    q = tl.load(q_ptr + offsets, mask=cell, other=0.0)
    position = kv_len - q_len + rows // GROUP
    first_position = kv_len - q_len + first_row // GROUP
    last_query = tl.minimum((first_row + BLOCK_M - 1) // GROUP, q_len - 1)
    end = kv_len - q_len + last_query + 1
    begin = 0
    if WINDOW:
        begin = tl.maximum(first_position - window + 1, 0) // BLOCK_N * BLOCK_N
    first_segment = begin // SEGMENT
    num_segments = tl.cdiv(tl.maximum(end, 0), SEGMENT) - first_segment
    table_ptr += sequence * table_stride
    k_ptr += kv_head * K
    v_ptr += kv_head * K

    acc = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    peak = tl.full([BLOCK_M], -1e30, dtype=tl.float32)
    if FEW:
        part = tl.program_id(0)
        if part >= tl.maximum(num_segments, 1):
            return
        acc, total, peak = _attend_segment(
            q, position, k_ptr, v_ptr, table_ptr, first_segment + part, begin, end,
            stride_page, stride_token, scale_log2, window,
            K, BLOCK_M, BLOCK_N, BLOCK_K, PAGE_SIZE, SEGMENT, WINDOW, PRECISION,
        )  # fmt: skip
    else:
        for i in range(first_segment, first_segment + num_segments):
            a, l, m = _attend_segment(
                q, position, k_ptr, v_ptr, table_ptr, i, begin, end,
                stride_page, stride_token, scale_log2, window,
                K, BLOCK_M, BLOCK_N, BLOCK_K, PAGE_SIZE, SEGMENT, WINDOW, PRECISION,
            )  # fmt: skip
            acc, total, peak = _merge(acc, total, peak, a, l, m)

    if FEW and num_segments > 1:
        pair = sequence * G + kv_head
        rows_used = rows < q_len * GROUP
        inner = rows[:, None] * K + channels[None, :]
        stats_ptr += pair.to(tl.int64) * splits * (2 * max_rows)
        partial_ptr += pair.to(tl.int64) * splits * (max_rows * K)
        tl.store(stats_ptr + part * (2 * max_rows) + rows, peak, mask=rows_used)
        tl.store(stats_ptr + part * (2 * max_rows) + max_rows + rows, total, mask=rows_used)
        tl.store(partial_ptr + part * (max_rows * K) + inner, acc, mask=cell)
        tl.debug_barrier()  # every thread's stores come before the release below
        arrived = tl.atomic_add(arrived_ptr + pair, 1, sem="acq_rel", scope="gpu")
        if arrived != num_segments - 1:
            return
        tl.store(arrived_ptr + pair, 0)
        acc = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
        total = tl.zeros([BLOCK_M], dtype=tl.float32)
        peak = tl.full([BLOCK_M], -1e30, dtype=tl.float32)
        # The scratch is reused by every layer: .cg reads it from L2, past stale lines.
        for i in range(0, num_segments):
            stats = stats_ptr + i * (2 * max_rows) + rows
            m = tl.load(stats, mask=rows_used, other=-1e30, cache_modifier=".cg")
            l = tl.load(stats + max_rows, mask=rows_used, other=0.0, cache_modifier=".cg")
            a = partial_ptr + i * (max_rows * K) + inner
            a = tl.load(a, mask=cell, other=0.0, cache_modifier=".cg")
            acc, total, peak = _merge(acc, total, peak, a, l, m)

    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=cell)


def launch_invariant_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    *,
    max_seqlen_q: int,
    scale: float,
    window: int | None,
    out: Tensor | None = None,
    segment: int = SEGMENT,
) -> Tensor:
    """`attention` on the GPU; `out` as for `_flash_attention_triton`.

    `segment` replaces the length of a segment, for measurements and tests.
    """
    num_tokens, H, K = q.shape
    page_size, G = k_cache.shape[1:3]
    num_sequences = seq_lens.numel()
    assert q.is_contiguous()
    assert k_cache.stride() == v_cache.stride()
    assert k_cache.stride()[2:] == (K, 1)
    if out is None:
        out = torch.empty_like(q)
    if num_tokens == 0 or num_sequences == 0:
        return out
    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else (9, 0)
    rows = max_seqlen_q * (H // G)
    tiles = _tiles(capability, K, q.dtype, few=True)
    few = rows <= tiles.block_m
    if not few:
        tiles = _tiles(capability, K, q.dtype, few=False)
    splits = cdiv(page_table.shape[1] * page_size, segment) if few else 0
    scratch = num_sequences * G * splits * rows if splits > 1 else 0
    launch(
        _invariant_attention_kernel,
        (splits if few else cdiv(rows, tiles.block_m), G, num_sequences),
        q,
        k_cache,
        v_cache,
        out,
        torch.empty(scratch * K, dtype=torch.float32, device=q.device),
        torch.empty(scratch * 2, dtype=torch.float32, device=q.device),
        _arrival_counters(q.device, num_sequences * G),
        page_table,
        cu_seqlens_q,
        seq_lens,
        page_table.stride(0),
        k_cache.stride(0),
        k_cache.stride(1),
        scale * LOG2_E,
        0 if window is None else window,
        splits,
        rows,
        G=G,
        GROUP=H // G,
        K=K,
        PAGE_SIZE=page_size,
        SEGMENT=segment,
        FEW=few,
        WINDOW=window is not None,
        **_blocks(tiles, K, q.dtype),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return out


def _blocks(tiles: Tiles, head_dim: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_K": max(next_power_of_2(head_dim), 16),
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
    }


for _width, _heads, _kv_heads, _window in (
    (64, 9, 3, False),
    (128, 32, 8, False),
    (128, 32, 8, True),
    (256, 16, 2, False),
):
    for _few in (True, False):
        for _capability, _min_cc, _max_cc in (
            ((9, 0), 90, 90),
            ((8, 0), 80, 89),
            ((10, 0), 100, 999),
        ):
            _tile = _tiles(_capability, _width, torch.bfloat16, few=_few)
            register_compile(
                _invariant_attention_kernel,
                f"invariant_attention_{_width}_{'few' if _few else 'many'}"
                f"{'_window' if _window else ''}_sm{_min_cc}",
                {f"{n}_ptr": "*bf16" for n in ("q", "k", "v", "out")}
                | {f"{n}_ptr": "*fp32" for n in ("partial", "stats")}
                | {f"{n}_ptr": "*i32" for n in ("arrived", "table", "cu_seqlens_q", "seq_lens")}
                | {"table_stride": "i32", "stride_page": "i32:16", "stride_token": "i32:16"}
                | {"scale_log2": "fp32", "window": "i32", "splits": "i32", "max_rows": "i32"},
                {
                    "G": _kv_heads,
                    "GROUP": _heads // _kv_heads,
                    "K": _width,
                    "PAGE_SIZE": 64,
                    "SEGMENT": SEGMENT,
                    "FEW": _few,
                    "WINDOW": _window,
                    **_blocks(_tile, _width, torch.bfloat16),
                },
                num_warps=_tile.num_warps,
                num_stages=_tile.num_stages,
                min_cc=_min_cc,
                max_cc=_max_cc,
            )
