"""Request: what a caller submitted, its samples, and how each turns tokens into text."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

from hayate.runtime.conversation import PromptImage
from hayate.runtime.device import Stopwatch
from hayate.runtime.outputs import (
    CompletionOutput,
    FinishReason,
    RequestMetrics,
    RequestOutput,
    StreamChunk,
)
from hayate.runtime.sampler import SamplingRow
from hayate.runtime.sequence import ImageSpan, Sequence
from hayate.runtime.stopping import StopChecker


@dataclass(eq=False)
class Sample:
    """One sample being generated: its sequence, how its tokens are drawn, turned into text and stopped."""

    sequence: Sequence
    row: SamplingRow  # shares the sequence's `output_ids`
    stops: StopChecker
    output: CompletionOutput


@dataclass(eq=False)
class RequestImage:
    """An image that a request's prompt shows, and the spans of its pictures, which get the embeddings."""

    image: PromptImage
    spans: list[ImageSpan]

    @classmethod
    def of(cls, image: PromptImage) -> RequestImage:
        ends = [start + image.num_tokens for start in image.starts]
        spans = zip(image.starts, ends, strict=True)
        return cls(image, [ImageSpan(*span, image.digest, i) for i, span in enumerate(spans)])

    @property
    def digest(self) -> bytes:
        return self.image.digest

    @property
    def is_encoded(self) -> bool:
        return self.spans[0].embeddings is not None


@dataclass(eq=False)
class Request:
    """A prompt and its samples. Times are of `time.perf_counter`.

    `Engine.step` ends a request whose `deadline` has passed: what is left of it gets the finish reason "timeout".
    """

    prompt: str | None
    prompt_ids: list[int]
    samples: list[Sample]
    priority: int = 0  # lower runs earlier; each sample's sequence has it too
    deadline: float | None = None
    streaming: bool = False  # whether `chunks` is filled
    chunks: deque[StreamChunk] = field(default_factory=deque)  # produced, not yet handed on
    arrival: float = field(default_factory=time.perf_counter)
    first_token: float | None = None
    end: float | None = None
    error: BaseException | None = None  # why a sample of it failed: the first such error
    images: list[RequestImage] = field(default_factory=list)  # until they are encoded
    image_open_time: float = 0.0  # seconds
    # Preprocessing and encoding of its images, a pair for each batch of them.
    image_work: list[tuple[Stopwatch, Stopwatch]] = field(default_factory=list)
    _image_seconds: tuple[float, float] = (0.0, 0.0)

    @property
    def finished(self) -> bool:
        return all(s.output.finish_reason is not None for s in self.samples)

    def begin(self) -> None:
        """The first token has come."""
        self.first_token = time.perf_counter()
        # So all work on its images is done. Read now: later the GPU may be gone.
        self._image_seconds = (
            sum(preprocessing.seconds() for preprocessing, _ in self.image_work),
            sum(encoding.seconds() for _, encoding in self.image_work),
        )

    def close(
        self, sample: Sample, reason: FinishReason, error: BaseException | None = None
    ) -> StreamChunk:
        """End an unfinished sample from outside (abort, timeout, error): its last chunk, text held back included."""
        output = sample.output
        assert output.finish_reason is None
        text = sample.stops.finish()
        output.text += text
        output.finish_reason = reason
        self.error = self.error or error
        return self.emit(StreamChunk(output.index, text, (), reason))

    def emit(self, chunk: StreamChunk) -> StreamChunk:
        """Queue the chunk if the request streams; the last one of the request gets its result."""
        if self.finished:
            self.end = time.perf_counter()
            chunk = StreamChunk(
                chunk.index,
                chunk.text,
                chunk.token_ids,
                chunk.finish_reason,
                chunk.stop_reason,
                chunk.logprobs,
                self.result(),
            )
        if self.streaming:
            self.chunks.append(chunk)
        return chunk

    def result(self) -> RequestOutput:
        """The request as far as it is, with its figures."""
        end = self.end or time.perf_counter()
        metrics = RequestMetrics(
            num_prompt_tokens=len(self.prompt_ids),
            num_cached_tokens=self.samples[0].sequence.num_cached,
            num_generated_tokens=sum(len(s.output.token_ids) for s in self.samples),
            time_to_first_token=(self.first_token or end) - self.arrival,
            total_time=end - self.arrival,
            image_open_time=self.image_open_time,
            image_preprocess_time=self._image_seconds[0],
            image_encode_time=self._image_seconds[1],
        )
        return RequestOutput(
            self.prompt, self.prompt_ids, [s.output for s in self.samples], metrics, self.error
        )
