"""The figures of a run: load, prompt, generation, memory; as a block for people or as numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hayate.cli.layout import aligned
from hayate.config import format_bytes

if TYPE_CHECKING:
    from hayate.runtime.llm import LLM
    from hayate.runtime.outputs import RequestMetrics


def collect(llm: LLM, metrics: RequestMetrics) -> dict[str, Any]:
    """Milliseconds, bytes, tokens and rates (tokens/s, 10^9 bytes/s), rounded for printing.

    The rate of generation counts the tokens after the first, whose time is the prompt's. Peak GPU
    memory is None on the CPU.
    """
    load = llm.load_report
    assert load is not None  # only models with random weights have none
    peak = llm.peak_memory_bytes()
    return {
        "load_ms": round(load.seconds * 1e3, 1),
        "load_bytes": load.num_bytes,
        "load_gb_per_s": round(load.gigabytes_per_second, 3),
        "prompt_tokens": metrics.num_prompt_tokens,
        "prompt_ms": round(metrics.time_to_first_token * 1e3, 1),
        "prompt_tokens_per_s": round(metrics.prefill_tokens_per_second, 1),
        "generated_tokens": metrics.num_generated_tokens,
        "generation_ms": round(metrics.decode_time * 1e3, 1),
        "generated_tokens_per_s": round(metrics.decode_tokens_per_second, 1),
        "peak_host_bytes": peak["host"],
        "peak_gpu_bytes": peak.get("device"),
    }


def block(figures: dict[str, Any]) -> str:
    """The figures as aligned lines."""
    f = figures
    memory = f"{format_bytes(f['peak_host_bytes'])} host"
    if f["peak_gpu_bytes"] is not None:
        memory += f", {format_bytes(f['peak_gpu_bytes'])} GPU"
    return aligned(
        [
            (
                "load",
                f"{format_bytes(f['load_bytes'])} in {f['load_ms']:,.0f} ms, "
                f"{f['load_gb_per_s']:.2f} GB/s",
            ),
            ("prompt", _tokens(f["prompt_tokens"], f["prompt_ms"], f["prompt_tokens_per_s"])),
            (
                "generated",
                _tokens(f["generated_tokens"], f["generation_ms"], f["generated_tokens_per_s"]),
            ),
            ("peak memory", memory),
        ]
    )


def _tokens(count: int, milliseconds: float, rate: float) -> str:
    return f"{count:,} tokens in {milliseconds:,.0f} ms, {rate:,.1f} tokens/s"
