"""GPU tests: bf16 kernels on real hardware against float64, fresh memory full of NaN."""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(items):
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if "tests/gpu" in str(item.path):
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan():
    """`torch.empty` and its relatives return NaN (the largest value for integers): unwritten outputs show."""
    if not torch.cuda.is_available():
        yield
        return
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
