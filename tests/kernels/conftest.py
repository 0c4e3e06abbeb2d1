"""Kernel tests run Triton's interpreter on CPU tensors, with fresh memory full of NaN.

The interpreter is chosen when a kernel is decorated, so the variable must be set before any module
of `hayate.kernels` is imported: these tests are a pytest process of their own.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch

from hayate.kernels._dispatch import use


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel forgets to write shows up as NaN (or, in integers, as a huge number)."""

    def filled(make):
        def wrapper(*args, **kwargs):
            tensor = make(*args, **kwargs)
            if tensor.is_floating_point():
                return tensor.fill_(float("nan"))
            return (
                tensor
                if tensor.dtype == torch.bool
                else tensor.fill_(torch.iinfo(tensor.dtype).max)
            )

        return wrapper

    for owner, name in [
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ]:
        monkeypatch.setattr(owner, name, filled(getattr(owner, name)))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def triton_kernels():
    """Every operation inside the test runs its Triton kernel."""
    with use("triton"):
        yield
