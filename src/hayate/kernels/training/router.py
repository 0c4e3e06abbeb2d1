"""The router of a mixture of experts, with gradients, and the losses that keep it healthy.

    logits = x @ weight.T in fp32        p = softmax(logits) over all E experts
    experts = the A largest of p (+ bias, which takes part in nothing else: arXiv 2408.15664)
    weights = their p, divided by their sum if `renormalize`

Load-balancing loss (Switch, arXiv 2101.03961), 1 when balanced: E sum_e f_e P_e, with f_e the share of the
routed rows that went to expert e and P_e the mean of p_e. z-loss (arXiv 2202.08906): mean of logsumexp^2.

Backward, with S the sum of the chosen p if `renormalize` (else 1 and no second term), for the chosen ones:

    dp = (dweights - sum dweights weights) / S          dlogits += p (dp - sum_e dp p)
    dx = dlogits @ weight          dweight = dlogits^T @ x, summed over fixed ranges of tokens, then over those
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
from hayate.kernels.training._dispatch import implementation

__all__ = ["load_balance_loss", "route", "route_reference", "router_z_loss"]


def route_reference(
    x_TD: Tensor,
    weight: Tensor,
    *,
    num_active: int,
    renormalize: bool,
    selection_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`route` in PyTorch."""
    logits = torch.nn.functional.linear(x_TD.float(), weight.float())
    p = torch.softmax(logits, dim=-1)
    score = p.detach() if selection_bias is None else p.detach() + selection_bias
    # A stable sort, unlike topk, keeps equal values in the order of their index.
    experts = score.sort(dim=-1, descending=True, stable=True).indices[:, :num_active]
    weights = p.gather(1, experts)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return logits, weights, experts.to(torch.int32)


@triton.jit
def _dot_types(a, b):
    """Both in the type of the narrower product: 16 bits where both have them, else fp32."""
    if a.dtype == b.dtype:
        return a, b
    else:
        return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def _route_kernel(
    x_ptr,  # (T, D)
    w_ptr,  # (E, D)
    bias_ptr,  # None or (E,)
    logits_ptr,  # (T, E)
    weights_ptr,  # (T, A)
    experts_ptr,  # (T, A)
    T,
    D,
    E,
    A: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    exists = t < T
    acc = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    x_rows = x_ptr + t[:, None].to(tl.int64) * D
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)[None, :]
        x = tl.load(x_rows + d, mask=exists[:, None] & (d < D), other=0.0)
        w = tl.load(w_ptr + e[:, None] * D + d, mask=(e < E)[:, None] & (d < D), other=0.0)
        x, w = _dot_types(x, w)
        acc = tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)
    e = e[None, :]
    exists = exists[:, None]
    tl.store(logits_ptr + t[:, None].to(tl.int64) * E + e, acc, mask=exists & (e < E))
    acc = tl.where(e < E, acc, float("-inf"))
    p = tl.exp(acc - tl.max(acc, axis=1)[:, None])
    p = p / tl.sum(p, axis=1)[:, None]
    score = p
    if bias_ptr is not None:
        score += tl.load(bias_ptr + e, mask=e < E, other=0.0)

    a = tl.arange(0, BLOCK_A)[None, :]
    weights = tl.zeros((BLOCK_T, BLOCK_A), tl.float32)
    experts = tl.zeros((BLOCK_T, BLOCK_A), tl.int32)
    free = (e < E) & (t[:, None] >= 0)
    for i in tl.static_range(A):
        best = tl.max(tl.where(free, score, float("-inf")), axis=1)[:, None]
        # Equal scores: the lowest index wins.
        index = tl.min(tl.where(free & (score == best), e, BLOCK_E), axis=1)[:, None]
        weights = tl.where(a == i, tl.sum(tl.where(e == index, p, 0.0), axis=1)[:, None], weights)
        experts = tl.where(a == i, index, experts)
        free = free & (e != index)
    if RENORMALIZE:
        weights = weights / tl.sum(weights, axis=1)[:, None]
    cell = t[:, None].to(tl.int64) * A + a
    tl.store(weights_ptr + cell, weights, mask=exists & (a < A))
    tl.store(experts_ptr + cell, experts, mask=exists & (a < A))


