"""The header of one safetensors file, validated as hostile input.

Layout of a file: 8 bytes N (unsigned, little endian); N bytes of JSON; the data. The JSON is one
object: tensor name -> {"dtype", "shape", "data_offsets": [begin, end] within the data}, and
optionally "__metadata__" -> {string: string}. The tensors cover the data exactly: no hole, no
overlap, nothing after.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from hayate.errors import ModelError

DTYPE_BYTES = {
    "BF16": 2,
    "F16": 2,
    "F32": 4,
    "F64": 8,
    "I8": 1,
    "U8": 1,
    "I16": 2,
    "U16": 2,
    "I32": 4,
    "U32": 4,
    "I64": 8,
    "U64": 8,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
}
MAX_JSON_BYTES = 100_000_000  # the limit of the safetensors library; real headers are below 20 MB
_MAX_BYTES = 2**63 - 1  # of a tensor: what sizes and offsets can be elsewhere
_FETCH_AGAIN = "the file is damaged or incomplete; fetch it again"


class TensorInfo(NamedTuple):
    """Where one tensor lies: bytes [begin, end) of `file`, row-major, little endian."""

    name: str
    dtype: str  # a key of DTYPE_BYTES
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.end - self.begin


class JsonObject(dict[str, Any]):
    """A JSON object that remembers the first name it was given twice (None: every name once)."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.duplicate: str | None = None
        if len(self) != len(pairs):
            counts = Counter(name for name, _ in pairs)
            self.duplicate = counts.most_common(1)[0][0]


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of `file` by name, in the order of their bytes. Reads nothing but the header.

    Raises ModelError, naming the file and the tensor, for anything that departs from the format or
    has a dtype outside DTYPE_BYTES.
    """
    raw, file_size = _read_json_bytes(file)
    header = parse_json_object(raw, file)
    if header.duplicate is not None:
        _fail(file, f"tensor {show(header.duplicate)} is described twice", _FETCH_AGAIN)
    _check_metadata(header.pop("__metadata__", JsonObject([])), file)
    data_start = 8 + len(raw)
    tensors = [
        _read_tensor(name, entry, file, data_start, file_size) for name, entry in header.items()
    ]
    tensors.sort(key=lambda t: (t.begin, t.end))
    _check_coverage(tensors, file, data_start, file_size)
    return {tensor.name: tensor for tensor in tensors}


def read_metadata(file: Path) -> dict[str, str]:
    """The free-form `__metadata__` of `file`, empty when it has none. Raises ModelError as `read_header`."""
    metadata = parse_json_object(_read_json_bytes(file)[0], file).get(
        "__metadata__", JsonObject([])
    )
    _check_metadata(metadata, file)
    return dict(metadata)


def parse_json_object(raw: bytes, file: Path) -> JsonObject:
    """Parse strict JSON whose top level is an object; every object comes as a JsonObject.

    Integers beyond 20 characters come as float infinity, and -0 as a float, so that a type check
    refuses them. Raises ModelError naming the file.
    """
    try:
        value = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=JsonObject,
            parse_int=_parse_int,
            parse_constant=_refuse_constant,
        )
    except UnicodeDecodeError as error:
        _fail(file, f"the JSON is not UTF-8 at byte {error.start}", _FETCH_AGAIN)
    except (ValueError, RecursionError) as error:
        _fail(file, f"the JSON is not valid ({error})", _FETCH_AGAIN)
    if not isinstance(value, JsonObject):
        _fail(file, f"the JSON is {show(value)}, not an object", _FETCH_AGAIN)
    return value


def is_text(value: object) -> bool:
    """A string that UTF-8 can hold: JSON escapes can also spell half of a surrogate pair."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def show(value: object) -> str:
    """`value` for a message: quoted, control characters escaped, cut after 120 characters."""
    text = ascii(value) if isinstance(value, str) and not is_text(value) else repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def _read_json_bytes(file: Path) -> tuple[bytes, int]:
    """The bytes of the JSON, and the size of the whole file."""
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            _fail(file, "this is not a regular file", "a checkpoint holds safetensors files")
        with file.open("rb") as stream:
            file_size = os.fstat(stream.fileno()).st_size
            prefix = stream.read(8)
            if prefix.startswith(b"version "):
                _fail(
                    file,
                    "this is a Git LFS pointer, not the weights",
                    "run `git lfs pull` in the folder",
                )
            if len(prefix) < 8:
                _fail(file, f"the file has only {file_size} bytes", _FETCH_AGAIN)
            length = int.from_bytes(prefix, "little")
            if length > MAX_JSON_BYTES:
                _fail(
                    file,
                    f"the header claims {length} bytes, more than the {MAX_JSON_BYTES} allowed",
                    "this is not a safetensors file, or it is damaged; fetch it again",
                )
            if 8 + length > file_size:
                _fail(
                    file,
                    f"the header claims {length} bytes, the file has {file_size}",
                    _FETCH_AGAIN,
                )
            raw = stream.read(length)
    except OSError as error:
        _fail(file, f"cannot be read ({error.strerror})", "check the path and its permissions")
    if len(raw) < length:
        _fail(file, "the file became shorter while its header was read", _FETCH_AGAIN)
    return raw, file_size


