"""Checkpoint folders: index and shards, the check of what goes where, and the bytes themselves."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from hayate.checkpoint import reader
from hayate.checkpoint.index import INDEX_FILE, SINGLE_FILE, Checkpoint
from hayate.checkpoint.placements import (
    TORCH_DTYPES,
    Placement,
    check_placements,
    complete,
    concat,
    stack,
)
from hayate.checkpoint.reader import load
from hayate.errors import ModelError

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def random_tensor(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    high = 2 if dtype == torch.bool else 100
    return torch.randint(0, high, shape, generator=generator).to(dtype)


def unfilled(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A parameter whose every byte shows if nobody writes it (NaN for floats)."""
    tensor = torch.empty(shape, dtype=dtype)
    tensor.view(-1).view(torch.uint8).fill_(255 if dtype != torch.bool else 1)
    return tensor


def single(folder: Path, tensors: dict[str, torch.Tensor]) -> Checkpoint:
    save_file(tensors, folder / SINGLE_FILE)
    return Checkpoint.open(folder)


def sharded(folder: Path, weight_map: object = None) -> dict[str, torch.Tensor]:
    """Two shards of two tensors each; the index holds `weight_map` if given."""
    tensors = {name: random_tensor(3, 5, seed=i) for i, name in enumerate("abcd")}
    for shard, names in zip(SHARDS, ("ab", "cd"), strict=True):
        save_file({name: tensors[name] for name in names}, folder / shard)
    right = {"a": SHARDS[0], "b": SHARDS[0], "c": SHARDS[1], "d": SHARDS[1]}
    document = {"metadata": {}, "weight_map": right if weight_map is None else weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(document))
    return tensors


def refused(action: Callable[[], object], *fragments: str | Path) -> None:
    with pytest.raises(ModelError) as caught:
        action()
    assert all(str(f) in str(caught.value) for f in fragments), str(caught.value)


