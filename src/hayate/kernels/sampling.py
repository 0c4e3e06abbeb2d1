"""One token a row of logits, without sorting the vocabulary and without a wait by the host.

    d_i = max(logits) - logits_i                      how far token i is behind the best one
    w_i = exp(-d_i / temperature)                     its weight
    top-k   keeps the tokens whose logit is at least the k-th largest; ties with it are all kept
    top-p   keeps, of those, token i if the weights of the tokens ahead of it, d_j < d_i, sum to
            less than p times the weight that top-k kept: the smallest set that holds the share p,
            with all ties of its last token
    min-p   keeps, of those, the tokens with w_i >= min_p
    token = the first i, in the order of the vocabulary, with
            sum_{j <= i, kept} w_j > u * sum_{j kept} w_j

u is one number of Philox4x32-10 (Salmon et al., SC 2011): key (seed, seed >> 32), counter (step,
sample_index, 0, 0), u = (first word >> 8) * 2^-24, 0 <= u < 1. So a draw depends on nothing else in
the batch.

A row with temperature 0 is greedy: the largest logit, the lowest index among ties. A row that holds
a NaN, or whose largest logit is infinite, gets the token -1.

The kernels (`sampling_search`) sum weights as integers, in units of 2^-40, so nothing depends on
the order in which a GPU adds. A token below that weight is never drawn.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hayate.errors import UsageError
from hayate.kernels import cpu
from hayate.kernels._dispatch import implementation_for
from hayate.kernels._triton import (
    gdc_launch_dependents,
    gdc_wait,
    launch,
    next_power_of_2,
    register_compile,
    tl,
    triton,
)
from hayate.kernels.sampling_search import sample_triton, scan, tiles_per_program

__all__ = [
    "advance_decode",
    "advance_decode_reference",
    "argmax",
    "argmax_reference",
    "sample",
    "sample_reference",
    "uniform_reference",
]


def argmax_reference(logits: Tensor) -> Tensor:
    """`argmax` in PyTorch."""
    top = logits.amax(-1)  # NaN where the row holds one
    tokens = (logits == top[:, None]).int().argmax(-1)  # the first of equal values
    return torch.where(top.isfinite(), tokens, -1)


def uniform_reference(seeds: Tensor, steps: Tensor, sample_indices: Tensor) -> Tensor:
    """The u of each row: (S,) float64 in [0, 1), from three (S,) int64 tensors."""
    mask = 0xFFFFFFFF
    k0, k1 = seeds & mask, (seeds >> 32) & mask
    c0, c1 = steps & mask, sample_indices & mask
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    for _ in range(10):
        high0, low0 = _multiply_words(c0, 0xD2511F53)
        high2, low2 = _multiply_words(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return (c0 >> 8).double() * 2.0**-24


def _multiply_words(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b, both below 2^32, held in int64."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)  # each below 2^48
    total = low + ((high & 0xFFFF) << 16)
    return (high >> 16) + (total >> 32), total & 0xFFFFFFFF


def sample_reference(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    steps: Tensor,
    sample_indices: Tensor | None = None,
) -> Tensor:
    """`sample` in PyTorch, in float64, by sorting."""
    greedy = argmax_reference(logits)
    drawn = (temperature > 0) & (greedy >= 0)
    rows = drawn.nonzero()[:, 0]
    if rows.numel() == 0:
        return greedy
    indices = torch.zeros_like(seeds) if sample_indices is None else sample_indices
    x = logits[rows].double()
    behind = x.amax(-1, keepdim=True) - x
    weights = torch.exp(-behind / temperature[rows].double()[:, None])
    kept = weights * (weights >= min_p[rows].double()[:, None])
    kept *= _filter_reference(behind, weights, top_k[rows], top_p[rows].double())
    cumulative = kept.cumsum(-1)
    u = uniform_reference(seeds[rows], steps[rows], indices[rows])
    tokens = torch.searchsorted(cumulative, u[:, None] * cumulative[:, -1:], right=True)[:, 0]
    result = greedy.clone()
    result[rows] = tokens.clamp_max(logits.shape[-1] - 1)
    return result


def _filter_reference(behind: Tensor, weights: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Which tokens top-k and then top-p keep: (S, V) bool."""
    V = behind.shape[-1]
    k = torch.where((top_k > 0) & (top_k < V), top_k, V).long()[:, None]
    p = top_p[:, None]
    if bool((k == V).all()) and bool((p >= 1).all()):
        return torch.ones_like(behind, dtype=torch.bool)
    behind_sorted, order = behind.sort(dim=-1)
    in_top_k = behind_sorted <= behind_sorted.gather(-1, k - 1)
    sorted_weights = weights.gather(-1, order) * in_top_k
    ahead = sorted_weights.cumsum(-1) - sorted_weights
    # What is ahead of a token is what is ahead of the first token that ties with it.
    place = torch.arange(V, device=behind.device).expand_as(behind)
    starts = torch.cat([place[:, :1] == 0, behind_sorted.diff(dim=-1) > 0], -1)
    first = torch.where(starts, place, 0).cummax(-1).values
    target = p * sorted_weights.sum(-1, keepdim=True)
    in_top_p = (ahead.gather(-1, first) < target) | (p >= 1) | (first == 0)
    return torch.zeros_like(in_top_k).scatter(-1, order, in_top_k & in_top_p)


