"""The processes that train one model together: who they are, how they meet, what they tell each other."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hayate.errors import DeviceError, HayateError, UsageError, WorkerFault
from hayate.runtime.device import resolve_device

_PATIENCE = timedelta(minutes=10)  # how long a process waits for another one


@dataclass(frozen=True)
class World:
    """The processes of a run, and which of them this is. Every method that talks must be called by all of them."""

    device: torch.device
    rank: int = 0
    size: int = 1
    local_size: int = 1  # processes on this machine
    host_group: Any = None  # for small values that steer the run
    checkpoint_group: Any = None  # apart from it: checkpoints are written by a thread of their own

    @classmethod
    def from_environment(cls, device: str) -> World:
        """The world that torchrun describes in RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; alone without it.

        device: `auto`, `cpu` or `cuda`; process LOCAL_RANK takes that GPU. NCCL connects GPUs, gloo CPUs.

        Raises UsageError when the variables make no sense or the device is one for a single process, DeviceError
        when there are not as many GPUs as processes, WorkerFault when the others do not come.
        """
        size = _variable("WORLD_SIZE", 1)
        if size == 1:
            return cls.single(resolve_device(device))
        rank, local_rank = _variable("RANK"), _variable("LOCAL_RANK")
        local_size = _variable("LOCAL_WORLD_SIZE", local_rank + 1)
        if rank >= size:
            raise UsageError(f"RANK {rank} must be below WORLD_SIZE {size}; start with torchrun")
        chosen = _device(device, local_rank, local_size)
        try:
            if chosen.type == "cuda":
                torch.cuda.set_device(chosen)
                dist.init_process_group("nccl", timeout=_PATIENCE, device_id=chosen)
            else:
                dist.init_process_group("gloo", timeout=_PATIENCE)
        except ValueError as error:  # MASTER_ADDR or MASTER_PORT is missing
            raise UsageError(f"{error}; start with torchrun, or set what it sets") from None
        except (dist.DistError, RuntimeError) as error:
            raise WorkerFault(
                f"process {rank} of {size} could not join the others: {str(error).splitlines()[0]}"
            ) from error
        return cls.of_process_group(chosen, local_size=local_size)

    @classmethod
    def single(cls, device: torch.device) -> World:
        """One process: nothing is sent."""
        return cls(device)

    @classmethod
    def of_process_group(cls, device: torch.device, *, local_size: int = 1) -> World:
        """The world of torch.distributed's default group, which somebody (Ray Train) has initialised."""
        if dist.get_world_size() == 1:
            return cls(device)
        groups = (dist.new_group(backend="gloo", timeout=_PATIENCE) for _ in range(2))
        return cls(device, dist.get_rank(), dist.get_world_size(), local_size, *groups)

    def __enter__(self) -> World:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # After an error others may be gone, and a tidy farewell would wait for them.
        if self.size > 1 and error is None:
            dist.barrier(group=self.host_group)
            dist.destroy_process_group()

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum_on_host(self, value: int) -> int:
        """The sum of everybody's `value`."""
        return self._reduced(value, dist.ReduceOp.SUM, self.host_group)

    def max_on_host(self, value: int) -> int:
        """The largest of everybody's `value`."""
        return self._reduced(value, dist.ReduceOp.MAX, self.host_group)

    def any_failed(self, failed: bool) -> bool:
        """Whether it failed anywhere, asked among those who write a checkpoint. Also keeps them in step."""
        return bool(self._reduced(int(failed), dist.ReduceOp.MAX, self.checkpoint_group))

    def _reduced(self, value: int, operation: Any, group: Any) -> int:
        if self.size == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.int64)
        dist.all_reduce(tensor, operation, group=group)
        return int(tensor)

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each of the tensors, of one dtype, by the sum of everybody's."""
        if self.size == 1:
            return
        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    def norm(self, part: Tensor) -> Tensor:
        """The norm of a vector of which each process knows the norm of its part; the same bits everywhere."""
        if self.size == 1:
            return part
        part = part.reshape(1).to(self.device)  # of nothing it is on the CPU
        parts = [torch.empty_like(part) for _ in range(self.size)]
        dist.all_gather(parts, part)
        return torch.cat(parts).norm()

    @contextmanager
    def peer_errors(self, advice: str) -> Iterator[None]:
        """Errors of communication become WorkerFault, which ends with `advice`."""
        try:
            yield
        except HayateError:
            raise
        except RuntimeError as error:  # gloo raises nothing more particular
            text = str(error)
            lost = isinstance(error, dist.DistError) or "gloo" in text.lower() or "NCCL" in text
            if self.size == 1 or not lost:
                raise
            cause = re.sub(r"^\[[^\]]*\] ", "", text.splitlines()[0]).split(". ")[0]
            raise WorkerFault(
                f"process {self.rank} of {self.size} lost contact with another one, which has failed or was killed "
                f"({cause}); {advice}"
            ) from error


def _variable(name: str, default: int | None = None) -> int:
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    if text is None:
        raise UsageError(f"WORLD_SIZE is set but {name} is not; start with torchrun, or unset both")
    if not text.isdecimal():
        raise UsageError(f"{name} {text!r} must be a whole number, as torchrun sets it")
    return int(text)


def _device(text: str, local_rank: int, local_size: int) -> torch.device:
    if text not in ("auto", "cpu", "cuda"):
        raise UsageError(
            f"--device {text} names one GPU, but several processes train; leave it out, or say cuda or cpu"
        )
    if text == "cpu" or (text == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    resolve_device("cuda")
    count = torch.cuda.device_count()
    if max(local_size, local_rank + 1) > count:
        raise DeviceError(
            f"{max(local_size, local_rank + 1)} processes on this machine want a GPU each, and {count} can be seen; "
            f"start at most {count} (torchrun --nproc-per-node {count}), or use --device cpu"
        )
    return resolve_device(f"cuda:{local_rank}")
