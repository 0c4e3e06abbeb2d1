"""NF4 as the format is defined, in NumPy and one value after the other where that is clearer: the tests' truth."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

STATE = ".quant_state.bitsandbytes__nf4"


def read(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint folder, as they lie in its files."""
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in safetensors.torch.load_file(file).items()
    }


def dequantized(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The model that NF4 `tensors` stand for: its matrices in fp32, the rest as it is."""
    matrices = [name.removesuffix(STATE) for name in tensors if name.endswith(STATE)]
    rest = {n: t for n, t in tensors.items() if not any(n.startswith(m) for m in matrices)}
    return rest | {name: dequantize(tensors, name) for name in matrices}


def dequantize(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """Matrix `name`, fp32: code of value i times the scale of block i // blocksize, blocks in row-major order."""
    state = json.loads(bytes(tensors[name + STATE].tolist()))
    codebook = tensors[f"{name}.quant_map"].numpy()
    packed = tensors[name].reshape(-1).numpy()
    codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)
    scales = tensors[f"{name}.absmax"].numpy()
    if "nested_offset" in state:
        block = np.arange(len(scales)) // state["nested_blocksize"]
        nested = tensors[f"{name}.nested_absmax"].numpy()[block]
        scales = tensors[f"{name}.nested_quant_map"].numpy()[scales] * nested
        scales = scales + np.float32(state["nested_offset"])
    values = codebook[codes] * scales[np.arange(len(codes)) // state["blocksize"]]
    assert values.dtype == np.float32
    return torch.from_numpy(values.reshape(state["shape"]))
