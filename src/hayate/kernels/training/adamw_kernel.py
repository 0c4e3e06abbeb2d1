"""The Triton kernel of `adamw`: all tensors of the same types in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hayate.kernels._triton import launch, register_compile, tl, triton
from hayate.kernels.training.quantization import (
    dequantize_tile,
    quantize_tile,
    random_bits_tile,
    round_to_bfloat16_tile,
)
from hayate.kernels.training.tensor_list import (
    PIECE,
    TRITON_TYPES,
    address,
    pointer,
    tensor_table,
)

__all__ = ["AdamWState", "Scalars", "adamw_triton"]

_BLOCKS = 4  # of 256 elements, that a program handles at a time
_COLUMNS = 8  # parameter, gradient, master, first, second, scales, elements, number of the first


class AdamWState(NamedTuple):
    """What AdamW remembers of a parameter of N elements; contiguous tensors."""

    master: Tensor | None  # (N,) fp32, the weight itself; None: the parameter is all there is
    first: Tensor  # (N,) fp32, bf16, or int8 codes
    second: Tensor  # (N,) fp32, bf16, or uint8 codes
    scales: Tensor | None  # (2, ceil(N / 256)) fp32, of the codes of both moments


class Scalars(NamedTuple):
    """The numbers of one step."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    step_size: float  # lr / (1 - beta1^step)
    unbias: float  # 1 / sqrt(1 - beta2^step)


@triton.jit
def _load(pointers, inside, MASKED: tl.constexpr):
    # Without a mask, so that a lane loads 16 bytes at a time.
    return tl.load(pointers, mask=inside, other=0) if MASKED else tl.load(pointers)


@triton.jit
def _store(pointers, x, inside, MASKED: tl.constexpr):
    if MASKED:
        tl.store(pointers, x, mask=inside)
    else:
        tl.store(pointers, x)


@triton.jit
def _store_bits(pointers, bits, inside, MASKED: tl.constexpr):
    """Store the 16 bits of a bf16."""
    _store(pointers.to(tl.pointer_type(tl.int16), bitcast=True), bits, inside, MASKED)


@triton.jit
def _adamw_tile(
    param_ptr,
    grad_ptr,
    master_ptr,
    first_ptr,
    second_ptr,
    first_scale_ptr,
    second_scale_ptr,
    done,  # elements of the piece before this tile
    left,  # elements of the piece
    number,  # of the first element of the piece
    keep,
    grad_scale,
    beta1,
    beta2,
    eps,
    step_size,
    unbias,
    seed,
    step,
    MASTER: tl.constexpr,
    MOMENTS: tl.constexpr,
    BLOCKS: tl.constexpr,
    MASKED: tl.constexpr,
):
    block = tl.arange(0, BLOCKS)
    tile = done + block[:, None] * 256 + tl.arange(0, 256)[None, :]
    inside = tile < left
    block_inside = block * 256 < left - done
    block += done // 256
    g = _load(grad_ptr + tile, inside, MASKED).to(tl.float32) * grad_scale
    m = _load(first_ptr + tile, inside, MASKED)
    v = _load(second_ptr + tile, inside, MASKED)
    w = _load((master_ptr if MASTER else param_ptr) + tile, inside, MASKED).to(tl.float32)
    if MOMENTS == "int8":
        m = dequantize_tile(m, _load(first_scale_ptr + block, block_inside, MASKED), True)
        v = dequantize_tile(v, _load(second_scale_ptr + block, block_inside, MASKED), False)
    else:
        m = m.to(tl.float32)
        v = v.to(tl.float32)
    m += (1.0 - beta1) * (g - m)
    v = beta2 * v + (1.0 - beta2) * g * g
    w = w * keep - step_size * m / (tl.sqrt(v) * unbias + eps)

    PARAM: tl.constexpr = param_ptr.dtype.element_ty
    ROUNDS_WEIGHT: tl.constexpr = tl.bfloat16 == PARAM and not MASTER
    if ROUNDS_WEIGHT or MOMENTS != "float32":
        bits = random_bits_tile(seed, step, number + done, BLOCKS)
    if MASTER:
        _store(master_ptr + tile, w, inside, MASKED)
    if ROUNDS_WEIGHT:
        rounded = round_to_bfloat16_tile(w, bits & 0xFFFF)
        _store_bits(param_ptr + tile, rounded, inside, MASKED)
    else:
        _store(param_ptr + tile, w.to(PARAM), inside, MASKED)
    if MOMENTS == "int8":
        codes, scales = quantize_tile(m, (bits >> 16) & 0xFF, True)
        _store(first_ptr + tile, codes, inside, MASKED)
        _store(first_scale_ptr + block, scales, block_inside, MASKED)
        codes, scales = quantize_tile(v, (bits >> 24) & 0xFF, False)
        _store(second_ptr + tile, codes, inside, MASKED)
        _store(second_scale_ptr + block, scales, block_inside, MASKED)
    elif MOMENTS == "bfloat16":
        rounded = round_to_bfloat16_tile(m, ((bits >> 8) & 0xFF00) | 0x80)
        _store_bits(first_ptr + tile, rounded, inside, MASKED)
        rounded = round_to_bfloat16_tile(v, ((bits >> 16) & 0xFF00) | 0x80)
        _store_bits(second_ptr + tile, rounded, inside, MASKED)
    else:
        _store(first_ptr + tile, m, inside, MASKED)
        _store(second_ptr + tile, v, inside, MASKED)


