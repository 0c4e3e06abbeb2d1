"""What a run trains: an architecture by name, drawn at random, or a checkpoint folder to go on from.

Either way it is a config.json (the one that checkpoints get) and the decoder it describes.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from hayate.checkpoint.config_json import ConfigReader
from hayate.checkpoint.hub import resolve_model
from hayate.checkpoint.index import Checkpoint
from hayate.checkpoint.reader import load
from hayate.errors import UsageError
from hayate.models.config import ModelConfig
from hayate.models.decoder import CausalLM, build_model
from hayate.models.families import load_config, parse_config
from hayate.models.presets import PRESETS
from hayate.models.weights import IGNORED_TENSORS, placements
from hayate.training.config import ModelSection


def config_json(section: ModelSection, vocab_size: int) -> dict[str, Any]:
    """The config.json of the model to train. `vocab_size`: of the data's tokenizer; 0: not known.

    Raises UsageError when neither or both of preset and init_from are given, or the data's tokens do not fit.
    """
    if (section.preset is None) == (section.init_from is None):
        raise UsageError("give either model.preset or model.init_from")
    if section.init_from is not None:
        folder = resolve_model(section.init_from, None)
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if fields.get("quantization_config") is not None:
            raise UsageError(
                f"model.init_from {section.init_from}: its weights are quantised, and cannot be trained; name the "
                "checkpoint it was made from"
            )
    else:
        if section.preset not in PRESETS:
            raise UsageError(
                f"model.preset {section.preset!r} is unknown; choose from {', '.join(PRESETS)}"
            )
        fields = dict(PRESETS[section.preset])
        # A vocabulary of a multiple of 64 keeps the head's matrix product on its fast path.
        size = section.vocab_size or -(-vocab_size // 64) * 64 or fields["vocab_size"]
        fields.update(
            vocab_size=size,
            bos_token_id=1,
            eos_token_id=2,
            tie_word_embeddings=fields.get("tie_word_embeddings", False),
        )
    fields.pop(
        "dtype", None
    )  # how newer files spell torch_dtype, which a checkpoint sets to its own
    if section.max_position_embeddings is not None:
        fields["max_position_embeddings"] = section.max_position_embeddings
    if fields["vocab_size"] < vocab_size:
        raise UsageError(
            f"the model has {fields['vocab_size']} tokens, the data's tokenizer {vocab_size}; prepare the data with "
            "the model's own tokenizer, or raise model.vocab_size"
        )
    return fields


def model_config(fields: dict[str, Any]) -> ModelConfig:
    """What is trained. UsageError for models that only run: those with a vision tower."""
    config = parse_config(ConfigReader(fields, file="config.json"))
    if config.vision is not None:
        raise UsageError(f"{config.architecture} cannot be trained, only text models can")
    return config


def new_model(
    section: ModelSection,
    fields: dict[str, Any],
    *,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
) -> CausalLM:
    """The decoder with its first weights; gradients are wanted for all of them."""
    model = build_model(model_config(fields), device=device, dtype=dtype)
    if section.init_from is not None:
        load_weights(model, resolve_model(section.init_from, None))
    else:
        _draw(model, seed, section.init_std)
    return model.train().requires_grad_(True)


def open_model(folder: Path, *, device: torch.device, dtype: torch.dtype) -> CausalLM:
    """The decoder of the checkpoint in `folder`, with its weights, no gradients wanted."""
    model = build_model(load_config(folder), device=device, dtype=dtype)
    load_weights(model, folder)
    return model


def load_weights(model: CausalLM, folder: Path) -> None:
    """Fill `model` from the checkpoint in `folder`. ModelError when it does not fit."""
    checkpoint = Checkpoint.open(folder)
    parameters = dict(model.named_parameters())
    load(checkpoint, parameters, placements(model.config), ignore=IGNORED_TENSORS)


@torch.no_grad()
def _draw(model: CausalLM, seed: int, std: float) -> None:
    """Matrices from a normal distribution, those that write the residual stream narrower by sqrt(2 L), as in GPT-2;
    norms are the identity. Drawn in fp32 on the CPU, so that every device and dtype begins with the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    residual = std / math.sqrt(2 * model.config.num_layers)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            is_scale = name.endswith("weight") and model.config.norm == "rmsnorm"
            parameter.fill_(1.0 if is_scale else 0.0)
            continue
        width = residual if "o_proj" in name or "down_proj" in name else std
        for piece in parameter if parameter.dim() == 3 else [parameter]:
            piece.copy_(torch.randn(piece.shape, generator=generator) * width)
