"""`hayate perplexity`: the loss of a model by position in its context, up to and beyond the length it was trained on.

Beyond that length plain RoPE meets angles it never saw. Dynamic NTK (`rope_scaling` in config.json) lowers the
frequencies as the text grows: with M = max_position_embeddings, L > M tokens and factor f, theta becomes
theta * (f L / M - (f - 1))^(K / (K - 2)); f = 1 stretches the longest wavelength exactly L / M times.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hayate.errors import UsageError
from hayate.kernels import training as ops
from hayate.kernels.rope import RopeParameters, rope_table
from hayate.kernels.rope_frequencies import rope_frequencies
from hayate.models.decoder import CausalLM
from hayate.training.forward import TrainingBatch, TrainingModel
from hayate.training.token_file import TokenFile


@dataclass(frozen=True)
class PositionLoss:
    """Mean loss a token, in nats, of the predictions made at positions `begin` to `end` - 1."""

    begin: int
    end: int
    loss: float

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 100.0))


def ntk_rope(rope: RopeParameters, factor: float) -> RopeParameters:
    """`rope` with dynamic NTK instead of the scaling it has. UsageError unless `factor` is at least 1."""
    if not factor >= 1:
        raise UsageError(f"--ntk {factor} must be at least 1")
    return dataclasses.replace(rope, rope_type="dynamic", factor=factor)


@torch.no_grad()
def loss_by_position(
    model: CausalLM, rope: RopeParameters, file: TokenFile, *, length: int, num_windows: int
) -> list[PositionLoss]:
    """The loss of `model` over the first `num_windows` windows of `length` tokens, each inside one document.

    RoPE is as when a prompt of `length` tokens is read. Positions are grouped in eighths of the trained length up to
    it, then in halves of each doubling. Raises UsageError when no document is long enough.
    """
    runner = TrainingModel(model, 1)
    inverse, factor = rope_frequencies(rope, length)
    runner.cos_sin = rope_table(inverse, factor, length).to(runner.head.device)
    total, count = torch.zeros(length, dtype=torch.float64), 0
    for tokens in _windows(file, length, num_windows):
        batch = _one_document(tokens, runner.head.device)
        hidden, _ = runner.hidden_states(batch)
        losses = ops.linear_cross_entropy_per_token(hidden, runner.head, batch.targets)
        total += losses.double().cpu()
        count += 1
    if not count:
        longest = max(len(file.document(i)) for i in range(file.num_documents))
        raise UsageError(
            f"{file.path} has no document of {length + 1} tokens (the longest has {longest}); choose a smaller --length"
        )
    edges = _edges(rope.max_position_embeddings, length)
    return [
        PositionLoss(begin, end, float(total[begin:end].mean()) / count)
        for begin, end in itertools.pairwise(edges)
    ]


def plot_positions(curves: dict[str, list[PositionLoss]], trained: int, output: Path) -> None:
    """Perplexity over position, one line a curve, into the PNG file `output`."""
    from hayate.training.plot import open_pyplot

    pyplot = open_pyplot()
    figure, axis = pyplot.subplots(figsize=(9, 5), constrained_layout=True)
    for name, curve in curves.items():
        middles = [(point.begin + point.end) / 2 for point in curve]
        axis.plot(middles, [p.perplexity for p in curve], "o-", markersize=3, label=name)
    axis.axvline(trained, color="grey", linestyle=":", label=f"max_position_embeddings {trained:,}")
    axis.set(xscale="log", yscale="log", xlabel="position (tokens)", ylabel="perplexity")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(output, dpi=120)
    pyplot.close(figure)


def _windows(file: TokenFile, length: int, num_windows: int) -> Iterator[Tensor]:
    """(length + 1,) int64 each, one after the other in the documents that have as many tokens."""
    found = 0
    for index in range(file.num_documents):
        document = file.document(index)
        for begin in range(0, len(document) - length, length):
            if found == num_windows:
                return
            found += 1
            yield torch.from_numpy(document[begin : begin + length + 1].astype("int64"))


def _one_document(tokens: Tensor, device: torch.device) -> TrainingBatch:
    length = len(tokens) - 1
    return TrainingBatch(
        tokens[:-1].to(device),
        tokens[1:].to(device),
        torch.arange(length, device=device),
        torch.zeros(length, dtype=torch.int32, device=device),
        length,
    )


def _edges(trained: int, length: int) -> list[int]:
    """Eighths of the trained length, then halves of each doubling."""
    edges = [i * trained // 8 for i in range(9)]
    while edges[-1] < length:
        last = edges[-1]
        edges += [last + last // 2, 2 * last] if last > 1 else [2 * last]
    return sorted({min(edge, length) for edge in edges})
