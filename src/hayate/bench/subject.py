"""What a benchmark runs on, and how its report looks."""

from __future__ import annotations

import datetime
import platform
from typing import Any

import torch

import hayate
from hayate.config import EngineOptions
from hayate.runtime.device import resolve_device
from hayate.runtime.llm import LLM
from hayate.runtime.loading import make_plan


def open_llm(
    *,
    model: str | None,
    preset: str | None,
    device: str,
    dtype: str,
    batch: int,
    length: int,
    **engine: Any,
) -> LLM:
    """The model to measure, with room for `batch` sequences of `length` tokens, or for as many as fit.

    engine: further options of `LLM`; they come before what is chosen here.
    """
    from hayate.models import load_config, preset_config

    if preset is not None:
        config = preset_config(preset)
    else:
        from hayate.checkpoint.hub import resolve_model

        assert model is not None
        model = str(resolve_model(model))
        config = load_config(model)
    options: dict[str, Any] = {
        "device": device,
        "dtype": dtype,
        "max_model_len": length + 1,
        "max_num_seqs": batch,
        **engine,
    }
    if "kv_memory" not in engine:
        most = EngineOptions(**options, kv_memory="90%")
        plan = make_plan(config, most, resolve_device(device))
        page_bytes = plan.kv_bytes // plan.num_pages
        pages = batch * (-(-(length + 2) // plan.page_size) + 1)
        options["kv_memory"] = min(pages * page_bytes, plan.kv_bytes)
    if preset is not None:
        return LLM.from_random(config, **options)
    assert model is not None
    return LLM(model, **options)


def random_prompts(llm: LLM, *, batch: int, length: int, seed: int = 0) -> list[list[int]]:
    """`batch` prompts of `length` random token ids."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, llm.config.vocab_size, (batch, length), generator=generator)
    return ids.tolist()


def environment(device: torch.device) -> dict[str, str]:
    """Where and with what a figure was measured."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_cpu_name() or name}, {torch.get_num_threads()} threads"
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    return {
        "device": name,
        "hayate": hayate.__version__,
        "torch": torch.__version__,
        "triton": triton_version,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def _cpu_name() -> str | None:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return None
