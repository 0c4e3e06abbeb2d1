"""`hayate bench prefill`: time to the first token of a prompt, and its share of the device's matrix rate."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from hayate.bench import roofline
from hayate.bench.gates import check_decode
from hayate.bench.rival import Transformers
from hayate.bench.subject import environment, open_llm, random_prompts
from hayate.config import DTYPE_BYTES
from hayate.sampling_params import SamplingParams

_REST_SECONDS = 1.0


def run(
    *,
    model: str | None,
    preset: str | None,
    device: str,
    dtype: str,
    prompt_tokens: int,
    batch: int,
    runs: int,
    compare: str | None,
    engine: dict[str, Any],
    report: Callable[[str], None],
    **_: Any,
) -> dict[str, Any]:
    """Measure `LLM.generate` of one token, end to end."""
    import torch

    llm = open_llm(
        model=model,
        preset=preset,
        device=device,
        dtype=dtype,
        batch=batch,
        length=prompt_tokens + 8,
        **engine,
    )
    width = DTYPE_BYTES[llm.plan.dtype]
    bandwidth = llm.plan.num_gpus * roofline.measure_read_bandwidth(llm.device)
    rate = llm.plan.num_gpus * roofline.measure_matmul_flops(
        llm.device, getattr(torch, llm.plan.dtype)
    )
    cost = roofline.prefill_cost(llm.config, tokens=prompt_tokens, dtype_bytes=width)
    floor = max(batch * cost.flops / rate, cost.num_bytes / bandwidth)
    report(
        f"ceiling: {rate / 1e12:,.1f} TFLOP/s, {bandwidth / 1e9:,.1f} GB/s; {batch * cost.flops / 1e12:.2f} TFLOP "
        f"= {floor * 1e3:.2f} ms at least"
    )
    check_decode(llm, random_prompts(llm, batch=1, length=min(prompt_tokens, 256))[0], new_tokens=4)
    report("gate: decoded tokens agree with the logits of one prefill over prompt and answer")

    rival = Transformers(model, llm) if compare else None
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    times, theirs = [], []

    def measure(seed: int) -> list[list[int]]:
        """Note the time of one run, with other tokens each time; returns its prompts."""
        prompts = random_prompts(llm, batch=batch, length=prompt_tokens, seed=seed)
        outputs = llm.generate(list(prompts), params)
        times.append(max(o.metrics.time_to_first_token for o in outputs))
        return prompts

    for seed in range(runs + 1):  # the first warms up
        prompts = measure(seed)
        if rival:
            theirs.append(rival.prefill_rate(prompts))
    # A card that computes for long lowers its clock to keep within its power: once more, rested.
    time.sleep(_REST_SECONDS)
    measure(runs + 1)
    rested = times.pop()
    seconds = statistics.median(times[1:])
    tokens = batch * prompt_tokens
    result: dict[str, Any] = {
        "bench": "prefill",
        "model": preset or model,
        "dtype": llm.plan.dtype,
        "tensor_parallel": llm.plan.tensor_parallel,
        "batch": batch,
        "prompt_tokens": prompt_tokens,
        "milliseconds": round(seconds * 1e3, 3),
        "tokens_per_second": round(tokens / seconds, 1),
        "runs_ms": [round(t * 1e3, 3) for t in times[1:]],
        "after_rest_ms": round(rested * 1e3, 3),
        "matmul_tflops": round(rate / 1e12, 2),
        "floor_ms": round(floor * 1e3, 3),
        "share_of_ceiling": round(floor / seconds, 4),
        **environment(llm.device),
    }
    report(
        f"hayate: {seconds * 1e3:,.2f} ms, {tokens / seconds:,.0f} tok/s, {floor / seconds:.1%} of the ceiling "
        f"(median of {runs}); {rested * 1e3:,.2f} ms after {_REST_SECONDS:g} s of rest"
    )
    if rival:
        other = statistics.median(theirs[1:])
        result["transformers_tokens_per_second"] = round(other, 1)
        result["ratio_to_transformers"] = round(tokens / seconds / other, 3)
        report(
            f"transformers {rival.version}: {other:,.0f} tok/s; hayate is {tokens / seconds / other:.2f}x as fast"
        )
    return result
