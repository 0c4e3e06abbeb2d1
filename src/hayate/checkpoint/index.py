"""A checkpoint folder: one model.safetensors, or an index and its shards, as one set of tensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from hayate.checkpoint.header import (
    MAX_JSON_BYTES,
    JsonObject,
    TensorInfo,
    is_text,
    parse_json_object,
    read_header,
    show,
)
from hayate.errors import ModelError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# What a folder may hold instead, in the order we look: pattern, what it is, what to do.
_OTHER_FORMATS = (
    (
        "model-*-of-*.safetensors",
        f"shards without {INDEX_FILE}",
        f"fetch {INDEX_FILE} from where the shards came from",
    ),
    (
        "adapter_model.*",
        "an adapter (LoRA), not a whole model",
        "merge it into its base model and save that",
    ),
    (
        "consolidated*",
        "the publisher's native layout",
        "use the repository's Hugging Face files, model*.safetensors",
    ),
    (
        "pytorch_model*.bin",
        "pickled weights",
        "save the model again as safetensors (transformers: save_pretrained)",
    ),
    ("*.gguf", "GGUF", "use the Hugging Face repository that it was made from"),
    ("*.safetensors", "safetensors under another name", f"a whole model is named {SINGLE_FILE}"),
)


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a folder, validated; none of their data is read yet.

    Where a folder has both a single file and an index, the single file counts, as in transformers.
    """

    path: Path
    files: list[Path]
    tensors: dict[str, TensorInfo]

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Find and validate the checkpoint in folder `path`.

        Raises ModelError naming file and tensor: no weights (and what there is instead), a
        malformed header or index, a missing shard, a tensor that index and shards disagree about.
        """
        folder = Path(path)
        if not folder.is_dir():
            problem = "is not a folder" if folder.exists() else "does not exist"
            raise ModelError(f"{folder} {problem}; give the folder that holds {SINGLE_FILE}")
        single, index = folder / SINGLE_FILE, folder / INDEX_FILE
        # A dangling link (an interrupted download) is there, and its message comes from reading it.
        if single.exists() or single.is_symlink():
            return cls(folder, [single], read_header(single))
        if index.exists() or index.is_symlink():
            return _open_sharded(folder, index)
        _explain_missing(folder)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, headers not counted."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    @property
    def num_parameters(self) -> int:
        """Elements of all tensors."""
        return sum(tensor.num_elements for tensor in self.tensors.values())


def _open_sharded(folder: Path, index: Path) -> Checkpoint:
    weight_map = _read_weight_map(index)
    shards = [folder / name for name in sorted(set(weight_map.values()))]
    if missing := [shard.name for shard in shards if not shard.exists()]:
        raise ModelError(
            f"{index}: {len(missing)} of {len(shards)} shards are not in the folder: "
            f"{_some(missing)}; fetch them again"
        )
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        found = read_header(shard)
        for name in found:
            owner = weight_map.get(name)
            if owner is None:
                _disagree(index, name, f"is in {shard.name} but not in the index")
            if owner != shard.name:
                _disagree(index, name, f"is in {shard.name}; the index says {owner}")
        tensors |= found
    if absent := [name for name in weight_map if name not in tensors]:
        _disagree(index, absent[0], f"is not in {weight_map[absent[0]]} as the index says")
    return Checkpoint(folder, shards, tensors)


def _read_weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name, each a plain name within the folder."""
    try:
        if index.stat().st_size > MAX_JSON_BYTES:
            raise ModelError(f"{index}: the index is larger than {MAX_JSON_BYTES} bytes")
        raw = index.read_bytes()
    except OSError as error:
        raise ModelError(
            f"{index}: cannot be read ({error.strerror}); check the path and its permissions"
        ) from error
    document = parse_json_object(raw, index)
    weight_map = document.get("weight_map")
    if document.duplicate is not None or not isinstance(weight_map, JsonObject) or not weight_map:
        raise ModelError(
            f"{index}: the index has no (or no single) weight_map from tensors to files; "
            "fetch it again"
        )
    if weight_map.duplicate is not None:
        _disagree(index, weight_map.duplicate, "is in weight_map twice")
    for name, shard in weight_map.items():
        if not is_text(name) or not _is_plain_file_name(shard):
            _disagree(
                index, name, f"is in file {show(shard)}, which is no *.safetensors of the folder"
            )
    return weight_map


def _is_plain_file_name(name: object) -> bool:
    """No way out of the folder. Links are fine: the folder's maker set them, not the index."""
    return (
        isinstance(name, str)
        and is_text(name)
        and name.endswith(".safetensors")
        and not any(c in "/\\" or ord(c) < 32 for c in name)
    )


def _disagree(index: Path, tensor: str, problem: str) -> NoReturn:
    raise ModelError(
        f"{index}: tensor {show(tensor)} {problem}; "
        "index and shards do not belong together, fetch both again"
    )


def _explain_missing(folder: Path) -> NoReturn:
    missing = f"{folder}: no weights, neither {SINGLE_FILE} nor {INDEX_FILE}"
    for pattern, what, remedy in _OTHER_FORMATS:
        if found := sorted(p.name for p in folder.glob(pattern)):
            raise ModelError(f"{missing}; {_some(found)} is {what}, not supported: {remedy}")
    found = sorted(p.name for p in folder.iterdir())
    raise ModelError(
        f"{missing}; the folder holds {_some(found) if found else 'nothing'}; "
        "give the folder of a Hugging Face model"
    )


def _some(names: list[str]) -> str:
    """The first few of `names`."""
    shown = ", ".join(names[:4])
    return shown + (f" and {len(names) - 4} more" if len(names) > 4 else "")
