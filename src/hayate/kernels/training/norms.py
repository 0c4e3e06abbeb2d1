"""`rmsnorm` and `layernorm1p` of `hayate.kernels.norm`, with gradients.

With r = 1 / sqrt(mean(x^2) + eps), n = x r and g = dy weight, over the last axis:

    dx = r (g - n mean(g n))        dweight = sum over rows of dy n        dbias = sum over rows of dy

layernorm1p centres x first, has 1 + weight in the place of weight, and subtracts mean(g) from g as well.
Everything in fp32. The sums over rows are taken in a fixed order: a program sums its own rows one after
another, then the programs' sums are added up.
"""

from __future__ import annotations

from typing import Any

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
from hayate.kernels.norm import Norm, apply_norm, apply_norm_reference
from hayate.kernels.training import cpu
from hayate.kernels.training._dispatch import implementation

__all__ = ["norm"]

MAX_WIDTH = 16384  # a row, its gradient and the sums stay in registers
_PROGRAMS_PER_SM = 4

Gradients = tuple[Tensor, Tensor, Tensor | None]


@triton.jit
def _norm_backward_kernel(
    x_ptr,  # (T, D)
    dy_ptr,
    weight_ptr,
    dx_ptr,
    dweight_ptr,  # (programs, D) fp32
    dbias_ptr,  # None, or (programs, D) fp32
    T,
    D,
    eps,
    rows,  # a program
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,  # at least D
):
    program = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    inside = d < D
    weight = tl.load(weight_ptr + d, mask=inside, other=0.0).to(tl.float32)
    if KIND == "layernorm1p":
        weight += 1.0
    dweight = tl.zeros((BLOCK,), tl.float32)
    dbias = tl.zeros((BLOCK,), tl.float32)
    for row in range(program * rows, tl.minimum((program + 1) * rows, T)):
        x = tl.load(x_ptr + row * D + d, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * D + d, mask=inside, other=0.0).to(tl.float32)
        if KIND == "layernorm1p":
            x = tl.where(inside, x - tl.sum(x, axis=0) / D, 0.0)
        r = tl.rsqrt(tl.sum(x * x, axis=0) / D + eps)
        n = x * r
        g = tl.where(inside, dy * weight, 0.0)
        dx = g - n * (tl.sum(g * n, axis=0) / D)
        if KIND == "layernorm1p":
            dx -= tl.sum(g, axis=0) / D
        tl.store(dx_ptr + row * D + d, (dx * r).to(dx_ptr.dtype.element_ty), mask=inside)
        dweight += dy * n
        dbias += dy
    tl.store(dweight_ptr + program * D + d, dweight, mask=inside)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + program * D + d, dbias, mask=inside)


for _kind, _nones in (("rmsnorm", {"dbias_ptr": None}), ("layernorm1p", {})):
    register_compile(
        _norm_backward_kernel,
        f"{_kind}_backward",
        {"x_ptr": "*bf16", "dy_ptr": "*bf16", "weight_ptr": "*bf16", "dx_ptr": "*bf16"}
        | {"dweight_ptr": "*fp32", "dbias_ptr": "*fp32", "T": "i32:16", "D": "i32:16"}
        | {"eps": "fp32", "rows": "i32"},
        {"KIND": _kind, "BLOCK": 1024} | _nones,
        num_warps=4,
    )


def _backward_triton(x: Tensor, dy: Tensor, norm: Norm) -> Gradients:
    T, D = x.shape
    rows = max(1, cdiv(T, _PROGRAMS_PER_SM * num_sms(x.device)))
    programs = cdiv(T, rows)
    dx = torch.empty_like(x)
    sums = torch.empty(
        1 if norm.bias is None else 2, programs, D, dtype=torch.float32, device=x.device
    )
    block = next_power_of_2(D)
    if T:
        launch(
            _norm_backward_kernel,
            (programs,),
            x,
            dy,
            norm.weight,
            dx,
            sums[0],
            None if norm.bias is None else sums[1],
            T,
            D,
            norm.eps,
            rows,
            KIND=norm.kind,
            BLOCK=block,
            num_warps=min(32, max(1, block // 256)),
        )
    dweight, *dbias = sums.sum(1).to(norm.weight.dtype)
    return dx, dweight, dbias[0] if dbias else None


def _backward_cpu(x: Tensor, dy: Tensor, norm: Norm) -> Gradients:
    if norm.kind == "rmsnorm" and cpu.fits(x, dy, norm.weight):
        return *cpu.rmsnorm_backward(x, dy, norm.weight, norm.eps), None
    x, dy, weight = x.float(), dy.float(), norm.weight.float()
    if norm.kind == "layernorm1p":
        x, weight = x - x.mean(-1, keepdim=True), weight + 1
    width = x.shape[1]
    r = (torch.linalg.vecdot(x, x) / width + norm.eps).rsqrt_()
    g = dy * weight
    pull = torch.linalg.vecdot(g, x) * r.pow(3) / -width
    if norm.kind == "layernorm1p":
        g -= g.mean(-1, keepdim=True)
    dx = g.mul_(r[:, None]).addcmul_(x, pull[:, None])
    dweight = torch.mv((x * dy).T, r).to(norm.weight.dtype)
    return dx, dweight, None if norm.bias is None else dy.sum(0).to(norm.bias.dtype)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, kind: Any, eps: float
    ) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, weight, bias)
        ctx.options = kind, eps
        if kind == "rmsnorm" and cpu.fits(x, weight):
            return cpu.rmsnorm(x, weight, eps)
        return apply_norm(x, Norm(kind, weight, bias, eps))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        kind, eps = ctx.options
        backward = _backward_triton if implementation(x) == "triton" else _backward_cpu
        dx, dweight, dbias = backward(x, dy.contiguous(), Norm(kind, weight, bias, eps))
        return dx.to(x.dtype), dweight, dbias, None, None


def norm(x_TD: Tensor, norm: Norm) -> Tensor:
    """`apply_norm` with gradients to x, weight and bias.

    x_TD (T, D), any float dtype, D at most 16384; weight and bias (D,). Returns (T, D) in x's dtype. Gradients
    have the dtype of what they belong to; those of weight and bias are summed in fp32 in a fixed order.
    """
    if x_TD.dim() != 2 or norm.weight.shape != x_TD.shape[1:] or x_TD.shape[1] > MAX_WIDTH:
        raise UsageError(
            f"norm takes x (T, D), D at most {MAX_WIDTH}, and a weight (D,), got {tuple(x_TD.shape)} and "
            f"{tuple(norm.weight.shape)}"
        )
    if implementation(x_TD) == "reference":
        return apply_norm_reference(x_TD, norm)
    return _Norm.apply(x_TD, norm.weight, norm.bias, norm.kind, norm.eps)
