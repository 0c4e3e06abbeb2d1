"""The loss over the vocabulary, without ever holding all logits.

    loss = sum_t -log softmax(head @ x_t)[target_t] / normalizer          over the tokens that have a target

Some tokens at a time: their logits in fp32, loss and gradient of the logits from them in one kernel
(softmax minus one at the target), and at once their part of dx and dhead, which is summed in fp32. So the
gradients, of the sum, are there when the forward pass ends; the backward pass scales them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hayate.errors import UsageError
from hayate.kernels._triton import launch, next_power_of_2, register_compile, tl, triton
from hayate.kernels.training import cpu
from hayate.kernels.training._dispatch import implementation

__all__ = ["IGNORE", "linear_cross_entropy", "linear_cross_entropy_per_token"]

IGNORE = -100  # the target of a token that predicts nothing

# Bytes of fp32 logits that stand at a time: enough rows for the matrix units, or what a cache holds.
_GPU_BYTES, _CPU_BYTES, _LEAST_ROWS = 1 << 29, 1 << 23, 256


def linear_cross_entropy_reference(
    x_TD: Tensor, head: Tensor, targets: Tensor, normalizer: float
) -> Tensor:
    """`linear_cross_entropy` in PyTorch, all logits at once."""
    logits = F.linear(x_TD.float(), head.float())
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum") / normalizer


@triton.jit
def _cross_entropy_kernel(
    logits_ptr,  # (rows, V) fp32
    targets_ptr,
    loss_ptr,  # (rows,)
    grad_ptr,  # None, or (rows, V): softmax minus one at the target
    V,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    logits_ptr += row * V
    target = tl.load(targets_ptr + row)
    # Per lane: the largest value so far and the sum of exponentials relative to it (arXiv 1805.02867).
    peak = tl.full((BLOCK,), -1e30, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        z = tl.load(logits_ptr + start + i, mask=start + i < V, other=float("-inf"))
        new_peak = tl.maximum(peak, z)
        total = total * tl.exp(peak - new_peak) + tl.exp(z - new_peak)
        peak = new_peak
    top = tl.max(peak, axis=0)
    lse = top + tl.log(tl.sum(total * tl.exp(peak - top), axis=0))
    counts = target != -100
    z = tl.load(logits_ptr + target, mask=counts, other=0.0)
    tl.store(loss_ptr + row, tl.where(counts, lse - z, 0.0))
    if grad_ptr is not None:
        grad_ptr += row * V
        for start in range(0, V, BLOCK):
            inside = start + i < V
            p = tl.exp(tl.load(logits_ptr + start + i, mask=inside, other=0.0) - lse)
            grad = tl.where(counts, tl.where(start + i == target, p - 1.0, p), 0.0)
            tl.store(grad_ptr + start + i, grad.to(grad_ptr.dtype.element_ty), mask=inside)


for _name, _nones in (("", {}), ("_loss_only", {"grad_ptr": None})):
    register_compile(
        _cross_entropy_kernel,
        f"cross_entropy{_name}",
        {"logits_ptr": "*fp32", "targets_ptr": "*i64", "loss_ptr": "*fp32", "grad_ptr": "*bf16"}
        | {"V": "i32:16"},
        {"BLOCK": 4096} | _nones,
        num_warps=8,
    )


def _losses_triton(logits: Tensor, targets: Tensor, loss: Tensor, grad: Tensor | None) -> None:
    vocab_size = logits.shape[1]
    launch(
        _cross_entropy_kernel,
        (len(targets),),
        logits,
        targets,
        loss,
        grad,
        vocab_size,
        BLOCK=min(4096, next_power_of_2(vocab_size)),
        num_warps=8,
    )


def _losses_cpu(logits: Tensor, targets: Tensor, loss: Tensor, grad: Tensor | None) -> None:
    """`grad` may be `logits` itself."""
    if cpu.fits(logits, loss) and targets.is_contiguous():
        cpu.cross_entropy(logits, targets, loss, with_grad=grad is not None)
        if grad is not None and grad is not logits:
            grad.copy_(logits)
        return
    counts = targets != IGNORE
    index = torch.where(counts, targets, 0)[:, None]
    loss.copy_(F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none"))
    if grad is not None:
        p = torch.softmax(logits, dim=1)
        p.scatter_add_(1, index, torch.full_like(index, -1, dtype=p.dtype))
        p.index_fill_(0, (~counts).nonzero()[:, 0], 0)
        grad.copy_(p)


def _product_fp32(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b in fp32, exact products of 16-bit values."""
    if a.dtype is torch.float32:
        return torch.mm(a, b, out=out)
    if not a.is_cuda:
        return torch.mm(a.float(), b.float(), out=out)
    if out is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b, out_dtype=torch.float32, out=out)


