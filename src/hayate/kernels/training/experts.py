"""The experts of a mixture, with gradients.

    y_t = sum_a w_ta down[e] @ (silu(gate) * up),   [gate; up] = gate_up[e] @ x_t,   e = experts[t, a]

Rows are sorted by expert (`moe_grouped.sort_by_expert`), so that each product is one grouped GEMM. Kept for the
backward pass: x and h = [gate; up] of each routed row, R * 2F values, by far the most of a layer; the outputs of
the experts and their activations are not (as in SonicMoE, arXiv 2512.14080). With g = dout @ down[e], the gradient
of a routing weight is g . act, so that one pass over h and g makes dh, the activation again, and dw.

With `recompute` h is not kept either but made again in the backward pass, one more product.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hayate.errors import UsageError
from hayate.kernels.elementwise import silu_and_mul
from hayate.kernels.moe_grouped import sort_by_expert
from hayate.kernels.training import cpu
from hayate.kernels.training._dispatch import implementation
from hayate.kernels.training.expert_rows import combine_rows, gather_rows, swiglu_backward
from hayate.kernels.training.grouped_gemm import grouped_outer, grouped_rows

__all__ = ["experts_mlp", "experts_mlp_reference"]

Grads = tuple[Tensor | None, ...]


def experts_mlp_reference(
    x_TD: Tensor, weights_TA: Tensor, experts_TA: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """`experts_mlp` in PyTorch; products in x's dtype, their weighted sum in fp32."""
    num_active = experts_TA.shape[1]
    rows = experts_TA.flatten().argsort(stable=True)
    counts = experts_TA.flatten().bincount(minlength=gate_up.shape[0]).tolist()
    total = torch.zeros_like(x_TD, dtype=torch.float32)
    for expert, rows_e in enumerate(rows.split(counts)):
        tokens = rows_e // num_active
        gate, up = (x_TD[tokens] @ gate_up[expert].T).chunk(2, dim=-1)
        act = (F.silu(gate.float()) * up).to(x_TD.dtype)
        y = (act @ down[expert].T).float()
        total = total.index_add(0, tokens, y * weights_TA.flatten()[rows_e, None])
    return total.to(x_TD.dtype)


def _into(weight: Tensor) -> Tensor | None:
    """The gradient that a leaf already has: new ones are added there, without a second tensor of its size."""
    return weight.grad if weight.is_leaf else None


