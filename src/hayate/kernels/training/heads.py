"""From one projection to the heads of attention, with gradients: split, QK-norm, clip, RoPE.

The formulas are those of `hayate.kernels.rope` (the forward kernel too). The gradient of a rotation is the
rotation by the opposite angle; a clipped channel has none; that of the norm is as in `norm`.
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
    num_sms,
    register_compile,
    tl,
    triton,
)
from hayate.kernels.norm import Norm
from hayate.kernels.rope import rope_and_cache
from hayate.kernels.training import cpu
from hayate.kernels.training._dispatch import implementation

__all__ = ["split_heads", "split_heads_reference"]

_PROGRAMS_PER_SM = 16
_NO_NORM, _HEAD_NORM, _FULL_NORM = 0, 1, 2


class Heads(NamedTuple):
    """What a projection is split into."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


def split_heads_reference(
    qkv: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    heads: Heads,
    q_norm: Norm | None,
    k_norm: Norm | None,
    clip: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`split_heads` in PyTorch."""
    H, G, K = heads
    q, k, v = qkv.view(qkv.shape[0], H + 2 * G, K).split([H, G, G], dim=1)
    q, k = _normalise(q, q_norm), _normalise(k, k_norm)
    if clip is not None:
        q, k, v = (x.clamp(-clip, clip) for x in (q, k, v))
    rows = cos_sin[positions]
    return _rotate(q, rows).to(qkv.dtype), _rotate(k, rows).to(qkv.dtype), v.contiguous()


def _normalise(x: Tensor, norm: Norm | None) -> Tensor:
    """RMS norm of x (T, H, K) in fp32, over each head or, with a weight (H*K,), over all heads."""
    if norm is None:
        return x
    rows = x.float().reshape(x.shape[0], -1, norm.weight.numel())
    scale = torch.rsqrt(rows.square().mean(-1, keepdim=True) + norm.eps)
    return (rows * scale * norm.weight.float()).view(x.shape)


def _rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """x (T, H, K) and the rows (T, rotary_dim) of its positions -> (T, H, K) fp32."""
    half = cos_sin.shape[-1] // 2
    cos, sin = cos_sin[:, None].split(half, dim=-1)
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    turned = [first * cos - second * sin, second * cos + first * sin, rest]
    return torch.cat(turned, dim=-1)


@triton.jit
def _split_heads_backward_kernel(
    dq_ptr,  # (T, H, K)
    dk_ptr,  # (T, G, K)
    dv_ptr,
    qkv_ptr,  # (T, (H + 2G) K), read where there is a norm or a clip
    dqkv_ptr,
    positions_ptr,
    cos_sin_ptr,  # (P, 2 HALF)
    q_weight_ptr,
    k_weight_ptr,
    dweight_ptr,  # (programs, blocks of q and k, K or BLOCK_H * K) fp32
    T,
    rows,  # a program
    q_eps,
    k_eps,
    clip,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    HALF: tl.constexpr,
    NORM: tl.constexpr,
    CLIP: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Program (p, block): some tokens, BLOCK_H of their query, key or value heads."""
    Q_BLOCKS: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    KV_BLOCKS: tl.constexpr = (G + BLOCK_H - 1) // BLOCK_H
    WIDTH: tl.constexpr = BLOCK_H * K if NORM == 2 else K
    program = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    is_q = block < Q_BLOCKS
    rotates = block < Q_BLOCKS + KV_BLOCKS
    # Which heads this block holds, how many there are of their kind, and where those begin.
    first = tl.where(is_q, block, (block - Q_BLOCKS) % KV_BLOCKS)
    count = tl.where(is_q, H, G)
    column = tl.where(is_q, 0, tl.where(rotates, H, H + G)) * K
    gradient = dv_ptr
    weight_ptr = k_weight_ptr
    eps = k_eps
    if is_q:
        gradient = dq_ptr
        weight_ptr = q_weight_ptr
        eps = q_eps
    elif rotates:
        gradient = dk_ptr
    head = first * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    c = tl.arange(0, BLOCK_K)[None, :]
    inside = (head < count) & (c < K)
    partner = tl.where(c < HALF, c + HALF, c - HALF)
    turned = inside & (c < 2 * HALF) & rotates
    sign = tl.where(c < HALF, 1.0, -1.0)
    if NORM != 0:
        weight = tl.load(weight_ptr + (head * K if NORM == 2 else 0) + c, mask=inside, other=0.0)
        weight = tl.where(rotates, weight.to(tl.float32), 1.0)  # values are left as they are
        dweight = tl.zeros((BLOCK_H, BLOCK_K), tl.float32)
    for token in range(program * rows, tl.minimum((program + 1) * rows, T)):
        source = gradient + token * (count * K) + head * K
        dx = tl.load(source + c, mask=inside, other=0.0).to(tl.float32)
        other = tl.load(source + partner, mask=turned, other=0.0).to(tl.float32)
        angle = cos_sin_ptr + tl.load(positions_ptr + token).to(tl.int64) * (2 * HALF) + c % HALF
        cos = tl.load(angle, mask=turned, other=1.0)
        sin = tl.load(angle + HALF, mask=turned, other=0.0)
        dx = dx * cos + other * sin * sign
        cell = token * ((H + 2 * G) * K) + column + head * K + c
        if NORM != 0 or CLIP:
            n = tl.load(qkv_ptr + cell, mask=inside, other=0.0).to(tl.float32)
            normed = n
        if NORM != 0:
            squares = tl.sum(n * n, axis=1)
            if NORM == 2:
                squares = tl.zeros_like(squares) + tl.sum(squares, axis=0) / count
            r = tl.where(rotates, tl.rsqrt(squares / K + eps), 1.0)[:, None]
            n = n * r
            normed = n * weight
        if CLIP:
            dx = tl.where((normed >= -clip) & (normed <= clip), dx, 0.0)
        if NORM != 0:
            dweight += dx * n
            g = dx * weight
            mean = tl.sum(g * n, axis=1) / K
            if NORM == 2:
                mean = tl.zeros_like(mean) + tl.sum(mean, axis=0) / count
            dx = r * (g - n * tl.where(rotates, mean, 0.0)[:, None])
        tl.store(dqkv_ptr + cell, dx.to(dqkv_ptr.dtype.element_ty), mask=inside)
    if NORM != 0:
        sums = dweight_ptr + (program * (Q_BLOCKS + KV_BLOCKS) + block) * WIDTH
        if NORM == 2:
            tl.store(sums + head * K + c, dweight, mask=inside & rotates)
        else:
            column = tl.arange(0, BLOCK_K)
            tl.store(sums + column, tl.sum(dweight, axis=0), mask=(column < K) & rotates)


def _launch_backward(
    grads: tuple[Tensor, Tensor, Tensor],
    qkv: Tensor | None,
    positions: Tensor,
    cos_sin: Tensor,
    heads: Heads,
    q_norm: Norm | None,
    k_norm: Norm | None,
    clip: float | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dqkv and the gradients of the norms' weights."""
    (H, G, K), num_tokens = heads, len(positions)
    dq = grads[0]
    dqkv = torch.empty(num_tokens, (H + 2 * G) * K, dtype=dq.dtype, device=dq.device)
    norm, block_h = _NO_NORM, 4
    q_weight = k_weight = cos_sin
    q_eps = k_eps = 0.0
    if q_norm is not None and k_norm is not None:
        q_weight, k_weight, q_eps, k_eps = q_norm.weight, k_norm.weight, q_norm.eps, k_norm.eps
        norm = _HEAD_NORM if q_weight.numel() == K else _FULL_NORM
        block_h = next_power_of_2(max(H, G)) if norm == _FULL_NORM else 4
    rows = max(1, cdiv(num_tokens, _PROGRAMS_PER_SM * num_sms(dq.device)))
    programs, q_blocks, kv_blocks = cdiv(num_tokens, rows), cdiv(H, block_h), cdiv(G, block_h)
    width = block_h * K if norm == _FULL_NORM else K
    sums = None
    if norm != _NO_NORM:
        shape = (programs, q_blocks + kv_blocks, width)
        sums = torch.zeros(shape, dtype=torch.float32, device=dq.device)
    if num_tokens:
        launch(
            _split_heads_backward_kernel,
            (programs, q_blocks + 2 * kv_blocks),
            *grads,
            dqkv if qkv is None else qkv,
            dqkv,
            positions,
            cos_sin,
            q_weight,
            k_weight,
            sums,
            num_tokens,
            rows,
            q_eps,
            k_eps,
            clip or 0.0,
            *(H, G, K, cos_sin.shape[1] // 2, norm, clip is not None),
            BLOCK_H=block_h,
            BLOCK_K=next_power_of_2(K),
            num_warps=min(max(block_h * next_power_of_2(K) // 256, 1), 8),
        )
    if sums is None:
        return dqkv, None, None
    total = sums.sum(0)
    dweights = total[:q_blocks].sum(0), total[q_blocks:].sum(0)
    dq_weight, dk_weight = (
        d[: w.numel()].to(w.dtype) for d, w in zip(dweights, (q_weight, k_weight), strict=True)
    )
    return dqkv, dq_weight, dk_weight


class _SplitHeads(torch.autograd.Function):
    """The Triton kernels."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        cos_sin: Tensor,
        positions: Tensor,
        heads: Heads,
        eps: tuple[float, float],
        clip: float | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        qkv, T = qkv.contiguous(), qkv.shape[0]
        # A cache of pages of one token each, in the tokens' order.
        k, v = torch.empty(2, T, 1, *heads[1:], dtype=qkv.dtype, device=qkv.device)
        q = rope_and_cache(
            qkv,
            k,
            v,
            torch.arange(T, device=qkv.device),
            positions,
            cos_sin,
            num_heads=heads.num_heads,
            num_kv_heads=heads.num_kv_heads,
            head_dim=heads.head_dim,
            q_norm=_rmsnorm(q_weight, eps[0]),
            k_norm=_rmsnorm(k_weight, eps[1]),
            clip=clip,
        )
        saved = None if q_weight is None and clip is None else qkv
        ctx.save_for_backward(saved, q_weight, k_weight, cos_sin, positions)
        ctx.options = heads, eps, clip
        return q, k[:, 0], v[:, 0]

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        qkv, q_weight, k_weight, cos_sin, positions = ctx.saved_tensors
        heads, eps, clip = ctx.options
        norms = _rmsnorm(q_weight, eps[0]), _rmsnorm(k_weight, eps[1])
        grads = dq.contiguous(), dk.contiguous(), dv.contiguous()
        result = _launch_backward(grads, qkv, positions, cos_sin, heads, *norms, clip)
        return *result, None, None, None, None, None


class _SplitHeadsNative(torch.autograd.Function):
    """For the CPU, without norm and clip."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos_sin: Tensor, positions: Tensor, heads: Heads
    ) -> tuple[Tensor, Tensor, Tensor]:
        H, G, K = heads
        ctx.save_for_backward(cos_sin, positions)
        ctx.heads = heads
        if positions.dtype is torch.int64 and cpu.fits(qkv, cos_sin):
            return cpu.split_heads(qkv, cos_sin, positions.contiguous(), H, G)
        q, k, v = qkv.view(len(qkv), H + 2 * G, K).split([H, G, G], dim=1)
        rows = cos_sin[positions]
        return (
            _turn(q, rows, torch.empty_like(q, memory_format=torch.contiguous_format)),
            _turn(k, rows, torch.empty_like(k, memory_format=torch.contiguous_format)),
            v.contiguous(),
        )

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        cos_sin, positions = ctx.saved_tensors
        H, G, K = ctx.heads
        dq, dk, dv = dq.contiguous(), dk.contiguous(), dv.contiguous()
        if positions.dtype is torch.int64 and cpu.fits(dq, cos_sin):
            dqkv = cpu.join_heads(dq, dk, dv, cos_sin, positions.contiguous())
            return dqkv, None, None, None
        dqkv = dq.new_empty(len(positions), H + 2 * G, K)
        to_q, to_k, to_v = dqkv.split([H, G, G], dim=1)
        cos, sin = cos_sin[positions].chunk(2, dim=-1)
        rows = torch.cat([cos, -sin], dim=-1)
        _turn(dq, rows, to_q)
        _turn(dk, rows, to_k)
        to_v.copy_(dv)
        return dqkv.flatten(1), None, None, None


def _turn(x: Tensor, cos_sin: Tensor, out: Tensor) -> Tensor:
    """`_rotate` into `out` of x's dtype."""
    half = cos_sin.shape[-1] // 2
    cos, sin = cos_sin.to(x.dtype)[:, None].split(half, dim=-1)
    sizes = [half, half, x.shape[-1] - 2 * half]
    (first, second, rest), (to_first, to_second, to_rest) = x.split(sizes, -1), out.split(sizes, -1)
    torch.mul(first, cos, out=to_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=to_second).addcmul_(first, sin)
    to_rest.copy_(rest)
    return out


def _rmsnorm(weight: Tensor | None, eps: float) -> Norm | None:
    return None if weight is None else Norm("rmsnorm", weight, None, eps)


def split_heads(
    qkv: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
    clip: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of tokens, normed, clipped and rotated; with gradients.

    Args:
        qkv: (T, (H + 2G) * K), per token all query heads, all key heads, all value heads.
        cos_sin: (P, rotary_dim) fp32, of `rope_table`.
        positions: (T,) int64 or int32, rows of cos_sin.
        q_norm, k_norm: RMS norms before the rotation, both or neither; over each head when the weight is
            (K,), over the whole query or key vector when it is (H*K,) and (G*K,).
        clip: queries, keys and values are limited to [-clip, clip], between norm and rotation.

    Returns q (T, H, K), k (T, G, K), v (T, G, K), contiguous, in qkv's dtype; computed in fp32 and rounded
    once. Gradients flow to qkv and to the weights of the norms.
    """
    heads = Heads(num_heads, num_kv_heads, head_dim)
    width = (num_heads + 2 * num_kv_heads) * head_dim
    if qkv.dim() != 2 or qkv.shape[1] != width:
        raise UsageError(f"split_heads takes qkv (T, {width}), got {tuple(qkv.shape)}")
    if (q_norm is None) != (k_norm is None):
        raise UsageError("split_heads takes q_norm and k_norm, both or neither")
    run = implementation(qkv)
    plain = q_norm is None and clip is None and qkv.dtype is torch.float32
    if run == "native" and plain:
        return _SplitHeadsNative.apply(qkv, cos_sin, positions, heads)
    if run != "triton":
        return split_heads_reference(qkv, cos_sin, positions, heads, q_norm, k_norm, clip)
    norms = q_norm, k_norm
    weights = [None if norm is None else norm.weight for norm in norms]
    eps = tuple(0.0 if norm is None else norm.eps for norm in norms)
    return _SplitHeads.apply(qkv, *weights, cos_sin, positions, heads, eps, clip)


for _name, _heads, _norm in (
    ("moe", Heads(12, 1, 64), _NO_NORM),
    ("head_norm", Heads(32, 8, 128), _HEAD_NORM),
    ("full_norm_clip", Heads(16, 16, 128), _FULL_NORM),
):
    _block = 16 if _norm == _FULL_NORM else 4
    register_compile(
        _split_heads_backward_kernel,
        f"split_heads_backward_{_name}",
        dict.fromkeys(("dq_ptr", "dk_ptr", "dv_ptr", "qkv_ptr", "dqkv_ptr"), "*bf16")
        | {"positions_ptr": "*i64", "cos_sin_ptr": "*fp32"}
        | {"q_weight_ptr": "*bf16", "k_weight_ptr": "*bf16", "dweight_ptr": "*fp32"}
        | {"T": "i32:16", "rows": "i32", "q_eps": "fp32", "k_eps": "fp32", "clip": "fp32"},
        {"H": _heads[0], "G": _heads[1], "K": _heads[2], "HALF": _heads[2] // 2, "NORM": _norm}
        | {"CLIP": _norm == _FULL_NORM, "BLOCK_H": _block, "BLOCK_K": _heads[2]},
        num_warps=max(_block * _heads[2] // 256, 1),
    )
