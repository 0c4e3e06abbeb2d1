"""Small runs for the tests: data, configuration, trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from hayate.training.config import TrainConfig, load_train_config
from hayate.training.loop import Trainer
from hayate.training.parallel import World
from hayate.training.token_file import TokenFileWriter
from hayate.training.tokenizer_training import train_tokenizer

TEXTS = [
    "the quick brown fox jumps over the lazy dog. " * 3,
    "pack my box with five dozen liquor jugs. " * 3,
]
VOCAB = 320


def make_data(folder: Path, *, documents: int = 40, seed: int = 0) -> Path:
    """A folder as `hayate data prepare` writes it, of random documents that a model can learn a little from."""
    train_tokenizer(TEXTS, folder, vocab_size=VOCAB)
    generator = np.random.default_rng(seed)
    for name in ("train", "validation"):
        with TokenFileWriter(
            folder / f"{name}.safetensors", vocab_size=VOCAB, eos_token_id=2, tokenizer="t"
        ) as writer:
            for _ in range(documents if name == "train" else 6):
                start, step = generator.integers(3, VOCAB), generator.integers(1, 5)
                length = int(generator.integers(5, 90))
                writer.add(((start + step * np.arange(length)) % (VOCAB - 3) + 3).tolist())
    return folder


# Two sparse layers of 4 experts, 2 active: everything the large one has.
TINY: dict[str, str] = {
    "model.preset": "moe-tiny",
    "batch.sequence_length": "32",
    "batch.tokens_per_step": "256",
    "batch.tokens_per_micro_batch": "128",
    "precision.dtype": "float32",
    "schedule.num_steps": "8",
    "schedule.warmup_steps": "2",
    "optimizer.lr": "1e-3",
    "checkpoint.every": "4",
    "eval.every": "0",
    "eval.tokens": "64",
    "log.every": "1",
}


def tiny_config(data: Path, output: Path, **overrides: str | None) -> TrainConfig:
    """`overrides`: table__field="text", or None for the field's own default."""
    fields = {name.replace("__", "."): text for name, text in overrides.items()}
    fields = TINY | {"data.train": str(data), "output": str(output)} | fields
    return load_train_config(None, {k: text for k, text in fields.items() if text is not None})


def trainer(config: TrainConfig, **options: Any) -> Trainer:
    options.setdefault("world", World.single(torch.device("cpu")))
    return Trainer(config, **options)


def weights(run: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.model.named_parameters()}
