"""Parameters whose gradients are summed over processes, and whose optimizer states are divided among them.

Data parallel with sharded optimizer states (ZeRO stage 1, arXiv 1910.02054). Of N processes each

    computes the gradient of its rows of the batch        all weights, all gradients
    sums its N-th part of the gradients over all          reduce-scatter, while the backward pass still runs
    updates its N-th part of the weights                  master weights and moments of that part alone
    collects the other parts                              all-gather

so that a step moves as much as a plain all-reduce of the gradients would, and the optimizer's memory is divided by N.

Parameters lie one behind the other in flat buckets, in the order in which the backward pass finishes them, each from a
multiple of 256 elements on; process r owns the r-th of N equal parts of each bucket, whatever parameters these cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hayate.training.parallel import World

BLOCK = 256  # elements: quantized moments share a scale, and rounding its random numbers, by such blocks
BUCKET_ELEMENTS = 2**25  # 64 MiB in bf16: large enough for full bandwidth, small enough to overlap

# torch 2.13 renamed them; the old names stay for the versions before.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class ParameterSlice:
    """Elements begin, begin + 1, ... of a parameter taken as one vector."""

    name: str
    parameter: nn.Parameter  # the whole
    begin: int
    weight: Tensor  # the elements; the parameter itself where they are all
    gradient_view: Tensor | None = None  # None: in parameter.grad

    @property
    def gradient(self) -> Tensor:
        gradient = self.parameter.grad if self.gradient_view is None else self.gradient_view
        assert gradient is not None, f"{self.name} took no part in the loss"
        return gradient


def whole_parameters(model: nn.Module) -> list[ParameterSlice]:
    """Every parameter, as a slice of all its elements."""
    return [ParameterSlice(name, p, 0, p) for name, p in model.named_parameters()]


@dataclass
class _Bucket:
    """Parameters that travel together."""

    parameters: list[tuple[str, nn.Parameter, int]]  # and where each begins
    weights: Tensor
    gradients: Tensor
    own: slice  # what this process updates
    missing: int = 0  # gradients that this backward pass has not finished yet
    work: list[Any] = field(default_factory=list)  # communication under way

    def wait(self) -> None:
        for work in self.work:
            work.wait()
        self.work.clear()


class ShardedParameters:
    """The parameters of `model`, moved into buckets; all processes get the weights of the first.

    A step: `begin_reduction()` before its last backward pass, `end_reduction()` after it; then the gradients of
    `slices` are sums over all processes, to be applied to the weights of `slices`; `gather_weights()` if they were,
    and `clear_gradients()`.
    """

    def __init__(self, model: nn.Module, world: World) -> None:
        self.world = world
        self._reducing = False
        self._next = 0  # buckets are sent in one order, the same everywhere
        named = list(model.named_parameters())
        self._buckets = [self._bucket(group) for group in _groups(list(reversed(named)))]
        of_name = {s.name: s for bucket in self._buckets for s in _own_slices(bucket)}
        self.slices = [of_name[name] for name, _ in named if name in of_name]

    @torch.no_grad()
    def _bucket(self, group: list[tuple[str, nn.Parameter]]) -> _Bucket:
        begin, parameters = 0, []
        for name, parameter in group:
            parameters.append((name, parameter, begin))
            begin = _round_up(begin + parameter.numel(), BLOCK)
        part = _round_up(begin, BLOCK * self.world.size) // self.world.size
        first = group[0][1]
        weights = first.new_zeros(part * self.world.size)
        own = slice(self.world.rank * part, (self.world.rank + 1) * part)
        bucket = _Bucket(parameters, weights, torch.zeros_like(weights), own)
        for _, parameter, start in parameters:
            place = slice(start, start + parameter.numel())
            weights[place].copy_(parameter.flatten())
            parameter.data = weights[place].view_as(parameter)
            parameter.grad = bucket.gradients[place].view_as(parameter)
            parameter.register_post_accumulate_grad_hook(lambda _: self._finished(bucket))
        # Drawn from one seed they are equal already, but for machines whose libraries round differently.
        dist.broadcast(weights, 0)
        return bucket

    def begin_reduction(self) -> None:
        """The next backward pass is the last of this step: send each bucket when its gradients are finished."""
        self._reducing, self._next = True, 0
        for bucket in self._buckets:
            bucket.missing = len(bucket.parameters)

    def _finished(self, bucket: _Bucket) -> None:
        if not self._reducing:
            return
        bucket.missing -= 1
        while self._next < len(self._buckets) and self._buckets[self._next].missing == 0:
            self._send_next()

    def _send_next(self) -> None:
        bucket = self._buckets[self._next]
        part = bucket.gradients[bucket.own]
        bucket.work.append(_reduce_scatter(part, bucket.gradients, async_op=True))
        self._next += 1

    def end_reduction(self) -> None:
        """Wait for the sums."""
        self._reducing = False
        # What a parameter that had no part in the loss held up.
        while self._next < len(self._buckets):
            self._send_next()
        for bucket in self._buckets:
            bucket.wait()

    def gather_weights(self) -> None:
        """Fetch what the other processes updated."""
        for bucket in self._buckets:
            part = bucket.weights[bucket.own]
            bucket.work.append(_all_gather(bucket.weights, part, async_op=True))
        for bucket in self._buckets:
            bucket.wait()

    def clear_gradients(self) -> None:
        for bucket in self._buckets:
            bucket.gradients.zero_()


def _groups(named: list[tuple[str, nn.Parameter]]) -> list[list[tuple[str, nn.Parameter]]]:
    """Neighbours of one dtype, each group ended by the parameter that fills it."""
    groups: list[list[tuple[str, nn.Parameter]]] = []
    filled = 0
    for name, parameter in named:
        if not groups or filled >= BUCKET_ELEMENTS or groups[-1][0][1].dtype != parameter.dtype:
            groups.append([])
            filled = 0
        groups[-1].append((name, parameter))
        filled += parameter.numel()
    return groups


def _own_slices(bucket: _Bucket) -> Iterator[ParameterSlice]:
    for name, parameter, start in bucket.parameters:
        begin = max(start, bucket.own.start)
        end = min(start + parameter.numel(), bucket.own.stop)
        if begin < end:
            place = slice(begin, end)
            yield ParameterSlice(
                name, parameter, begin - start, bucket.weights[place], bucket.gradients[place]
            )


def _round_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple
