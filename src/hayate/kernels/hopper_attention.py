"""Attention of many queries on compute capability 9.0 (H100, H200): warp groups with roles, in Gluon.

The same sums as `flash_attention` (FlashAttention-3, arXiv 2407.08608); the specification is
`attention.attention_reference`. A program takes BLOCK_M = 128 queries of one head:

    producer  1 warp    asks the copy engine (TMA) for the queries, then for tile after tile of keys
                        and values, the last tile of keys first; it finds their pages in the table
    consumer  2 x 4     64 queries each: scores of tile i (wgmma), meanwhile the values of tile i - 1
              warps     (wgmma), then the softmax of tile i

Keys and values wait in STAGES tiles of shared memory. Barriers, each a pair of phases:

    q_full[w]                      the queries of consumer w have come
    k_full[stage], v_full[stage]   the copy engine has written the tile
    k_empty[stage], v_empty[stage] both consumers have read it: it may be overwritten

Heads are padded to BLOCK_K channels by the copy engine, which gives zeros beyond the head's width.
What it fetches are boxes of 64 keys by 64 channels, 128 bytes wide as the tensor cores want them;
a page holds whole boxes. In shared memory the boxes of a tile lie channels by channels, each above
the other: the very layout of the whole tile, as which the consumers read them.
"""

from __future__ import annotations

import math
import warnings
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hayate.kernels._triton import _Absent, cdiv, launch, register_compile, triton

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    HAS_GLUON = True
except ImportError:  # Gluon is experimental: other versions of Triton may lack it or move it
    gluon = gl = TensorDescriptor = _Absent()
    fence_async_shared = mbarrier = tma = warpgroup_mma = warpgroup_mma_wait = _Absent()
    HAS_GLUON = False

__all__ = ["HopperTiles", "hopper_attention_fits", "hopper_tiles", "launch_hopper_attention"]

_BLOCK_M = 128  # queries of a program, 64 a consumer
_BOX = 64  # keys, and channels, of one copy
_MIN_TOKENS = 1536  # with fewer, the host's 0.3 ms a layer to launch it take longer than they save


class HopperTiles(NamedTuple):
    """Channels a head is padded to, keys of a tile, tiles of keys and of values in shared memory."""

    block_k: int
    block_n: int
    stages: int


def hopper_tiles(head_dim: int) -> HopperTiles:
    """The largest tiles that fit in 227 KB of shared memory and in the registers."""
    if head_dim <= 64:
        return HopperTiles(64, 128, 4)
    if head_dim <= 128:
        return HopperTiles(128, 128, 2)
    return HopperTiles(256, 64, 2)


@gluon.jit
def _load_tile(desc, smem, full, stage, rows, head, BLOCK_K: gl.constexpr, BLOCK_N: gl.constexpr):
    """Fetch a tile of keys or values: `rows` says where each 64 of them begin."""
    PIECES: gl.constexpr = BLOCK_N // 64
    COLUMNS: gl.constexpr = BLOCK_K // 64
    mbarrier.expect(full.index(stage), PIECES * COLUMNS * desc.block_type.nbytes)
    for c in gl.static_range(COLUMNS):
        for piece in gl.static_range(PIECES):
            box = (stage * COLUMNS + c) * PIECES + piece
            tma.async_copy_global_to_shared(
                desc, [rows[piece], head, c * 64], full.index(stage), smem.index(box)
            )