class TestIndex:
    def test_shards_are_one_model(self, tmp_path: Path) -> None:
        tensors = sharded(tmp_path)
        checkpoint = Checkpoint.open(tmp_path)
        assert checkpoint.path == tmp_path
        assert checkpoint.files == [tmp_path / name for name in SHARDS]
        assert checkpoint.tensors.keys() == tensors.keys()
        assert (checkpoint.num_parameters, checkpoint.num_bytes) == (60, 240)

    def test_sharded_reads_as_single(self, tmp_path: Path) -> None:
        tensors = sharded(tmp_path)
        (tmp_path / "one").mkdir()
        for checkpoint in (Checkpoint.open(tmp_path), single(tmp_path / "one", tensors)):
            parameters = {name: unfilled((3, 5)) for name in tensors}
            load(checkpoint, parameters)
            assert all(torch.equal(parameters[name], tensors[name]) for name in tensors)

    def test_links_as_in_the_hub_cache_are_followed(self, tmp_path: Path) -> None:
        blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots"
        blobs.mkdir()
        snapshot.mkdir()
        sharded(blobs)
        for name in (*SHARDS, INDEX_FILE):
            (snapshot / name).symlink_to(Path("..") / "blobs" / name)
        assert set(Checkpoint.open(snapshot).tensors) == set("abcd")

    @pytest.mark.parametrize("name", [SINGLE_FILE, INDEX_FILE])
    def test_dangling_link_is_named(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).symlink_to("gone")
        refused(lambda: Checkpoint.open(tmp_path), tmp_path / name, "No such file")

    def test_missing_shards_are_named(self, tmp_path: Path) -> None:
        sharded(tmp_path)
        (tmp_path / SHARDS[1]).unlink()
        refused(lambda: Checkpoint.open(tmp_path), tmp_path / INDEX_FILE, SHARDS[1], "1 of 2")

    @pytest.mark.parametrize(
        "name",
        [
            "../x.safetensors",
            "/etc/x.safetensors",
            "sub/x.safetensors",
            "a\\x.safetensors",
            "..",
            "",
            "passwd",
            "x\0.safetensors",
            "\ud800.safetensors",
            7,
            None,
            ["x.safetensors"],
        ],
    )
    def test_file_names_out_of_the_folder_are_refused(self, tmp_path: Path, name: object) -> None:
        sharded(tmp_path, {"a": name})
        refused(lambda: Checkpoint.open(tmp_path), tmp_path / INDEX_FILE, "'a'", "is in file")

    @pytest.mark.parametrize(
        ("weight_map", "fragments"),
        [
            (dict.fromkeys("ab", SHARDS[0]) | {"c": SHARDS[1]}, ["'d'", SHARDS[1], "not in the"]),
            (
                dict.fromkeys("abe", SHARDS[0]) | dict.fromkeys("cd", SHARDS[1]),
                ["'e'", "is not in " + SHARDS[0]],
            ),
            (
                dict.fromkeys("abc", SHARDS[0]) | {"d": SHARDS[1]},
                ["'c'", f"is in {SHARDS[1]}", f"the index says {SHARDS[0]}"],
            ),
            ({}, ["weight_map"]),
            ([], ["weight_map"]),
            ("x", ["weight_map"]),
        ],
    )
    def test_index_and_shards_must_agree(
        self, tmp_path: Path, weight_map: object, fragments: list[str]
    ) -> None:
        sharded(tmp_path, weight_map)
        refused(lambda: Checkpoint.open(tmp_path), tmp_path / INDEX_FILE, *fragments)

    def test_one_name_in_two_shards_is_refused(self, tmp_path: Path) -> None:
        tensors = sharded(tmp_path)
        save_file({name: tensors[name] for name in "acd"}, tmp_path / SHARDS[1])
        refused(lambda: Checkpoint.open(tmp_path), "'a'", *SHARDS)

    @pytest.mark.parametrize(
        ("text", "fragment"),
        [
            ("", "not valid"),
            ("[]", "not an object"),
            (
                '{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}',
                "'a' is in weight_map",
            ),
            ('{"weight_map": {"a": "x.safetensors"}, "weight_map": {}}', "no single"),
            ('{"metadata": {}}', "weight_map"),
        ],
    )
    def test_malformed_index_is_refused(self, tmp_path: Path, text: str, fragment: str) -> None:
        (tmp_path / INDEX_FILE).write_text(text)
        refused(lambda: Checkpoint.open(tmp_path), tmp_path / INDEX_FILE, fragment)

    def test_corrupt_shard_is_named(self, tmp_path: Path) -> None:
        sharded(tmp_path)
        os.truncate(tmp_path / SHARDS[1], os.path.getsize(tmp_path / SHARDS[1]) - 1)
        refused(lambda: Checkpoint.open(tmp_path), tmp_path / SHARDS[1], "'d'", "ends at byte")

    @pytest.mark.parametrize(
        ("file", "fragment"),
        [
            ("pytorch_model.bin", "pickled weights"),
            ("pytorch_model-00001-of-00002.bin", "pickled weights"),
            ("model.Q4_K_M.gguf", "GGUF"),
            ("consolidated.safetensors", "native layout"),
            ("adapter_model.safetensors", "LoRA"),
            (SHARDS[0], f"fetch {INDEX_FILE}"),
            ("weights.safetensors", f"named {SINGLE_FILE}"),
            ("notes.txt", "the folder holds notes.txt"),
        ],
    )
    def test_no_weights_says_what_is_there(self, tmp_path: Path, file: str, fragment: str) -> None:
        (tmp_path / file).touch()
        refused(lambda: Checkpoint.open(tmp_path), tmp_path, SINGLE_FILE, file, fragment)

    def test_no_folder(self, tmp_path: Path) -> None:
        refused(lambda: Checkpoint.open(tmp_path / "gone"), tmp_path / "gone", "does not exist")
        (tmp_path / "file").touch()
        refused(lambda: Checkpoint.open(tmp_path / "file"), "is not a folder")
        refused(lambda: Checkpoint.open(tmp_path / "file" / "x"), "does not exist")
        (tmp_path / "empty").mkdir()
        refused(lambda: Checkpoint.open(tmp_path / "empty"), "holds nothing")


