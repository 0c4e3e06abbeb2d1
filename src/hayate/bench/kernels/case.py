"""What `hayate bench kernels` runs: a case is one kernel at one size, with its truth and its least work."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from hayate.kernels.norm import Norm

_POOL_SIZE = 2**25


@cache
def _pool(dtype: torch.dtype) -> Tensor:
    return torch.randn(_POOL_SIZE, dtype=dtype)


@dataclass(frozen=True)
class Case:
    """One kernel at one size.

    `error(operands, result)` is the deviation of a result from the truth, as a multiple of what
    rounding allows: above 1, or NaN, the kernel is wrong. `num_bytes` and `flops` are the least that
    one call must move and compute. `rivals` do the same with PyTorch, at least the heavy part of it.
    """

    shape: str
    make: Callable[[], Any]  # one set of random operands
    run: Callable[[Any], Any]
    error: Callable[[Any, Any], float]
    num_bytes: float
    flops: float = 0.0
    rivals: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Setting:
    """Where cases run and in which dtype; it draws their operands."""

    device: torch.device
    dtype: torch.dtype

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def width(self) -> int:
        """Bytes of one value."""
        return self.dtype.itemsize

    def draw(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normally distributed values; on a CPU a window of one long draw, which is much faster."""
        count = math.prod(shape)
        if self.gpu or count >= _POOL_SIZE:
            return torch.randn(*shape, dtype=self.dtype, device=self.device).mul_(scale)
        start = int(torch.randint(_POOL_SIZE - count, ()))
        return _pool(self.dtype)[start : start + count].view(shape) * scale

    def integers(self, *shape: int, below: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(0, below, shape, dtype=dtype, device=self.device)

    def norm(self, kind: str, size: int) -> Norm:
        """Weights near those of a trained model: 1, or 0 where the kernel adds one."""
        if kind == "rmsnorm":
            return Norm("rmsnorm", 1 + self.draw(size, scale=0.1), None, 1e-5)
        return Norm("layernorm1p", self.draw(size, scale=0.1), self.draw(size), 1e-5)

    def limit(self, roundings: int, depth: int = 1) -> float:
        """The largest relative error of a correct result.

        A rounding to the dtype is off by at most its unit roundoff, and over many values independent
        roundings add as squares; `roundings` counts them, one that is doubled as four. A sum of
        `depth` terms in fp32 walks randomly, sqrt(depth) times 2^-24; four times that never happens.
        """
        unit = torch.finfo(self.dtype).eps / 2
        return roundings**0.5 * unit + 4 * depth**0.5 * 2.0**-24


def tensors(x: Any) -> list[Tensor]:
    """Those of operands or of a result: a tensor, or a tuple of tensors and None."""
    return [t for t in (x if isinstance(x, tuple) else (x,)) if t is not None]


def relative(actual: Tensor, wanted: Tensor) -> float:
    """||actual - wanted|| / ||wanted|| in float64; NaN if anything is NaN."""
    return float((actual.double() - wanted).norm() / wanted.norm())


def wrong_unless(correct: bool) -> float:
    """The error of a result that must be exact."""
    return 0.0 if correct else float("inf")


def norm_64(x: Tensor, norm: Norm) -> Tensor:
    """The norm's formula in float64."""
    x, weight = x.double(), norm.weight.double()
    if norm.kind == "rmsnorm":
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * weight
    assert norm.bias is not None
    x = x - x.mean(-1, keepdim=True)
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps)
    return x * scale * (1 + weight) + norm.bias.double()
