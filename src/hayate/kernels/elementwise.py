"""Elementwise operations, in fp32 with one rounding at the end.

silu(x) = x * sigmoid(x)                                      (arXiv 1702.03118)
silu_and_mul([gate, up]) = silu(gate) * up, SwiGLU's product  (arXiv 2002.05202)
relu2(x) = max(x, 0)^2                                        (arXiv 2109.08668)
gelu_tanh(x) = x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2 (arXiv 1606.08415), also called gelu_new
add, mul of two tensors of one shape; scale by a number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hayate.errors import UsageError
from hayate.kernels._dispatch import implementation_for
from hayate.kernels._triton import (
    gdc_launch_dependents,
    gdc_wait,
    launch,
    register_compile,
    tl,
    triton,
)

__all__ = [
    "add",
    "add_reference",
    "gelu_tanh",
    "gelu_tanh_reference",
    "mul",
    "mul_reference",
    "relu2",
    "relu2_reference",
    "scale",
    "scale_reference",
    "silu",
    "silu_and_mul",
    "silu_and_mul_reference",
    "silu_reference",
]

# 128 lanes of 8 values: one 16-byte load a lane for 16-bit types.
_BLOCK = 1024


def silu_reference(x: Tensor) -> Tensor:
    """`silu` in PyTorch."""
    return torch.nn.functional.silu(x.float()).to(x.dtype)


def silu_and_mul_reference(x: Tensor) -> Tensor:
    """`silu_and_mul` in PyTorch."""
    gate, up = x.chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate.float()) * up).to(x.dtype)  # `up` promoted on the fly


def relu2_reference(x: Tensor) -> Tensor:
    """`relu2` in PyTorch."""
    return x.float().relu().square().to(x.dtype)


def gelu_tanh_reference(x: Tensor) -> Tensor:
    """`gelu_tanh` in PyTorch."""
    return torch.nn.functional.gelu(x.float(), approximate="tanh").to(x.dtype)


def add_reference(x: Tensor, y: Tensor) -> Tensor:
    """`add` in PyTorch."""
    return (x.float() + y.float()).to(x.dtype)


def mul_reference(x: Tensor, y: Tensor) -> Tensor:
    """`mul` in PyTorch."""
    return (x.float() * y.float()).to(x.dtype)


def scale_reference(x: Tensor, factor: float) -> Tensor:
    """`scale` in PyTorch."""
    return (x.float() * factor).to(x.dtype)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """silu, relu2 or gelu_tanh of an fp32 tile, or the tile itself for None; also in `linear`'s kernels."""
    if ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 = sigmoid(2 u); 1.5957... = 2 sqrt(2 / pi)
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "relu2":
        x = tl.maximum(x, 0.0)
        x = x * x
    return x


@triton.jit
def _unary_kernel(
    x_ptr, out_ptr, factor, n, OP: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    gdc_launch_dependents(PDL)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gdc_wait(PDL)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0).to(tl.float32)
    y = x * factor if OP == "scale" else activate(x, OP)
    tl.store(out_ptr + i, y.to(out_ptr.dtype.element_ty), mask=i < n)


@triton.jit
def _binary_kernel(
    x_ptr, y_ptr, out_ptr, n, OP: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    gdc_launch_dependents(PDL)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gdc_wait(PDL)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + i, mask=i < n, other=0.0).to(tl.float32)
    z = x + y if OP == "add" else x * y
    tl.store(out_ptr + i, z.to(out_ptr.dtype.element_ty), mask=i < n)


