"""What a run tells: one JSON object a line in metrics.jsonl, one line a person can read, a bar in a terminal."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import torch

from hayate.errors import UsageError
from hayate.models.config import ModelConfig
from hayate.training.config import LogSection

METRICS_FILE = "metrics.jsonl"


def training_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Floating-point operations of forward and backward for one token.

    6 a parameter that takes part, the embedding table not, and causal attention: 3 times 2 products over half of the
    sequence (the usual count of model FLOPs; recomputation is not counted).
    """
    parameters = config.num_active_parameters - config.vocab_size * config.hidden_size
    if config.tie_embeddings:
        parameters += config.vocab_size * config.hidden_size
    attention = 0.0
    for layer in range(config.num_layers):
        seen = sequence_length / 2
        window = config.window(layer)
        if window is not None:
            seen = min(seen, window)
        attention += 3 * 4 * seen * config.num_heads * config.head_dim
    return 6.0 * parameters + attention


class MetricsLog:
    """Appends to metrics.jsonl; a run that goes on drops lines of steps it will repeat."""

    def __init__(self, run: Path, config: LogSection, *, from_step: int) -> None:
        self._tensorboard = _tensorboard(run) if config.tensorboard else None
        self._wandb = _wandb(run, config.wandb) if config.wandb else None
        run.mkdir(parents=True, exist_ok=True)
        self.path = run / METRICS_FILE
        kept = [row for row in read_metrics(self.path) if row["step"] <= from_step]
        work = self.path.with_name(f".{METRICS_FILE}.partial")
        work.write_text("".join(json.dumps(row) + "\n" for row in kept))
        work.replace(self.path)
        self._stream: TextIO = self.path.open("a", encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        """One line: "kind", "step" and figures."""
        self._stream.write(json.dumps({**row, "time": time.time()}) + "\n")
        self._stream.flush()
        figures = {k: v for k, v in row.items() if isinstance(v, int | float) and k != "step"}
        if self._tensorboard is not None:
            for name, value in figures.items():
                self._tensorboard.add_scalar(f"{row['kind']}/{name}", value, row["step"])
        if self._wandb is not None:
            named = {f"{row['kind']}/{name}": value for name, value in figures.items()}
            self._wandb.log(named, step=row["step"])

    def close(self) -> None:
        self._stream.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, oldest first; a last line that was cut off by a crash is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def peak_matrix_rate(device: torch.device) -> float | None:
    """Dense bf16 matrix operations a second that the device is specified for; None where we do not know."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for part, rate in (
        ("H200", 989e12),
        ("H100", 989e12),
        ("A100", 312e12),
        ("B200", 2250e12),
        ("4090", 165e12),
    ):
        if part in name:
            return rate
    return None


def _tensorboard(run: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError(
            "log.tensorboard needs the package tensorboard; install it, or leave the option out"
        ) from None
    return SummaryWriter(str(run / "tensorboard"))


def _wandb(run: Path, project: str) -> Any:
    try:
        import wandb  # type: ignore[import-not-found]
    except ImportError:
        raise UsageError(
            "log.wandb needs the package wandb; install it and run `wandb login`, or leave the option out"
        ) from None
    return wandb.init(project=project, dir=str(run), name=run.name, resume="allow")
