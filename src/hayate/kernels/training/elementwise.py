"""Activations of an MLP with gradients.

    silu_and_mul([gate, up]) = silu(gate) up        dgate = dy up s (1 + gate (1 - s))        dup = dy silu(gate)
    relu2(x) = max(x, 0)^2                          dx = 2 dy max(x, 0)

with s = sigmoid(gate).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import hayate.kernels.elementwise as forward_kernels
from hayate.errors import UsageError
from hayate.kernels._triton import cdiv, launch, register_compile, tl, triton
from hayate.kernels.training import cpu
from hayate.kernels.training._dispatch import implementation
from hayate.kernels.training.expert_rows import swiglu_backward

__all__ = ["relu2", "silu_and_mul"]

_BLOCK = 1024


@triton.jit
def _relu2_backward_kernel(x_ptr, dy_ptr, dx_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + i, mask=i < n, other=0.0).to(tl.float32)
    dx = 2.0 * dy * tl.maximum(x, 0.0)
    tl.store(dx_ptr + i, dx.to(dx_ptr.dtype.element_ty), mask=i < n)


register_compile(
    _relu2_backward_kernel,
    "relu2_backward",
    {"x_ptr": "*bf16", "dy_ptr": "*bf16", "dx_ptr": "*bf16", "n": "i32:16"},
    {"BLOCK": _BLOCK},
)


class _SiluAndMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        h = h.contiguous()
        ctx.save_for_backward(h)
        return cpu.swiglu(h) if cpu.fits(h) else forward_kernels.silu_and_mul(h)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (h,) = ctx.saved_tensors
        if implementation(h) == "triton":
            return swiglu_backward(h, dy.contiguous())[0] if h.numel() else torch.empty_like(h)
        if cpu.fits(h) and dy.dtype is h.dtype:
            return cpu.swiglu_backward(h, dy.contiguous())[0]
        gate, up = h.float().chunk(2, dim=1)
        dy = dy.float()
        dh = torch.empty_like(h)
        dgate, dup = dh.chunk(2, dim=1)
        dgate.copy_(torch.ops.aten.silu_backward(dy * up, gate))
        dup.copy_(torch.nn.functional.silu(gate).mul_(dy))
        return dh


class _Relu2(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        h = h.contiguous()
        ctx.save_for_backward(h)
        return forward_kernels.relu2(h)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (h,) = ctx.saved_tensors
        dy, n = dy.contiguous(), h.numel()
        if implementation(h) != "triton":
            return (h.float().relu_().mul_(2) * dy).to(h.dtype)
        dh = torch.empty_like(h)
        if n:
            launch(_relu2_backward_kernel, (cdiv(n, _BLOCK),), h, dy, dh, n, BLOCK=_BLOCK)
        return dh


def silu_and_mul(h: Tensor) -> Tensor:
    """silu(gate) * up, where h (T, 2F) is [gate, up]; (T, F) of h's dtype, with a gradient."""
    if h.dim() != 2 or h.shape[1] % 2:
        raise UsageError(f"silu_and_mul takes h (T, 2F), got {tuple(h.shape)}")
    if implementation(h) == "reference":
        return forward_kernels.silu_and_mul_reference(h)
    return _SiluAndMul.apply(h)


def relu2(h: Tensor) -> Tensor:
    """max(h, 0)^2, any shape; a new tensor of h's dtype, with a gradient."""
    if implementation(h) == "reference":
        return forward_kernels.relu2_reference(h)
    return _Relu2.apply(h)
