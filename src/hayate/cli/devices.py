"""The devices of this machine and their memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple


class Device(NamedTuple):
    """A device by the name `--device` takes. Sizes in bytes."""

    name: str
    description: str
    total_bytes: int
    free_bytes: int
    compute_capability: str | None = None  # GPUs: "9.0"


def list_devices() -> list[Device]:
    """The GPUs that torch can use, then the CPU."""
    import torch

    from hayate.runtime.device import free_bytes

    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            Device(
                f"cuda:{index}",
                properties.name,
                properties.total_memory,
                free_bytes(torch.device("cuda", index)),
                f"{properties.major}.{properties.minor}",
            )
        )
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = min(total, free_bytes(torch.device("cpu")))
    return [*found, Device("cpu", cpu_model(), total, free)]


def cpu_model() -> str:
    """'Intel(R) Xeon(R) ..., 2 cores' as far as the system tells."""
    names = [
        line.split(":", 1)[1].strip()
        for line in _read("/proc/cpuinfo").splitlines()
        if line.startswith("model name")
    ]
    cores = len(os.sched_getaffinity(0))
    return f"{names[0] if names else os.uname().machine}, {cores} core{'s' if cores > 1 else ''}"


def cpu_features() -> set[str]:
    """Instruction-set flags as the kernel names them: avx2, avx512_bf16, amx_bf16, ..."""
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith(("flags", "Features")):
            return set(line.split(":", 1)[1].split())
    return set()


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
