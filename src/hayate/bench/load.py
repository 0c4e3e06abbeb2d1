"""`hayate bench load`: bytes a second from safetensors to the device, and from process start to the first token."""

from __future__ import annotations

import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from hayate.bench.subject import environment
from hayate.checkpoint.index import Checkpoint
from hayate.checkpoint.reader import load
from hayate.checkpoint.writer import save
from hayate.errors import HayateError, UsageError
from hayate.models import load_config, preset_config
from hayate.models.decoder import CausalLM, build_model, init_random
from hayate.models.weights import IGNORED_TENSORS, placements
from hayate.runtime.device import resolve_device


def run(
    *,
    model: str | None,
    preset: str | None,
    device: str,
    runs: int,
    report: Callable[[str], None],
    **_: Any,
) -> dict[str, Any]:
    """Load a folder (or a preset written to a temporary folder first) `runs` times from the page cache, once cold."""
    target = resolve_device(device)
    with tempfile.TemporaryDirectory() as scratch:
        if preset is not None:
            folder = Path(scratch)
            write_random(preset, folder, target)
        else:
            from hayate.checkpoint.hub import resolve_model

            assert model is not None
            folder = resolve_model(model)
        if load_config(folder).nf4_modules is not None:
            raise UsageError(
                f"{preset or model}: `bench load` measures plain tensors; NF4 weights are packed while they are loaded"
            )
        return _measure(folder, preset or str(model), target, runs, report)


def write_random(preset: str, folder: Path, device: torch.device) -> None:
    """A checkpoint of `preset` with random weights, as a Hugging Face folder without a tokenizer."""
    import json

    from hayate.models.presets import PRESETS

    config = preset_config(preset)
    if config.nf4_modules is not None:
        raise UsageError(f"--preset {preset}: `bench load` measures plain tensors, not NF4")
    network = build_model(config, device=device, dtype=torch.bfloat16)
    init_random(network)
    save(dict(network.named_parameters()), placements(config), folder)
    (folder / "config.json").write_text(json.dumps(PRESETS[preset]))


def _measure(
    folder: Path, name: str, device: torch.device, runs: int, report: Callable[[str], None]
) -> dict[str, Any]:
    checkpoint = Checkpoint.open(folder)
    config = load_config(folder)
    network = build_model(config, device=device, dtype=getattr(torch, config.dtype))
    ceiling = _read_files(checkpoint, passes=4)
    report(f"ceiling: {ceiling / 1e9:.2f} GB/s reading the files into memory, page cache warm")
    _check(checkpoint, network)
    report("gate: the loaded bytes are the file's bytes")
    warm = [_load_rate(checkpoint, network) for _run in range(runs)]
    _drop_from_cache(checkpoint)
    cold_read = _read_files(checkpoint)
    _drop_from_cache(checkpoint)
    cold = _load_rate(checkpoint, network)
    rate = statistics.median(warm)
    report(f"hayate: {rate / 1e9:.2f} GB/s from page cache ({rate / ceiling:.0%} of reading alone)")
    report(f"hayate: {cold / 1e9:.2f} GB/s from disk ({cold / cold_read:.0%} of reading alone)")
    return {
        "bench": "load",
        "model": name,
        "bytes": checkpoint.num_bytes,
        "gbs_page_cache": round(rate / 1e9, 3),
        "runs_gbs": [round(r / 1e9, 3) for r in warm],
        "gbs_read_only": round(ceiling / 1e9, 3),
        "gbs_disk": round(cold / 1e9, 3),
        "gbs_disk_read_only": round(cold_read / 1e9, 3),
        "share_of_ceiling": round(rate / ceiling, 4),
        **environment(device),
    }


def _load_rate(checkpoint: Checkpoint, network: CausalLM) -> float:
    start = time.perf_counter()
    load(
        checkpoint,
        dict(network.named_parameters()),
        placements(network.config),
        ignore=IGNORED_TENSORS,
    )
    if next(network.parameters()).is_cuda:
        torch.cuda.synchronize()
    return checkpoint.num_bytes / (time.perf_counter() - start)


def _check(checkpoint: Checkpoint, network: CausalLM) -> None:
    """Poison the parameters, load, and compare some tensors with the safetensors library's reading."""
    from safetensors import safe_open

    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(float("nan"))
    _load_rate(checkpoint, network)
    parameters = dict(network.named_parameters())
    names = [n for n in checkpoint.tensors if n in parameters]
    for name in names[:: max(len(names) // 8, 1)]:
        with safe_open(checkpoint.tensors[name].file, "pt") as file:
            if not torch.equal(file.get_tensor(name), parameters[name].cpu()):
                raise HayateError(f"tensor {name} was not loaded as it stands in the file")
    if any(bool(p.isnan().any()) for p in parameters.values()):
        raise HayateError("a parameter was left unfilled")


def _read_files(checkpoint: Checkpoint, passes: int = 1) -> float:
    """Bytes a second of reading all files and dropping the bytes, by a thread a core; the best pass."""
    jobs, chunk = os.cpu_count() or 1, 1 << 24
    parts = [
        (file, begin) for file in checkpoint.files for begin in range(0, file.stat().st_size, chunk)
    ]
    buffers: dict[int, memoryview] = {}

    def read(part: tuple[Path, int]) -> int:
        file, begin = part
        buffer = buffers.setdefault(threading.get_ident(), memoryview(bytearray(chunk)))
        with open(file, "rb", buffering=0) as raw:
            return os.preadv(raw.fileno(), [buffer], begin)

    best = 0.0
    with ThreadPoolExecutor(jobs) as pool:
        for _pass in range(passes):
            start = time.perf_counter()
            count = sum(pool.map(read, parts))
            best = max(best, count / (time.perf_counter() - start))
    return best


def _drop_from_cache(checkpoint: Checkpoint) -> None:
    """Ask the kernel to forget the files' pages, so that the next read comes from the disk."""
    for file in checkpoint.files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
