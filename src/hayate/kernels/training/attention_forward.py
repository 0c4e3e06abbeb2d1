"""Triton kernel of `document_attention`: FlashAttention (arXiv 2205.14135, 2307.08691), the forward pass.

It keeps lse_t = log2 sum_j 2^(s_tj) of the scores s_tj = scale log2(e) q_t . k_j for the backward pass
(`attention_backward`), whose kernels share the helpers of this file.

Rows and keys are counted within their window. As document_starts never decreases, the keys that the rows of
a tile see are a range of tiles; what is outside is never read. Only tiles at the ends of a range need a mask.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hayate.errors import UsageError
from hayate.kernels._triton import (
    cdiv,
    launch,
    next_power_of_2,
    register_compile,
    tl,
    triton,
)
from hayate.kernels.flash_attention import LOG2_E, Tiles

__all__ = ["AttentionTiles", "attention_forward", "attention_tiles"]


class AttentionTiles(NamedTuple):
    """Tiles of the three kernels; block_m counts rows (queries), block_n keys."""

    forward: Tiles
    dq: Tiles
    dkv: Tiles


# By padded head width. With wgmma and 227 KB of shared memory for a program (9.0); with tcgen05 and as much (10.0,
# 11.0), where tiles of 128 keys spill; with neither, where 128 rows and a window spill on 12.0.
_WIDE = {
    64: AttentionTiles(Tiles(128, 128, 8, 2), Tiles(128, 64, 8, 3), Tiles(64, 128, 8, 2)),
    128: AttentionTiles(Tiles(128, 64, 8, 2), Tiles(128, 64, 8, 2), Tiles(32, 128, 8, 2)),
}
_TCGEN05 = _WIDE | {64: _WIDE[64]._replace(forward=Tiles(128, 64, 8, 2))}
_NARROW = {
    64: AttentionTiles(Tiles(128, 64, 8, 2), Tiles(64, 32, 4, 2), Tiles(32, 128, 8, 2)),
    128: AttentionTiles(Tiles(128, 32, 8, 2), Tiles(64, 32, 4, 2), Tiles(32, 64, 4, 1)),
}
_NARROW_12 = _NARROW | {128: _NARROW[128]._replace(forward=Tiles(64, 32, 4, 2))}
_TABLES = {9: _WIDE, 10: _TCGEN05, 11: _TCGEN05, 12: _NARROW_12}  # by major compute capability
_FP32 = AttentionTiles(*(Tiles(32, 32, 4, 1),) * 3)  # exact products, no tensor cores


def attention_tiles(
    capability: tuple[int, int], head_dim: int, dtype: torch.dtype
) -> AttentionTiles:
    """The tiles for a card of this compute capability. Raises UsageError beyond head width 128."""
    table = _TABLES.get(capability[0], _NARROW)
    widths = [width for width in table if head_dim <= width]
    if not widths:
        raise UsageError(
            f"training supports heads of at most {max(table)} channels, got {head_dim}"
        )
    return _FP32 if dtype == torch.float32 else table[min(widths)]


@triton.jit
def load_tile(
    pointer, row, stride, L, K: tl.constexpr, BLOCK_K: tl.constexpr, MASKED: tl.constexpr
):
    """Rows `row` of a matrix with K columns, padded to BLOCK_K; from row L on zeros, if MASKED."""
    channel = tl.arange(0, BLOCK_K)
    pointers = pointer + row[:, None] * stride + channel[None, :]
    if MASKED:
        return tl.load(pointers, mask=(row < L)[:, None] & (channel < K)[None, :], other=0.0)
    elif BLOCK_K != K:
        return tl.load(pointers, mask=(channel < K)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def store_tile(pointer, row, stride, L, x, K: tl.constexpr, BLOCK_K: tl.constexpr):
    channel = tl.arange(0, BLOCK_K)
    tl.store(
        pointer + row[:, None] * stride + channel[None, :],
        x.to(pointer.dtype.element_ty),
        mask=(row < L)[:, None] & (channel < K)[None, :],
    )


@triton.jit
def first_key(starts_ptr, row, base, L, window, WINDOW: tl.constexpr):
    """The first key that a row sees; rows past the end are like the last."""
    inside = tl.minimum(row, L - 1)
    first = tl.load(starts_ptr + inside) - base
    if WINDOW:
        first = tl.maximum(first, inside - window + 1)
    return first


@triton.jit
def key_ranges(first_row, starts_ptr, base, L, window, WINDOW: tl.constexpr,
                BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """(begin, whole, diagonal, end) for a tile of rows.

    Keys [begin, whole) and [diagonal, end) are seen by some of the rows, [whole, diagonal) by all.
    """
    first = first_key(starts_ptr, first_row, base, L, window, WINDOW)
    last = first_key(starts_ptr, first_row + BLOCK_M - 1, base, L, window, WINDOW)
    begin = first // BLOCK_N * BLOCK_N
    whole = tl.cdiv(last, BLOCK_N) * BLOCK_N
    diagonal = tl.maximum((first_row + 1) // BLOCK_N * BLOCK_N, whole)
    return begin, whole, diagonal, tl.minimum(first_row + BLOCK_M, L)


@triton.jit
def scores_of(q, k, row, key, first, scale_log2, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """q k^T in units of log2, -inf where a row does not see a key; row and first are columns."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
    if MASKED:
        scores = tl.where((key <= row) & (key >= first), scores, float("-inf"))
    return scores


