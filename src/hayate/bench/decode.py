"""`hayate bench decode`: tokens a second after the first, and its share of the memory's read bandwidth."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from hayate.bench import roofline
from hayate.bench.gates import check_decode
from hayate.bench.rival import Transformers, short_run
from hayate.bench.subject import environment, open_llm, random_prompts
from hayate.config import DTYPE_BYTES
from hayate.errors import UsageError
from hayate.runtime.llm import LLM
from hayate.sampling_params import SamplingParams


def run(
    *,
    model: str | None,
    preset: str | None,
    device: str,
    dtype: str,
    prompt_tokens: int,
    new_tokens: int,
    batch: int,
    runs: int,
    compare: str | None,
    engine: dict[str, Any],
    report: Callable[[str], None],
    **_: Any,
) -> dict[str, Any]:
    """Measure greedy decoding end to end through `LLM.generate`, sampling and stopping included."""
    if new_tokens < 2:
        raise UsageError(f"--new-tokens {new_tokens}: decoding begins with the second token")
    llm = open_llm(
        model=model,
        preset=preset,
        device=device,
        dtype=dtype,
        batch=batch,
        length=prompt_tokens + new_tokens,
        **engine,
    )
    width = DTYPE_BYTES[llm.plan.dtype]
    bandwidth = llm.plan.num_gpus * roofline.measure_read_bandwidth(llm.device)
    context = prompt_tokens + new_tokens // 2
    cost = roofline.decode_cost(llm.config, batch=batch, context=context, dtype_bytes=width)
    ceiling = batch * bandwidth / cost.num_bytes
    report(
        f"ceiling: {bandwidth / 1e9:,.1f} GB/s read bandwidth over {cost.num_bytes / 1e9:.3f} GB a step "
        f"= {ceiling:,.1f} tok/s"
    )
    prompts = random_prompts(llm, batch=batch, length=prompt_tokens)
    check_decode(llm, prompts[0], new_tokens=min(new_tokens, 32))
    report("gate: decoded tokens agree with the logits of one prefill over prompt and answer")

    rival = Transformers(model, llm) if compare else None
    ours, theirs = [], []
    for _run in range(runs + 1):  # the first warms up
        ours.append(decode_rate(llm, prompts, new_tokens))
        if rival:
            theirs.append(rival.decode_rate(prompts, new_tokens))
    rate = statistics.median(ours[1:])
    result: dict[str, Any] = {
        "bench": "decode",
        "model": preset or model,
        "dtype": llm.plan.dtype,
        "tensor_parallel": llm.plan.tensor_parallel,
        "batch": batch,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "tokens_per_second": round(rate, 2),
        "runs": [round(r, 2) for r in ours[1:]],
        "read_bandwidth_gbs": round(bandwidth / 1e9, 2),
        "bytes_per_step": int(cost.num_bytes),
        "ceiling_tokens_per_second": round(ceiling, 2),
        "share_of_ceiling": round(rate / ceiling, 4),
        **environment(llm.device),
    }
    report(f"hayate: {rate:,.1f} tok/s, {rate / ceiling:.1%} of the ceiling (median of {runs})")
    if rival:
        other = statistics.median(theirs[1:])
        ratios = [a / b for a, b in zip(ours[1:], theirs[1:], strict=True)]
        ratio = statistics.median(ratios)
        result["transformers_tokens_per_second"] = round(other, 2)
        result["ratio_to_transformers"] = round(ratio, 3)
        report(f"transformers {rival.version}: {other:,.1f} tok/s; hayate is {ratio:.2f}x as fast")
    return result


def decode_rate(llm: LLM, prompts: list[list[int]], new_tokens: int) -> float:
    """Tokens a second over all sequences, first tokens and prefill taken off.

    The time of a short run is subtracted from that of the whole one, so that what both do cancels.
    """
    short = short_run(new_tokens)
    seconds = _generate(llm, prompts, new_tokens) - _generate(llm, prompts, short)
    return len(prompts) * (new_tokens - short) / seconds


def _generate(llm: LLM, prompts: list[list[int]], new_tokens: int) -> float:
    """Seconds to generate exactly `new_tokens` for each prompt."""
    params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    start = time.perf_counter()
    llm.generate(prompts, params)
    return time.perf_counter() - start
