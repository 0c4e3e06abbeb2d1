"""Normalisation over the last axis.

rmsnorm:      y = x / sqrt(mean(x^2) + eps) * weight                    (arXiv 1910.07467)
layernorm:    y = (x - mean) / sqrt(var + eps) * weight + bias          (arXiv 1607.06450)
layernorm1p:  y = (x - mean) / sqrt(var + eps) * (1 + weight) + bias
              Nemotron's form: the stored weight is the deviation from one; population variance in both.

All of it in fp32, one rounding at the end.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from hayate.errors import UsageError
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

__all__ = [
    "Norm",
    "NormKind",
    "apply_norm",
    "apply_norm_reference",
    "layernorm",
    "layernorm1p",
    "layernorm1p_reference",
    "layernorm_reference",
    "rmsnorm",
    "rmsnorm_reference",
    "rmsnorm_residual",
    "rmsnorm_residual_reference",
]

# One program holds a whole row in registers: 32 warps of 64 fp32 values a lane.
MAX_WIDTH = 65536


NormKind = Literal["rmsnorm", "layernorm", "layernorm1p"]


class Norm(NamedTuple):
    """A normalisation and its parameters, as `linear` and `apply_norm` take it."""

    kind: NormKind
    weight: Tensor  # (D,)
    bias: Tensor | None  # (D,), None for rmsnorm
    eps: float


def rmsnorm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rmsnorm` in PyTorch."""
    x32 = x.float()
    scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return (x32 * scale * weight).to(x.dtype)  # weight promoted on the fly