@triton.jit
def _forward_tiles(
    acc, total, peak, q, row, first, k_ptr, v_ptr, begin, end, stride, L, scale_log2,
    K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    for start in range(begin, end, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        k = load_tile(k_ptr, key, stride, L, K, BLOCK_K, MASKED)
        scores = scores_of(
            q, k, row[:, None], key[None, :], first[:, None], scale_log2, MASKED, PRECISION
        )
        new_peak = tl.maximum(peak, tl.max(scores, axis=1))
        p = tl.exp2(scores - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(p, axis=1)
        peak = new_peak
        v = load_tile(v_ptr, key, stride, L, K, BLOCK_K, MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, total, peak


# Lengths differ from batch to batch; nothing is gained from knowing what divides them.
@triton.jit(do_not_specialize=["T", "L", "window"])
def _attention_forward_kernel(
    q_ptr,  # (T, H, K)
    k_ptr,  # (T, G, K)
    v_ptr,
    out_ptr,  # (T, H, K)
    lse_ptr,  # (H, T)
    starts_ptr,
    T,
    L,
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
    """Program (h, window, tile), the last tiles, which see most, first."""
    head = tl.program_id(0)
    base = tl.program_id(1) * L
    first_row = (tl.num_programs(2) - 1 - tl.program_id(2)) * BLOCK_M
    starts_ptr += base
    q_ptr += base.to(tl.int64) * (H * K) + head * K
    out_ptr += base.to(tl.int64) * (H * K) + head * K
    kv_offset = base.to(tl.int64) * (G * K) + head // (H // G) * K
    k_ptr += kv_offset
    v_ptr += kv_offset

    row = first_row + tl.arange(0, BLOCK_M)
    first = first_key(starts_ptr, row, base, L, window, WINDOW)
    q = load_tile(q_ptr, row, H * K, L, K, BLOCK_K, True)
    begin, whole, diagonal, end = key_ranges(
        first_row, starts_ptr, base, L, window, WINDOW, BLOCK_M, BLOCK_N
    )
    acc = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    # Finite, so that a row without a visible key so far gives exp2(-inf - peak) = 0, not NaN.
    peak = tl.full([BLOCK_M], -1e30, dtype=tl.float32)
    acc, total, peak = _forward_tiles(
        acc, total, peak, q, row, first, k_ptr, v_ptr, begin, whole, G * K, L, scale_log2,
        K, BLOCK_N, BLOCK_K, True, PRECISION,
    )  # fmt: skip
    acc, total, peak = _forward_tiles(
        acc, total, peak, q, row, first, k_ptr, v_ptr, whole, diagonal, G * K, L, scale_log2,
        K, BLOCK_N, BLOCK_K, False, PRECISION,
    )  # fmt: skip
    acc, total, peak = _forward_tiles(
        acc, total, peak, q, row, first, k_ptr, v_ptr, diagonal, end, G * K, L, scale_log2,
        K, BLOCK_N, BLOCK_K, True, PRECISION,
    )  # fmt: skip
    store_tile(out_ptr, row, H * K, L, acc / total[:, None], K, BLOCK_K)
    lse_ptr += head.to(tl.int64) * T + base
    tl.store(lse_ptr + row, peak + tl.log2(total), mask=row < L)


def tiles_for(q: Tensor) -> AttentionTiles:
    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else (9, 0)
    return attention_tiles(capability, q.shape[2], q.dtype)


def grid(q: Tensor, length: int, block: int) -> tuple[int, int, int]:
    return q.shape[1], q.shape[0] // length, cdiv(length, block)


def max_tiles(length: int, tiles: Tiles) -> int:
    """Tiles of rows in a window, up to a power of two; few different ones, for each is compiled."""
    return max(64, next_power_of_2(cdiv(length, tiles.block_m)))


def attention_constexprs(q: Tensor, k: Tensor, window: int | None, tiles: Tiles) -> dict[str, Any]:
    return {
        "H": q.shape[1],
        "G": k.shape[1],
        "K": q.shape[2],
        "WINDOW": window is not None,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_K": max(next_power_of_2(q.shape[2]), 16),
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    document_starts: Tensor,
    *,
    sequence_length: int,
    scale: float,
    window: int | None,
    tiles: AttentionTiles | None = None,
) -> tuple[Tensor, Tensor]:
    """(out (T, H, K), lse (H, T) fp32) of contiguous q, k and v; see `document_attention`."""
    T, H, _ = q.shape
    chosen = (tiles or tiles_for(q)).forward
    out, lse = torch.empty_like(q), torch.empty(H, T, dtype=torch.float32, device=q.device)
    launch(
        _attention_forward_kernel,
        grid(q, sequence_length, chosen.block_m),
        q,
        k,
        v,
        out,
        lse,
        document_starts,
        T,
        sequence_length,
        scale * LOG2_E,
        window or 0,
        **attention_constexprs(q, k, window, chosen),
    )
    return out, lse


# Head widths, query and key heads, and whether there is a window, of the variants to compile.
COMPILED = (
    (64, 12, 1, False),  # our MoE
    (80, 32, 32, True),
    (128, 32, 8, False),
)


def register_attention(name: str, kernel: Any, signature: dict[str, str]) -> None:
    """Register the kernel `name`, a field of AttentionTiles, for all head widths and architectures."""
    pointers = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), "*bf16")
    common = {"lse_ptr": "*fp32", "starts_ptr": "*i32", "T": "i32", "L": "i32"}
    common |= {"scale_log2": "fp32", "window": "i32"}
    for width, heads, kv_heads, window in COMPILED:
        for capability, min_cc, max_cc in (
            ((8, 0), 80, 89),
            ((9, 0), 90, 90),
            ((10, 0), 100, 100),
            ((12, 0), 120, 120),
        ):
            chosen = getattr(attention_tiles(capability, width, torch.bfloat16), name)
            q = torch.empty(0, heads, width, dtype=torch.bfloat16)
            k = torch.empty(0, kv_heads, width, dtype=torch.bfloat16)
            constexprs = attention_constexprs(q, k, 1 if window else None, chosen)
            warps, stages = constexprs.pop("num_warps"), constexprs.pop("num_stages")
            if name == "dkv":
                constexprs["TILES"] = max_tiles(4096, chosen)
            register_compile(
                kernel,
                f"document_attention_{name}_{width}{'_window' if window else ''}_sm{min_cc}",
                pointers | common | signature,
                constexprs,
                num_warps=warps,
                num_stages=stages,
                min_cc=min_cc,
                max_cc=max_cc,
                may_spill=window and name == "dkv",  # eight registers, over the masked tiles
            )


register_attention("forward", _attention_forward_kernel, {})
