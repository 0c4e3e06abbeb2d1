"""Linear layers in NF4: which they are, and their way from the checkpoint into the model.

config.json says that a checkpoint is quantised by bitsandbytes; which layers are, its tensors tell. A projection that
is fused here (q, k and v; gate and up) lies in the file as several matrices, each quantised by itself: their rows are
stacked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import gcd
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hayate.checkpoint.config_json import ConfigReader
from hayate.checkpoint.index import Checkpoint
from hayate.checkpoint.nf4 import NF4Tensor, block_scales, nf4_tensors
from hayate.checkpoint.placements import TORCH_DTYPES, Placement
from hayate.checkpoint.reader import load
from hayate.errors import ModelError
from hayate.kernels.nf4 import NF4_CODEBOOK, nf4_pack
from hayate.models.layers import Linear, NF4Linear, SparseMLP

# Of codes as they lie in the file, held on the device beside the model while it is loaded; and of codes packed at
# once, for which some four times as much is needed.
_GROUP_BYTES, _PIECE_BYTES = 128 * 2**20, 32 * 2**20
_DTYPES = ("bfloat16", "float16", "float32")


def read_quantization(config: ConfigReader) -> bool:
    """Whether config.json's `quantization_config` says bitsandbytes NF4.

    Raises ModelError naming the field for any other method, and for fields nobody here has heard of. What concerns
    8-bit layers, or the dtype that bitsandbytes computes in (here the activations'), changes nothing.
    """
    section = config.section("quantization_config")
    if section is None:
        return False
    section.expect("quant_method", ("bitsandbytes",), "bitsandbytes")
    for prefix in ("", "_"):
        section.expect(f"{prefix}load_in_8bit", (False,), False)
        section.expect(f"{prefix}load_in_4bit", (True,), True)
    quant_type = section.get("bnb_4bit_quant_type", str, "fp4")  # bitsandbytes' default
    if quant_type != "nf4":
        raise ModelError(
            f"{section.where('bnb_4bit_quant_type')} is {quant_type!r} or missing; hayate runs nf4"
        )
    section.get("bnb_4bit_use_double_quant", bool, False)
    section.expect("bnb_4bit_compute_dtype", _DTYPES, "float32")
    section.get("bnb_4bit_quant_storage", str, "uint8")
    section.get("llm_int8_skip_modules", list, [])
    section.get("llm_int8_threshold", float, 6.0)
    section.get("llm_int8_has_fp16_weight", bool, False)
    section.get("llm_int8_enable_fp32_cpu_offload", bool, False)
    if unknown := section.unread():
        raise ModelError(f"{section.where(unknown[0])} is a field hayate does not know")
    return True


def linear_names(model: nn.Module) -> list[str]:
    """The layers of `model` that can be NF4; the router of a mixture of experts cannot."""
    routers = {id(m.router) for m in model.modules() if isinstance(m, SparseMLP)}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (Linear, NF4Linear)) and id(module) not in routers
    ]


def replace_linears(model: nn.Module, names: Iterable[str]) -> None:
    """Put an `NF4Linear` in place of each `Linear` of these names."""
    for name in names:
        parent, _, child = name.rpartition(".")
        linear = model.get_submodule(name)
        assert isinstance(linear, Linear), name
        out_size, in_size = linear.weight.shape
        bias, dtype = linear.bias is not None, linear.weight.dtype
        layer = NF4Linear(in_size, out_size, bias=bias, dtype=dtype)
        setattr(model.get_submodule(parent), child, layer)


def nf4_linears(model: nn.Module) -> dict[str, NF4Linear]:
    """The NF4 layers of `model` by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, NF4Linear)}


def dense_parameters(model: nn.Module) -> dict[str, Tensor]:
    """All parameters but the weights of the NF4 layers."""
    packed = {f"{name}.{part}" for name in nf4_linears(model) for part in ("codes", "scales")}
    return {name: p for name, p in model.named_parameters() if name not in packed}


def weight_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes of the parameters for each dtype of those that are not NF4."""
    packed = sum(layer.codes.nbytes + layer.scales.nbytes for layer in nf4_linears(model).values())
    count = sum(p.numel() for p in dense_parameters(model).values())
    return {dtype: packed + count * getattr(torch, dtype).itemsize for dtype in _DTYPES}


def describe_nf4(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The NF4 matrices of `checkpoint` in numbers; None where it has none."""
    tensors = nf4_tensors(checkpoint, NF4_CODEBOOK).values()
    if not tensors:
        return None
    return {
        "matrices": len(tensors),
        "block_size": max(t.block_size for t in tensors),
        "double_quantised": any(t.nested for t in tensors),
    }


