"""Sums and concatenations over the processes of a tensor-parallel group.

all_reduce: out = x_0 + x_1 + ... + x_{N-1}, the same bits on every process.

| bytes of x                          | how                                                                        |
|-------------------------------------|----------------------------------------------------------------------------|
| up to `ONE_SHOT_BYTES`, on GPUs     | every process reads all x_i over NVLink and adds them in the order of the  |
| that can address each other         | ranks: one kernel, one exchange (`torch.distributed._symmetric_memory`)    |
| above, or anything else             | `torch.distributed`: NCCL on GPUs, gloo on the CPU                         |

Both may be captured in a CUDA graph, as long as every process captures and replays the same graphs in the same order.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

# By number of processes: beyond, sending everything to everybody costs more than NCCL's two passes. From published
# measurements of such kernels on 8 GPUs with NVLink, and to be measured here.
ONE_SHOT_BYTES = {2: 512 * 2**10, 4: 256 * 2**10, 8: 128 * 2**10}
# A process can share memory with one group only: PyTorch numbers the meetings of a process, and another process of a
# second group, a new one, would wait for this one under another number.
_met = False
_ALIGNMENT = 16  # bytes that a thread of the one-shot kernel moves at once
# PyTorch 2.13 gave it another name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def all_reduce_reference(x: Tensor) -> Tensor:
    """The specification of `Communicator.all_reduce`: the sum over the default process group, in x's memory."""
    dist.all_reduce(x)
    return x


class Communicator:
    """What the processes of one model tell each other. All of them must make the same calls in the same order.

    Needs the default process group of `torch.distributed`, over the same `device` type on every process.

    dtype: of the tensors that `all_reduce` is for; others go the way of `torch.distributed`.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.device = device
        self._shared: Tensor | None = None  # memory that all processes can read
        limit = ONE_SHOT_BYTES.get(self.size, 0)
        if device.type == "cuda" and limit and dtype in (torch.bfloat16, torch.float32):
            self._shared = self._share(limit // dtype.itemsize, dtype)

    @property
    def has_one_shot(self) -> bool:
        """Whether small sums go by the one-shot kernel."""
        return self._shared is not None

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of x over all processes, of x's shape and dtype, contiguous; x may be overwritten."""
        if self._takes_one_shot(x):
            return self._one_shot(x)
        return all_reduce_reference(x.contiguous())

    def all_gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """The columns of all processes side by side: (R, sum(sizes)) from x (R, sizes[rank])."""
        widest = max(sizes)
        if x.shape[1] < widest:
            x = F.pad(x, (0, widest - x.shape[1]))
        gathered = x.new_empty(self.size * len(x), widest)
        _all_gather(gathered, x.contiguous())
        parts = gathered.view(self.size, len(x), widest).unbind(0)
        if min(sizes) == widest and len(x) == 1:
            return gathered.view(1, -1)
        return torch.cat([part[:, :size] for part, size in zip(parts, sizes, strict=True)], dim=1)

    def broadcast(self, x: Tensor) -> None:
        """Overwrite x with that of rank 0."""
        dist.broadcast(x, 0)

    def _takes_one_shot(self, x: Tensor) -> bool:
        shared = self._shared
        return (
            shared is not None
            and x.dtype == shared.dtype
            and 0 < x.numel() <= shared.numel()
            and x.is_contiguous()
            and x.nbytes % _ALIGNMENT == 0
            and x.data_ptr() % _ALIGNMENT == 0
        )

    def _one_shot(self, x: Tensor) -> Tensor:
        assert self._shared is not None
        buffer = self._shared[: x.numel()].view(x.shape)
        sum_of = torch.ops.symm_mem.one_shot_all_reduce_copy
        out: Tensor = sum_of(buffer, x, "sum", _group_name())
        return out

    def _share(self, num_elements: int, dtype: torch.dtype) -> Tensor | None:
        """Memory for the one-shot kernel; None, on all processes, where one cannot have it or it gives wrong sums."""
        global _met
        shared, failure = None, None
        try:
            import torch.distributed._symmetric_memory as symmetric

            if _met:
                raise RuntimeError("this process shared memory with an earlier group already")
            shared = symmetric.empty(num_elements, dtype=dtype, device=self.device)
        except Exception as error:  # no access between these GPUs, or a build of PyTorch without it
            failure = str(error) or type(error).__name__
        # Those who meet wait for all others: nobody may stay away.
        if self._all(failure is None):
            _met = True
            assert shared is not None
            try:
                symmetric.rendezvous(shared, _group_name())
            except Exception as error:
                failure = str(error) or type(error).__name__
        if self._all(failure is None):
            self._shared = shared
            x = torch.arange(1024, device=self.device).remainder(8).to(dtype) + self.rank
            right = x.clone()
            dist.all_reduce(right)
            equal = torch.equal(self._one_shot(x), right)  # small integers: exact in any order
            self._shared = None
            if self._all(equal):
                return shared
            failure = failure or "its sums are wrong"
        if self.rank == 0:
            why = (failure or "another process failed").splitlines()[0]
            warnings.warn(
                f"sums over GPUs go through NCCL only, which is slower: {why}", stacklevel=2
            )
        return None

    def _all(self, holds: bool) -> bool:
        """Whether `holds` on every process."""
        votes = torch.tensor([int(holds)], device=self.device)
        dist.all_reduce(votes, op=dist.ReduceOp.MIN)
        return bool(votes.item())


def _group_name() -> dist.GroupName:
    group = dist.group.WORLD
    assert group is not None
    return group.group_name
