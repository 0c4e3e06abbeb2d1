"""Native CPU kernels for decoding: C, compiled at first use by the system's C compiler.

A `<operation>_fits` says whether the native form covers a call; the operation itself then runs in
one native call. Formulas and shapes are those of the operation's own file.

Arguments travel as one block of 64-bit fields, the structs of `cpu.c` and `cpu_attention.c`: packing
twenty of them takes a quarter of a microsecond, and a decode step makes hundreds of these calls.
"""

from __future__ import annotations

import math
import mmap
import struct
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hayate.kernels._dispatch import is_batch_invariant
from hayate.kernels.cpu_library import library, native_status
from hayate.kernels.nf4_weight import NF4Weight

if TYPE_CHECKING:
    from hayate.kernels.norm import Norm

__all__ = [
    "Recording",
    "argmax",
    "argmax_fits",
    "attention",
    "attention_fits",
    "embedding",
    "embedding_fits",
    "empty_block",
    "linear",
    "linear_fits",
    "native_status",
    "nf4_dequantize",
    "nf4_dequantize_fits",
    "rope_and_cache",
    "rope_and_cache_fits",
]

_MAX_LINEAR_TOKENS = 8  # MAX_TOKENS of cpu.c
_MAX_NF4_TOKENS = 64  # by calls of 8
_MAX_INPUT = 16384  # elements of x
_MAX_QUERIES = 8  # a sequence; longer ones are a matrix product
_MAX_HEAD_DIM = 256  # of cpu_attention.c
_MAX_QKV_WIDTH = 1 << 16
_HUGE_PAGE = 2 << 20
_ALIGNMENT = 64

_HALF = torch.bfloat16
_FLOATS = (_HALF, torch.float32)
_NORM_KINDS = {"rmsnorm": 1, "layernorm1p": 2}
_ACTIVATIONS = {None: 0, "relu2": 1, "silu": 2, "silu_and_mul": 3}

# One letter a field, in the order of the structs of cpu.c, the operation's number first; a norm is
# "5qd", strides are in elements.
_LINEAR = struct.Struct("=q 5q3q6q2q 5qd")
_ROPE = struct.Struct("=q 7q6q4q4q2qd 5qd 5qd")
_ATTENTION = struct.Struct("=q 7q5q6qq3qd")
_ARGMAX = struct.Struct("=q 2q3q")
_EMBEDDING = struct.Struct("=q 3q4q")
_NF4_DEQUANTIZE = struct.Struct("=q 3q5q")
_LINEAR_CALL, _ROPE_CALL, _ATTENTION_CALL, _ARGMAX_CALL, _EMBEDDING_CALL, _NF4_DEQUANTIZE_CALL = (
    range(6)
)
_BAD_INDEX = "a token id, slot, position or page is out of its range"
_NO_NORM: tuple[int | float, ...] = (0, 0, 0, 0, 0, 0.0)


# ---- arguments ----------------------------------------------------------------------------------


def _plain(x: Tensor) -> bool:
    return x.is_cpu and x.dtype in _FLOATS and x.is_contiguous()


def _small(x: Tensor) -> Tensor:
    """A vector as the native code reads it: bf16 or fp32, contiguous."""
    return x if x.dtype in _FLOATS and x.is_contiguous() else x.float().contiguous()


def _with_small_parameters(norm: Norm) -> Norm:
    """The norm with parameters that `_norm_fields` may point at; the caller keeps it alive."""
    kind, weight, bias, eps = norm
    if bias is None and weight.dtype in _FLOATS:
        return norm
    return type(norm)(kind, _small(weight), None if bias is None else _small(bias), eps)


def _norm_fields(norm: Norm) -> tuple[int | float, ...]:
    """The struct Norm."""
    kind, weight, bias, eps = norm
    weight_is_half = weight.dtype is _HALF
    if bias is None:
        return _NORM_KINDS[kind], weight.data_ptr(), 0, weight_is_half, 0, eps
    bias_is_half = bias.dtype is _HALF
    return _NORM_KINDS[kind], weight.data_ptr(), bias.data_ptr(), weight_is_half, bias_is_half, eps


