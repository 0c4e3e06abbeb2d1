"""The training verbs as a user meets them: the demonstration, interruption, logs, refusals."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hayate.cli.train import _split
from hayate.models.presets import PRESETS
from hayate.training.model_source import model_config
from hayate.training.state import find_checkpoints
from tests.cpu.test_cli import assert_fails, run
from tests.training.runs import TEXTS, TINY, make_data

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def words(data: Path, output: Path, **overrides: str) -> list[str]:
    """The command line of a small run."""
    fields = TINY | {name.replace("__", "."): text for name, text in overrides.items()}
    options = [word for name, text in fields.items() for word in (f"--{name}", text)]
    return ["train", "--data", str(data), "--output", str(output), "--device", "cpu", *options]


def shown(folder: Path, environment: dict[str, str]) -> str:
    """What demo.sh prints."""
    result = subprocess.run(
        ["sh", folder / "demo.sh", folder / "out"],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_demonstration_on_less_text(tmp_path: Path) -> None:
    """examples/train/demo.sh for 4 steps: data, tokenizer, train, plot, generate; then resumed, then nothing to do."""
    shim = tmp_path / "bin" / "hayate"
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m hayate "$@"\n')
    shim.chmod(0o755)
    books = tmp_path / "home" / "corpora" / "books"
    books.mkdir(parents=True)
    for name in ("austen-a", "bryant-a", "carroll-a", "edgeworth-a", "milton-a"):
        text = " ".join(f"{t} {name} {i}" for i, t in enumerate(TEXTS * 20))
        (books / f"{name}.txt").write_text(text)
    for file in ("demo.sh", "moe-tiny.toml"):
        text = (ROOT / "examples" / "train" / file).read_text()
        for old, new in (
            ("num_steps = 1000", "num_steps = 4"),
            ("warmup_steps = 50", "warmup_steps = 1"),
            ("step-00001000", "step-00000004"),
            ("every = 250", "every = 2"),
            ("tokens_per_step = 2048", "tokens_per_step = 256"),
            ("tokens_per_micro_batch = 2048", "tokens_per_micro_batch = 256"),
            ("tokens = 16384", "tokens = 256\nsample_tokens = 3"),
            ("--max-tokens 80", "--max-tokens 3"),
            ("--held-out 0.1", "--held-out 0.5"),
        ):
            text = text.replace(old, new)
        (tmp_path / file).write_text(text)
    environment = {
        **os.environ,
        "HAYATE_HOME": str(tmp_path / "home"),
        "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT / "src"),
        "OMP_NUM_THREADS": "1",
    }
    first = shown(tmp_path, environment)
    assert "documents (" in first
    assert "milton" not in first
    assert "held out: loss" in first
    assert "finished at step 4" in first
    for verb in ("tokenizer train", "data prepare", "train", "plot", "generate"):
        assert f"$ hayate {verb} " in first
    assert (tmp_path / "out" / "run" / "plot.png").read_bytes().startswith(b"\x89PNG")

    shutil.rmtree(tmp_path / "out" / "run" / "step-00000004")  # as if interrupted after step 2
    resumed = shown(tmp_path, environment)
    assert "$ hayate train" in resumed
    assert "--resume" in resumed
    assert "step 3/4" not in resumed  # a line each 25 steps, the first and the last
    assert "finished at step 4" in resumed
    assert "data prepare" not in resumed
    assert "the training is done" in shown(tmp_path, environment)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_with_a_checkpoint_and_code_130(
    number: signal.Signals, data: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    command = words(data, output, schedule__num_steps="100000", checkpoint__every="0")
    process = subprocess.Popen(
        [sys.executable, "-m", "hayate", *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step      3/"):
            process.send_signal(number)
            break
    rest, complaint = process.communicate(timeout=120)
    assert process.returncode == 130, complaint
    assert "Traceback" not in complaint
    (checkpoint,) = find_checkpoints(output)
    assert checkpoint.step >= 3
    assert f"{number.name} at step {checkpoint.step}; checkpoint in {checkpoint.folder}" in rest
    more = words(data, output, schedule__num_steps=str(checkpoint.step + 2))
    result = run(*more, "--resume")
    assert result.returncode == 0, result.stderr
    assert f"finished at step {checkpoint.step + 2}" in result.stdout
    again = run(*more, "--resume")  # nothing is left to do
    assert again.returncode == 0, again.stderr
    assert again.stdout.strip().startswith(f"finished at step {checkpoint.step + 2}")


def test_rows_as_json_and_events_of_tensorboard_are_the_metrics(data: Path, tmp_path: Path) -> None:
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    output = tmp_path / "run"
    result = run(*words(data, output, log__tensorboard="true"), "--json")
    assert result.returncode == 0, result.stderr
    printed = [json.loads(line) for line in result.stdout.splitlines()]
    written = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [{k: v for k, v in row.items() if k != "time"} for row in written] == printed
    assert {row["kind"] for row in printed} == {"train", "eval", "router"}

    events = loader.EventAccumulator(str(output / "tensorboard"))
    events.Reload()
    for name in ("loss", "lr", "grad_norm", "tokens_per_second"):
        found = {e.step: e.value for e in events.Scalars(f"train/{name}")}
        expected = {row["step"]: row[name] for row in printed if row["kind"] == "train"}
        assert found == pytest.approx(expected, rel=1e-6), name  # events are fp32
    assert [e.step for e in events.Scalars("eval/perplexity")] == [8]


def test_a_missing_package_is_named(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    result = run(*words(data, tmp_path / "run", log__wandb="project"))
    assert_fails(result, 2, "log.wandb needs the package wandb", "install")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert_fails(run("plot", tmp_path), 2, "matplotlib", "hayate[train]")


def test_plot_needs_a_run(tmp_path: Path) -> None:
    assert_fails(run("plot", tmp_path), 2, str(tmp_path), "metrics.jsonl")


def test_tokenizer_and_data_verbs_refuse_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": t * 9}) + "\n" for t in TEXTS))
    source, folder = tmp_path / "a.jsonl", tmp_path / "tokenizer"
    assert_fails(run("tokenizer", "train", source, "-o", folder), 2, "no field 'text'", "--field")
    train = ("tokenizer", "train", source, "-o", folder, "--field", "body", "--vocab-size", 300)
    result = run(*train)
    assert result.returncode == 0, result.stderr
    assert "300 tokens in" in result.stdout
    assert_fails(run(*train), 2, "exists; remove it")
    prepare = ("data", "prepare", source, "--tokenizer", folder, "-o", tmp_path / "d")
    result = run(*prepare, "--field", "body", "--held-out", 0, "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["num_documents"], report["num_validation_tokens"]) == (2, 0)
    assert_fails(run(*prepare, "--field", "body"), 2, "exists; remove it")
    assert_fails(run("data", "fetch", "novels"), 2, "'novels' is unknown; there are books, wiki")


def test_dry_run_prints_the_plan_and_writes_nothing(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    result = run(*words(data, output), "--dry-run", "--json")
    assert result.returncode == 0, result.stderr
    plan = json.loads(result.stdout)
    assert plan["config"]["batch"]["sequence_length"] == 32
    parameters = model_config({**PRESETS["moe-tiny"], "vocab_size": 320}).num_parameters
    assert plan["bytes"]["weights"] == plan["bytes"]["gradients"] == 4 * parameters
    assert plan["bytes"]["moments"] == 8 * parameters
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.toml", "b.toml"], "one configuration file is enough"),
        (["--seed"], "--seed needs a value"),
    ],
)
def test_arguments_that_make_no_sense(arguments: list[str], message: str) -> None:
    assert_fails(run("train", *arguments), 2, message)
    assert _split(["a.toml", "--optimizer.lr=1", "--seed", "2"]) == (
        Path("a.toml"),
        {"optimizer.lr": "1", "seed": "2"},
    )
