"""Parameters back to a checkpoint folder, in the names and the sharding that Hugging Face uses."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from hayate.checkpoint.index import INDEX_FILE, SINGLE_FILE
from hayate.checkpoint.placements import Placement, complete
from hayate.errors import UsageError


class _Entry(NamedTuple):
    """A tensor to write: a view of a parameter, and the dtype it is written in."""

    name: str
    view: Tensor
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return self.view.numel() * self.dtype.itemsize


def save(
    parameters: Mapping[str, Tensor],
    placements: Sequence[Placement],
    directory: str | Path,
    *,
    max_shard_bytes: int = 5 * 2**30,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write `parameters` to `directory`, the table `placements` read backwards; returns the files.

    One model.safetensors, or, where the tensors have more than `max_shard_bytes`, shards of at most
    that (or of one tensor) and an index. Floating-point tensors are cast to `dtype` if given;
    `metadata` goes into each file beside {"format": "pt"}. Files of the same name are replaced, no
    other file is touched. All are written under temporary names, then renamed, the index last; in
    an empty folder a crash so leaves either no checkpoint or a whole one. Needs host memory for one
    shard where `parameters` are on a GPU. Raises UsageError when the folder holds a
    model.safetensors that would hide the shards, ModelError when placements do not fit.
    """
    folder = Path(directory)
    entries = [
        _Entry(p.source, _view(parameters[p.target], p), _file_dtype(parameters[p.target], dtype))
        for p in complete(parameters, placements)
    ]
    names = [entry.name for entry in entries]
    assert len(names) == len(set(names)), "two placements have the same source; nothing to save by"
    shards = _split(entries, max_shard_bytes)
    if len(shards) > 1 and (folder / SINGLE_FILE).exists():
        raise UsageError(
            f"{folder / SINGLE_FILE} exists and would be read instead of the {len(shards)} shards "
            "to be written; remove it or save to another folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / name for name in _file_names(len(shards))]
    writers: dict[Path, Callable[[Path], object]] = {}
    for file, shard in zip(files, shards, strict=True):
        writers[file] = _shard_writer(shard, {"format": "pt", **(metadata or {})})
    if len(shards) > 1:
        index = _index(files, shards)
        writers[folder / INDEX_FILE] = lambda path: path.write_text(index)
    _write_all(writers)
    return files


def _view(parameter: Tensor, placement: Placement) -> Tensor:
    return parameter.detach()[placement.index]


def _file_dtype(parameter: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and parameter.is_floating_point() else parameter.dtype


def _split(entries: Sequence[_Entry], max_shard_bytes: int) -> list[list[_Entry]]:
    """Consecutive groups of at most `max_shard_bytes`; a larger tensor is one by itself."""
    shards: list[list[_Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.num_bytes
    return shards


def _file_names(num_shards: int) -> Iterator[str]:
    if num_shards == 1:
        yield SINGLE_FILE
        return
    for i in range(1, num_shards + 1):
        yield f"model-{i:05d}-of-{num_shards:05d}.safetensors"


def _index(files: Sequence[Path], shards: Sequence[Sequence[_Entry]]) -> str:
    weight_map = {
        entry.name: file.name for file, shard in zip(files, shards, strict=True) for entry in shard
    }
    total_size = sum(entry.num_bytes for shard in shards for entry in shard)
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(index, indent=2) + "\n"


def _shard_writer(shard: Sequence[_Entry], metadata: dict[str, str]) -> Callable[[Path], object]:
    from safetensors.torch import save_file

    def write(path: Path) -> None:
        tensors: dict[str, Tensor] = {}
        addresses = set[int]()
        for entry in shard:
            tensor = entry.view.to("cpu", entry.dtype).contiguous()
            # The library refuses two names for the same memory (tied weights).
            if tensor.data_ptr() in addresses:
                tensor = tensor.clone()
            addresses.add(tensor.data_ptr())
            tensors[entry.name] = tensor
        save_file(tensors, path, metadata=metadata)

    return write


def _write_all(writers: Mapping[Path, Callable[[Path], object]]) -> None:
    """Write every file under a temporary name beside it, flush it to the disk, then rename all."""
    temporary = {path: path.with_name(f".{path.name}.{os.getpid()}.incomplete") for path in writers}
    try:
        for path, write in writers.items():
            temporary[path].touch()
            mode = temporary[path].stat().st_mode
            write(temporary[path])
            temporary[path].chmod(mode)  # the library leaves the file to its owner alone
            with temporary[path].open("rb") as stream:
                os.fsync(stream.fileno())
        for path in writers:
            os.replace(temporary[path], path)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