@triton.jit(do_not_specialize=["seed", "step"])
def _adamw_kernel(
    rows_ptr,
    pieces_ptr,
    decay_ptr,  # (N,) fp32
    grad_scale_ptr,  # None or one fp32
    lr,
    beta1,
    beta2,
    eps,
    step_size,
    unbias,
    seed,
    step,
    PARAM: tl.constexpr,  # types
    GRAD: tl.constexpr,
    MASTER: tl.constexpr,  # there is an fp32 copy of the weight
    MOMENTS: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCKS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tensor = tl.load(pieces_ptr + 2 * tl.program_id(0))
    begin = tl.load(pieces_ptr + 2 * tl.program_id(0) + 1).to(tl.int64) * PIECE
    row = rows_ptr + tensor * COLUMNS
    n = tl.load(row + 6)
    FIRST: tl.constexpr = tl.int8 if MOMENTS == "int8" else getattr(tl, MOMENTS)
    SECOND: tl.constexpr = tl.uint8 if MOMENTS == "int8" else getattr(tl, MOMENTS)
    param_ptr = pointer(row, 0, PARAM) + begin
    grad_ptr = pointer(row, 1, GRAD) + begin
    master_ptr = pointer(row, 2, tl.float32) + begin
    first_ptr = pointer(row, 3, FIRST) + begin
    second_ptr = pointer(row, 4, SECOND) + begin
    first_scale_ptr = pointer(row, 5, tl.float32) + begin // 256
    second_scale_ptr = first_scale_ptr + (n + 255) // 256
    number = tl.load(row + 7) + begin
    keep = 1.0 - lr * tl.load(decay_ptr + tensor)
    grad_scale = 1.0
    if grad_scale_ptr is not None:
        grad_scale = tl.load(grad_scale_ptr)
    left = tl.minimum(n - begin, PIECE).to(tl.int32)
    whole = left // (BLOCKS * 256) * (BLOCKS * 256)
    for done in range(0, whole, BLOCKS * 256):
        _adamw_tile(
            param_ptr, grad_ptr, master_ptr, first_ptr, second_ptr, first_scale_ptr,
            second_scale_ptr, done, left, number, keep, grad_scale, beta1, beta2, eps, step_size,
            unbias, seed, step, MASTER, MOMENTS, BLOCKS, False,
        )  # fmt: skip
    if whole < left:
        _adamw_tile(
            param_ptr, grad_ptr, master_ptr, first_ptr, second_ptr, first_scale_ptr,
            second_scale_ptr, whole, left, number, keep, grad_scale, beta1, beta2, eps, step_size,
            unbias, seed, step, MASTER, MOMENTS, BLOCKS, True,
        )  # fmt: skip


class Member(NamedTuple):
    """A parameter, what belongs to it, and the number of its first element."""

    param: Tensor
    grad: Tensor
    state: AdamWState
    weight_decay: float
    number: int


def adamw_triton(
    members: Sequence[Member], scalars: Scalars, grad_scale: Tensor | None, seed: int, step: int
) -> None:
    """A step of parameters whose tensors are of the same types."""
    param, grad, state = members[0][:3]
    rows = tuple(
        (*map(address, (m.param, m.grad, *m.state)), m.param.numel(), m.number) for m in members
    )
    table = tensor_table(rows, tuple(m.param.numel() for m in members), param.device)
    moments = "int8" if state.scales is not None else str(state.first.dtype).removeprefix("torch.")
    launch(
        _adamw_kernel,
        (len(table.pieces),),
        table.rows,
        table.pieces,
        _decays(tuple(m.weight_decay for m in members), param.device),
        grad_scale,
        *scalars,
        seed,
        step,
        PARAM=TRITON_TYPES[param.dtype],
        GRAD=TRITON_TYPES[grad.dtype],
        MASTER=state.master is not None,
        MOMENTS=moments,
        PIECE=PIECE,
        BLOCKS=_BLOCKS,
        COLUMNS=_COLUMNS,
        num_warps=4,
    )


@lru_cache(maxsize=64)
def _decays(decay: tuple[float, ...], device: Any) -> Tensor:
    return torch.tensor(decay, dtype=torch.float32).to(device)


for _name, _param, _master, _moments in (
    ("master_fp32", tl.bfloat16, True, "float32"),
    ("master_bf16", tl.bfloat16, True, "bfloat16"),
    ("master_int8", tl.bfloat16, True, "int8"),
    ("stochastic_bf16", tl.bfloat16, False, "bfloat16"),
    ("stochastic_int8", tl.bfloat16, False, "int8"),
    ("fp32", tl.float32, False, "float32"),
):
    register_compile(
        _adamw_kernel,
        f"adamw_{_name}",
        {"rows_ptr": "*i64", "pieces_ptr": "*i32", "decay_ptr": "*fp32", "grad_scale_ptr": "*fp32"}
        | dict.fromkeys(("lr", "beta1", "beta2", "eps", "step_size", "unbias"), "fp32")
        | {"seed": "i32", "step": "i32"},
        {"PARAM": _param, "GRAD": _param, "MASTER": _master, "MOMENTS": _moments}
        | {"PIECE": PIECE, "BLOCKS": _BLOCKS, "COLUMNS": _COLUMNS},
    )
