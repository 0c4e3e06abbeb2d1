"""POST /v1/chat/completions."""

from __future__ import annotations

import json
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from hayate.runtime.outputs import CompletionOutput, FinishReason, RequestOutput
from hayate.server.conversation import encode_messages, template_messages
from hayate.server.errors import ApiError
from hayate.server.generation import Generation, Usage
from hayate.server.logging import Context
from hayate.server.logprobs import TokenNames, chat_logprobs
from hayate.server.openai_types import ChatRequest, NamedTool
from hayate.server.service import Service
from hayate.server.stream import EventStream, Piece, data, until_gone
from hayate.server.tool_parser import Call, ToolParser
from hayate.server.tools import ToolUse, tool_use

router = APIRouter()
_FINISH = {"timeout": "length", "abort": "stop"}


@router.post("/v1/chat/completions")
async def chat_completions(body: ChatRequest, request: Request) -> Response:
    service: Service = request.app.state.service
    model = service.model_name(body.model)
    tools = _tools(body, service)
    tokenizer = service.llm.tokenizer
    assert tokenizer is not None or tools is None
    # The marks of a call may be special tokens.
    changes: dict[str, Any] = {"skip_special_tokens": False} if tools is not None else {}
    structured = (
        tools.structured(tokenizer) if tools is not None and tokenizer is not None else None
    )
    params = body.sampling(structured, **changes)
    prompt = await encode_messages(
        service,
        template_messages(body.messages),
        tools=tools.for_template() if tools is not None else None,
        variables=body.chat_template_kwargs,
    )
    generation = Generation(service, Context.of(request.scope), model, [prompt], params)
    names = TokenNames(tokenizer)
    if body.stream:
        encoder = _Events(generation, names, tools, body.include_usage)
        return EventStream(generation, await generation.stream(), encoder)
    outputs = await until_gone(request.receive, generation.run())
    return JSONResponse(
        {
            "id": f"chatcmpl-{generation.context.id}",
            "object": "chat.completion",
            "created": generation.created,
            "model": model,
            "choices": [_choice(sample, names, tools) for sample in outputs[0].outputs],
            "usage": Usage.of(outputs).as_openai(),
        }
    )


def _tools(body: ChatRequest, service: Service) -> ToolUse | None:
    wanted = body.tool_choice
    name = wanted.function.name if isinstance(wanted, NamedTool) else None
    choice = wanted if isinstance(wanted, str) else "auto"
    functions = [tool.function.model_dump(exclude_none=True) for tool in body.tools or ()]
    form = service.tool_format if functions else None
    one = body.parallel_tool_calls is False
    return tool_use(form, functions, choice=choice, name=name, one=one)


def _choice(sample: CompletionOutput, names: TokenNames, tools: ToolUse | None) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": sample.text, "refusal": None}
    finish = finish_name(sample.finish_reason)
    if tools is not None:
        parser = tools.parser()
        pushed, ended = parser.push(sample.text), parser.finish()
        text, calls = pushed[0] + ended[0], [*pushed[1], *ended[1]]
        message["content"] = text or (None if calls else "")
        if calls:
            message["tool_calls"] = [_call(call) for call in calls]
            finish = "tool_calls" if finish == "stop" else finish
    logprobs = None if sample.logprobs is None else chat_logprobs(sample.logprobs, names)
    return {
        "index": sample.index,
        "message": message,
        "logprobs": logprobs,
        "finish_reason": finish,
    }


def finish_name(reason: FinishReason | None) -> str | None:
    """OpenAI's word for why a sample ended."""
    return None if reason is None else _FINISH.get(reason, reason)


def _call(call: Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


class _Events:
    """A chat completion as `chat.completion.chunk` events."""

    def __init__(
        self, generation: Generation, names: TokenNames, tools: ToolUse | None, with_usage: bool
    ) -> None:
        self._num_samples = generation.params.n
        self._names = names
        self._with_logprobs = generation.params.logprobs is not None
        self._with_usage = with_usage
        self._parsers: dict[int, ToolParser] = {}
        if tools is not None:
            self._parsers = {i: tools.parser() for i in range(self._num_samples)}
        head = {
            "id": f"chatcmpl-{generation.context.id}",
            "object": "chat.completion.chunk",
            "created": generation.created,
            "model": generation.model,
        }
        # What all events begin and end with is written once.
        self._head = json.dumps(head)[:-1] + ', "choices": ['
        self._tail = '], "usage": null}' if with_usage else "]}"

    def begin(self) -> str:
        first = '{"role": "assistant", "content": ""}'
        return "".join(self._event(i, first) for i in range(self._num_samples))

    def piece(self, piece: Piece) -> str:
        finish = finish_name(piece.finish_reason)
        text = piece.text
        calls: list[Call] = []
        if piece.index in self._parsers:
            parser = self._parsers[piece.index]
            text, calls = parser.push(text)
            if finish is not None:
                rest, more = parser.finish()
                text, calls = text + rest, [*calls, *more]
                finish = "tool_calls" if parser.num_calls and finish == "stop" else finish
        logprobs = "null"
        if self._with_logprobs and piece.logprobs:
            logprobs = json.dumps(chat_logprobs(piece.logprobs, self._names))
        events = ""
        if text or logprobs != "null":
            events = self._event(piece.index, f'{{"content": {json.dumps(text)}}}', logprobs)
        if calls:
            first = self._parsers[piece.index].num_calls - len(calls)
            deltas = [{"index": first + i, **_call(call)} for i, call in enumerate(calls)]
            events += self._event(piece.index, json.dumps({"tool_calls": deltas}))
        if piece.finish_reason == "error":
            return events  # the error itself comes as the last event
        return events + (self._event(piece.index, "{}", finish=finish) if finish else "")

    def _event(
        self, index: int, delta: str, logprobs: str = "null", finish: str | None = None
    ) -> str:
        reason = "null" if finish is None else f'"{finish}"'
        return (
            f'data: {self._head}{{"index": {index}, "delta": {delta}, "logprobs": {logprobs}, '
            f'"finish_reason": {reason}}}{self._tail}\n\n'
        )

    def end(self, outputs: list[RequestOutput]) -> str:
        usage = ""
        if self._with_usage:
            figures = json.dumps(Usage.of(outputs).as_openai())
            usage = data(f'{self._head}], "usage": {figures}}}')
        return usage + data("[DONE]")

    def error(self, error: ApiError) -> str:
        return data(json.dumps(error.body("/v1/chat/completions")))
