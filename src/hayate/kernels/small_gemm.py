"""Matrix times 3 to 32 rows on the tensor cores: y = residual + act(x @ W^T + b), in one kernel.

Decoding a batch still costs the bytes of W, so the aim is that of `gemv`: read W at the speed of
memory. A program makes a tile of all M rows (padded to 16 or 32) and BN columns over one of
SPLIT parts of K, its loads pipelined through shared memory.

- x is read again by every program, from L2: M / BN of the bytes of W. BN is therefore 64 or 128,
  which leaves few tiles for the narrow layers, and K is split until the multiprocessors are busy.
- The parts are summed without a second kernel and always in the same order: each program writes its
  part (fp32) to a workspace and counts itself in; the last one to arrive adds all parts, part 0
  first, and sets the counter back to zero for the next launch.
- Before `gdc_wait` a program prefetches its first stages of W to L2, as the kernel before it ends.
- The norm is a kernel of its own (`linear` calls it). It moves 2 * M * K elements, at 16 rows less
  than a hundredth of an 8B layer's bytes, and its time is covered by that prefetch. Inside this
  kernel each of the N / BN programs would need the row statistics before its first product.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hayate.kernels._triton import (
    cdiv,
    gdc_launch_dependents,
    gdc_wait,
    launch,
    next_power_of_2,
    num_sms,
    prefetch_l2,
    register_compile,
    tl,
    triton,
)
from hayate.kernels.gemv import finish

__all__ = ["MAX_ROWS", "SmallGemmConfig", "launch_small_gemm", "small_gemm_config"]

MAX_ROWS = 32
# Tiles one launch may have per counter buffer; a vocabulary of 256k columns has 4000, and no split.
_MAX_TILES = 8192
# 128-byte lines of each row of W to prefetch: about the stages a program starts with.
_PREFETCH_LINES = 8


class SmallGemmConfig(NamedTuple):
    """How a product is cut: columns of a tile, length of a step along K, parts of K, pipelining."""

    block_n: int
    block_k: int
    split: int
    num_warps: int
    num_stages: int


# Best of a sweep on an H200 with 8 rows (docs/log.md): (N, K) -> cut. Up to 147 KB of shared memory,
# so for cards of compute capability 9.0 and 10.0 only.
_MEASURED: dict[tuple[int, int], SmallGemmConfig] = {
    (6144, 4096): SmallGemmConfig(32, 128, 2, 4, 6),
    (4096, 4096): SmallGemmConfig(32, 256, 1, 4, 6),
    (4096, 11520): SmallGemmConfig(32, 256, 1, 4, 6),
}


def small_gemm_config(
    n: int, k: int, block_m: int, sms: int, *, large_shared: bool = False
) -> SmallGemmConfig:
    """The cut for a weight (n, k) and x padded to block_m rows; `block_n` counts gate and up alike.

    A block of 60 or 80 KB has 48 or 64 KB of W on the way, and two or three of them fit on a
    multiprocessor of an H200, one on cards that have 99 KB. `large_shared`: a program may have 200.
    """
    if large_shared and block_m == 16 and (n, k) in _MEASURED:
        return _MEASURED[n, k]
    if block_m == 16:
        block_n, block_k, num_warps, num_stages, blocks_per_sm = 64, 128, 4, 4, 3
    else:
        # x weighs twice as much here, hence the wider tile
        block_n, block_k, num_warps, num_stages, blocks_per_sm = 128, 64, 8, 5, 2
    if k % block_k:
        block_k = 64
    tiles = cdiv(n, block_n)
    steps = cdiv(k, block_k)
    # As many programs as run at once, each with at least four steps, so that it pipelines.
    most = max(1, min(blocks_per_sm * sms // tiles, steps // 4, 8))
    # Parts of one length need no masks: worth up to a third of the programs.
    even = max(i for i in range(1, most + 1) if steps % i == 0)
    split = even if 3 * even >= 2 * most else most
    return SmallGemmConfig(block_n, block_k, split, num_warps, num_stages)


@triton.jit
def _small_gemm_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,  # None or (N,)
    residual_ptr,  # None or (rows, N_out)
    out_ptr,
    workspace_ptr,  # (SPLIT, 1 or 2, BM, N_out) fp32; None when SPLIT is 1
    counter_ptr,  # (tiles,) int32, zero before and after; None when SPLIT is 1
    rows,
    N_out,  # columns of the result: N, or N / 2 when gated
    x_stride,
    residual_stride,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,  # columns of the result a program makes
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    PREFETCH_LINES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
):
    gdc_launch_dependents(PDL)
    GATED: tl.constexpr = ACTIVATION == "silu_and_mul"
    STEPS: tl.constexpr = (K + BK * SPLIT - 1) // (BK * SPLIT)
    EVEN: tl.constexpr = K % (BK * SPLIT) == 0
    tile = tl.program_id(0) // SPLIT
    part = tl.program_id(0) % SPLIT
    m = tl.arange(0, BM)
    n = tile * BN + tl.arange(0, BN)
    mask = (m[:, None] < rows) & (n[None, :] < N_out)
    k = part * (STEPS * BK) + tl.arange(0, BK)
    n_inside = tl.minimum(n, N_out - 1)  # a row past the end repeats the last and is not stored
    x_rows = x_ptr + m[:, None].to(tl.int64) * x_stride
    w_rows = w_ptr + n_inside[:, None].to(tl.int64) * K
    up_rows = w_ptr + (N_out + n_inside)[:, None].to(tl.int64) * K
    if PDL:
        LINE: tl.constexpr = 1024 // w_ptr.dtype.element_ty.primitive_bitwidth
        first = part * (STEPS * BK) + tl.arange(0, PREFETCH_LINES) * LINE
        first = tl.minimum(first, K - 1)[None, :]
        prefetch_l2(w_rows + first, PDL)
        if GATED:
            prefetch_l2(up_rows + first, PDL)
    gdc_wait(PDL)

    acc = tl.zeros((BM, BN), tl.float32)
    acc_up = tl.zeros((BM, BN), tl.float32)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        ks = k + step * BK
        if EVEN:
            x = tl.load(x_rows + ks[None, :], mask=m[:, None] < rows, other=0.0)
            w = tl.load(w_rows + ks[None, :], eviction_policy="evict_first")
        else:
            inside = ks[None, :] < K
            x = tl.load(x_rows + ks[None, :], mask=(m[:, None] < rows) & inside, other=0.0)
            w = tl.load(w_rows + ks[None, :], mask=inside, other=0.0, eviction_policy="evict_first")
        acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
        if GATED:
            if EVEN:
                up = tl.load(up_rows + ks[None, :], eviction_policy="evict_first")
            else:
                up = tl.load(
                    up_rows + ks[None, :], mask=inside, other=0.0, eviction_policy="evict_first"
                )
            acc_up = tl.dot(x, tl.trans(up), acc_up, input_precision="ieee")

    if SPLIT == 1:
        finish(
            acc, acc_up, bias_ptr, residual_ptr, out_ptr,
            m, n, rows, N_out, residual_stride, ACTIVATION,
        )  # fmt: skip
    else:
        PLANES: tl.constexpr = 2 if GATED else 1
        plane = BM * N_out
        offsets = m[:, None] * N_out + n[None, :]
        mine = workspace_ptr + part * PLANES * plane + offsets
        tl.store(mine, acc, mask=mask)
        if GATED:
            tl.store(mine + plane, acc_up, mask=mask)
        tl.debug_barrier()  # every lane's part is written before the count says so
        arrived = tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel")
        if arrived == SPLIT - 1:
            acc = tl.zeros((BM, BN), tl.float32)
            acc_up = tl.zeros((BM, BN), tl.float32)
            for i in tl.static_range(SPLIT):
                other = workspace_ptr + i * PLANES * plane + offsets
                acc += tl.load(other, mask=mask, other=0.0, cache_modifier=".cg")
                if GATED:
                    acc_up += tl.load(other + plane, mask=mask, other=0.0, cache_modifier=".cg")
            tl.store(counter_ptr + tile, 0)
            finish(
                acc, acc_up, bias_ptr, residual_ptr, out_ptr,
                m, n, rows, N_out, residual_stride, ACTIVATION,
            )  # fmt: skip


@cache
def _counters(device: torch.device) -> Tensor:
    """The counters of arrived parts: zero between launches, so one buffer serves a whole device.

    Launches that use it must follow each other on one stream, as an engine's do.
    """
    return torch.zeros(_MAX_TILES, dtype=torch.int32, device=device)


def _constexprs(
    config: SmallGemmConfig, k: int, rows: int, activation: str | None
) -> dict[str, Any]:
    gated = activation == "silu_and_mul"
    return {
        "K": k,
        "BM": max(16, next_power_of_2(rows)),
        "BN": config.block_n // 2 if gated else config.block_n,
        "BK": config.block_k,
        "SPLIT": config.split,
        "STAGES": config.num_stages,
        "PREFETCH_LINES": _PREFETCH_LINES,
        "ACTIVATION": activation,
    }


def launch_small_gemm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    config: SmallGemmConfig | None = None,
) -> Tensor:
    """`linear` without the norm for 1 to 32 rows.

    `weight` is contiguous, x and residual have contiguous rows. `config` replaces the choice of
    `small_gemm_config`, for measurements.
    """
    rows, k = x.shape
    n = weight.shape[0]
    assert 1 <= rows <= MAX_ROWS
    assert weight.is_contiguous()
    gated = activation == "silu_and_mul"
    n_out = n // 2 if gated else n
    block_m = max(16, next_power_of_2(rows))
    if config is None:
        large = x.is_cuda and torch.cuda.get_device_capability(x.device)[0] in (9, 10)
        config = small_gemm_config(n, k, block_m, num_sms(x.device), large_shared=large)
    constexprs = _constexprs(config, k, rows, activation)
    tiles = cdiv(n_out, constexprs["BN"])
    out = torch.empty(rows, n_out, dtype=x.dtype, device=x.device)
    workspace = counters = None
    if config.split > 1:
        assert tiles <= _MAX_TILES
        size = config.split * block_m * n
        workspace = torch.empty(size, dtype=torch.float32, device=x.device)
        counters = _counters(x.device)
    launch(
        _small_gemm_kernel,
        (tiles * config.split,),
        x,
        weight,
        bias,
        residual,
        out,
        workspace,
        counters,
        rows,
        n_out,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        **constexprs,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out


def _register(
    n: int,
    k: int,
    rows: int,
    activation: str | None = None,
    residual: bool = False,
    large_shared: bool = False,
) -> None:
    block_m = max(16, next_power_of_2(rows))
    config = small_gemm_config(n, k, block_m, 132, large_shared=large_shared)
    pointers = {"x_ptr": "*bf16", "w_ptr": "*bf16", "out_ptr": "*bf16"}
    absent: dict[str, Any] = {"bias_ptr": None}
    if residual:
        pointers["residual_ptr"] = "*bf16"
    else:
        absent["residual_ptr"] = None
    if config.split > 1:
        pointers |= {"workspace_ptr": "*fp32", "counter_ptr": "*i32"}
    else:
        absent |= {"workspace_ptr": None, "counter_ptr": None}
    integers = {"rows": "i32", "N_out": "i32:16", "x_stride": "i32:16", "residual_stride": "i32:16"}
    parts = [f"small_gemm_{n}x{k}_m{rows}", activation, "residual" if residual else None]
    parts.append("large" if large_shared else None)
    register_compile(
        _small_gemm_kernel,
        "_".join(part for part in parts if part),
        pointers | integers,
        absent | _constexprs(config, k, rows, activation),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        min_cc=90 if large_shared else 80,
        max_cc=100 if large_shared else 999,
    )


# An 8B model's layers: a split product, a gated one, one with a residual and a ragged K, the head.
for _rows in (16, 32):
    _register(6144, 4096, _rows)
    _register(23040, 4096, _rows, activation="silu_and_mul")
    _register(4096, 11520, _rows, residual=True)
    _register(131072, 4096, _rows)
_register(9216, 3072, 16, activation="relu2")
_register(3072, 576, 16, activation="silu_and_mul")
_register(4096, 11520, 8, residual=True, large_shared=True)
