"""The kernels of `sampling.sample`: thresholds by radix search, then one draw.

Every filter keeps the tokens up to some distance d = max - logit behind the best one, so a filter
is a threshold on the 28-bit integer q = floor(d * 2^j). j is chosen for each row so that 2^28
covers its logits, or 28 times its temperature if that is less (tokens farther away weigh less than
2^-40 and are never drawn). Multiplying by a power of two is exact: only tokens closer to each other
than 2^-28 of that range share a q without being equal.

Weights are int64 in units of 2^-40. Their sums do not depend on the order of adding, so the atomics
are reproducible.

    scan     (row, block): maximum, its index, minimum
    begin    (row): merges them, settles greedy rows, says what is to be searched
    coarse   (row, block): counts of the top 7 bits of q, and the sum of all weights
    refine   (row, block): counts and weights of 2048 finer bins; launched five times
    draw     (row, block): the weight kept in a block; the last one picks the token

All but `begin` read the logits once. In coarse, refine and draw the last program of a row to finish
decides for the row. Top-k needs at most two refinements; top-p three, as the coarse counts only
bound the weights from both sides; mostly one is enough. A row with nothing to search leaves these
kernels at once.
"""

from __future__ import annotations

from typing import NamedTuple

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

__all__ = ["TILE", "Scan", "sample_triton", "scan", "tiles_per_program"]

_Q_BITS = tl.constexpr(28)
# The largest q; a multiple of 16, which fp32 holds exactly.
_Q_MAX = tl.constexpr((1 << 28) - 16)
_COARSE_BINS = tl.constexpr(128)
_COARSE_SHIFT = tl.constexpr(28 - 7)
_FINE_BINS = tl.constexpr(2048)
_FINE_BITS = tl.constexpr(11)
_UNIT = tl.constexpr(float(1 << 40))  # the weight of the best token
_REACH = tl.constexpr(28.0)  # exp(-28) < 2^-40
_REFINEMENTS = 5

# Logits a program holds at a time: 16 bytes a lane of bf16, with the 4 warps all kernels here have.
TILE = 1024

# What is left to do in a row.
_SETTLED = tl.constexpr(0)
_DRAW = tl.constexpr(1)
_TOP_K = tl.constexpr(2)
_TOP_P = tl.constexpr(3)

# Columns of the int64 state of a row.
_TASK = tl.constexpr(0)
_LOW = tl.constexpr(1)  # the searched range of q starts here
_SHIFT = tl.constexpr(2)  # and is cut into bins of 2^shift
_THRESHOLD = tl.constexpr(3)  # the largest q kept, so far
_TARGET = tl.constexpr(4)  # the weight that top-p must reach
_TOTAL = tl.constexpr(5)  # the weight of all tokens
_COUNT_AHEAD = tl.constexpr(6)  # tokens with q < low
_WEIGHT_AHEAD = tl.constexpr(7)  # and their weight
_COLUMNS = tl.constexpr(8)


class Scan(NamedTuple):
    """What one pass finds in each block of a row (what one program reads), all (S, blocks)."""

    top: Tensor  # fp32, NaN if the block holds one
    token: Tensor  # int32, the first with that logit
    bottom: Tensor  # fp32, the smallest finite logit, or infinity


@triton.jit
def _load_logits(logits_ptr, i, V):
    return tl.load(logits_ptr + i, mask=i < V, other=float("-inf"))


@triton.jit
def _scan_kernel(
    logits_ptr,
    logits_stride,
    top_ptr,
    token_ptr,
    bottom_ptr,
    V,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    PDL: tl.constexpr,
):
    gdc_launch_dependents(PDL)
    block, row = tl.program_id(0), tl.program_id(1)
    i = block * (TILES * TILE) + tl.arange(0, TILE)
    logits_ptr += row.to(tl.int64) * logits_stride
    gdc_wait(PDL)
    # Each lane keeps its own extremes; a later logit only replaces a smaller one.
    top = tl.full((TILE,), float("-inf"), tl.float32)
    bottom = tl.full((TILE,), float("inf"), tl.float32)
    nans = tl.zeros((TILE,), tl.int32)
    token = i
    loaded = _load_logits(logits_ptr, i, V)
    for _tile in range(TILES):
        x = loaded.to(tl.float32)
        loaded = _load_logits(logits_ptr, i + TILE, V)  # on its way while x is used
        nans |= (x != x).to(tl.int32)
        token = tl.where(x > top, i, token)
        top = tl.where(x > top, x, top)
        bottom = tl.where((x < bottom) & (x > float("-inf")), x, bottom)
        i += TILE
    best = tl.max(top, axis=0)
    out = row * tl.num_programs(0) + block
    tl.store(top_ptr + out, tl.where(tl.max(nans, axis=0) > 0, float("nan"), best))
    tl.store(token_ptr + out, tl.min(tl.where(top == best, token, 2147483647), axis=0))
    tl.store(bottom_ptr + out, tl.min(bottom, axis=0))


