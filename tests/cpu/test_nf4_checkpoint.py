"""NF4 matrices in the file: written bit for bit as by bitsandbytes, read by its formula, defects refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import save_file

from hayate.checkpoint.index import Checkpoint
from hayate.checkpoint.nf4 import (
    block_scales,
    dynamic_map,
    nf4_tensors,
    serialise,
    without_nf4,
)
from hayate.errors import ModelError
from hayate.kernels.nf4 import NF4_CODEBOOK, nf4_quantize
from tests import nf4_formula

Tensors = dict[str, torch.Tensor]


def theirs(w: torch.Tensor, *, double: bool, block_size: int = 64) -> Tensors:
    """The tensors that bitsandbytes writes for a layer `p`."""
    codes, state = bnb.quantize_4bit(
        w, blocksize=block_size, compress_statistics=double, quant_type="nf4"
    )
    parts = {f"p.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    return {"p.weight": codes, **parts}


def ours(w: torch.Tensor, *, double: bool) -> Tensors:
    codes, absmax = nf4_quantize(w)
    how = {"shape": w.shape, "dtype": w.dtype, "codebook": NF4_CODEBOOK}
    return serialise("p.weight", codes, absmax, double=double, **how)


def write(folder: Path, tensors: Tensors) -> Checkpoint:
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    return Checkpoint.open(folder)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(
    ("n", "k", "dtype"),
    [
        (24, 4304, torch.bfloat16),  # blocks straddle rows
        (300, 256, torch.float16),
        (7, 48, torch.float32),  # the last block is not full
        (3, 16, torch.bfloat16),
        (1, 64, torch.bfloat16),  # one block: its scale is the mean of all
    ],
)
def test_bytes_are_those_of_bitsandbytes(n, k, dtype, double):
    torch.manual_seed(n)
    w = (torch.randn(n, k) * torch.rand(n, 1) * 0.1).to(dtype)
    mine, wanted = ours(w, double=double), theirs(w, double=double)
    assert mine.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert mine[name].dtype == tensor.dtype, name
        assert torch.equal(mine[name], tensor), name


def test_many_scales_are_those_of_bitsandbytes():
    """Some lie between two codes of the second quantisation, where bitsandbytes does not take the nearer one."""
    w = torch.zeros(1200, 64)
    w[:, 0] = torch.rand(1200, generator=torch.Generator().manual_seed(0))
    w[:, 1] = -1e-9  # blocks of almost nothing, and one of nothing
    w[7] = 0
    mine, wanted = ours(w, double=True), theirs(w, double=True)
    assert all(torch.equal(mine[name], tensor) for name, tensor in wanted.items())
    assert len(mine["p.weight.absmax"].unique()) > 150  # of 256
    assert torch.equal(dynamic_map(), bnb.create_dynamic_map())


@pytest.mark.parametrize("block_size", [64, 128, 4096])
@pytest.mark.parametrize("double", [True, False])
def test_scales_read_back(tmp_path, double, block_size):
    """Against the formula in NumPy, with the file's own tables."""
    torch.manual_seed(0)
    w = torch.randn(80, 208)
    tensors = theirs(w, double=double, block_size=block_size) | {"other": torch.ones(2)}
    checkpoint = write(tmp_path, tensors)
    found = nf4_tensors(checkpoint, NF4_CODEBOOK)
    assert without_nf4(checkpoint, found).tensors.keys() == {"other"}
    matrix = found["p.weight"]
    assert (matrix.shape, matrix.block_size, matrix.dtype) == ((80, 208), block_size, "float32")
    assert {t.name for t in matrix.data} <= tensors.keys()
    scales = block_scales(matrix, tensors)
    # With every code the last one, whose value is 1, the values are the scales.
    flat = nf4_formula.dequantize(
        tensors | {"p.weight": torch.full_like(tensors["p.weight"], 255)}, "p.weight"
    )
    assert torch.equal(scales.repeat_interleave(block_size)[: flat.numel()], flat.view(-1))


