"""Matrix times 2 to 64 rows on the tensor cores, in one kernel: y = residual + act(x @ W^T + b).

Decoding a batch still costs the bytes of W, so the aim is that of `gemv`: read W at the speed of
memory. A program makes a tile of all M rows (padded to a power of two, at least 16) and BN columns
over one of SPLIT parts of K, its loads pipelined through shared memory.

- x is read again by every program, from L2: M / BN of the bytes of W. BN is therefore 32 to 128,
  which leaves few tiles for the narrow layers, and K is split until the multiprocessors are busy.
- The parts are summed without a second kernel and always in the same order: each program writes its
  part (fp32) to a workspace and counts itself in; the last one to arrive adds all parts, part 0
  first, and sets the counter back to zero for the next launch.
- Before `gdc_wait` a program prefetches its first stages of W to L2, as the kernel before it ends.
- Above 16 rows the tile is computed as its transpose, W x^T: W then fills the long side of the
  tensor core's instruction (64 rows with wgmma), which reads both operands from shared memory.
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

MAX_ROWS = 64
# Tiles one launch may have per counter buffer; a vocabulary of 256k columns has 4000, and no split.
_MAX_TILES = 8192


class SmallGemmConfig(NamedTuple):
    """How a product is cut: columns of a tile, length of a step along K, parts of K, pipelining.

    `prefetch_lines`: 128-byte lines of each row of W that a program prefetches before the wait.
    """

    block_n: int
    block_k: int
    split: int
    num_warps: int
    num_stages: int
    prefetch_lines: int = 8


# Best of sweeps on an H200, in the chain of a model's layers (docs/log.md): (N, K, above 16 rows) ->
# cut. Up to 196 KB of shared memory, so for cards of compute capability 9.0 and 10.0 only.
_MEASURED: dict[tuple[int, int, bool], SmallGemmConfig] = {
    (6144, 4096, False): SmallGemmConfig(32, 128, 2, 4, 6),
    (4096, 4096, False): SmallGemmConfig(32, 256, 1, 4, 6),
    (4096, 11520, False): SmallGemmConfig(32, 256, 1, 4, 6),
    (5120, 3072, False): SmallGemmConfig(32, 128, 2, 4, 6),
    (3072, 3072, False): SmallGemmConfig(32, 128, 3, 4, 6),
    (9216, 3072, False): SmallGemmConfig(32, 128, 1, 4, 6),
    (6144, 4096, True): SmallGemmConfig(64, 256, 1, 4, 3),
    (4096, 4096, True): SmallGemmConfig(64, 128, 2, 4, 4),
    (23040, 4096, True): SmallGemmConfig(128, 64, 1, 4, 4, 0),
    (4096, 11520, True): SmallGemmConfig(64, 128, 2, 4, 5),
}


def small_gemm_config(
    n: int, k: int, block_m: int, sms: int, *, gated: bool, large_shared: bool
) -> SmallGemmConfig:
    """The cut for a weight (n, k) and x padded to block_m rows; `block_n` counts gate and up alike.

    `large_shared`: a program may have 200 KB of shared memory (compute capability 9.0 and 10.0),
    else 99.
    """
    if large_shared and (n, k, block_m > 16) in _MEASURED:
        return _MEASURED[n, k, block_m > 16]
    if block_m > 16:
        return _swapped_config(n, k, block_m, sms, gated, large_shared)
    # 60 KB a block, 48 of them W on the way: three fit on a multiprocessor of an H200, one on
    # cards that have 99 KB.
    block_n, block_k = 64, 64 if k % 128 else 128
    tiles = cdiv(n, block_n)
    steps = cdiv(k, block_k)
    # As many programs as run at once, each with at least four steps, so that it pipelines.
    most = max(1, min(3 * sms // tiles, steps // 4, 8))
    # Parts of one length need no masks: worth up to a third of the programs.
    even = max(i for i in range(1, most + 1) if steps % i == 0)
    split = even if 3 * even >= 2 * most else most
    return SmallGemmConfig(block_n, block_k, split, 4, 4)


def _swapped_config(
    n: int, k: int, block_m: int, sms: int, gated: bool, large_shared: bool
) -> SmallGemmConfig:
    """Tiles of 64 rows of W, which wgmma takes at a time; 128 for gate and up or a wide layer."""
    block_n = 128 if gated or n >= 16384 else 64
    block_k = 64 if block_n == 128 or k % 128 or not large_shared else 128
    # Parts until nine tenths of the multiprocessors have a program; at least four steps each.
    wanted = cdiv(9 * sms, 10 * cdiv(n, block_n))
    split = max(1, min(wanted, cdiv(k, block_k) // 4, 8))
    return SmallGemmConfig(block_n, block_k, split, 4, 4)


@triton.jit
def _load_w(row_ptrs, k, K: tl.constexpr, EVEN: tl.constexpr):
    """Columns k of the rows of W that start at `row_ptrs` (BN, 1); zeros past K."""
    if EVEN:
        w = tl.load(row_ptrs + k[None, :], eviction_policy="evict_first")
    else:
        mask = k[None, :] < K
        w = tl.load(row_ptrs + k[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
    return w


@triton.jit
def _multiply(x, w, acc, SWAPPED: tl.constexpr):
    """acc + x w^T, or with SWAPPED acc + w x^T."""
    if SWAPPED:
        acc = tl.dot(w, tl.trans(x), acc, input_precision="ieee")
    else:
        acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
    return acc


@triton.jit
def _store_part(pointers, first, second, part, size, mask, PAIR: tl.constexpr):
    """Write a part of one sum, or of a PAIR of them, each part of `size` values."""
    mine = pointers + part * size * (2 if PAIR else 1)
    tl.store(mine, first, mask=mask)
    if PAIR:
        tl.store(mine + size, second, mask=mask)


@triton.jit
def _sum_parts(pointers, size, mask, SPLIT: tl.constexpr, PAIR: tl.constexpr):
    """The sums of what `_store_part` wrote, part 0 first; zeros for the second without PAIR."""
    first = tl.zeros(mask.shape, tl.float32)
    second = tl.zeros(mask.shape, tl.float32)
    for i in tl.static_range(SPLIT):
        theirs = pointers + i * size * (2 if PAIR else 1)
        first += tl.load(theirs, mask=mask, other=0.0, cache_modifier=".cg")
        if PAIR:
            second += tl.load(theirs + size, mask=mask, other=0.0, cache_modifier=".cg")
    return first, second


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
    SWAPPED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
):
    gdc_launch_dependents(PDL)
    GATED: tl.constexpr = ACTIVATION == "silu_and_mul"
    # Where nothing but the sum follows the product, the residual is its first term: read early, it
    # does not lengthen the end of the kernel, for which the next one waits.
    EARLY_RESIDUAL: tl.constexpr = residual_ptr is not None and ACTIVATION is None
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
    if PDL and PREFETCH_LINES > 0:
        LINE: tl.constexpr = 1024 // w_ptr.dtype.element_ty.primitive_bitwidth
        first = part * (STEPS * BK) + tl.arange(0, PREFETCH_LINES) * LINE
        first = tl.minimum(first, K - 1)[None, :]
        prefetch_l2(w_rows + first, PDL)
        if GATED:
            prefetch_l2(up_rows + first, PDL)
    gdc_wait(PDL)

    acc = tl.zeros((BM, BN), tl.float32)
    if EARLY_RESIDUAL:
        residual = residual_ptr + m[:, None].to(tl.int64) * residual_stride + n[None, :]
        acc += tl.load(residual, mask=mask & (part == 0), other=0.0).to(tl.float32)
    if SWAPPED:
        acc = tl.trans(acc)
    acc_up = tl.zeros((BN, BM) if SWAPPED else (BM, BN), tl.float32)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        ks = k + step * BK
        x_mask = m[:, None] < rows
        if not EVEN:
            x_mask = x_mask & (ks[None, :] < K)
        x = tl.load(x_rows + ks[None, :], mask=x_mask, other=0.0)
        w = _load_w(w_rows, ks, K, EVEN)
        acc = _multiply(x, w, acc, SWAPPED)
        if GATED:
            acc_up = _multiply(x, _load_w(up_rows, ks, K, EVEN), acc_up, SWAPPED)
    if SWAPPED:
        acc = tl.trans(acc)
        acc_up = tl.trans(acc_up)
    if SPLIT > 1:
        plane = BM * N_out
        planes = workspace_ptr + m[:, None] * N_out + n[None, :]
        _store_part(planes, acc, acc_up, part, plane, mask, GATED)
        tl.debug_barrier()  # every lane's part is written before the count says so
        if tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel") < SPLIT - 1:
            return
        acc, acc_up = _sum_parts(planes, plane, mask, SPLIT, GATED)
        tl.store(counter_ptr + tile, 0)

    finish(
        acc, acc_up, bias_ptr, None if EARLY_RESIDUAL else residual_ptr, out_ptr,
        m, n, rows, N_out, residual_stride, ACTIVATION,
    )  # fmt: skip


@cache
def _counters(device: torch.device) -> Tensor:
    """The counters of arrived parts: zero between launches, so one buffer serves a whole device.

    Launches that use it must follow each other on one stream, as an engine's do.
    """
    return torch.zeros(_MAX_TILES, dtype=torch.int32, device=device)


def _constexprs(
    config: SmallGemmConfig, k: int, block_m: int, activation: str | None
) -> dict[str, Any]:
    return {
        "K": k,
        "BM": block_m,
        "BN": config.block_n // 2 if activation == "silu_and_mul" else config.block_n,
        "BK": config.block_k,
        "SPLIT": config.split,
        "STAGES": config.num_stages,
        "PREFETCH_LINES": config.prefetch_lines,
        "SWAPPED": block_m > 16,
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
    """`linear` for 1 to 64 rows; `weight` is contiguous, x and residual have contiguous rows.

    `config` replaces the choice of `small_gemm_config`, for measurements.
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
        config = small_gemm_config(
            n, k, block_m, num_sms(x.device), gated=gated, large_shared=large
        )
    constexprs = _constexprs(config, k, block_m, activation)
    tiles = cdiv(n_out, constexprs["BN"])
    out = torch.empty(rows, n_out, dtype=x.dtype, device=x.device)
    workspace = counters = None
    if config.split > 1:
        assert tiles <= _MAX_TILES
        workspace = torch.empty(config.split * block_m * n, dtype=torch.float32, device=x.device)
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
    block_m, gated = max(16, next_power_of_2(rows)), activation == "silu_and_mul"
    config = small_gemm_config(n, k, block_m, 132, gated=gated, large_shared=large_shared)
    present = {
        "x_ptr": True,
        "w_ptr": True,
        "bias_ptr": False,
        "residual_ptr": residual,
        "out_ptr": True,
        "workspace_ptr": config.split > 1,
        "counter_ptr": config.split > 1,
    }
    kinds = {"workspace_ptr": "*fp32", "counter_ptr": "*i32"}
    integers = {"rows": "i32", "N_out": "i32:16", "x_stride": "i32:16", "residual_stride": "i32:16"}
    parts = [f"small_gemm_{n}x{k}_m{rows}", activation, "residual" if residual else None]
    parts.append("large" if large_shared else None)
    register_compile(
        _small_gemm_kernel,
        "_".join(part for part in parts if part),
        {name: kinds.get(name, "*bf16") for name, is_there in present.items() if is_there}
        | integers,
        {name: None for name, is_there in present.items() if not is_there}
        | _constexprs(config, k, block_m, activation),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        min_cc=90 if large_shared else 80,
        max_cc=100 if large_shared else 999,
    )


# An 8B model's layers: a split product, a gated one, one with a residual and a ragged K, the head.
for _rows in (16, 32, 64):
    for _large in (False, True):
        _register(6144, 4096, _rows, large_shared=_large)
        _register(23040, 4096, _rows, activation="silu_and_mul", large_shared=_large)
        _register(4096, 11520, _rows, residual=True, large_shared=_large)
    _register(131072, 4096, _rows)
_register(9216, 3072, 16, activation="relu2")
_register(3072, 576, 16, activation="silu_and_mul")
