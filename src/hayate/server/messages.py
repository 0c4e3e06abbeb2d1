"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's protocol."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from hayate.runtime.outputs import CompletionOutput, RequestOutput
from hayate.sampling_params import SamplingParams
from hayate.server.anthropic_types import (
    Block,
    CountRequest,
    ImageBlock,
    MessagesRequest,
    ToolChoice,
    ToolResultBlock,
    ToolUseBlock,
)
from hayate.server.conversation import TemplateMessage, encode_messages, joined
from hayate.server.errors import ApiError
from hayate.server.generation import Generation, Usage
from hayate.server.images import NamedImage
from hayate.server.logging import Context
from hayate.server.service import Service
from hayate.server.stream import EventStream, Piece, event, until_gone
from hayate.server.tool_parser import Call
from hayate.server.tools import ToolUse, tool_use
from hayate.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from hayate.runtime.conversation import Conversation

router = APIRouter()


@router.post("/v1/messages")
async def messages(body: MessagesRequest, request: Request) -> Response:
    service: Service = request.app.state.service
    model = service.model_name(body.model)
    tools = _tools(body, service)
    params = _sampling(body, tools, service.llm.tokenizer)
    prompt = await _encode(service, body, tools)
    generation = Generation(service, Context.of(request.scope), model, [prompt], params)
    if body.stream:
        return EventStream(generation, await generation.stream(), _Events(generation, tools))
    outputs = await until_gone(request.receive, generation.run())
    (sample,) = outputs[0].outputs
    content, called = _content(sample, tools)
    usage = Usage.of(outputs)
    result = _message(generation, usage)
    result |= {"content": content, **_stop(sample, called)}
    return JSONResponse(result)


@router.post("/v1/messages/count_tokens")
async def count_tokens(body: CountRequest, request: Request) -> Response:
    service: Service = request.app.state.service
    service.model_name(body.model)
    prompt = await _encode(service, body, _tools(body, service))
    return JSONResponse({"input_tokens": len(prompt.ids)})


def _sampling(
    body: MessagesRequest, tools: ToolUse | None, tokenizer: Tokenizer | None
) -> SamplingParams:
    structured = None
    if tools is not None and tokenizer is not None:
        structured = tools.structured(tokenizer)
    return SamplingParams(
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        stop=tuple(body.stop_sequences or ()),
        max_tokens=body.max_tokens,
        structured=structured,
        skip_special_tokens=tools is None,  # the marks of a call may be special tokens
    )


async def _encode(service: Service, body: CountRequest, tools: ToolUse | None) -> Conversation:
    conversation = _conversation(body)
    definitions = tools.for_template() if tools is not None else None
    return await encode_messages(service, conversation, tools=definitions)


def _tools(body: CountRequest, service: Service) -> ToolUse | None:
    functions = [
        {
            "name": tool.name,
            "description": tool.description,
            "parameters": tool.input_schema,
            "strict": tool.strict,
        }
        for tool in body.tools or ()
    ]
    choice = body.tool_choice or ToolChoice(type="auto")
    if (choice.type == "tool") != (choice.name is not None):
        raise ApiError(400, "tool_choice: type `tool` needs a name, the others have none")
    return tool_use(
        service.tool_format if functions else None,
        functions,
        choice={"any": "required", "tool": "required"}.get(choice.type, choice.type),
        name=choice.name,
        one=bool(choice.disable_parallel_tool_use),
    )


def _conversation(body: CountRequest) -> list[TemplateMessage]:
    """Anthropic's messages as templates know them."""
    result: list[TemplateMessage] = []
    if body.system is not None:
        system = body.system
        text = system if isinstance(system, str) else "\n".join(b.text for b in system)
        result.append({"role": "system", "content": text})
    for i, message in enumerate(body.messages):
        if isinstance(message.content, str):
            result.append({"role": message.role, "content": message.content})
            continue
        result += _turn(message.role, message.content, f"messages[{i}].content")
    return result


def _turn(role: str, blocks: list[Block], place: str) -> list[TemplateMessage]:
    """A message of blocks: results of tools are messages of their own, before the rest."""
    results: list[TemplateMessage] = []
    parts: list[str | NamedImage] = []
    calls = []
    for i, block in enumerate(blocks):
        if isinstance(block, ImageBlock):
            parts.append(NamedImage(block.source.source, f"{place}[{i}]"))
        elif isinstance(block, ToolResultBlock):
            given = block.content
            text = given if isinstance(given, str) else "\n".join(b.text for b in given)
            results.append({"role": "tool", "content": text, "tool_call_id": block.tool_use_id})
        elif isinstance(block, ToolUseBlock):
            function = {"name": block.name, "arguments": block.input}
            calls.append({"id": block.id, "type": "function", "function": function})
        else:
            parts.append(block.text)
    if (results and role != "user") or (calls and role != "assistant"):
        raise ApiError(400, f"{place}: tool_use blocks are the assistant's, tool_result the user's")
    if parts or calls or not results:
        turn: TemplateMessage = {"role": role, "content": joined(role, parts)}
        results.append({**turn, "tool_calls": calls} if calls else turn)
    return results


