"""Tensors of which each process holds a piece, saved together and read back into other pieces.

The format is torch.distributed.checkpoint's: `.metadata` says which box of which tensor stands in which
`__R_0.distcp`. What one number of processes wrote, any other reads; nobody needs memory for more than it holds.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from hayate.errors import ModelError
from hayate.training.parallel import World

# One process is no mistake.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")


@dataclass(frozen=True)
class StateSlice:
    """A box of a tensor: `data` stands at `offsets` in a whole of shape `shape`."""

    data: Tensor
    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, data: Tensor) -> StateSlice:
        return cls(data, (0,) * data.dim(), tuple(data.shape))

    @property
    def box(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size(self.offsets), self.data.shape)


def save_slices(folder: Path, state: Mapping[str, StateSlice], world: World) -> None:
    """Write everybody's pieces, which must make up whole tensors, into `folder`. Called by all, each with its own."""
    dcp.save(
        dict(state),
        checkpoint_id=folder,
        planner=_SavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
        process_group=world.checkpoint_group,
        no_dist=world.size == 1,
    )


def load_slices(folder: Path, state: Mapping[str, StateSlice]) -> None:
    """Fill the tensors of `state` from `folder`, in which all must be, in the same types and shapes.

    Nothing is exchanged: each process reads for itself. Raises ModelError.
    """
    planner = _LoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        dcp.load(dict(state), checkpoint_id=folder, planner=planner, no_dist=True)
    except dcp.CheckpointException as error:
        cause = next((f[0] for f in error.failures.values()), error)
        if isinstance(cause, ModelError):
            raise ModelError(f"{folder}: {cause}") from None
        text = f"{type(cause).__name__}: {cause}".splitlines()[0]
        raise ModelError(
            f"the optimizer's state in {folder} cannot be read ({text}); remove this checkpoint to go on from the one "
            "before"
        ) from error


class _SavePlanner(dcp.DefaultSavePlanner):
    state_dict: dict[str, Any]

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([_write_item(name, piece) for name, piece in self.state_dict.items()])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].data


def _write_item(name: str, piece: StateSlice) -> WriteItem:
    properties = TensorProperties.create_from_tensor(piece.data)
    return WriteItem(
        MetadataIndex(name, piece.offsets),
        WriteItemType.SHARD,
        tensor_data=TensorWriteData(piece.box, properties, torch.Size(piece.shape)),
    )


class _LoadPlanner(dcp.DefaultLoadPlanner):
    state_dict: dict[str, Any]

    def set_up_planner(
        self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False
    ) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def create_local_plan(self) -> LoadPlan:
        saved = self.metadata.state_dict_metadata  # type: ignore[union-attr]
        _check_kinds(set(saved), set(self.state_dict))
        items: list[ReadItem] = []
        for name, piece in self.state_dict.items():
            found = saved.get(name)
            if not isinstance(found, TensorStorageMetadata):
                raise ModelError(f"it has no {name}, which this model needs")
            theirs, ours = (found.properties.dtype, tuple(found.size)), piece.data.dtype
            if theirs != (ours, piece.shape):
                raise ModelError(
                    f"{name} is {theirs[0]} {theirs[1]} there, {ours} {piece.shape} in this run; resume with the "
                    "configuration in training.json"
                )
            items += create_read_items_for_chunk_list(name, found, [piece.box])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].data


def _check_kinds(saved: set[str], wanted: set[str]) -> None:
    """Refuse what another precision wrote: with master weights, for example, where this run has none."""
    kinds = [{name.split(".")[0] for name in names} for names in (saved, wanted)]
    if kinds[0] != kinds[1]:
        theirs, ours = (", ".join(sorted(k)) for k in kinds)
        raise ModelError(
            f"it holds {theirs}, this run needs {ours}; resume with the configuration in training.json"
        )