def _run(call: bytes, *tensors: Tensor | None) -> None:
    """One native call; `tensors` are those it points at."""
    native = library()
    assert native is not None, "ask the operation's `_fits` first"
    failed = native.run(call, len(call))
    if failed:
        raise IndexError(_BAD_INDEX)
    if _recording is not None and _recording.thread == threading.get_ident():
        _recording.add(call, tensors)


# ---- linear -------------------------------------------------------------------------------------


def linear_fits(
    x: Tensor, weight: Tensor | NF4Weight, norm: Norm | None = None, activation: str | None = None
) -> bool:
    """x (T, D), weight (N, D) on the CPU, contiguous, both bf16 or both fp32, or the weight in NF4, no
    gradient; few T; a norm and an activation that decoders have.

    Up to 4 tokens; up to 8 while x stays in the first cache. Beyond, matrix units are faster, but
    their sums depend on the number of tokens: with `batch_invariant` any number fits. With NF4, up
    to 64: before a matrix product the weight would have to be decoded and written.
    """
    if x.dim() != 2:
        return False
    num_tokens, width = x.shape
    if isinstance(weight, NF4Weight):
        few, covered = num_tokens <= _MAX_NF4_TOKENS, _nf4_covered(weight)
    else:
        few = num_tokens <= 4 or num_tokens <= min(_MAX_LINEAR_TOKENS, _MAX_INPUT // width)
        covered = (
            weight.dtype is x.dtype
            and weight.is_cpu
            and weight.is_contiguous()
            and not (weight.requires_grad and torch.is_grad_enabled())
        )
    return (
        num_tokens > 0
        and (few or is_batch_invariant())
        and covered
        and activation in _ACTIVATIONS
        and (norm is None or norm.kind in _NORM_KINDS)
        and _plain(x)
        and library() is not None
    )


def _nf4_covered(weight: NF4Weight) -> bool:
    return weight.codes.is_cpu and weight.codes.is_contiguous() and weight.scales.is_contiguous()


def linear(
    x: Tensor,
    weight: Tensor | NF4Weight,
    bias: Tensor | None = None,
    *,
    norm: Norm | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """residual + act(norm(x) @ weight.T + bias), as `kernels.linear.linear`, where `linear_fits`.

    The normalised x stays in fp32, and so do weights in NF4: there is exactly one rounding.
    """
    num_tokens, width = x.shape
    if num_tokens > _MAX_LINEAR_TOKENS:
        parts = x.split(_MAX_LINEAR_TOKENS)
        more: Sequence[Tensor | None] = [None] * len(parts)
        if residual is not None:
            more = residual.split(_MAX_LINEAR_TOKENS)
        options: dict[str, Any] = {"norm": norm, "activation": activation}
        return torch.cat(
            [
                linear(part, weight, bias, residual=r, **options)
                for part, r in zip(parts, more, strict=True)
            ]
        )
    rows, weight_width = weight.shape
    columns = rows // 2 if activation == "silu_and_mul" else rows
    assert weight_width == width
    bias_at = residual_at = bias_is_half = residual_is_half = scales_at = block = 0
    scales, norm_fields = None, _NO_NORM
    if isinstance(weight, NF4Weight):
        weight, scales, block, _ = weight
        scales_at = scales.data_ptr()
    if norm is not None:
        norm = _with_small_parameters(norm)
        norm_fields = _norm_fields(norm)
        assert norm.weight.numel() == width
    if bias is not None:
        bias = _small(bias)
        assert bias.numel() == rows
        bias_at, bias_is_half = bias.data_ptr(), bias.dtype is _HALF
    if residual is not None:
        residual = _small(residual)
        assert residual.numel() == num_tokens * columns
        residual_at, residual_is_half = residual.data_ptr(), residual.dtype is _HALF
    out = x.new_empty(num_tokens, columns)  # half the time of torch.empty
    call = _LINEAR.pack(
        _LINEAR_CALL,
        x.data_ptr(),
        weight.data_ptr(),
        bias_at,
        residual_at,
        out.data_ptr(),
        num_tokens,
        width,
        columns,
        _ACTIVATIONS[activation],
        x.dtype is _HALF,
        bias_is_half,
        residual_is_half,
        torch.get_num_threads(),
        is_batch_invariant(),
        scales_at,
        block,
        *norm_fields,
    )
    _run(call, x, weight, scales, bias, residual, out, *(norm or ())[1:3])
    return out


# ---- rope and cache -----------------------------------------------------------------------------


def _paged(cache: Tensor) -> bool:
    """(P, B, G, K), contiguous but for the page axis."""
    _, page_size, num_kv_heads, head_dim = cache.shape
    page, *inner = cache.stride()
    token = head_dim * num_kv_heads
    return inner == [token, head_dim, 1] and page >= token * page_size and cache.is_cpu


def rope_and_cache_fits(qkv: Tensor, k_cache: Tensor, v_cache: Tensor) -> bool:
    """qkv (T, (H + 2G) * K) and both caches on the CPU, of one dtype, bf16 or fp32; any T."""
    return (
        qkv.dtype is k_cache.dtype is v_cache.dtype
        and _plain(qkv)
        and _paged(k_cache)
        and _paged(v_cache)
        and qkv.shape[-1] <= _MAX_QKV_WIDTH
        and library() is not None
    )


def rope_and_cache(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
    clip: float | None = None,
) -> Tensor:
    """As `kernels.rope.rope_and_cache`, where `rope_and_cache_fits`.

    IndexError: a slot beyond the cache or a position beyond the table.
    """
    num_tokens = qkv.shape[0]
    num_pages, page_size, cached_heads, cached_width = k_cache.shape
    max_position, rotary_dim = cos_sin.shape
    assert qkv.numel() == num_tokens * (num_heads + 2 * num_kv_heads) * head_dim
    assert (cached_heads, cached_width) == (num_kv_heads, head_dim)
    assert slots.numel() == positions.numel() == num_tokens
    assert slots.is_contiguous()
    assert positions.is_contiguous()
    assert cos_sin.dtype is torch.float32
    assert cos_sin.is_contiguous()
    q_len = k_len = 0
    q_fields = k_fields = _NO_NORM
    if q_norm is not None:
        q_norm = _with_small_parameters(q_norm)
        q_fields, q_len = _norm_fields(q_norm), q_norm.weight.numel()
    if k_norm is not None:
        k_norm = _with_small_parameters(k_norm)
        k_fields, k_len = _norm_fields(k_norm), k_norm.weight.numel()
    q = qkv.new_empty(num_tokens, num_heads, head_dim)
    call = _ROPE.pack(
        _ROPE_CALL,
        qkv.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        slots.data_ptr(),
        positions.data_ptr(),
        cos_sin.data_ptr(),
        q.data_ptr(),
        num_tokens,
        num_heads,
        num_kv_heads,
        head_dim,
        rotary_dim,
        max_position,
        page_size,
        num_pages,
        k_cache.stride(0),
        v_cache.stride(0),
        qkv.dtype is _HALF,
        slots.dtype is torch.int64,
        positions.dtype is torch.int64,
        torch.get_num_threads(),
        q_len,
        k_len,
        math.inf if clip is None else clip,
        *q_fields,
        *k_fields,
    )
    operands = (qkv, k_cache, v_cache, slots, positions, cos_sin, q)
    _run(call, *operands, *(q_norm or ())[1:3], *(k_norm or ())[1:3])
    return q


# ---- attention ----------------------------------------------------------------------------------


def attention_fits(q: Tensor, k_cache: Tensor, v_cache: Tensor, max_seqlen_q: int) -> bool:
    """q (T, H, K), caches on the CPU, all bf16 or all fp32; at most 8 queries a sequence, or with
    `batch_invariant` any number."""
    return (
        (max_seqlen_q <= _MAX_QUERIES or is_batch_invariant())
        and q.dtype is k_cache.dtype is v_cache.dtype
        and _plain(q)
        and q.shape[-1] <= _MAX_HEAD_DIM
        and _paged(k_cache)
        and _paged(v_cache)
        and library() is not None
    )


def attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """As `kernels.attention.attention`, where `attention_fits`. Rows of padding are zero.

    The longest key is found in `seq_lens`, so a recording may be replayed with longer ones.

    IndexError: a sequence needs a page that its page table does not hold.
    """
    num_tokens, num_heads, head_dim = q.shape
    num_pages, page_size, num_kv_heads, _ = k_cache.shape
    num_sequences, pages_per_sequence = page_table.shape
    assert k_cache.shape == v_cache.shape
    assert page_table.dtype is cu_seqlens_q.dtype is seq_lens.dtype is torch.int32
    assert page_table.stride(1) == 1
    assert seq_lens.numel() == num_sequences == cu_seqlens_q.numel() - 1
    out = torch.empty_like(q)
    call = _ATTENTION.pack(
        _ATTENTION_CALL,
        q.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        page_table.data_ptr(),
        cu_seqlens_q.data_ptr(),
        seq_lens.data_ptr(),
        out.data_ptr(),
        num_tokens,
        num_sequences,
        num_heads,
        num_kv_heads,
        head_dim,
        page_size,
        num_pages,
        pages_per_sequence,
        page_table.stride(0),
        k_cache.stride(0),
        v_cache.stride(0),
        window or 0,
        q.dtype is _HALF,
        torch.get_num_threads(),
        is_batch_invariant(),
        scale,
    )
    _run(call, q, k_cache, v_cache, page_table, cu_seqlens_q, seq_lens, out)
    return out


# ---- argmax -------------------------------------------------------------------------------------


def argmax_fits(x: Tensor) -> bool:
    """x (T, V) on the CPU, contiguous, bf16 or fp32."""
    return x.dim() == 2 and x.shape[1] > 0 and _plain(x) and library() is not None


def argmax(x: Tensor) -> Tensor:
    """(T,) int64: where each row of x (T, V) is largest, lowest index among equals, NaN first."""
    num_rows, width = x.shape
    out = torch.empty(num_rows, dtype=torch.int64)
    _run(
        _ARGMAX.pack(_ARGMAX_CALL, x.data_ptr(), out.data_ptr(), num_rows, width, x.dtype is _HALF),
        x,
        out,
    )
    return out


# ---- embedding ----------------------------------------------------------------------------------


def embedding_fits(token_ids: Tensor, weight: Tensor) -> bool:
    """token_ids (T,) int32 or int64 and weight (V, D), both contiguous, on the CPU; no gradient."""
    return (
        weight.is_cpu
        and weight.is_contiguous()
        and token_ids.is_cpu
        and token_ids.is_contiguous()
        and token_ids.dtype in (torch.int64, torch.int32)
        and not (weight.requires_grad and torch.is_grad_enabled())
        and library() is not None
    )


def embedding(token_ids: Tensor, weight: Tensor) -> Tensor:
    """Rows (T, D) of weight (V, D). IndexError: a token id outside the table."""
    num_rows, width = weight.shape
    num_tokens = token_ids.numel()
    out = weight.new_empty(num_tokens, width)
    call = _EMBEDDING.pack(
        _EMBEDDING_CALL,
        token_ids.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        num_tokens,
        num_rows,
        width * weight.element_size(),
        token_ids.dtype is torch.int64,
    )
    _run(call, token_ids, weight, out)
    return out


# ---- nf4 ----------------------------------------------------------------------------------------


def nf4_dequantize_fits(weight: NF4Weight, dtype: torch.dtype) -> bool:
    """A weight on the CPU, contiguous, to bf16 or fp32."""
    return dtype in _FLOATS and _nf4_covered(weight) and library() is not None


def nf4_dequantize(weight: NF4Weight, dtype: torch.dtype) -> Tensor:
    """As `kernels.nf4.nf4_dequantize`, where `nf4_dequantize_fits`."""
    codes, scales, block, _ = weight
    num_rows, width = weight.shape
    out = torch.empty(num_rows, width, dtype=dtype)
    call = _NF4_DEQUANTIZE.pack(
        _NF4_DEQUANTIZE_CALL,
        codes.data_ptr(),
        scales.data_ptr(),
        out.data_ptr(),
        num_rows,
        width,
        block,
        dtype is _HALF,
        torch.get_num_threads(),
    )
    _run(call, codes, scales, out)
    return out


# ---- memory -------------------------------------------------------------------------------------


def empty_block(shapes: Sequence[tuple[Sequence[int], torch.dtype]]) -> list[Tensor]:
    """Uninitialised CPU tensors, side by side in one block, in huge pages where the system has them.

    Weights scattered over 4 KiB pages are read a quarter slower than the same weights in 2 MiB
    pages: every page begins with a walk through the page table. (They start zeroed.)
    """
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in shapes]
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // _ALIGNMENT) * _ALIGNMENT)
    length = (-(-starts[-1] // _HUGE_PAGE) + 1) * _HUGE_PAGE  # one more, to start at a boundary
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
        block = torch.frombuffer(memory, dtype=torch.uint8)
    else:
        block = torch.empty(length, dtype=torch.uint8)
    block = block[-block.data_ptr() % _HUGE_PAGE :]
    return [
        block[start : start + size].view(dtype).view(tuple(shape))
        for (shape, dtype), start, size in zip(shapes, starts, sizes, strict=False)
    ]


# ---- recording ----------------------------------------------------------------------------------


class Recording(TorchDispatchMode):
    """The native calls made in a `with` block, to be run again by one call, as a CUDA graph is.

    A decode step is some two hundred short calls, and between them Python, out of cache after each
    reading of the weights, takes as long as a sixth of the reading. `replay` does without:

        with Recording() as recording:
            logits = model(batch)
        ...  # write new values into the tensors of `batch`, in place
        if recording.reason is None:
            recording.replay()  # logits hold the new result

    The recording keeps the tensors it reads and writes. Sizes, and the number of threads, stay as
    they were. A step that did anything but native calls, views and allocations cannot be replayed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reason: str | None = None  # why this cannot be replayed
        self.thread = threading.get_ident()  # whose calls are recorded
        self._calls: list[bytes] = []
        self._tensors: list[tuple[Tensor | None, ...]] = []
        self._program = b""

    def __enter__(self) -> Recording:
        global _recording
        assert _recording is None, "recordings do not nest"
        super().__enter__()
        _recording = self
        return self

    def __exit__(self, *exception: Any) -> None:
        global _recording
        _recording = None
        super().__exit__(*exception)
        self._program = b"".join(self._calls)
        if not self._calls and self.reason is None:
            self.reason = "no native call was made"

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        returns = func._schema.returns
        is_view = bool(returns) and all(r.alias_info and not r.alias_info.is_write for r in returns)
        if not is_view and func.overloadpacket.__name__ not in _ALLOCATIONS:
            self.reason = self.reason or f"{func} is not a native call"
        return func(*args, **(kwargs or {}))

    def add(self, call: bytes, tensors: tuple[Tensor | None, ...]) -> None:
        self._calls.append(call)
        self._tensors.append(tensors)

    def replay(self) -> None:
        """Run the calls again, Python's lock given up meanwhile. IndexError as the operations."""
        assert self.reason is None, self.reason
        native = library()
        assert native is not None
        if native.run_unlocked(self._program, len(self._program)):
            raise IndexError(_BAD_INDEX)


_ALLOCATIONS = ("empty", "empty_like", "new_empty", "empty_strided")
_recording: Recording | None = None