class TestCheck:
    """`check_placements` on meta tensors: nothing is read."""

    @staticmethod
    def meta(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
        return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}

    def test_missing_tensor_names_tensor_and_parameter(self, tmp_path: Path) -> None:
        checkpoint = single(tmp_path, {"a": torch.zeros(2)})
        refused(
            lambda: check_placements(checkpoint, self.meta(a=(2,), b=(2,)), []),
            tmp_path,
            "tensor 'b' is missing",
            "parameter 'b'",
        )
        table = concat("ab", ["a", "b"], [2, 2])
        refused(
            lambda: check_placements(checkpoint, self.meta(ab=(4,)), table),
            "tensor 'b' is missing, which parameter 'ab' needs",
        )

    def test_unread_tensor_is_refused_unless_wholly_matched(self, tmp_path: Path) -> None:
        checkpoint = single(tmp_path, {"a": torch.zeros(2), "x.inv_freq": torch.zeros(1)})
        parameters = self.meta(a=(2,))
        refused(
            lambda: check_placements(checkpoint, parameters, [], ["inv_freq", "x"]),
            SINGLE_FILE,
            "'x.inv_freq'",
            "belongs to no parameter",
        )
        assert check_placements(checkpoint, parameters, [], ["b", r".*\.inv_freq"]) == [
            Placement("a", "a", ())
        ]

    def test_shape_mismatch_gives_both_shapes(self, tmp_path: Path) -> None:
        checkpoint = single(tmp_path, {"a": torch.zeros(2, 3), "b": torch.zeros(4, 3)})
        refused(
            lambda: check_placements(checkpoint, self.meta(a=(3, 2), b=(4, 3)), []),
            tmp_path / SINGLE_FILE,
            "'a' has shape [2, 3]",
            "parameter a has [3, 2]",
        )
        table = concat("ab", ["a", "b"], [3, 3])
        refused(
            lambda: check_placements(checkpoint, self.meta(ab=(6, 3)), table),
            "'a' has shape [2, 3]",
            "parameter ab has [3, 3]",
        )

    @pytest.mark.parametrize(
        ("source", "target"),
        [
            (torch.int32, torch.bfloat16),
            (torch.float8_e4m3fn, torch.bfloat16),
            (torch.uint8, torch.int8),
            (torch.float32, torch.int64),
        ],
    )
    def test_casts_that_lose_the_meaning_are_refused(
        self, tmp_path: Path, source: torch.dtype, target: torch.dtype
    ) -> None:
        checkpoint = single(tmp_path, {"a": torch.zeros(2).to(source)})
        parameters = {"a": torch.empty(2, dtype=target, device="meta")}
        refused(lambda: check_placements(checkpoint, parameters, []), "'a'", "no plain cast")

    @pytest.mark.parametrize(
        "table",
        [
            [("a", (slice(0, 2),))],  # rows 2 and 3 missing
            [("a", (slice(0, 2),)), ("b", (slice(1, 3),))],  # right count, overlap and hole
            [("a", (slice(0, 2),)), ("b", (slice(2, 4),)), ("c", (0,))],
            [("a", ()), ("b", ())],
            [("a", (slice(None), slice(0, 2))), ("b", (slice(None), slice(0, 2)))],
            [(str(i), (i % 3,)) for i in range(4)],
        ],
    )
    def test_placements_must_fill_each_element_once(self, tmp_path: Path, table: list) -> None:
        checkpoint = single(tmp_path, {"a": torch.zeros(2)})
        placements = [Placement(source, "p", index) for source, index in table]
        refused(
            lambda: check_placements(checkpoint, self.meta(p=(4, 4)), placements),
            "parameter p [4, 4]",
            "exactly once",
        )

    def test_unknown_target_is_refused(self, tmp_path: Path) -> None:
        checkpoint = single(tmp_path, {"a": torch.zeros(2)})
        refused(
            lambda: check_placements(checkpoint, self.meta(b=(2,)), [Placement("a", "c", ())]),
            "target='c'",
            "no parameter",
        )

    @settings(max_examples=100, deadline=None)
    @given(
        cuts=st.tuples(*[st.sets(st.integers(1, 3), max_size=3)] * 3),
        drop=st.integers(0, 63),
        double=st.integers(0, 63),
        as_int=st.booleans(),
    )
    def test_coverage_agrees_with_counting(
        self, cuts: tuple[set[int], ...], drop: int, double: int, as_int: bool
    ) -> None:
        """A grid over (4, 4, 4), in which one box may be missing or given twice."""
        edges = [[0, *sorted(c), 4] for c in cuts]
        spans = [list(itertools.pairwise(e)) for e in edges]
        grid = [(x, y, z) for x in spans[0] for y in spans[1] for z in spans[2]]
        chosen = [b for i, b in enumerate(grid) if i != drop]
        chosen += [b for i, b in enumerate(grid) if i == double]
        placements, counts = [], torch.zeros(4, 4, 4, dtype=torch.int64)
        for i, box in enumerate(chosen):
            index: tuple = tuple(slice(a, b) for a, b in box)
            if as_int and box[0][1] - box[0][0] == 1:
                index = (box[0][0], *index[1:])
            placements.append(Placement(str(i), "p", index))
            counts[index] += 1
        parameters = {"p": torch.empty(4, 4, 4, device="meta")}
        if not placements:
            return
        if bool((counts == 1).all()):
            assert complete(parameters, placements) == placements
        else:
            refused(lambda: complete(parameters, placements), "exactly once")

    def test_helpers(self) -> None:
        assert concat("t", ["a", "b"], [2, 3]) == [
            Placement("a", "t", (slice(0, 2),)),
            Placement("b", "t", (slice(2, 5),)),
        ]
        assert stack("t", ["a", "b"]) == [Placement("a", "t", (0,)), Placement("b", "t", (1,))]
        assert stack("t", ["a"], slice(3, 6)) == [Placement("a", "t", (0, slice(3, 6)))]


