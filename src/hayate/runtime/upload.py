"""Host arrays to the device: one copy a step, and no wait."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

_ALIGNMENT = 64  # bytes; Triton compiles other code for pointers that are not multiples of 16


def upload(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """The arrays as tensors on `device`, in one allocation; on the CPU they keep their memory.

    The copy starts from pinned memory, which PyTorch hands out again only when the copy is done: the host goes on at
    once, and the arrays may be overwritten.
    """
    if device.type == "cpu":
        return [torch.from_numpy(a) for a in arrays]
    starts = [0]
    for array in arrays:
        starts.append(starts[-1] + -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT)
    host = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=True)
    packed = host.numpy()
    for array, start in zip(arrays, starts, strict=False):
        packed[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
    there = host.to(device, non_blocking=True)
    return [
        there[start : start + array.nbytes]
        .view(getattr(torch, array.dtype.name))
        .view(tuple(array.shape))
        for array, start in zip(arrays, starts, strict=False)
    ]