@gluon.jit
def _producer(
    descs, boxes, barriers, table_ptr, q_row, head, kv_head, kv_row, kv_len, tiles, count, page_rows,
    BLOCK_K: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, PAGE_SIZE: gl.constexpr,
):  # fmt: skip
    q_desc, k_desc, v_desc = descs
    q_boxes, k_boxes, v_boxes = boxes
    q_full, k_full, k_empty, v_full, v_empty = barriers
    for w in gl.static_range(2):
        _load_tile(q_desc, q_boxes, q_full, w, (q_row + 64 * w,), head, BLOCK_K, 64)
    for i in range(count):
        stage = i % STAGES
        phase = (i // STAGES) & 1
        rows = ()
        for piece in gl.static_range(BLOCK_N // 64):
            key = (tiles - 1 - i) * BLOCK_N + piece * 64
            if PAGE_SIZE == 0:
                rows = rows + (kv_row + key,)  # type: ignore[assignment]  # noqa: RUF005
            else:  # past the last key the table is not read
                key = gl.minimum(key, gl.maximum(kv_len - 1, 0))
                page = gl.load(table_ptr + key // PAGE_SIZE)
                rows = rows + (page * page_rows + key % PAGE_SIZE // 64 * 64,)  # type: ignore[assignment]  # noqa: RUF005
        mbarrier.wait(k_empty.index(stage), phase ^ 1)
        _load_tile(k_desc, k_boxes, k_full, stage, rows, kv_head, BLOCK_K, BLOCK_N)
        mbarrier.wait(v_empty.index(stage), phase ^ 1)
        _load_tile(v_desc, v_boxes, v_full, stage, rows, kv_head, BLOCK_K, BLOCK_N)


@gluon.jit
def _softmax(
    scores, peak, total, position, start, scale_log2, window,
    MASKED: gl.constexpr, WINDOW: gl.constexpr, BLOCK_N: gl.constexpr, s_layout: gl.constexpr,
):  # fmt: skip
    """Weights of a tile that begins at key `start`, the factor of what was summed before; the new
    maximum (in units of log2) and sum."""
    if MASKED:
        j = start + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, s_layout))
        visible = j[None, :] <= position[:, None]
        if WINDOW:
            visible &= j[None, :] > position[:, None] - window
        scores = gl.where(visible, scores, float("-inf"))
    new_peak = gl.maximum(peak, gl.max(scores, axis=1) * scale_log2)
    p = gl.exp2(gl.fma(scores, scale_log2, -new_peak[:, None]))
    shrink = gl.exp2(peak - new_peak)
    total = gl.fma(total, shrink, gl.sum(p, axis=1))
    return p, shrink, new_peak, total


@gluon.jit
def _steps(
    begin, end, p, acc, peak, total, q, k_smem, v_smem, barriers, position, tiles, scale_log2, window,
    MASKED: gl.constexpr, WINDOW: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    s_layout: gl.constexpr, o_layout: gl.constexpr, p_layout: gl.constexpr,
):  # fmt: skip
    """Tiles [begin, end), counted from the last key: their scores, and the values of the tile before.

    `p` are the weights of tile begin - 1, and on return those of tile end - 1.
    """
    _, k_full, k_empty, v_full, v_empty = barriers
    for i in range(begin, end):
        stage = i % STAGES
        mbarrier.wait(k_full.index(stage), (i // STAGES) & 1)
        zero = gl.zeros([64, BLOCK_N], gl.float32, layout=s_layout)
        k = k_smem.index(stage).permute((1, 0))
        scores = warpgroup_mma(q, k, zero, use_acc=False, is_async=True)
        before = (i - 1) % STAGES
        mbarrier.wait(v_full.index(before), ((i - 1) // STAGES) & 1)
        acc = warpgroup_mma(p, v_smem.index(before), acc, is_async=True)
        scores = warpgroup_mma_wait(1, deps=(scores,))
        mbarrier.arrive(k_empty.index(stage), count=1)
        weights, shrink, peak, total = _softmax(
            scores, peak, total, position, (tiles - 1 - i) * BLOCK_N, scale_log2, window,
            MASKED, WINDOW, BLOCK_N, s_layout,
        )  # fmt: skip
        acc, p = warpgroup_mma_wait(0, deps=(acc, p))
        mbarrier.arrive(v_empty.index(before), count=1)
        acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, o_layout))[:, None]
        p = gl.convert_layout(weights.to(q.dtype), p_layout)
    return p, acc, peak, total


@gluon.jit
def _clear_values_past(v_tile, start, kv_len, BLOCK_N: gl.constexpr):
    """Slots past the end may hold anything, and 0 * NaN is NaN. Both consumers write the zeros."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    values = v_tile.load(layout)
    j = start + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, layout))
    v_tile.store(gl.where((j < kv_len)[:, None], values, 0.0))
    fence_async_shared()


@gluon.jit
def _consumer(
    smem, barriers, out_ptr, q_start, q_len, first_query, kv_len, head, tiles, count, scale_log2, window,
    W: gl.constexpr, H: gl.constexpr, K: gl.constexpr, BLOCK_K: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr,
):  # fmt: skip
    """Queries first_query + 64 W on."""
    q_smem, k_smem, v_smem = smem
    q_full, k_full, k_empty, v_full, _ = barriers
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    query = first_query + 64 * W
    rows = gl.arange(0, 64, layout=gl.SliceLayout(1, s_layout))
    if CAUSAL:
        first_position = kv_len - q_len + query
        position = first_position + rows
    else:
        first_position = kv_len - 1
        position = first_position + rows * 0
    # Finite, so that a row without a visible key so far gives exp2(-inf - peak) = 0, not NaN.
    peak = gl.full([64], -1e30, gl.float32, layout=gl.SliceLayout(1, s_layout))
    total = gl.zeros([64], gl.float32, layout=gl.SliceLayout(1, s_layout))
    acc = gl.zeros([64, BLOCK_K], gl.float32, layout=o_layout)
    zero = gl.zeros([64, BLOCK_N], gl.float32, layout=s_layout)
    q = q_smem.index(W)
    mbarrier.wait(q_full.index(W), 0)
    mbarrier.wait(k_full.index(0), 0)
    scores = warpgroup_mma(q, k_smem.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=(scores,))
    mbarrier.arrive(k_empty.index(0), count=1)
    weights, _, peak, total = _softmax(
        scores, peak, total, position, (tiles - 1) * BLOCK_N, scale_log2, window,
        True, WINDOW, BLOCK_N, s_layout,
    )  # fmt: skip
    p = gl.convert_layout(weights.to(q.dtype), p_layout)
    if tiles * BLOCK_N > kv_len:
        mbarrier.wait(v_full.index(0), 0)
        _clear_values_past(v_smem.index(0), (tiles - 1) * BLOCK_N, kv_len, BLOCK_N)

    # Tiles [1, diagonal) are seen in part (causality), [diagonal, whole) by all rows, the rest in
    # part (window).
    diagonal = tiles - gl.maximum(first_position + 1, 0) // BLOCK_N
    diagonal = gl.minimum(gl.maximum(diagonal, 1), count)
    whole = count
    if WINDOW:
        edge = (gl.maximum(first_position + 64 - window, 0) + BLOCK_N - 1) // BLOCK_N
        whole = gl.maximum(gl.minimum(tiles - edge, count), diagonal)
    p, acc, peak, total = _steps(
        1, diagonal, p, acc, peak, total, q, k_smem, v_smem, barriers, position, tiles, scale_log2,
        window, True, WINDOW, BLOCK_N, STAGES, s_layout, o_layout, p_layout,
    )  # fmt: skip
    p, acc, peak, total = _steps(
        diagonal, whole, p, acc, peak, total, q, k_smem, v_smem, barriers, position, tiles, scale_log2,
        window, False, WINDOW, BLOCK_N, STAGES, s_layout, o_layout, p_layout,
    )  # fmt: skip
    if WINDOW:
        p, acc, peak, total = _steps(
            whole, count, p, acc, peak, total, q, k_smem, v_smem, barriers, position, tiles,
            scale_log2, window, True, WINDOW, BLOCK_N, STAGES, s_layout, o_layout, p_layout,
        )  # fmt: skip
    last = (count - 1) % STAGES
    mbarrier.wait(v_full.index(last), ((count - 1) // STAGES) & 1)
    acc = warpgroup_mma(p, v_smem.index(last), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(acc,))

    total = gl.convert_layout(total, gl.SliceLayout(1, o_layout))
    out = acc / gl.where(total == 0.0, 1.0, total)[:, None]
    queries = query + gl.arange(0, 64, layout=gl.SliceLayout(1, o_layout))
    channels = gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, o_layout))
    offsets = (q_start + queries).to(gl.int64)[:, None] * (H * K) + head * K + channels[None, :]
    mask = (queries < q_len)[:, None] & (channels < K)[None, :]
    gl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=mask)


@gluon.jit(
    do_not_specialize=["table_stride", "page_rows", "window"],
    do_not_specialize_on_alignment=["table_ptr", "cu_seqlens_q_ptr", "kv_lens_ptr"],
)
def _hopper_attention_kernel(
    q_desc,  # (T, H, K)
    k_desc,  # (rows, G, K)
    v_desc,
    out_ptr,  # (T, H, K), written
    table_ptr,  # (S, P) int32, with pages
    cu_seqlens_q_ptr,  # (S + 1,)
    kv_lens_ptr,  # (S,) lengths with pages, else (S + 1,) cumulative lengths
    table_stride,
    page_rows,  # rows from one page to the next
    scale_log2,
    window,
    H: gl.constexpr,
    G: gl.constexpr,
    K: gl.constexpr,
    BLOCK_K: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    PAGE_SIZE: gl.constexpr,  # 0: packed keys
    CAUSAL: gl.constexpr,
    WINDOW: gl.constexpr,
):
    """Program (h, m, s): 128 queries of head h of sequence s, the last queries, which see most, first.

    Heads that share keys run at the same time, so that the keys come from the L2 cache.
    """
    head = gl.program_id(0)
    sequence = gl.program_id(2)
    q_start = gl.load(cu_seqlens_q_ptr + sequence)
    q_len = gl.load(cu_seqlens_q_ptr + sequence + 1) - q_start
    first_query = (gl.num_programs(1) - 1 - gl.program_id(1)) * 128
    if first_query >= q_len:
        return
    kv_row = 0
    if PAGE_SIZE == 0:
        kv_row = gl.load(kv_lens_ptr + sequence)
        kv_len = gl.load(kv_lens_ptr + sequence + 1) - kv_row
    else:
        kv_len = gl.load(kv_lens_ptr + sequence)
    end = kv_len
    if CAUSAL:
        end = gl.minimum(kv_len - q_len + first_query + 128, kv_len)
    tiles = gl.maximum((end + BLOCK_N - 1) // BLOCK_N, 1)
    count = tiles
    if WINDOW:
        count -= gl.maximum(kv_len - q_len + first_query - window + 1, 0) // BLOCK_N

    # Of queries a consumer has two tiles of 64; of keys and values STAGES of BLOCK_N.
    box: gl.constexpr = k_desc.layout
    dtype: gl.constexpr = k_desc.dtype
    tile: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    COLUMNS: gl.constexpr = BLOCK_K // 64
    BOXES: gl.constexpr = STAGES * COLUMNS * (BLOCK_N // 64)
    q_boxes = gl.allocate_shared_memory(dtype, [2 * COLUMNS, 64, 1, 64], box)
    k_boxes = gl.allocate_shared_memory(dtype, [BOXES, 64, 1, 64], box)
    v_boxes = gl.allocate_shared_memory(dtype, [BOXES, 64, 1, 64], box)
    q_smem = q_boxes._reinterpret(dtype, [2, 64, BLOCK_K], tile)
    k_smem = k_boxes._reinterpret(dtype, [STAGES, BLOCK_N, BLOCK_K], tile)
    v_smem = v_boxes._reinterpret(dtype, [STAGES, BLOCK_N, BLOCK_K], tile)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for w in gl.static_range(2):
        mbarrier.init(q_full.index(w), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=2)
        mbarrier.init(v_empty.index(stage), count=2)
    fence_async_shared()

    smem = (q_smem, k_smem, v_smem)
    barriers = (q_full, k_full, k_empty, v_full, v_empty)
    gl.warp_specialize(
        [
            (_consumer, (
                smem, barriers, out_ptr, q_start, q_len, first_query, kv_len, head, tiles, count,
                scale_log2, window, 0, H, K, BLOCK_K, BLOCK_N, STAGES, CAUSAL, WINDOW,
            )),
            (_consumer, (
                smem, barriers, out_ptr, q_start, q_len, first_query, kv_len, head, tiles, count,
                scale_log2, window, 1, H, K, BLOCK_K, BLOCK_N, STAGES, CAUSAL, WINDOW,
            )),
            (_producer, (
                (q_desc, k_desc, v_desc), (q_boxes, k_boxes, v_boxes), barriers,
                table_ptr + sequence * table_stride, q_start + first_query, head, head // (H // G),
                kv_row, kv_len, tiles, count, page_rows, BLOCK_K, BLOCK_N, STAGES, PAGE_SIZE,
            )),
        ],
        [4, 1],
        [240, 24],  # registers a thread of the second consumer and of the producer
    )  # fmt: skip


def hopper_attention_fits(q: Tensor, k: Tensor, page_table: Tensor | None) -> bool:
    """Whether `launch_hopper_attention` takes operands of `launch_flash_attention`."""
    if not (HAS_GLUON and q.is_cuda and q.element_size() == 2):
        return False
    if page_table is None or q.shape[0] < _MIN_TOKENS:
        return False
    head_dim, aligned = q.shape[2], q.data_ptr() % 16 == k.data_ptr() % 16 == 0
    whole_boxes = k.shape[1] % _BOX == 0 and k.stride(0) % k.stride(1) == 0 and k.shape[0] > 0
    return (
        torch.cuda.get_device_capability(q.device) == (9, 0)
        and 32 < head_dim <= 256  # narrower heads would be padding mostly
        and head_dim % 8 == q.stride(0) % 8 == 0
        and aligned
        and whole_boxes
    )


def launch_hopper_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    page_table: Tensor | None,
    cu_seqlens_q: Tensor,
    kv_lens: Tensor,
    out: Tensor,
    *,
    max_seqlen_q: int,
    scale: float,
    window: int | None,
    causal: bool,
) -> bool:
    """`launch_flash_attention` into `out`, contiguous, for operands that fit.

    False where this version of Triton cannot compile the kernel, which is announced once.
    """
    (num_tokens, H, K), G = q.shape, k.shape[-2]
    layout = _box_layout()
    queries = TensorDescriptor(q, [num_tokens, H, K], [q.stride(0), K, 1], [_BOX, 1, _BOX], layout)
    page_rows, num_rows = 0, k.shape[0]
    if page_table is not None:
        page_rows = k.stride(0) // k.stride(1)
        num_rows = (k.shape[0] - 1) * page_rows + k.shape[1]
    shape, strides = [num_rows, G, K], [k.stride(-3), K, 1]
    keys, values = (TensorDescriptor(x, shape, strides, [_BOX, 1, _BOX], layout) for x in (k, v))
    operands = (
        queries,
        keys,
        values,
        out,
        cu_seqlens_q if page_table is None else page_table,
        cu_seqlens_q,
        kv_lens,
        0 if page_table is None else page_table.stride(0),
        page_rows,
        scale / math.log(2),
        0 if window is None else window,
    )
    page_size = 0 if page_table is None else k.shape[1]
    constexprs = _constexprs(H, G, K, page_size, causal=causal, window=window is not None)
    if not _compiles(operands, constexprs, (q.device.index, q.dtype, *constexprs.values())):
        return False
    grid = (H, cdiv(max_seqlen_q, _BLOCK_M), cu_seqlens_q.numel() - 1)
    launch(_hopper_attention_kernel, grid, *operands, **constexprs, num_warps=4)
    return True


@cache
def _box_layout() -> Any:
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)


def _constexprs(
    num_heads: int, num_kv_heads: int, head_dim: int, page_size: int, *, causal: bool, window: bool
) -> dict[str, Any]:
    tiles = hopper_tiles(head_dim)
    return {
        "H": num_heads,
        "G": num_kv_heads,
        "K": head_dim,
        "BLOCK_K": tiles.block_k,
        "BLOCK_N": tiles.block_n,
        "STAGES": tiles.stages,
        "PAGE_SIZE": page_size,
        "CAUSAL": causal,
        "WINDOW": window,
    }


_compiled: dict[tuple[Any, ...], bool] = {}


def _compiles(operands: tuple[Any, ...], constexprs: dict[str, Any], key: tuple[Any, ...]) -> bool:
    """Whether the kernel compiles for these, tried once."""
    if key not in _compiled:
        try:
            with torch.cuda.device(key[0]):
                _hopper_attention_kernel.warmup(*operands, grid=(1,), **constexprs, num_warps=4)
            _compiled[key] = True
        except Exception as failure:  # Triton raises many kinds, Python's own among them
            message = (str(failure).strip() or type(failure).__name__).splitlines()[-1]
            warnings.warn(
                f"Triton {triton.__version__} does not compile the attention kernel for Hopper cards; "
                f"the general one, which is slower, runs instead: {message}",
                RuntimeWarning,
                stacklevel=2,
            )
            _compiled[key] = False
    return _compiled[key]


if HAS_GLUON:
    _BOXES = f"tensordesc<bf16[{_BOX}, 1, {_BOX}],{_box_layout()!r}>"
    for _width, _heads, _kv_heads, _page_size, _causal, _window in (
        (64, 9, 3, 64, True, False),
        (80, 32, 32, 64, True, True),
        (128, 32, 8, 64, True, False),
        (128, 32, 8, 0, False, False),
        (256, 16, 2, 128, True, False),
    ):
        register_compile(
            _hopper_attention_kernel,
            f"hopper_attention_{_width}_page{_page_size}{'_window' if _window else ''}"
            f"{'' if _causal else '_all'}",
            {f"{name}_desc": _BOXES for name in ("q", "k", "v")}
            | {f"{name}_ptr": "*i32" for name in ("table", "cu_seqlens_q", "kv_lens")}
            | {"out_ptr": "*bf16", "table_stride": "i32", "page_rows": "i32"}
            | {"scale_log2": "fp32", "window": "i32"},
            _constexprs(_heads, _kv_heads, _width, _page_size, causal=_causal, window=_window),
            num_warps=4,
            min_cc=90,
            max_cc=90,
        )
