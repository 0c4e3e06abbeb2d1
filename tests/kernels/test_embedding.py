"""Embedding: data movement, so compared exactly; the scaled form against float64."""

from __future__ import annotations

import pytest
import torch

from hayate.kernels._dispatch import use
from hayate.kernels.embedding import embedding


def run(
    num_tokens: int, width: int, ids: torch.dtype, dtype: torch.dtype, how: str, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The result, and the rows picked one by one."""
    torch.manual_seed(0)
    weight = torch.randn(37, width).to(dtype)
    token_ids = torch.randint(0, 37, (num_tokens,), dtype=ids)
    with use(how):  # type: ignore[arg-type]
        found = embedding(token_ids, weight, scale)
    expected = [weight[int(token)] for token in token_ids]
    return found, torch.stack(expected) if expected else torch.empty(0, width, dtype=dtype)


@pytest.mark.parametrize("ids", [torch.int64, torch.int32])
@pytest.mark.parametrize(("num_tokens", "width"), [(1, 64), (5, 48), (3, 1500), (0, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("how", ["reference", "triton"])
def test_rows_are_copied(
    num_tokens: int, width: int, ids: torch.dtype, dtype: torch.dtype, how: str
) -> None:
    # bf16 is only moved here, which Triton's interpreter does exactly.
    found, expected = run(num_tokens, width, ids, dtype, how)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("how", "dtype"),
    [
        ("reference", torch.bfloat16),
        ("reference", torch.float16),
        ("triton", torch.float16),
        ("triton", torch.float32),
    ],
)
def test_scale(how: str, dtype: torch.dtype) -> None:
    found, rows = run(4, 80, torch.int64, dtype, how, scale=48.0**0.5)
    # One rounding of the scale and one of the product in fp32, then one to the dtype.
    rtol = torch.finfo(dtype).eps / 2 + 2**-22
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), rows.double() * 48.0**0.5, rtol=rtol, atol=0)
