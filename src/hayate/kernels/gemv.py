"""Matrix times one row, in one kernel: y = residual + act(norm(x) @ W^T + b).

A program owns BN rows of W (with `silu_and_mul`, BN rows of the gate and the BN rows of `up` that
belong to them) and walks along K in chunks of BK. Products are taken by FMA in fp32, each lane
keeping its own partial sums, which are added up once at the end; the result alone is rounded.

What makes it as fast as memory is to keep 23 KB a multiprocessor on the way (Little's law, H200):

- Weights do not depend on the kernel before this one. The first AHEAD chunks are therefore loaded
  before `gdc_wait`, and the next kernel is let in at once. (Prefetching the other chunks to L2 as
  well made every shape slower.)
- 16-byte loads along K, evict-first, so that the activations stay in the caches.
- A norm costs no pass: sums of x and of its squares grow in the loop of the product, and the scale,
  one number a row, is applied to the result. For layernorm1p, with g = 1 + weight:

      y = (sum(W g x) - mean(x) sum(W g)) / std(x) + sum(W b)

  whose sums over W alone are constants, taken once. fp32 keeps this exact to (mean / std)^2 2^-24,
  harmless beside bf16 up to a mean of 100 std.
- The grid is N / BN programs, hundreds even for the narrowest layers, so K is never split.

With a second row the multiplications, not the memory, would set the pace: an H200 can afford 14
instructions a weight, and two rows need 9 to 12. `small_gemm` on the tensor cores is faster there.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from hayate.kernels._triton import (
    cdiv,
    gdc_launch_dependents,
    gdc_wait,
    launch,
    next_power_of_2,
    register_compile,
    tl,
    triton,
)
from hayate.kernels.elementwise import activate
from hayate.kernels.norm import Norm, apply_norm

__all__ = ["GemvConfig", "finish", "gemv_config", "launch_gemv"]


class GemvConfig(NamedTuple):
    """How a GEMV is cut: rows of W and length of a chunk that one program holds at a time.

    `block_k` is at least 256 times `num_warps` (16 bytes a lane); below that, x and W would be laid
    out differently over the lanes, and every chunk would go through shared memory. `ahead` chunks
    are on the way at once.
    """

    block_n: int
    block_k: int
    num_warps: int
    ahead: int = 1


# Best in a sweep of whole decode steps on an H200 (docs/log.md), bf16: (N, K) -> cut. N counts gate
# and up.
_MEASURED: dict[tuple[int, int], GemvConfig] = {
    (6144, 4096): GemvConfig(1, 4096, 4),
    (4096, 4096): GemvConfig(2, 1024, 4, 2),
    (23040, 4096): GemvConfig(2, 4096, 4),
    (28672, 4096): GemvConfig(2, 4096, 4),
    (4096, 11520): GemvConfig(1, 1024, 1, 2),
    (131072, 4096): GemvConfig(4, 4096, 8),
    (5120, 3072): GemvConfig(4, 1024, 4, 2),
    (3072, 3072): GemvConfig(4, 1024, 4, 2),
    (9216, 3072): GemvConfig(2, 1024, 4, 2),
    (3072, 9216): GemvConfig(2, 512, 2, 3),
    (256000, 3072): GemvConfig(4, 1024, 4, 2),
    (896, 768): GemvConfig(1, 1024, 1),
    (768, 768): GemvConfig(2, 1024, 1),
    (960, 576): GemvConfig(4, 1024, 4),
    (576, 576): GemvConfig(1, 1024, 1),
    (3072, 576): GemvConfig(4, 1024, 4),
    (576, 1536): GemvConfig(2, 1024, 2),
}


def gemv_config(n: int, k: int, gated: bool) -> GemvConfig:
    """The cut for a weight (n, k); `block_n` counts rows of W, gate and up alike.

    Shapes that were not measured follow those that were: small chunks in few warps where K is long
    or the head wide, the whole row at once where it is short.
    """
    config = _MEASURED.get((n, k))
    if config is None:
        if k <= 1024:
            block_k = max(256, next_power_of_2(k))
            config = GemvConfig(8, 512, 2) if n >= 16384 else GemvConfig(4, block_k, block_k // 256)
        elif n >= 16384 and k % 4096 == 0:
            config = GemvConfig(4, 4096, 8)
        elif k % 2048 == 0:
            config = GemvConfig(2, 2048, 4)
        else:
            config = GemvConfig(4, 1024, 4)
    return config._replace(block_n=max(config.block_n, 2)) if gated else config


@triton.jit
def _append_chunk(chunks, row_ptrs, START: tl.constexpr, K: tl.constexpr, BK: tl.constexpr):
    """`chunks` and columns START .. START + BK of the rows at `row_ptrs` (BN, 1); zeros past K."""
    k = START + tl.arange(0, BK)[None, :]
    if START + BK <= K:
        chunk = tl.load(row_ptrs + k, eviction_policy="evict_first")
    else:
        chunk = tl.load(row_ptrs + k, mask=k < K, other=0.0, eviction_policy="evict_first")
    return chunks + (chunk,)  # noqa: RUF005  # Triton knows no starred tuple


@triton.jit
def _load_x(x_ptr, START: tl.constexpr, K: tl.constexpr, BK: tl.constexpr):
    """Values START .. START + BK of x or of another vector, (1, BK) in fp32; zeros past K."""
    k = START + tl.arange(0, BK)[None, :]
    if START + BK > K:
        x = tl.load(x_ptr + k, mask=k < K, other=0.0)
    else:
        x = tl.load(x_ptr + k)
    return x.to(tl.float32)


@triton.jit
def finish(
    acc,
    acc_up,
    bias_ptr,
    residual_ptr,
    out_ptr,
    m,
    n,
    rows,
    N_out,
    residual_stride,
    ACTIVATION: tl.constexpr,
):
    """Store residual + act(acc + bias), rounded once, at rows m and columns n of the result."""
    mask = (m[:, None] < rows) & (n[None, :] < N_out)
    GATED: tl.constexpr = ACTIVATION == "silu_and_mul"
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < N_out, other=0.0)[None, :].to(tl.float32)
        if GATED:
            up_bias = tl.load(bias_ptr + N_out + n, mask=n < N_out, other=0.0)
            acc_up += up_bias[None, :].to(tl.float32)
    if GATED:
        y = activate(acc, "silu") * acc_up
    else:
        y = activate(acc, ACTIVATION)
    if residual_ptr is not None:
        offsets = m[:, None].to(tl.int64) * residual_stride + n[None, :]
        y += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    offsets = m[:, None].to(tl.int64) * N_out + n[None, :]
    tl.store(out_ptr + offsets, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gemv_kernel(
    x_ptr,  # (K,)
    w_ptr,
    bias_ptr,  # None or (N,)
    norm_weight_ptr,  # None or (K,)
    folded_ptr,  # None or (2, N) fp32: sum(W g) and sum(W b) of layernorm1p
    residual_ptr,  # None or (N_out,)
    out_ptr,
    N_out,  # columns of the result: N, or N / 2 when gated
    eps,
    K: tl.constexpr,
    BN: tl.constexpr,  # columns of the result a program makes
    BK: tl.constexpr,
    AHEAD: tl.constexpr,  # chunks on the way
    NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
):
    gdc_launch_dependents(PDL)
    GATED: tl.constexpr = ACTIVATION == "silu_and_mul"
    # Where nothing but the sum follows the product, the residual is its first term: loaded with x,
    # it does not lengthen the end of the kernel, for which the next one waits.
    EARLY_RESIDUAL: tl.constexpr = residual_ptr is not None and ACTIVATION is None and NORM is None
    CENTRED: tl.constexpr = NORM == "layernorm1p"
    STEPS: tl.constexpr = (K + BK - 1) // BK
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    n_inside = tl.minimum(n, N_out - 1)  # a row past the end repeats the last and is not stored
    w_rows = (w_ptr + n_inside.to(tl.int64) * K)[:, None]
    up_rows = (w_ptr + (N_out + n_inside).to(tl.int64) * K)[:, None]
    w = ()
    up = ()
    for i in tl.static_range(min(AHEAD, STEPS)):
        w = _append_chunk(w, w_rows, i * BK, K, BK)
        if GATED:
            up = _append_chunk(up, up_rows, i * BK, K, BK)
    if NORM is not None:
        next_g = _load_x(norm_weight_ptr, 0, K, BK)
    if CENTRED:
        sum_wg = tl.load(folded_ptr + n_inside)
        sum_wb = tl.load(folded_ptr + N_out + n_inside)
    gdc_wait(PDL)
    acc = tl.zeros((BN, BK), tl.float32)
    if EARLY_RESIDUAL:
        residual = tl.load(residual_ptr + n_inside).to(tl.float32)
        acc = tl.where(tl.arange(0, BK)[None, :] == 0, residual[:, None], acc)
    acc_up = tl.zeros((BN, BK), tl.float32)
    squares = tl.zeros((1, BK), tl.float32)
    sums = tl.zeros((1, BK), tl.float32)
    for i in tl.static_range(STEPS):
        x = _load_x(x_ptr, i * BK, K, BK)
        if i + AHEAD < STEPS:
            w = _append_chunk(w, w_rows, (i + AHEAD) * BK, K, BK)
            if GATED:
                up = _append_chunk(up, up_rows, (i + AHEAD) * BK, K, BK)
        if NORM is not None:
            g = next_g
            if i + 1 < STEPS:
                next_g = _load_x(norm_weight_ptr, (i + 1) * BK, K, BK)
            if CENTRED:
                g += 1.0
                sums += x
            squares += x * x
            x *= g
        acc += w[i].to(tl.float32) * x
        if GATED:
            acc_up += up[i].to(tl.float32) * x

    y = tl.sum(acc, axis=1)
    y_up = tl.sum(acc_up, axis=1) if GATED else y
    if NORM is not None:
        # Before the loop's end this would overlap with the last weights, but cost a block a SM.
        variance = tl.sum(tl.sum(squares, axis=1), axis=0) / K
        if CENTRED:
            mean = tl.sum(tl.sum(sums, axis=1), axis=0) / K
            variance = tl.maximum(variance - mean * mean, 0.0)
            y -= mean * sum_wg
        scale = tl.rsqrt(variance + eps)
        y *= scale
        y_up *= scale
        if CENTRED:
            y += sum_wb
    finish(
        y[None, :], y_up[None, :], bias_ptr, None if EARLY_RESIDUAL else residual_ptr, out_ptr,
        tl.arange(0, 1), n, 1, N_out, N_out, ACTIVATION,
    )  # fmt: skip


def _constexprs(
    config: GemvConfig, k: int, norm: str | None, activation: str | None
) -> dict[str, Any]:
    """The kernel's constexprs for weights of row length k."""
    return {
        "K": k,
        "BN": config.block_n // 2 if activation == "silu_and_mul" else config.block_n,
        "BK": config.block_k,
        "AHEAD": config.ahead,
        "NORM": norm,
        "ACTIVATION": activation,
    }


