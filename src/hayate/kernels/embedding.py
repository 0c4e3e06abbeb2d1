"""Token embedding: one row of a table for each token.

out[t] = weight[token_ids[t]] * scale
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from hayate.kernels import cpu
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


def embedding_reference(token_ids: Tensor, weight: Tensor, scale: float = 1.0) -> Tensor:
    """The specification of `embedding`."""
    rows = F.embedding(token_ids, weight)
    return rows if scale == 1.0 else (rows.float() * scale).to(weight.dtype)


@triton.jit
def _embedding_kernel(
    token_ids_ptr,  # (T,)
    weight_ptr,  # (V, D)
    out_ptr,  # (T, D), written
    scale,
    D: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (t, b) copies BLOCK columns of row t."""
    gdc_launch_dependents(PDL)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gdc_wait(PDL)
    row = tl.load(token_ids_ptr + token).to(tl.int64)
    x = tl.load(weight_ptr + row * D + column, mask=column < D)
    if SCALED:
        x = (x.to(tl.float32) * scale).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token * D + column, x, mask=column < D)


for _width, _scaled in ((4096, False), (576, False), (3072, True)):
    register_compile(
        _embedding_kernel,
        f"embedding_{_width}{'_scaled' if _scaled else ''}",
        {
            "token_ids_ptr": "*i64",
            "weight_ptr": "*bf16",
            "out_ptr": "*bf16",
            "scale": "fp32",
        },
        {"D": _width, "SCALED": _scaled, "BLOCK": 1024},
    )


def _embedding_triton(token_ids: Tensor, weight: Tensor, scale: float) -> Tensor:
    assert weight.is_contiguous()
    (num_tokens,), width = token_ids.shape, weight.shape[1]
    out = weight.new_empty(num_tokens, width)
    if num_tokens == 0:
        return out
    block = min(next_power_of_2(width), 1024)
    launch(
        _embedding_kernel,
        (num_tokens, triton.cdiv(width, block)),
        token_ids,
        weight,
        out,
        scale,
        D=width,
        SCALED=scale != 1.0,
        BLOCK=block,
        num_warps=4,
        # First kernel of a step: waits for all before it, so that others may read old state early.
        pdl=False,
    )
    return out


def embedding(token_ids: Tensor, weight: Tensor, scale: float = 1.0) -> Tensor:
    """Rows of the table, (T, D) in its dtype; scaled in fp32 and rounded once.

    token_ids (T,) int64 or int32, each in [0, V): the GPU kernel does not check; weight (V, D).
    """
    implementation = implementation_for(weight)
    if implementation == "triton":
        return _embedding_triton(token_ids, weight, scale)
    if implementation == "native" and scale == 1.0 and cpu.embedding_fits(token_ids, weight):
        return cpu.embedding(token_ids, weight)
    return embedding_reference(token_ids, weight, scale)
