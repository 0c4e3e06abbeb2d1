"""Rotary position embedding, and its fusion with what else happens to a head before attention.

RoPE turns the channels (j, j + half) of a head at position p by the angle p * f_j, in the
half-split layout of Hugging Face checkpoints, half = rotary_dim / 2 (Su et al., arXiv 2104.09864):

    out[j]        = x[j] * cos(p f_j)        - x[j + half] * sin(p f_j)
    out[j + half] = x[j + half] * cos(p f_j) + x[j] * sin(p f_j)

Channels from rotary_dim on pass through. The frequencies f come from `rope_frequencies`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hayate.kernels import cpu
from hayate.kernels._dispatch import implementation_for, is_batch_invariant
from hayate.kernels._triton import (
    gdc_launch_dependents,
    gdc_wait,
    launch,
    next_power_of_2,
    register_compile,
    tl,
    triton,
)
from hayate.kernels.rope_frequencies import (
    RopeParameters,
    rope_freqs,
    rope_frequencies,
    rope_table,
)

if TYPE_CHECKING:
    from hayate.kernels.norm import Norm

__all__ = [
    "RopeParameters",
    "rope",
    "rope_and_cache",
    "rope_and_cache_reference",
    "rope_freqs",
    "rope_frequencies",
    "rope_reference",
    "rope_table",
]


def rope_reference(x: Tensor, cos_sin: Tensor, positions: Tensor) -> Tensor:
    """Rotated heads in x's dtype. x (T, H, K), cos_sin (P, rotary_dim) fp32, positions (T,)."""
    return _rotate(x, cos_sin[positions]).to(x.dtype)


def _rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """x (T, H, K) and the rows (T, rotary_dim) of its positions -> (T, H, K) fp32."""
    half = cos_sin.shape[-1] // 2
    cos, sin = cos_sin[:, None].split(half, dim=-1)
    first, second = x[..., :half], x[..., half : 2 * half]
    turned = [first * cos - second * sin, second * cos + first * sin]
    if 2 * half < x.shape[-1]:
        turned.append(x[..., 2 * half :])
    return torch.cat(turned, dim=-1)


def _normalise(x: Tensor, norm: Norm) -> Tensor:
    """RMS norm of x (T, H, K) in fp32, over each head or, with a weight (H*K,), over all heads."""
    assert norm.kind == "rmsnorm", "QK-norm is an RMS norm in every model we run"
    width = norm.weight.numel()
    rows = x.float().reshape(x.shape[0], -1, width)
    rows = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + norm.eps) * norm.weight.float()
    return rows.view(x.shape)


def rope_and_cache_reference(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
    clip: float | None = None,
) -> Tensor:
    """The specification of `rope_and_cache`."""
    num_tokens, H, G = qkv.shape[0], num_heads, num_kv_heads
    heads = qkv.view(num_tokens, H + 2 * G, head_dim)
    qk, v = heads[:, : H + G], heads[:, H + G :]
    if q_norm is not None or k_norm is not None:
        q = qk[:, :H] if q_norm is None else _normalise(qk[:, :H], q_norm)
        k = qk[:, H:] if k_norm is None else _normalise(qk[:, H:], k_norm)
        qk = torch.cat([q, k], dim=1)
    if clip is not None:
        qk, v = qk.clamp(-clip, clip), v.clamp(-clip, clip)
    rotated = _rotate(qk, cos_sin[positions]).to(qkv.dtype)
    _write_cache(rotated[:, H:].detach(), v.detach(), k_cache, v_cache, slots)
    return rotated[:, :H].contiguous()


