"""POST /v1/completions."""

from __future__ import annotations

import json
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from hayate.runtime.outputs import RequestOutput
from hayate.server.chat import finish_name
from hayate.server.conversation import encode_prompts
from hayate.server.errors import ApiError
from hayate.server.generation import Generation, Usage
from hayate.server.logging import Context
from hayate.server.logprobs import TokenNames, completion_logprobs
from hayate.server.openai_types import CompletionRequest
from hayate.server.service import Service
from hayate.server.stream import EventStream, Piece, data, until_gone

router = APIRouter()


@router.post("/v1/completions")
async def completions(body: CompletionRequest, request: Request) -> Response:
    service: Service = request.app.state.service
    model = service.model_name(body.model)
    params = body.sampling()
    prompts = body.prompts()
    encoded = await encode_prompts(service, prompts)
    tokenizer = service.llm.tokenizer
    echoes = [""] * len(encoded)
    if body.echo and tokenizer is not None:
        echoes = [
            prompt if isinstance(prompt, str) else tokenizer.decode(prompt, False)
            for prompt in prompts
        ]
    generation = Generation(service, Context.of(request.scope), model, encoded, params)
    names = TokenNames(tokenizer)
    if body.stream:
        encoder = _Events(generation, names, echoes, body.include_usage)
        return EventStream(generation, await generation.stream(), encoder)
    outputs = await until_gone(request.receive, generation.run())
    choices: list[dict[str, Any]] = []
    for echo, output in zip(echoes, outputs, strict=True):
        for sample in output.outputs:
            logprobs = sample.logprobs
            choices.append(
                {
                    "index": len(choices),
                    "text": echo + sample.text,
                    "logprobs": None if logprobs is None else completion_logprobs(logprobs, names),
                    "finish_reason": finish_name(sample.finish_reason),
                }
            )
    return JSONResponse(
        {
            "id": f"cmpl-{generation.context.id}",
            "object": "text_completion",
            "created": generation.created,
            "model": model,
            "choices": choices,
            "usage": Usage.of(outputs).as_openai(),
        }
    )


class _Events:
    """A completion as events."""

    def __init__(
        self, generation: Generation, names: TokenNames, echoes: list[str], with_usage: bool
    ) -> None:
        self._per_prompt = generation.params.n
        self._names = names
        self._echoes = echoes
        self._with_logprobs = generation.params.logprobs is not None
        self._with_usage = with_usage
        self._offsets: dict[int, int] = {}  # of a sample: characters of the tokens so far
        head = {
            "id": f"cmpl-{generation.context.id}",
            "object": "text_completion",
            "created": generation.created,
            "model": generation.model,
        }
        self._head = json.dumps(head)[:-1] + ', "choices": ['
        self._tail = '], "usage": null}' if with_usage else "]}"

    def begin(self) -> str:
        return "".join(
            self._event(prompt * self._per_prompt + i, echo)
            for prompt, echo in enumerate(self._echoes)
            for i in range(self._per_prompt)
            if echo
        )

    def piece(self, piece: Piece) -> str:
        logprobs = "null"
        if self._with_logprobs and piece.logprobs:
            offset = self._offsets.get(piece.index, 0)
            value = completion_logprobs(piece.logprobs, self._names, offset)
            self._offsets[piece.index] = value["text_offset"][-1] + len(value["tokens"][-1])
            logprobs = json.dumps(value)
        finish = None if piece.finish_reason == "error" else finish_name(piece.finish_reason)
        if not piece.text and logprobs == "null" and finish is None:
            return ""
        return self._event(piece.index, piece.text, logprobs, finish)

    def _event(
        self, index: int, text: str, logprobs: str = "null", finish: str | None = None
    ) -> str:
        reason = "null" if finish is None else f'"{finish}"'
        return (
            f'data: {self._head}{{"index": {index}, "text": {json.dumps(text)}, "logprobs": {logprobs}, '
            f'"finish_reason": {reason}}}{self._tail}\n\n'
        )

    def end(self, outputs: list[RequestOutput]) -> str:
        usage = ""
        if self._with_usage:
            figures = json.dumps(Usage.of(outputs).as_openai())
            usage = data(f'{self._head}], "usage": {figures}}}')
        return usage + data("[DONE]")

    def error(self, error: ApiError) -> str:
        return data(json.dumps(error.body("/v1/completions")))