def advance_decode_reference(
    tokens: Tensor,
    positions: Tensor,
    steps: Tensor,
    page_table: Tensor,
    token_ids: Tensor,
    rope_rows: Tensor,
    slots: Tensor,
    seq_lens: Tensor,
    *,
    page_size: int,
) -> None:
    """`advance_decode` in PyTorch."""
    active = positions >= -1
    positions += active
    steps += active
    position = torch.where(active, positions, 0)
    column = position // page_size
    exists = active & (column < page_table.shape[1])
    page = page_table.gather(1, torch.where(exists, column, 0)[:, None])[:, 0].long()
    token_ids.copy_(torch.where(active, tokens.clamp_min(0), 0))
    rope_rows.copy_(position)
    slots.copy_(torch.where(exists, page * page_size + position % page_size, -1))
    seq_lens.copy_(torch.where(active, position + 1, 0))


@triton.jit
def _merge_argmax_kernel(
    max_ptr,  # (S, NUM_BLOCKS) fp32, from the scan
    index_ptr,  # (S, NUM_BLOCKS) int32
    tokens_ptr,  # (S,) int64
    NUM_BLOCKS: tl.constexpr,
    BLOCKS: tl.constexpr,
    PDL: tl.constexpr,
):
    gdc_launch_dependents(PDL)
    row = tl.program_id(0)
    block = tl.arange(0, BLOCKS)
    inside = block < NUM_BLOCKS
    gdc_wait(PDL)
    value = tl.load(max_ptr + row * NUM_BLOCKS + block, mask=inside, other=float("-inf"))
    index = tl.load(index_ptr + row * NUM_BLOCKS + block, mask=inside, other=2147483647)
    has_nan = tl.max((value != value).to(tl.int32), axis=0) > 0
    top = tl.max(tl.where(value == value, value, float("-inf")), axis=0)
    token = tl.min(tl.where(value == top, index, 2147483647), axis=0).to(tl.int64)
    finite = (top < float("inf")) & (top > float("-inf")) & (has_nan == 0)
    tl.store(tokens_ptr + row, tl.where(finite, token, -1))


def _argmax_triton(logits: Tensor) -> Tensor:
    S = logits.shape[0]
    tokens = torch.empty(S, dtype=torch.int64, device=logits.device)
    partial = scan(logits, tiles_per_program(logits))
    num_blocks = partial.top.shape[1]
    launch(
        _merge_argmax_kernel,
        (S,),
        partial.top,
        partial.token,
        tokens,
        NUM_BLOCKS=num_blocks,
        BLOCKS=next_power_of_2(num_blocks),
        num_warps=4 if num_blocks > 32 else 1,
    )
    return tokens