def state(tensors: Tensors, **changes: object) -> Tensors:
    name = "p.weight.quant_state.bitsandbytes__nf4"
    fields = json.loads(bytes(tensors[name].tolist())) | changes
    text = json.dumps({key: value for key, value in fields.items() if value != "gone"})
    return tensors | {name: torch.tensor(list(text.encode()), dtype=torch.uint8)}


def renamed(tensors: Tensors, old: str, new: str) -> Tensors:
    return {name.replace(old, new): tensor for name, tensor in tensors.items()}


def changed(
    name: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {f"p.weight{name}": change(tensors[f"p.weight{name}"])}


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {n: t for n, t in tensors.items() if n != f"p.weight{name}"}


STATE = ".quant_state.bitsandbytes__nf4"
DEFECTS = [
    (lambda t: renamed(t, "__nf4", "__fp4"), ["fp4", "hayate runs nf4"]),
    (lambda t: state(t, quant_type="fp4"), ["quant_type", "fp4"]),
    (lambda t: state(t, blocksize=100), ["blocksize", "100"]),
    (lambda t: state(t, blocksize="gone"), ["blocksize", "missing"]),
    (lambda t: state(t, blocksize=128), [".absmax", "[8]", "[4]"]),
    (lambda t: state(t, shape=[8, 72]), ["p.weight", "256 bytes", "288"]),
    (lambda t: state(t, shape=[512]), ["shape", "[512]"]),
    (lambda t: state(t, shape=[-8, -64]), ["shape", "-8"]),
    (lambda t: state(t, shape=None), ["shape", "null"]),
    (lambda t: state(t, dtype="int8"), ["dtype", "int8"]),
    (lambda t: state(t, mystery=1), ["mystery"]),
    (lambda t: state(t, nested_offset="gone"), ["nested_offset", "missing"]),
    (lambda t: state(t, nested_blocksize=64), ["nested_blocksize", "64"]),
    (lambda t: state(t, nested_dtype="float16"), ["nested_dtype", "float16"]),
    (changed(STATE, lambda t: t[:-1]), [STATE, "JSON"]),
    (changed(STATE, lambda t: t[:0]), [STATE, "JSON"]),
    (changed(STATE, lambda _: torch.tensor(list(b"[]"), dtype=torch.uint8)), ["not an object"]),
    (changed(STATE, lambda t: t.repeat(500)), [STATE, "too large"]),
    (changed(".quant_map", lambda t: t.flip(0)), [".quant_map", "other values"]),
    (changed(".quant_map", lambda t: t[:8]), [".quant_map", "[8]", "[16]"]),
    (changed(".absmax", lambda t: t[1:]), [".absmax", "[7]", "[8]"]),
    (changed(".absmax", lambda t: t.float()), [".absmax", "F32", "U8"]),
    (changed(".nested_absmax", lambda t: t.repeat(2)), [".nested_absmax", "[2]", "[1]"]),
    (changed(".nested_quant_map", lambda t: t[:255]), [".nested_quant_map", "[255]"]),
    (changed("", lambda t: t[1:]), ["'p.weight'", "255 bytes", "256"]),
    (without(""), ["'p.weight'", "missing"]),
    (without(".absmax"), [".absmax", "missing"]),
    (without(".nested_absmax"), [".nested_absmax", "missing"]),
    (without(".quant_map"), [".quant_map", "missing"]),
    (without(STATE), ["absmax", "belongs to no NF4 matrix"]),
]


@pytest.mark.parametrize(("damage", "named"), DEFECTS)
def test_defects_are_refused_by_name(tmp_path, damage, named):
    tensors = ours(torch.randn(8, 64), double=True)
    checkpoint = write(tmp_path, damage(tensors))
    with pytest.raises(ModelError) as error:
        nf4_tensors(checkpoint, NF4_CODEBOOK)
    for part in ["model.safetensors", "p.weight", *named]:
        assert part in str(error.value)