# weight -> (versions of weight and norm, their folded sums)
_FOLDED = WeakTensorKeyDictionary()


def _folded_sums(weight: Tensor, norm: Norm) -> Tensor:
    """sum_k W g and sum_k W b of every row, (2, N) fp32; kept until one of the tensors changes."""
    assert norm.bias is not None
    parts = (weight, norm.weight, norm.bias)
    versions = tuple(
        v for part in parts for v in (part.data_ptr(), 0 if part.is_inference() else part._version)
    )
    known = _FOLDED.get(weight)
    if known is None or known[0] != versions:
        factors = torch.stack([1 + norm.weight.float(), norm.bias.float()])
        # Piece by piece: a vocabulary head in fp32 would be gigabytes.
        sums = [factors @ rows.float().t() for rows in weight.split(4096)]
        known = _FOLDED[weight] = (versions, torch.cat(sums, dim=1).contiguous())
    return known[1]


def launch_gemv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Norm | None,
    activation: str | None,
    residual: Tensor | None,
    config: GemvConfig | None = None,
) -> Tensor:
    """`linear` for one row; x (1, D), weight and residual are contiguous.

    `config` replaces the choice of `gemv_config`, for measurements.
    """
    rows, k = x.shape
    n = weight.shape[0]
    assert rows == 1
    assert weight.is_contiguous()
    gated = activation == "silu_and_mul"
    if norm is not None and (norm.kind == "layernorm" or (gated and norm.kind == "layernorm1p")):
        # No model has them for one row; the second would need twice the sums.
        x, norm = apply_norm(x, norm), None
    n_out = n // 2 if gated else n
    config = config or gemv_config(n, k, gated)
    out = torch.empty(1, n_out, dtype=x.dtype, device=x.device)
    kind = None if norm is None else norm.kind
    constexprs = _constexprs(config, k, kind, activation)
    launch(
        _gemv_kernel,
        (cdiv(n_out, constexprs["BN"]),),
        x,
        weight,
        bias,
        None if norm is None else norm.weight,
        _folded_sums(weight, norm) if norm is not None and norm.kind == "layernorm1p" else None,
        residual,
        out,
        n_out,
        0.0 if norm is None else norm.eps,
        **constexprs,
        num_warps=config.num_warps,
    )
    return out


