"""The answers of `hayate bench serve` as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from hayate.bench.serve_targets import Answer
from hayate.training.plot import open_pyplot


def draw(answers: Sequence[Answer], title: str, file: Path) -> None:
    """Into the PNG `file`: the distributions of the latencies, and how many requests were open over time."""
    complete = [a for a in answers if a.complete]
    pyplot = open_pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    figure.suptitle(title, fontsize=10)
    for name, times in (
        ("first token", [a.first_token for a in complete]),
        ("per token after it", [a.per_token for a in complete if a.num_generated > 1]),
        ("between pieces", [gap for a in complete for gap in a.gaps]),
    ):
        _cumulative(left, name, times)
    left.set(xscale="log", xlabel="ms", ylabel="share of the answers or pieces", ylim=(0, 1))
    left.legend()
    begin = answers[0].start if answers else 0.0
    changes = sorted(
        [(a.start - begin, 1) for a in complete] + [((a.end or 0) - begin, -1) for a in complete]
    )
    levels = list(accumulate(step for _, step in changes))
    right.step([when for when, _ in changes], levels, where="post")
    right.set(xlabel="s", ylabel="requests open", ylim=(0, None))
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def _cumulative(axis: Any, name: str, times: list[float]) -> None:
    ordered = sorted(1e3 * t for t in times)
    shares = [(i + 1) / len(ordered) for i in range(len(ordered))]
    axis.plot(ordered, shares, label=name)
