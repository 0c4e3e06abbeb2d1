"""Training with 2 and 4 processes against training with one, over gloo."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hayate.errors import DeviceError, ModelError, UsageError
from hayate.models.presets import PRESETS
from hayate.training import parallel
from hayate.training.metrics import read_metrics
from hayate.training.parallel import World
from hayate.training.state import find_checkpoints
from tests.parallel import training_crew as crews
from tests.parallel.training_crew import SMALL, Crew, Outcome
from tests.training.runs import make_data, tiny_config, trainer
from tests.training.test_cli import ROOT, words

# Updates of AdamW are lr m / (sqrt(v) + eps). With a large eps they follow small changes of the gradient smoothly.
LR, EPS = 1e-2, 1e-1
SMOOTH = {"optimizer__lr": str(LR), "optimizer__eps": str(EPS)}
# Two micro-batches a step, one of each of two processes. A sum of two has one order only; clipping is off, for its norm
# is summed in another; and the gradients of experts are not used, for they are added up inside of matrix products. So
# nothing is left that could differ.
EXACT = {
    "model__preset": "dense-tiny",
    "batch__tokens_per_micro_batch": "128",
    "optimizer__clip": "0",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def crew() -> Iterator[dict[int, Crew]]:
    crews = {size: Crew(size) for size in (1, 2, 4)}
    yield crews
    for one in crews.values():
        one.close()


def assert_same_bits(found: Outcome, expected: Outcome) -> None:
    assert found.losses == pytest.approx(expected.losses, rel=1e-6)  # summed over processes
    for name, weight in expected.weights.items():
        assert torch.equal(found.weights[name], weight), name
    assert torch.equal(found.counts, expected.counts)


def assert_close(found: Outcome, expected: Outcome) -> None:
    """An update changes by at most 2 lr / eps times the change of the gradient (m and sqrt(v) each by that).

    Gradients are clipped to norm 1, so each element is below 1, and sums of some hundred fp32 terms in another order
    differ by less than 300 * 2^-24; the steps add up.
    """
    bound = len(expected.losses) * 2 * LR / EPS * 300 * 2**-24
    assert bound < LR / 100  # far less than a step
    for name, weight in expected.weights.items():
        assert (found.weights[name] - weight).abs().max() < bound, name
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    assert torch.equal(found.counts, expected.counts)  # no token went to another expert
    if expected.biases is not None:
        assert torch.equal(found.biases, expected.biases)


@pytest.mark.parametrize("balance", ["sequence", "global", "bias", "none"])
def test_losses_and_weights_equal_one_process(
    crew: dict[int, Crew], data: Path, tmp_path: Path, balance: str
) -> None:
    options = SMOOTH | {"loss__balance": balance, "loss__aux": "1.0", "loss__bias_rate": "0.1"}
    (one,) = crew[1](crews.run_steps, data, tmp_path / "1", until=4, **options)
    assert one.losses[-1] < one.losses[0] - 0.02
    for size, micro in ((2, "64"), (4, "64")):  # two micro-batches each, and one
        options["batch__tokens_per_micro_batch"] = micro
        for found in crew[size](crews.run_steps, data, tmp_path / "n", until=4, **options):
            assert_close(found, one)


@pytest.mark.parametrize(
    "precision",
    [
        {},
        {"precision__dtype": "bfloat16", "precision__moments": "int8"},
        # Rounding draws by the element's number, 8-bit moments share scales by blocks: no cut may show.
        {
            "precision__dtype": "bfloat16",
            "precision__master": "stochastic_rounding",
            "precision__moments": "int8",
        },
    ],
)
def test_two_processes_give_the_bits_of_one(
    crew: dict[int, Crew], data: Path, tmp_path: Path, precision: dict[str, str]
) -> None:
    options = EXACT | precision
    (one,) = crew[1](crews.run_steps, data, tmp_path / "1", until=3, **options)
    for found in crew[2](crews.run_steps, data, tmp_path / "2", until=3, **options):
        assert_same_bits(found, one)


def test_slices_are_a_partition_that_cuts_parameters_anywhere(
    crew: dict[int, Crew], data: Path, tmp_path: Path
) -> None:
    (one,) = crew[1](crews.run_steps, data, tmp_path / "1", until=0)
    four = crew[4](crews.run_steps, data, tmp_path / "4", until=0)
    pieces: dict[str, list[tuple[int, int]]] = {}
    for found in four:
        for name, begin, count in found.slices:
            pieces.setdefault(name, []).append((begin, count))
    assert pieces.keys() == one.weights.keys()
    for name, parts in pieces.items():
        end = 0
        for begin, count in sorted(parts):
            assert begin == end, name
            assert begin % 256 == 0, name
            end += count
        assert end == one.weights[name].numel(), name
    counts = {len(parts) for parts in pieces.values()}
    assert counts >= {1, 2, 4}  # within one process, over a border, over several
    sizes = {count for parts in pieces.values() if len(parts) == 2 for _, count in parts}
    assert len(sizes) > 4  # uneven
    # A quarter each, but for what the buckets are filled up with: less than 4 * 256 elements of 8 bytes.
    largest = max(found.state_bytes for found in four)
    assert largest - one.state_bytes / 4 < 20 * 4 * 256 * 8


def test_evaluation_covers_every_window_once(
    crew: dict[int, Crew], data: Path, tmp_path: Path
) -> None:
    ((row, sample),) = crew[1](crews.evaluate, data, tmp_path / "1")
    for size in (2, 4):
        first, *others = crew[size](crews.evaluate, data, tmp_path / str(size))
        assert first[0]["loss"] == pytest.approx(row["loss"], rel=1e-12)  # sums in fp64
        assert first[0]["targets"] == row["targets"]
        assert first[1]["text"] == sample["text"]
        assert all(rows[0]["loss"] == first[0]["loss"] for rows in others)


def test_resume_with_another_number_of_processes(
    crew: dict[int, Crew], data: Path, tmp_path: Path
) -> None:
    """2 -> 1 -> 4 is close to one process all the way, of a mixture with learned biases."""
    options = SMOOTH | {"loss__balance": "bias", "loss__bias_rate": "0.1"}
    (whole,) = crew[1](crews.run_steps, data, tmp_path / "1", until=6, **options)
    run = tmp_path / "run"
    first = crew[2](crews.run_steps, data, run, until=2, save=True, **options)[0]
    second = crew[1](crews.run_steps, data, run, until=4, resume=True, save=True, **options)[0]
    for found in crew[4](crews.run_steps, data, run, until=6, resume=True, save=True, **options):
        found.losses = first.losses + second.losses + found.losses
        assert_close(found, whole)
    assert [c.step for c in find_checkpoints(run)] == [4, 6]  # the newest two
    assert not list(run.glob(".*"))


def test_resume_gives_the_same_bits(crew: dict[int, Crew], data: Path, tmp_path: Path) -> None:
    """2 -> 1 -> 2 processes, every state in 8 bits and in master weights read back into other pieces."""
    options = EXACT | {"precision__dtype": "bfloat16", "precision__moments": "int8"}
    (whole,) = crew[1](crews.run_steps, data, tmp_path / "1", until=4, **options)
    run, losses = tmp_path / "run", []
    for size, until in ((2, 1), (1, 2), (2, 4)):
        options["resume"] = until > 1  # type: ignore[assignment]
        found = crew[size](crews.run_steps, data, run, until=until, save=True, **options)[-1]
        losses += found.losses
    found.losses = losses
    assert_same_bits(found, whole)


def test_state_of_another_precision_is_refused(
    crew: dict[int, Crew], data: Path, tmp_path: Path
) -> None:
    crew[2](crews.run_steps, data, tmp_path / "run", until=1, save=True)
    for moments, message in (("int8", "holds first, load_shares"), ("bfloat16", "is torch.float")):
        config = tiny_config(data, tmp_path / "run", precision__moments=moments)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(PRESETS, "moe-tiny", SMALL["moe-tiny"])
            with pytest.raises(ModelError, match=rf"{message}.*training\.json"):
                trainer(config, resume=True)


def test_a_gradient_that_is_not_finite_in_one_process_changes_nothing_in_any(
    crew: dict[int, Crew], data: Path, tmp_path: Path
) -> None:
    for same, num_steps, end in crew[2](crews.meet_a_bad_gradient, data, tmp_path / "run"):
        assert same
        assert num_steps == 0
        assert end.startswith("ModelError: the gradient of step 1 is not finite")


def test_a_signal_to_one_process_ends_all_after_the_same_step(
    crew: dict[int, Crew], data: Path, tmp_path: Path
) -> None:
    for result in crew[4](crews.stop_by_a_signal, data, tmp_path / "run"):
        assert result == ("SIGTERM", 3, [3])
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2, 3]


def test_what_does_not_fit_is_refused(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(torch.device("cpu"), 0, 3)
    with pytest.raises(UsageError, match=r"256 is 8 sequences, which 3 .* a multiple of 96"):
        trainer(tiny_config(data, tmp_path / "run"), world=world)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="WORLD_SIZE is set but RANK is not"):
        World.from_environment("cpu")
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UsageError, match="RANK 2 must be below WORLD_SIZE 2"):
        World.from_environment("cpu")
    monkeypatch.setenv("RANK", "one")
    with pytest.raises(UsageError, match="RANK 'one' must be a whole number"):
        World.from_environment("cpu")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UsageError, match="--device cuda:1 names one GPU"):
        World.from_environment("cuda:1")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UsageError, match=r"MASTER_ADDR.*torchrun"):
        World.from_environment("cpu")


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", 3), ("LOCAL_RANK", 3), ("WORLD_SIZE", 4), ("LOCAL_WORLD_SIZE", 4)):
        monkeypatch.setenv(name, str(value))
    # No machine of the tests has exactly two GPUs: what is asked of the driver is answered here.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(parallel, "resolve_device", lambda text: torch.device(text))
    with pytest.raises(DeviceError, match=r"4 processes .* 2 can be seen; start at most 2"):
        World.from_environment("auto")


def start(data: Path, output: Path, **overrides: str) -> subprocess.Popen[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = words(data, output, **overrides)
    return subprocess.Popen(
        [*torchrun, "--nproc-per-node", "2", "-m", "hayate", *command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def process_of_rank(rank: int, output: Path) -> int:
    for folder in Path("/proc").iterdir():
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
            command = (folder / "cmdline").read_bytes().split(b"\0")
        except (OSError, ValueError):
            continue
        if b"RANK=%d" % rank in environment and str(output).encode() in command:
            return int(folder.name)
    raise AssertionError(f"no process of rank {rank}")


def test_torchrun_trains(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    text, _ = start(data, output, schedule__num_steps="3").communicate(timeout=120)
    assert text.count("finished at step 3") == 1, text  # the first process alone speaks
    assert text.count("step 2/3") == 1
    assert [c.step for c in find_checkpoints(output)] == [3]


def test_a_killed_process_ends_the_job(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    job = start(data, output, schedule__num_steps="100000", checkpoint__every="2")
    assert job.stdout is not None
    shown = []
    for line in job.stdout:
        shown.append(line)
        if line.startswith("step      5/"):
            os.kill(process_of_rank(1, output), signal.SIGKILL)
            begin = time.monotonic()
            break
    rest, _ = job.communicate(timeout=120)
    assert job.returncode != 0, "".join(shown)
    assert time.monotonic() - begin < 60
    assert "process 0 of 2 lost contact with another one" in rest
    assert "--resume" in rest
    assert find_checkpoints(output)[-1].step >= 2