def _check_metadata(metadata: object, file: Path) -> None:
    if not isinstance(metadata, JsonObject):
        _fail(file, f"__metadata__ is {show(metadata)}, not an object", _FETCH_AGAIN)
    if metadata.duplicate is not None:
        _fail(file, f"__metadata__ holds {show(metadata.duplicate)} twice", _FETCH_AGAIN)
    for key, value in metadata.items():
        if not is_text(key) or not is_text(value):
            _fail(file, f"__metadata__ {show(key)} is {show(value)}, not a string", _FETCH_AGAIN)


def _read_tensor(
    name: str, entry: object, file: Path, data_start: int, file_size: int
) -> TensorInfo:
    """Validate one entry by itself; offsets become absolute."""

    def fail(problem: str, remedy: str = _FETCH_AGAIN) -> NoReturn:
        _fail(file, f"tensor {show(name)} {problem}", remedy)

    if not is_text(name):
        fail("has a name that is not valid Unicode")
    if not isinstance(entry, JsonObject):
        fail(f"is described by {show(entry)}, not by an object")
    if entry.duplicate is not None:
        fail(f"has {show(entry.duplicate)} twice")
    if missing := {"dtype", "shape", "data_offsets"} - entry.keys():
        fail(f"has no {' and no '.join(sorted(missing))}")
    if unknown := entry.keys() - {"dtype", "shape", "data_offsets"}:
        fail(f"has {show(min(unknown))}, which the format does not know")

    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        fail(
            f"has dtype {show(dtype)}, which hayate does not read",
            f"use a checkpoint whose dtypes are among {', '.join(DTYPE_BYTES)}",
        )
    if not isinstance(shape, list) or not all(_is_count(size) for size in shape):
        fail(f"has shape {show(shape)}, not a list of integers from 0")
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(_is_count(offset) for offset in offsets)
        or offsets[0] > offsets[1]
    ):
        fail(f"has data_offsets {show(offsets)}, not [begin, end] with 0 <= begin <= end")
    begin, end = offsets
    needed = _num_bytes(shape, DTYPE_BYTES[dtype])
    if needed is None:
        fail(f"has shape {show(shape)}, more than any memory holds")
    if needed != end - begin:
        fail(f"of {dtype} {show(shape)} needs {needed} bytes, its data_offsets span {end - begin}")
    if data_start + end > file_size:
        fail(f"ends at byte {data_start + end}, the file has only {file_size}")
    return TensorInfo(name, dtype, tuple(shape), file, data_start + begin, data_start + end)


def _check_coverage(tensors: list[TensorInfo], file: Path, data_start: int, file_size: int) -> None:
    """The sorted `tensors` cover [data_start, file_size) without hole or overlap."""
    position, previous = data_start, "the header"
    for tensor in tensors:
        if tensor.begin < position:
            _fail(file, f"tensor {show(tensor.name)} overlaps {previous}", _FETCH_AGAIN)
        if tensor.begin > position:
            _fail(
                file,
                f"{tensor.begin - position} bytes between {previous} and tensor "
                f"{show(tensor.name)} belong to no tensor",
                _FETCH_AGAIN,
            )
        position, previous = tensor.end, f"tensor {show(tensor.name)}"
    if position != file_size:
        _fail(
            file,
            f"{file_size - position} bytes after {previous} belong to no tensor",
            _FETCH_AGAIN,
        )


def _num_bytes(shape: list[int], dtype_bytes: int) -> int | None:
    """dtype_bytes * product of `shape`, or None where the non-zero sizes alone pass 63 bits.

    Stops there, so a shape of a million sizes does not cost a product of a million digits.
    """
    product = dtype_bytes
    for size in shape:
        product *= size or 1
        if product > _MAX_BYTES:
            return None
    return 0 if 0 in shape else product


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0  # type(): a bool is an int, too


def _parse_int(digits: str) -> int | float:
    # Long numbers would cost quadratic time; `-0` is a float in the format's own parser.
    if len(digits) > 20:
        return math.inf
    return -0.0 if digits == "-0" else int(digits)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _fail(file: Path, problem: str, remedy: str) -> NoReturn:
    raise ModelError(f"{file}: {problem}; {remedy}")
