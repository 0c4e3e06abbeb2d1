"""Which tensor of the checkpoint fills which part of which parameter, and the check that all fits.

A parameter that no placement names is filled by the tensor of the same name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from hayate.checkpoint.header import TensorInfo, show
from hayate.checkpoint.index import Checkpoint
from hayate.errors import ModelError

TORCH_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
# Between these a plain cast keeps the meaning. The others are codes that need a scale, or indices.
_CASTABLE = {torch.bfloat16, torch.float16, torch.float32, torch.float64}

Box = tuple[tuple[int, int], ...]  # [start, stop) in each dimension of a parameter


class Placement(NamedTuple):
    """Tensor `source`[`part`] of the checkpoint is parameter `target`[`index`].

    `index` and `part` hold integers and slices (no step) from the first dimension on; dimensions they
    do not reach are taken whole, so () is all. Read backwards to save, where every `part` is ().
    """

    source: str
    target: str
    index: tuple[int | slice, ...]  # type: ignore[assignment]  # hides tuple.index, unused here
    part: tuple[slice, ...] = ()  # at most one of them not whole


def concat(target: str, sources: Sequence[str], sizes: Sequence[int]) -> list[Placement]:
    """`sources` one after the other along dimension 0 of `target`, with `sizes` rows each."""
    placements, start = [], 0
    for source, size in zip(sources, sizes, strict=True):
        placements.append(Placement(source, target, (slice(start, start + size),)))
        start += size
    return placements


def stack(target: str, sources: Sequence[str], rows: slice | None = None) -> list[Placement]:
    """`sources[i]` is `target`[i], or `target`[i, rows]: expert i of E, its rows of (E, 2F, D)."""
    part = () if rows is None else (rows,)
    return [Placement(source, target, (i, *part)) for i, source in enumerate(sources)]


def check_placements(
    checkpoint: Checkpoint,
    parameters: Mapping[str, Tensor],
    placements: Sequence[Placement],
    ignore: Sequence[str] = (),
) -> list[Placement]:
    """Check that `checkpoint` fills `parameters` exactly, before any byte is read.

    Every parameter must be filled once in each element, every tensor used or matched as a whole by
    one of the regular expressions `ignore`, every shape equal and every dtype equal or a cast
    between BF16, F16, F32 and F64. Of `parameters` only shapes and dtypes count; they may be meta
    tensors. Returns all placements, one for every tensor of the same name included.
    Raises ModelError naming file, tensor and parameter.
    """
    wanted = complete(parameters, placements)
    missing = {p.source: p.target for p in wanted if p.source not in checkpoint.tensors}
    if missing:
        source, target = next(iter(missing.items()))
        _fail(
            checkpoint,
            f"tensor {show(source)} is missing, which parameter {show(target)} needs"
            + _and_more(len(missing), "missing tensor"),
        )
    used = {p.source for p in wanted}
    ignored = [re.compile(pattern) for pattern in ignore]
    unread = [
        name
        for name in checkpoint.tensors
        if name not in used and not any(pattern.fullmatch(name) for pattern in ignored)
    ]
    if unread:
        _fail(
            checkpoint,
            f"tensor {show(unread[0])} in {checkpoint.tensors[unread[0]].file.name} "
            "belongs to no parameter" + _and_more(len(unread), "such tensor"),
        )
    for placement in wanted:
        tensor = checkpoint.tensors[placement.source]
        _check_fits(tensor, placement, parameters[placement.target])
    return wanted


def complete(parameters: Mapping[str, Tensor], placements: Sequence[Placement]) -> list[Placement]:
    """`placements`, and one of the same name for each parameter that none of them names.

    Raises ModelError unless they fill every element of every parameter exactly once.
    """
    boxes: dict[str, list[Box]] = {}
    for placement in placements:
        if placement.target not in parameters:
            raise ModelError(f"{placement} names no parameter of the model")
        box = box_of(placement.index, parameters[placement.target].shape)
        boxes.setdefault(placement.target, []).append(box)
    for target, filled in boxes.items():
        parameter = parameters[target]
        covered = sum(_volume(box) for box in filled)
        if covered != parameter.numel() or _any_overlap(filled):
            raise ModelError(
                f"parameter {target} {list(parameter.shape)} has {parameter.numel()} elements and "
                f"its placements fill {covered}; they must fill each element exactly once"
            )
    same_name = [Placement(name, name, ()) for name in parameters if name not in boxes]
    return [*placements, *same_name]


def _check_fits(tensor: TensorInfo, placement: Placement, parameter: Tensor) -> None:
    index = placement.index
    dims = [
        stop - start
        for d, (start, stop) in enumerate(box_of(index, parameter.shape))
        if d >= len(index) or isinstance(index[d], slice)
    ]
    where = f"{tensor.file}: tensor {show(tensor.name)}"
    if [stop - start for start, stop in box_of(placement.part, tensor.shape)] != dims:
        raise ModelError(
            f"{where} has shape {list(tensor.shape)}, its place in parameter {placement.target} "
            f"has {dims}; config.json and the weights do not belong together"
        )
    dtype = TORCH_DTYPES[tensor.dtype]
    if dtype != parameter.dtype and not {dtype, parameter.dtype} <= _CASTABLE:
        wanted = str(parameter.dtype).removeprefix("torch.")
        raise ModelError(
            f"{where} is {tensor.dtype}, parameter {placement.target} is {wanted}, and no plain "
            "cast leads there; if the checkpoint is quantised, use the one it was made from"
        )


def box_of(index: tuple[int | slice, ...], shape: Sequence[int]) -> Box:
    """The region `index` selects from `shape`; asserts that it lies within."""
    assert len(index) <= len(shape), f"{index} has more dimensions than {tuple(shape)}"
    box = []
    for part, size in zip(index, shape, strict=False):
        if isinstance(part, slice):
            assert part.step in (None, 1), f"{index} has a step"
            start = 0 if part.start is None else part.start
            stop = size if part.stop is None else part.stop
        else:
            start, stop = part, part + 1
        assert 0 <= start <= stop <= size, f"{index} is outside {tuple(shape)}"
        box.append((start, stop))
    return (*box, *((0, size) for size in shape[len(index) :]))


def _volume(box: Box) -> int:
    return math.prod(stop - start for start, stop in box)


def _any_overlap(boxes: Iterable[Box]) -> bool:
    """Whether two boxes share an element. Sorted by dimension 0, few are open at a time."""
    open_boxes: list[Box] = []
    for box in sorted(b for b in boxes if _volume(b)):
        open_boxes = [b for b in open_boxes if not box or b[0][1] > box[0][0]]
        for other in open_boxes:
            if all(a[0] < b[1] and b[0] < a[1] for a, b in zip(box, other, strict=True)):
                return True
        open_boxes.append(box)
    return False


def _and_more(count: int, what: str) -> str:
    return f" (the first of {count} {what}s)" if count > 1 else ""


def _fail(checkpoint: Checkpoint, problem: str) -> NoReturn:
    raise ModelError(
        f"{checkpoint.path}: {problem}; config.json and the weights do not belong together, "
        "or the checkpoint is of a kind hayate does not run"
    )
