"""Mixture of SwiGLU experts (arXiv 1701.06538, 2401.04088).

    p = softmax(router @ norm(x)) over all E experts, in fp32
    experts = the A largest p, equal ones by lower index
    weights = their p, divided by their sum if `renormalize`
    y = residual + sum_a weights_a * down[e_a] @ (silu(gate) * up)
        with [gate; up] = gate_up[e_a] @ norm(x)

On a GPU the number of routed rows R = T * A decides:

| rows               | how                                                                      |
|--------------------|--------------------------------------------------------------------------|
| R <= E and T <= 16 | `moe_decode`: matrix-vector products that look up their expert           |
| more               | `moe_grouped`: rows sorted by expert, two grouped products, weighted sum |

On the CPU the experts that are used take their rows in turn. On a GPU nothing waits for it, and
sizes depend on T alone, so all of it can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hayate.errors import UsageError
from hayate.kernels._dispatch import implementation_for, is_batch_invariant
from hayate.kernels.linear import linear, linear_reference
from hayate.kernels.moe_decode import MAX_TOKENS, moe_mlp_decode, route
from hayate.kernels.moe_grouped import moe_mlp_grouped
from hayate.kernels.norm import Norm, apply_norm_reference
from hayate.kernels.softmax import softmax_topk_reference

__all__ = ["moe_mlp", "moe_mlp_reference", "moe_route", "moe_route_reference"]


def moe_route_reference(
    x: Tensor, router_weight: Tensor, *, norm: Norm | None, num_active: int, renormalize: bool
) -> tuple[Tensor, Tensor]:
    """`moe_route` in PyTorch."""
    x = x.float()
    if norm is not None:
        x = apply_norm_reference(x, norm)
    product = linear if is_batch_invariant() else torch.nn.functional.linear
    logits = product(x, router_weight.float())
    return softmax_topk_reference(logits, num_active, renormalize)


def moe_mlp_reference(
    x: Tensor,
    norm: Norm | None,
    weights: Tensor,
    experts: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    residual: Tensor,
) -> Tensor:
    """`moe_mlp` in PyTorch; the products run in x's dtype, their weighted sum in fp32."""
    operands = (x, norm, weights, experts, gate_up, down)
    return _experts_in_turn(linear_reference, *operands, residual)


def _experts_in_turn(
    product: Callable[..., Tensor],
    x: Tensor,
    norm: Norm | None,
    weights: Tensor,
    experts: Tensor,
    gate_up: Tensor,
    down: Tensor,
    residual: Tensor,
) -> Tensor:
    """Each expert that is used takes all its rows at once, by `linear` or `linear_reference`."""
    num_active = experts.shape[1]
    rows = experts.flatten().argsort(stable=True)
    counts = experts.flatten().bincount(minlength=gate_up.shape[0]).tolist()
    total = residual.float()
    for expert, rows_e in enumerate(rows.split(counts)):
        if len(rows_e):
            tokens = rows_e // num_active
            h = product(x[tokens], gate_up[expert], norm=norm, activation="silu_and_mul")
            y = product(h, down[expert]).float()
            total = total.index_add(0, tokens, y * weights.flatten()[rows_e, None])
    return total.to(x.dtype)


def moe_route(
    x: Tensor, router_weight: Tensor, *, norm: Norm | None, num_active: int, renormalize: bool
) -> tuple[Tensor, Tensor]:
    """Choose A experts for each token.

    Args:
        x: (T, D), any float dtype.
        router_weight: (E, D), any float dtype, E <= 1024.
        norm: of x, taken first.
        num_active: A.
        renormalize: divide the A weights by their sum.

    Returns weights (T, A) float32, largest first, and experts (T, A) int32.
    """
    num_experts, width = router_weight.shape
    if x.dim() != 2 or x.shape[1] != width:
        raise UsageError(
            f"moe_route takes x (T, D) and router_weight (E, D), got {tuple(x.shape)} and "
            f"{tuple(router_weight.shape)}"
        )
    if not 1 <= num_active <= num_experts:
        raise UsageError(f"num_active must be in 1..{num_experts}, got {num_active}")
    route_with = route if _runs_triton(x, router_weight) else moe_route_reference
    return route_with(x, router_weight, norm=norm, num_active=num_active, renormalize=renormalize)


def moe_mlp(
    x: Tensor,
    norm: Norm | None,
    weights: Tensor,
    experts: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    residual: Tensor,
) -> Tensor:
    """residual + the weighted sum of the experts' outputs, as at the head of this file.

    Args:
        x: (T, D), float32, float16 or bfloat16.
        norm: of x, taken first.
        weights, experts: (T, A) float32 and int32, from `moe_route`.
        gate_up: (E, 2F, D) of x's dtype, contiguous; the F rows of the gate first.
        down: (E, D, F) of x's dtype, contiguous.
        residual: (T, D); not changed, may be x itself.

    Returns a new (T, D) tensor of x's dtype. The sum over the A experts is in fp32, in their order.
    """
    if gate_up.shape != (down.shape[0], 2 * down.shape[2], down.shape[1]):
        raise UsageError(
            f"gate_up must be (E, 2F, D) and down (E, D, F), got {tuple(gate_up.shape)} and "
            f"{tuple(down.shape)}"
        )
    if x.dim() != 2 or x.shape[1] != down.shape[1] or residual.shape != x.shape:
        raise UsageError(
            f"x and residual must be (T, {down.shape[1]}), got {tuple(x.shape)} and "
            f"{tuple(residual.shape)}"
        )
    if not (x.dtype == gate_up.dtype == down.dtype):
        raise UsageError(
            f"moe_mlp takes x, gate_up and down of one dtype, got {x.dtype}, {gate_up.dtype}, "
            f"{down.dtype}"
        )
    operands = (x, norm, weights, experts, gate_up, down)
    if not _runs_triton(x, gate_up):
        return _experts_in_turn(linear, *operands, residual)
    num_tokens, num_active = experts.shape
    few = num_tokens <= MAX_TOKENS and num_tokens * num_active <= gate_up.shape[0]
    run = moe_mlp_decode if few and not is_batch_invariant() else moe_mlp_grouped
    return run(*operands, residual=residual)


def _runs_triton(x: Tensor, weight: Tensor) -> bool:
    """Our kernels have no backward pass: where one is needed, PyTorch's operations run."""
    needs_grad = weight.requires_grad and torch.is_grad_enabled()
    return implementation_for(x) == "triton" and not needs_grad
