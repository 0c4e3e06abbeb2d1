"""Attention of one query token, or a few, of each sequence over its pages (decode).

Decode reads every key and value once and computes little, so the keys of a sequence are split
between programs until the card is full (flash decoding, arXiv 2311.01282). The query heads that
share a key/value head, H / G of them, are the rows of one tile. Each program leaves its own output
o_i and s_i, the logarithm of its sum of 2^score; the last one to finish merges them:

    out = sum_i 2^(s_i - s) o_i / sum_i 2^(s_i - s),    s = max_i s_i

Merging in the last program needs no second kernel, and a short context, which one program handles,
needs no merge. Where there is much to merge it is done in two rounds: the last of each team of
splits merges its team, the last of the teams merges those.

With a `Projection` the kernel also does what `rope_and_cache` does to the one new token of each
sequence: every split norms, clips and rotates the queries itself, and the last one begins its softmax with the
new key and value, from registers, and writes them to the cache.

A short context is all latency, so what earlier steps wrote is read before the wait for the kernel in
front: lengths, page table, angles, and the last tile but for this step's own keys. That is safe
because the first kernel of a step, the embedding, starts only when everything before it has ended.

The specification is `attention.attention_reference`, after `rope.rope_and_cache_reference`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from hayate.kernels._triton import (
    cdiv,
    gdc_launch_dependents,
    gdc_wait,
    launch,
    num_sms,
    register_compile,
    tl,
    triton,
)
from hayate.kernels.decode_tuning import decode_tuning, length_block, tile_constants
from hayate.kernels.flash_attention import LOG2_E, kv_tile
from hayate.kernels.rope import head_angles, rotated_heads

if TYPE_CHECKING:
    from hayate.kernels.norm import Norm

MAX_DECODE_ROWS = 64  # query tokens times H / G: rows of a tile


class Projection(NamedTuple):
    """What is left to do to heads that come from the fused projection, (T, (H + 2G) * K).

    The names are those of `rope_and_cache`; norms are over each head, weight (K,).
    """

    slots: Tensor
    positions: Tensor
    cos_sin: Tensor
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    clip: float | None = None


@triton.jit
def _attend_tile(
    acc,  # (BLOCK_M, BLOCK_K) fp32, sum of p * v
    sums,  # (BLOCK_M, BLOCK_N) fp32, sum of p, spread over the columns
    peak,  # (BLOCK_M,) largest score so far, in units of log2
    q,
    k,
    v,
    visible,
    scale_log2,
    MASKED: tl.constexpr,  # else all keys are visible
    PRECISION: tl.constexpr,
):
    """Take one tile of keys and values into the running softmax."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
    if MASKED:
        scores = tl.where(visible, scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, axis=1))
    p = tl.exp2(scores - new_peak[:, None])
    shrink = tl.exp2(peak - new_peak)
    sums = sums * shrink[:, None] + p
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, sums, new_peak


@triton.jit
def _visible(j, position, window, WINDOW: tl.constexpr):
    """(BLOCK_M, BLOCK_N): whether the query at `position` sees key j."""
    visible = j[None, :] <= position[:, None]
    if WINDOW:
        visible &= j[None, :] > position[:, None] - window
    return visible


@triton.jit
def _result(acc, total, peak):
    """What a program leaves: weighted mean of the values, and log2 of the sum of all 2^score.

    total and peak (R, 1). Without a visible key 0 and, as it must be finite, -1e30.
    """
    some = tl.where(total == 0.0, 1.0, total)
    return acc / some, tl.where(total == 0.0, -1e30, peak + tl.log2(some))