@triton.jit
def _route_backward_kernel(
    logits_ptr,  # (T, E)
    experts_ptr,  # (T, A)
    dweights_ptr,  # None or (T, A)
    dlogits_ptr,  # None or (T, E): what comes from elsewhere
    w_ptr,  # (E, D)
    total_ptr,  # (T, E) fp32, dlogits altogether
    dx_ptr,  # (T, D)
    T,
    D,
    E,
    A: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    exists = t < T
    cell = t[:, None].to(tl.int64) * E + e[None, :]
    mask = exists[:, None] & (e < E)[None, :]
    total = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    if dlogits_ptr is not None:
        total += tl.load(dlogits_ptr + cell, mask=mask, other=0.0)
    if dweights_ptr is not None:
        logits = tl.load(logits_ptr + cell, mask=mask, other=float("-inf"))
        logits = tl.where(exists[:, None], logits, 0.0)  # not -inf - -inf
        p = tl.exp(logits - tl.max(logits, axis=1)[:, None])
        p = p / tl.sum(p, axis=1)[:, None]
        chosen = tl.zeros((BLOCK_T, BLOCK_E), tl.int32)
        dp = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
        for i in tl.static_range(A):
            index = tl.load(experts_ptr + t * A + i, mask=exists, other=-1)[:, None]
            dweight = tl.load(dweights_ptr + t * A + i, mask=exists, other=0.0)[:, None]
            chosen = tl.where(e[None, :] == index, 1, chosen)
            dp = tl.where(e[None, :] == index, dweight, dp)
        if RENORMALIZE:
            chosen_p = tl.sum(tl.where(chosen == 1, p, 0.0), axis=1)
            inverse = 1.0 / tl.where(exists, chosen_p, 1.0)[:, None]
            mean = tl.sum(dp * p, axis=1)[:, None] * inverse
            dp = tl.where(chosen == 1, (dp - mean) * inverse, 0.0)
        total += p * (dp - tl.sum(dp * p, axis=1)[:, None])
    total = tl.where(mask, total, 0.0)
    tl.store(total_ptr + cell, total, mask=mask)
    dx_rows = dx_ptr + t[:, None].to(tl.int64) * D
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)[None, :]
        w = tl.load(w_ptr + e[:, None] * D + d, mask=(e < E)[:, None] & (d < D), other=0.0)
        dx = tl.dot(total.to(w.dtype), w, input_precision=PRECISION)
        tl.store(dx_rows + d, dx.to(dx_ptr.dtype.element_ty), mask=exists[:, None] & (d < D))