def _write_cache(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    page_size = k_cache.shape[1]
    if slots.numel() == 1:  # decode: plain indexing is several times cheaper than index_put
        page, offset = divmod(int(slots), page_size)
        if page >= 0:
            k_cache[page, offset], v_cache[page, offset] = k[0], v[0]
        return
    written = slots >= 0
    if not bool(written.all()):
        k, v, slots = k[written], v[written], slots[written]
    index = (slots // page_size, slots % page_size)
    k_cache[index], v_cache[index] = k, v


_NO_NORM, _HEAD_NORM, _FULL_NORM = 0, 1, 2


@triton.jit
def _rope_and_cache_kernel(
    qkv_ptr,  # (T, (H + 2G) * K)
    q_ptr,  # (T, H, K), written
    k_cache_ptr,  # (P, B, G, K), slots written
    v_cache_ptr,
    slots_ptr,  # (T,)
    positions_ptr,  # (T,)
    cos_sin_ptr,  # (max_position, 2 * HALF) fp32
    q_weight_ptr,
    k_weight_ptr,
    k_stride_page,
    v_stride_page,
    q_eps,
    k_eps,
    clip,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    HALF: tl.constexpr,  # rotary_dim / 2
    PAGE_SIZE: tl.constexpr,
    NORM: tl.constexpr,  # 0 none, 1 over a head, 2 over all heads (one block holds them all)
    CLIP: tl.constexpr,
    BLOCK_H: tl.constexpr,  # heads a program handles
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (t, b) handles BLOCK_H heads of token t: first the blocks of q, then of k, then of v.

    A head is held as three column ranges, the two halves that turn into each other and the rest, so
    that every load and store is contiguous.
    """
    gdc_launch_dependents(PDL)
    Q_BLOCKS: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    KV_BLOCKS: tl.constexpr = (G + BLOCK_H - 1) // BLOCK_H
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    head = tl.arange(0, BLOCK_H)[:, None]
    first = tl.arange(0, BLOCK_HALF)[None, :]
    second = HALF + first
    rest = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
    if block < Q_BLOCKS:
        head += block * BLOCK_H
        exists = head < H
        source = qkv_ptr
        weight = q_weight_ptr
        eps = q_eps
    else:
        head += ((block - Q_BLOCKS) % KV_BLOCKS) * BLOCK_H
        exists = head < G
        source = qkv_ptr + H * K + (block - Q_BLOCKS) // KV_BLOCKS * (G * K)
        weight = k_weight_ptr
        eps = k_eps
    half_mask = exists & (first < HALF)
    rest_mask = exists & (rest < K)
    if NORM != 0:
        row = head * K if NORM == 2 else head * 0
        w1 = tl.load(weight + row + first, mask=half_mask, other=0.0).to(tl.float32)
        w2 = tl.load(weight + row + second, mask=half_mask, other=0.0).to(tl.float32)
        w3 = tl.load(weight + row + rest, mask=rest_mask, other=0.0).to(tl.float32)
    gdc_wait(PDL)

    # Everything is read before anything is used: in decode this kernel is nothing but load latency.
    position = tl.load(positions_ptr + token).to(tl.int64)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    source += token * ((H + 2 * G) * K)
    x1 = tl.load(source + head * K + first, mask=half_mask, other=0.0)
    x2 = tl.load(source + head * K + second, mask=half_mask, other=0.0)
    x3 = tl.load(source + head * K + rest, mask=rest_mask, other=0.0).to(tl.float32)
    angle = cos_sin_ptr + position * (2 * HALF)
    cos = tl.load(angle + first, mask=first < HALF, other=0.0)
    sin = tl.load(angle + second, mask=first < HALF, other=0.0)
    x1 = x1.to(tl.float32)
    x2 = x2.to(tl.float32)

    rotates = block < Q_BLOCKS + KV_BLOCKS
    if NORM != 0 and rotates:
        squares = tl.sum(x1 * x1, axis=1) + tl.sum(x2 * x2, axis=1) + tl.sum(x3 * x3, axis=1)
        if NORM == 2:
            num_heads = tl.where(block < Q_BLOCKS, H, G)
            squares = tl.sum(squares, axis=0) / num_heads + tl.zeros_like(squares)
        scale = tl.rsqrt(squares / K + eps)[:, None]
        x1 = x1 * scale * w1
        x2 = x2 * scale * w2
        x3 = x3 * scale * w3
    if CLIP:
        x1 = tl.minimum(tl.maximum(x1, -clip), clip)
        x2 = tl.minimum(tl.maximum(x2, -clip), clip)
        x3 = tl.minimum(tl.maximum(x3, -clip), clip)
    if rotates:
        turned = x1 * cos - x2 * sin
        x2 = x2 * cos + x1 * sin
        x1 = turned

    if block < Q_BLOCKS:
        target = q_ptr + token * (H * K)
    else:
        offset = (slot % PAGE_SIZE) * (G * K)
        if rotates:
            target = k_cache_ptr + slot // PAGE_SIZE * k_stride_page + offset
        else:
            target = v_cache_ptr + slot // PAGE_SIZE * v_stride_page + offset
        half_mask = half_mask & (slot >= 0)
        rest_mask = rest_mask & (slot >= 0)
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    tl.store(target + head * K + first, x1.to(dtype), mask=half_mask)
    tl.store(target + head * K + second, x2.to(dtype), mask=half_mask)
    tl.store(target + head * K + rest, x3.to(dtype), mask=rest_mask)


@triton.jit
def head_angles(row_ptr, channels, HALF: tl.constexpr):
    """Cosine of each channel's angle, and sine with the sign of its partner's share; 1 and 0 beyond
    the rotary channels. `row_ptr` is the position's row of the table."""
    turns = channels < 2 * HALF
    j = tl.where(channels < HALF, channels, channels - HALF)
    cos = tl.load(row_ptr + j, mask=turns, other=1.0)
    sin = tl.load(row_ptr + HALF + j, mask=turns, other=0.0)
    return cos, tl.where(channels < HALF, -sin, sin)


@triton.jit
def rotated_heads(
    heads_ptr,  # (R, 1) pointers
    channels,  # (1, BLOCK_K)
    mask,  # (R, BLOCK_K)
    cos,  # (1, BLOCK_K), of `head_angles`
    sin,
    weight_ptr,  # (K,)
    eps,
    clip,
    K: tl.constexpr,
    HALF: tl.constexpr,
    NORM: tl.constexpr,
    CLIP: tl.constexpr,
):
    """R heads of one token after norm, clip and rotation, (R, BLOCK_K) fp32.

    Every channel is read a second time as the partner of the one it turns into: in decode that costs
    nothing, and the rows stay whole, as a matrix product wants them.
    """
    partner = tl.where(channels < HALF, channels + HALF, channels - HALF)
    turns = channels < 2 * HALF
    x = tl.load(heads_ptr + channels, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(heads_ptr + partner, mask=mask & turns, other=0.0).to(tl.float32)
    if NORM:
        w = tl.load(weight_ptr + channels, mask=channels < K, other=0.0).to(tl.float32)
        v = tl.load(weight_ptr + partner, mask=turns, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x, axis=1) / K + eps)[:, None]
        x = x * scale * w
        y = y * scale * v
    if CLIP:
        x = tl.minimum(tl.maximum(x, -clip), clip)
        y = tl.minimum(tl.maximum(y, -clip), clip)
    return x * cos + y * sin


for _name, _heads, _kv_heads, _width, _rotary, _norm, _block in (
    ("minitron_8b", 32, 8, 128, 128, _NO_NORM, 4),
    ("nemotron_4b_partial", 24, 8, 128, 64, _NO_NORM, 4),
    ("qwen3_head_norm", 32, 8, 128, 128, _HEAD_NORM, 8),
    ("olmoe_full_norm", 16, 16, 128, 128, _FULL_NORM, 16),
    ("smollm2", 9, 3, 64, 64, _NO_NORM, 4),
):
    register_compile(
        _rope_and_cache_kernel,
        f"rope_and_cache_{_name}",
        {
            "qkv_ptr": "*bf16",
            "q_ptr": "*bf16",
            "k_cache_ptr": "*bf16",
            "v_cache_ptr": "*bf16",
            "slots_ptr": "*i64",
            "positions_ptr": "*i64",
            "cos_sin_ptr": "*fp32",
            "q_weight_ptr": "*bf16",
            "k_weight_ptr": "*bf16",
            "k_stride_page": "i32:16",
            "v_stride_page": "i32:16",
            "q_eps": "fp32",
            "k_eps": "fp32",
            "clip": "fp32",
        },
        {
            "H": _heads,
            "G": _kv_heads,
            "K": _width,
            "HALF": _rotary // 2,
            "PAGE_SIZE": 64,
            "NORM": _norm,
            "CLIP": _norm == _FULL_NORM,
            "BLOCK_H": _block,
            "BLOCK_HALF": _rotary // 2,
            "BLOCK_REST": next_power_of_2(max(_width - _rotary, 1)),
        },
        num_warps=max(1, _block // 4),
    )


def _rope_and_cache_triton(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
    clip: float | None = None,
) -> Tensor:
    assert qkv.is_contiguous()
    assert cos_sin.is_contiguous()
    assert k_cache.dtype == v_cache.dtype == qkv.dtype
    assert k_cache.stride()[1:] == v_cache.stride()[1:]
    assert k_cache.shape[0] == 0 or k_cache[0].is_contiguous()
    assert (q_norm is None) == (k_norm is None)
    num_tokens, half = qkv.shape[0], cos_sin.shape[1] // 2
    q = qkv.new_empty(num_tokens, num_heads, head_dim)
    if num_tokens == 0:
        return q
    # Another number of heads a program is other code, which may round otherwise.
    few = num_tokens < 64 and not is_batch_invariant()
    norm, block_h = _NO_NORM, 4 if few else 8
    q_weight = k_weight = cos_sin
    q_eps = k_eps = 0.0
    if q_norm is not None and k_norm is not None:
        assert q_norm.kind == k_norm.kind == "rmsnorm"
        q_weight, k_weight, q_eps, k_eps = q_norm.weight, k_norm.weight, q_norm.eps, k_norm.eps
        norm = _HEAD_NORM if q_weight.numel() == head_dim else _FULL_NORM
    if norm == _FULL_NORM:
        block_h = next_power_of_2(max(num_heads, num_kv_heads))
    block_half = next_power_of_2(half)
    launch(
        _rope_and_cache_kernel,
        (num_tokens, triton.cdiv(num_heads, block_h) + 2 * triton.cdiv(num_kv_heads, block_h)),
        qkv,
        q,
        k_cache,
        v_cache,
        slots,
        positions,
        cos_sin,
        q_weight,
        k_weight,
        k_cache.stride(0),
        v_cache.stride(0),
        q_eps,
        k_eps,
        0.0 if clip is None else clip,
        H=num_heads,
        G=num_kv_heads,
        K=head_dim,
        HALF=half,
        PAGE_SIZE=k_cache.shape[1],
        NORM=norm,
        CLIP=clip is not None,
        BLOCK_H=block_h,
        BLOCK_HALF=block_half,
        BLOCK_REST=next_power_of_2(max(head_dim - 2 * half, 1)),
        num_warps=min(max(block_h * block_half // 256, 1), 8),  # 16 channels a thread
    )
    return q


def rope(x: Tensor, cos_sin: Tensor, positions: Tensor) -> Tensor:
    """Rotate the first rotary_dim channels of every head.

    x (T, H, K); cos_sin (max_position, rotary_dim) fp32 of `rope_table`; positions (T,) int32 or
    int64. Returns a new tensor of x's shape and dtype; computed in fp32, rounded once.
    """
    if implementation_for(x) != "triton":
        return rope_reference(x, cos_sin, positions)
    num_heads, head_dim = x.shape[1:]
    no_cache = x.new_empty(1, 1, 0, head_dim)
    return _rope_and_cache_triton(
        x.reshape(x.shape[0], -1),
        no_cache,
        no_cache,
        positions,
        positions,
        cos_sin,
        num_heads=num_heads,
        num_kv_heads=0,
        head_dim=head_dim,
    )


def rope_and_cache(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
    clip: float | None = None,
) -> Tensor:
    """Norm, clip and rotate the heads of fresh tokens; cache keys and values, return queries.

    Args:
        qkv: (T, (H + 2G) * K), per token all query heads, all key heads, all value heads.
        k_cache, v_cache: (P, B, G, K), contiguous but for the page axis; the tokens' slots are
            written.
        slots: (T,) int64 or int32, page * B + offset; a token with a negative slot is not cached.
        positions: (T,) int64 or int32.
        cos_sin: (max_position, rotary_dim) fp32, of `rope_table`.
        q_norm, k_norm: RMS norms before the rotation, both or neither; over each head when the
            weight is (K,), over the whole query or key vector when it is (H*K,) and (G*K,).
        clip: queries, keys and values are limited to [-clip, clip], between norm and rotation.

    Returns the rotated queries (T, H, K), contiguous, in qkv's dtype. Everything is computed in
    fp32 and rounded once.
    """
    run = rope_and_cache_reference
    implementation = implementation_for(qkv)
    if implementation == "triton":
        run = _rope_and_cache_triton
    elif implementation == "native" and cpu.rope_and_cache_fits(qkv, k_cache, v_cache):
        run = cpu.rope_and_cache
    return run(
        qkv,
        k_cache,
        v_cache,
        slots,
        positions,
        cos_sin,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        q_norm=q_norm,
        k_norm=k_norm,
        clip=clip,
    )