class TestLoad:
    @pytest.mark.parametrize("name", TORCH_DTYPES)
    def test_every_dtype_arrives_bit_for_bit(self, tmp_path: Path, name: str) -> None:
        dtype = TORCH_DTYPES[name]
        tensors = {
            "matrix": random_tensor(7, 5, dtype=dtype),
            "scalar": random_tensor(dtype=dtype),
            "none": random_tensor(0, 4, dtype=dtype),
        }
        parameters = {n: unfilled(tuple(t.shape), dtype) for n, t in tensors.items()}
        report = load(single(tmp_path, tensors), parameters)
        for n, t in load_file(tmp_path / SINGLE_FILE).items():
            assert torch.equal(
                parameters[n].view(-1).view(torch.uint8), t.view(-1).view(torch.uint8)
            )
        assert report.num_bytes == 36 * dtype.itemsize
        assert report.seconds > 0

    @pytest.mark.parametrize(
        "source", [torch.float32, torch.float64, torch.float16, torch.bfloat16]
    )
    @pytest.mark.parametrize(
        "target", [torch.float32, torch.float64, torch.float16, torch.bfloat16]
    )
    def test_casts_are_torch_s(
        self, tmp_path: Path, source: torch.dtype, target: torch.dtype
    ) -> None:
        special = torch.tensor([0.0, -0.0, torch.inf, torch.nan, 1e-45, 6e-8, 65519.0, 65520.0])
        tensor = torch.cat([random_tensor(1000), special, special * 1.00390625]).to(source)
        parameters = {"w": unfilled((len(tensor),), target)}
        load(single(tmp_path, {"w": tensor}), parameters)
        expected = tensor.to(target)
        assert torch.equal(parameters["w"].view(torch.uint8), expected.view(torch.uint8))

    @pytest.mark.parametrize("chunk_bytes", [8, 40, 1000, 2**23])
    @pytest.mark.parametrize("threads", [1, 5])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_fused_stacked_and_strided_destinations(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        chunk_bytes: int,
        threads: int,
        dtype: torch.dtype,
    ) -> None:
        """q, k, v fused; gate and up of each expert stacked; halves side by side; a transpose."""
        monkeypatch.setattr(reader, "CHUNK_BYTES", chunk_bytes)
        E, F, D = 3, 4, 6
        t = {n: random_tensor(*s, seed=i) for i, (n, s) in enumerate({
            "q": (8, D), "k": (2, D), "v": (2, D), "left": (5, 2), "right": (5, 7), "same": (9, 11),
            "deep0": (2, 3, 4), "deep1": (2, 3, 4),
            **{f"{e}.{p}": (F, D) for e in range(E) for p in ("gate", "up")},
        }.items())}  # fmt: skip
        parameters = {
            "qkv": unfilled((12, D), dtype),
            "gate_up": unfilled((E, 2 * F, D), dtype),
            "wide": unfilled((5, 9), dtype),
            "deep": unfilled((2, 2, 3, 4), dtype),
            "same": unfilled((11, 9), dtype).t(),
        }
        placements = [
            *concat("qkv", ["q", "k", "v"], [8, 2, 2]),
            *stack("gate_up", [f"{e}.gate" for e in range(E)], slice(0, F)),
            *stack("gate_up", [f"{e}.up" for e in range(E)], slice(F, None)),
            Placement("left", "wide", (slice(None), slice(0, 2))),
            Placement("right", "wide", (slice(None), slice(2, 9))),
            Placement("deep0", "deep", (slice(None), 0)),
            Placement("deep1", "deep", (slice(None), 1)),
        ]
        load(single(tmp_path, t), parameters, placements, threads=threads)
        expected = {
            "qkv": torch.cat([t["q"], t["k"], t["v"]]),
            "gate_up": torch.stack([torch.cat([t[f"{e}.gate"], t[f"{e}.up"]]) for e in range(E)]),
            "wide": torch.cat([t["left"], t["right"]], dim=1),
            "deep": torch.stack([t["deep0"], t["deep1"]], dim=1),
            "same": t["same"],
        }
        for name, tensor in expected.items():
            assert torch.equal(parameters[name], tensor.to(dtype)), name

    def test_one_tensor_may_fill_two_parameters(self, tmp_path: Path) -> None:
        tensor = random_tensor(4, 2)
        parameters = {"embed": unfilled((4, 2)), "head": unfilled((4, 2))}
        load(single(tmp_path, {"embed": tensor}), parameters, [
            Placement("embed", "embed", ()), Placement("embed", "head", ()),
        ])  # fmt: skip
        assert torch.equal(parameters["head"], tensor)
        assert torch.equal(parameters["embed"], tensor)

    def test_module_parameters_and_inference_tensors(self, tmp_path: Path) -> None:
        tensor = random_tensor(4, 2)
        checkpoint = single(tmp_path, {"w": tensor})
        with torch.inference_mode():
            inference = unfilled((4, 2))
        for parameter in (torch.nn.Parameter(unfilled((4, 2))), inference):
            load(checkpoint, {"w": parameter})
            assert torch.equal(parameter, tensor)

    def test_nothing_is_written_when_something_does_not_fit(self, tmp_path: Path) -> None:
        checkpoint = single(tmp_path, {"a": random_tensor(4), "b": random_tensor(4)})
        parameters = {"a": unfilled((4,)), "b": unfilled((5,))}
        with pytest.raises(ModelError):
            load(checkpoint, parameters)
        assert parameters["a"].isnan().all()

    def test_file_that_shrinks_after_opening(self, tmp_path: Path) -> None:
        checkpoint = single(tmp_path, {"a": random_tensor(100), "b": random_tensor(100)})
        os.truncate(tmp_path / SINGLE_FILE, checkpoint.tensors["b"].end - 1)
        parameters = {"a": unfilled((100,)), "b": unfilled((100,))}
        refused(
            lambda: load(checkpoint, parameters),
            tmp_path / SINGLE_FILE,
            "tensor 'b'",
            f"ends at byte {checkpoint.tensors['b'].end - 1}",
        )
        (tmp_path / SINGLE_FILE).unlink()
        refused(lambda: load(checkpoint, parameters), tmp_path / SINGLE_FILE, "No such file")

    def test_short_reads_are_continued(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The kernel may return fewer bytes than asked for."""
        preadv = os.preadv
        monkeypatch.setattr(os, "preadv", lambda fd, bufs, at: preadv(fd, [bufs[0][:7]], at))
        tensor = random_tensor(10, 10)
        parameters = {"w": unfilled((10, 10))}
        load(single(tmp_path, {"w": tensor}), parameters)
        assert torch.equal(parameters["w"], tensor)

    def test_read_error_is_a_model_error(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: object) -> int:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(os, "preadv", fail)
        checkpoint = single(tmp_path, {"w": random_tensor(4)})
        refused(lambda: load(checkpoint, {"w": unfilled((4,))}), "'w'", "Input/output error")

    def test_progress_ends_at_the_total(self, tmp_path: Path) -> None:
        calls: list[tuple[int, int]] = []
        checkpoint = single(tmp_path, {"w": random_tensor(100)})
        load(checkpoint, {"w": unfilled((100,))}, progress=lambda *call: calls.append(call))
        assert calls[-1] == (400, 400)
        assert calls == sorted(calls)

    def test_interrupt_leaves_no_thread_and_no_open_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(reader, "CHUNK_BYTES", 4)
        checkpoint = single(tmp_path, {"w": random_tensor(20_000)})
        parameters = {"w": unfilled((20_000,))}
        started = threading.Event()
        preadv = os.preadv

        def slow(fd: int, buffers: list, at: int) -> int:
            started.wait(0.01)
            return preadv(fd, buffers, at)

        def interrupt(done: int, total: int) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "preadv", slow)
        open_files = len(os.listdir("/proc/self/fd"))
        with pytest.raises(KeyboardInterrupt):
            load(checkpoint, parameters, threads=3, progress=interrupt)
        assert not [t for t in threading.enumerate() if t.name == "hayate-load"]
        assert len(os.listdir("/proc/self/fd")) == open_files
        assert parameters["w"].isnan().any()  # it did stop early

    def test_memory_beyond_the_destination_is_bounded(self, tmp_path: Path) -> None:
        """A cast needs 8 MiB a thread, here 16 MiB of 96; 16 MiB are left to the runtime."""
        size = 48 * 2**20
        save_file({"w": torch.ones(size, dtype=torch.bfloat16)}, tmp_path / SINGLE_FILE)
        script = f"""
import resource, torch
from hayate.checkpoint.index import Checkpoint
from hayate.checkpoint.reader import load
checkpoint = Checkpoint.open({str(tmp_path)!r})
w = torch.full(({size},), torch.nan)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
load(checkpoint, {{"w": w}}, threads=2)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
assert w.min() == 1
"""
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        )
        assert int(done.stdout) * 1024 < 32 * 2**20


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("chunk_bytes", [1000, 2**23])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_to_the_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int, dtype: torch.dtype
) -> None:
    """Plain, fused, strided; work that the caller's stream has pending comes before the load."""
    monkeypatch.setattr(reader, "CHUNK_BYTES", chunk_bytes)
    t = {name: random_tensor(300, 50, seed=i) for i, name in enumerate("abcde")}
    parameters = {
        "a": torch.empty(300, 50, dtype=dtype, device="cuda"),
        "bc": torch.empty(600, 50, dtype=dtype, device="cuda"),
        "de": torch.empty(300, 100, dtype=dtype, device="cuda"),
    }
    placements = [
        *concat("bc", ["b", "c"], [300, 300]),
        Placement("d", "de", (slice(None), slice(0, 50))),
        Placement("e", "de", (slice(None), slice(50, 100))),
    ]
    checkpoint = single(tmp_path, t)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for parameter in parameters.values():
            parameter.fill_(torch.nan)
        load(checkpoint, parameters, placements, threads=4)
    expected = {
        "a": t["a"],
        "bc": torch.cat([t["b"], t["c"]]),
        "de": torch.cat([t["d"], t["e"]], dim=1),
    }
    for name, tensor in expected.items():
        assert torch.equal(parameters[name].cpu(), tensor.to(dtype)), name
