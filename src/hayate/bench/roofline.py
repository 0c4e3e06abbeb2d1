"""What a device can do (measured here and now) and what a step must do (counted)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from hayate.models.config import ModelConfig
from hayate.models.decoder import meta_model
from hayate.models.quantization import nf4_linears


@dataclass(frozen=True)
class StepCost:
    """The least work of one step: bytes that must cross the memory bus, and floating-point operations."""

    num_bytes: float
    flops: float


def teraflops(count: float) -> str:
    """In 10^12, three digits or all before the point."""
    value = count / 1e12
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def measure_read_bandwidth(device: torch.device) -> float:
    """Bytes a second of a read-only pass over memory much larger than any cache; the best of several."""
    if device.type == "cuda":
        x = torch.ones(2**30, dtype=torch.float32, device=device)  # 4 GiB
        return x.nbytes / statistics.median(_cuda_times(lambda: x.sum(), runs=10))
    # Eight passes over 256 MiB; float32 sums run at the speed of memory on every CPU we know.
    x = torch.ones(2**26, dtype=torch.float32)
    x.sum()
    times = []
    for _ in range(8):
        start = time.perf_counter()
        x.sum()
        times.append(time.perf_counter() - start)
    return x.nbytes / min(times)


def measure_matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large square matrix product on random data."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    if device.type == "cuda":
        return 2 * n**3 / statistics.median(_cuda_times(lambda: a @ b, runs=10))
    a @ b
    times = []
    for _ in range(5):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times)


def decode_cost(
    config: ModelConfig, *, batch: int, context: int, dtype_bytes: int, window_aware: bool = True
) -> StepCost:
    """One decode step of `batch` sequences whose keys span `context` tokens."""
    weights = _weight_bytes(config, batch, dtype_bytes)
    kv = 0.0
    for layer in range(config.num_layers):
        window = config.window(layer) if window_aware else None
        seen = min(context, window) if window else context
        kv += 2 * config.num_kv_heads * config.head_dim * seen * dtype_bytes
    attention = 4 * config.num_heads * config.head_dim * context * config.num_layers
    per_token = 2 * _matmul_parameters(config) + attention
    return StepCost(weights + batch * kv, batch * per_token)


def prefill_cost(config: ModelConfig, *, tokens: int, dtype_bytes: int) -> StepCost:
    """One prompt of `tokens`; the head runs for its last token only."""
    head = config.vocab_size * config.hidden_size
    linear = 2 * (_matmul_parameters(config) - head) * tokens + 2 * head
    attention = (
        4 * config.num_heads * config.head_dim * config.num_layers * tokens * (tokens + 1) / 2
    )
    weights = _weight_bytes(config, tokens, dtype_bytes)
    kv = config.kv_bytes_per_token(dtype_bytes) * tokens
    return StepCost(weights + kv, linear + attention)


def _weight_bytes(config: ModelConfig, tokens: int, dtype_bytes: int) -> float:
    """Bytes of the weights that a step of `tokens` reads; NF4 layers with their codes and scales."""
    count = _streamed_parameters(config, tokens) * dtype_bytes
    if config.nf4_modules:
        for name, layer in nf4_linears(meta_model(config, dtype=torch.bfloat16)).items():
            if not name.startswith(("vpm.", "resampler.")):  # of pictures, not of text
                rows, columns = layer.packed.shape
                count -= rows * columns * dtype_bytes - layer.codes.nbytes - layer.scales.nbytes
    return count


def _streamed_parameters(config: ModelConfig, tokens: int) -> float:
    """Parameters read by a step of `tokens`: of the experts, as many as `tokens` independent choices touch."""
    if config.moe is None:
        return config.num_streamed_parameters
    E, A = config.moe.num_experts, config.moe.num_active
    touched = E * (1 - (1 - A / E) ** tokens)
    per_expert = (config.num_parameters - config.num_active_parameters) / (E - A) if E > A else 0
    return config.num_streamed_parameters + per_expert * (touched - A)


def _matmul_parameters(config: ModelConfig) -> int:
    """Parameters each token is multiplied with."""
    embedding = 0 if config.tie_embeddings else config.vocab_size * config.hidden_size
    return config.num_active_parameters - embedding


def _cuda_times(function: Callable[[], object], *, runs: int) -> list[float]:
    for _ in range(3):
        function()
    times = []
    for _ in range(runs):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return times
