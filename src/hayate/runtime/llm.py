"""LLM: a checkpoint folder in, text out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from hayate.errors import to_raise
from hayate.runtime.loaded_model import LoadedModel
from hayate.runtime.outputs import RequestOutput, StreamChunk
from hayate.runtime.request import Request
from hayate.runtime.request_builder import Messages, Params, Prompt
from hayate.sampling_params import SamplingParams


class LLM(LoadedModel):
    """A model ready to generate; the arguments are those of `LoadedModel`.

    The calls run the engine themselves: use one `LLM` from one thread. `AsyncLLM` is for many callers at once.

    priority: lower runs earlier. timeout: seconds from the call; what is not finished by then ends as it is, with
    the finish reason "timeout". A request that fails does not touch the others: when all have ended the first
    error is raised, its attribute `outputs` holding what every request gave (see `hayate.errors`).
    """

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: Params = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
    ) -> list[RequestOutput]:
        """Complete each prompt (text or token ids); results in the order of the prompts.

        params: for all prompts, or a list with one for each.
        """
        requests = self.requests.of_prompts(prompts, params, priority=priority, timeout=timeout)
        return self._run(requests)

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
    ) -> Iterator[StreamChunk]:
        """Complete one prompt, piece by piece; closing the iterator early ends the work."""
        request = self.requests.of_prompt(prompt, params, priority=priority, timeout=timeout)
        return self._stream(request)

    def chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
        max_slices: int | None = None,
    ) -> list[RequestOutput]:
        """Answer a conversation: messages are {"role": ..., "content": ...}.

        A content is a text or, where the model takes images, a list of parts in any order: {"type": "text", "text":
        ...}, {"type": "image", "image": a path, the bytes of a file, a PIL image or an array (H, W, 3)}, {"type":
        "image_url", "image_url": {"url": "data:..."}}.

        max_slices: most tiles an image is cut into, 1 to 9, beside the overview; fewer are faster and show less
        detail. Default: as the checkpoint says.
        """
        request = self.requests.of_messages(
            messages, params, priority=priority, timeout=timeout, max_slices=max_slices
        )
        return self._run([request])

    def stream_chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
        max_slices: int | None = None,
    ) -> Iterator[StreamChunk]:
        """`chat`, piece by piece."""
        request = self.requests.of_messages(
            messages, params, priority=priority, timeout=timeout, max_slices=max_slices
        )
        return self._stream(request)

    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Logits (T, V) float32 on the CPU: row t is the model's prediction after token t."""
        return self.engine.logits(self.requests.checked_ids(list(token_ids)))

    def close(self) -> None:
        """End the other processes of a tensor-parallel model, which otherwise end with this one; it cannot run then.

        One process has nothing to end.
        """
        self.engine.close()

    def _run(self, requests: list[Request]) -> list[RequestOutput]:
        try:
            for request in requests:
                self.engine.submit(request)
            while not all(r.finished for r in requests):
                self.engine.step()
        finally:
            for request in requests:
                self.engine.abort(request)
        outputs = [r.result() for r in requests]
        if failed := [r.error for r in requests if r.error is not None]:
            raise to_raise(failed[0], outputs)
        return outputs

    def _stream(self, request: Request) -> Iterator[StreamChunk]:
        yield from self.engine.run(request)
        if request.error is not None:
            raise to_raise(request.error, [request.result()])
