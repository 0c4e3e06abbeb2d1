"""Norms against their formula in float64."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from hayate.errors import UsageError
from hayate.kernels._dispatch import use
from hayate.kernels.norm import Norm, apply_norm, layernorm, layernorm1p, rmsnorm, rmsnorm_residual

EPS = 1e-5
SHAPES = [(1, 1), (3, 7), (5, 64), (2, 1000), (2, 3, 257)]
# The result is rounded once: half a unit in the last place, relative 2^-11 in fp16 and 2^-24 in
# fp32. The fp32 sums over up to 1000 values before it add about sqrt(1000) * 2^-24 = 2e-6. Where a
# product nears zero (mean removed) the same errors are absolute, at values of order one.
TOLERANCE = {
    torch.float16: {"rtol": 6e-4, "atol": 6e-5},
    torch.float32: {"rtol": 4e-6, "atol": 4e-6},
}
DTYPES = list(TOLERANCE)


def rmsnorm_64(x, weight):
    x = x.double()
    return x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


def layernorm1p_64(x, weight, bias):
    x = x.double()
    y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + EPS).sqrt()
    return y * (1 + weight.double()) + (0 if bias is None else bias.double())


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rmsnorm(shape, dtype, implementation):
    x = torch.randn(shape).to(dtype) * 3
    weight = torch.rand(shape[-1]).to(dtype) + 0.5
    with use(implementation):
        y = rmsnorm(x, weight, EPS)
    assert y.dtype == dtype
    assert_close(y.double(), rmsnorm_64(x, weight), **TOLERANCE[dtype])


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rmsnorm_residual_adds_before_rounding(shape, dtype, implementation):
    x, residual = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    weight = torch.rand(shape[-1]).to(dtype) + 0.5
    with use(implementation):
        y, total = rmsnorm_residual(x, residual, weight, EPS)
    expected = x.double() + residual.double()
    assert_close(total.double(), expected, **TOLERANCE[dtype])
    # The norm is taken of the sum as it is, not of its rounded form.
    assert_close(y.double(), rmsnorm_64(expected, weight), **TOLERANCE[dtype])


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_layernorm1p(shape, with_bias, dtype, implementation):
    # Small whole numbers around 5: exact sums, so that the removed mean costs no accuracy.
    x = (torch.randint(-8, 9, shape) + 5).to(dtype)
    weight = torch.randn(shape[-1]).to(dtype) * 0.1
    bias = torch.randn(shape[-1]).to(dtype) if with_bias else None
    with use(implementation):
        y = layernorm1p(x, weight, bias, EPS)
    assert_close(y.double(), layernorm1p_64(x, weight, bias), **TOLERANCE[dtype])


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 3, 257)])
def test_layernorm(shape, with_bias, dtype, implementation):
    x = (torch.randint(-8, 9, shape) + 5).to(dtype)
    weight = torch.rand(shape[-1]).to(dtype) + 0.5
    bias = torch.randn(shape[-1]).to(dtype) if with_bias else None
    with use(implementation):
        y = layernorm(x, weight, bias, EPS)
    assert_close(y.double(), layernorm1p_64(x, weight.double() - 1, bias), **TOLERANCE[dtype])


def test_layernorm1p_does_not_cancel():
    """With a mean 1000 times the deviation, E[x^2] - E[x]^2 would be wrong in the first digit."""
    x = 1000 + torch.randn(4, 300)
    with use("triton"):
        y = layernorm1p(x, torch.zeros(300), torch.zeros(300), EPS)
    # The mean is known to 1000 * 2^-24 * a few, absolute; the deviation is one.
    assert_close(y.double(), layernorm1p_64(x, torch.zeros(300), None), rtol=1e-5, atol=3e-4)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_rows_with_a_stride(implementation):
    """A slice of a wider tensor, as QK-norm takes it from packed q, k, v."""
    packed = torch.randn(6, 96)
    x, weight = packed[:, 32:64], torch.rand(32)
    with use(implementation):
        y = rmsnorm(x, weight, EPS)
    assert y.is_contiguous()
    assert_close(y.double(), rmsnorm_64(x, weight), **TOLERANCE[torch.float32])


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_apply_norm_chooses_by_kind(implementation):
    x, weight, bias = torch.randn(2, 32), torch.rand(32), torch.randn(32)
    with use(implementation):
        rms = apply_norm(x, Norm("rmsnorm", weight, None, EPS))
        layer = apply_norm(x, Norm("layernorm1p", weight, bias, EPS))
        plain = apply_norm(x, Norm("layernorm", weight, bias, EPS))
    assert_close(rms.double(), rmsnorm_64(x, weight), **TOLERANCE[torch.float32])
    assert_close(layer.double(), layernorm1p_64(x, weight, bias), **TOLERANCE[torch.float32])
    expected = layernorm1p_64(x, weight.double() - 1, bias)
    assert_close(plain.double(), expected, **TOLERANCE[torch.float32])


def test_no_rows():
    with use("triton"):
        assert rmsnorm(torch.randn(0, 16), torch.rand(16), EPS).shape == (0, 16)


def test_wrong_weight_is_named():
    with pytest.raises(UsageError, match=r"weight has shape \(8,\), but x has rows of 16"):
        rmsnorm(torch.randn(2, 16), torch.rand(8), EPS)
