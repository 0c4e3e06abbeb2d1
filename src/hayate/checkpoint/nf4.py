"""Matrices in bitsandbytes' serialised NF4 (QLoRA, https://arxiv.org/abs/2305.14314): read, and written the same.

Matrix P.weight (N, K), flattened row-major, lies in the file as

    P.weight                                 4-bit codes, two a byte, the first of them in the high half
    P.weight.quant_map                       float32 (16,), the values of the codes
    P.weight.absmax                          scale of each block of values: float32, or 8-bit codes of it
    P.weight.nested_quant_map                float32 (256,), the values of those        (double quantisation only)
    P.weight.nested_absmax                   float32, scale of each block of scales     (double quantisation only)
    P.weight.quant_state.bitsandbytes__nf4   JSON in UTF-8: shape, block sizes, offset of the scales

    scale = nested_quant_map[absmax] * nested_absmax + nested_offset      or absmax itself
    value = quant_map[code] * scale

A block goes on over the end of a row. Which matrices are NF4 follows from these names alone.
"""

from __future__ import annotations

import dataclasses
import json
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from hayate.checkpoint.config_json import ConfigReader
from hayate.checkpoint.header import TensorInfo, parse_json_object, show
from hayate.checkpoint.index import Checkpoint
from hayate.errors import ModelError

_T = TypeVar("_T")

_STATE = ".quant_state.bitsandbytes__"
_COMPANIONS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
_BLOCK_SIZES = tuple(32 << i for i in range(8))  # 32 to 4096, what bitsandbytes writes
_NESTED_BLOCK = 256
_MAX_STATE_BYTES = 2**16  # real ones have some 170
_REMEDY = "fetch the checkpoint again, or quantise its original anew"


@dataclass(frozen=True)
class Nested:
    """The second quantisation: that of the scales."""

    absmax: TensorInfo
    quant_map: TensorInfo
    offset: float


@dataclass(frozen=True)
class NF4Tensor:
    """One matrix (N, K) and the tensors it lies in."""

    name: str  # P.weight
    shape: tuple[int, int]
    block_size: int  # values a scale
    dtype: str  # of the matrix that was quantised
    codes: TensorInfo
    absmax: TensorInfo
    nested: Nested | None
    others: tuple[TensorInfo, ...]  # codebook and JSON, read already

    @property
    def where(self) -> str:
        """File and tensor, for a message."""
        return f"{self.codes.file}: tensor {show(self.name)}"

    @property
    def data(self) -> list[TensorInfo]:
        """What has to be read to have the matrix."""
        nested = [] if self.nested is None else [self.nested.absmax, self.nested.quant_map]
        return [self.codes, self.absmax, *nested]


def nf4_tensors(checkpoint: Checkpoint, codebook: Sequence[float]) -> dict[str, NF4Tensor]:
    """The NF4 matrices of `checkpoint` by name; reads their JSON and codebooks, which must equal `codebook`.

    Raises ModelError naming file, tensor and defect: fp4, a part that is missing or of a wrong type or size, JSON with
    an unknown, missing or odd field, other code values.
    """
    found = {}
    for name in checkpoint.tensors:
        matrix, is_state, kind = name.rpartition(_STATE)
        if is_state:
            _expect(checkpoint.tensors[name], kind == "nf4", f"is {show(kind)}; hayate runs nf4")
            found[matrix] = _Reading(checkpoint, matrix).tensor(codebook)
    for name, tensor in checkpoint.tensors.items():
        for suffix in _COMPANIONS:
            if name.endswith(suffix) and name.removesuffix(suffix) not in found:
                missing = show(name.removesuffix(suffix) + _STATE + "nf4")
                _fail(tensor, f"belongs to no NF4 matrix: there is no tensor {missing}")
    return found


def without_nf4(checkpoint: Checkpoint, matrices: Mapping[str, NF4Tensor]) -> Checkpoint:
    """`checkpoint` with its other tensors only."""
    gone = {t.name for m in matrices.values() for t in (*m.data, *m.others)}
    rest = {name: tensor for name, tensor in checkpoint.tensors.items() if name not in gone}
    return dataclasses.replace(checkpoint, tensors=rest)


