"""`hayate plot`: what a run's metrics.jsonl says, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hayate.errors import UsageError
from hayate.training.metrics import METRICS_FILE, read_metrics


def open_pyplot() -> Any:
    """matplotlib.pyplot, drawing into files. UsageError when it is not installed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise UsageError("drawing needs matplotlib; install hayate[train]") from None
    return pyplot


def plot_runs(runs: Sequence[Path], output: Path) -> None:
    """Loss (training and held out), learning rate and router load of `runs` into the PNG file `output`.

    Raises UsageError when a folder holds no metrics, or matplotlib is not installed.
    """
    pyplot = open_pyplot()
    figure, axes = pyplot.subplots(3, 1, figsize=(9, 11), sharex=True, constrained_layout=True)
    for run in runs:
        rows = read_metrics(run / METRICS_FILE)
        if not rows:
            raise UsageError(f"{run} holds no {METRICS_FILE} with rows; is it the folder of a run?")
        _draw(axes, run.name, rows)
    axes[0].set(ylabel="loss (nats a token)", title="Loss")
    axes[1].set(ylabel="learning rate")
    axes[2].set(
        ylabel="load (1 = even)",
        title="Tokens of the busiest and the idlest expert, all layers",
        xlabel="step",
    )
    for axis in axes:
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend()
    figure.savefig(output, dpi=120)
    pyplot.close(figure)


def _draw(axes: Any, name: str, rows: list[dict[str, Any]]) -> None:
    def column(kind: str, field: str) -> tuple[list[int], list[Any]]:
        chosen = [row for row in rows if row["kind"] == kind]
        return [row["step"] for row in chosen], [row[field] for row in chosen]

    axes[0].plot(*column("train", "loss"), label=name, alpha=0.8)
    for data in sorted({row["data"] for row in rows if row["kind"] == "eval"}):
        chosen = [row for row in rows if row["kind"] == "eval" and row["data"] == data]
        steps, losses = [r["step"] for r in chosen], [r["loss"] for r in chosen]
        axes[0].plot(
            steps, losses, "o-", markersize=3, label=f"{name}, held out: {Path(data).name}"
        )
    axes[1].plot(*column("train", "lr"), label=name)
    steps, loads = column("router", "load")
    if steps:
        axes[2].plot(steps, [max(map(max, load)) for load in loads], label=f"{name}, busiest")
        axes[2].plot(steps, [min(map(min, load)) for load in loads], label=f"{name}, idlest")
