"""Checkpoints we write, read by the safetensors library and by our own reader."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from hayate.checkpoint import writer
from hayate.checkpoint.index import INDEX_FILE, SINGLE_FILE, Checkpoint
from hayate.checkpoint.placements import Placement, concat, stack
from hayate.checkpoint.reader import load
from hayate.checkpoint.writer import save
from hayate.errors import ModelError, UsageError

E, F, D = 3, 4, 6  # experts, FFN width, model width
PLACEMENTS = [
    *concat("qkv", ["q", "k", "v"], [8, 2, 2]),
    *stack("gate_up", [f"{e}.gate" for e in range(E)], slice(0, F)),
    *stack("gate_up", [f"{e}.up" for e in range(E)], slice(F, 2 * F)),
    Placement("left", "wide", (slice(None), slice(0, 2))),
    Placement("right", "wide", (slice(None), slice(2, 5))),
]


def model() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    shapes = {"qkv": (12, D), "gate_up": (E, 2 * F, D), "wide": (3, 5), "norm": (D,), "scalar": ()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def in_the_file(parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the checkpoint must hold, spelled out by hand."""
    qkv, gate_up, wide = parameters["qkv"], parameters["gate_up"], parameters["wide"]
    return {
        "q": qkv[:8],
        "k": qkv[8:10],
        "v": qkv[10:],
        "left": wide[:, :2],
        "right": wide[:, 2:],
        "norm": parameters["norm"],
        "scalar": parameters["scalar"],
        **{f"{e}.gate": gate_up[e, :F] for e in range(E)},
        **{f"{e}.up": gate_up[e, F:] for e in range(E)},
    }


def library_reads(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def assert_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        assert torch.equal(actual[name], tensor), name


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_single_file_is_the_table_read_backwards(tmp_path: Path) -> None:
    parameters = model()
    files = save(parameters, PLACEMENTS, tmp_path / "new" / "folder", metadata={"step": "3"})
    assert files == [tmp_path / "new" / "folder" / SINGLE_FILE]
    assert names_in(tmp_path / "new" / "folder") == {SINGLE_FILE}
    assert_equal(library_reads(tmp_path / "new" / "folder"), in_the_file(parameters))
    with safe_open(files[0], "pt") as file:
        assert file.metadata() == {"format": "pt", "step": "3"}


@pytest.mark.parametrize("max_shard_bytes", [1, 100, 200, 10**6])
def test_shards_have_hugging_face_names_and_index(tmp_path: Path, max_shard_bytes: int) -> None:
    parameters = model()
    expected = in_the_file(parameters)
    files = save(parameters, PLACEMENTS, tmp_path, max_shard_bytes=max_shard_bytes)
    assert_equal(library_reads(tmp_path), expected)
    n = len(files)
    assert n == {1: len(expected), 10**6: 1}.get(max_shard_bytes, n)
    if n == 1:
        assert names_in(tmp_path) == {SINGLE_FILE}
        return
    assert [f.name for f in files] == [
        f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)
    ]
    assert names_in(tmp_path) == {INDEX_FILE, *(f.name for f in files)}
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())
    assert index["weight_map"] == {name: f.name for f in files for name in load_file(f)}
    for file in files:
        tensors = load_file(file)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= max_shard_bytes


@pytest.mark.parametrize("max_shard_bytes", [1, 10**6])
def test_saved_and_loaded_is_equal(tmp_path: Path, max_shard_bytes: int) -> None:
    parameters = model()
    save(parameters, PLACEMENTS, tmp_path, max_shard_bytes=max_shard_bytes)
    again = {name: torch.full_like(p, torch.nan) for name, p in parameters.items()}
    load(Checkpoint.open(tmp_path), again, PLACEMENTS)
    assert_equal(again, parameters)


def test_dtype_casts_floats_only(tmp_path: Path) -> None:
    parameters = {"w": torch.nn.Parameter(torch.randn(5)), "ids": torch.arange(3)}
    save(parameters, [], tmp_path, dtype=torch.bfloat16)
    expected = {"w": parameters["w"].detach().bfloat16(), "ids": parameters["ids"]}
    assert_equal(library_reads(tmp_path), expected)


def test_tied_parameters_and_strides(tmp_path: Path) -> None:
    weight = torch.randn(4, 3)
    parameters = {"embed": weight, "head": weight, "t": weight.t()}
    save(parameters, [], tmp_path)
    assert_equal(library_reads(tmp_path), parameters)


def test_no_parameters(tmp_path: Path) -> None:
    save({}, [], tmp_path)
    assert Checkpoint.open(tmp_path).tensors == {}


def test_files_get_the_mode_of_any_new_file(tmp_path: Path) -> None:
    file = save(model(), PLACEMENTS, tmp_path)[0]
    (tmp_path / "other").touch()
    assert stat.S_IMODE(file.stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)


def test_other_files_stay_and_the_same_name_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save({"old": torch.zeros(2)}, [], tmp_path)
    save({"new": torch.ones(2)}, [], tmp_path)
    assert names_in(tmp_path) == {"config.json", SINGLE_FILE}
    assert_equal(library_reads(tmp_path), {"new": torch.ones(2)})


def test_shards_that_a_single_file_would_hide_are_refused(tmp_path: Path) -> None:
    save({"old": torch.zeros(2)}, [], tmp_path)
    with pytest.raises(UsageError, match=rf"{SINGLE_FILE} exists.*another folder"):
        save(model(), PLACEMENTS, tmp_path, max_shard_bytes=100)
    assert_equal(library_reads(tmp_path), {"old": torch.zeros(2)})


def test_placements_that_lose_elements_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"parameter qkv .* exactly once"):
        save(model(), PLACEMENTS[1:], tmp_path)
    assert names_in(tmp_path) == set()


@pytest.mark.parametrize("failing_call", [1, 2])
@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_failure_leaves_no_half_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, failing_call: int
) -> None:
    """Full disk while writing, or a failing rename: whole files under final names or none."""
    real, calls = getattr(os, function), 0

    def fail(*args: object) -> object:
        nonlocal calls
        calls += 1
        if calls == failing_call:
            raise OSError(28, "No space left on device")
        return real(*args)

    monkeypatch.setattr(writer.os, function, fail)
    with pytest.raises(OSError, match="No space left"):
        save(model(), PLACEMENTS, tmp_path, max_shard_bytes=200)
    left = names_in(tmp_path)
    assert len(left) == (failing_call - 1 if function == "replace" else 0)
    assert all(name.startswith("model-") for name in left)  # no index: it comes last
    library_reads(tmp_path)
