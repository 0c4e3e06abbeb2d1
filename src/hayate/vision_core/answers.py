"""What VisionCore gives back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hayate.runtime.outputs import FinishReason, RequestMetrics
from hayate.vision_core.forms import Value


@dataclass(frozen=True)
class Timings:
    """Seconds of one call, stage by stage, and its tokens. The stages are a part of the total, not all of it.

    What was done for an earlier call takes no time: an image known from before is not encoded again, and a prompt
    that begins like another is computed from where they differ (`num_cached_tokens` of it are not).
    """

    decode: float  # opening the files
    preprocess: float  # making them smaller, cutting them into pictures
    encode: float  # vision encoder and resampler
    prefill: float  # the prompt, up to the first token of the answer
    generate: float  # the tokens after it
    total: float  # of the call; a model that is loaded in it not counted
    num_prompt_tokens: int
    num_cached_tokens: int
    num_generated_tokens: int
    tokens_per_second: float  # of `generate`

    @classmethod
    def of(
        cls, metrics: RequestMetrics, *, open_time: float, shrink_time: float, total: float
    ) -> Timings:
        """open_time, shrink_time: spent on the images before the request."""
        known = metrics.image_open_time + metrics.image_preprocess_time + metrics.image_encode_time
        return cls(
            decode=open_time + metrics.image_open_time,
            preprocess=shrink_time + metrics.image_preprocess_time,
            encode=metrics.image_encode_time,
            prefill=max(metrics.time_to_first_token - known, 0.0),
            generate=metrics.decode_time,
            total=total,
            num_prompt_tokens=metrics.num_prompt_tokens,
            num_cached_tokens=metrics.num_cached_tokens,
            num_generated_tokens=metrics.num_generated_tokens,
            tokens_per_second=metrics.decode_tokens_per_second,
        )


@dataclass(frozen=True)
class Answer:
    """The text of an answer. finish_reason: "stop", or "length" where max_tokens or the context cut it short."""

    text: str
    finish_reason: FinishReason
    timings: Timings
    peak_memory: dict[str, int]  # bytes, the most so far: `host`, and on a GPU `device`

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Analysis(Answer):
    """An answer in fields: all of the form, in its order. With finish_reason "length" the last ones may be cut short
    or empty."""

    fields: dict[str, Value]

    def __getitem__(self, name: str) -> Any:
        return self.fields[name]
