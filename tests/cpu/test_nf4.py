"""NF4 against bitsandbytes' bits and against its formula, written out in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hayate.errors import UsageError
from hayate.kernels.nf4 import (
    NF4_CODEBOOK,
    NF4Weight,
    nf4_dequantize,
    nf4_linear,
    nf4_pack,
    nf4_quantize,
)
from hayate.kernels.norm import Norm


def numpy_dequantize(codes: torch.Tensor, absmax: torch.Tensor, n: int, k: int) -> np.ndarray:
    """Element i of the flattened matrix: the high half of byte i / 2 for even i, block i / 64."""
    packed = codes.numpy().reshape(-1)
    nibbles = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[: n * k]
    scales = absmax.numpy()[np.arange(n * k) // 64]
    return (np.array(NF4_CODEBOOK, np.float32)[nibbles] * scales).reshape(n, k)


INPUTS = {
    "normal": torch.randn(64 * 40, generator=torch.Generator().manual_seed(0)) * 0.02,
    "uniform": torch.linspace(-1, 1, 64 * 64),
    "zeros": torch.zeros(128),
    "one block of zeros": torch.cat([torch.zeros(64), torch.ones(64), -torch.ones(64)]),
    "largest": torch.full((64,), 3e38),
    "below the smallest normal": torch.tensor([1e-40, -3e-39, 0.0, 1e-45] * 16),
    "infinite": torch.tensor([float("inf"), 1.0, -1.0, 0.0] * 16),
    "nan": torch.tensor([float("nan"), 1.0, -1.0, 0.0] * 16),
    "last block not full": torch.linspace(-0.3, 0.2, 64 * 3 + 30),
    "last block zeros": torch.cat([torch.ones(64), torch.zeros(10)]),
    "one": torch.tensor([-0.5]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", INPUTS)
def test_quantize_has_the_bits_of_bitsandbytes(name: str, dtype: torch.dtype) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    w = INPUTS[name].to(dtype)
    wanted, state = functional.quantize_4bit(w, quant_type="nf4", blocksize=64)
    codes, absmax = nf4_quantize(w)
    assert torch.equal(codes, wanted.reshape(-1))
    torch.testing.assert_close(absmax, state.absmax, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("n", "k", "block"),
    [(6, 256, 64), (5, 4304, 16), (3, 160, 32), (7, 192, 64), (4, 48, 16), (1, 16, 16)],
)
def test_dequantize(n: int, k: int, block: int) -> None:
    """Exact, also where blocks go on from row to row and where a group of 128 is not full."""
    torch.manual_seed(0)
    codes = torch.randint(0, 256, (n * k // 2, 1), dtype=torch.uint8)
    absmax = torch.rand(-(-n * k // 64)) + 0.01
    weight = nf4_pack(codes, absmax, n, k)
    assert weight.shape == (n, k)
    assert weight.block == block
    wanted = torch.from_numpy(numpy_dequantize(codes, absmax, n, k))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert torch.equal(nf4_dequantize(weight, dtype), wanted.to(dtype))


def test_high_half_comes_first() -> None:
    weight = nf4_pack(torch.full((8,), 0x2D, dtype=torch.uint8), torch.ones(1), 1, 16)
    w = nf4_dequantize(weight, torch.float32)[0]
    assert w[:2].tolist() == [-0.5250730514526367, 0.5626170039176941]


def test_larger_blocks() -> None:
    """A scale of 256 elements is repeated for each 64."""
    torch.manual_seed(0)
    codes = torch.randint(0, 256, (512,), dtype=torch.uint8)
    absmax = torch.rand(4)
    repeated = nf4_pack(codes, absmax.repeat_interleave(4), 2, 512)
    weight = nf4_pack(codes, absmax, 2, 512, block_size=256)
    assert torch.equal(weight.scales, repeated.scales)


def test_rows_are_independent() -> None:
    """Merged by concatenation and cut by rows, as the layers q, k and v are."""
    torch.manual_seed(0)
    parts = [nf4_pack(*nf4_quantize(torch.randn(n, 192)), n, 192) for n in (5, 3)]
    merged = NF4Weight(
        torch.cat([p.codes for p in parts]), torch.cat([p.scales for p in parts]), 64, 192
    )
    wanted = torch.cat([nf4_dequantize(p, torch.float32) for p in parts])
    assert torch.equal(nf4_dequantize(merged, torch.float32), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("k", [192, 208])
def test_linear(k: int, rows: int, dtype: torch.dtype) -> None:
    """Norm, bias, silu_and_mul and residual around the product with the dequantised weight."""
    torch.manual_seed(0)
    n = 40
    codes, absmax = nf4_quantize(torch.randn(n, k) / k**0.5)
    x, bias = torch.randn(rows, k).to(dtype), torch.randn(n).to(dtype)
    norm = Norm("rmsnorm", (1 + 0.1 * torch.randn(k)).to(dtype), None, 1e-6)
    residual = torch.randn(rows, n // 2).to(dtype)
    y = nf4_linear(
        x,
        nf4_pack(codes, absmax, n, k),
        bias,
        norm=norm,
        activation="silu_and_mul",
        residual=residual,
    )
    x = x.double()
    x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.double()
    w = torch.from_numpy(numpy_dequantize(codes, absmax, n, k)).double()
    gate, up = (x @ w.T + bias.double()).chunk(2, -1)
    wanted = torch.nn.functional.silu(gate) * up + residual.double()
    # A handful of roundings to the dtype on the way (norm, weight, product, activation, sum), each
    # of half a unit of what is there, at most 5 here in sums of random sign.
    unit = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-24
    torch.testing.assert_close(y.double(), wanted, rtol=8 * unit, atol=40 * unit)


def test_gradient_goes_to_x() -> None:
    torch.manual_seed(0)
    weight = nf4_pack(*nf4_quantize(torch.randn(8, 64)), 8, 64)
    x = torch.randn(2, 64, requires_grad=True)
    nf4_linear(x, weight).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad[0], nf4_dequantize(weight, torch.float32).sum(0))


def test_sizes_that_do_not_fit() -> None:
    codes, absmax = nf4_quantize(torch.randn(4, 64))
    with pytest.raises(UsageError, match="multiple of 16"):
        nf4_pack(codes, absmax, 16, 8)
    with pytest.raises(UsageError, match="128 bytes of codes and 4 scales"):
        nf4_pack(codes, absmax[:3], 4, 64)
    with pytest.raises(UsageError, match=r"\(2, 60\)"):
        nf4_linear(torch.randn(2, 60), nf4_pack(codes, absmax, 4, 64))
