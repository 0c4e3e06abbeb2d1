"""Attention of an encoder: packed sequences without a cache, each query sees all keys of its sequence.

    out_i = sum_j softmax_j(scale * q_i . k_j) v_j,  j over all keys of i's sequence

A sequence's queries and keys may differ in number (cross attention). The kernel is `flash_attention` without
masks, pages and groups, and with heads in two parts: tensor cores want powers of two, and padding SigLIP's heads
of 72 to 128 channels would cost 78 % more products; 64 + 16 cost 11 %.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hayate.errors import UsageError
from hayate.kernels._dispatch import implementation_for
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
from hayate.kernels.flash_attention import LOG2_E, Tiles, flash_tiles

__all__ = ["encoder_attention", "encoder_attention_reference"]

_MAX_HEAD_DIM = 256
_MIN_PART = 16  # channels of the smallest product of matrices


def encoder_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *, scale: float
) -> Tensor:
    """`encoder_attention` in PyTorch: one sequence after the other, through SDPA."""
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for s in range(len(ends_q) - 1):
        rows = slice(ends_q[s], ends_q[s + 1])
        queries, keys, values = (
            x[part].transpose(0, 1)[None]
            for x, part in ((q, rows), *((x, slice(ends_k[s], ends_k[s + 1])) for x in (k, v)))
        )
        found = F.scaled_dot_product_attention(queries, keys, values, scale=scale)
        out[rows] = found[0].transpose(0, 1)
    return out


def _parts(head_dim: int) -> tuple[int, int]:
    """Channels of the two parts of a head, padded; the second is 0 where padding the whole costs no more."""
    whole = max(next_power_of_2(head_dim), _MIN_PART)
    first = whole // 2
    second = max(next_power_of_2(max(head_dim - first, 1)), _MIN_PART)
    return (first, second) if first >= _MIN_PART and first + second < whole else (whole, 0)


@triton.jit
def _load_part(
    rows_ptr, stride, rows, limit, FIRST: tl.constexpr, SIZE: tl.constexpr, K: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Channels FIRST .. FIRST + SIZE of `rows`, zeros beyond K and, if MASKED, in rows from `limit` on."""
    channels = FIRST + tl.arange(0, SIZE)
    pointers = rows_ptr + (rows * stride)[:, None] + channels[None, :]
    if MASKED and FIRST + SIZE > K:
        x = tl.load(pointers, mask=(rows < limit)[:, None] & (channels < K)[None, :], other=0.0)
    elif MASKED:
        x = tl.load(pointers, mask=(rows < limit)[:, None], other=0.0)
    elif FIRST + SIZE > K:
        x = tl.load(pointers, mask=(channels < K)[None, :], other=0.0)
    else:
        x = tl.load(pointers)
    return x