@triton.jit
def _route_weight_kernel(
    total_ptr,  # (T, E) fp32
    x_ptr,  # (T, D)
    dw_ptr,  # (programs, E, D) fp32
    T,
    D,
    E,
    rows,  # of a program, a multiple of BLOCK_T
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    begin = tl.program_id(0) * rows
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    e = tl.arange(0, BLOCK_E)
    acc = tl.zeros((BLOCK_E, BLOCK_D), tl.float32)
    for start in range(begin, tl.minimum(begin + rows, T), BLOCK_T):
        t = (start + tl.arange(0, BLOCK_T))[:, None].to(tl.int64)
        x = tl.load(x_ptr + t * D + d, mask=(t < T) & (d < D), other=0.0)
        total = tl.load(total_ptr + t * E + e[None, :], mask=(t < T) & (e < E)[None, :], other=0.0)
        acc = tl.dot(tl.trans(total.to(x.dtype)), x, acc, input_precision=PRECISION)
    out = dw_ptr + (tl.program_id(0) * E + e[:, None]) * D + d
    tl.store(out, acc, mask=(e < E)[:, None] & (d < D))


def _blocks(num_experts: int, dtype: torch.dtype) -> dict[str, Any]:
    block_e = max(next_power_of_2(num_experts), 16)
    return {
        "BLOCK_T": max(16, min(64, 4096 // block_e)),
        "BLOCK_E": block_e,
        "BLOCK_D": 64 if block_e <= 256 else 32,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
    }


class _Route(torch.autograd.Function):
    """The Triton kernels."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        num_active: int,
        renormalize: bool,
        selection_bias: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = x.contiguous(), weight.contiguous()
        (T, D), E, A = x.shape, weight.shape[0], num_active
        logits = torch.empty(T, E, dtype=torch.float32, device=x.device)
        weights = torch.empty(T, A, dtype=torch.float32, device=x.device)
        experts = torch.empty(T, A, dtype=torch.int32, device=x.device)
        blocks = _blocks(E, torch.promote_types(x.dtype, weight.dtype))
        if T:
            launch(
                _route_kernel,
                (cdiv(T, blocks["BLOCK_T"]),),
                *(x, weight, selection_bias, logits, weights, experts, T, D, E),
                A=A,
                RENORMALIZE=renormalize,
                BLOCK_A=next_power_of_2(A),
                **blocks,
            )
        ctx.save_for_backward(x, weight, logits, experts)
        ctx.renormalize = renormalize
        ctx.mark_non_differentiable(experts)
        ctx.set_materialize_grads(False)
        return logits, weights, experts

    @staticmethod
    def backward(
        ctx: Any, dlogits: Tensor | None, dweights: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        x, weight, logits, experts = ctx.saved_tensors
        (T, D), E = x.shape, weight.shape[0]
        dx, total = torch.empty_like(x), torch.empty_like(logits)
        if T == 0:
            return dx, torch.zeros_like(weight), None, None, None
        dlogits = None if dlogits is None else dlogits.contiguous()
        dweights = None if dweights is None else dweights.contiguous()
        blocks = _blocks(E, weight.dtype)
        block_t, block_d = blocks["BLOCK_T"], blocks["BLOCK_D"]
        launch(
            _route_backward_kernel,
            (cdiv(T, block_t),),
            *(logits, experts, dweights, dlogits, weight, total, dx, T, D, E),
            A=experts.shape[1],
            RENORMALIZE=ctx.renormalize,
            **blocks,
        )
        columns = cdiv(D, block_d)
        rows = cdiv(cdiv(T, max(1, 2 * num_sms(x.device) // columns)), block_t) * block_t
        sums = torch.empty(cdiv(T, rows), E, D, dtype=torch.float32, device=x.device)
        launch(
            _route_weight_kernel,
            (len(sums), columns),
            *(total, x, sums, T, D, E, rows),
            **blocks | {"PRECISION": _blocks(E, x.dtype)["PRECISION"]},
        )
        return dx, sums.sum(0).to(weight.dtype), None, None, None


def route(
    x_TD: Tensor,
    weight: Tensor,
    *,
    num_active: int,
    renormalize: bool,
    selection_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose A experts for each token; with gradients to x and weight, through weights and logits.

    Args:
        x_TD: (T, D), any float dtype.
        weight: (E, D), any float dtype.
        num_active: A.
        renormalize: divide the A weights by their sum.
        selection_bias: (E,) fp32, added to the probabilities where experts are chosen and nowhere else.

    Returns logits (T, E) fp32, weights (T, A) fp32, and experts (T, A) int32, without a gradient, the
    largest score first, equal ones by lower index.
    """
    num_experts, width = weight.shape
    if x_TD.dim() != 2 or x_TD.shape[1] != width:
        raise UsageError(
            f"route takes x (T, D) and weight (E, D), got {tuple(x_TD.shape)} and {tuple(weight.shape)}"
        )
    if not 1 <= num_active <= num_experts:
        raise UsageError(f"num_active must be in 1..{num_experts}, got {num_active}")
    if implementation(x_TD) == "triton":
        return _Route.apply(x_TD, weight, num_active, renormalize, selection_bias)
    return route_reference(
        x_TD,
        weight,
        num_active=num_active,
        renormalize=renormalize,
        selection_bias=selection_bias,
    )


def load_balance_loss(
    logits: Tensor, experts: Tensor, counts_share: Tensor | None, *, sequence_length: int
) -> Tensor:
    """E sum_e f_e P_e: 1 when balanced, E when every token chooses the same expert (for A = 1).

    Args:
        logits: (T, E) fp32 and experts (T, A) int32, of `route`.
        counts_share: (E,) fp32, the f_e of the whole step, which sum to 1; the loss is then linear in P, so
            that the mean over micro-batches is the loss of the step. None: f and P of each sequence by
            itself, and the mean over sequences; micro-batches of whole sequences, weighted by their number
            of sequences, then give the same as one batch.
        sequence_length: L, T a multiple of it.

    The gradient flows through P alone.
    """
    (T, E), L = logits.shape, sequence_length
    if T % L:
        raise UsageError(f"{T} tokens are not whole sequences of {L}")
    p = torch.softmax(logits.float(), dim=-1)
    if counts_share is not None:
        return E * (counts_share.detach() * p.mean(0)).sum()
    index = torch.arange(E, device=experts.device, dtype=experts.dtype)
    counts = (experts[..., None] == index).view(T // L, -1, E).sum(1)
    share = counts.float() / (L * experts.shape[1])
    return E * (share * p.view(T // L, L, E).mean(1)).sum(-1).mean()


def router_z_loss(logits: Tensor) -> Tensor:
    """Mean over tokens of logsumexp(logits)^2; logits (T, E) fp32."""
    return logits.float().logsumexp(-1).square().mean()


def _register() -> None:
    """Our MoE (E 16), and one with many experts."""
    for E, A in ((16, 4), (128, 8)):
        blocks = _blocks(E, torch.bfloat16)
        numbers = {"T": "i32:16", "D": "i32:16", "E": "i32:16"}
        chosen = {"weights_ptr": "*fp32", "experts_ptr": "*i32", "logits_ptr": "*fp32"}
        matrices = {"x_ptr": "*bf16", "w_ptr": "*bf16"}
        register_compile(
            _route_kernel,
            f"route_e{E}",
            matrices | chosen | numbers | {"bias_ptr": "*fp32"},
            {"A": A, "RENORMALIZE": True, "BLOCK_A": next_power_of_2(A)} | blocks,
        )
        grads = {"dweights_ptr": "*fp32", "dlogits_ptr": "*fp32", "total_ptr": "*fp32"}
        register_compile(
            _route_backward_kernel,
            f"route_backward_e{E}",
            matrices | chosen | grads | {"dx_ptr": "*bf16"} | numbers,
            {"A": A, "RENORMALIZE": True} | blocks,
        )
        register_compile(
            _route_weight_kernel,
            f"route_weight_e{E}",
            matrices | grads | {"dw_ptr": "*fp32", "rows": "i32:16"} | numbers,
            blocks,
        )


_register()