@triton.jit
def _leave(partial_ptr, lse_ptr, part, out, lse, num_rows, K: tl.constexpr, ROWS: tl.constexpr,
           BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """Write partial result `part`, for another program to merge."""
    rows = tl.arange(0, BLOCK)[:, None]
    channels = tl.arange(0, BLOCK_K)[None, :]
    partial = partial_ptr + part.to(tl.int64) * (ROWS * K)
    tl.store(partial + rows * K + channels, out, mask=(rows < num_rows) & (channels < K))
    tl.store(lse_ptr + part * ROWS + rows, lse, mask=rows < num_rows)
    tl.debug_barrier()  # every thread's stores come before the release of `_arrives_last`


@triton.jit
def _arrives_last(counter_ptr, count):
    """Whether this program is the last of `count` to come here; the counter is zero again then."""
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == count - 1
    tl.store(counter_ptr, 0, mask=last)
    return last


@triton.jit
def _merge(partial_ptr, lse_ptr, first, count, num_rows, K: tl.constexpr, ROWS: tl.constexpr,
           TEAM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_I: tl.constexpr):  # fmt: skip
    """One result, (BLOCK_R, BLOCK_K) and (BLOCK_R, 1), of `count` <= TEAM partial ones in a row.

    The scratch is reused by every layer, so a cached line may be stale: .cg reads it from L2, where
    the other programs wrote.
    """
    rows = tl.arange(0, BLOCK_R)[None, :, None]
    channels = tl.arange(0, BLOCK_K)[None, None, :]
    acc = tl.zeros([BLOCK_R, BLOCK_K], dtype=tl.float32)
    total = tl.zeros([BLOCK_R, 1], dtype=tl.float32)
    peak = tl.full([BLOCK_R, 1], -1e30, dtype=tl.float32)
    for begin in range(0, TEAM, BLOCK_I):  # mostly once: all is on its way together
        i = begin + tl.arange(0, BLOCK_I)[:, None, None]
        some = (i < count) & (rows < num_rows)
        partial = partial_ptr + (first + i).to(tl.int64) * (ROWS * K) + rows * K + channels
        lse = tl.load(
            lse_ptr + (first + i) * ROWS + rows,
            mask=some,
            other=float("-inf"),
            cache_modifier=".cg",
        )
        out = tl.load(partial, mask=some & (channels < K), other=0.0, cache_modifier=".cg")
        new_peak = tl.maximum(peak, tl.max(lse, axis=0))
        weight = tl.exp2(lse - new_peak[None])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(weight, axis=0)
        acc = acc * shrink + tl.sum(weight * out, axis=0)
        peak = new_peak
    return _result(acc, total, peak)


@triton.jit
def _write(out_ptr, out, num_rows, G: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr,
           BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """The output of the first `num_rows` rows, heads of one group, token by token."""
    rows = tl.arange(0, BLOCK)[:, None]
    channels = tl.arange(0, BLOCK_K)[None, :]
    offset = (rows // GROUP * (G * GROUP) + rows % GROUP) * K
    mask = (rows < num_rows) & (channels < K)
    tl.store(out_ptr + offset + channels, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=[
        "table_stride",
        "window",
        "num_sequences",
        "splits",
        "teams",
        "target_programs",
    ]
)
def _decode_attention_kernel(
    q_ptr,  # (T, H, K), or with FUSED the projection (T, (H + 2G) * K)
    k_ptr,  # (P, B, G, K); with FUSED the slots of the new tokens are written
    v_ptr,
    out_ptr,  # (T, H, K), written
    partial_ptr,  # (S * G, splits and, if more than one, teams, ROWS, K) fp32, scratch
    lse_ptr,  # (..., ROWS) fp32, scratch
    arrived_ptr,  # (S * G * (teams + 1),) int32, zero before and after
    table_ptr,  # (S, P) int32
    cu_seqlens_q_ptr,  # (S + 1,) int32
    seq_lens_ptr,  # (S,) int32
    slots_ptr,  # (T,), from here on only with FUSED
    positions_ptr,  # (T,)
    cos_sin_ptr,  # (max_position, 2 * HALF) fp32
    q_weight_ptr,  # (K,)
    k_weight_ptr,
    q_eps,
    k_eps,
    clip,
    table_stride,
    stride_page,
    stride_token,
    scale_log2,
    window,
    num_sequences,
    splits,
    teams,
    target_programs,
    G: tl.constexpr,
    GROUP: tl.constexpr,  # H / G
    K: tl.constexpr,
    ROWS: tl.constexpr,  # GROUP * largest number of query tokens
    PAGE_SIZE: tl.constexpr,
    SPLIT: tl.constexpr,  # splits > 1
    TEAM: tl.constexpr,
    TEAMS: tl.constexpr,  # teams, rounded up to a power of two; 0 if there is only one
    UNSPLIT_SHARES: tl.constexpr,
    WINDOW: tl.constexpr,
    FUSED: tl.constexpr,
    HALF: tl.constexpr,  # rotary_dim / 2
    NORM: tl.constexpr,
    CLIP: tl.constexpr,
    GRAIN: tl.constexpr,  # a split has a multiple of so many keys
    BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,  # rows of the merge
    BLOCK_I: tl.constexpr,  # partial results it reads at once
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
    inside = (channels < K)[None, :]
    dtype: tl.constexpr = out_ptr.dtype.element_ty

    # Lengths, pages and the keys of earlier steps are read before the wait, see the head of the file.
    q_start = tl.load(cu_seqlens_q_ptr + sequence)
    q_len = tl.load(cu_seqlens_q_ptr + sequence + 1) - q_start
    kv_len = tl.load(seq_lens_ptr + sequence)
    first = 0
    if WINDOW:
        first = tl.maximum(kv_len - q_len - window + 1, 0) // GRAIN
    num_stored = kv_len  # keys in the cache once the wait is over
    if FUSED:
        num_stored -= q_len
    num_grains = tl.cdiv(num_stored, GRAIN) - first

    # Shares of equal length, so that all programs that have work end together.
    share = num_grains
    num_splits = 1
    if SPLIT:
        if num_grains > UNSPLIT_SHARES:
            share = tl.cdiv(num_grains, splits)
            if BLOCK_S > 1:
                others = tl.arange(0, BLOCK_S)
                lens = tl.load(seq_lens_ptr + others, mask=others < num_sequences, other=0)
                if WINDOW:
                    lens = tl.minimum(lens, window)
                all_grains = tl.sum(tl.cdiv(lens, GRAIN), axis=0) * G
                share = tl.maximum(share, tl.cdiv(all_grains, target_programs))
            num_splits = tl.cdiv(num_grains, share)
        if split >= num_splits:
            return  # without waiting: split 0 of all waits, so the kernel ends after the one before
    begin = (first + split * share) * GRAIN
    end = tl.minimum(begin + share * GRAIN, num_stored)
    # The last tile is held in registers; all tiles before it are whole.
    held = begin + (tl.maximum(tl.cdiv(end - begin, BLOCK_N), 1) - 1) * BLOCK_N

    table_ptr += sequence * table_stride
    k_ptr += kv_head * K
    v_ptr += kv_head * K
    held_base, held_offsets = kv_tile(
        table_ptr, held, columns, end, stride_page, stride_token, BLOCK_N, PAGE_SIZE
    )
    held_tile = held_base + held_offsets[:, None] + channels[None, :]
    exists = (held + columns < end)[:, None] & inside
    fresh = exists & (held + columns >= kv_len - q_len)[:, None]
    held_k = tl.load(k_ptr + held_tile, mask=exists & ~fresh, other=0.0)
    held_v = tl.load(v_ptr + held_tile, mask=exists & ~fresh, other=0.0)
    if FUSED:
        slot = tl.load(slots_ptr + q_start, mask=q_len > 0, other=-1).to(tl.int64)
        position = tl.load(positions_ptr + q_start, mask=q_len > 0, other=0).to(tl.int64)
        cos, sin = head_angles(cos_sin_ptr + position * (2 * HALF), channels[None, :], HALF)
    gdc_wait(PDL)

    acc = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
    # The sum stays spread over the columns until the end: one reduction instead of one a tile.
    sums = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    # Finite, so that a row without a visible key so far gives exp2(-inf - peak) = 0, not NaN.
    peak = tl.full([BLOCK_M], -1e30, dtype=tl.float32)
    cell = (rows < q_len * GROUP)[:, None] & inside
    if FUSED:
        heads = q_ptr + q_start.to(tl.int64) * ((G * GROUP + 2 * G) * K)
        q = rotated_heads(
            heads + (kv_head * GROUP + rows)[:, None] * K, channels[None, :], cell, cos, sin,
            q_weight_ptr, q_eps, clip, K, HALF, NORM, CLIP,
        ).to(dtype)  # fmt: skip
        # The new key and value are the only row of tiles like that of the queries, which gives them
        # the same layout.
        heads += (G * GROUP + kv_head) * K
        has_new = (q_len > 0) & (split == num_splits - 1)
        row = tl.arange(0, 8)[:, None]
        is_new = inside & has_new & (row == 0)
        new_k = rotated_heads(
            heads + row * 0, channels[None, :], is_new, cos, sin,
            k_weight_ptr, k_eps, clip, K, HALF, NORM, CLIP,
        )  # fmt: skip
        new_v = tl.load(heads + G * K + row * 0 + channels[None, :], mask=is_new, other=0.0)
        new_v = new_v.to(tl.float32)
        if CLIP:
            new_v = tl.minimum(tl.maximum(new_v, -clip), clip)
        to = slot // PAGE_SIZE * stride_page + slot % PAGE_SIZE * stride_token + channels[None, :]
        tl.store(k_ptr + row * 0 + to, new_k.to(dtype), mask=is_new & (slot >= 0))
        tl.store(v_ptr + row * 0 + to, new_v.to(dtype), mask=is_new & (slot >= 0))
        has_new &= kv_len > 0
        new_k = tl.sum(new_k, axis=0)[None, :].to(dtype).to(tl.float32)
        new_v = tl.sum(new_v, axis=0)[None, :].to(dtype).to(tl.float32)
        score = tl.sum(q.to(tl.float32) * new_k, axis=1) * scale_log2
        peak = tl.where(has_new, score, peak)
        acc += tl.where(has_new, new_v, 0.0)
        sums += tl.where(has_new & (columns == 0), 1.0, 0.0)[None, :]
    else:
        token = q_start + rows // GROUP
        row_head = (token.to(tl.int64) * (G * GROUP) + kv_head * GROUP + rows % GROUP)[:, None]
        q = tl.load(q_ptr + row_head * K + channels[None, :], mask=cell, other=0.0)
        held_k = tl.where(fresh, tl.load(k_ptr + held_tile, mask=fresh, other=0.0), held_k)
        held_v = tl.where(fresh, tl.load(v_ptr + held_tile, mask=fresh, other=0.0), held_v)

    query = kv_len - q_len + rows // GROUP
    visible = _visible(held + columns, query, window, WINDOW) & (held + columns < end)[None, :]
    acc, sums, peak = _attend_tile(
        acc, sums, peak, q, held_k, held_v, visible, scale_log2, True, PRECISION
    )
    for start in range(begin, held, BLOCK_N):
        base, offsets = kv_tile(
            table_ptr, start, columns, held, stride_page, stride_token, BLOCK_N, PAGE_SIZE
        )
        tile = offsets[:, None] + channels[None, :]
        k = tl.load(k_ptr + base + tile, mask=inside, other=0.0)
        v = tl.load(v_ptr + base + tile, mask=inside, other=0.0)
        visible = _visible(start + columns, query, window, WINDOW)
        acc, sums, peak = _attend_tile(
            acc, sums, peak, q, k, v, visible, scale_log2, WINDOW or ROWS > GROUP, PRECISION
        )
    out, lse = _result(acc, tl.sum(sums, axis=1)[:, None], peak[:, None])

    num_rows = q_len * GROUP
    out_ptr += q_start.to(tl.int64) * (G * GROUP * K) + kv_head * (GROUP * K)
    if num_splits == 1:
        _write(out_ptr, out, num_rows, G, GROUP, K, BLOCK_M, BLOCK_K)
    else:
        pair = sequence * G + kv_head
        parts = pair * (splits + teams)
        team = split // TEAM
        team_size = tl.minimum(num_splits - team * TEAM, TEAM)
        counters = arrived_ptr + pair * (teams + 1)
        _leave(partial_ptr, lse_ptr, parts + split, out, lse, num_rows, K, ROWS, BLOCK_M, BLOCK_K)
        if _arrives_last(counters + team, team_size):
            merged, weight = _merge(
                partial_ptr, lse_ptr, parts + team * TEAM, team_size, num_rows,
                K, ROWS, TEAM, BLOCK_R, BLOCK_K, BLOCK_I,
            )  # fmt: skip
            num_teams = 1
            if TEAMS != 0:
                num_teams = tl.cdiv(num_splits, TEAM)
            if num_teams == 1:
                _write(out_ptr, merged, num_rows, G, GROUP, K, BLOCK_R, BLOCK_K)
            else:
                parts += splits
                _leave(
                    partial_ptr, lse_ptr, parts + team, merged, weight, num_rows,
                    K, ROWS, BLOCK_R, BLOCK_K,
                )  # fmt: skip
                if _arrives_last(counters + teams, num_teams):
                    merged, weight = _merge(
                        partial_ptr, lse_ptr, parts, num_teams, num_rows,
                        K, ROWS, TEAMS, BLOCK_R, BLOCK_K, BLOCK_I,
                    )  # fmt: skip
                    _write(out_ptr, merged, num_rows, G, GROUP, K, BLOCK_R, BLOCK_K)


# Counters of the splits that have arrived, by device: zero except while a kernel runs. One stream
# at a time may use them. Made once, large enough, as graphs that were captured with them keep them.
_arrived: dict[torch.device, Tensor] = {}


def _arrival_counters(device: torch.device, num_counters: int) -> Tensor:
    counters = _arrived.get(device)
    if counters is None or counters.numel() < num_counters:
        # A captured allocation would be zeroed by the graph only, and live in the graph's pool.
        assert device.type != "cuda" or not torch.cuda.is_current_stream_capturing(), (
            "decode attention must run once at this batch size before a CUDA graph captures it"
        )
        counters = torch.zeros(max(num_counters, 1 << 17), dtype=torch.int32, device=device)
        _arrived[device] = counters
    return counters


def _decode_attention_triton(
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
    projection: Projection | None = None,
    out: Tensor | None = None,
    **overrides: Any,
) -> Tensor:
    """Launch; q (T, H, K), or with `projection` (T, (H + 2G) * K) and one query a sequence.

    Writes the first cu_seqlens_q[-1] rows of `out`, by default a new tensor. `overrides` replace
    fields of the `Tuning`, for measurements and tests.
    """
    page_size, G, K = k_cache.shape[1:]
    H = q.shape[1] if projection is None else q.shape[1] // K - 2 * G
    num_sequences, rows = seq_lens.numel(), max_seqlen_q * (H // G)
    assert q.is_contiguous()
    assert rows <= MAX_DECODE_ROWS
    assert projection is None or max_seqlen_q == 1
    assert k_cache.stride() == v_cache.stride()
    assert k_cache.stride()[2:] == (K, 1)
    assert page_table.dtype == seq_lens.dtype == cu_seqlens_q.dtype == torch.int32
    if out is None:
        out = q.new_empty(q.shape[0], H, K)
    assert out.is_contiguous()
    if q.shape[0] == 0 or num_sequences == 0:
        return out
    max_len = page_table.shape[1] * page_size
    tuning = decode_tuning(num_sequences, G, rows, K, q.dtype, max_len, num_sms(q.device))
    tuning = tuning._replace(**overrides)
    constants = tile_constants(tuning, rows, K, page_size, q.dtype)
    teams = cdiv(tuning.splits, constants["TEAM"]) if constants["TEAMS"] else 0
    num_pairs = num_sequences * G
    scratch = num_pairs * (tuning.splits + teams) * rows if tuning.splits > 1 else 0
    launch(
        _decode_attention_kernel,
        (G, tuning.splits, num_sequences),
        q,
        k_cache,
        v_cache,
        out,
        torch.empty(scratch * K, dtype=torch.float32, device=q.device),
        torch.empty(scratch, dtype=torch.float32, device=q.device),
        _arrival_counters(q.device, num_pairs * (teams + 1)),
        page_table,
        cu_seqlens_q,
        seq_lens,
        *_projection_arguments(projection, seq_lens),
        page_table.stride(0),
        k_cache.stride(0),
        k_cache.stride(1),
        scale * LOG2_E,
        0 if window is None else window,
        num_sequences,
        tuning.splits,
        teams,
        tuning.target,
        G=G,
        GROUP=H // G,
        WINDOW=window is not None,
        BLOCK_S=length_block(num_sequences),
        **_projection_constants(projection),
        **constants,
        num_warps=tuning.num_warps,
        num_stages=tuning.num_stages,
    )
    return out


def _projection_arguments(projection: Projection | None, unused: Tensor) -> tuple[Any, ...]:
    """slots, positions, cos_sin, weights and eps of the norms, clip; `unused` where there is none."""
    if projection is None:
        return (unused,) * 5 + (0.0,) * 3
    p = projection
    weights, eps = (p.cos_sin, p.cos_sin), (0.0, 0.0)
    if p.q_norm is not None and p.k_norm is not None:
        weights, eps = (p.q_norm.weight, p.k_norm.weight), (p.q_norm.eps, p.k_norm.eps)
    return (p.slots, p.positions, p.cos_sin, *weights, *eps, 0.0 if p.clip is None else p.clip)


def _projection_constants(projection: Projection | None) -> dict[str, Any]:
    if projection is None:
        return {"FUSED": False, "HALF": 0, "NORM": False, "CLIP": False}
    return {
        "FUSED": True,
        "HALF": projection.cos_sin.shape[1] // 2,
        "NORM": projection.q_norm is not None,
        "CLIP": projection.clip is not None,
    }


_SIGNATURE = (
    {f"{n}_ptr": "*bf16" for n in ("q", "k", "v", "out", "q_weight", "k_weight")}
    | {f"{n}_ptr": "*fp32" for n in ("partial", "lse", "cos_sin")}
    | {f"{n}_ptr": "*i32" for n in ("arrived", "table", "cu_seqlens_q", "seq_lens")}
    | {f"{n}_ptr": "*i64" for n in ("slots", "positions")}
    | dict.fromkeys(("q_eps", "k_eps", "clip", "scale_log2"), "fp32")
    | dict.fromkeys(("stride_page", "stride_token"), "i32:16")
    | dict.fromkeys(("table_stride", "window", "num_sequences"), "i32")
    | dict.fromkeys(("splits", "teams", "target_programs"), "i32")
)

# (K, H / G, G, page size, sequences, longest, window, projection: rotary channels, norm and clip)
for _width, _group, _kv_heads, _page_size, _sequences, _longest, _window, _rotary, _norm in (
    (64, 3, 3, 64, 1, 8192, False, 64, False),
    (96, 1, 32, 64, 1, 8192, False, 0, False),
    (128, 1, 16, 64, 1, 8192, False, 128, True),
    (128, 4, 8, 64, 1, 40_000, False, 128, False),
    (128, 3, 8, 64, 1, 40_000, False, 64, False),
    (128, 4, 8, 64, 64, 40_000, False, 128, False),
    (128, 4, 8, 64, 256, 2048, False, 128, False),
    (128, 4, 8, 64, 8, 40_000, True, 0, False),
    (128, 4, 8, 16, 1, 8192, False, 0, False),
    (128, 24, 1, 64, 1, 40_000, False, 128, False),
    (128, 48, 1, 64, 1, 40_000, False, 0, False),
    (256, 8, 2, 64, 1, 40_000, False, 256, True),
):
    _tuning = decode_tuning(
        _sequences,
        _kv_heads,
        _group,
        _width,
        torch.bfloat16,
        _longest,
        num_sms(torch.device("cpu")),
    )
    register_compile(
        _decode_attention_kernel,
        f"decode_attention_{_width}_group{_group}_page{_page_size}_batch{_sequences}_{_longest}"
        f"{'_window' if _window else ''}{f'_rotary{_rotary}' if _rotary else ''}"
        f"{'_norm' if _norm else ''}",
        _SIGNATURE,
        {
            "G": _kv_heads,
            "GROUP": _group,
            "WINDOW": _window,
            "FUSED": _rotary > 0,
            "HALF": _rotary // 2,
            "NORM": _norm,
            "CLIP": _norm,
            "BLOCK_S": length_block(_sequences),
            **tile_constants(_tuning, _group, _width, _page_size, torch.bfloat16),
        },
        num_warps=_tuning.num_warps,
        num_stages=_tuning.num_stages,
    )
