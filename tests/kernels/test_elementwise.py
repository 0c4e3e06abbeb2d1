"""Elementwise kernels against float64."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from hayate.errors import UsageError
from hayate.kernels import elementwise
from hayate.kernels._dispatch import use

# One rounding of the result (2^-11, 2^-24 relative) and a few fp32 operations before it; near and
# below the smallest normal fp16, 6.1e-5, the rounding is absolute: 2^-25.
TOLERANCE = {
    torch.float16: {"rtol": 6e-4, "atol": 1e-7},
    torch.float32: {"rtol": 1e-6, "atol": 1e-30},
}
DTYPES = list(TOLERANCE)
SHAPES = [(1,), (3, 5), (2, 1100), (4, 2, 33)]

both = pytest.mark.parametrize("implementation", ["reference", "triton"])
dtypes = pytest.mark.parametrize("dtype", DTYPES)
shapes = pytest.mark.parametrize("shape", SHAPES)


def silu_64(x):
    return x.double() / (1 + (-x.double()).exp())


UNARY = {
    "silu": silu_64,
    "relu2": lambda x: x.double().clamp(min=0) ** 2,
    "scale": lambda x: x.double() * 0.375,
}


@both
@dtypes
@shapes
@pytest.mark.parametrize("name", UNARY)
def test_unary(name, shape, dtype, implementation):
    x = (torch.randn(shape) * 4).to(dtype)
    arguments = (0.375,) if name == "scale" else ()
    with use(implementation):
        y = getattr(elementwise, name)(x, *arguments)
    assert y.dtype == dtype
    assert_close(y.double(), UNARY[name](x), **TOLERANCE[dtype])


@both
@dtypes
@shapes
def test_gelu_tanh(shape, dtype, implementation):
    x = (torch.randn(shape) * 4).to(dtype)
    with use(implementation):
        y = elementwise.gelu_tanh(x)
    x64 = x.double()
    wanted = 0.5 * x64 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x64 + 0.044715 * x64**3)))
    assert y.dtype == dtype
    # 1 + tanh cancels for negative x: 2^-24 |x| / 2, absolute; x here is below 16. And the exponent, below 40
    # where the result is not nothing, is rounded: 40 * 2^-24, relative.
    assert_close(y.double(), wanted, rtol=TOLERANCE[dtype]["rtol"] + 3e-6, atol=1e-6)


@both
@dtypes
@shapes
@pytest.mark.parametrize("name", ["add", "mul"])
def test_binary(name, shape, dtype, implementation):
    x, y = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    with use(implementation):
        z = getattr(elementwise, name)(x, y)
    expected = x.double() + y.double() if name == "add" else x.double() * y.double()
    assert z.dtype == dtype
    assert_close(z.double(), expected, **TOLERANCE[dtype])


@both
@dtypes
@pytest.mark.parametrize("shape", [(1, 2), (3, 14), (2, 2200), (2, 2, 66)])
def test_silu_and_mul(shape, dtype, implementation):
    x = torch.randn(shape).to(dtype)
    with use(implementation):
        y = elementwise.silu_and_mul(x)
    gate, up = x.chunk(2, -1)
    assert y.shape == gate.shape
    assert_close(y.double(), silu_64(gate) * up.double(), **TOLERANCE[dtype])


@both
def test_large_values(implementation):
    """silu of a very negative number is minus zero, not NaN; of a large one it is the number."""
    x = torch.tensor([-1e4, -200.0, -90.0, 0.0, 90.0, 1e4])
    with use(implementation):
        y = elementwise.silu(x)
    assert_close(y.double(), silu_64(x).nan_to_num(0.0), rtol=1e-6, atol=1e-30)


@both
def test_strided_inputs(implementation):
    wide = torch.randn(4, 40)
    with use(implementation):
        assert_close(
            elementwise.silu_and_mul(wide[:, 8:24]).double(),
            silu_64(wide[:, 8:16]) * wide[:, 16:24].double(),
            **TOLERANCE[torch.float32],
        )
        assert_close(elementwise.add(wide.t(), wide.t()), 2 * wide.t())


def test_shapes_must_agree():
    with pytest.raises(UsageError, match="add takes two tensors of one shape"):
        elementwise.add(torch.ones(3), torch.ones(1))
    with pytest.raises(UsageError, match="rows of even length"):
        elementwise.silu_and_mul(torch.ones(2, 3))
