"""`hayate bench ttft`: one prompt, how long until its first token, how fast the answer comes; and the same again,
when the prefix cache has it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from hayate.bench import roofline
from hayate.bench.burst import Burst, run_burst
from hayate.bench.gates import check_greedy
from hayate.bench.subject import environment, open_llm, random_prompts
from hayate.config import DTYPE_BYTES
from hayate.errors import HayateError, UsageError
from hayate.runtime.llm import LLM
from hayate.sampling_params import SamplingParams


def run(
    *,
    model: str | None,
    preset: str | None,
    device: str,
    dtype: str,
    prompt_tokens: Sequence[int],
    new_tokens: int,
    runs: int,
    cached: bool,
    engine: dict[str, Any],
    report: Callable[[str], None],
    **_: Any,
) -> dict[str, Any]:
    """For each length in `prompt_tokens`: the median over `runs` prompts. cached: each prompt a second time too."""
    if new_tokens < 2:
        raise UsageError(f"--new-tokens {new_tokens}: decoding begins with the second token")
    if cached and not engine.get("prefix_cache", True):
        raise UsageError("--cached measures the prefix cache; leave --no-prefix-cache out")
    llm = open_llm(
        model=model,
        preset=preset,
        device=device,
        dtype=dtype,
        batch=2,  # the cache keeps one prompt while the next one runs
        length=max(prompt_tokens) + new_tokens,
        **engine,
    )
    rate = llm.plan.num_gpus * roofline.measure_matmul_flops(
        llm.device, getattr(torch, llm.plan.dtype)
    )
    bandwidth = llm.plan.num_gpus * roofline.measure_read_bandwidth(llm.device)
    report(f"ceiling: {roofline.teraflops(rate)} TFLOP/s, {bandwidth / 1e9:,.1f} GB/s")
    rows = [
        _measure(llm, length, new_tokens, runs, cached, rate, bandwidth, report)
        for length in prompt_tokens
    ]
    return {
        "bench": "ttft",
        "model": preset or model,
        "dtype": llm.plan.dtype,
        "tensor_parallel": llm.plan.tensor_parallel,
        "new_tokens": new_tokens,
        "matmul_tflops": round(rate / 1e12, 2),
        "read_bandwidth_gbs": round(bandwidth / 1e9, 2),
        "rows": rows,
        **environment(llm.device),
    }


def _measure(
    llm: LLM,
    length: int,
    new_tokens: int,
    runs: int,
    cached: bool,
    rate: float,
    bandwidth: float,
    report: Callable[[str], None],
) -> dict[str, Any]:
    width = DTYPE_BYTES[llm.plan.dtype]
    cost = roofline.prefill_cost(llm.config, tokens=length, dtype_bytes=width)
    floor = max(cost.flops / rate, cost.num_bytes / bandwidth)
    step = roofline.decode_cost(
        llm.config, batch=1, context=length + new_tokens // 2, dtype_bytes=width
    )
    fresh, again = [], []
    for seed in range(runs + 1):  # the first warms up
        (prompt,) = random_prompts(llm, batch=1, length=length, seed=1000 * length + seed)
        fresh.append(_one(llm, prompt, new_tokens))
        if seed == 0:
            check_greedy(llm, prompt, fresh[0].outputs[0].outputs[0].token_ids)
        if cached:
            again.append(_one(llm, prompt, new_tokens))
            if not again[-1].outputs[0].metrics.num_cached_tokens and length > llm.plan.page_size:
                raise HayateError(
                    f"the prefix cache did not find a prompt of {length} tokens again"
                )
    first = statistics.median(b.first_token[0] for b in fresh[1:])
    decode = statistics.median(_decode_rate(b) for b in fresh[1:])
    row = {
        "prompt_tokens": length,
        "first_token_ms": round(first * 1e3, 3),
        "floor_ms": round(floor * 1e3, 3),
        "share_of_ceiling": round(floor / first, 4),
        "decode_tokens_per_second": round(decode, 2),
        "decode_share_of_ceiling": round(decode * step.num_bytes / bandwidth, 4),
    }
    line = (
        f"{length:,} tokens: first after {first * 1e3:,.1f} ms ({row['share_of_ceiling']:.1%} of the ceiling), "
        f"then {decode:,.1f} tok/s ({row['decode_share_of_ceiling']:.1%})"
    )
    if cached:
        second = statistics.median(b.first_token[0] for b in again[1:])
        after = statistics.median(_decode_rate(b) for b in again[1:])
        row["cached_first_token_ms"] = round(second * 1e3, 3)
        row["cached_decode_tokens_per_second"] = round(after, 2)
        line += f"; again: after {second * 1e3:,.1f} ms, then {after:,.1f} tok/s"
    report(line)
    return row


def _one(llm: LLM, prompt: list[int], new_tokens: int) -> Burst:
    params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    return run_burst(llm, [llm.requests.of_prompt(prompt, params)])


def _decode_rate(burst: Burst) -> float:
    return (burst.generated - 1) / (burst.seconds - burst.first_token[0])