@triton.jit
def _advance_decode_kernel(
    tokens_ptr,
    positions_ptr,
    steps_ptr,
    page_table_ptr,
    token_ids_ptr,
    rope_rows_ptr,
    slots_ptr,
    seq_lens_ptr,
    S,
    page_table_stride,
    num_columns,
    PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    gdc_launch_dependents(PDL)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < S
    gdc_wait(PDL)
    position = tl.load(positions_ptr + row, mask=inside, other=-2) + 1
    active = position >= 0
    token = tl.load(tokens_ptr + row, mask=active, other=0)
    step = tl.load(steps_ptr + row, mask=active, other=0)
    column = position // PAGE_SIZE
    exists = active & (column < num_columns)
    page = tl.load(page_table_ptr + row * page_table_stride + column, mask=exists, other=0)
    slot = page.to(tl.int64) * PAGE_SIZE + position % PAGE_SIZE
    tl.store(positions_ptr + row, position, mask=active)
    tl.store(steps_ptr + row, step + 1, mask=active)
    tl.store(token_ids_ptr + row, tl.maximum(token, 0), mask=inside)
    tl.store(rope_rows_ptr + row, tl.maximum(position, 0), mask=inside)
    tl.store(slots_ptr + row, tl.where(exists, slot, -1), mask=inside)
    tl.store(seq_lens_ptr + row, tl.where(active, position + 1, 0).to(tl.int32), mask=inside)


register_compile(
    _merge_argmax_kernel,
    "argmax_merge",
    {"max_ptr": "*fp32", "index_ptr": "*i32", "tokens_ptr": "*i64"},
    {"NUM_BLOCKS": 128, "BLOCKS": 128},
)
register_compile(
    _advance_decode_kernel,
    "advance_decode",
    {
        "tokens_ptr": "*i64",
        "positions_ptr": "*i64",
        "steps_ptr": "*i64",
        "page_table_ptr": "*i32",
        "token_ids_ptr": "*i64",
        "rope_rows_ptr": "*i64",
        "slots_ptr": "*i64",
        "seq_lens_ptr": "*i32",
        "S": "i32",
        "page_table_stride": "i32",
        "num_columns": "i32",
    },
    {"PAGE_SIZE": 64, "BLOCK": 128},
)


def argmax(logits: Tensor) -> Tensor:
    """The index of the largest logit of each row, the lowest one among equals.

    Args:
        logits: (S, V), any float dtype, contiguous rows.

    Returns (S,) int64; -1 for a row that holds a NaN or whose largest logit is infinite.
    """
    _check_logits(logits)
    implementation = implementation_for(logits)
    if implementation == "triton":
        return _argmax_triton(logits)
    if implementation == "native" and cpu.argmax_fits(logits):
        tokens = cpu.argmax(logits)
        top = logits.gather(1, tokens[:, None])[:, 0]
        return torch.where(top.isfinite(), tokens, -1)
    return argmax_reference(logits)


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    steps: Tensor,
    sample_indices: Tensor | None = None,
    *,
    filters: bool = True,
) -> Tensor:
    """Draw one token a row, as the head of this file defines it.

    Args:
        logits: (S, V), any float dtype, contiguous rows; V at most 2^18.
        temperature: (S,) fp32; 0 is greedy.
        top_k: (S,) int32; 0 or less, or V or more, is off.
        top_p: (S,) fp32; 1 or more is off. The best token and its ties are always kept.
        min_p: (S,) fp32 in [0, 1]; 0 is off.
        seeds, steps, sample_indices: (S,) int64, what u depends on; the last by default zeros.
        filters: False promises that top-k and top-p are off in every row: saves their kernels.

    Returns (S,) int64; -1 for a row that holds a NaN or whose largest logit is infinite.
    """
    _check_logits(logits)
    for name, option in (("temperature", temperature), ("top_k", top_k), ("top_p", top_p)):
        if option.shape != logits.shape[:1]:
            raise UsageError(f"{name} has shape {tuple(option.shape)}, logits {logits.shape}")
    options = (temperature, top_k, top_p, min_p, seeds, steps, sample_indices)
    if _runs_triton(logits):
        return sample_triton(logits, *options, filters=filters)
    return sample_reference(logits, *options)


def advance_decode(
    tokens: Tensor,
    positions: Tensor,
    steps: Tensor,
    page_table: Tensor,
    token_ids: Tensor,
    rope_rows: Tensor,
    slots: Tensor,
    seq_lens: Tensor,
    *,
    page_size: int,
) -> None:
    """The input of a decode step from the end of the step before, all on the device.

    positions and steps (of the token computed, and of the token drawn last) go up by one, in place; then

        token_ids = max(tokens, 0)      rope_rows = positions      seq_lens = positions + 1
        slots = page_table[s, positions // page_size] * page_size + positions % page_size

    A row whose position is below -1 is not in use: it keeps its state, and gets token 0, RoPE row 0, length 0 and
    slot -1. A position past the end of the page table has slot -1.

    Args:
        tokens: (S,) int64, what `sample` returned; -1 where the logits were not finite. Unchanged.
        positions, steps: (S,) int64. Advanced.
        page_table: (S, P) int32, rows of any stride. Unchanged.
        token_ids, rope_rows, slots: (S,) int64. seq_lens: (S,) int32. All written.
    """
    arguments = (tokens, positions, steps, page_table, token_ids, rope_rows, slots, seq_lens)
    if not _runs_triton(tokens):
        advance_decode_reference(*arguments, page_size=page_size)
        return
    assert page_table.stride(1) == 1
    S, block = tokens.shape[0], 128
    launch(
        _advance_decode_kernel,
        (triton.cdiv(S, block),),
        *arguments,
        S,
        page_table.stride(0),
        page_table.shape[1],
        PAGE_SIZE=page_size,
        BLOCK=block,
        num_warps=4,
    )


def _runs_triton(x: Tensor) -> bool:
    return implementation_for(x) == "triton"


def _check_logits(logits: Tensor) -> None:
    if logits.dim() != 2 or logits.stride(-1) != 1 or not 0 < logits.shape[1] <= 1 << 18:
        raise UsageError(
            f"logits must be (S, V) with contiguous rows and V from 1 to {1 << 18}, "
            f"got shape {tuple(logits.shape)} with strides {logits.stride()}"
        )