# -- answers ---------------------------------------------------------------------------------------


def _message(generation: Generation, usage: Usage | None) -> dict[str, Any]:
    """The message object; without `usage` as it begins."""
    return {
        "id": f"msg_{generation.context.id}",
        "type": "message",
        "role": "assistant",
        "model": generation.model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": _usage(usage or Usage(len(generation.prompts[0].ids), 0, 0)),
    }


def _usage(usage: Usage) -> dict[str, int]:
    """Anthropic counts cached tokens beside, not among, those of the input."""
    return {
        "input_tokens": usage.prompt - usage.cached,
        "cache_read_input_tokens": usage.cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.generated,
    }


def _stop(sample: CompletionOutput, called: bool) -> dict[str, str | None]:
    reason, text = "end_turn", None
    if sample.finish_reason != "stop":
        reason = "max_tokens"
    elif called:
        reason = "tool_use"
    elif isinstance(sample.stop_reason, str):
        reason, text = "stop_sequence", sample.stop_reason
    return {"stop_reason": reason, "stop_sequence": text}


def _content(sample: CompletionOutput, tools: ToolUse | None) -> tuple[list[dict[str, Any]], bool]:
    """The blocks of an answer, and whether tools are called."""
    text, calls = sample.text, []
    if tools is not None:
        parser = tools.parser()
        pushed, ended = parser.push(text), parser.finish()
        text, calls = pushed[0] + ended[0], [*pushed[1], *ended[1]]
    blocks: list[dict[str, Any]] = []
    if text or not calls:
        blocks.append({"type": "text", "text": text})
    for call in calls:
        blocks.append({**_tool_block(call), "input": json.loads(call.arguments)})
    return blocks, bool(calls)


def _tool_block(call: Call) -> dict[str, Any]:
    return {"type": "tool_use", "id": f"toolu_{call.id}", "name": call.name, "input": {}}


class _Events:
    """A message as its typed events: one block open at a time."""

    def __init__(self, generation: Generation, tools: ToolUse | None) -> None:
        self._generation = generation
        self._parser = tools.parser() if tools is not None else None
        self._index = -1  # of the block begun last
        self._text_open = False

    def begin(self) -> str:
        message = _message(self._generation, None)
        return event("message_start", {"type": "message_start", "message": message})

    def piece(self, piece: Piece) -> str:
        text = piece.text
        calls: list[Call] = []
        if self._parser is not None:
            text, calls = self._parser.push(text)
            if piece.finish_reason is not None:
                rest, more = self._parser.finish()
                text, calls = text + rest, [*calls, *more]
        return (self._text(text) if text else "") + "".join(map(self._call, calls))

    def _text(self, text: str) -> str:
        begin = ""
        if not self._text_open:
            begin = self._begin({"type": "text", "text": ""})
            self._text_open = True
        return (
            f'{begin}event: content_block_delta\ndata: {{"type": "content_block_delta", "index": {self._index}, '
            f'"delta": {{"type": "text_delta", "text": {json.dumps(text)}}}}}\n\n'
        )

    def _call(self, call: Call) -> str:
        begin = self._stop_text() + self._begin(_tool_block(call))
        delta = {"type": "input_json_delta", "partial_json": call.arguments}
        name = "content_block_delta"
        return (
            begin
            + event(name, {"type": name, "index": self._index, "delta": delta})
            + self._stop_block()
        )

    def _begin(self, block: dict[str, Any]) -> str:
        self._index += 1
        name = "content_block_start"
        return event(name, {"type": name, "index": self._index, "content_block": block})

    def _stop_text(self) -> str:
        was_open, self._text_open = self._text_open, False
        return self._stop_block() if was_open else ""

    def _stop_block(self) -> str:
        return event("content_block_stop", {"type": "content_block_stop", "index": self._index})

    def end(self, outputs: list[RequestOutput]) -> str:
        (sample,) = outputs[0].outputs
        called = self._parser is not None and self._parser.num_calls > 0
        begin = self._text("") if self._index < 0 else ""  # a message has at least one block
        delta = {
            "type": "message_delta",
            "delta": _stop(sample, called),
            "usage": _usage(Usage.of(outputs)),
        }
        stop = begin + self._stop_text()
        return (
            stop + event("message_delta", delta) + event("message_stop", {"type": "message_stop"})
        )

    def error(self, error: ApiError) -> str:
        return event("error", error.body("/v1/messages"))
