"""Checkpoints for tensor parallelism: shapes that do not divide, and few key-value heads."""

from __future__ import annotations

import shutil
from pathlib import Path
from unittest.mock import patch

import torch

from tests.parity import models
from tests.server.checkpoint import write_checkpoint

# On 4 processes: 2 heads and half a key-value head each, so 2 processes have the same; 22 or 24 of 90 hidden units;
# 66 or 67 of 267 tokens.
SHAPE = {
    "vocab_size": 267,
    "hidden_size": 64,
    "intermediate_size": 90,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": 256,
    "eos_token_id": 257,
}


def make(name: str, folder: Path) -> Path:
    """The random model `name` of the parity tests in fp32 in SHAPE, with a tokenizer of bytes."""
    with patch.dict(models.COMMON, SHAPE):
        models.make(name, folder, dtype=torch.float32)
    tokenizer = write_checkpoint(folder / "tokenizer")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.move(tokenizer / file, folder / file)
    shutil.rmtree(tokenizer)
    return folder
