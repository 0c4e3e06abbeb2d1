"""AdamW (arXiv 1711.05101) over a list of tensors, and the norm of their gradients.

    g = gradient * grad_scale
    m = beta1 m + (1 - beta1) g            v = beta2 v + (1 - beta2) g^2
    w = w (1 - lr decay) - lr / (1 - beta1^step) * m / (sqrt(v / (1 - beta2^step)) + eps)

in fp32. What is kept in less is rounded stochastically (`quantization`): a bf16 weight without an fp32 master
copy, and moments in bf16 or 8 bits. An update far below the spacing of bf16 then still arrives, on average.

On a GPU one launch serves all tensors of the same types (`tensor_list`). Nothing waits for the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor

from hayate.errors import UsageError
from hayate.kernels._triton import cdiv
from hayate.kernels.training import cpu
from hayate.kernels.training._dispatch import implementation
from hayate.kernels.training.adamw_kernel import AdamWState, Member, Scalars, adamw_triton
from hayate.kernels.training.quantization import (
    BLOCK_SIZE,
    dequantize,
    quantize,
    random_bits,
    round_to_bfloat16,
)

__all__ = ["AdamWState", "MomentType", "adamw_state", "adamw_step"]

MomentType = Literal["float32", "bfloat16", "int8"]


def adamw_state(
    param: Tensor, *, moments: MomentType = "float32", master: bool = True
) -> AdamWState:
    """The state before the first step: moments zero, and for a bf16 parameter with `master` an fp32 copy."""
    n, device = param.numel(), param.device
    types = {
        "float32": (torch.float32, torch.float32),
        "bfloat16": (torch.bfloat16, torch.bfloat16),
        "int8": (torch.int8, torch.uint8),
    }
    first, second = (torch.zeros(n, dtype=dtype, device=device) for dtype in types[moments])
    copy = param.dtype is torch.bfloat16 and master
    return AdamWState(
        param.detach().float().flatten().clone() if copy else None,
        first,
        second,
        torch.zeros(2, cdiv(n, BLOCK_SIZE), device=device) if moments == "int8" else None,
    )


def _read(moment: Tensor, scales: Tensor | None) -> Tensor:
    return moment.float() if scales is None else dequantize(moment, scales)


def _write(moment: Tensor, scales: Tensor | None, value: Tensor, bits: Tensor | None) -> None:
    if moment.dtype is torch.float32:
        moment.copy_(value)
        return
    assert bits is not None
    if scales is None:
        moment.copy_(round_to_bfloat16(value, (bits << 8) | 0x80))
    else:
        codes, new_scales = quantize(value, bits, signed=moment.dtype is torch.int8)
        moment.copy_(codes)
        scales.copy_(new_scales)


def _adamw_reference(
    member: Member, scalars: Scalars, grad_scale: Tensor | None, seed: int, step: int
) -> None:
    """One parameter's step in PyTorch."""
    param, grad, state, weight_decay, number = member
    narrow = param.dtype is torch.bfloat16 and state.master is None
    bits = None
    if narrow or state.first.dtype is not torch.float32:
        bits = random_bits(seed, step, number, param.numel(), param.device)
    g = grad.detach().float().flatten()
    if grad_scale is not None:
        g = g * grad_scale
    scales = (None, None) if state.scales is None else state.scales.unbind()
    m = _read(state.first, scales[0]).lerp_(g, 1 - scalars.beta1)
    v = _read(state.second, scales[1]).mul_(scalars.beta2)
    v.addcmul_(g, g, value=1 - scalars.beta2)
    target = param.detach().flatten()
    w = target.float() if state.master is None else state.master
    w.mul_(1 - scalars.lr * weight_decay)
    w.addcdiv_(m, v.sqrt().mul_(scalars.unbias).add_(scalars.eps), value=-scalars.step_size)
    if narrow:
        assert bits is not None
        target.copy_(round_to_bfloat16(w, bits & 0xFFFF))
    else:
        target.copy_(w)
    _write(state.first, scales[0], m, None if bits is None else (bits >> 16) & 0xFF)
    _write(state.second, scales[1], v, None if bits is None else bits >> 24)


def _adamw_native(member: Member, scalars: Scalars, grad_scale: Tensor | None) -> None:
    param, grad, state, weight_decay, _ = member
    cpu.adamw(
        param,
        grad,
        state.first,
        state.second,
        grad_scale,
        beta1=scalars.beta1,
        beta2=scalars.beta2,
        eps=scalars.eps,
        keep=1 - scalars.lr * weight_decay,
        step_size=scalars.step_size,
        unbias=scalars.unbias,
    )


def _check(params: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[AdamWState]) -> None:
    for param, grad, state in zip(params, grads, states, strict=True):
        if grad.shape != param.shape or state.first.numel() != param.numel():
            raise UsageError(
                f"a parameter {tuple(param.shape)} got a gradient {tuple(grad.shape)} and moments of "
                f"{state.first.numel()} elements"
            )
        if param.dtype not in (torch.float32, torch.bfloat16):
            raise UsageError(f"AdamW takes float32 and bfloat16 parameters, got {param.dtype}")


@torch.no_grad()
def adamw_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[AdamWState],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: Sequence[float],
    step: int,
    grad_scale: Tensor | None = None,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
) -> None:
    """One step of AdamW, as at the head of this file; params and states are changed in place.

    Args:
        params: bf16 or fp32; contiguous, on one device.
        grads: of the same shapes, any float dtype; not changed.
        states: of `adamw_state`.
        weight_decay: one number a parameter.
        step: counted from 1.
        grad_scale: a scalar fp32 tensor on the device, by which gradients are multiplied (clipping).
        seed: of stochastic rounding; with the step and the element's number it gives the bits. Elements are
            numbered through `params`, each parameter from the next multiple of 256 on.
        numbers: of the first element of each parameter, multiples of 256, where `params` are parts of something larger.
    """
    _check(params, grads, states)
    if not params:
        return
    scalars = Scalars(
        lr, beta1, beta2, eps, lr / (1 - beta1**step), (1 - beta2**step) ** -0.5
    )  # in double
    sizes = [cdiv(p.numel(), BLOCK_SIZE) * BLOCK_SIZE for p in params]
    first = accumulate(sizes[:-1], initial=0) if numbers is None else numbers
    columns = zip(params, grads, states, weight_decay, first, strict=True)
    members = [Member(*row) for row in columns]
    run = implementation(params[0])
    if run != "triton":
        for member in members:
            tensors = member.param, member.grad, member.state.first, member.state.second
            if run == "native" and cpu.fits(*tensors):
                _adamw_native(member, scalars, grad_scale)
            else:
                _adamw_reference(member, scalars, grad_scale, seed, step)
        return
    groups: dict[Any, list[Member]] = {}
    for m in members:
        types = m.param.dtype, m.grad.dtype, m.state.master is None, m.state.first.dtype
        groups.setdefault(types, []).append(m)
    for group in groups.values():
        adamw_triton(group, scalars, grad_scale, seed, step)
