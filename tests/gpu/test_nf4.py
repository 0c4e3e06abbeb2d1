"""NF4 in bf16 and fp16 on the GPU against float64, eager and from a CUDA graph."""

from __future__ import annotations

import pytest
import torch

from hayate.kernels._dispatch import batch_invariant
from hayate.kernels.nf4 import NF4Weight, nf4_dequantize, nf4_linear, nf4_pack, nf4_quantize
from hayate.kernels.nf4_gemm import NF4GemmConfig, launch_nf4_gemm
from hayate.kernels.nf4_weight import nf4_dequantize_reference
from hayate.kernels.norm import Norm

UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # half of the spacing


def make(n: int, k: int) -> NF4Weight:
    return nf4_pack(*nf4_quantize(torch.randn(n, k, device="cuda") / k**0.5), n, k)


def relative(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((actual.double() - wanted).norm() / wanted.norm()).item()


def wanted_64(x, weight, bias, norm, activation, residual):
    unit = weight._replace(scales=torch.ones_like(weight.scales))
    scales = weight.scales.double().repeat_interleave(weight.block, dim=1)[:, : weight.in_features]
    w = nf4_dequantize_reference(unit, torch.float64) * scales
    x = x.double()
    if norm is not None:
        x = x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight.double()
    y = x @ w.T
    if bias is not None:
        y = y + bias.double()
    if activation == "silu_and_mul":
        gate, up = y.chunk(2, -1)
        y = torch.nn.functional.silu(gate) * up
    return y if residual is None else y + residual.double()


def operands(rows, n, k, dtype, *, norm=False, activation=None, bias=False, residual=False):
    n_out = n // 2 if activation == "silu_and_mul" else n

    def draw(*shape):
        return torch.randn(*shape, device="cuda").to(dtype)

    return (
        draw(rows, k),
        make(n, k),
        draw(n) if bias else None,
        Norm("rmsnorm", draw(k), None, 1e-6) if norm else None,
        activation,
        draw(rows, n_out) if residual else None,
    )


@pytest.mark.parametrize("dtype", list(UNIT))
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 16, 17, 33, 64, 100, 300])
@pytest.mark.parametrize(
    ("n", "k", "fusions"),
    [
        (4608, 3584, {"norm": True, "bias": True}),
        (3584, 3584, {"residual": True}),
        (2 * 4736, 3584, {"norm": True, "activation": "silu_and_mul"}),
        (3584, 18944, {"residual": True}),
        (1152, 4304, {"bias": True}),  # blocks of 16, a group that is not full
        (333, 1152, {"bias": True}),
    ],
)
def test_linear(n, k, fusions, rows, dtype):
    x, weight, bias, norm, activation, residual = operands(rows, n, k, dtype, **fusions)

    def call():
        return nf4_linear(x, weight, bias, norm=norm, activation=activation, residual=residual)

    y = call()
    exact = wanted_64(x, weight, bias, norm, activation, residual)
    # Roundings of half a unit, each a third of it rms or less: x or its norm, the weight, the
    # product (twice with gate and up), the result.
    assert relative(y, exact) < 1.5 * UNIT[dtype]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = call()
    for _ in range(2):
        again.fill_(float("nan"))
        graph.replay()
        assert torch.equal(again, y)


@pytest.mark.parametrize("dtype", list(UNIT))
@pytest.mark.parametrize("block_n", [64, 128])
@pytest.mark.parametrize("split", [1, 5])
def test_lookups(split, block_n, dtype):
    """PTX meets hardware here only: both lookups give the same values, hence the same bits."""
    arguments = operands(5, 640, 1152, dtype, bias=True)
    exact = wanted_64(*arguments)
    results = {}
    for lookup in ("shared", "permute", "memory"):
        config = NF4GemmConfig(block_n, split, lookup=lookup)
        results[lookup] = launch_nf4_gemm(*arguments, config=config)
        assert relative(results[lookup], exact) < UNIT[dtype]
    assert torch.equal(results["shared"], results["permute"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "k"), [(77, 3584), (100, 4304), (33, 160)])
def test_dequantize_has_the_bits_of_the_reference(n, k, dtype):
    weight = make(n, k)
    assert torch.equal(nf4_dequantize(weight, dtype), nf4_dequantize_reference(weight, dtype))


def test_closer_than_the_reference():
    """The codebook is rounded once, with a factor that suits bf16, instead of every weight."""
    x, weight, *_ = operands(4, 4096, 3584, torch.bfloat16)
    w = nf4_dequantize_reference(weight, torch.bfloat16).double()
    exact = wanted_64(x, weight, None, None, None, None)
    # Both are rounded to bf16 at the end; in between, the kernel's error must be the smaller.
    assert relative(nf4_linear(x, weight), exact) < relative((x.double() @ w.T).bfloat16(), exact)


@pytest.mark.parametrize("dtype", list(UNIT))
def test_batch_invariant(dtype):
    x, weight, *_ = operands(40, 1024, 3584, dtype)
    with batch_invariant():
        assert torch.equal(nf4_linear(x, weight)[7:8], nf4_linear(x[7:8], weight))