def _register(
    n: int,
    k: int,
    norm: str | None = None,
    activation: str | None = None,
    residual: bool = False,
    bias: bool = False,
) -> None:
    config = gemv_config(n, k, activation == "silu_and_mul")
    constexprs = _constexprs(config, k, norm, activation)
    present = {
        "x_ptr": True,
        "w_ptr": True,
        "bias_ptr": bias,
        "norm_weight_ptr": norm is not None,
        "folded_ptr": norm == "layernorm1p",
        "residual_ptr": residual,
        "out_ptr": True,
    }
    parts = [f"gemv_{n}x{k}", norm, activation, "residual" if residual else None]
    register_compile(
        _gemv_kernel,
        "_".join(part for part in parts if part),
        {
            name: "*fp32" if name == "folded_ptr" else "*bf16"
            for name, is_there in present.items()
            if is_there
        }
        | {"N_out": "i32:16", "eps": "fp32"},
        {name: None for name, is_there in present.items() if not is_there} | constexprs,
        num_warps=config.num_warps,
    )


# An 8B model's layers, then the other widths.
_register(6144, 4096, norm="rmsnorm", bias=True)
_register(4096, 4096, residual=True)
_register(23040, 4096, norm="rmsnorm", activation="silu_and_mul")
_register(4096, 11520, residual=True)
_register(131072, 4096, norm="rmsnorm")
_register(9216, 3072, norm="layernorm1p", activation="relu2")
_register(3072, 9216, residual=True)
_register(256000, 3072, norm="layernorm1p")
_register(3072, 576, norm="rmsnorm", activation="silu_and_mul")
_register(576, 1536, residual=True)
_register(49152, 576, norm="rmsnorm")