class _Experts(torch.autograd.Function):
    """Grouped products and the kernels between them."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        experts: Tensor,
        gate_up: Tensor,
        down: Tensor,
        recompute: bool,
    ) -> Tensor:
        x, weights = x.contiguous(), weights.contiguous()
        num_active = experts.shape[1]
        order, place, ends = sort_by_expert(experts.contiguous(), gate_up.shape[0])
        h = grouped_rows(gather_rows(x, order, num_active), gate_up, ends)
        y = grouped_rows(silu_and_mul(h), down, ends)
        saved_h = None if recompute else h
        ctx.save_for_backward(x, weights, gate_up, down, order, place, ends, saved_h)
        return combine_rows(y, place, num_active, weights)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Grads:
        x, weights, gate_up, down, order, place, ends, h = ctx.saved_tensors
        num_active = weights.shape[1]
        x_sorted = gather_rows(x, order, num_active)
        if h is None:
            h = grouped_rows(x_sorted, gate_up, ends)
        dy = gather_rows(dout.contiguous(), order, num_active)
        act = grouped_rows(dy, down, ends, k_by_n=True)  # dy @ down; then the weighted activation
        dh, dweights = swiglu_backward(h, act, order, weights)
        ddown = grouped_outer(dy, act, ends, _into(down))
        del act, dy, h
        dgate_up = grouped_outer(dh, x_sorted, ends, _into(gate_up))
        dx_sorted = grouped_rows(dh, gate_up, ends, k_by_n=True)
        dx = combine_rows(dx_sorted, place, num_active, None)
        return dx, dweights, None, dgate_up, ddown, None


class _ExpertsInTurn(torch.autograd.Function):
    """For the CPU: a product an expert, everything else on all rows at once."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        experts: Tensor,
        gate_up: Tensor,
        down: Tensor,
        recompute: bool,
    ) -> Tensor:
        (T, A), E = experts.shape, len(down)
        order = experts.flatten().argsort(stable=True)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(T * A))
        counts = experts.flatten().bincount(minlength=E).tolist()
        h = _products(x.index_select(0, order // A), gate_up.transpose(1, 2), counts)
        y = _products(_swiglu(h), down.transpose(1, 2), counts)
        saved_h = None if recompute else h
        ctx.save_for_backward(x, weights, gate_up, down, order, place, saved_h)
        ctx.counts = counts
        return _combine(y, place, A, weights.contiguous())

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Grads:
        x, weights, gate_up, down, order, place, h = ctx.saved_tensors
        A, counts = weights.shape[1], ctx.counts
        x_sorted, dy = (z.index_select(0, order // A) for z in (x, dout))
        if h is None:
            h = _products(x_sorted, gate_up.transpose(1, 2), counts)
        act = _products(dy, down, counts)  # then the weighted activation
        dh, dweights = _swiglu_backward(h, act, order, weights.contiguous())
        ddown = _outer_products(dy, act, counts, down)
        dgate_up = _outer_products(dh, x_sorted, counts, gate_up)
        dx = _combine(_products(dh, gate_up, counts), place, A, None)
        return dx, dweights, None, dgate_up, ddown, None


def _swiglu(h: Tensor) -> Tensor:
    if cpu.fits(h):
        return cpu.swiglu(h)
    gate, up = h.chunk(2, dim=1)
    return F.silu(gate).mul_(up)


def _swiglu_backward(
    h: Tensor, g: Tensor, order: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor | None]:
    """`expert_rows.swiglu_backward` on the CPU."""
    if cpu.fits(h, g, weights):
        return cpu.swiglu_backward(h, g, order, weights)
    (gate, up), dh = h.chunk(2, dim=1), torch.empty_like(h)
    dgate, dup = dh.chunk(2, dim=1)
    silu, weight = F.silu(gate), weights.flatten()[order, None]
    act = silu * up
    dweights = torch.empty_like(weights)
    dweights.view(-1)[order] = torch.linalg.vecdot(g.float(), act.float()).to(weights.dtype)
    wg = (g * weight).to(g.dtype)
    dup.copy_(wg * silu)
    dgate.copy_(torch.ops.aten.silu_backward(wg * up, gate))
    g.copy_(act * weight)
    return dh, dweights


def _combine(y: Tensor, place: Tensor, num_active: int, weights: Tensor | None) -> Tensor:
    """`expert_rows.combine_rows` on the CPU."""
    if cpu.fits(y) and (weights is None or cpu.fits(weights)):
        return cpu.combine_rows(y, place, num_active, weights)
    rows = y.index_select(0, place).view(-1, num_active, y.shape[1])
    return (rows if weights is None else rows * weights[..., None]).sum(1).to(y.dtype)


def _products(rows: Tensor, weights: Tensor, counts: list[int]) -> Tensor:
    """The rows of each expert times its weight (K, N)."""
    out = rows.new_empty(rows.shape[0], weights.shape[2])
    for part, weight, result in zip(rows.split(counts), weights, out.split(counts), strict=True):
        torch.mm(part, weight, out=result)
    return out


def _outer_products(a: Tensor, b: Tensor, counts: list[int], weight: Tensor) -> Tensor | None:
    """a^T b of the rows of each expert: a new gradient of `weight`, or added to the one it has."""
    existing = _into(weight)
    out = torch.empty_like(weight) if existing is None else existing
    for part_a, part_b, result in zip(a.split(counts), b.split(counts), out, strict=True):
        if out.dtype == a.dtype:
            torch.addmm(result, part_a.T, part_b, beta=int(existing is not None), out=result)
        else:
            result += part_a.T @ part_b
    return out if existing is None else None


def experts_mlp(
    x_TD: Tensor,
    weights_TA: Tensor,
    experts_TA: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    recompute: bool = False,
) -> Tensor:
    """sum_a weights[t, a] * down[e] @ (silu(gate) * up), [gate; up] = gate_up[e] @ x[t], e = experts[t, a].

    Args:
        x_TD: (T, D), float32, float16 or bfloat16.
        weights_TA, experts_TA: (T, A) float32 and int32, of `route`.
        gate_up: (E, 2F, D) of x's dtype, contiguous; the F rows of the gate first.
        down: (E, D, F) of x's dtype, contiguous.
        recompute: keep x alone and make the pre-activations (R, 2F) again in the backward pass.

    Returns (T, D) in x's dtype. The sum over the A experts is in fp32, in their order.

    Gradients go to x, weights, gate_up and down. Where gate_up or down is a leaf whose .grad exists, its new
    gradient is added there during the backward pass, in the dtype of .grad, and autograd gets None: no second
    tensor of that size exists. In bf16 each addition rounds by up to 2^-8 of the sum so far, about as much as the
    gradient of one micro-batch was rounded; a .grad in fp32 (`Tensor.grad_dtype`) costs 2 bytes more a weight.
    """
    if gate_up.shape != (down.shape[0], 2 * down.shape[2], down.shape[1]):
        raise UsageError(
            f"gate_up must be (E, 2F, D) and down (E, D, F), got {tuple(gate_up.shape)} and "
            f"{tuple(down.shape)}"
        )
    if x_TD.dim() != 2 or x_TD.shape[1] != down.shape[1] or weights_TA.shape != experts_TA.shape:
        raise UsageError(
            f"x must be (T, {down.shape[1]}), weights and experts (T, A), got {tuple(x_TD.shape)}, "
            f"{tuple(weights_TA.shape)}, {tuple(experts_TA.shape)}"
        )
    if not (x_TD.dtype == gate_up.dtype == down.dtype):
        raise UsageError(
            f"experts_mlp takes x, gate_up and down of one dtype, got {x_TD.dtype}, {gate_up.dtype}, "
            f"{down.dtype}"
        )
    operands = (x_TD, weights_TA, experts_TA, gate_up, down)
    run = implementation(x_TD)
    if run == "reference":
        if recompute:
            return torch.utils.checkpoint.checkpoint(
                experts_mlp_reference, *operands, use_reentrant=False
            )
        return experts_mlp_reference(*operands)
    function = _Experts if run == "triton" else _ExpertsInTurn
    return function.apply(*operands, recompute)
