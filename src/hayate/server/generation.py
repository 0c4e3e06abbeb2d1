"""Generation: what one HTTP request has the engine do."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hayate.runtime.outputs import RequestOutput
from hayate.sampling_params import SamplingParams
from hayate.server.errors import ApiError
from hayate.server.logging import Context
from hayate.server.service import Service

if TYPE_CHECKING:
    from hayate.runtime.async_llm import Tagged
    from hayate.runtime.conversation import Conversation


@dataclass
class Generation:
    """Prompts, encoded, and how to sample; afterwards `outputs`, one a prompt.

    Raises:
        ApiError: more samples than one request may have.
    """

    service: Service
    context: Context
    model: str  # the name to answer with
    prompts: list[Conversation]
    params: SamplingParams
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        samples, limit = len(self.prompts) * self.params.n, self.service.options.max_samples
        if samples > limit:
            raise ApiError(
                400,
                f"n: {samples} samples were asked for, prompts times n; the limit is {limit}",
                param="n",
            )
        self._llm = self.service.llm
        self._done: dict[int, RequestOutput] = {}

    @property
    def outputs(self) -> list[RequestOutput]:
        """Of the prompts that have finished, in their order."""
        return [self._done[i] for i in sorted(self._done)]

    async def run(self) -> list[RequestOutput]:
        """All of it, not streamed."""
        try:
            outputs = await self._llm.generate(self.prompts, self.params)
        except Exception:
            self.service.note_failure()
            raise
        for i, output in enumerate(outputs):
            self.finished(i, output)
        if any(s.finish_reason == "abort" for output in outputs for s in output.outputs):
            raise ApiError(503, "the server was stopped before the answer was complete")
        return outputs

    async def stream(self) -> AsyncGenerator[list[Tagged], None]:
        """The chunks as they come; what is wrong with the request is raised here."""
        return await self._llm.open_streams(self.prompts, self.params)

    def finished(self, index: int, output: RequestOutput) -> None:
        """Take down the result of one prompt."""
        self._done[index] = output
        self.service.metrics.generated(output)
        fields, figures = self.context.fields, output.metrics
        for name, count in (
            ("prompt_tokens", figures.num_prompt_tokens),
            ("cached_tokens", figures.num_cached_tokens),
            ("generated_tokens", figures.num_generated_tokens),
        ):
            fields[name] = fields.get(name, 0) + count
        fields["first_token_ms"] = round(figures.time_to_first_token * 1e3, 1)
        fields["finish"] = ",".join(str(s.finish_reason) for s in output.outputs)
        if self.service.options.log_prompts:
            tokenizer = self._llm.tokenizer
            ids = output.prompt_token_ids
            fields["prompt"] = tokenizer.decode(ids, False) if tokenizer is not None else ids
            fields["answers"] = [sample.text for sample in output.outputs]


@dataclass(frozen=True)
class Usage:
    """Tokens of a request, counted over all its prompts and samples."""

    prompt: int
    cached: int
    generated: int

    @classmethod
    def of(cls, outputs: list[RequestOutput]) -> Usage:
        figures = [output.metrics for output in outputs]
        return cls(
            sum(m.num_prompt_tokens for m in figures),
            sum(m.num_cached_tokens for m in figures),
            sum(m.num_generated_tokens for m in figures),
        )

    def as_openai(self) -> dict[str, object]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.generated,
            "total_tokens": self.prompt + self.generated,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }
