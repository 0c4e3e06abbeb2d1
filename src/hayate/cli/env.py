"""`hayate env`: versions, devices, and what is missing here and what that costs."""

from __future__ import annotations

import json
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hayate import __version__
from hayate.cli import options
from hayate.cli.layout import aligned
from hayate.config import format_bytes

if TYPE_CHECKING:
    from hayate.cli.devices import Device

PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "tokenizers",
    "jinja2",
    "huggingface_hub",
    "safetensors",
    "gguf",
    "transformers",
)
CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def env(as_json: options.Json = False, verbose: options.Verbose = False) -> None:
    """Show versions, devices, CPU features, and what is missing and what that costs."""
    report = collect()
    if as_json:
        print(json.dumps(report, ensure_ascii=False))
    else:
        print(aligned(_rows(report)))


def collect() -> dict[str, Any]:
    """Everything shown, sizes in bytes; `missing` is a list of sentences."""
    import torch

    from hayate.checkpoint.smollm2 import cache_home
    from hayate.cli.devices import cpu_features, list_devices

    devices, features = list_devices(), cpu_features()
    versions = {"hayate": __version__, **{name: _version(name) for name in PACKAGES}}
    compiler = c_compiler()
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": versions,
        "torch_cuda": torch.version.cuda,
        "devices": [device._asdict() for device in devices],
        "cpu_features": {name: name in features for name in CPU_FEATURES},
        "c_compiler": compiler,
        "cache": str(cache_home()),
        "missing": _missing(versions, devices, features, compiler, torch.version.cuda),
    }


def c_compiler() -> str | None:
    """The compiler that native code is built with: the first of cc, gcc, clang."""
    return shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _missing(
    versions: dict[str, str | None],
    devices: list[Device],
    features: set[str],
    compiler: str | None,
    torch_cuda: str | None,
) -> list[str]:
    has_gpu = any(device.compute_capability for device in devices)
    found = []
    if not has_gpu and Path("/proc/driver/nvidia").exists() and torch_cuda is None:
        found.append(
            "there is an NVIDIA driver, but this torch is a CPU build: the GPU stays idle; "
            "install a CUDA build of torch"
        )
    elif not has_gpu:
        found.append("no NVIDIA GPU that torch can use: models run on the CPU")
    if versions["triton"] is None:
        found.append("no triton: the GPU kernels cannot run; pip install triton")
    if compiler is None:
        found.append(
            "no C compiler: the GPU kernels cannot start and the CPU runs the plain PyTorch form, "
            "which is slower; install gcc or clang"
        )
    if not has_gpu and "avx512_bf16" not in features:
        found.append("the CPU has no avx512_bf16: bfloat16 is widened in software")
    if versions["transformers"] is None:
        found.append("no transformers: `hayate bench --compare transformers` cannot run")
    return found


def _rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [("python", report["python"]), ("system", report["system"])]
    rows += [(name, found or "missing") for name, found in report["packages"].items()]
    rows.append(("torch build", f"CUDA {report['torch_cuda']}" if report["torch_cuda"] else "CPU"))
    for device in report["devices"]:
        capability = device["compute_capability"]
        text = f"{device['description']}, {format_bytes(device['total_bytes'])}"
        text += f", {format_bytes(device['free_bytes'])} free"
        if capability:
            text += f", compute capability {capability}"
        rows.append((device["name"], text))
    features = [name for name, there in report["cpu_features"].items() if there]
    rows.append(("CPU features", ", ".join(features) or "none of " + ", ".join(CPU_FEATURES)))
    rows.append(("C compiler", report["c_compiler"] or "missing"))
    rows.append(("cache", report["cache"]))
    return rows + [("missing", sentence) for sentence in report["missing"]]