class NF4Part(NamedTuple):
    """Matrix `tensor` of the checkpoint: the rows from `first_row` on of the layer `module`."""

    tensor: NF4Tensor
    module: str
    first_row: int


def nf4_parts(
    model: nn.Module, placements: Sequence[Placement], tensors: Mapping[str, NF4Tensor]
) -> list[NF4Part]:
    """The place of each of `tensors` in `model`, where its layers may be dense still.

    Raises ModelError for a tensor that is no linear layer's, has another shape, or stands beside a dense one in a
    layer that is fused here.
    """
    names = set(linear_names(model))
    placed = {p.source: p for p in placements}
    dense = {p.target: p.source for p in placements if p.source not in tensors}
    parts = []
    for name, tensor in tensors.items():
        place = placed.get(name, Placement(name, name, ()))
        module = place.target.removesuffix(".weight")
        if module not in names or not place.target.endswith(".weight"):
            raise ModelError(
                f"{tensor.where} is NF4, but no linear layer of this model; hayate runs attention, MLP and head in "
                "NF4, and no experts or routers"
            )
        if place.target in dense:
            raise ModelError(
                f"{tensor.where} is NF4 and {dense[place.target]!r} is not; hayate computes both as one layer, so "
                "quantise both or none"
            )
        rows = place.index[0] if place.index else slice(None)
        assert isinstance(rows, slice)
        parts.append(NF4Part(tensor, module, rows.start or 0))
        _check_shape(parts[-1], rows, model.get_submodule(module))
    return parts


def _check_shape(part: NF4Part, rows: slice, layer: nn.Module) -> None:
    tensor = part.tensor
    assert isinstance(layer, (Linear, NF4Linear))
    size, width = layer.weight.shape if isinstance(layer, Linear) else layer.packed.shape
    wanted = len(range(size)[rows]), width
    if tensor.shape != wanted:
        raise ModelError(
            f"{tensor.where} has shape {list(tensor.shape)}, its place in layer {part.module} has {list(wanted)}; "
            "config.json and the weights do not belong together"
        )
    if width % 16 or tensor.block_size % 64:
        raise ModelError(
            f"{tensor.where} has rows of {width} in blocks of {tensor.block_size}; hayate runs NF4 with rows of a "
            "multiple of 16 and blocks of a multiple of 64"
        )


def nf4_groups(parts: Sequence[NF4Part]) -> list[list[NF4Part]]:
    """The parts in the order of the file, cut into groups of at most 128 MiB, or of one matrix."""
    groups: list[list[NF4Part]] = []
    size = _GROUP_BYTES
    for part in sorted(parts, key=lambda p: (p.tensor.codes.file, p.tensor.codes.begin)):
        num_bytes = sum(t.num_bytes for t in part.tensor.data)
        if size + num_bytes > _GROUP_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(part)
        size += num_bytes
    return groups


@torch.no_grad()
def load_nf4(
    checkpoint: Checkpoint,
    model: nn.Module,
    group: Sequence[NF4Part],
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Fill the parts of `group` in `model`; returns the bytes read.

    Beside the model, its device holds the group as it lies in the file, and what packing 32 MiB of codes takes, some
    160 MiB; so loading all groups needs at most 300 MiB, or 160 MiB and one matrix.
    """
    layers = nf4_linears(model)
    staged = {
        t.name: torch.empty(
            t.shape, dtype=TORCH_DTYPES[t.dtype], device=layers[part.module].codes.device
        )
        for part in group
        for t in part.tensor.data
    }
    report = load(checkpoint, staged, ignore=(".*",), progress=progress)
    for part in group:
        _pack(part.tensor, staged, layers[part.module], part.first_row)
    return report.num_bytes


def _pack(
    tensor: NF4Tensor, staged: Mapping[str, Tensor], layer: NF4Linear, first_row: int
) -> None:
    """Some rows at a time: as many as end with a block."""
    rows, width = tensor.shape
    codes = staged[tensor.codes.name].view(-1).view(torch.uint8).view(rows, width // 2)
    scales, block = block_scales(tensor, staged), tensor.block_size
    whole = block // gcd(block, width)
    step = max(1, _PIECE_BYTES // (width // 2) // whole) * whole
    for begin in range(0, rows, step):
        piece = codes[begin : begin + step]
        blocks = slice(begin * width // block, -(-(begin + len(piece)) * width // block))
        packed = nf4_pack(piece, scales[blocks], len(piece), width, block)
        layer.fill(packed, first_row + begin)