@triton.jit
def _power_of_two(exponent):
    """2^exponent as fp32, exponent in [-126, 127]."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _begin_kernel(
    top_ptr,
    token_ptr,
    bottom_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    tokens_ptr,
    best_ptr,  # (S,) fp32, the row's maximum
    scale_ptr,  # (S,) fp32, 2^j
    state_ptr,
    arrived_ptr,  # (S,) int32
    coarse_ptr,
    fine_ptr,
    V,
    NUM_BLOCKS: tl.constexpr,
    BLOCKS: tl.constexpr,
    PDL: tl.constexpr,
):
    gdc_launch_dependents(PDL)
    row = tl.program_id(0)
    block = tl.arange(0, BLOCKS)
    inside = block < NUM_BLOCKS
    at = row * NUM_BLOCKS + block
    gdc_wait(PDL)
    tops = tl.load(top_ptr + at, mask=inside, other=float("-inf"))
    candidates = tl.load(token_ptr + at, mask=inside, other=2147483647)
    bottoms = tl.load(bottom_ptr + at, mask=inside, other=float("inf"))
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)

    has_nan = tl.max((tops != tops).to(tl.int32), axis=0) > 0
    best = tl.max(tl.where(tops == tops, tops, float("-inf")), axis=0)
    token = tl.min(tl.where(tops == best, candidates, 2147483647), axis=0).to(tl.int64)
    sound = (best < float("inf")) & (best > float("-inf")) & (has_nan == 0)
    tl.store(tokens_ptr + row, tl.where(sound, token, -1))

    # The smallest power of two that is at least the range. From 2^-90 on, 2^j is a normal number.
    width = tl.minimum(best - tl.min(bottoms, axis=0), temperature * _REACH)
    bits = width.to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - 127 + ((bits & 0x7FFFFF) != 0).to(tl.int32)
    exponent = tl.minimum(tl.maximum(exponent, -90), 127)
    tl.store(best_ptr + row, best)
    tl.store(scale_ptr + row, _power_of_two(-exponent + _Q_BITS))

    task = tl.where((top_k > 0) & (top_k < V), _TOP_K, tl.where(top_p < 1.0, _TOP_P, _DRAW))
    # Below 1e-30 dividing by the temperature overflows, and only the maximum has any weight.
    task = tl.where(sound & (temperature > 1e-30), task, _SETTLED)
    column = tl.arange(0, _COLUMNS)
    state = tl.where(column == _TASK, task, tl.where(column == _THRESHOLD, _Q_MAX, 0))
    tl.store(state_ptr + row * _COLUMNS + column, state.to(tl.int64))
    tl.store(arrived_ptr + row, 0)
    if task >= _TOP_K:
        coarse = tl.arange(0, _COARSE_BINS)
        fine = tl.arange(0, 2 * _FINE_BINS)
        tl.store(coarse_ptr + row * _COARSE_BINS + coarse, tl.zeros_like(coarse))
        tl.store(fine_ptr + row * 2 * _FINE_BINS + fine, tl.zeros_like(fine).to(tl.int64))


@triton.jit
def _weigh(x, best, scale, temperature):
    """q of logits x, their weight in [0, 1], and in integer units."""
    behind = best - x.to(tl.float32)
    q = tl.minimum(behind * scale, _Q_MAX * 1.0).to(tl.int32)
    weight = tl.exp(-(behind / temperature))
    return q, weight, (weight * _UNIT).to(tl.int64)


@triton.jit
def _is_last(arrived_ptr, row):
    """True in the last of the row's programs to come here; it sees what the others wrote."""
    tl.debug_barrier()  # all threads of this program have done their atomics
    return tl.atomic_add(arrived_ptr + row, 1) == tl.num_programs(0) - 1


