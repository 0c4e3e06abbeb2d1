"""POST /v1/responses: OpenAI's later protocol, for text. Nothing is kept between requests."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import JSONResponse, Response

from hayate.runtime.outputs import CompletionOutput, RequestOutput
from hayate.sampling_params import SamplingParams, StructuredOutput
from hayate.server.conversation import TemplateMessage, encode_messages
from hayate.server.errors import ApiError
from hayate.server.generation import Generation, Usage
from hayate.server.logging import Context
from hayate.server.openai_types import (
    MAX_ITEMS,
    Body,
    JsonObject,
    JsonObjectFormat,
    Refused,
    Text,
    TextFormat,
)
from hayate.server.service import Service
from hayate.server.stream import EventStream, Piece, event, until_gone

router = APIRouter()


class InputText(Body):
    type: Literal["input_text", "output_text"]
    text: str
    # What answers have, so that they can be sent back as they came.
    annotations: list[Any] | None = Field(None, max_length=0)
    logprobs: list[Any] | None = Field(None, max_length=0)


class InputMessage(Body):
    role: Literal["user", "assistant", "system", "developer"]
    content: str | Annotated[list[InputText], Field(max_length=MAX_ITEMS)]
    type: Literal["message"] = "message"
    id: str | None = None
    status: str | None = None
    phase: Refused = None


class SchemaFormat(Body):
    type: Literal["json_schema"]
    schema_: JsonObject = Field(alias="schema")
    name: Text | None = None  # no effect, nor have the next two
    description: Text | None = None
    strict: bool | None = None


class TextOptions(Body):
    format: (
        Annotated[TextFormat | JsonObjectFormat | SchemaFormat, Field(discriminator="type")] | None
    ) = None
    verbosity: Refused = None


class ResponsesRequest(Body):
    input: str | Annotated[list[InputMessage], Field(min_length=1, max_length=MAX_ITEMS)]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    stream: bool | None = None
    temperature: float | None = None
    text: TextOptions | None = None
    top_p: float | None = None
    # Only the value that is implemented:
    background: Literal[False] | None = None
    include: list[str] | None = Field(None, max_length=0)
    store: Literal[False] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    tools: list[Any] | None = Field(None, max_length=0)
    top_logprobs: Literal[0] | None = None
    truncation: Literal["disabled"] | None = None
    # No effect:
    metadata: dict[Text, Text] | None = None
    parallel_tool_calls: bool | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    service_tier: Literal["auto", "default"] | None = None
    user: Text | None = None
    # Refused:
    access_programs: Refused = None
    background_options: Refused = None
    context_management: Refused = None
    conversation: Refused = None
    image: Refused = None
    max_tool_calls: Refused = None
    moderation: Refused = None
    previous_response_id: Refused = None
    prompt: Refused = None
    prompt_cache_options: Refused = None
    reasoning: Refused = None
    stream_options: Refused = None

    def messages(self) -> list[TemplateMessage]:
        result: list[TemplateMessage] = []
        if self.instructions is not None:
            result.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*result, {"role": "user", "content": self.input}]
        for message in self.input:
            content = message.content
            text = content if isinstance(content, str) else "\n".join(p.text for p in content)
            role = "system" if message.role == "developer" else message.role
            result.append({"role": role, "content": text})
        return result

    def sampling(self) -> SamplingParams:
        format = self.text.format if self.text is not None else None
        structured = None
        if isinstance(format, SchemaFormat):
            structured = StructuredOutput.json_schema(format.schema_)
        elif isinstance(format, JsonObjectFormat):
            structured = StructuredOutput.json_object()
        return SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            max_tokens=self.max_output_tokens,
            structured=structured,
        )


@router.post("/v1/responses")
async def responses(body: ResponsesRequest, request: Request) -> Response:
    service: Service = request.app.state.service
    model = service.model_name(body.model)
    params = body.sampling()
    prompt = await encode_messages(service, body.messages())
    generation = Generation(service, Context.of(request.scope), model, [prompt], params)
    answer = _Answer(generation, body)
    if body.stream:
        return EventStream(generation, await generation.stream(), _Events(answer))
    outputs = await until_gone(request.receive, generation.run())
    return JSONResponse(answer.finished(outputs))


class _Answer:
    """The response object, in its stages."""

    def __init__(self, generation: Generation, body: ResponsesRequest) -> None:
        self.message_id = f"msg_{generation.context.id}"
        text = body.text.model_dump(by_alias=True, exclude_none=True) if body.text else {}
        self._fixed: dict[str, Any] = {
            "id": f"resp_{generation.context.id}",
            "object": "response",
            "created_at": generation.created,
            "model": generation.model,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": False,
            "temperature": body.temperature,
            "text": {"format": {"type": "text"}, **text},
            "tool_choice": "none",
            "tools": [],
            "top_p": body.top_p,
            "truncation": "disabled",
            "user": body.user,
        }

    def begun(self) -> dict[str, Any]:
        return self._with("in_progress", [], None)

    def finished(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        (sample,) = outputs[0].outputs
        usage = Usage.of(outputs)
        figures = {
            "input_tokens": usage.prompt,
            "input_tokens_details": {"cached_tokens": usage.cached},
            "output_tokens": usage.generated,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.prompt + usage.generated,
        }
        status = "completed" if sample.finish_reason == "stop" else "incomplete"
        result = self._with(status, [self.message(sample)], figures)
        if status == "incomplete":
            result["incomplete_details"] = {"reason": "max_output_tokens"}
        return result

    def failed(self, error: ApiError) -> dict[str, Any]:
        result = self._with("failed", [], None)
        return {**result, "error": {"code": "server_error", "message": error.message}}

    def message(self, sample: CompletionOutput | None = None) -> dict[str, Any]:
        """The one item of the output; without `sample` as it begins."""
        if sample is None:
            return self._item("in_progress", [])
        status = "completed" if sample.finish_reason == "stop" else "incomplete"
        return self._item(status, [part(sample.text)])

    def _item(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.message_id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": content,
        }

    def _with(
        self, status: str, output: list[dict[str, Any]], usage: dict[str, Any] | None
    ) -> dict[str, Any]:
        ends = {"error": None, "incomplete_details": None}
        return {**self._fixed, **ends, "status": status, "output": output, "usage": usage}


def part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


class _Events:
    """The response as its typed events."""

    def __init__(self, answer: _Answer) -> None:
        self._answer = answer
        self._number = 0
        self._place = {"item_id": answer.message_id, "output_index": 0, "content_index": 0}
        place = json.dumps({**self._place, "logprobs": []})[1:-1]
        name = "response.output_text.delta"
        self._delta = f'event: {name}\ndata: {{"type": "{name}", {place}, '

    def begin(self) -> str:
        begun = self._answer.begun()
        return (
            self._event("response.created", response=begun)
            + self._event("response.in_progress", response=begun)
            + self._event("response.output_item.added", output_index=0, item=self._answer.message())
            + self._event("response.content_part.added", **self._place, part=part(""))
        )

    def piece(self, piece: Piece) -> str:
        if not piece.text:
            return ""
        self._number += 1
        return f'{self._delta}"sequence_number": {self._number - 1}, "delta": {json.dumps(piece.text)}}}\n\n'

    def end(self, outputs: list[RequestOutput]) -> str:
        (sample,) = outputs[0].outputs
        response = self._answer.finished(outputs)
        item = self._answer.message(sample)
        return (
            self._event("response.output_text.done", **self._place, text=sample.text, logprobs=[])
            + self._event("response.content_part.done", **self._place, part=part(sample.text))
            + self._event("response.output_item.done", output_index=0, item=item)
            + self._event(f"response.{response['status']}", response=response)
        )

    def error(self, error: ApiError) -> str:
        return self._event("response.failed", response=self._answer.failed(error))

    def _event(self, name: str, **fields: Any) -> str:
        self._number += 1
        return event(name, {"type": name, "sequence_number": self._number - 1, **fields})
