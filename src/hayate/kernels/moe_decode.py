"""Mixture of experts for few tokens: routing, and the MLP as matrix-vector products.

Three kernels a layer, all bound by reading weights:

    route   a program a token: norm, logits of all E experts, softmax, the A largest
    up      a program owns BN rows of the gate and of `up` of the expert that its row r = t * A + a
            looks up: h_r = silu(gate) * up
    down    a program owns BN columns of the output of one token and walks the token's A experts:
            y = residual + sum_a weight_a * down[e_a] @ h_(t, a). No atomics: the sum has one order.

The rmsnorm costs no pass, as in `gemv`: sum of squares and product grow in one loop. Programs of
one token's (or another token's) rows for the same rows of the weights are neighbours in the grid,
so that an expert that several tokens chose comes from L2 but once from memory.

Which weights to read is known only once `route` is done, so `up` cannot fetch ahead of `gdc_wait`.
`down` can: `up` lets the next kernel start only after its own wait, that is, after `route`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hayate.kernels._dispatch import is_batch_invariant
from hayate.kernels._triton import (
    gdc_launch_dependents,
    gdc_wait,
    launch,
    next_power_of_2,
    prefetch_l2,
    register_compile,
    tl,
    triton,
)
from hayate.kernels.elementwise import activate
from hayate.kernels.norm import Norm, apply_norm
from hayate.kernels.softmax import softmax_topk

__all__ = ["MAX_TOKENS", "Cut", "down_cut", "moe_mlp_decode", "route", "up_cut"]

MAX_TOKENS = 16

# One program a token reads the router from L2: up to here that is less than a kernel's fixed cost.
_ROUTE_MAX_TOKENS = 256
# Elements of the router's weight that a program of `route` holds at a time: 64 a lane.
_ROUTE_TILE = 16384


class Cut(NamedTuple):
    """How a product is cut: rows of the weight and length of a chunk a program holds at a time.

    `block_k` is at least 256 times `num_warps` (16 bytes a lane of a 16-bit type); below that the
    vector and the weight would be laid out differently over the lanes.
    """

    block_n: int
    block_k: int
    num_warps: int


def up_cut(width: int, num_tokens: int) -> Cut:
    """For gate_up (E, 2F, D), D = width; `block_n` rows of the gate and as many of `up`.

    Measured on an H200 for D = 768: small programs for one token, more rows each for several.
    """
    if width > 1024:
        return Cut(2, 512, 2)
    return Cut(2 if num_tokens < 4 else 8, 256, 1)


def down_cut(width: int, ffn: int) -> Cut:
    """For down (E, D, F), D = width, F = ffn. Measured on an H200 for D = 768, F = 6144."""
    block_n = 2 if width <= 2048 else 4
    if ffn >= 2048:
        return Cut(block_n, 2048, 4)
    num_warps = max(1, min(4, next_power_of_2(ffn) // 256))
    return Cut(block_n, 256 * num_warps, num_warps)


@triton.jit
def _load_k(row_ptrs, START: tl.constexpr, K: tl.constexpr, BK: tl.constexpr):
    """Columns START .. START + BK of rows; zeros past K."""
    k = START + tl.arange(0, BK)[None, :]
    if START + BK <= K:
        values = tl.load(row_ptrs + k)
    else:
        values = tl.load(row_ptrs + k, mask=k < K, other=0.0)
    return values


@triton.jit
def _load_weight(row_ptrs, START: tl.constexpr, K: tl.constexpr, BK: tl.constexpr):
    """The same for weights, which are read once: they leave the caches first."""
    k = START + tl.arange(0, BK)[None, :]
    if START + BK <= K:
        values = tl.load(row_ptrs + k, eviction_policy="evict_first")
    else:
        values = tl.load(row_ptrs + k, mask=k < K, other=0.0, eviction_policy="evict_first")
    return values


@triton.jit
def _route_kernel(
    x_ptr,
    router_ptr,
    norm_weight_ptr,  # None or (D,)
    weights_ptr,
    experts_ptr,
    x_stride,
    eps,
    E: tl.constexpr,
    A: tl.constexpr,
    D: tl.constexpr,
    BLOCK_E: tl.constexpr,  # at least E
    BK: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    PDL: tl.constexpr,
):
    gdc_launch_dependents(PDL)
    token = tl.program_id(0)
    e = tl.arange(0, BLOCK_E)
    rows = router_ptr + tl.minimum(e, E - 1)[:, None] * D
    x_row = x_ptr + token.to(tl.int64) * x_stride
    router = _load_k(rows, 0, D, BK)
    if D > BK:
        LINE: tl.constexpr = 1024 // router_ptr.dtype.element_ty.primitive_bitwidth
        for start in tl.static_range(BK, D, BK):
            line = start + tl.arange(0, BK // LINE)[None, :] * LINE
            prefetch_l2(rows + tl.minimum(line, D - 1), PDL)
    gdc_wait(PDL)
    acc = tl.zeros((BLOCK_E, BK), tl.float32)
    squares = tl.zeros((1, BK), tl.float32)
    for start in tl.static_range(0, D, BK):
        x = _load_k(x_row, start, D, BK).to(tl.float32)
        if start > 0:
            router = _load_k(rows, start, D, BK)
        if norm_weight_ptr is not None:
            squares += x * x
            x *= _load_k(norm_weight_ptr, start, D, BK).to(tl.float32)
        acc += router.to(tl.float32) * x
    logits = tl.sum(acc, axis=1)
    if norm_weight_ptr is not None:
        logits *= tl.rsqrt(tl.sum(squares) / D + eps)
    logits = tl.where(e < E, logits, float("-inf"))
    share = tl.exp(logits - tl.max(logits, axis=0))

    # The place of an expert is the number of experts before it; the places are a permutation
    # whatever the logits are (NaN counts as lowest), so every slot gets a valid expert.
    order = tl.where(logits == logits, logits, float("-inf"))
    other, index = order[None, :], e[None, :]
    before = (other > order[:, None]) | ((other == order[:, None]) & (index < e[:, None]))
    place = tl.sum(before.to(tl.int32), axis=1)
    chosen = place < A
    total = tl.sum(tl.where(chosen, share, 0.0), axis=0) if RENORMALIZE else tl.sum(share, axis=0)
    tl.store(weights_ptr + token * A + place, share / total, mask=chosen)
    tl.store(experts_ptr + token * A + place, e, mask=chosen)


@triton.jit
def _router_logits_kernel(
    x_ptr,
    router_ptr,
    norm_weight_ptr,  # None or (D,)
    logits_ptr,  # (T, E) fp32
    T,
    x_stride,
    eps,
    E: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BK: tl.constexpr,
    PDL: tl.constexpr,
):
    gdc_launch_dependents(PDL)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    x_rows = x_ptr + tl.minimum(t, T - 1)[:, None].to(tl.int64) * x_stride
    rows = router_ptr + tl.minimum(e, E - 1)[:, None] * D
    gdc_wait(PDL)
    acc = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    squares = tl.zeros((BLOCK_T, BK), tl.float32)
    for start in tl.range(0, D, BK):
        k = start + tl.arange(0, BK)[None, :]
        x = tl.load(x_rows + k, mask=k < D, other=0.0).to(tl.float32)
        router = tl.load(rows + k, mask=k < D, other=0.0).to(tl.float32)
        if norm_weight_ptr is not None:
            squares += x * x
            x *= tl.load(norm_weight_ptr + k, mask=k < D, other=0.0).to(tl.float32)
        # three tf32 products come close to fp32: a choice of experts hangs on these logits
        acc = tl.dot(x, tl.trans(router), acc, input_precision="tf32x3")
    if norm_weight_ptr is not None:
        acc *= tl.rsqrt(tl.sum(squares, axis=1) / D + eps)[:, None]
    offsets = t[:, None].to(tl.int64) * E + e[None, :]
    tl.store(logits_ptr + offsets, acc, mask=(t[:, None] < T) & (e[None, :] < E))


@triton.jit
def _expert_up_kernel(
    x_ptr,
    gate_up_ptr,
    norm_weight_ptr,  # None or (D,)
    experts_ptr,  # (R,) int32
    h_ptr,  # (R, F)
    F,
    x_stride,
    eps,
    A: tl.constexpr,
    D: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    gdc_wait(PDL)
    gdc_launch_dependents(PDL)  # after the wait: `down` reads the experts before its own wait
    expert = tl.load(experts_ptr + row, cache_modifier=".cg").to(tl.int64)
    gate_rows = gate_up_ptr + (expert * (2 * F) + tl.minimum(n, F - 1))[:, None] * D
    up_rows = gate_rows + F.to(tl.int64) * D
    gate = _load_weight(gate_rows, 0, D, BK)
    up = _load_weight(up_rows, 0, D, BK)
    x_row = x_ptr + (row // A).to(tl.int64) * x_stride
    acc_gate = tl.zeros((BN, BK), tl.float32)
    acc_up = tl.zeros((BN, BK), tl.float32)
    squares = tl.zeros((1, BK), tl.float32)
    for start in tl.static_range(0, D, BK):
        if start + BK < D:
            next_gate = _load_weight(gate_rows, start + BK, D, BK)
            next_up = _load_weight(up_rows, start + BK, D, BK)
        x = _load_k(x_row, start, D, BK).to(tl.float32)
        if norm_weight_ptr is not None:
            squares += x * x
            x *= _load_k(norm_weight_ptr, start, D, BK).to(tl.float32)
        acc_gate += gate.to(tl.float32) * x
        acc_up += up.to(tl.float32) * x
        if start + BK < D:
            gate = next_gate
            up = next_up
    g = tl.sum(acc_gate, axis=1)
    u = tl.sum(acc_up, axis=1)
    if norm_weight_ptr is not None:
        scale = tl.rsqrt(tl.sum(squares) / D + eps)
        g *= scale
        u *= scale
    h = activate(g, "silu") * u
    tl.store(h_ptr + row.to(tl.int64) * F + n, h.to(h_ptr.dtype.element_ty), mask=n < F)


@triton.jit
def _expert_down_kernel(
    h_ptr,  # (R, F)
    down_ptr,
    weights_ptr,  # (R,) fp32
    experts_ptr,  # (R,) int32
    residual_ptr,
    out_ptr,  # (T, D)
    D,
    residual_stride,
    A: tl.constexpr,
    F: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PDL: tl.constexpr,
):
    gdc_launch_dependents(PDL)
    token = tl.program_id(0)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    n_inside = tl.minimum(n, D - 1)
    experts_ptr += token * A
    weights_ptr += token * A
    # Written before `up` began, see the head of the file; .cg reads it from L2, past stale lines.
    first = tl.load(experts_ptr, cache_modifier=".cg").to(tl.int64)
    rows = down_ptr + n_inside[:, None].to(tl.int64) * F
    expert_rows = rows + first * F * D
    w = _load_weight(expert_rows, 0, F, BK)
    gdc_wait(PDL)
    residual = tl.load(residual_ptr + token.to(tl.int64) * residual_stride + n_inside)
    h_ptr += token.to(tl.int64) * (A * F)
    acc = tl.zeros((BN, BK), tl.float32)
    # Unrolled: the weights of the next chunks are on their way while those of this one are used.
    for a in tl.static_range(A):
        if a + 1 < A:
            next_expert = tl.load(experts_ptr + a + 1, cache_modifier=".cg").to(tl.int64)
            next_rows = rows + next_expert * F * D
        share = tl.load(weights_ptr + a)
        for start in tl.static_range(0, F, BK):
            if start + BK < F:
                next_w = _load_weight(expert_rows, start + BK, F, BK)
            elif a + 1 < A:
                next_w = _load_weight(next_rows, 0, F, BK)
            h = _load_k(h_ptr + a * F, start, F, BK).to(tl.float32)
            acc += w.to(tl.float32) * (h * share)
            if start + BK < F or a + 1 < A:
                w = next_w
        if a + 1 < A:
            expert_rows = next_rows
    y = tl.sum(acc, axis=1) + residual.to(tl.float32)
    out = out_ptr + token.to(tl.int64) * D + n
    tl.store(out, y.to(out_ptr.dtype.element_ty), mask=n < D)


def _route_constexprs(num_experts: int, num_active: int, width: int) -> dict[str, Any]:
    block_e = next_power_of_2(num_experts)
    return {
        "E": num_experts,
        "A": num_active,
        "D": width,
        "BLOCK_E": block_e,
        "BK": max(64, min(next_power_of_2(width), _ROUTE_TILE // block_e, 1024)),
    }


def route(
    x: Tensor, router_weight: Tensor, *, norm: Norm | None, num_active: int, renormalize: bool
) -> tuple[Tensor, Tensor]:
    """`moe.moe_route` on the GPU."""
    if norm is not None and norm.kind != "rmsnorm":
        x, norm = apply_norm(x, norm), None
    x = x if x.stride(1) == 1 else x.contiguous()
    assert router_weight.is_contiguous()
    num_tokens, (num_experts, width) = x.shape[0], router_weight.shape
    norm_weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
    constexprs = _route_constexprs(num_experts, num_active, width)
    if num_tokens > _ROUTE_MAX_TOKENS and not is_batch_invariant():
        del constexprs["A"]
        logits = torch.empty(num_tokens, num_experts, dtype=torch.float32, device=x.device)
        constexprs |= {"BLOCK_T": 16, "BLOCK_E": max(16, constexprs["BLOCK_E"]), "BK": 64}
        launch(
            _router_logits_kernel,
            (triton.cdiv(num_tokens, 16),),
            x,
            router_weight,
            norm_weight,
            logits,
            num_tokens,
            x.stride(0),
            eps,
            **constexprs,
        )
        return softmax_topk(logits, num_active, renormalize=renormalize)
    weights = torch.empty(num_tokens, num_active, dtype=torch.float32, device=x.device)
    experts = torch.empty(num_tokens, num_active, dtype=torch.int32, device=x.device)
    if num_tokens:
        launch(
            _route_kernel,
            (num_tokens,),
            x,
            router_weight,
            norm_weight,
            weights,
            experts,
            x.stride(0),
            eps,
            **constexprs,
            RENORMALIZE=renormalize,
            num_warps=8,
        )
    return weights, experts


def moe_mlp_decode(
    x: Tensor,
    norm: Norm | None,
    weights: Tensor,
    experts: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    residual: Tensor,
) -> Tensor:
    """`moe.moe_mlp` for few tokens on the GPU: reads the weights of an expert once a row."""
    if norm is not None and norm.kind != "rmsnorm":
        x, norm = apply_norm(x, norm), None
    x = x if x.stride(1) == 1 else x.contiguous()
    residual = residual if residual.stride(1) == 1 else residual.contiguous()
    assert gate_up.is_contiguous()
    assert down.is_contiguous()
    assert weights.is_contiguous()
    assert experts.is_contiguous()
    (num_tokens, num_active), (_, width, ffn) = experts.shape, down.shape
    h = torch.empty(num_tokens * num_active, ffn, dtype=x.dtype, device=x.device)
    out = torch.empty(num_tokens, width, dtype=x.dtype, device=x.device)
    if num_tokens == 0:
        return out
    cut = up_cut(width, num_tokens)
    launch(
        _expert_up_kernel,
        (num_tokens * num_active, triton.cdiv(ffn, cut.block_n)),
        x,
        gate_up,
        None if norm is None else norm.weight,
        experts,
        h,
        ffn,
        x.stride(0),
        0.0 if norm is None else norm.eps,
        A=num_active,
        D=width,
        BN=cut.block_n,
        BK=cut.block_k,
        num_warps=cut.num_warps,
    )
    cut = down_cut(width, ffn)
    launch(
        _expert_down_kernel,
        (num_tokens, triton.cdiv(width, cut.block_n)),
        h,
        down,
        weights,
        experts,
        residual,
        out,
        width,
        residual.stride(0),
        A=num_active,
        F=ffn,
        BN=cut.block_n,
        BK=cut.block_k,
        num_warps=cut.num_warps,
    )
    return out


def _register() -> None:
    """Our MoE (D 768, F 6144, E 16, A 4), a fine-grained one, and a wide one."""
    for name, D, F, E, A in (
        ("768x6144", 768, 6144, 16, 4),
        ("2048x768", 2048, 768, 128, 8),
        ("4096x14336", 4096, 14336, 8, 2),
    ):
        constexprs = _route_constexprs(E, A, D)
        routing = {"x_ptr": "*bf16", "router_ptr": "*bf16", "norm_weight_ptr": "*bf16"}
        strides = {"x_stride": "i32:16", "eps": "fp32"}
        chosen = {"weights_ptr": "*fp32", "experts_ptr": "*i32"}
        register_compile(
            _route_kernel,
            f"moe_route_{name}",
            {**routing, **chosen, **strides},
            {**constexprs, "RENORMALIZE": True},
            num_warps=8,
        )
        del constexprs["A"]
        register_compile(
            _router_logits_kernel,
            f"moe_router_logits_{name}",
            {**routing, "logits_ptr": "*fp32", "T": "i32", **strides},
            {**constexprs, "BLOCK_T": 16, "BLOCK_E": max(16, constexprs["BLOCK_E"]), "BK": 64},
        )
        up, down = up_cut(D, 1), down_cut(D, F)
        register_compile(
            _expert_up_kernel,
            f"moe_up_{name}",
            {"x_ptr": "*bf16", "gate_up_ptr": "*bf16", "norm_weight_ptr": "*bf16"}
            | {"experts_ptr": "*i32", "h_ptr": "*bf16", "F": "i32:16", **strides},
            {"A": A, "D": D, "BN": up.block_n, "BK": up.block_k},
            num_warps=up.num_warps,
        )
        register_compile(
            _expert_down_kernel,
            f"moe_down_{name}",
            {"h_ptr": "*bf16", "down_ptr": "*bf16", **chosen, "residual_ptr": "*bf16"}
            | {"out_ptr": "*bf16", "D": "i32:16", "residual_stride": "i32:16"},
            {"A": A, "F": F, "BN": down.block_n, "BK": down.block_k},
            num_warps=down.num_warps,
        )


_register()
