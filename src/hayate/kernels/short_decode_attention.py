"""`decode_attention` for few sequences whose page table holds few keys: less to set up, sooner done.

A step of Minitron-8B at 200 keys takes 3.94 ms so and 4.01 with `decode_attention`, one of SmolLM2
0.38 and 0.45; at 32,768 keys that one is faster (docs/log.md).

Decode reads every key and value once and computes little, so the keys of a sequence are split
between programs until the card is full (flash decoding, arXiv 2311.01282). The query heads that
share a key/value head, H / G of them, are the rows of one tile. Each program leaves its softmax
maximum m, sum l and weighted values a; the last one to finish a group merges them:

    out = sum_i 2^(m_i - m) a_i / sum_i 2^(m_i - m) l_i,    m = max_i m_i

Merging in the last program needs no second kernel, and a short context, which one program handles,
needs no merge. The specification is `attention.attention_reference`.

A short context is all latency, so what earlier steps wrote is read before the wait for the kernel in
front: lengths, page table, and the first tile but for this step's own keys. That is safe because the
first kernel of a step, the embedding, starts only when everything before it has ended.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hayate.kernels._triton import (
    gdc_launch_dependents,
    gdc_wait,
    launch,
    next_power_of_2,
    num_sms,
    register_compile,
    tl,
    triton,
)
from hayate.kernels.flash_attention import LOG2_E, kv_tile

MAX_KEYS = 4096  # a page table may hold
MAX_SEQUENCES = 16

# Up to this many tiles a merge costs more than it saves; beyond, a split has at least so many.
# Measured on an H200: a context of 200 keys takes 4.8 us so, 7.4 us in one program.
_UNSPLIT_TILES = 2
_MIN_SPLIT_TILES = 1
_NUM_STAGES = 3  # of the software pipeline: more would start later


def takes_short_kernel(page_table: Tensor, k_cache: Tensor) -> bool:
    """Few sequences, whose page table holds few keys."""
    num_sequences, num_pages = page_table.shape
    return num_sequences <= MAX_SEQUENCES and num_pages * k_cache.shape[1] <= MAX_KEYS


@triton.jit
def _attend_tile(
    acc,  # (BLOCK_M, BLOCK_K) fp32, sum of p * v
    sums,  # (BLOCK_M, BLOCK_N) fp32, sum of p, spread over the columns
    peak,  # (BLOCK_M,) largest score so far, in units of log2
    q,
    k,
    v,
    j,  # positions of the tile's keys
    position,  # of the queries
    scale_log2,
    window,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Take one tile of keys and values into the running softmax."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    visible = j[None, :] <= position[:, None]
    if WINDOW:
        visible &= j[None, :] > position[:, None] - window
    scores = tl.where(visible, scores * scale_log2, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, axis=1))
    p = tl.exp2(scores - new_peak[:, None])
    shrink = tl.exp2(peak - new_peak)
    sums = sums * shrink[:, None] + p
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, sums, new_peak


@triton.jit
def _short_decode_attention_kernel(
    q_ptr,  # (T, H, K)
    k_ptr,  # (P, B, G, K)
    v_ptr,
    out_ptr,  # (T, H, K), written
    partial_ptr,  # (S, G, SPLITS, ROWS, K) fp32, scratch
    stats_ptr,  # (S, G, SPLITS, 2, ROWS) fp32, scratch: maximum and sum
    arrived_ptr,  # (S, G) int32, zero before and after
    table_ptr,  # (S, P) int32
    cu_seqlens_q_ptr,  # (S + 1,) int32
    seq_lens_ptr,  # (S,) int32
    table_stride,
    stride_page,
    stride_token,
    scale_log2,
    window,
    num_sequences,
    target_programs,
    G: tl.constexpr,
    GROUP: tl.constexpr,  # H / G
    K: tl.constexpr,
    ROWS: tl.constexpr,  # GROUP * largest number of query tokens
    PAGE_SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,  # rows of the merge
    MERGE_UNROLL: tl.constexpr,
    UNSPLIT_TILES: tl.constexpr,
    MIN_SPLIT_TILES: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (g, i, s): split i of the keys of sequence s, for the query heads of kv head g."""
    gdc_launch_dependents(PDL)
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    sequence = tl.program_id(2)
    rows = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_N)
    channels = tl.arange(0, BLOCK_K)

    # Lengths, pages and the keys of earlier steps are read before the wait, see the head of the file.
    q_start = tl.load(cu_seqlens_q_ptr + sequence)
    q_len = tl.load(cu_seqlens_q_ptr + sequence + 1) - q_start
    kv_len = tl.load(seq_lens_ptr + sequence)
    first_tile = 0
    if WINDOW:
        first_tile = tl.maximum(kv_len - q_len - window + 1, 0) // BLOCK_N
    num_tiles = tl.cdiv(kv_len, BLOCK_N) - first_tile

    # Shares of equal length, so that all programs that have work end together.
    share = num_tiles
    if SPLITS > 1 and num_tiles > UNSPLIT_TILES:
        share = tl.cdiv(num_tiles, SPLITS)
        if BLOCK_S > 1:
            others = tl.arange(0, BLOCK_S)
            lens = tl.load(seq_lens_ptr + others, mask=others < num_sequences, other=0)
            if WINDOW:
                lens = tl.minimum(lens, window)
            all_tiles = tl.sum(tl.cdiv(lens, BLOCK_N), axis=0) * G
            share = tl.maximum(share, tl.cdiv(all_tiles, target_programs))
        share = tl.maximum(share, MIN_SPLIT_TILES)
    num_splits = tl.maximum(tl.cdiv(num_tiles, tl.maximum(share, 1)), 1)
    if split >= num_splits:
        return  # without waiting: split 0 of every pair waits, so the kernel ends after the one before

    token = q_start + rows // GROUP
    row_head = kv_head * GROUP + rows % GROUP
    has_row = rows < q_len * GROUP
    row_offset = (token.to(tl.int64) * (G * GROUP) + row_head) * K
    cell = has_row[:, None] & (channels < K)[None, :]
    position = kv_len - q_len + rows // GROUP

    table_ptr += sequence * table_stride
    k_ptr += kv_head * K
    v_ptr += kv_head * K
    acc = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
    # The sum stays spread over the columns until the end: one reduction instead of one a tile.
    sums = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    # Finite, so that a row without a visible key so far gives exp2(-inf - peak) = 0, not NaN.
    peak = tl.full([BLOCK_M], -1e30, dtype=tl.float32)
    begin = (first_tile + split * share) * BLOCK_N
    end = tl.minimum(begin + share * BLOCK_N, kv_len)

    first_base, first_offsets = kv_tile(
        table_ptr, begin, columns, end, stride_page, stride_token, BLOCK_N, PAGE_SIZE
    )
    first = first_base + first_offsets[:, None] + channels[None, :]
    exists = (begin + columns < end)[:, None] & (channels < K)[None, :]
    fresh = exists & (begin + columns >= kv_len - q_len)[:, None]
    old_k = tl.load(k_ptr + first, mask=exists & ~fresh, other=0.0)
    old_v = tl.load(v_ptr + first, mask=exists & ~fresh, other=0.0)
    gdc_wait(PDL)
    q = tl.load(q_ptr + row_offset[:, None] + channels[None, :], mask=cell, other=0.0)
    first_k = tl.where(fresh, tl.load(k_ptr + first, mask=fresh, other=0.0), old_k)
    first_v = tl.where(fresh, tl.load(v_ptr + first, mask=fresh, other=0.0), old_v)
    acc, sums, peak = _attend_tile(
        acc,
        sums,
        peak,
        q,
        first_k,
        first_v,
        begin + columns,
        position,
        scale_log2,
        window,
        WINDOW,
        PRECISION,
    )
    for start in range(begin + BLOCK_N, end, BLOCK_N):
        base, offsets = kv_tile(
            table_ptr, start, columns, end, stride_page, stride_token, BLOCK_N, PAGE_SIZE
        )
        inside = (start + columns < end)[:, None] & (channels < K)[None, :]
        tile = offsets[:, None] + channels[None, :]
        k = tl.load(k_ptr + base + tile, mask=inside, other=0.0)
        v = tl.load(v_ptr + base + tile, mask=inside, other=0.0)
        acc, sums, peak = _attend_tile(
            acc, sums, peak, q, k, v, start + columns, position, scale_log2, window, WINDOW, PRECISION
        )  # fmt: skip
    total = tl.sum(sums, axis=1)

    if num_splits == 1:
        out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(
            out_ptr + row_offset[:, None] + channels[None, :],
            out.to(out_ptr.dtype.element_ty),
            mask=cell,
        )
    if SPLITS > 1 and num_splits > 1:
        pair = sequence * G + kv_head
        part = pair * SPLITS + split
        tl.store(stats_ptr + part * (2 * ROWS) + rows, peak, mask=has_row)
        tl.store(stats_ptr + part * (2 * ROWS) + ROWS + rows, total, mask=has_row)
        partial = partial_ptr + part.to(tl.int64) * (ROWS * K)
        inner = rows[:, None] * K + channels[None, :]
        tl.store(partial + inner, acc, mask=cell)
        tl.debug_barrier()  # every thread's stores come before the release below
        arrived = tl.atomic_add(arrived_ptr + pair, 1, sem="acq_rel", scope="gpu")
        if arrived == num_splits - 1:
            tl.store(arrived_ptr + pair, 0)
            _merge(
                partial_ptr + pair.to(tl.int64) * (SPLITS * ROWS * K),
                stats_ptr + pair * (SPLITS * 2 * ROWS),
                out_ptr + q_start.to(tl.int64) * (G * GROUP * K) + kv_head * (GROUP * K),
                num_splits,
                q_len * GROUP,
                G,
                GROUP,
                K,
                ROWS,
                BLOCK_R,
                BLOCK_K,
                MERGE_UNROLL,
            )