def _chunks(x: Tensor, vocab_size: int) -> int:
    """Tokens at a time."""
    budget = _GPU_BYTES if x.is_cuda else _CPU_BYTES
    return max(_LEAST_ROWS, budget // (4 * vocab_size) // 128 * 128)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, head: Tensor, targets: Tensor, normalizer: float, with_grad: bool
    ) -> Tensor:
        x = x.contiguous()
        losses_of = _losses_triton if implementation(x) == "triton" else _losses_cpu
        loss = torch.empty(len(x), dtype=torch.float32, device=x.device)
        size = min(_chunks(x, head.shape[0]), max(len(x), 1))
        logits = torch.empty(size, len(head), dtype=torch.float32, device=x.device)
        dx = dhead = grad = None
        exact = x.dtype is torch.float32
        share = 1 / normalizer if exact else 1.0  # 16 bits might not hold so small a gradient
        if with_grad:
            dx = torch.empty_like(x)
            grad = logits if x.is_cpu and exact else torch.empty_like(logits, dtype=x.dtype)
            dhead = torch.empty(head.shape, dtype=torch.float32, device=x.device)
            if not len(x) or not exact:
                dhead.zero_()
        for begin in range(0, len(x), size):
            rows = slice(begin, begin + size)
            count = len(x[rows])
            _product_fp32(x[rows], head.T, out=logits[:count])
            part = None if grad is None else grad[:count]
            losses_of(logits[:count], targets[rows], loss[rows], part)
            if part is not None and dx is not None and dhead is not None:
                torch.addmm(dx[rows], part, head, beta=0, alpha=share, out=dx[rows])
                if exact:
                    beta = int(begin > 0)
                    torch.addmm(dhead, part.T, x[rows], beta=beta, alpha=share, out=dhead)
                else:
                    dhead += _product_fp32(part.T, x[rows])
        ctx.save_for_backward(dx, dhead)
        ctx.dtype, ctx.rest = head.dtype, 1.0 if exact else 1 / normalizer
        return loss.sum() / normalizer

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        dx, dhead = ctx.saved_tensors
        if upstream.is_cpu and float(upstream) * ctx.rest == 1.0:
            return dx, dhead.to(ctx.dtype), None, None, None
        scale = upstream * ctx.rest
        return dx * scale, (dhead * scale).to(ctx.dtype), None, None, None


def _check(x_TD: Tensor, head: Tensor, targets: Tensor) -> None:
    if x_TD.dim() != 2 or head.shape[1:] != x_TD.shape[1:] or targets.shape != x_TD.shape[:1]:
        raise UsageError(
            f"linear_cross_entropy takes x (T, D), head (V, D) and targets (T,), got "
            f"{tuple(x_TD.shape)}, {tuple(head.shape)}, {tuple(targets.shape)}"
        )
    if x_TD.dtype != head.dtype:
        raise UsageError(f"x and head must be of one dtype, got {x_TD.dtype} and {head.dtype}")


def linear_cross_entropy(
    x_TD: Tensor, head: Tensor, targets: Tensor, *, normalizer: float
) -> Tensor:
    """The sum over tokens of -log softmax(head @ x)[target], divided by `normalizer`; with gradients.

    Args:
        x_TD: (T, D); head: (V, D) of x's dtype.
        targets: (T,) int64; tokens with target -100 do not count.
        normalizer: for instance the number of targets of the whole step.

    Returns a scalar, float32. Logits are fp32; their gradient is rounded to x's dtype, the one of `head` is
    summed in fp32 and rounded once.
    """
    _check(x_TD, head, targets)
    if implementation(x_TD) == "reference":
        return linear_cross_entropy_reference(x_TD, head, targets, normalizer)
    with_grad = torch.is_grad_enabled() and (x_TD.requires_grad or head.requires_grad)
    return _LinearCrossEntropy.apply(x_TD, head, targets, normalizer, with_grad)


@torch.no_grad()
def linear_cross_entropy_per_token(x_TD: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(head @ x)[target] of every token, (T,) fp32, 0 where the target is -100; no gradient."""
    _check(x_TD, head, targets)
    if implementation(x_TD) == "reference":
        logits = F.linear(x_TD.float(), head.float())
        return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")
    losses_of = _losses_triton if implementation(x_TD) == "triton" else _losses_cpu
    loss = torch.empty(len(x_TD), dtype=torch.float32, device=x_TD.device)
    size = _chunks(x_TD, head.shape[0])
    for begin in range(0, len(x_TD), size):
        rows = slice(begin, begin + size)
        losses_of(_product_fp32(x_TD[rows], head.T), targets[rows], loss[rows], None)
    return loss
