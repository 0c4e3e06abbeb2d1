"""hayate: runs a Hugging Face checkpoint folder as it is, on an NVIDIA GPU or on the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["LLM", "AsyncLLM", "SamplingParams", "StructuredOutput", "VisionCore", "__version__"]

if TYPE_CHECKING:
    from hayate.runtime.async_llm import AsyncLLM
    from hayate.runtime.llm import LLM
    from hayate.sampling_params import SamplingParams, StructuredOutput
    from hayate.vision_core.core import VisionCore


def __getattr__(name: str) -> Any:
    # Loaded when first used: `hayate --help` must not wait for torch.
    if name == "LLM":
        from hayate.runtime.llm import LLM

        return LLM
    if name == "AsyncLLM":
        from hayate.runtime.async_llm import AsyncLLM

        return AsyncLLM
    if name == "VisionCore":
        from hayate.vision_core.core import VisionCore

        return VisionCore
    if name in ("SamplingParams", "StructuredOutput"):
        from hayate import sampling_params

        return getattr(sampling_params, name)
    raise AttributeError(f"module 'hayate' has no attribute {name!r}")