def block_scales(matrix: NF4Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """Scale of each block, float32 (ceil(N K / block_size),), from the tensors of `matrix.data` by name.

    The product and the sum are rounded one after the other, as bitsandbytes does.
    """
    absmax = tensors[matrix.absmax.name]
    if matrix.nested is None:
        return absmax
    values = tensors[matrix.nested.quant_map.name].index_select(0, absmax.int())
    nested = tensors[matrix.nested.absmax.name].repeat_interleave(_NESTED_BLOCK)
    return values * nested[: len(values)] + matrix.nested.offset


def serialise(
    name: str,
    codes: Tensor,
    absmax: Tensor,
    *,
    shape: Sequence[int],
    dtype: torch.dtype,
    codebook: Sequence[float],
    block_size: int = 64,
    double: bool = True,
) -> dict[str, Tensor]:
    """The tensors of one matrix, bit for bit those bitsandbytes 0.50 writes on a CPU.

    Args:
        name: of the matrix, P.weight.
        codes: uint8 (ceil(N K / 2),), two codes a byte.
        absmax: float32 (ceil(N K / block_size),).
        shape, dtype: of the matrix that was quantised.
        double: quantise the scales, too.
    """
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": block_size,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(shape),
    }
    tensors = {name: codes.unsqueeze(1), f"{name}.quant_map": torch.tensor(codebook)}
    if double:
        offset = absmax.mean()
        absmax, nested_absmax = _quantize_scales(absmax - offset)
        tensors[f"{name}.nested_absmax"] = nested_absmax
        tensors[f"{name}.nested_quant_map"] = dynamic_map()
        state |= {
            "nested_blocksize": _NESTED_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": offset.item(),
        }
    tensors[f"{name}.absmax"] = absmax
    text = json.dumps(state).encode()
    tensors[f"{name}{_STATE}nf4"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return tensors


@cache
def dynamic_map() -> Tensor:
    """The 256 values of the signed 8-bit dynamic type (https://arxiv.org/abs/1511.04561), ascending.

    For each exponent e = -6..0: 2^(e+6) values of either sign, evenly spaced between 0.1 and 1 times 10^e (the
    middles of so many intervals); and 0 and 1.
    """
    values = [0.0, 1.0]
    for power in range(7):
        ends = torch.linspace(0.1, 1, 2**power + 1, dtype=torch.float32)
        middles = (ends[:-1] + ends[1:]) / 2.0
        values += (10 ** (power - 6) * middles).tolist() + (-(10 ** (power - 6)) * middles).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


def _quantize_scales(x: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit codes of float32 `x` (n,), and the largest magnitude of each block of 256.

    bitsandbytes' CPU code does not search the nearest value of the map: it looks it up by x / absmax, rounded to one
    of 65,536 steps from -1 to 1.
    """
    steps = torch.arange(65536) / 65535 * 2 - 1
    table = torch.bucketize(steps, (dynamic_map()[:-1] + dynamic_map()[1:]) / 2).to(torch.uint8)
    blocks = torch.nn.functional.pad(x, (0, -len(x) % _NESTED_BLOCK)).view(-1, _NESTED_BLOCK)
    absmax = blocks.abs().amax(1)
    normed = (blocks / absmax.unsqueeze(1)).clamp(-1, 1)
    index = ((normed + 1) * 0.5 * 65535 + 0.5).nan_to_num(0).long()
    codes = table[index].masked_fill(absmax.unsqueeze(1) == 0, 0)
    return codes.view(-1)[: len(x)].clone(), absmax


class _Reading:
    """The parts of one matrix, checked as they are taken."""

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        self.checkpoint, self.name = checkpoint, name
        self.state = self._take(f"{name}{_STATE}nf4", "U8")

    def tensor(self, codebook: Sequence[float]) -> NF4Tensor:
        name, state = self.name, self._json()
        _field(state, "quant_type", str, ("nf4",))
        shape = state.require("shape", list)
        if len(shape) != 2 or not all(type(n) is int and 0 < n < 2**31 for n in shape):
            raise ModelError(
                f"{state.where('shape')} is {shape}, not two positive sizes; {_REMEDY}"
            )
        size = shape[0] * shape[1]
        block_size = _field(state, "blocksize", int, _BLOCK_SIZES)
        dtype = _field(state, "dtype", str, ("bfloat16", "float16", "float32"))
        codes = self._take(name, None)
        if codes.num_bytes != (size + 1) // 2:
            _fail(codes, f"has {codes.num_bytes} bytes; {size} values need {(size + 1) // 2}")
        quant_map = self._take(f"{name}.quant_map", "F32", (16,))
        values = struct.unpack("<16f", _read(quant_map))
        _expect(quant_map, values == _float32(codebook), "holds other values than NF4's")
        num_blocks = -(-size // block_size)
        nested = self._nested(state, num_blocks)
        absmax = self._take(f"{name}.absmax", "F32" if nested is None else "U8", (num_blocks,))
        if unknown := state.unread():
            raise ModelError(f"{state.where(unknown[0])} is not a field of this format; {_REMEDY}")
        others = (quant_map, self.state)
        return NF4Tensor(
            name, (shape[0], shape[1]), block_size, dtype, codes, absmax, nested, others
        )

    def _nested(self, state: ConfigReader, num_blocks: int) -> Nested | None:
        """Double quantisation if JSON or tensors say so; then both must."""
        parts = (f"{self.name}.nested_absmax", f"{self.name}.nested_quant_map")
        fields = ("nested_blocksize", "nested_dtype", "nested_offset")
        if not any(f in state for f in fields) and not any(
            p in self.checkpoint.tensors for p in parts
        ):
            return None
        _field(state, "nested_blocksize", int, (_NESTED_BLOCK,))
        _field(state, "nested_dtype", str, ("float32",))
        return Nested(
            self._take(parts[0], "F32", (-(-num_blocks // _NESTED_BLOCK),)),
            self._take(parts[1], "F32", (256,)),
            state.require("nested_offset", float),
        )

    def _json(self) -> ConfigReader:
        tensor = self.state
        where = f"{tensor.file}: tensor {show(tensor.name)}"
        _expect(tensor, tensor.num_bytes <= _MAX_STATE_BYTES, "is too large for a quant_state")
        fields = parse_json_object(_read(tensor), Path(where))
        _expect(tensor, fields.duplicate is None, f"has the field {show(fields.duplicate)} twice")
        return ConfigReader(fields, where)

    def _take(
        self, name: str, dtype: str | None, shape: tuple[int, ...] | None = None
    ) -> TensorInfo:
        tensor = self.checkpoint.tensors.get(name)
        if tensor is None:
            _fail(self.state, f"needs the tensor {show(name)}, which is missing")
        _expect(tensor, dtype in (None, tensor.dtype), f"is {tensor.dtype}; it must be {dtype}")
        fits = shape in (None, tensor.shape)
        _expect(tensor, fits, f"has shape {list(tensor.shape)}; it must be {list(shape or ())}")
        return tensor


def _field(state: ConfigReader, key: str, kind: type[_T], allowed: tuple[_T, ...]) -> _T:
    """The field, which must be there and one of `allowed`."""
    value = state.require(key, kind)
    state.expect(key, allowed, None)
    return value


def _read(tensor: TensorInfo) -> bytes:
    try:
        with tensor.file.open("rb") as stream:
            data = os.pread(stream.fileno(), tensor.num_bytes, tensor.begin)
    except OSError as error:
        _fail(tensor, f"cannot be read ({error.strerror})")
    _expect(tensor, len(data) == tensor.num_bytes, "ends before its last byte")
    return data


def _float32(values: Sequence[float]) -> tuple[float, ...]:
    return struct.unpack(f"<{len(values)}f", struct.pack(f"<{len(values)}f", *values))


def _expect(tensor: TensorInfo, holds: bool, problem: str) -> None:
    if not holds:
        _fail(tensor, problem)


def _fail(tensor: TensorInfo, problem: str) -> NoReturn:
    raise ModelError(f"{tensor.file}: tensor {show(tensor.name)} {problem}; {_REMEDY}")
