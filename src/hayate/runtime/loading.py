"""From a checkpoint folder, or from nothing, to a network on its device, and the plan for it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import torch

from hayate.checkpoint.index import Checkpoint
from hayate.checkpoint.nf4 import nf4_tensors, without_nf4
from hayate.checkpoint.placements import check_placements, complete
from hayate.checkpoint.reader import LoadReport, load, load_checked
from hayate.config import DTYPE_BYTES, EngineOptions, EnginePlan, resolve_plan
from hayate.errors import ModelError
from hayate.kernels.all_reduce import Communicator
from hayate.kernels.nf4 import NF4_CODEBOOK
from hayate.models.config import ModelConfig
from hayate.models.decoder import CausalLM, build_model, init_random, meta_model
from hayate.models.families import load_config
from hayate.models.quantization import (
    dense_parameters,
    load_nf4,
    nf4_groups,
    nf4_parts,
    weight_bytes,
)
from hayate.models.sharding import (
    Shard,
    build_sharded,
    check_shardable,
    local_config,
    shard_placements,
)
from hayate.models.weights import IGNORED_TENSORS, placements
from hayate.runtime import device as devices


def open_checkpoint(folder: Path) -> tuple[ModelConfig, Checkpoint]:
    """What config.json says, and the tensors. ModelError when either is not valid."""
    config = load_config(folder)
    checkpoint = Checkpoint.open(folder)
    if config.tie_embeddings and "lm_head.weight" in checkpoint.tensors:
        # The file has a head: use it.
        config = dataclasses.replace(config, tie_embeddings=False)
    tensors = nf4_tensors(checkpoint, NF4_CODEBOOK)
    if config.nf4_modules is None and tensors:
        raise ModelError(
            f"{next(iter(tensors.values())).where} is NF4, but config.json has no quantization_config; "
            "fetch both again"
        )
    if config.nf4_modules is not None:
        if not tensors:
            raise ModelError(
                f"{folder / 'config.json'}: quantization_config says NF4, but no tensor of the checkpoint is; take the "
                "field out to run the weights as they are, or make an NF4 checkpoint with `hayate quantize`"
            )
        model = meta_model(config, dtype=torch.bfloat16)
        parts = nf4_parts(model, placements(config), tensors)
        config = dataclasses.replace(config, nf4_modules=frozenset(p.module for p in parts))
    return config, checkpoint


def load_network(
    config: ModelConfig,
    checkpoint: Checkpoint,
    plan: EnginePlan,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[CausalLM, LoadReport]:
    """The network with its weights; ModelError, before anything is read, when a tensor is missing or odd."""
    begin = time.perf_counter()
    device, dtype = torch.device(plan.device), getattr(torch, plan.dtype)
    model = meta_model(config, dtype=dtype)
    tensors = nf4_tensors(checkpoint, NF4_CODEBOOK) if config.nf4_modules else {}
    placed = placements(config)
    parts = nf4_parts(model, placed, tensors)
    dense = without_nf4(checkpoint, tensors)
    placed = [p for p in placed if p.source not in tensors]
    check_placements(dense, dense_parameters(model), placed, IGNORED_TENSORS)

    packed = sum(t.num_bytes for part in parts for t in part.tensor.data)
    report = progress or (lambda done, total: None)

    def after(before: int) -> Callable[[int, int], None]:
        """For the reading that follows the first `before` bytes."""
        return lambda done, _: report(before + done, num_dense + packed)

    with devices.device_errors(device, doing="loading"):
        network = build_model(config, device=device, dtype=dtype)
        read = num_dense = load(
            dense,
            dense_parameters(network),
            placed,
            ignore=IGNORED_TENSORS,
            progress=lambda done, total: report(done, total + packed),
        ).num_bytes
        for group in nf4_groups(parts):
            read += load_nf4(checkpoint, network, group, after(read))
        if parts and device.type == "cuda":
            torch.cuda.empty_cache()  # what packing took is the KV cache's now
    return network, LoadReport(read, time.perf_counter() - begin)


def load_shard(
    config: ModelConfig,
    checkpoint: Checkpoint,
    plan: EnginePlan,
    group: Communicator,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[CausalLM, LoadReport]:
    """`load_network` of this process's part of the model: no more than that is read, and held."""
    device, dtype = torch.device(plan.device), getattr(torch, plan.dtype)
    whole, placed = dict(meta_model(config, dtype=dtype).named_parameters()), placements(config)
    check_placements(checkpoint, whole, placed, IGNORED_TENSORS)
    with devices.device_errors(device, doing="loading"):
        network = build_sharded(config, group, device=device, dtype=dtype)
        parameters = dict(network.named_parameters())
        placed = shard_placements(config, Shard(group.rank, group.size), whole, placed)
        placed = complete(parameters, placed)
        return network, load_checked(checkpoint, parameters, placed, progress=progress)


def random_network(config: ModelConfig, plan: EnginePlan, seed: int) -> CausalLM:
    """The network with random weights."""
    device = torch.device(plan.device)
    with devices.device_errors(device, doing="drawing the weights"):
        network = build_model(config, device=device, dtype=getattr(torch, plan.dtype))
        init_random(network, seed)
    return network


def random_shard(config: ModelConfig, plan: EnginePlan, group: Communicator, seed: int) -> CausalLM:
    """This process's part of a network with random weights: others than one process would draw."""
    device = torch.device(plan.device)
    with devices.device_errors(device, doing="drawing the weights"):
        network = build_sharded(config, group, device=device, dtype=getattr(torch, plan.dtype))
        init_random(network, seed + group.rank)
        network.synchronize()
    return network


def make_plan(
    config: ModelConfig,
    options: EngineOptions,
    device: torch.device,
    *,
    draft: ModelConfig | None = None,
    reserved: int = 0,
    free_bytes: int | None = None,
) -> EnginePlan:
    """Resolve `options` for `config` on `device` (see `config.resolve_plan`); with tensor parallelism for each process.

    draft: of the draft model, whose weights and cache, of as many tokens, are counted in.
    reserved: bytes of the weights that are on the device already.
    free_bytes: for each process; default: as the device says.
    """
    size = options.tensor_parallel
    check_shardable(config, size)
    local = local_config(config, Shard(0, size))  # the largest part
    if free_bytes is None:
        free_bytes = devices.free_bytes(device) // (size if device.type == "cpu" else 1)
    models = [local] if draft is None else [local, draft]
    weights = [weight_bytes(meta_model(m, dtype=torch.bfloat16)) for m in models]
    return resolve_plan(
        options,
        device=str(device),
        checkpoint_dtype=config.dtype,
        weight_bytes_of={d: sum(b[d] for b in weights) for d in DTYPE_BYTES},
        kv_bytes_per_token_of={
            d: sum(m.kv_bytes_per_token(b) for m in models) for d, b in DTYPE_BYTES.items()
        },
        max_position_embeddings=config.max_position_embeddings,
        free_bytes=free_bytes + reserved,
        supports_bfloat16=devices.supports_bfloat16(device),
        takes_images=config.vision is not None,
    )
