"""Few rows times a matrix in NF4, in one kernel: y = residual + act(norm(x) @ W^T + bias).

At 4.5 bits a weight an H200 could read 7.8e12 weights a second, and can issue 3.9 instructions for
each: the cost of decoding is the whole matter. With few rows this kernel executes 3.1 to 3.5, or
5.1 without the table in shared memory, thanks to

- tensor cores, also for one row: they take the products and sums off the other units. The tile is
  computed as W x^T, 16 rows of W by 8 rows of x being the smallest that they multiply.
- no layout conversion: `NF4Weight` keeps codes in such an order that what a lane loads, 16 bytes of
  a row, is what the tensor cores want of that lane. `_tile` says so to Triton by a permutation of
  axes that moves no data. (Were the compiler to lay things out differently, it would insert the
  moves: the result does not depend on it.)
- the scale applied to the sum over its block of 64 columns, not to every weight: one
  multiplication for 4 instructions of the tensor cores.
- a lookup of the codes without a multiplication or a conversion after it (`nf4_lookup`).

W and its scales are loaded to registers, a step ahead, the first before `gdc_wait`; x comes through
shared memory, pipelined. A norm costs no pass, as in `gemv`. K is split over programs as in
`small_gemm`, until the multiprocessors are busy. Only for blocks of 64: `nf4_linear` dequantises
what else there is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hayate.kernels._dispatch import interpreting
from hayate.kernels._triton import (
    cdiv,
    gdc_launch_dependents,
    gdc_wait,
    launch,
    next_power_of_2,
    num_sms,
    register_compile,
    tl,
    triton,
)
from hayate.kernels.gemv import finish
from hayate.kernels.nf4_lookup import Lookup, fill_shared_pairs, lookup, lookup_table, stretch
from hayate.kernels.nf4_weight import GROUP, NF4Weight
from hayate.kernels.norm import Norm
from hayate.kernels.small_gemm import _counters, _store_part, _sum_parts

__all__ = [
    "NF4GemmConfig",
    "launch_nf4_gemm",
    "nf4_gemm_config",
    "nf4_gemm_fits",
    "norm_fits",
]

# Above, the weight is dequantised for a product with the library's. The slower the memory, the longer
# that takes: an RTX 4060 would write and read a layer of 233 M weights in 3.9 ms, a quarter of
# what 1,024 rows take. Estimates.
MAX_ROWS = 128
MAX_ROWS_GDDR = 512


class NF4GemmConfig(NamedTuple):
    """How a product is cut: columns of a tile (gate and up together), parts of K, warps, pipelining.

    `lookup`: "shared" needs 32 KB of shared memory that Triton does not know of; it then launches
    only kernels whose own need is at most 16 KB or more than 48 KB.
    """

    block_n: int
    split: int
    num_warps: int = 4
    num_stages: int = 3
    lookup: Lookup = "permute"


# (N, K, rows of a tile) -> cut, for cards with HBM.
_MEASURED: dict[tuple[int, int, int], NF4GemmConfig] = {}


def nf4_gemm_config(
    rows: int, n: int, k: int, sms: int, *, gated: bool, hbm: bool
) -> NF4GemmConfig:
    """The cut for `rows` rows and a weight (n, k).

    `hbm`: the card has memory so fast that decoding sets the pace.
    """
    block_m = _block_m(rows)
    if hbm and rows <= 64 and (n, k, block_m) in _MEASURED:
        return _MEASURED[n, k, block_m]
    block_n = 128 if gated else 64
    # Eight programs a multiprocessor, twice what run at once; fewer where there is less to hide, or
    # the parts of many rows cost more to add. Each has four groups of columns at least, and as
    # even as can be.
    programs = (3 if not hbm else 8 if rows <= 16 else 4) * sms
    groups = cdiv(k, GROUP)
    split = max(1, min(programs // (cdiv(n, block_n) * cdiv(rows, block_m)), groups // 4, 16))
    split = cdiv(groups, cdiv(groups, split))
    lookup: Lookup = "shared" if hbm and block_m <= 16 else "permute"
    return NF4GemmConfig(block_n, split, lookup=lookup)


@triton.jit
def _tile(words, table, dtype: tl.constexpr, LOOKUP: tl.constexpr, WARPS: tl.constexpr,
          WGMMA: tl.constexpr):  # fmt: skip
    """Codebook values (BN, 64) of half a group, of its words (BN, 4, 2) as `_word_rows` loads them.

    Rows come out in their own order; columns too, but with WGMMA as `_columns`.
    """
    BN: tl.constexpr = words.shape[0]
    # value[2 p + h] of word (t, r) is column 32 r + 16 u + 4 t + 2 v + h, p = 2 u + v.
    values = lookup(words, table, dtype, LOOKUP)
    even = tl.join(tl.join(values[0], values[2]), tl.join(values[4], values[6]))
    odd = tl.join(tl.join(values[1], values[3]), tl.join(values[5], values[7]))
    w = tl.join(even, odd)  # (BN, t, r, v, u, h)
    w = tl.reshape(w, (BN // (16 * WARPS), 2, WARPS, 8, 4, 2, 2, 2, 2))
    if WGMMA:
        w = tl.permute(w, (0, 2, 1, 3, 5, 7, 6, 4, 8))
    else:
        w = tl.permute(w, (0, 2, 1, 3, 5, 7, 4, 6, 8))
    return tl.reshape(w, (BN, 64))


@triton.jit
def _columns(WGMMA: tl.constexpr):
    """Which of 64 columns stands where in a tile.

    Operands of `wgmma` give a lane two neighbouring columns, those of `mma` as Triton lays them out
    four: the one order of the codes cannot serve both, but x can be read in another.
    """
    i = tl.arange(0, 64)
    if WGMMA:
        i = i // 16 * 16 + i // 2 % 4 * 4 + i // 8 % 2 * 2 + i % 2
    return i


@triton.jit
def _word_rows(BN: tl.constexpr, WARPS: tl.constexpr):
    """The row of a tile that is loaded as row i: a warp loads 8 rows and works on 16."""
    i = tl.arange(0, BN)
    inside = i // 8 % WARPS * 16 + i // (8 * WARPS) % 2 * 8 + i % 8
    return i // (16 * WARPS) * (16 * WARPS) + inside


@triton.jit
def _load_words(rows, step, last):
    """The words (BN, 16) of group `step` of the rows of codes at `rows`; nothing from `last` on."""
    return tl.load(rows + step * 16, mask=step < last, eviction_policy="evict_first")


@triton.jit
def _load_scales(rows, step, last):
    """The scales (BN,) of the two blocks of group `step`; nothing from `last` on."""
    scales = rows + step * 2
    return tl.load(scales, mask=step < last), tl.load(scales + 1, mask=step < last)


@triton.jit
def _halves(words):
    """Words (BN, 16) of a group to those of its two blocks, (BN, 4, 2) each."""
    BN: tl.constexpr = words.shape[0]
    return tl.split(tl.permute(tl.reshape(words, (BN, 4, 2, 2)), (0, 1, 3, 2)))


@triton.jit(do_not_specialize=["rows"])
def _nf4_gemm_kernel(
    x_ptr,
    codes_ptr,  # int32 (N, GROUPS * 16)
    scales_ptr,  # (N, GROUPS * 2)
    table_ptr,  # what LOOKUP needs: int32 (256,) pairs, the codebook, or None
    bias_ptr,  # None or (N,)
    norm_weight_ptr,  # None or (K,)
    residual_ptr,  # None or (rows, N_out)
    out_ptr,
    workspace_ptr,  # (SPLIT, 1 or 2, rows, N_out) fp32; None when SPLIT is 1
    squares_ptr,  # (tiles, SPLIT, BM) fp32; None without a norm or when SPLIT is 1
    counter_ptr,  # (tiles,) int32, zero before and after; None when SPLIT is 1
    rows,
    N_out,  # columns of the result: N, or N / 2 when gated
    x_stride,
    residual_stride,
    eps,
    stretch,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,  # columns of the result a program makes
    SPLIT: tl.constexpr,
    WARPS: tl.constexpr,
    LOOKUP: tl.constexpr,
    WGMMA: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
):
    gdc_launch_dependents(PDL)
    GATED: tl.constexpr = ACTIVATION == "silu_and_mul"
    NORM: tl.constexpr = norm_weight_ptr is not None
    GROUPS: tl.constexpr = (K + 127) // 128
    STEPS: tl.constexpr = (GROUPS + SPLIT - 1) // SPLIT
    # Tiles of rows that share their columns' weights, from L2, run side by side.
    row_tiles = tl.cdiv(rows, BM)
    row_tile = tl.program_id(0) % row_tiles
    tile = tl.program_id(0) // row_tiles // SPLIT
    part = tl.program_id(0) // row_tiles % SPLIT
    first = part * STEPS
    last = tl.minimum(first + STEPS, GROUPS)
    m = row_tile * BM + tl.arange(0, BM)
    n = tile * BN + tl.arange(0, BN)
    # A row past the end repeats the last and is not stored.
    x_rows = x_ptr + tl.minimum(m, rows - 1)[:, None].to(tl.int64) * x_stride
    n_inside = tl.minimum(n, N_out - 1).to(tl.int64)
    scales = scales_ptr + n_inside * (GROUPS * 2)
    up_scales = scales + tl.cast(N_out, tl.int64) * (GROUPS * 2)
    n_loaded = tl.minimum(tile * BN + _word_rows(BN, WARPS), N_out - 1).to(tl.int64)
    word_rows = codes_ptr + n_loaded[:, None] * (GROUPS * 16) + tl.arange(0, 16)[None, :]
    up_word_rows = word_rows + tl.cast(N_out, tl.int64) * (GROUPS * 16)
    next_words = _load_words(word_rows, first, last)
    next_scales = _load_scales(scales, first, last)
    if GATED:
        next_up = _load_words(up_word_rows, first, last)
        next_up_scales = _load_scales(up_scales, first, last)
    table = fill_shared_pairs(table_ptr) if LOOKUP == "shared" else table_ptr
    gdc_wait(PDL)

    dtype: tl.constexpr = x_ptr.dtype.element_ty
    columns = _columns(WGMMA)
    acc = tl.zeros((BN, BM), tl.float32)
    acc_up = tl.zeros((BN, BM), tl.float32)
    squares = tl.zeros((BM, 64), tl.float32)
    for step in range(first, last):
        words, scale = _halves(next_words), next_scales
        next_words = _load_words(word_rows, step + 1, last)
        next_scales = _load_scales(scales, step + 1, last)
        if GATED:
            up_words, up_scale = _halves(next_up), next_up_scales
            next_up = _load_words(up_word_rows, step + 1, last)
            next_up_scales = _load_scales(up_scales, step + 1, last)
        for half in tl.static_range(2):
            k = step * 128 + half * 64 + columns
            # Columns from K on, if any, are whole rows of the code of zero; x must not be NaN there.
            if K % 128 == 0:
                x = tl.load(x_rows + k[None, :])
            else:
                x = tl.load(x_rows + k[None, :], mask=k[None, :] < K, other=0.0)
            if NORM:
                x = x.to(tl.float32)
                squares += x * x
                x = (x * tl.load(norm_weight_ptr + k, mask=k < K, other=0.0)[None, :]).to(dtype)
            w = _tile(words[half], table, dtype, LOOKUP, WARPS, WGMMA)
            acc += tl.dot(w, tl.trans(x), input_precision="ieee") * scale[half][:, None]
            if GATED:
                w = _tile(up_words[half], table, dtype, LOOKUP, WARPS, WGMMA)
                product = tl.dot(w, tl.trans(x), input_precision="ieee")
                acc_up += product * up_scale[half][:, None]
    acc = tl.trans(acc)
    acc_up = tl.trans(acc_up)
    sum_of_squares = tl.sum(squares, axis=1)
    if SPLIT > 1:
        counter = counter_ptr + tile * row_tiles + row_tile
        plane = rows * N_out
        mask = (m[:, None] < rows) & (n[None, :] < N_out)
        planes = workspace_ptr + m[:, None] * N_out + n[None, :]
        _store_part(planes, acc, acc_up, part, plane, mask, GATED)
        if NORM:
            mine = squares_ptr + ((tile * row_tiles + row_tile) * SPLIT + part) * BM
            tl.store(mine + tl.arange(0, BM), sum_of_squares)
        tl.debug_barrier()  # every lane's part is written before the count says so
        if tl.atomic_add(counter, 1, sem="acq_rel") < SPLIT - 1:
            return
        acc, acc_up = _sum_parts(planes, plane, mask, SPLIT, GATED)
        if NORM:
            theirs = squares_ptr + (tile * row_tiles + row_tile) * SPLIT * BM + tl.arange(0, BM)
            sum_of_squares, _ = _sum_parts(theirs, BM, tl.arange(0, BM) < BM, SPLIT, False)
        tl.store(counter, 0)

    acc /= stretch
    acc_up /= stretch
    if NORM:
        factor = tl.rsqrt(sum_of_squares / K + eps)
        acc *= factor[:, None]
        acc_up *= factor[:, None]
    finish(
        acc, acc_up, bias_ptr, residual_ptr, out_ptr,
        m, n, rows, N_out, residual_stride, ACTIVATION,
    )  # fmt: skip


def _constexprs(
    config: NF4GemmConfig, k: int, block_m: int, activation: str | None, wgmma: bool
) -> dict[str, Any]:
    return {
        "K": k,
        "BM": block_m,
        "BN": config.block_n // 2 if activation == "silu_and_mul" else config.block_n,
        "SPLIT": config.split,
        "WARPS": config.num_warps,
        "LOOKUP": config.lookup,
        # What Triton chooses on 9.0; elsewhere `mma`, whose smallest tile is 16 by 8.
        "WGMMA": wgmma and block_m >= 16 and config.num_warps % 4 == 0,
        "ACTIVATION": activation,
    }


def _capability(x: Tensor) -> tuple[int, int]:
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else (9, 0)


def _has_hbm(capability: tuple[int, int]) -> bool:
    """Whether memory is so fast that decoding sets the pace."""
    return capability in ((8, 0), (9, 0), (10, 0))


def _block_m(rows: int) -> int:
    """Rows of x of a tile; 8, 16, 32 or 64."""
    return min(64, max(8, next_power_of_2(rows)))


def nf4_gemm_fits(x: Tensor, weight: NF4Weight) -> bool:
    """Whether this kernel serves x (T, K): few rows of 16 bits, and blocks of 64.

    In the interpreter it runs in fp32 too, which has no tensor cores.
    """
    most = MAX_ROWS if _has_hbm(_capability(x)) else MAX_ROWS_GDDR
    sixteen_bits = x.element_size() == 2 or interpreting()
    return 1 <= x.shape[0] <= most and sixteen_bits and weight.block == 64


def norm_fits(x: Tensor, norm: Norm | None) -> bool:
    """Whether the kernel takes the norm along.

    It rounds x * weight before it is divided by the root of the mean square, which float16 may not
    hold. From 9 rows on a kernel of its own costs less.
    """
    return (
        norm is not None and norm.kind == "rmsnorm" and x.shape[0] <= 8 and x.dtype != torch.float16
    )


def launch_nf4_gemm(
    x: Tensor,
    weight: NF4Weight,
    bias: Tensor | None,
    norm: Norm | None,
    activation: str | None,
    residual: Tensor | None,
    config: NF4GemmConfig | None = None,
) -> Tensor:
    """`nf4_linear` where `nf4_gemm_fits`; x and residual have contiguous rows, `norm_fits`.

    `config` replaces the choice of `nf4_gemm_config`, for measurements.
    """
    rows, k = x.shape
    n = weight.codes.shape[0]
    n_out = n // 2 if activation == "silu_and_mul" else n
    block_m = _block_m(rows)
    capability = _capability(x)
    if config is None:
        hbm = _has_hbm(capability)
        gated = activation == "silu_and_mul"
        config = nf4_gemm_config(rows, n, k, num_sms(x.device), gated=gated, hbm=hbm)
    if not x.is_cuda:
        config = config._replace(lookup="memory")
    constexprs = _constexprs(config, k, block_m, activation, capability == (9, 0))
    tiles = cdiv(n_out, constexprs["BN"]) * cdiv(rows, block_m)
    out = torch.empty(rows, n_out, dtype=x.dtype, device=x.device)
    workspace = squares = counters = None
    if config.split > 1:
        workspace = torch.empty(config.split * rows * n, dtype=torch.float32, device=x.device)
        counters = _counters(x.device)
        assert tiles <= counters.numel()
        if norm is not None:
            size = tiles * config.split * block_m
            squares = torch.empty(size, dtype=torch.float32, device=x.device)
    launch(
        _nf4_gemm_kernel,
        (tiles * config.split,),
        x,
        weight.codes.view(torch.int32),
        weight.scales,
        lookup_table(config.lookup, x.dtype, x.device),
        bias,
        None if norm is None else norm.weight,
        residual,
        out,
        workspace,
        squares,
        counters,
        rows,
        n_out,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        0.0 if norm is None else norm.eps,
        stretch(x.dtype),
        **constexprs,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out


def _register(
    n: int,
    k: int,
    rows: int,
    norm: bool = False,
    activation: str | None = None,
    residual: bool = False,
    *,
    hbm: bool = True,
) -> None:
    block_m = _block_m(rows)
    config = nf4_gemm_config(rows, n, k, 132 if hbm else 24, gated=bool(activation), hbm=hbm)
    split = config.split > 1
    kinds = {
        "x_ptr": "*bf16",
        "codes_ptr": "*i32",
        "scales_ptr": "*fp32",
        "table_ptr": "*i32" if config.lookup == "shared" else None,
        "bias_ptr": "*bf16" if norm and not activation else None,
        "norm_weight_ptr": "*bf16" if norm else None,
        "residual_ptr": "*bf16" if residual else None,
        "out_ptr": "*bf16",
        "workspace_ptr": "*fp32" if split else None,
        "squares_ptr": "*fp32" if split and norm else None,
        "counter_ptr": "*i32" if split else None,
    }
    integers = {"rows": "i32", "N_out": "i32:16", "x_stride": "i32:16", "residual_stride": "i32:16"}
    register_compile(
        _nf4_gemm_kernel,
        f"nf4_gemm_{n}x{k}_m{rows}" + ("_hbm" if hbm else ""),
        {name: kind for name, kind in kinds.items() if kind}
        | integers
        | {"eps": "fp32", "stretch": "fp32"},
        {name: None for name, kind in kinds.items() if not kind}
        | _constexprs(config, k, block_m, activation, hbm),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        min_cc=90 if hbm else 80,
        max_cc=90 if hbm else 999,
    )


# A 7B model's layers: a split product, a gated one, one with a residual; then for many rows.
_register(4608, 3584, 1, norm=True)
_register(37888, 3584, 1, norm=True, activation="silu_and_mul")
_register(3584, 18944, 16, residual=True)
_register(37888, 3584, 32, activation="silu_and_mul")
_register(37888, 3584, 1, norm=True, activation="silu_and_mul", hbm=False)
_register(3584, 18944, 64, residual=True, hbm=False)