@triton.jit
def _start_top_p(state_ptr, coarse_ptr, kept, total, top_p, temperature, scale):
    """Set the task to top-p with the coarse bins that can hold its threshold.

    The weight of a coarse bin lies between its count times the weights at its two edges. `kept` is
    the weight that top-k kept, `total` that of all tokens, for bounds from the far end (total minus
    the tail), which are the tighter ones for a large top_p.
    """
    BINS: tl.constexpr = _COARSE_BINS
    target = tl.maximum(tl.ceil(top_p.to(tl.float64) * kept.to(tl.float64)).to(tl.int64), 1)
    i = tl.arange(0, BINS)
    count = tl.load(coarse_ptr + i, cache_modifier=".cg").to(tl.float32)
    after = tl.load(coarse_ptr + i + 1, mask=i < BINS - 1, other=0, cache_modifier=".cg")
    after = after.to(tl.float32)
    # The margins cover fp32: 1e-5 for exp and as much for a sum; and one unit for rounding down.
    step = (2097152.0 / scale) / temperature  # from edge to edge, in the exponent
    edge = tl.exp(-(i * step)) * _UNIT
    next_edge = tl.exp(-((i + 1) * step)) * _UNIT
    far_edge = tl.exp(-((i + 2) * step)) * _UNIT
    # The last bin also holds everything farther away.
    next_edge_least = tl.where(i == BINS - 1, 0.0, tl.maximum(next_edge * 0.99996 - 1.0, 0.0))
    far_edge_least = tl.where(i >= BINS - 2, 0.0, tl.maximum(far_edge * 0.99996 - 1.0, 0.0))
    tail_most = tl.cumsum(after * (next_edge * 1.00004 + 1.0), axis=0, reverse=True)
    tail_least = tl.cumsum(after * far_edge_least, axis=0, reverse=True)
    all_weight = total.to(tl.float32)
    most = tl.cumsum(count * (edge * 1.00004 + 1.0), axis=0)
    most = tl.minimum(most, all_weight * 1.00002 - tail_least)
    least = tl.cumsum(count * next_edge_least, axis=0)
    least = tl.maximum(least, all_weight * 0.99998 - tail_most)
    goal = target.to(tl.float32)
    first = tl.minimum(tl.sum((most < goal).to(tl.int32), axis=0), BINS - 1)
    last = tl.minimum(tl.sum((least < goal).to(tl.int32), axis=0), BINS - 1)
    extra = last - first  # bins beyond one; the shift grows by the bits it takes to cover them
    more = (extra > 0).to(tl.int32) + (extra > 1) + (extra > 3) + (extra > 7)
    more += (extra > 15).to(tl.int32) + (extra > 31) + (extra > 63)
    tl.store(state_ptr + _TARGET, target)
    tl.store(state_ptr + _LOW, first.to(tl.int64) << _COARSE_SHIFT)
    tl.store(state_ptr + _SHIFT, more.to(tl.int64) + (_COARSE_SHIFT - _FINE_BITS))
    tl.store(state_ptr + _TASK, _TOP_P)


@triton.jit
def _coarse_kernel(
    logits_ptr,
    logits_stride,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    best_ptr,
    scale_ptr,
    state_ptr,
    arrived_ptr,
    coarse_ptr,
    V,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    PDL: tl.constexpr,
):
    gdc_launch_dependents(PDL)
    row = tl.program_id(1)
    i = tl.program_id(0) * (TILES * TILE) + tl.arange(0, TILE)
    logits_ptr += row.to(tl.int64) * logits_stride
    state_ptr += row * _COLUMNS
    coarse_ptr += row * _COARSE_BINS
    gdc_wait(PDL)
    task = tl.load(state_ptr + _TASK)
    if task < _TOP_K:
        return
    best, scale = tl.load(best_ptr + row), tl.load(scale_ptr + row)
    temperature, top_p = tl.load(temperature_ptr + row), tl.load(top_p_ptr + row)
    BINS: tl.constexpr = _COARSE_BINS
    bins = tl.arange(0, BINS)
    count = tl.zeros((BINS,), tl.int32)
    weights = tl.zeros((TILE,), tl.int64)
    loaded = _load_logits(logits_ptr, i, V)
    for _tile in range(TILES):
        q, _share, weight = _weigh(loaded, best, scale, temperature)
        loaded = _load_logits(logits_ptr, i + TILE, V)
        count += tl.histogram(q >> _COARSE_SHIFT, BINS, mask=i < V)
        weights += weight
        i += TILE
    tl.atomic_add(coarse_ptr + bins, count, mask=count > 0, sem="relaxed")
    tl.atomic_add(state_ptr + _TOTAL, tl.sum(weights, axis=0), sem="relaxed")
    if _is_last(arrived_ptr, row):
        tl.store(arrived_ptr + row, 0)
        if task == _TOP_K:
            count = tl.load(coarse_ptr + bins, cache_modifier=".cg")
            ahead = tl.cumsum(count, axis=0) < tl.load(top_k_ptr + row)
            low = tl.sum(ahead.to(tl.int64), axis=0) << _COARSE_SHIFT
            tl.store(state_ptr + _LOW, low)
            tl.store(state_ptr + _SHIFT, _COARSE_SHIFT - _FINE_BITS)
        else:
            total = tl.load(state_ptr + _TOTAL, cache_modifier=".cg")
            _start_top_p(state_ptr, coarse_ptr, total, total, top_p, temperature, scale)