@triton.jit
def _attend(
    acc, acc_2, total, peak, q, q_2, k_ptr, v_ptr, begin, end, limit, stride, scale_log2,
    K: tl.constexpr, BLOCK_N: tl.constexpr, PART: tl.constexpr, PART_2: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the key tiles from `begin` to `end`; only the last of all, MASKED, has fewer than BLOCK_N keys."""
    columns = tl.arange(0, BLOCK_N)
    for start in range(begin, end, BLOCK_N):
        offset = tl.cast(stride, tl.int64) * start
        keys, values, here = k_ptr + offset, v_ptr + offset, limit - start
        k = _load_part(keys, stride, columns, here, 0, PART, K, MASKED)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if PART_2:
            k_2 = _load_part(keys, stride, columns, here, PART, PART_2, K, MASKED)
            scores = tl.dot(q_2, tl.trans(k_2), scores, input_precision=PRECISION)
        if MASKED:
            scores = tl.where((columns < here)[None, :], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=1) * scale_log2)
        p = tl.exp2(tl.fma(scores, scale_log2, -new_peak[:, None]))
        shrink = tl.exp2(peak - new_peak)
        total = tl.fma(total, shrink, tl.sum(p, axis=1))
        peak = new_peak
        v = _load_part(values, stride, columns, here, 0, PART, K, MASKED)
        p = p.to(v.dtype)
        acc = tl.dot(p, v, acc * shrink[:, None], input_precision=PRECISION)
        if PART_2:
            v_2 = _load_part(values, stride, columns, here, PART, PART_2, K, MASKED)
            acc_2 = tl.dot(p, v_2, acc_2 * shrink[:, None], input_precision=PRECISION)
    return acc, acc_2, total, peak


@triton.jit
def _encoder_attention_kernel(
    q_ptr,  # (T, H, K)
    k_ptr,  # (N, H, K)
    v_ptr,
    out_ptr,  # (T, H, K), written
    cu_seqlens_q_ptr,  # (S + 1,)
    cu_seqlens_k_ptr,
    q_stride,
    kv_stride,
    scale_log2,
    H: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PART: tl.constexpr,
    PART_2: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (m, h, s): BLOCK_M queries of head h of sequence s."""
    gdc_launch_dependents(PDL)
    gdc_wait(PDL)
    head = tl.program_id(1)
    sequence = tl.program_id(2)
    q_start = tl.load(cu_seqlens_q_ptr + sequence)
    q_len = tl.load(cu_seqlens_q_ptr + sequence + 1) - q_start
    first_query = tl.program_id(0) * BLOCK_M
    if first_query >= q_len:
        return
    kv_start = tl.load(cu_seqlens_k_ptr + sequence)
    kv_len = tl.load(cu_seqlens_k_ptr + sequence + 1) - kv_start
    kv_offset = kv_start.to(tl.int64) * kv_stride + head * K
    k_ptr += kv_offset
    v_ptr += kv_offset

    # Without a second part the names stand for nothing, which the compiler removes.
    SIZE_2: tl.constexpr = PART_2 if PART_2 else 16
    rows, here = tl.arange(0, BLOCK_M), q_len - first_query
    token = (q_start + first_query).to(tl.int64)
    queries = q_ptr + token * q_stride + head * K
    q = _load_part(queries, q_stride, rows, here, 0, PART, K, True)
    q_2 = q
    if PART_2:
        q_2 = _load_part(queries, q_stride, rows, here, PART, PART_2, K, True)
    acc = tl.zeros([BLOCK_M, PART], dtype=tl.float32)
    acc_2 = tl.zeros([BLOCK_M, SIZE_2], dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    whole = kv_len // BLOCK_N * BLOCK_N
    acc, acc_2, total, peak = _attend(
        acc, acc_2, total, peak, q, q_2, k_ptr, v_ptr, 0, whole, kv_len, kv_stride, scale_log2,
        K, BLOCK_N, PART, PART_2, False, PRECISION,
    )  # fmt: skip
    acc, acc_2, total, peak = _attend(
        acc, acc_2, total, peak, q, q_2, k_ptr, v_ptr, whole, kv_len, kv_len, kv_stride, scale_log2,
        K, BLOCK_N, PART, PART_2, True, PRECISION,
    )  # fmt: skip

    out_ptr += token * (H * K) + head * K + rows[:, None] * (H * K)
    exists = (rows < here)[:, None]
    channels = tl.arange(0, PART)[None, :]
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + channels, out, mask=exists & (channels < K))
    if PART_2:
        channels_2 = PART + tl.arange(0, PART_2)[None, :]
        out_2 = (acc_2 / total[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + channels_2, out_2, mask=exists & (channels_2 < K))


def _tiles(
    capability: tuple[int, int], head_dim: int, dtype: torch.dtype, max_seqlen_q: int
) -> Tiles:
    """As for prompts, where registers suffice: a head in two parts, and few queries, take smaller tiles.

    No more queries than there are: a resampler has 64.
    """
    part, part_2 = _parts(head_dim)
    tiles = flash_tiles(capability, part, dtype)
    if dtype == torch.float32:
        return tiles
    if part_2:
        tiles = Tiles(128, 64, 8, 3) if capability[0] in (9, 10, 11) else Tiles(128, 32, 8, 2)
    if max_seqlen_q <= 64 < tiles.block_m:
        tiles = tiles._replace(block_m=64, block_n=min(tiles.block_n, 64), num_warps=4)
    return tiles


def _constexprs(num_heads: int, head_dim: int, tiles: Tiles) -> dict[str, Any]:
    part, part_2 = _parts(head_dim)
    return {
        "H": num_heads,
        "K": head_dim,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "PART": part,
        "PART_2": part_2,
    }


def launch_encoder_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    max_seqlen_q: int,
    scale: float,
    tiles: Tiles | None = None,
) -> Tensor:
    """`encoder_attention` on a GPU or in Triton's interpreter; `tiles` asks for the kernel cut so."""
    num_tokens, H, K = q.shape
    out = torch.empty(num_tokens, H, K, dtype=q.dtype, device=q.device)
    num_sequences = cu_seqlens_q.numel() - 1
    if num_tokens == 0 or num_sequences == 0:
        return out
    if tiles is None:
        capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else (9, 0)
        tiles = _tiles(capability, K, q.dtype, max_seqlen_q)
    launch(
        _encoder_attention_kernel,
        (cdiv(max_seqlen_q, tiles.block_m), H, num_sequences),
        q,
        k,
        v,
        out,
        cu_seqlens_q,
        cu_seqlens_k,
        q.stride(0),
        k.stride(0),
        scale * LOG2_E,
        **_constexprs(H, K, tiles),
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return out


def encoder_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    max_seqlen_q: int,
    scale: float,
) -> Tensor:
    """Bidirectional attention within each of the packed sequences.

    Args:
        q: (T, H, K), the queries of all sequences one after the other; K <= 256.
        k, v: (N, H, K), their keys and values, both of the same strides. The token axis of all three may
            have any stride, as in a fused projection; heads and channels are contiguous.
        cu_seqlens_q, cu_seqlens_k: (S + 1,) int32, cumulative numbers of queries and keys, from 0. A
            sequence with queries has keys.
        max_seqlen_q: the largest number of queries of a sequence.
        scale: factor of the scores, usually K ** -0.5.

    Returns (T, H, K), contiguous, in q's dtype; rows after cu_seqlens_q[-1] are unspecified. Raises UsageError
    where shapes or strides do not belong together.
    """
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.dim() != 3 or k.shape != v.shape or q.shape[1:] != k.shape[1:]:
        raise UsageError(f"encoder_attention takes q (T, H, K) and k, v (N, H, K), got {shapes}")
    if q.shape[2] > _MAX_HEAD_DIM:
        raise UsageError(f"encoder_attention takes heads of at most {_MAX_HEAD_DIM}, got {shapes}")
    heads = (q.shape[2], 1)
    if k.stride() != v.stride() or not q.stride()[1:] == k.stride()[1:] == heads:
        raise UsageError(
            "encoder_attention takes contiguous heads, and k and v of the same strides, "
            f"got {q.stride()}, {k.stride()} and {v.stride()} for {shapes}"
        )
    operands = (q, k, v, cu_seqlens_q, cu_seqlens_k)
    if implementation_for(q) == "triton":
        return launch_encoder_attention(*operands, max_seqlen_q=max_seqlen_q, scale=scale)
    return encoder_attention_reference(*operands, scale=scale)


# SigLIP's self-attention and the resampler's cross attention.
for _width, _heads, _queries in ((72, 16, 1024), (128, 28, 64)):
    for _capability, _min_cc, _max_cc in (((8, 0), 80, 89), ((9, 0), 90, 100), ((12, 0), 120, 120)):
        _cut = _tiles(_capability, _width, torch.bfloat16, _queries)
        register_compile(
            _encoder_attention_kernel,
            f"encoder_attention_{_width}_sm{_min_cc}",
            {f"{name}_ptr": "*bf16" for name in ("q", "k", "v", "out")}
            | {f"cu_seqlens_{name}_ptr": "*i32" for name in "qk"}
            | {"q_stride": "i32:16", "kv_stride": "i32:16", "scale_log2": "fp32"},
            _constexprs(_heads, _width, _cut) | {"PRECISION": "tf32"},
            num_warps=_cut.num_warps,
            num_stages=_cut.num_stages,
            min_cc=_min_cc,
            max_cc=_max_cc,
        )
