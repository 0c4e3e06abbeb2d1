"""Softmax over the last axis, and softmax with a choice of the top A, as a router needs it.

softmax(x)_i = exp(x_i - max x) / sum_j exp(x_j - max x), in fp32. Rows too long for registers are
read twice, the first time with a running maximum and a running sum (arXiv 1805.02867).
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
    next_power_of_2,
    register_compile,
    tl,
    triton,
)

__all__ = ["softmax", "softmax_reference", "softmax_topk", "softmax_topk_reference"]

# A row up to this length stays in registers (32 fp32 values a lane with 16 warps).
_MAX_BLOCK = 16384
# softmax_topk holds a row of all E logits in the lanes of one warp.
MAX_EXPERTS = 1024


def softmax_reference(x: Tensor) -> Tensor:
    """`softmax` in PyTorch."""
    return torch.softmax(x.float(), dim=-1).to(x.dtype)


def softmax_topk_reference(
    logits: Tensor, num_active: int, renormalize: bool
) -> tuple[Tensor, Tensor]:
    """`softmax_topk` in PyTorch."""
    probabilities = torch.softmax(logits.float(), dim=-1)
    # A stable sort, unlike topk, keeps equal values in the order of their index.
    weights, indices = probabilities.sort(dim=-1, descending=True, stable=True)
    weights, indices = weights[:, :num_active], indices[:, :num_active]
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights.contiguous(), indices.to(torch.int32).contiguous()


@triton.jit
def _softmax_kernel(
    x_ptr,
    out_ptr,
    x_stride,
    N,
    BLOCK: tl.constexpr,
    ONE_BLOCK: tl.constexpr,  # the row fits in one block
    PDL: tl.constexpr,
):
    gdc_launch_dependents(PDL)
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    x_ptr += row * x_stride
    out_ptr += row * N
    gdc_wait(PDL)
    if ONE_BLOCK:
        x = tl.load(x_ptr + i, mask=i < N, other=-float("inf")).to(tl.float32)
        e = tl.exp(x - tl.max(x, axis=0))
        y = e / tl.sum(e, axis=0)
        tl.store(out_ptr + i, y.to(out_ptr.dtype.element_ty), mask=i < N)
    else:
        # Per lane: the largest value so far and the sum of exponentials relative to it.
        largest = tl.full((BLOCK,), -1e30, tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, N, BLOCK):
            inside = start + i < N
            x = tl.load(x_ptr + start + i, mask=inside, other=-float("inf")).to(tl.float32)
            new = tl.maximum(largest, x)
            total = total * tl.exp(largest - new) + tl.exp(x - new)
            largest = new
        maximum = tl.max(largest, axis=0)
        inverse = 1.0 / tl.sum(total * tl.exp(largest - maximum), axis=0)
        for start in range(0, N, BLOCK):
            inside = start + i < N
            x = tl.load(x_ptr + start + i, mask=inside, other=0.0).to(tl.float32)
            y = tl.exp(x - maximum) * inverse
            tl.store(out_ptr + start + i, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _softmax_topk_kernel(
    logits_ptr,
    weights_ptr,
    indices_ptr,
    logits_stride,
    T,
    E,
    A: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_A: tl.constexpr,
    PDL: tl.constexpr,
):
    gdc_launch_dependents(PDL)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)[None, :]
    a = tl.arange(0, BLOCK_A)[None, :]
    exists = t[:, None] < T
    gdc_wait(PDL)
    offsets = t[:, None].to(tl.int64) * logits_stride + e
    x = tl.load(logits_ptr + offsets, mask=exists & (e < E), other=-float("inf")).to(tl.float32)
    x = tl.where(exists, x, 0.0)  # rows past the end would be all -inf, and NaN
    largest = tl.max(x, axis=1)
    total = tl.sum(tl.exp(x - largest[:, None]), axis=1)

    weights = tl.zeros((BLOCK_T, BLOCK_A), tl.float32)
    indices = tl.zeros((BLOCK_T, BLOCK_A), tl.int32)
    free = (e < E) & (t[:, None] >= 0)
    for i in tl.static_range(A):
        candidates = tl.where(free, x, -float("inf"))
        best = tl.max(candidates, axis=1)[:, None]
        # Equal logits: the lowest index wins.
        index = tl.min(tl.where(free & (x == best), e, BLOCK_E), axis=1)[:, None]
        weights = tl.where(a == i, tl.exp(best - largest[:, None]) / total[:, None], weights)
        indices = tl.where(a == i, index, indices)
        free = free & (e != index)
    if RENORMALIZE:
        weights = weights / tl.sum(weights, axis=1)[:, None]

    out = t[:, None].to(tl.int64) * A + a
    tl.store(weights_ptr + out, weights, mask=exists & (a < A))
    tl.store(indices_ptr + out, indices, mask=exists & (a < A))


for _name, _block, _one in [("softmax_4096", 4096, True), ("softmax_loop", 8192, False)]:
    register_compile(
        _softmax_kernel,
        _name,
        {"x_ptr": "*bf16", "out_ptr": "*bf16", "x_stride": "i32:16", "N": "i32:16"},
        {"BLOCK": _block, "ONE_BLOCK": _one},
        num_warps=8,
    )
register_compile(
    _softmax_topk_kernel,
    "softmax_topk_e64_a8",
    {
        "logits_ptr": "*bf16",
        "weights_ptr": "*fp32",
        "indices_ptr": "*i32",
        "logits_stride": "i32:16",
        "T": "i32",
        "E": "i32:16",
    },
    {"A": 8, "RENORMALIZE": True, "BLOCK_T": 4, "BLOCK_E": 64, "BLOCK_A": 8},
)


def _launch_softmax(x: Tensor) -> Tensor:
    width = x.shape[-1]
    rows = x.reshape(-1, width)
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        one_block = width <= _MAX_BLOCK
        block = next_power_of_2(width) if one_block else _MAX_BLOCK // 2
        launch(
            _softmax_kernel,
            (rows.shape[0],),
            rows,
            out,
            rows.stride(0),
            width,
            BLOCK=block,
            ONE_BLOCK=one_block,
            num_warps=min(16, max(1, block // 512)),
        )
    return out


def _launch_softmax_topk(
    logits: Tensor, num_active: int, renormalize: bool
) -> tuple[Tensor, Tensor]:
    num_tokens, num_experts = logits.shape
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    weights = torch.empty(num_tokens, num_active, dtype=torch.float32, device=logits.device)
    indices = torch.empty(num_tokens, num_active, dtype=torch.int32, device=logits.device)
    block_t = 4 if num_experts <= 128 else 1
    if num_tokens:
        launch(
            _softmax_topk_kernel,
            (triton.cdiv(num_tokens, block_t),),
            logits,
            weights,
            indices,
            logits.stride(0),
            num_tokens,
            num_experts,
            A=num_active,
            RENORMALIZE=renormalize,
            BLOCK_T=block_t,
            BLOCK_E=next_power_of_2(num_experts),
            BLOCK_A=next_power_of_2(num_active),
            num_warps=block_t,
        )
    return weights, indices


def softmax(x: Tensor) -> Tensor:
    """exp(x) / sum(exp(x)) over the last axis of `x` (..., N); a new tensor of x's dtype."""
    return _launch_softmax(x) if implementation_for(x) == "triton" else softmax_reference(x)


def softmax_topk(logits: Tensor, num_active: int, *, renormalize: bool) -> tuple[Tensor, Tensor]:
    """The A most probable of E classes and their probabilities.

    Args:
        logits: (T, E), any float dtype, E at most 1024.
        num_active: A, 1 <= A <= E.
        renormalize: divide the A probabilities by their sum.

    Returns weights (T, A) float32 and indices (T, A) int32, most probable first; of equal logits
    the lower index comes first.
    """
    num_experts = logits.shape[-1]
    if logits.ndim != 2 or num_experts > MAX_EXPERTS:
        raise UsageError(
            f"softmax_topk takes logits (T, E) with E <= {MAX_EXPERTS}, got {tuple(logits.shape)}"
        )
    if not 1 <= num_active <= num_experts:
        raise UsageError(f"num_active must be in 1..{num_experts}, got {num_active}")
    if implementation_for(logits) == "triton":
        return _launch_softmax_topk(logits, num_active, renormalize)
    return softmax_topk_reference(logits, num_active, renormalize)