@triton.jit
def _refine_kernel(
    logits_ptr,
    logits_stride,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    best_ptr,
    scale_ptr,
    state_ptr,
    arrived_ptr,
    coarse_ptr,
    fine_ptr,
    V,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    PDL: tl.constexpr,
):
    gdc_launch_dependents(PDL)
    row = tl.program_id(1)
    i = tl.program_id(0) * (TILES * TILE) + tl.arange(0, TILE)
    logits_ptr += row.to(tl.int64) * logits_stride
    state_ptr += row * _COLUMNS
    fine_ptr += row * 2 * _FINE_BINS
    gdc_wait(PDL)
    task = tl.load(state_ptr + _TASK)
    if task < _TOP_K:
        return
    BINS: tl.constexpr = _FINE_BINS
    best, scale = tl.load(best_ptr + row), tl.load(scale_ptr + row)
    temperature, top_p = tl.load(temperature_ptr + row), tl.load(top_p_ptr + row)
    low = tl.load(state_ptr + _LOW)
    shift = tl.load(state_ptr + _SHIFT)
    counts = tl.zeros((TILE,), tl.int32)
    weights = tl.zeros((TILE,), tl.int64)
    loaded = _load_logits(logits_ptr, i, V)
    for _tile in range(TILES):
        q, _share, weight = _weigh(loaded, best, scale, temperature)
        loaded = _load_logits(logits_ptr, i + TILE, V)
        offset = q - low.to(tl.int32)
        place = offset >> shift.to(tl.int32)
        within = (offset >= 0) & (place < BINS) & (i < V)
        tl.atomic_add(fine_ptr + 2 * place, 1, mask=within, sem="relaxed")
        tl.atomic_add(fine_ptr + 2 * place + 1, weight, mask=within, sem="relaxed")
        counts += (offset < 0).to(tl.int32)
        weights += tl.where(offset < 0, weight, 0)
        i += TILE
    count_ahead = tl.sum(counts, axis=0).to(tl.int64)
    weight_ahead = tl.sum(weights, axis=0)
    tl.atomic_add(state_ptr + _COUNT_AHEAD, count_ahead, mask=count_ahead > 0, sem="relaxed")
    tl.atomic_add(state_ptr + _WEIGHT_AHEAD, weight_ahead, mask=count_ahead > 0, sem="relaxed")
    if _is_last(arrived_ptr, row):
        tl.store(arrived_ptr + row, 0)
        count_ahead = tl.load(state_ptr + _COUNT_AHEAD, cache_modifier=".cg")
        weight_ahead = tl.load(state_ptr + _WEIGHT_AHEAD, cache_modifier=".cg")
        if task == _TOP_K:
            needed = tl.load(top_k_ptr + row) - count_ahead
            column = 0
        else:
            needed = tl.load(state_ptr + _TARGET) - weight_ahead
            column = 1
        bins = tl.arange(0, BINS)
        amount = tl.load(fine_ptr + 2 * bins + column, cache_modifier=".cg")
        bin = tl.sum((tl.cumsum(amount, axis=0) < needed).to(tl.int32), axis=0)
        bin = tl.minimum(bin, BINS - 1)
        low += bin.to(tl.int64) << shift
        # A bin of one value of q, or with one token in it, is kept whole: nothing to cut further.
        if (shift == 0) | (tl.load(fine_ptr + 2 * bin, cache_modifier=".cg") == 1):
            tl.store(state_ptr + _THRESHOLD, low + (1 << shift) - 1)
            if (task == _TOP_K) & (top_p < 1.0):
                amount = tl.load(fine_ptr + 2 * bins + 1, cache_modifier=".cg")
                kept = weight_ahead + tl.sum(tl.where(bins <= bin, amount, 0), axis=0)
                total = tl.load(state_ptr + _TOTAL)
                coarse_ptr += row * _COARSE_BINS
                _start_top_p(state_ptr, coarse_ptr, kept, total, top_p, temperature, scale)
            else:
                tl.store(state_ptr + _TASK, _DRAW)
        else:
            tl.store(state_ptr + _LOW, low)
            tl.store(state_ptr + _SHIFT, tl.maximum(shift - _FINE_BITS, 0))
        tl.debug_barrier()  # all lanes have read the bins: clear them for the next refinement
        tl.store(fine_ptr + tl.arange(0, 2 * BINS), tl.zeros((2 * BINS,), tl.int64))
        tl.store(state_ptr + _COUNT_AHEAD, 0)
        tl.store(state_ptr + _WEIGHT_AHEAD, 0)


