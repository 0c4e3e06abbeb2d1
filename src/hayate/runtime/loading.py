"""From a checkpoint folder, or from nothing, to a network on its device, and the plan for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch

from hayate.checkpoint.index import Checkpoint
from hayate.checkpoint.placements import check_placements
from hayate.checkpoint.reader import LoadReport, load
from hayate.config import DTYPE_BYTES, EngineOptions, EnginePlan, resolve_plan
from hayate.models.config import ModelConfig
from hayate.models.decoder import CausalLM, build_model, init_random
from hayate.models.families import load_config
from hayate.models.weights import IGNORED_TENSORS, placements
from hayate.runtime import device as devices


def open_checkpoint(folder: Path) -> tuple[ModelConfig, Checkpoint]:
    """What config.json says, and the tensors. ModelError when either is not valid."""
    config = load_config(folder)
    checkpoint = Checkpoint.open(folder)
    if config.tie_embeddings and "lm_head.weight" in checkpoint.tensors:
        # The file has a head: use it.
        config = dataclasses.replace(config, tie_embeddings=False)
    return config, checkpoint


def load_network(
    config: ModelConfig,
    checkpoint: Checkpoint,
    plan: EnginePlan,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[CausalLM, LoadReport]:
    """The network with its weights; ModelError, before anything is read, when a tensor is missing or odd."""
    device, dtype = torch.device(plan.device), getattr(torch, plan.dtype)
    with torch.device("meta"):
        shapes = dict(CausalLM(config, dtype=dtype).named_parameters())
    placed = placements(config)
    check_placements(checkpoint, shapes, placed, IGNORED_TENSORS)
    with devices.device_errors(device, doing="loading"):
        network = build_model(config, device=device, dtype=dtype)
        parameters = dict(network.named_parameters())
        report = load(checkpoint, parameters, placed, ignore=IGNORED_TENSORS, progress=progress)
    return network, report


def random_network(config: ModelConfig, plan: EnginePlan, seed: int) -> CausalLM:
    """The network with random weights."""
    device = torch.device(plan.device)
    with devices.device_errors(device, doing="drawing the weights"):
        network = build_model(config, device=device, dtype=getattr(torch, plan.dtype))
        init_random(network, seed)
    return network


def make_plan(
    config: ModelConfig,
    options: EngineOptions,
    device: torch.device,
    *,
    draft: ModelConfig | None = None,
    reserved: int = 0,
) -> EnginePlan:
    """Resolve `options` for `config` on `device` (see `config.resolve_plan`).

    draft: of the draft model, whose weights and cache, of as many tokens, are counted in.
    reserved: bytes of the weights that are on the device already.
    """
    models = [config] if draft is None else [config, draft]
    return resolve_plan(
        options,
        device=str(device),
        checkpoint_dtype=config.dtype,
        weight_bytes_of={
            d: sum(m.num_parameters for m in models) * b for d, b in DTYPE_BYTES.items()
        },
        kv_bytes_per_token_of={
            d: sum(m.kv_bytes_per_token(b) for m in models) for d, b in DTYPE_BYTES.items()
        },
        max_position_embeddings=config.max_position_embeddings,
        free_bytes=devices.free_bytes(device) + reserved,
        supports_bfloat16=devices.supports_bfloat16(device),
    )
