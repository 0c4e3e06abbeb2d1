"""Linear layers with 4-bit weights in NF4: y = residual + act(norm(x) @ W^T + bias).

`nf4_weight` defines the format. The reference is `linear` with every weight rounded to x's dtype, as
in bitsandbytes. On a GPU, in 16 bits and with blocks of 64, few rows are one kernel's, `nf4_gemm`,
which rounds the codebook instead; all else is dequantised and given to `linear`:

- many rows, for which decoding is a sixth of the time or less;
- blocks of 16 and 32: only the matrix K = 4304 of a vision encoder, which has many rows;
- `batch_invariant()`, whose order of sums is that of `linear`;
- the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hayate.errors import UsageError
from hayate.kernels import cpu
from hayate.kernels._dispatch import implementation_for, is_batch_invariant
from hayate.kernels.elementwise import add, silu_and_mul
from hayate.kernels.linear import Activation, linear, linear_reference
from hayate.kernels.nf4_dequantize import launch_nf4_dequantize
from hayate.kernels.nf4_gemm import launch_nf4_gemm, nf4_gemm_fits, norm_fits
from hayate.kernels.nf4_weight import (
    NF4_CODEBOOK,
    NF4Weight,
    nf4_dequantize_reference,
    nf4_pack,
    nf4_quantize,
)
from hayate.kernels.norm import Norm, apply_norm

__all__ = [
    "NF4_CODEBOOK",
    "NF4Weight",
    "nf4_dequantize",
    "nf4_dequantize_reference",
    "nf4_linear",
    "nf4_linear_reference",
    "nf4_pack",
    "nf4_quantize",
]


def nf4_dequantize(weight: NF4Weight, dtype: torch.dtype) -> Tensor:
    """The matrix (N, K): codebook[code] * scale in fp32, rounded once to `dtype`."""
    implementation = implementation_for(weight.scales)
    if implementation == "triton":
        return launch_nf4_dequantize(weight, dtype)
    if implementation == "native" and cpu.nf4_dequantize_fits(weight, dtype):
        return cpu.nf4_dequantize(weight, dtype)
    return nf4_dequantize_reference(weight, dtype)


def nf4_linear_reference(
    x: Tensor,
    weight: NF4Weight,
    bias: Tensor | None = None,
    *,
    norm: Norm | None = None,
    activation: Activation | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """`nf4_linear` in PyTorch: `linear_reference` with the weight rounded to x's dtype."""
    w = nf4_dequantize_reference(weight, x.dtype)
    return linear_reference(x, w, bias, norm=norm, activation=activation, residual=residual)


def _few_rows(
    x: Tensor,
    weight: NF4Weight,
    bias: Tensor | None,
    norm: Norm | None,
    activation: Activation | None,
    residual: Tensor | None,
) -> Tensor:
    """`nf4_linear` where `nf4_gemm_fits`."""
    x = x if x.stride(1) == 1 else x.contiguous()
    if residual is not None and residual.stride(1) != 1:
        residual = residual.contiguous()
    if norm is not None and not norm_fits(x, norm):
        x, norm = apply_norm(x, norm), None
    if activation == "silu_and_mul" and x.shape[0] > 32:
        # Sums of gate and up for so many rows do not fit the registers together.
        y = silu_and_mul(launch_nf4_gemm(x, weight, bias, norm, None, None))
        return y if residual is None else add(residual, y)
    return launch_nf4_gemm(x, weight, bias, norm, activation, residual)


def nf4_linear(
    x: Tensor,
    weight: NF4Weight,
    bias: Tensor | None = None,
    *,
    norm: Norm | None = None,
    activation: Activation | None = None,
    residual: Tensor | None = None,
    overwrite_residual: bool = False,
) -> Tensor:
    """residual + act(norm(x) @ weight^T + bias), as `linear`, with a weight in NF4.

    x is (T, K), float32, float16 or bfloat16; the result (T, N), or (T, N / 2) with `silu_and_mul`,
    of x's dtype. Sums are taken in fp32.
    """
    if x.dim() != 2 or x.shape[1] != weight.in_features:
        raise UsageError(
            f"nf4_linear takes x (T, K) and a weight (N, K), got {tuple(x.shape)} and "
            f"{weight.shape}"
        )
    implementation = implementation_for(x)
    if implementation == "reference":
        return nf4_linear_reference(
            x, weight, bias, norm=norm, activation=activation, residual=residual
        )
    if implementation == "triton" and nf4_gemm_fits(x, weight) and not is_batch_invariant():
        return _few_rows(x, weight, bias, norm, activation, residual)
    if implementation == "native" and cpu.linear_fits(x, weight, norm, activation):
        return cpu.linear(x, weight, bias, norm=norm, activation=activation, residual=residual)
    return linear(
        x,
        nf4_dequantize(weight, x.dtype),
        bias,
        norm=norm,
        activation=activation,
        residual=residual,
        overwrite_residual=overwrite_residual,
    )