@triton.jit
def _draw_kernel(
    logits_ptr,
    logits_stride,
    temperature_ptr,
    min_p_ptr,
    seeds_ptr,
    steps_ptr,
    sample_indices_ptr,  # None is all zeros
    best_ptr,
    scale_ptr,
    state_ptr,
    arrived_ptr,
    kept_ptr,  # (S, NUM_BLOCKS) int64
    tokens_ptr,
    V,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCKS: tl.constexpr,
    PDL: tl.constexpr,
):
    gdc_launch_dependents(PDL)
    block, row = tl.program_id(0), tl.program_id(1)
    i = tl.arange(0, TILE)
    first = block * (TILES * TILE)
    logits_ptr += row.to(tl.int64) * logits_stride
    state_ptr += row * _COLUMNS
    kept_ptr += row * NUM_BLOCKS
    gdc_wait(PDL)
    if tl.load(state_ptr + _TASK) == _SETTLED:
        return
    best, scale = tl.load(best_ptr + row), tl.load(scale_ptr + row)
    temperature, min_p = tl.load(temperature_ptr + row), tl.load(min_p_ptr + row)
    threshold = tl.load(state_ptr + _THRESHOLD)
    total = tl.zeros((TILE,), tl.int64)
    loaded = _load_logits(logits_ptr, first + i, V)
    for _tile in range(TILES):
        q, share, weight = _weigh(loaded, best, scale, temperature)
        first += TILE
        loaded = _load_logits(logits_ptr, first + i, V)
        total += tl.where((q <= threshold) & (share >= min_p), weight, 0)
    tl.store(kept_ptr + block, tl.sum(total, axis=0))
    if _is_last(arrived_ptr, row):
        blocks = tl.arange(0, BLOCKS)
        kept = tl.load(kept_ptr + blocks, mask=blocks < NUM_BLOCKS, other=0, cache_modifier=".cg")
        all_kept = tl.sum(kept, axis=0)
        index = 0
        if sample_indices_ptr is not None:
            index = tl.load(sample_indices_ptr + row).to(tl.int32)
        step = tl.load(steps_ptr + row).to(tl.int32)
        word, _w1, _w2, _w3 = tl.philox(tl.load(seeds_ptr + row), step, index, 0, 0)
        # floor(u * all_kept) with u = (word >> 8) / 2^24, in two halves that fit 64 bits
        numerator = (word >> 8).to(tl.int64)
        goal = numerator * (all_kept >> 24) + ((numerator * (all_kept & 0xFFFFFF)) >> 24)
        cumulative = tl.cumsum(kept, axis=0)
        drawn = tl.minimum(tl.sum((cumulative <= goal).to(tl.int32), axis=0), NUM_BLOCKS - 1)
        goal -= tl.sum(tl.where(blocks < drawn, kept, 0), axis=0)
        first = drawn * (TILES * TILE)
        token = first
        for _tile in range(TILES):
            x = _load_logits(logits_ptr, first + i, V)
            q, share, weight = _weigh(x, best, scale, temperature)
            weight = tl.where((q <= threshold) & (share >= min_p), weight, 0)
            token += tl.sum((tl.cumsum(weight, axis=0) <= goal).to(tl.int32), axis=0)
            # Past the tile that holds the token the goal is negative and nothing is counted.
            goal -= tl.sum(weight, axis=0)
            first += TILE
        tl.store(tokens_ptr + row, tl.minimum(token, V - 1).to(tl.int64), mask=all_kept > 0)


