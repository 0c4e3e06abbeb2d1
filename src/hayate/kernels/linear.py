"""Linear layers with what surrounds them: y = residual + act(norm(x) @ weight^T + bias).

On a GPU the number of rows T decides who does it:

| rows    | how                                                                        |
|---------|----------------------------------------------------------------------------|
| 1       | `gemv`: one kernel, everything fused                                       |
| 2..64   | norm kernel, then `small_gemm`: activation and residual fused              |
| above   | norm kernel, cuBLAS (with the residual, where it can), activation kernel;  |
|         | for sizes where it is faster `invariant_linear`, everything fused          |

What enters the tensor cores, norm(x), is rounded to x's dtype; `gemv` keeps all in fp32.

On the CPU the native kernel does what it covers, and PyTorch the rest.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from hayate.errors import UsageError
from hayate.kernels import cpu, elementwise
from hayate.kernels._dispatch import implementation_for, interpreting, is_batch_invariant
from hayate.kernels.gemv import launch_gemv
from hayate.kernels.invariant_linear import faster_than_library, launch_invariant_linear
from hayate.kernels.norm import Norm, apply_norm, apply_norm_reference
from hayate.kernels.small_gemm import MAX_ROWS as SMALL_GEMM_MAX_ROWS
from hayate.kernels.small_gemm import launch_small_gemm

__all__ = ["Activation", "gemm", "gemm_batched", "gemv", "linear", "linear_reference"]

Activation = Literal["relu2", "gelu_tanh", "silu_and_mul", "silu"]

_ACTIVATIONS = {
    "relu2": (elementwise.relu2, elementwise.relu2_reference),
    "gelu_tanh": (elementwise.gelu_tanh, elementwise.gelu_tanh_reference),
    "silu": (elementwise.silu, elementwise.silu_reference),
    "silu_and_mul": (elementwise.silu_and_mul, elementwise.silu_and_mul_reference),
}
# What `gemv` takes; which kernel runs is `linear`'s choice.
_FEW_ROWS = 16


def linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Norm | None = None,
    activation: Activation | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """`linear` in PyTorch; the product runs in x's dtype, norm and activation in fp32."""
    if norm is not None:
        x = apply_norm_reference(x, norm)
    y = torch.nn.functional.linear(x, weight, bias)
    if activation is not None:
        y = _ACTIVATIONS[activation][1](y)
    return y if residual is None else residual + y


def _linear_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Norm | None,
    activation: Activation | None,
    residual: Tensor | None,
    overwrite_residual: bool,
) -> Tensor:
    rows = x.shape[0]
    x = x if x.stride(1) == 1 else x.contiguous()
    if residual is not None and residual.stride(1) != 1:
        residual = residual.contiguous()
    if is_batch_invariant():
        x = x if norm is None else apply_norm(x, norm)
        return launch_invariant_linear(x, weight.contiguous(), bias, activation, residual)
    ours = rows > 0 and weight.is_contiguous()
    if ours and rows == 1:
        return launch_gemv(x, weight, bias, norm, activation, residual)
    if norm is not None:
        x = apply_norm(x, norm)
    # fp32 has no tensor core of its own; in the interpreter the kernel is run all the same.
    ours = ours and (x.element_size() == 2 or interpreting())
    if ours and rows <= SMALL_GEMM_MAX_ROWS:
        return launch_small_gemm(x, weight, bias, activation, residual)
    if ours and x.is_cuda and faster_than_library(rows, weight, activation):
        return launch_invariant_linear(x, weight, bias, activation, residual)
    if residual is not None and activation is None and bias is None:
        if overwrite_residual:
            return residual.addmm_(x, weight.t())
        return torch.addmm(residual, x, weight.t())
    y = torch.nn.functional.linear(x, weight, bias)
    if activation is not None:
        y = _ACTIVATIONS[activation][0](y)
    return y if residual is None else elementwise.add(residual, y)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Norm | None = None,
    activation: Activation | None = None,
    residual: Tensor | None = None,
    overwrite_residual: bool = False,
) -> Tensor:
    """residual + act(norm(x) @ weight^T + bias).

    Args:
        x: (T, D), float32, float16 or bfloat16.
        weight: (N, D) of x's dtype, row-major as in the checkpoint; with `silu_and_mul` (2F, D),
            the rows of the gate first, then those of `up`.
        bias: (N,).
        norm: taken of the rows of x first.
        activation: relu2(y) = max(y, 0)^2; silu(y) = y * sigmoid(y); gelu_tanh as in `elementwise`;
            silu_and_mul([gate, up]) = silu(gate) * up.
        residual: (T, N), or (T, F) with `silu_and_mul`; not changed, unless the next is true.
        overwrite_residual: the result may take the memory of `residual`, which then holds it: saves
            the copy that PyTorch's matrix product with an addend begins with.

    Returns (T, N) or (T, F), of x's dtype. Sums are taken in fp32.
    """
    if x.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise UsageError(
            f"linear takes x (T, D) and weight (N, D), got {tuple(x.shape)} and "
            f"{tuple(weight.shape)}"
        )
    if x.dtype != weight.dtype:
        raise UsageError(f"linear takes x and weight of one dtype, got {x.dtype}, {weight.dtype}")
    implementation = implementation_for(x)
    if implementation == "triton" and not (weight.requires_grad and torch.is_grad_enabled()):
        return _linear_triton(x, weight, bias, norm, activation, residual, overwrite_residual)
    if implementation == "native" and cpu.linear_fits(x, weight, norm, activation):
        return cpu.linear(x, weight, bias, norm=norm, activation=activation, residual=residual)
    return linear_reference(x, weight, bias, norm=norm, activation=activation, residual=residual)


def gemv(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight^T for few rows: x (D,) or (T, D) with T <= 16, weight (N, D); (N,) or (T, N)."""
    rows = x if x.dim() == 2 else x.unsqueeze(0)
    if rows.shape[0] > _FEW_ROWS:
        raise UsageError(f"gemv takes at most {_FEW_ROWS} rows, got {rows.shape[0]}: use gemm")
    return linear(rows, weight).reshape(*x.shape[:-1], weight.shape[0])


def gemm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of two matrices (M, K) and (K, N), by PyTorch's library on every device."""
    return torch.mm(a, b)


def gemm_batched(a: Tensor, b: Tensor) -> Tensor:
    """a[i] @ b[i] for (S, M, K) and (S, K, N), by PyTorch's library on every device."""
    return torch.bmm(a, b)
