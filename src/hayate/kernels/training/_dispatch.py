"""Which implementation of a differentiable operation runs.

`reference` is the formula in PyTorch, differentiated by autograd; `triton` the kernels; `native` what is
fastest on a CPU. As in `hayate.kernels._dispatch`, but operands that need gradients change nothing here.
"""

from __future__ import annotations

from typing import Literal

import torch

from hayate.kernels._dispatch import implementation_for


def implementation(x: torch.Tensor) -> Literal["reference", "triton", "native"]:
    """The implementation to use for an operation whose first operand is `x`."""
    with torch.no_grad():
        return implementation_for(x)