@triton.jit
def _silu_and_mul_kernel(
    x_ptr,
    out_ptr,
    x_stride,
    F,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    gdc_launch_dependents(PDL)
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = f < F
    gate_ptr = x_ptr + row * x_stride + f
    gdc_wait(PDL)
    gate = tl.load(gate_ptr, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + F, mask=inside, other=0.0).to(tl.float32)
    y = activate(gate, "silu") * up
    tl.store(out_ptr + row * F + f, y.to(out_ptr.dtype.element_ty), mask=inside)


for _op in ("silu", "relu2", "gelu_tanh", "scale"):
    register_compile(
        _unary_kernel,
        _op,
        {"x_ptr": "*bf16", "out_ptr": "*bf16", "factor": "fp32", "n": "i32:16"},
        {"OP": _op, "BLOCK": _BLOCK},
    )
for _op in ("add", "mul"):
    register_compile(
        _binary_kernel,
        _op,
        {"x_ptr": "*bf16", "y_ptr": "*bf16", "out_ptr": "*bf16", "n": "i32:16"},
        {"OP": _op, "BLOCK": _BLOCK},
    )
register_compile(
    _silu_and_mul_kernel,
    "silu_and_mul",
    {"x_ptr": "*bf16", "out_ptr": "*bf16", "x_stride": "i32:16", "F": "i32:16"},
    {"BLOCK": _BLOCK},
)


def _unary(x: Tensor, op: str, factor: float = 1.0) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    n = x.numel()
    if n:
        grid = (triton.cdiv(n, _BLOCK),)
        launch(_unary_kernel, grid, x, out, float(factor), n, OP=op, BLOCK=_BLOCK, num_warps=4)
    return out


def _binary(x: Tensor, y: Tensor, op: str) -> Tensor:
    x, y = x.contiguous(), y.contiguous()
    out = torch.empty_like(x)
    n = x.numel()
    if n:
        grid = (triton.cdiv(n, _BLOCK),)
        launch(_binary_kernel, grid, x, y, out, n, OP=op, BLOCK=_BLOCK, num_warps=4)
    return out


def _silu_and_mul(x: Tensor) -> Tensor:
    width = x.shape[-1] // 2
    rows = x.reshape(-1, 2 * width)
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    out = torch.empty((*x.shape[:-1], width), dtype=x.dtype, device=x.device)
    if out.numel():
        grid = (rows.shape[0], triton.cdiv(width, _BLOCK))
        launch(
            _silu_and_mul_kernel,
            grid,
            rows,
            out,
            rows.stride(0),
            width,
            BLOCK=_BLOCK,
            num_warps=4,
        )
    return out


def _check_same_shape(op: str, x: Tensor, y: Tensor) -> None:
    if x.shape != y.shape:
        raise UsageError(f"{op} takes two tensors of one shape, got {x.shape} and {y.shape}")


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x); any shape and float dtype, a new tensor of the same."""
    return _unary(x, "silu") if implementation_for(x) == "triton" else silu_reference(x)


def relu2(x: Tensor) -> Tensor:
    """max(x, 0)^2; any shape and float dtype, a new tensor of the same."""
    return _unary(x, "relu2") if implementation_for(x) == "triton" else relu2_reference(x)


def gelu_tanh(x: Tensor) -> Tensor:
    """x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2; any shape and float dtype, a new tensor of the same."""
    return _unary(x, "gelu_tanh") if implementation_for(x) == "triton" else gelu_tanh_reference(x)


def scale(x: Tensor, factor: float) -> Tensor:
    """x * factor; any shape and float dtype, a new tensor of the same."""
    if implementation_for(x) == "triton":
        return _unary(x, "scale", factor)
    return scale_reference(x, factor)


def add(x: Tensor, y: Tensor) -> Tensor:
    """x + y of two tensors of one shape; a new tensor of x's dtype."""
    _check_same_shape("add", x, y)
    return _binary(x, y, "add") if implementation_for(x) == "triton" else add_reference(x, y)


def mul(x: Tensor, y: Tensor) -> Tensor:
    """x * y of two tensors of one shape; a new tensor of x's dtype."""
    _check_same_shape("mul", x, y)
    return _binary(x, y, "mul") if implementation_for(x) == "triton" else mul_reference(x, y)


def silu_and_mul(x: Tensor) -> Tensor:
    """silu(gate) * up, where x (..., 2F) is [gate, up]; returns a new (..., F) of x's dtype."""
    if x.shape[-1] % 2:
        raise UsageError(f"silu_and_mul takes rows of even length [gate, up], got {x.shape[-1]}")
    return _silu_and_mul(x) if implementation_for(x) == "triton" else silu_and_mul_reference(x)
