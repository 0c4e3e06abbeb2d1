"""Burst: requests handed to the engine all at once, and when each token came."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from hayate.runtime.llm import LLM
from hayate.runtime.outputs import RequestOutput
from hayate.runtime.request import Request

Progress = Callable[[int, int], None]


@dataclass
class Burst:
    """What was measured. Times in seconds; first tokens counted from the moment the requests were handed in."""

    seconds: float = 0.0
    first_token: list[float] = field(default_factory=list)  # of each request
    gaps: list[float] = field(default_factory=list)  # between two tokens of a request, over all
    num_steps: int = 0
    host_seconds: float = 0.0  # of the engine's thread on a processor
    num_preemptions: int = 0
    peak_pages: int = 0
    outputs: list[RequestOutput] = field(default_factory=list)

    @property
    def generated(self) -> int:
        return sum(o.metrics.num_generated_tokens for o in self.outputs)

    @property
    def prompt_tokens(self) -> int:
        return sum(o.metrics.num_prompt_tokens for o in self.outputs)


def run_burst(llm: LLM, requests: Sequence[Request], progress: Progress | None = None) -> Burst:
    """Run the requests to their end; `progress` is told (tokens generated, tokens in all). Ctrl-C drops them all."""
    engine = llm.engine
    burst = Burst(num_preemptions=-engine.scheduler.num_preemptions)
    last: dict[Request, float] = {}
    total = sum(s.sequence.params.max_tokens or 0 for r in requests for s in r.samples)
    generated = 0
    begin, processor = time.perf_counter(), time.thread_time()
    try:
        for request in requests:
            request.streaming = True
            engine.submit(request)
        while engine.has_work:
            events = engine.step()
            now = time.perf_counter()
            burst.num_steps += 1
            burst.peak_pages = max(burst.peak_pages, llm.plan.num_pages - engine.pages.num_free)
            for request, chunk in events:
                generated += len(chunk.token_ids)
                if request in last:
                    burst.gaps.append(now - last[request])
                else:
                    burst.first_token.append(now - begin)
                last[request] = now
            if progress is not None:
                progress(generated, total)
    finally:
        for request in requests:
            engine.abort(request)
    burst.seconds = time.perf_counter() - begin
    burst.host_seconds = time.thread_time() - processor
    burst.num_preemptions += engine.scheduler.num_preemptions
    burst.outputs = [r.result() for r in requests]
    return burst


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Median, 90th and 99th percentile in milliseconds."""
    ordered = sorted(values)
    if not ordered:
        return {"p50": 0.0, "p90": 0.0, "p99": 0.0}
    return {
        f"p{q}": round(1e3 * ordered[min(len(ordered) * q // 100, len(ordered) - 1)], 3)
        for q in (50, 90, 99)
    }
