"""Kernels between the products of `experts_mlp`: gather, weighted sum, and the backward pass of SwiGLU.

For the row i of the sorted rows, r = order[i] = t * A + a the routed row it is, w its routing weight:

    gather     out[i] = x[r // A]
    combine    out[t] = sum_a w[t, a] y[place[t, a]]          (w is 1 where there are no weights)
    backward   with act = silu(gate) up, of what `gather` made of dout, times down: g[i]
               dw[r] = g . act        dgate = w g up silu'(gate)        dup = w g silu(gate)
               and w act, which the gradient of down needs, in the place of g
"""

from __future__ import annotations

import torch
from torch import Tensor

from hayate.kernels._triton import cdiv, launch, next_power_of_2, register_compile, tl, triton

__all__ = ["combine_rows", "gather_rows", "swiglu_backward"]

_ROWS = 4  # a program, so that it has enough loads in flight
_BLOCK = 1024


@triton.jit
def _gather_kernel(
    x_ptr, order_ptr, out_ptr, R, D, A: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    token = (tl.load(order_ptr + i, mask=i < R, other=0) // A)[:, None].to(tl.int64)
    x = tl.load(x_ptr + token * D + d, mask=d < D, other=0.0)
    mask = (i < R)[:, None] & (d < D)
    tl.store(out_ptr + i[:, None].to(tl.int64) * D + d, x, mask=mask)


@triton.jit
def _combine_kernel(
    y_ptr,  # (R, D)
    place_ptr,
    weights_ptr,  # None or (T, A)
    out_ptr,
    T,
    D,
    A: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    acc = tl.zeros((ROWS, BLOCK), tl.float32)
    for a in tl.static_range(A):
        row = tl.load(place_ptr + t * A + a, mask=t < T, other=0)[:, None].to(tl.int64)
        y = tl.load(y_ptr + row * D + d, mask=d < D, other=0.0).to(tl.float32)
        if weights_ptr is not None:
            y *= tl.load(weights_ptr + t * A + a, mask=t < T, other=0.0)[:, None]
        acc += y
    mask = (t < T)[:, None] & (d < D)
    tl.store(out_ptr + t[:, None].to(tl.int64) * D + d, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_backward_kernel(
    h_ptr,  # (R, 2F)
    g_ptr,  # (R, F), read; with weights w act is written there
    order_ptr,  # None without weights
    weights_ptr,  # None or (R,), by routed row
    dh_ptr,  # (R, 2F)
    dweights_ptr,  # (R,), by routed row
    F,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    h_ptr += i * 2 * F
    dh_ptr += i * 2 * F
    g_ptr += i * F
    weight = 1.0
    if weights_ptr is not None:
        r = tl.load(order_ptr + i)
        weight = tl.load(weights_ptr + r)
    dot = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, F, BLOCK):
        f = start + tl.arange(0, BLOCK)
        inside = f < F
        gate = tl.load(h_ptr + f, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(h_ptr + F + f, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(g_ptr + f, mask=inside, other=0.0).to(tl.float32)
        s = tl.sigmoid(gate)
        silu = gate * s
        if weights_ptr is not None:
            act = silu * up
            dot += g * act
            tl.store(g_ptr + f, (weight * act).to(g_ptr.dtype.element_ty), mask=inside)
            g *= weight
        dgate = g * up * (s + silu * (1.0 - s))
        tl.store(dh_ptr + f, dgate.to(dh_ptr.dtype.element_ty), mask=inside)
        tl.store(dh_ptr + F + f, (g * silu).to(dh_ptr.dtype.element_ty), mask=inside)
    if weights_ptr is not None:
        tl.store(dweights_ptr + r, tl.sum(dot, axis=0))


def gather_rows(x: Tensor, order: Tensor, num_active: int) -> Tensor:
    """Rows of x (T, D), contiguous, for the sorted rows: (R, D)."""
    width, rows = x.shape[1], order.numel()
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    block = min(_BLOCK, next_power_of_2(width))
    launch(
        _gather_kernel,
        (cdiv(rows, _ROWS), cdiv(width, block)),
        x,
        order,
        out,
        rows,
        width,
        A=num_active,
        ROWS=_ROWS,
        BLOCK=block,
        num_warps=4,
    )
    return out


def combine_rows(y: Tensor, place: Tensor, num_active: int, weights: Tensor | None) -> Tensor:
    """The sum of the A rows of y (R, D) of each token, weighted by `weights` (T, A): (T, D) in y's dtype."""
    num_tokens, width = place.numel() // num_active, y.shape[1]
    out = torch.empty(num_tokens, width, dtype=y.dtype, device=y.device)
    block = min(_BLOCK, next_power_of_2(width))
    launch(
        _combine_kernel,
        (cdiv(num_tokens, _ROWS), cdiv(width, block)),
        y,
        place,
        weights,
        out,
        num_tokens,
        width,
        A=num_active,
        ROWS=_ROWS,
        BLOCK=block,
        num_warps=4,
    )
    return out


def swiglu_backward(
    h: Tensor, g: Tensor, order: Tensor | None = None, weights: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """(dh, dweights) from h (R, 2F) and the gradient g (R, F) of its silu_and_mul, contiguous.

    With order (R,) and weights (T, A) see the head of the file; g is then overwritten by w act.
    """
    dh = torch.empty_like(h)
    dweights = None if weights is None else torch.empty_like(weights)
    launch(
        _swiglu_backward_kernel,
        (h.shape[0],),
        h,
        g,
        order,
        weights,
        dh,
        dweights,
        g.shape[1],
        BLOCK=min(_BLOCK, next_power_of_2(g.shape[1])),
        num_warps=4,
    )
    return dh, dweights


register_compile(
    _gather_kernel,
    "expert_gather_rows",
    {"x_ptr": "*bf16", "order_ptr": "*i32", "out_ptr": "*bf16", "R": "i32:16", "D": "i32:16"},
    {"A": 4, "ROWS": _ROWS, "BLOCK": 1024},
)
for _name, _nones in (("", {}), ("_unweighted", {"weights_ptr": None})):
    register_compile(
        _combine_kernel,
        f"expert_combine_rows{_name}",
        {"y_ptr": "*bf16", "place_ptr": "*i32", "weights_ptr": "*fp32", "out_ptr": "*bf16"}
        | {"T": "i32:16", "D": "i32:16"},
        {"A": 4, "ROWS": _ROWS, "BLOCK": 1024} | _nones,
    )
for _name, _nones in (
    ("", {}),
    ("_dense", dict.fromkeys(("order_ptr", "weights_ptr", "dweights_ptr"))),
):
    register_compile(
        _swiglu_backward_kernel,
        f"swiglu_backward{_name}",
        {"h_ptr": "*bf16", "g_ptr": "*bf16", "order_ptr": "*i32", "weights_ptr": "*fp32"}
        | {"dh_ptr": "*bf16", "dweights_ptr": "*fp32", "F": "i32:16"},
        {"BLOCK": _BLOCK} | _nones,
    )
