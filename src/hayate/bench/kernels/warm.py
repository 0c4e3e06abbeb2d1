"""Compiling all kernels of the benchmark at once, in processes of their own, into Triton's disk cache."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from pathlib import Path

import torch

from hayate.bench.kernels.case import Setting
from hayate.kernels._triton import triton

_MAX_WORKERS = 12  # each holds a CUDA context, half a gigabyte


def compile_all(sizes: Mapping[str, int], on: Setting, report: Callable[[str], None]) -> None:
    """Run every case once, in parallel. `sizes` holds the number of cases of each family.

    Does nothing where the cache was filled by the same sources. A case that fails here fails again,
    and is reported, where it is checked.
    """
    stamp = _stamp(on)
    workers = min(os.cpu_count() or 1, _MAX_WORKERS)
    if stamp.exists() or workers == 1:
        return
    jobs = [(name, index, on) for name, count in sizes.items() for index in range(count)]
    start = time.perf_counter()
    report(f"compiling: {len(jobs)} cases by {workers} processes")
    # A process that has used CUDA cannot fork one that will.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        list(pool.map(_compile, jobs))
    stamp.parent.mkdir(parents=True, exist_ok=True)
    stamp.touch()
    report(f"compiling: {time.perf_counter() - start:.0f} s")


def _compile(job: tuple[str, int, Setting]) -> None:
    name, index, on = job
    families = import_module("hayate.bench.kernels").FAMILIES
    torch.cuda.set_device(on.device)
    try:
        case = families[name](on)[index]
        case.run(case.make())
        torch.cuda.synchronize()
    except Exception:  # the gate runs it again, and says what is wrong with it
        return


def _stamp(on: Setting) -> Path:
    """A file in Triton's cache that stands for everything its contents depend on."""
    kernels = Path(__file__).parents[2] / "kernels"
    sources = [*sorted(kernels.glob("*.py")), *sorted(Path(__file__).parent.glob("*.py"))]
    key = hashlib.sha256(b"".join(source.read_bytes() for source in sources))
    capability = torch.cuda.get_device_capability(on.device)
    key.update(repr((triton.__version__, torch.__version__, capability, on.dtype)).encode())
    return Path(triton.knobs.cache.dir) / f"hayate-bench-{key.hexdigest()[:24]}"
