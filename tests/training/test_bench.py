"""`hayate bench train`: its gates refuse, its report parses; and docs/training.md names what there is."""

from __future__ import annotations

import dataclasses
import json
import re
import typing
from pathlib import Path

import pytest

from hayate.bench import train as bench_train
from hayate.models.presets import preset_config
from hayate.training.config import TrainConfig
from tests.cpu.test_cli import assert_fails, run

SIZES = ("--sequence-length", 16, "--tokens-per-step", 64, "--tokens-per-micro-batch", 32)
COMMAND = ("bench", "train", "--preset", "moe-tiny", "--random-weights", "--device", "cpu", *SIZES)


def test_the_report_has_both_and_the_work_is_counted() -> None:
    result = run(*COMMAND, "--compare", "transformers", "--runs", 2, "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    config = preset_config("moe-tiny")
    multiplied = config.num_active_parameters - config.vocab_size * config.hidden_size
    # Scores and values of half the sequence: 2 products forward, 4 backward, 2 operations each.
    attention = 12 * 8 * config.num_layers * config.num_heads * config.head_dim
    assert report["flops_per_token"] == 6 * multiplied + attention
    assert report["tokens"] == "random"
    for side in ("", "transformers_"):
        seconds = sorted(report[f"{side}step_seconds"])
        assert len(seconds) == 2
        median = sum(seconds) / 2
        assert report[f"{side}tokens_per_second"] == pytest.approx(64 / median, rel=0.02)
    ratio = report["tokens_per_second"] / report["transformers_tokens_per_second"]
    assert report["ratio_to_transformers"] == pytest.approx(ratio, rel=0.01)


def test_another_loss_than_that_of_transformers_gets_no_speed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = bench_train.Hayate.loss
    monkeypatch.setattr(bench_train.Hayate, "loss", lambda *a: real(*a) * 1.001)
    result = run(*COMMAND, "--compare", "transformers", "--runs", 1)
    assert result.returncode == 1
    assert "no speed is reported for wrong results" in result.stderr
    assert "hayate:" not in result.stdout


def test_steps_that_do_not_learn_get_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_train.Optimizer, "step", lambda self, lr: (0.0, True))
    result = run(*COMMAND, "--runs", 1)
    assert result.returncode == 1
    assert "hayate does not learn" in result.stderr


def test_options_that_mean_nothing_are_refused() -> None:
    assert_fails(run(*COMMAND, "--prompt-tokens", 8), 2, "--prompt-tokens means nothing")
    assert_fails(run("bench", "load", "--model", "m", "--tokens-per-step", 8), 2, "means nothing")
    assert_fails(run(*COMMAND[:-2], "--tokens-per-micro-batch", 24), 2, "tokens_per_micro_batch")


DOCS = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")


def test_the_documentation_has_every_field_and_its_default() -> None:
    written: dict[str, str] = {}
    for names, default in re.findall(r"^\| (`[a-z][^|]*) \| ([^|]*)\|", DOCS, re.MULTILINE):
        fields = re.findall(r"[\w.]+", names)
        table = fields[0].rpartition(".")[0]
        values = default.strip().split(", ") if len(fields) > 1 else [default.strip()]
        for field, value in zip(fields, values, strict=False):
            written[field if "." in field or not table else f"{table}.{field}"] = value.strip("`")
    known: dict[str, object] = {}
    for field, kind in typing.get_type_hints(TrainConfig).items():
        default = getattr(TrainConfig(), field)
        if dataclasses.is_dataclass(kind):
            known |= {
                f"{field}.{f.name}": getattr(default, f.name) for f in dataclasses.fields(kind)
            }
        else:
            known[field] = default
    missing = known.keys() - written.keys()
    assert not missing
    for name, default in known.items():
        if default in (None, ()):
            continue
        text = written[name]
        if isinstance(default, bool):
            assert text == str(default).lower(), name
        elif isinstance(default, int | float):
            assert float(text) == default, name
        else:
            assert text == default, name


def test_the_documentation_s_presets_have_those_sizes() -> None:
    rows = re.findall(
        r"^\| `([\w.-]+)` \| ([\d.]+) ([MB]) \| ([\d.]+) ([MB]) \|", DOCS, re.MULTILINE
    )
    assert [row[0] for row in rows] == ["dense-tiny", "moe-tiny", "moe-150m", "moe-1b", "moe-6.9b"]
    unit = {"M": 1e6, "B": 1e9}
    for name, total, total_unit, active, active_unit in rows:
        config = preset_config(name)
        assert config.num_parameters == pytest.approx(float(total) * unit[total_unit], rel=0.01)
        wanted = float(active) * unit[active_unit]
        assert config.num_active_parameters == pytest.approx(wanted, rel=0.02)