_OPTIONS = {"temperature_ptr": "*fp32", "top_k_ptr": "*i32", "top_p_ptr": "*fp32"}
_ROW = {"best_ptr": "*fp32", "scale_ptr": "*fp32", "state_ptr": "*i64", "arrived_ptr": "*i32"}
_BINS = {"coarse_ptr": "*i32", "fine_ptr": "*i64"}
_SCAN = {"top_ptr": "*fp32", "token_ptr": "*i32", "bottom_ptr": "*fp32"}
for _dtype in ("bf16", "fp32"):
    _read = {"logits_ptr": f"*{_dtype}", "logits_stride": "i32:16", "V": "i32:16"}
    _search = {**_read, **_OPTIONS, **_ROW}
    _drawn = {"seeds_ptr": "*i64", "steps_ptr": "*i64", "kept_ptr": "*i64", "tokens_ptr": "*i64"}
    _draw = {"temperature_ptr": "*fp32", "min_p_ptr": "*fp32", **_read, **_ROW, **_drawn}
    for _tiles in (1, 16):
        for _kernel, _name, _signature, _constexprs in (
            (_scan_kernel, "scan", {**_read, **_SCAN}, {}),
            (_coarse_kernel, "coarse", {**_search, "coarse_ptr": "*i32"}, {}),
            (_refine_kernel, "refine", {**_search, **_BINS}, {}),
            (
                _draw_kernel,
                "draw",
                _draw,
                {"sample_indices_ptr": None, "NUM_BLOCKS": 128, "BLOCKS": 128},
            ),
        ):
            register_compile(
                _kernel,
                f"sample_{_name}_{_dtype}_{_tiles}",
                _signature,
                {"TILE": TILE, "TILES": _tiles, **_constexprs},
            )
register_compile(
    _begin_kernel,
    "sample_begin",
    {**_SCAN, **_OPTIONS, **_ROW, **_BINS, "tokens_ptr": "*i64", "V": "i32:16"},
    {"NUM_BLOCKS": 128, "BLOCKS": 128},
)


def tiles_per_program(logits: Tensor) -> int:
    """Tiles a program takes one after another: one until a GPU is full, then more, at most 16."""
    S, V = logits.shape
    programs = S * triton.cdiv(V, TILE)
    return max(1, min(16, next_power_of_2(programs // 1536 + 1) // 2))


def scan(logits: Tensor, tiles: int) -> Scan:
    """One pass over `logits` (S, V), `tiles` tiles a program."""
    S, V = logits.shape
    num_blocks = triton.cdiv(V, TILE * tiles)
    top, bottom = torch.empty(2, S, num_blocks, dtype=torch.float32, device=logits.device)
    token = torch.empty(S, num_blocks, dtype=torch.int32, device=logits.device)
    found = Scan(top, token, bottom)
    grid = (num_blocks, S)
    launch(_scan_kernel, grid, logits, logits.stride(0), *found, V, TILE=TILE, TILES=tiles)
    return found


def sample_triton(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    steps: Tensor,
    sample_indices: Tensor | None,
    *,
    filters: bool,
) -> Tensor:
    """`sampling.sample` on the GPU."""
    S, V = logits.shape
    tiles = tiles_per_program(logits)
    partial = scan(logits, tiles)
    num_blocks = partial.top.shape[1]
    blocks = next_power_of_2(num_blocks)

    def empty(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=logits.device)

    tokens, state, kept = empty(S), empty(S, 8), empty(S, num_blocks)
    best, scale = empty(2, S, dtype=torch.float32)
    arrived, coarse = empty(S, dtype=torch.int32), empty(S, 1 << 7, dtype=torch.int32)
    fine = empty(S, 1 << 11, 2)  # count and weight of each bin: one address for both atomics
    row = (best, scale, state, arrived)
    launch(
        _begin_kernel,
        (S,),
        *partial,
        temperature,
        top_k,
        top_p,
        tokens,
        *row,
        coarse,
        fine,
        V,
        NUM_BLOCKS=num_blocks,
        BLOCKS=blocks,
    )
    grid, read = (num_blocks, S), (logits, logits.stride(0), temperature)
    if filters:
        search = (*read, top_k, top_p, *row, coarse)
        launch(_coarse_kernel, grid, *search, V, TILE=TILE, TILES=tiles)
        for _ in range(_REFINEMENTS):
            launch(_refine_kernel, grid, *search, fine, V, TILE=TILE, TILES=tiles)
    launch(
        _draw_kernel,
        grid,
        *read,
        min_p,
        seeds,
        steps,
        sample_indices,
        *row,
        kept,
        tokens,
        V,
        TILE=TILE,
        TILES=tiles,
        NUM_BLOCKS=num_blocks,
        BLOCKS=blocks,
    )
    return tokens
