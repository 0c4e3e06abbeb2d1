"""Softmax and its top-A form against float64."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch.testing import assert_close

from hayate.errors import UsageError
from hayate.kernels._dispatch import use
from hayate.kernels.softmax import softmax, softmax_topk

# exp in fp32 errs by 2 units in the last place and its argument, of size 20, by 20 * 2^-24; the sum
# adds sqrt(N) * 2^-24: below 4e-6. Then one rounding, 2^-11 in fp16, absolute 2^-25 below 6.1e-5.
TOLERANCE = {
    torch.float16: {"rtol": 6e-4, "atol": 6e-8},
    torch.float32: {"rtol": 4e-6, "atol": 1e-12},
}
DTYPES = list(TOLERANCE)

both = pytest.mark.parametrize("implementation", ["reference", "triton"])
dtypes = pytest.mark.parametrize("dtype", DTYPES)


@both
@dtypes
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 1000), (2, 2, 129)])
def test_softmax(shape, dtype, implementation):
    x = (torch.randn(shape) * 3).to(dtype)
    with use(implementation):
        y = softmax(x)
    assert y.dtype == dtype
    assert_close(y.double(), torch.softmax(x.double(), -1), **TOLERANCE[dtype])


@dtypes
@pytest.mark.parametrize("width", [33, 64, 200])
def test_softmax_of_rows_too_long_for_registers(width, dtype, monkeypatch):
    module = importlib.import_module("hayate.kernels.softmax")  # the package has the function
    monkeypatch.setattr(module, "_MAX_BLOCK", 32)
    # Rising values: the running maximum changes in every block.
    x = (torch.randn(3, width) + torch.linspace(0, 6, width)).to(dtype)
    with use("triton"):
        y = softmax(x)
    assert_close(y.double(), torch.softmax(x.double(), -1), **TOLERANCE[dtype])


@both
def test_softmax_with_masked_and_large_logits(implementation):
    x = torch.tensor([[1e4, 1e4, -1e4, -float("inf")], [-float("inf"), -3e4, -3e4, -float("inf")]])
    with use(implementation):
        y = softmax(x)
    assert_close(y, torch.tensor([[0.5, 0.5, 0, 0], [0, 0.5, 0.5, 0]]))


@both
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(
    ("tokens", "experts", "active"), [(1, 1, 1), (5, 8, 2), (3, 60, 4), (2, 200, 8), (6, 16, 3)]
)
@dtypes
def test_softmax_topk(tokens, experts, active, renormalize, dtype, implementation):
    logits = torch.randn(tokens, experts).to(dtype)
    with use(implementation):
        weights, indices = softmax_topk(logits, active, renormalize=renormalize)
    order = torch.argsort(logits.double(), descending=True, stable=True)[:, :active]
    expected = torch.softmax(logits.double(), -1).gather(1, order)
    if renormalize:
        expected /= expected.sum(-1, keepdim=True)
    assert weights.dtype == torch.float32
    assert indices.dtype == torch.int32
    assert torch.equal(indices.long(), order)
    assert_close(weights.double(), expected, **TOLERANCE[torch.float32])


@both
def test_equal_logits_go_to_the_lower_index(implementation):
    logits = torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    with use(implementation):
        _, indices = softmax_topk(logits, 4, renormalize=False)
    assert indices.tolist() == [[1, 2, 4, 0], [0, 1, 2, 3]]


@both
def test_masked_experts_are_chosen_last_and_once(implementation):
    logits = torch.tensor([[-float("inf"), 1.0, -float("inf")]])
    with use(implementation):
        weights, indices = softmax_topk(logits, 3, renormalize=True)
    assert indices.tolist() == [[1, 0, 2]]
    assert_close(weights, torch.tensor([[1.0, 0.0, 0.0]]))


def test_wrong_arguments_are_named():
    with pytest.raises(UsageError, match=r"num_active must be in 1\.\.4, got 5"):
        softmax_topk(torch.randn(2, 4), 5, renormalize=True)
    with pytest.raises(UsageError, match="E <= 1024"):
        softmax_topk(torch.randn(2, 2000), 5, renormalize=True)
