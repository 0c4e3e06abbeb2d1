"""`hayate bench throughput`: many requests at once, end to end, beside what the device could do at best."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from hayate.bench import roofline
from hayate.bench.burst import Burst, Progress, percentiles, run_burst
from hayate.bench.gates import check_greedy
from hayate.bench.roofline import teraflops
from hayate.bench.subject import environment, open_llm, random_prompts
from hayate.config import DTYPE_BYTES
from hayate.errors import UsageError
from hayate.runtime.llm import LLM
from hayate.sampling_params import SamplingParams

_GATED = 4  # requests whose tokens are checked
_WARM_UP_TOKENS = 4


def run(
    *,
    model: str | None,
    preset: str | None,
    device: str,
    dtype: str,
    requests: int,
    input: int,
    output: int,
    engine: dict[str, Any],
    report: Callable[[str], None],
    bar: Callable[[str], AbstractContextManager[Progress | None]],
    **_: Any,
) -> dict[str, Any]:
    """Hand in `requests` random prompts of `input` tokens at once; each gets exactly `output` tokens, greedily.

    engine: options of `LLM`. bar: a progress bar of that name. The ceiling is the time of all prompts at the
    measured matrix rate, and then of all decode steps at the measured read bandwidth. The same for one request
    alone is measured too.
    """
    if output < 2:
        raise UsageError(f"--output {output}: decoding begins with the second token")
    at_once = min(requests, engine.get("max_num_seqs", requests))
    llm = open_llm(
        model=model,
        preset=preset,
        device=device,
        dtype=dtype,
        batch=at_once,
        length=input + output,
        **{"max_num_seqs": requests, **engine},
    )
    ceiling = _Ceiling(llm, requests=requests, at_once=at_once, input=input, output=output)
    report(ceiling.describe())
    _check(llm, min(requests, _GATED), input, output)
    report(f"gate: {min(requests, _GATED)} requests together take the tokens of prefills alone")

    if llm.device.type == "cuda":  # the same load once, so that every kernel and graph is there
        _burst(llm, requests, input, output, seed=2)
    else:
        _burst(llm, requests, min(input, 64), _WARM_UP_TOKENS, seed=2)
    _burst(llm, 1, input, _WARM_UP_TOKENS, seed=3)
    alone = _burst(llm, 1, input, output, seed=4)
    with bar("tokens") as progress:
        burst = _burst(llm, requests, input, output, seed=0, progress=progress)
    result = {
        "bench": "throughput",
        "model": preset or model,
        "dtype": llm.plan.dtype,
        "tensor_parallel": llm.plan.tensor_parallel,
        "requests": requests,
        "input": input,
        "output": output,
        "max_num_seqs": llm.plan.max_num_seqs,
        "max_num_batched_tokens": llm.plan.max_num_batched_tokens,
        "max_chunk_tokens": llm.plan.max_chunk_tokens,
        **_figures(llm, burst, alone),
        **ceiling.figures(),
        "share_of_ceiling": round(ceiling.seconds / burst.seconds, 4),
        **environment(llm.device),
    }
    _report(result, report)
    return result


class _Ceiling:
    """The least time of the workload: prompts bound by the matrix rate, decode steps by the read bandwidth.

    A step that computes prompts and decodes at once could do both in the time of the longer: `overlapped`.
    """

    def __init__(self, llm: LLM, *, requests: int, at_once: int, input: int, output: int) -> None:
        width = DTYPE_BYTES[llm.plan.dtype]
        self.tokens = requests * output
        self.bandwidth = llm.plan.num_gpus * roofline.measure_read_bandwidth(llm.device)
        self.matmul = llm.plan.num_gpus * roofline.measure_matmul_flops(
            llm.device, getattr(torch, llm.plan.dtype)
        )
        prompt = roofline.prefill_cost(llm.config, tokens=input, dtype_bytes=width)
        step = roofline.decode_cost(
            llm.config, batch=at_once, context=input + output // 2, dtype_bytes=width
        )
        self.flops = requests * prompt.flops
        # The first token of each answer comes from its prompt.
        num_steps = requests * (output - 1) / at_once
        self.num_bytes = num_steps * step.num_bytes
        self.prompt_seconds = self.flops / self.matmul
        self.decode_seconds = max(
            self.num_bytes / self.bandwidth, num_steps * step.flops / self.matmul
        )
        self.seconds = self.prompt_seconds + self.decode_seconds
        self.overlapped = max(
            (self.flops + num_steps * step.flops) / self.matmul, self.num_bytes / self.bandwidth
        )

    def describe(self) -> str:
        return (
            f"ceiling: prompts {teraflops(self.flops)} TFLOP at {teraflops(self.matmul)} TFLOP/s = "
            f"{self.prompt_seconds:,.2f} s, decoding {self.num_bytes / 1e9:,.1f} GB at "
            f"{self.bandwidth / 1e9:,.1f} GB/s = {self.decode_seconds:,.2f} s; together "
            f"{self.tokens / self.seconds:,.0f} output tok/s"
        )

    def figures(self) -> dict[str, Any]:
        return {
            "matmul_tflops": round(self.matmul / 1e12, 2),
            "read_bandwidth_gbs": round(self.bandwidth / 1e9, 2),
            "prompt_flops": int(self.flops),
            "decode_bytes": int(self.num_bytes),
            "floor_prompt_s": round(self.prompt_seconds, 4),
            "floor_decode_s": round(self.decode_seconds, 4),
            "floor_overlapped_s": round(self.overlapped, 4),
            "ceiling_output_tokens_per_second": round(self.tokens / self.seconds, 1),
        }


def _burst(
    llm: LLM,
    requests: int,
    input: int,
    output: int,
    *,
    seed: int,
    progress: Progress | None = None,
) -> Burst:
    prompts = random_prompts(llm, batch=requests, length=input, seed=seed)
    params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)
    return run_burst(llm, llm.requests.of_prompts(list(prompts), params), progress)


def _check(llm: LLM, requests: int, input: int, output: int) -> None:
    burst = _burst(llm, requests, input, min(output, 16), seed=1)
    for done in burst.outputs:
        check_greedy(llm, done.prompt_token_ids, done.outputs[0].token_ids)


def _figures(llm: LLM, burst: Burst, alone: Burst) -> dict[str, Any]:
    rate, rate_alone = burst.generated / burst.seconds, alone.generated / alone.seconds
    return {
        "seconds": round(burst.seconds, 4),
        "output_tokens_per_second": round(rate, 2),
        "total_tokens_per_second": round(
            (burst.generated + burst.prompt_tokens) / burst.seconds, 2
        ),
        "time_to_first_token_ms": percentiles(burst.first_token),
        "inter_token_ms": percentiles(burst.gaps),
        "steps": burst.num_steps,
        "host_ms_per_step": round(1e3 * burst.host_seconds / burst.num_steps, 4),
        "preemptions": burst.num_preemptions,
        "kv_tokens": llm.plan.kv_tokens,
        "kv_peak_use": round(burst.peak_pages / llm.plan.num_pages, 4),
        "alone_output_tokens_per_second": round(rate_alone, 2),
        "ratio_to_alone": round(rate / rate_alone, 3),
    }


def _report(result: dict[str, Any], report: Callable[[str], None]) -> None:
    first, gap = result["time_to_first_token_ms"], result["inter_token_ms"]
    report(
        f"hayate: {result['output_tokens_per_second']:,.1f} output tok/s, "
        f"{result['total_tokens_per_second']:,.1f} tok/s with the prompts, "
        f"{result['share_of_ceiling']:.1%} of the ceiling; {result['ratio_to_alone']:.2f}x one request alone "
        f"({result['alone_output_tokens_per_second']:,.1f})"
    )
    for name, times in (("first token", first), ("between tokens", gap)):
        report(
            f"{name}: median {times['p50']:,.1f} ms, 90 % {times['p90']:,.1f} ms, 99 % {times['p99']:,.1f} ms"
        )
    report(
        f"engine: {result['steps']:,} steps, {result['host_ms_per_step']:.2f} ms of processor time each, "
        f"{result['preemptions']} preemptions, KV cache of {result['kv_tokens']:,} tokens at most "
        f"{result['kv_peak_use']:.0%} in use"
    )
