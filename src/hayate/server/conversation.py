"""Conversations as a chat template takes them, and their prompts as token ids."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hayate.server.errors import ApiError
from hayate.server.images import NamedImage, open_images
from hayate.server.openai_types import (
    AssistantMessage,
    ChatMessage,
    Content,
    ImagePart,
    ToolMessage,
)
from hayate.server.service import Service

if TYPE_CHECKING:
    import numpy as np

    from hayate.runtime.conversation import Conversation

_LONG_TEXT = (
    4096  # characters; more is rendered and encoded in a thread: the event loop must not wait
)

TemplateMessage = dict[str, Any]


def template_messages(messages: Sequence[ChatMessage]) -> list[TemplateMessage]:
    """OpenAI's messages as templates know them: texts are strings, arguments of tool calls objects.

    The content of a message that shows images is the list of its parts, each image a `NamedImage`.
    """
    result: list[TemplateMessage] = []
    for i, message in enumerate(messages):
        # Templates know no "developer"; it is the later name of the same role.
        role = "system" if message.role == "developer" else message.role
        entry: TemplateMessage = {"role": role}
        if message.content is not None:
            entry["content"] = _content(role, message.content, f"messages[{i}].content")
        if isinstance(message, AssistantMessage):
            if message.tool_calls:
                entry["tool_calls"] = _calls(message, f"messages[{i}].tool_calls")
            elif message.content is None:
                raise ApiError(
                    400,
                    f"messages[{i}] needs content or tool_calls",
                    param=f"messages[{i}].content",
                )
        elif isinstance(message, ToolMessage):
            entry["tool_call_id"] = message.tool_call_id
        result.append(entry)
    return result


def _content(role: str, content: Content, place: str) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    parts: list[str | NamedImage] = []
    for i, part in enumerate(content):
        if isinstance(part, ImagePart):
            image = part.image_url
            parts.append(NamedImage(image.url, f"{place}[{i}]", image.detail == "low"))
        else:
            parts.append(part.text)
    return joined(role, parts)


def joined(role: str, parts: Sequence[str | NamedImage]) -> str | list[dict[str, Any]]:
    """The content of a message: its texts joined by line ends, or, where it shows images, a list of parts."""
    images = [part for part in parts if isinstance(part, NamedImage)]
    if not images:
        return "\n".join(str(part) for part in parts)
    if role != "user":
        place = images[0].place
        raise ApiError(
            400, f"{place}: images belong in messages of the user, not of {role!r}", param=place
        )
    return [
        {"type": "image", "image": part}
        if isinstance(part, NamedImage)
        else {"type": "text", "text": part}
        for part in parts
    ]


def _calls(message: AssistantMessage, place: str) -> list[dict[str, Any]]:
    calls = []
    for i, call in enumerate(message.tool_calls or ()):
        try:
            arguments = json.loads(call.function.arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise ApiError(
                400,
                f"{place}[{i}].function.arguments is not the text of a JSON object",
                param=f"{place}[{i}].function.arguments",
            )
        function = {"name": call.function.name, "arguments": arguments}
        calls.append({"id": call.id, "type": "function", "function": function})
    return calls


async def encode_messages(
    service: Service,
    messages: Sequence[TemplateMessage],
    *,
    tools: list[dict[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
    add_generation_prompt: bool = True,
    check: bool = True,
) -> Conversation:
    """A conversation as a prompt, its images opened.

    variables: for the template. Raises UsageError when the template refuses it; ApiError for an image (see
    `open_images`) and, with `check`, when it is too long.
    """
    template, tokenizer = service.chat_template(), service.llm.tokenizer
    given = {"add_generation_prompt": add_generation_prompt, "tools": tools, **(variables or {})}
    if images := list(_images(messages)):
        prompt = await _encode_images(service, messages, images, given)
        return _fitting(service, prompt, "messages") if check else prompt

    def encode() -> Conversation:
        text = template.render(messages, **given)
        assert tokenizer is not None
        return _prompt(text, tokenizer.encode(text, add_special_tokens=False))

    long = _is_long([m.get("content") or "" for m in messages]) or tools or variables
    prompt = await asyncio.to_thread(encode) if long else encode()
    return _fitting(service, prompt, "messages") if check else prompt


async def _encode_images(
    service: Service,
    messages: Sequence[TemplateMessage],
    images: list[NamedImage],
    variables: Mapping[str, Any],
) -> Conversation:
    low = sum(image.low for image in images)
    if 0 < low < len(images):
        place = next(image.place for image in images if image.low)
        raise ApiError(
            400,
            f"{place}: detail `low` is implemented for all images of a request, or for none",
            param=place,
        )
    opened = iter(await open_images(service, images))
    shown = [_with_pixels(message, opened) for message in messages]
    read = functools.partial(
        service.llm.requests.read, shown, max_slices=1 if low else None, files=False, **variables
    )
    return await asyncio.to_thread(read)


def _images(messages: Sequence[TemplateMessage]) -> Iterator[NamedImage]:
    for message in messages:
        if isinstance(message.get("content"), list):
            yield from (part["image"] for part in message["content"] if part["type"] == "image")


def _with_pixels(message: TemplateMessage, opened: Iterator[np.ndarray]) -> TemplateMessage:
    """`message` with the next pixels in place of each image it names."""
    if not isinstance(message.get("content"), list):
        return message
    parts = [
        {"type": "image", "image": next(opened)} if part["type"] == "image" else part
        for part in message["content"]
    ]
    return {**message, "content": parts}


async def encode_prompts(
    service: Service,
    prompts: Sequence[str | list[int]],
    *,
    add_special_tokens: bool = True,
    check: bool = True,
) -> list[Conversation]:
    """Raw prompts with their token ids; with `check`, ApiError when one is too long."""
    requests = service.llm.requests
    tokenizer = service.llm.tokenizer

    def encode() -> list[Conversation]:
        encoded = []
        for prompt in prompts:
            if isinstance(prompt, str):
                if tokenizer is None:
                    raise ApiError(
                        400, "this model has no tokenizer: give token ids", param="prompt"
                    )
                encoded.append(_prompt(prompt, tokenizer.encode(prompt, add_special_tokens)))
            else:
                encoded.append(_prompt(None, requests.checked_ids(prompt)))
        return encoded

    encoded = await asyncio.to_thread(encode) if _is_long(prompts) else encode()
    return [_fitting(service, prompt, "prompt") for prompt in encoded] if check else encoded


def _prompt(text: str | None, ids: list[int]) -> Conversation:
    from hayate.runtime.conversation import Conversation  # with torch, which takes seconds

    return Conversation(text, ids)


def _fitting(service: Service, prompt: Conversation, param: str) -> Conversation:
    """`prompt`, unless it leaves no room for an answer."""
    limit = service.llm.plan.max_model_len
    if len(prompt.ids) >= limit:
        raise ApiError(
            400,
            f"the prompt has {len(prompt.ids)} tokens and the context holds {limit}, one of which is for the answer",
            param=param,
            code="context_length_exceeded",
        )
    return prompt


def _is_long(parts: Sequence[str | list[int]]) -> bool:
    return len(parts) > 100 or sum(map(len, parts)) > _LONG_TEXT
