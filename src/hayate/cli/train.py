"""`hayate train`: a configuration in, a Hugging Face folder out."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from hayate.cli import options
from hayate.errors import UsageError


def train(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG.toml] [--TABLE.FIELD VALUE]...",
            help="The run's configuration, and fields that differ from it.",
        ),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(metavar="NAME", help="Short for --model.preset.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="DIR", help="Prepared data; repeatable. Short for --data.train."),
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="DIR", help="Folder of the run.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the configuration and the memory it takes.")
    ] = False,
    device: options.Device = "auto",
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Train a decoder, dense or a mixture of experts, from nothing or from a checkpoint.

    Every field of the configuration is an option too: --optimizer.lr 3e-4 --batch.sequence_length 2048.
    Ctrl-C ends the run after the step at hand, with a checkpoint; --resume goes on from there.
    On several GPUs: torchrun --nproc-per-node 8 -m hayate train ...
    """
    config, overrides = _split(arguments or [])
    if preset is not None:
        overrides["model.preset"] = preset
    if data:
        overrides["data.train"] = ",".join(data)
    if output is not None:
        overrides["output"] = output
    from hayate.training.config import load_train_config

    run_config = load_train_config(config, overrides)
    if dry_run:
        _print_plan(run_config, as_json)
        return
    from hayate.training.loop import Trainer
    from hayate.training.parallel import World

    with (
        World.from_environment(device) as world,
        _reporter(run_config.schedule.num_steps, as_json) as report,
    ):
        trainer = Trainer(run_config, world=world, resume=resume, report=report)
        reason = trainer.train()
    if not world.is_first:
        raise typer.Exit(0 if reason == "finished" else 130)
    newest = f"step-{trainer.progress.step:08d}"
    text = f"{reason} at step {trainer.progress.step}; checkpoint in {trainer.run / newest}"
    typer.echo(text, err=as_json)
    if reason != "finished":
        raise typer.Exit(130)


def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Default: RUN/plot.png.")
    ] = None,
    verbose: options.Verbose = False,
) -> None:
    """Draw loss, learning rate and router load of runs as a PNG."""
    from hayate.training.plot import plot_runs

    target = output or runs[0] / "plot.png"
    plot_runs(runs, target)
    typer.echo(str(target))


def _split(arguments: list[str]) -> tuple[Path | None, dict[str, str]]:
    """['run.toml', '--optimizer.lr', '3e-4', '--seed=1'] -> run.toml, {'optimizer.lr': '3e-4', 'seed': '1'}."""
    config: Path | None = None
    found: dict[str, str] = {}
    words = iter(arguments)
    for word in words:
        if not word.startswith("--"):
            if config is not None:
                raise UsageError(
                    f"{word!r}: one configuration file is enough; fields are --table.field value"
                )
            config = Path(word)
            continue
        name, equals, value = word[2:].partition("=")
        if not equals:
            following = next(words, None)
            if following is None:
                raise UsageError(f"{word} needs a value")
            value = following
        found[name] = value
    return config, found


def _print_plan(config: Any, as_json: bool) -> None:
    from hayate.config import format_bytes
    from hayate.training.memory import memory_plan
    from hayate.training.metrics import training_flops_per_token
    from hayate.training.model_source import config_json, model_config
    from hayate.training.prepare import TRAIN_FILE
    from hayate.training.token_file import TokenFile

    vocab = 0
    if config.data.train:
        vocab = TokenFile.open(Path(config.data.train[0]) / TRAIN_FILE).vocab_size
    model = model_config(config_json(config.model, vocab))
    plan = memory_plan(model, config)
    flops = training_flops_per_token(model, config.batch.sequence_length)
    if as_json:
        print(json.dumps({"config": config.to_dict(), "bytes": plan, "flops_per_token": flops}))
        return
    print(json.dumps(config.to_dict(), indent=2))
    print(
        f"parameters {model.num_parameters:,}, active {model.num_active_parameters:,}; {flops / 1e9:.3g} GFLOP a token"
    )
    for name, count in plan.items():
        print(f"{name:24} {format_bytes(count)}")


@contextmanager
def _reporter(num_steps: int, as_json: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Rows as JSON lines; or as text, over a bar where standard error is a terminal."""
    if as_json:
        yield lambda row: print(json.dumps(row), flush=True)
        return
    if not sys.stderr.isatty():
        yield lambda row: _say(row, num_steps, print)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("training", total=num_steps)

        def report(row: dict[str, Any]) -> None:
            _say(
                row, num_steps, lambda text: bar.console.print(text, markup=False, highlight=False)
            )
            bar.update(task, completed=row["step"])

        yield report


def _say(row: dict[str, Any], num_steps: int, write: Callable[[str], Any]) -> None:
    """One row of the log as a line."""
    step = f"step {row['step']:>{len(str(num_steps))}}/{num_steps}"
    if row["kind"] == "train":
        seconds = (num_steps * row["tokens"] / row["step"] - row["tokens"]) / row[
            "tokens_per_second"
        ]
        parts = [
            f"loss {row['loss']:.4f}",
            f"grad {row['grad_norm']:.3f}",
            f"lr {row['lr']:.2e}",
            f"{row['tokens_per_second']:,.0f} tok/s",
        ]
        if "mfu" in row:
            parts.append(f"MFU {row['mfu']:.1%}")
        if "aux" in row:
            parts.append(f"aux {row['aux']:.3f}")
        parts += [f"{row['peak_memory'] / 2**30:.1f} GiB", f"{_duration(seconds)} left"]
        write(f"{step}  {'  '.join(parts)}")
    elif row["kind"] == "eval":
        write(
            f"{step}  held out: loss {row['loss']:.4f}, perplexity {row['perplexity']:.2f} ({row['data']})"
        )
    elif row["kind"] == "router":
        write(
            f"{step}  router: largest load {row['max_load']:.2f}x even, {row['dead_experts']} experts unused"
        )
    elif row["kind"] == "sample":
        write(f"{step}  {row['prompt']!r} -> {row['text']!r}")


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
