"""A checkpoint in NF4 from a dense one, as bitsandbytes and transformers would write it.

Every linear layer is quantised by itself, the head excepted; everything else is copied.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hayate.checkpoint.index import Checkpoint
from hayate.checkpoint.nf4 import serialise
from hayate.checkpoint.writer import save
from hayate.errors import ModelError, UsageError
from hayate.kernels.nf4 import NF4_CODEBOOK, nf4_quantize
from hayate.models.config import ModelConfig
from hayate.models.decoder import meta_model
from hayate.models.families import load_config
from hayate.models.quantization import linear_names
from hayate.models.weights import placements

# Layers that stay dense, by the last part of their names; of MiniCPM-V those of its published NF4 checkpoint.
_DENSE = {"MiniCPMV": ("out_proj", "kv_proj", "lm_head")}
_WEIGHT_FILES = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")


def quantize_checkpoint(
    folder: Path,
    out: Path,
    *,
    double: bool = True,
    skip: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write the model in `folder` to the new folder `out`, its linear layers in NF4.

    The codes, scales and their JSON are bit for bit what bitsandbytes 0.50 writes on a CPU; config.json gets
    transformers' quantization_config; other files of the folder (tokenizer, generation_config.json) are copied. `out`
    appears when it is whole: until then, and if anything fails, there is only a temporary folder beside it, which is
    removed. Needs host memory for the quantised weights.

    Args:
        double: quantise the scales, too: 4.13 bits a weight instead of 4.5.
        skip: layers that stay dense beside the head: the last part of a name (`down_proj`), or the first parts of a
            whole name (`model.layers.0`).
        progress: called with (layers done, layers in all).

    Raises UsageError when `out` exists or cannot be written, or a name in `skip` is no layer's or cuts a projection
    that is fused here; ModelError when the model is quantised already, has experts, or rows that NF4 does not take.
    """
    if out.exists() or out.is_symlink():
        raise UsageError(f"{out} exists; give a folder that does not")
    if not out.parent.is_dir():
        raise UsageError(f"{out}: the folder {out.parent} does not exist")
    config = load_config(folder)
    checkpoint = Checkpoint.open(folder)
    kept = (*_kept(config), *skip)
    names = _chosen(config, checkpoint, kept, skip)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.incomplete")
    try:
        temporary.mkdir()
        with ExitStack() as stack:
            tensors = _quantized(checkpoint, names, double, stack, progress)
            save(tensors, [], temporary)
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        fields["quantization_config"] = _quantization_config(config, double, kept)
        text = json.dumps(fields, indent=2, ensure_ascii=False) + "\n"
        (temporary / "config.json").write_text(text, encoding="utf-8")
        for file in folder.iterdir():
            if file.is_file() and _is_copied(file.name):
                shutil.copyfile(file, temporary / file.name)
        temporary.rename(out)
    except OSError as error:
        raise UsageError(f"{out}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def in_nf4(config: ModelConfig) -> ModelConfig:
    """`config` with those layers in NF4 that `quantize_checkpoint` would choose; for random weights."""
    names = linear_names(meta_model(config, dtype=torch.bfloat16))
    kept = _kept(config)
    chosen = (name for name in names if not any(_matches(name, pattern) for pattern in kept))
    return dataclasses.replace(config, nf4_modules=frozenset(chosen))


def _kept(config: ModelConfig) -> tuple[str, ...]:
    return _DENSE.get(config.architecture, ("lm_head",))


def _chosen(
    config: ModelConfig, checkpoint: Checkpoint, kept: Sequence[str], skip: Sequence[str]
) -> list[str]:
    """Names of the matrices to quantise, in the order of the file."""
    where = checkpoint.path
    if config.nf4_modules is not None:
        raise ModelError(f"{where} is quantised already; quantise the model it was made from")
    if config.moe is not None:
        raise ModelError(
            f"{where}: {config.architecture} is a mixture of experts; hayate runs no experts in NF4"
        )
    linears = {f"{name}.weight" for name in linear_names(meta_model(config, dtype=torch.bfloat16))}
    target_of = {p.source: p.target for p in placements(config)}
    chosen, dense, used = [], dict[str, str](), set[str]()
    for name, tensor in checkpoint.tensors.items():
        target = target_of.get(name, name)
        if target not in linears:
            continue
        module = name.removesuffix(".weight")
        if matches := {pattern for pattern in kept if _matches(module, pattern)}:
            used |= matches
            dense[target] = module
            continue
        if tensor.dtype not in ("BF16", "F16", "F32") or len(tensor.shape) != 2:
            raise ModelError(
                f"{tensor.file}: tensor {name} is {tensor.dtype} {list(tensor.shape)}; NF4 is made of matrices in "
                "BF16, F16 or F32"
            )
        if tensor.shape[1] % 16:
            raise ModelError(
                f"{tensor.file}: tensor {name} has rows of {tensor.shape[1]} values; NF4 takes multiples of 16: give "
                f"--skip {module.rpartition('.')[2]}"
            )
        chosen.append(name)
    if unused := [pattern for pattern in skip if pattern not in used]:
        raise UsageError(f"--skip {unused[0]} is no linear layer of {where}")
    for name in chosen:
        if other := dense.get(target_of.get(name, name)):
            raise UsageError(
                f"--skip leaves {other} dense, but not {name.removesuffix('.weight')}; hayate computes both as one "
                "layer, so skip both or none"
            )
    return chosen


def _matches(module: str, pattern: str) -> bool:
    return module.rpartition(".")[2] == pattern or f"{module}.".startswith(f"{pattern}.")


def _quantized(
    checkpoint: Checkpoint,
    names: Sequence[str],
    double: bool,
    stack: ExitStack,
    progress: Callable[[int, int], None] | None,
) -> Mapping[str, Tensor]:
    """All tensors to write; those that stay as they are come from the file when they are used."""
    from safetensors import safe_open

    files = {f: stack.enter_context(safe_open(f, framework="pt")) for f in checkpoint.files}
    chosen, done = set(names), 0
    tensors: dict[str, Tensor] = {}
    for name, info in checkpoint.tensors.items():
        tensor = files[info.file].get_tensor(name)
        if name not in chosen:
            tensors[name] = tensor
            continue
        codes, absmax = nf4_quantize(tensor)
        shape, dtype = tensor.shape, tensor.dtype
        tensors |= serialise(
            name, codes, absmax, shape=shape, dtype=dtype, codebook=NF4_CODEBOOK, double=double
        )
        done += 1
        if progress is not None:
            progress(done, len(names))
    return tensors


def _quantization_config(config: ModelConfig, double: bool, kept: Sequence[str]) -> dict[str, Any]:
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": config.dtype,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": list(kept),
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }


def _is_copied(name: str) -> bool:
    return not name.startswith(".") and name != "config.json" and not name.endswith(_WEIGHT_FILES)
