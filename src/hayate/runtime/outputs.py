"""What a request gives back: whole outputs, streamed chunks, and the figures of the run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

# stop: a stop string, stop token or end token; length: max_tokens, or the context is full; abort: the caller
# gave up; timeout: the request's time was over; error: its computation failed (`RequestOutput.error` says why).
FinishReason = Literal["stop", "length", "abort", "timeout", "error"]


@dataclass(frozen=True)
class TokenLogprob:
    """Natural log-probability of one token under the model's own distribution (before sampling options)."""

    token_id: int
    logprob: float


@dataclass(frozen=True)
class PositionLogprobs:
    """Log-probabilities at one generated position: the token taken, and the most likely ones."""

    token: TokenLogprob
    top: tuple[TokenLogprob, ...]


@dataclass
class CompletionOutput:
    """One sample of a request."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None  # the stop string or stop token that ended it
    logprobs: list[PositionLogprobs] | None = None


@dataclass
class RequestMetrics:
    """Times in seconds, counted from the moment the request was submitted."""

    num_prompt_tokens: int = 0  # those that show images included
    num_cached_tokens: int = 0  # of the prompt, found in the prefix cache
    num_generated_tokens: int = 0
    time_to_first_token: float = 0.0  # prefill, waiting included
    total_time: float = 0.0
    # Of its images, none of which takes any where they had been encoded for an earlier prompt.
    image_open_time: float = 0.0  # reading and decoding the files
    image_preprocess_time: float = 0.0  # resizing and cutting
    image_encode_time: float = 0.0

    @property
    def decode_time(self) -> float:
        return max(self.total_time - self.time_to_first_token, 0.0)

    @property
    def decode_tokens_per_second(self) -> float:
        """Rate of the tokens after the first; 0 when there is only one."""
        tokens = self.num_generated_tokens - 1
        return tokens / self.decode_time if tokens > 0 and self.decode_time > 0 else 0.0

    @property
    def prefill_tokens_per_second(self) -> float:
        return (
            self.num_prompt_tokens / self.time_to_first_token if self.time_to_first_token else 0.0
        )


@dataclass
class RequestOutput:
    """A finished request: the prompt and its samples."""

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    metrics: RequestMetrics
    error: BaseException | None = None  # why a sample ended with the finish reason "error"


@dataclass(frozen=True)
class StreamChunk:
    """A piece of one sample as it is generated. The texts of one index, joined, are the sample's text."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    logprobs: tuple[PositionLogprobs, ...] = ()
    request: RequestOutput | None = (
        None  # on the last chunk of the request: everything, with figures
    )
