"""Which implementation of an operation runs: the reference (PyTorch), Triton, or the native CPU one.

`auto` picks by device: Triton for CUDA tensors; for CPU tensors the native kernel where one fits, else the
reference. `use("reference")` forces the PyTorch form everywhere, `use("triton")` the Triton kernel, also on
CPU tensors when Triton's interpreter is on (`TRITON_INTERPRET=1`, the tests' way to run every kernel without
a GPU). A forced choice never falls back silently.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Literal

import torch

Implementation = Literal["auto", "reference", "triton", "native"]

_forced: Implementation = "auto"


@contextmanager
def use(implementation: Implementation) -> Iterator[None]:
    """Force one implementation for all operations inside the `with` block."""
    global _forced
    previous, _forced = _forced, implementation
    try:
        yield
    finally:
        _forced = previous


# Of the thread: engines with and without it may run side by side.
_batch_invariant: ContextVar[bool] = ContextVar("batch_invariant", default=False)


@contextmanager
def batch_invariant(enabled: bool = True) -> Iterator[None]:
    """Inside the `with` block a row's result does not depend on the other rows, to the last bit.

    `linear`, `attention`, `moe_route` and `moe_mlp` then take every sum in an order that neither the number
    of rows nor the cutting of a sequence into steps changes; all other operations do so anyway. A CUDA graph
    captured inside keeps those kernels.
    """
    token = _batch_invariant.set(enabled)
    try:
        yield
    finally:
        _batch_invariant.reset(token)


def is_batch_invariant() -> bool:
    """True inside `batch_invariant()`."""
    return _batch_invariant.get()


def interpreting() -> bool:
    """True when Triton kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def implementation_for(x: torch.Tensor) -> Literal["reference", "triton", "native"]:
    """The implementation to use for an operation whose first operand is `x`."""
    if _forced != "auto":
        if _forced == "triton" and not (x.is_cuda or interpreting()):
            raise ValueError(
                f"the Triton kernel was forced, but the tensor is on {x.device}; set TRITON_INTERPRET=1"
            )
        return _forced
    if x.requires_grad and torch.is_grad_enabled():
        return "reference"
    return "triton" if x.is_cuda else "native"


@cache
def has_pdl(device_index: int) -> bool:
    """Programmatic dependent launch exists from compute capability 9.0 on."""
    return torch.cuda.get_device_capability(device_index) >= (9, 0)
