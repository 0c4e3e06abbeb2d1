"""Request: what a caller submitted, its samples, and how each turns tokens into text."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

from hayate.runtime.outputs import CompletionOutput, RequestMetrics, RequestOutput, StreamChunk
from hayate.runtime.sampler import SamplingRow
from hayate.runtime.sequence import Sequence
from hayate.runtime.stopping import StopChecker


@dataclass(eq=False)
class Sample:
    """One sample being generated: its sequence, how its tokens are drawn, turned into text and stopped."""

    sequence: Sequence
    row: SamplingRow  # shares the sequence's `output_ids`
    stops: StopChecker
    output: CompletionOutput


@dataclass(eq=False)
class Request:
    """A prompt and its samples. Times are of `time.perf_counter`."""

    prompt: str | None
    prompt_ids: list[int]
    samples: list[Sample]
    streaming: bool = False  # whether `chunks` is filled
    chunks: deque[StreamChunk] = field(default_factory=deque)  # produced, not yet handed on
    arrival: float = field(default_factory=time.perf_counter)
    first_token: float | None = None
    end: float | None = None

    @property
    def finished(self) -> bool:
        return all(s.output.finish_reason is not None for s in self.samples)

    def result(self) -> RequestOutput:
        """The finished request with its figures."""
        end = self.end or time.perf_counter()
        metrics = RequestMetrics(
            num_prompt_tokens=len(self.prompt_ids),
            num_generated_tokens=sum(len(s.output.token_ids) for s in self.samples),
            time_to_first_token=(self.first_token or end) - self.arrival,
            total_time=end - self.arrival,
        )
        return RequestOutput(
            self.prompt, self.prompt_ids, [s.output for s in self.samples], metrics
        )