def rmsnorm_residual_reference(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`rmsnorm_residual` in PyTorch."""
    total = x.float() + residual.float()
    scale = torch.rsqrt(total.square().mean(-1, keepdim=True) + eps)
    return (total * scale * weight.float()).to(x.dtype), total.to(x.dtype)


def layernorm1p_reference(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """`layernorm1p` in PyTorch."""
    return layernorm_reference(x, 1 + weight.float(), bias, eps)


def layernorm_reference(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """`layernorm` in PyTorch."""
    x32 = x.float()
    centred = x32 - x32.mean(-1, keepdim=True)
    scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    y = centred * scale * weight.float()
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype)


def apply_norm_reference(x: Tensor, norm: Norm) -> Tensor:
    """`apply_norm` in PyTorch."""
    if norm.kind == "rmsnorm":
        return rmsnorm_reference(x, norm.weight, norm.eps)
    layer = layernorm_reference if norm.kind == "layernorm" else layernorm1p_reference
    return layer(x, norm.weight, norm.bias, norm.eps)


@triton.jit
def _norm_kernel(
    x_ptr,
    residual_ptr,  # None, or added to x first
    weight_ptr,
    bias_ptr,  # None, or of a layernorm
    out_ptr,
    total_ptr,  # None, or where x + residual goes
    x_stride,
    residual_stride,
    D,
    eps,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,  # at least D
    PDL: tl.constexpr,
):
    gdc_launch_dependents(PDL)
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    inside = d < D
    weight = tl.load(weight_ptr + d, mask=inside, other=0.0).to(tl.float32)
    gdc_wait(PDL)
    x = tl.load(x_ptr + row * x_stride + d, mask=inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + row * residual_stride + d, mask=inside, other=0.0)
        x += residual.to(tl.float32)
        tl.store(total_ptr + row * D + d, x.to(total_ptr.dtype.element_ty), mask=inside)
    if KIND != "rmsnorm":
        x = tl.where(inside, x - tl.sum(x, axis=0) / D, 0.0)
    if KIND == "layernorm1p":
        weight += 1.0
    y = x * tl.rsqrt(tl.sum(x * x, axis=0) / D + eps) * weight
    if bias_ptr is not None:
        y += tl.load(bias_ptr + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * D + d, y.to(out_ptr.dtype.element_ty), mask=inside)


for _kind, _pointers, _nones in [
    ("rmsnorm", ("x", "weight", "out"), ("residual", "bias", "total")),
    ("rmsnorm_residual", ("x", "residual", "weight", "out", "total"), ("bias",)),
    ("layernorm", ("x", "weight", "bias", "out"), ("residual", "total")),
    ("layernorm1p", ("x", "weight", "bias", "out"), ("residual", "total")),
]:
    register_compile(
        _norm_kernel,
        _kind,
        {
            **{f"{name}_ptr": "*bf16" for name in _pointers},
            "x_stride": "i32:16",
            "residual_stride": "i32:16",
            "D": "i32:16",
            "eps": "fp32",
        },
        {
            **{f"{name}_ptr": None for name in _nones},
            "KIND": _kind.removesuffix("_residual"),
            "BLOCK": 4096,
        },
        num_warps=8,
    )


def _launch_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    kind: str,
) -> tuple[Tensor, Tensor | None]:
    """Run the kernel; returns (normed, x + residual or None)."""
    shape, width = x.shape, x.shape[-1]
    if width > MAX_WIDTH:
        raise UsageError(f"{kind} takes rows of at most {MAX_WIDTH} values, got {width}")
    x_rows = _rows(x)
    residual_rows = None if residual is None else _rows(residual)
    out = torch.empty(shape, dtype=x.dtype, device=x.device)
    total = None if residual is None else torch.empty_like(out)
    if x.numel():
        block = next_power_of_2(width)
        launch(
            _norm_kernel,
            (x_rows.shape[0],),
            x_rows,
            residual_rows,
            weight,
            bias,
            out,
            total,
            x_rows.stride(0),
            0 if residual_rows is None else residual_rows.stride(0),
            width,
            eps,
            KIND=kind,
            BLOCK=block,
            # 8 to 16 values a lane, so that a row costs one or two 16-byte loads of each operand
            num_warps=min(32, max(1, block // 512)),
        )
    return out, total


def _rows(x: Tensor) -> Tensor:
    """`x` as (rows, D) with contiguous rows; copies only where the strides leave no other way."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _check_vector(name: str, vector: Tensor, x: Tensor) -> None:
    if vector.shape != x.shape[-1:]:
        raise UsageError(
            f"{name} has shape {tuple(vector.shape)}, but x has rows of {x.shape[-1]} values"
        )


def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis.

    Args:
        x: (..., D), any float dtype.
        weight: (D,).

    Returns a new (..., D) tensor of x's dtype.
    """
    _check_vector("weight", weight, x)
    if implementation_for(x) == "triton":
        return _launch_norm(x, None, weight, None, eps, "rmsnorm")[0]
    return rmsnorm_reference(x, weight, eps)


def rmsnorm_residual(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(rmsnorm(x + residual), x + residual), the sum taken in fp32 and rounded only as stored.

    Args:
        x, residual: (..., D), the same shape. Neither is changed.
        weight: (D,).

    Returns two new (..., D) tensors of x's dtype: the normalised sum and the sum.
    """
    _check_vector("weight", weight, x)
    if residual.shape != x.shape:
        raise UsageError(f"residual has shape {tuple(residual.shape)}, x {tuple(x.shape)}")
    if implementation_for(x) == "triton":
        normed, total = _launch_norm(x, residual, weight, None, eps, "rmsnorm")
        assert total is not None
        return normed, total
    return rmsnorm_residual_reference(x, residual, weight, eps)


def layernorm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis.

    Args:
        x: (..., D), any float dtype.
        weight: (D,).
        bias: (D,) or None.

    Returns a new (..., D) tensor of x's dtype.
    """
    return apply_norm(x, Norm("layernorm", weight, bias, eps))


def layernorm1p(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * (1 + weight) + bias over the last axis.

    Args: as of `layernorm`, but `weight` is the deviation from one.
    """
    return apply_norm(x, Norm("layernorm1p", weight, bias, eps))


def apply_norm(x: Tensor, norm: Norm) -> Tensor:
    """`rmsnorm`, `layernorm` or `layernorm1p` of `x` (..., D), as `norm` says."""
    if norm.kind == "rmsnorm":
        return rmsnorm(x, norm.weight, norm.eps)
    _check_vector("weight", norm.weight, x)
    if norm.bias is not None:
        _check_vector("bias", norm.bias, x)
    if implementation_for(x) == "triton":
        return _launch_norm(x, None, norm.weight, norm.bias, norm.eps, norm.kind)[0]
    return apply_norm_reference(x, norm)
