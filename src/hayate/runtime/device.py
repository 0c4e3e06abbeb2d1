"""The device a model runs on: choosing it, and how much memory it has and used."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from hayate.errors import DeviceError, GpuFault, HayateError, OutOfMemory, UsageError


def resolve_device(text: str) -> torch.device:
    """`auto`, `cpu`, `cuda`, `cuda:N` or `N` -> a device that is there.

    Raises UsageError for other texts, DeviceError when the GPU asked for cannot be used.
    """
    name = text.strip().lower()
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if name == "cpu":
        return torch.device("cpu")
    index = "0" if name == "cuda" else name.removeprefix("cuda:")
    if not index.isdecimal():
        raise UsageError(f"--device {text!r} is unknown; use auto, cpu, cuda, cuda:N or N")
    if reason := cuda_unavailable():
        raise DeviceError(f"CUDA is not available: {reason}; use --device cpu, or auto")
    if int(index) >= torch.cuda.device_count():
        raise DeviceError(
            f"--device {text} asks for GPU {index}, but there are {torch.cuda.device_count()} (counted from 0)"
        )
    capability = torch.cuda.get_device_capability(int(index))
    if capability < (8, 0):
        raise DeviceError(
            f"GPU {index} has compute capability {capability[0]}.{capability[1]}; hayate's kernels need 8.0"
        )
    return torch.device("cuda", int(index))


def cuda_unavailable() -> str | None:
    """Why CUDA cannot be used, or None if it can."""
    if torch.version.cuda is None:
        return f"this PyTorch ({torch.__version__}) is built without CUDA"
    if torch.cuda.is_available():
        return None
    try:
        torch.cuda.init()
    except Exception as error:
        return str(error).splitlines()[0].rstrip(".")
    return "no NVIDIA GPU is visible"


def free_bytes(device: torch.device) -> int:
    """Memory that can still be taken on `device`; on the CPU, within the limits of the control group."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + reserved
    available = 2**63 - 1
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        stat = (group / "memory.stat").read_text().split()
    except (OSError, ValueError):
        return available
    if limit.isdecimal():
        cached = int(stat[stat.index("inactive_file") + 1]) if "inactive_file" in stat else 0
        available = min(available, int(limit) - used + cached)
    return max(available, 0)


@contextmanager
def device_errors(device: torch.device, *, doing: str) -> Iterator[None]:
    """Work on `device`; PyTorch's errors of memory and of the GPU become OutOfMemory and GpuFault."""
    advice = "Use a smaller --kv-memory or --max-model-len, or free memory"
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            f"{device} ran out of memory while {doing}: {str(error).splitlines()[0]} {advice}"
        ) from error
    except torch.AcceleratorError as error:
        raise GpuFault(f"the GPU failed while {doing}: {str(error).splitlines()[0]}") from error
    except RuntimeError as error:  # what PyTorch and Triton raise without a class of their own
        text = str(error)
        if isinstance(error, HayateError):
            raise
        if "can't allocate memory" in text or "ALLOC_FAILED" in text:
            raise OutOfMemory(
                f"{device} ran out of memory while {doing}: {text.splitlines()[0]} {advice}"
            ) from error
        if "CUDA error" in text or "Triton Error [CUDA]" in text:
            raise GpuFault(f"the GPU failed while {doing}: {text.splitlines()[0]}") from error
        raise


class Stopwatch:
    """Times the work begun inside `with`. On a GPU by its own clock: nothing is waited for."""

    def __init__(self, device: torch.device) -> None:
        self._events: list[torch.cuda.Event] | None = None
        if device.type == "cuda":
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def __enter__(self) -> Stopwatch:
        self._begin = time.perf_counter()
        if self._events is not None:
            self._events[0].record()
        return self

    def __exit__(self, *_: object) -> None:
        self._end = time.perf_counter()
        if self._events is not None:
            self._events[1].record()

    def seconds(self) -> float:
        """The time taken; to be asked when the work is known to be done."""
        if self._events is None:
            return self._end - self._begin
        return self._events[0].elapsed_time(self._events[1]) / 1000


def supports_bfloat16(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.is_bf16_supported()


def peak_memory_bytes(device: torch.device) -> dict[str, int]:
    """Largest memory use so far: `host` (resident, of the process) and, on a GPU, `device`."""
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = {"host": rss * (1 if sys.platform == "darwin" else 1024)}
    if device.type == "cuda":
        result["device"] = torch.cuda.max_memory_allocated(device)
    return result