@triton.jit
def _merge(
    partial_ptr,
    stats_ptr,
    out_ptr,
    num_splits,
    num_rows,
    G: tl.constexpr,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Write the output of one sequence and kv head from its splits.

    The scratch is reused by every layer, so a cached line may be stale: .cg reads it from L2, where
    the other programs wrote.
    """
    rows = tl.arange(0, BLOCK_R)
    channels = tl.arange(0, BLOCK_K)
    has_row = rows < num_rows
    cell = has_row[:, None] & (channels < K)[None, :]
    merged = tl.zeros([BLOCK_R, BLOCK_K], dtype=tl.float32)
    total = tl.zeros([BLOCK_R], dtype=tl.float32)
    peak = tl.full([BLOCK_R], -1e30, dtype=tl.float32)
    # Unrolled so that the loads of several splits are on their way together.
    for i in tl.range(0, num_splits, loop_unroll_factor=UNROLL):
        stats = stats_ptr + i * (2 * ROWS) + rows
        a = partial_ptr + i * (ROWS * K) + rows[:, None] * K + channels[None, :]
        m = tl.load(stats, mask=has_row, other=-1e30, cache_modifier=".cg")
        l = tl.load(stats + ROWS, mask=has_row, other=0.0, cache_modifier=".cg")
        a = tl.load(a, mask=cell, other=0.0, cache_modifier=".cg")
        new_peak = tl.maximum(peak, m)
        shrink = tl.exp2(peak - new_peak)
        weight = tl.exp2(m - new_peak)
        total = total * shrink + weight * l
        merged = merged * shrink[:, None] + weight[:, None] * a
        peak = new_peak
    out = merged / tl.where(total == 0.0, 1.0, total)[:, None]
    offset = (rows // GROUP * (G * GROUP) + rows % GROUP) * K
    tl.store(
        out_ptr + offset[:, None] + channels[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=cell,
    )


# Counters of the splits that have arrived, by device: zero except while a kernel runs. One stream
# at a time may use them.
_arrived: dict[torch.device, Tensor] = {}


def _arrival_counters(device: torch.device, num_pairs: int) -> Tensor:
    counters = _arrived.get(device)
    if counters is None or counters.numel() < num_pairs:
        # A captured allocation would be zeroed by the graph only, and live in the graph's pool.
        assert device.type != "cuda" or not torch.cuda.is_current_stream_capturing(), (
            "decode attention must run once at this batch size before a CUDA graph captures it"
        )
        counters = torch.zeros(max(num_pairs, 4096), dtype=torch.int32, device=device)
        _arrived[device] = counters
    return counters


def split_plan(num_pairs: int, num_sequences: int, max_tiles: int, sms: int) -> tuple[int, int]:
    """The number of splits, an upper bound the grid is made for, and how many programs to aim for.

    `num_pairs` is S * G, `max_tiles` the key tiles of the longest sequence the page table can hold.
    Neither depends on the lengths of the moment, which the kernel reads itself: a CUDA graph stays
    valid while the sequences grow.
    """
    target = sms if 2 * num_pairs <= sms else 4 * sms
    # One sequence is cut into equal shares. Of several, a long one may take more than its share.
    splits = sms // num_pairs if num_sequences == 1 else triton.cdiv(4 * sms, num_pairs)
    if max_tiles <= _UNSPLIT_TILES:
        return 1, target
    return max(1, min(splits, 64, max_tiles // _MIN_SPLIT_TILES)), target


def _blocks(rows: int, head_dim: int, dtype: torch.dtype) -> dict[str, Any]:
    """The constants that follow from the shape of a tile."""
    exact = dtype == torch.float32
    block_r, block_k = next_power_of_2(rows), max(next_power_of_2(head_dim), 16)
    small = exact or head_dim > 128 or rows > 32  # what registers and shared memory hold
    return {
        "ROWS": rows,
        "BLOCK_M": max(block_r, 16),
        "BLOCK_N": 32 if small else 64,
        "BLOCK_K": block_k,
        "BLOCK_R": block_r,
        "MERGE_UNROLL": max(min(4096 // (block_r * block_k), 8), 1),
        "UNSPLIT_TILES": _UNSPLIT_TILES,
        "MIN_SPLIT_TILES": _MIN_SPLIT_TILES,
        "PRECISION": "ieee" if exact else "tf32",
    }


def launch_short_decode_attention(
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
) -> Tensor:
    """Launch for the operands of `attention`, one or a few queries a sequence."""
    num_tokens, H, K = q.shape
    page_size, G = k_cache.shape[1:3]
    num_sequences = seq_lens.numel()
    rows = max_seqlen_q * (H // G)
    assert q.is_contiguous()
    assert k_cache.stride() == v_cache.stride()
    assert k_cache.stride()[2:] == (K, 1)
    assert page_table.dtype == seq_lens.dtype == cu_seqlens_q.dtype == torch.int32
    out = torch.empty_like(q)
    if num_tokens == 0 or num_sequences == 0:
        return out
    blocks = _blocks(rows, K, q.dtype)
    max_tiles = triton.cdiv(page_table.shape[1] * page_size, blocks["BLOCK_N"])
    num_pairs = num_sequences * G
    splits, target = split_plan(num_pairs, num_sequences, max_tiles, num_sms(q.device))
    scratch = num_pairs * splits if splits > 1 else 0
    launch(
        _short_decode_attention_kernel,
        (G, splits, num_sequences),
        q,
        k_cache,
        v_cache,
        out,
        torch.empty(scratch * rows * K, dtype=torch.float32, device=q.device),
        torch.empty(scratch * rows * 2, dtype=torch.float32, device=q.device),
        _arrival_counters(q.device, num_pairs),
        page_table,
        cu_seqlens_q,
        seq_lens,
        page_table.stride(0),
        k_cache.stride(0),
        k_cache.stride(1),
        scale * LOG2_E,
        0 if window is None else window,
        num_sequences,
        target,
        G=G,
        GROUP=H // G,
        K=K,
        PAGE_SIZE=page_size,
        SPLITS=splits,
        WINDOW=window is not None,
        BLOCK_S=next_power_of_2(num_sequences),
        **blocks,
        num_warps=4,
        num_stages=1 if q.dtype == torch.float32 else _NUM_STAGES,
    )
    return out


for _width, _group, _kv_heads, _page_size, _sequences, _splits, _window in (
    (64, 3, 3, 64, 1, 44, False),
    (96, 1, 32, 64, 1, 4, False),
    (128, 4, 8, 64, 1, 1, False),
    (128, 4, 8, 64, 8, 9, True),
    (128, 24, 1, 64, 1, 64, False),
    (256, 8, 2, 64, 1, 64, False),
):
    register_compile(
        _short_decode_attention_kernel,
        f"short_decode_attention_{_width}_group{_group}_page{_page_size}_batch{_sequences}_splits{_splits}"
        f"{'_window' if _window else ''}",
        {
            "q_ptr": "*bf16",
            "k_ptr": "*bf16",
            "v_ptr": "*bf16",
            "out_ptr": "*bf16",
            "partial_ptr": "*fp32",
            "stats_ptr": "*fp32",
            "arrived_ptr": "*i32",
            "table_ptr": "*i32",
            "cu_seqlens_q_ptr": "*i32",
            "seq_lens_ptr": "*i32",
            "table_stride": "i32",
            "stride_page": "i32:16",
            "stride_token": "i32:16",
            "scale_log2": "fp32",
            "window": "i32",
            "num_sequences": "i32",
            "target_programs": "i32",
        },
        {
            "G": _kv_heads,
            "GROUP": _group,
            "K": _width,
            "PAGE_SIZE": _page_size,
            "SPLITS": _splits,
            "WINDOW": _window,
            "BLOCK_S": next_power_of_2(_sequences),
            **_blocks(_group, _width, torch.bfloat16),
        },
        num_warps=4,
        num_stages=_NUM_STAGES,
    )
