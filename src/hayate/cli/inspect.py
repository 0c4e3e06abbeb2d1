"""`hayate inspect`: what a model folder holds and what of it fits here; reads no weights."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hayate.cli import options
from hayate.cli.layout import aligned
from hayate.config import DTYPE_BYTES, EngineOptions, format_bytes, parse_dtype
from hayate.errors import OutOfMemory

if TYPE_CHECKING:
    from hayate.checkpoint.index import Checkpoint
    from hayate.cli.devices import Device
    from hayate.models import ModelConfig


def inspect(
    model: Annotated[
        str, typer.Argument(metavar="DIR|NAME", help="Folder, hub id org/name, or smollm2-135m.")
    ],
    dtype: options.Dtype = "auto",
    revision: options.Revision = None,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Show architecture, parameters, dtypes, files, and which context fits on which device."""
    parse_dtype(dtype)
    from hayate.checkpoint.hub import resolve_model
    from hayate.cli.devices import list_devices
    from hayate.runtime.loading import open_checkpoint

    config, checkpoint = open_checkpoint(resolve_model(model, revision))
    report = describe(config, checkpoint)
    report["devices"] = [fit(config, device, dtype) for device in list_devices()]
    if as_json:
        print(json.dumps(report, ensure_ascii=False))
    else:
        print(aligned(_rows(report)))


def describe(config: ModelConfig, checkpoint: Checkpoint) -> dict[str, Any]:
    """The facts of config and checkpoint. Sizes in bytes, KV cache in the checkpoint's dtype."""
    from hayate.models.quantization import describe_nf4

    tensors = checkpoint.tensors.values()
    bytes_of: Counter[str] = Counter()
    for tensor in tensors:
        bytes_of[tensor.dtype] += tensor.num_bytes
    return {
        "folder": str(checkpoint.path),
        "architecture": config.architecture,
        "layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "parameters": config.num_parameters,
        "active_parameters": config.num_active_parameters,
        "files": [file.name for file in checkpoint.files],
        "tensors": len(checkpoint.tensors),
        "bytes": checkpoint.num_bytes,
        "bytes_by_dtype": dict(bytes_of),
        "nf4": describe_nf4(checkpoint),
        "kv_bytes_per_token": config.kv_bytes_per_token(DTYPE_BYTES[config.dtype]),
    }


def fit(config: ModelConfig, device: Device, dtype: str) -> dict[str, Any]:
    """What of the model fits in the device's free memory: the longest context, and how many
    such."""
    import torch

    from hayate.runtime.loading import make_plan

    report: dict[str, Any] = {
        "device": device.name,
        "description": device.description,
        "free_bytes": device.free_bytes,
        "fits": True,
    }
    try:
        plan = make_plan(
            config,
            EngineOptions(device=device.name, dtype=dtype, kv_memory="100%"),
            torch.device(device.name),
        )
    except OutOfMemory as error:
        return {**report, "fits": False, "reason": str(error)}
    return {
        **report,
        "dtype": plan.dtype,
        "weight_bytes": plan.weight_bytes,
        "kv_tokens": plan.kv_tokens,
        "context": plan.max_model_len,
        "sequences": plan.kv_tokens // plan.max_model_len,
    }


def _rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    r = report
    parameters = f"{r['parameters']:,}"
    if r["active_parameters"] != r["parameters"]:
        parameters += f", {r['active_parameters']:,} active for each token"
    dtypes = ", ".join(f"{name} {format_bytes(size)}" for name, size in r["bytes_by_dtype"].items())
    shape = (
        f"{r['layers']} layers, width {r['hidden_size']:,}, {r['heads']} heads of {r['head_dim']}, "
        f"{r['kv_heads']} key/value heads, vocabulary {r['vocab_size']:,}"
    )
    rows = [
        ("folder", r["folder"]),
        ("architecture", r["architecture"]),
        ("shape", shape),
        ("context", f"{r['max_position_embeddings']:,} tokens"),
        ("parameters", parameters),
        ("weights", f"{dtypes} in {r['tensors']:,} tensors, {_count(r['files'])}"),
        *([("format", _format(r["nf4"]))] if r["nf4"] else []),
        ("KV cache", f"{format_bytes(r['kv_bytes_per_token'])} a token"),
    ]
    return rows + [(device["device"], _fit_text(device)) for device in r["devices"]]


def _count(files: list[str]) -> str:
    return files[0] if len(files) == 1 else f"{len(files)} shards"


def _format(nf4: dict[str, Any]) -> str:
    double = " quantised again" if nf4["double_quantised"] else ""
    return f"NF4: {nf4['matrices']:,} matrices with 4 bits a value, a scale{double} for every {nf4['block_size']}"


def _fit_text(device: dict[str, Any]) -> str:
    free = f"{device['description']}, {format_bytes(device['free_bytes'])} free: "
    if not device["fits"]:
        return free + f"does not fit; {device['reason']}"
    return free + (
        f"fits in {device['dtype']} with a context of {device['context']:,} tokens "
        f"({device['kv_tokens']:,} in all: {device['sequences']:,} such sequences)"
    )
