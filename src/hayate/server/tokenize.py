"""POST /tokenize and /detokenize: text to token ids, and back."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from pydantic import model_validator
from starlette.responses import JSONResponse, Response

from hayate.server.conversation import encode_messages, encode_prompts, template_messages
from hayate.server.errors import ApiError
from hayate.server.openai_types import Body, ChatMessages, TokenIds
from hayate.server.service import Service

router = APIRouter()
_MANY_IDS = 4096  # decoding more takes milliseconds, for which the event loop must not wait


class TokenizeRequest(Body):
    """A raw prompt, or a conversation for the chat template."""

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool = True
    messages: ChatMessages | None = None
    add_generation_prompt: bool = True

    @model_validator(mode="after")
    def _check(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: TokenIds
    skip_special_tokens: bool = False


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, request: Request) -> Response:
    service: Service = request.app.state.service
    service.model_name(body.model)
    if body.messages is not None:
        messages = template_messages(body.messages)
        encoded = await encode_messages(
            service, messages, add_generation_prompt=body.add_generation_prompt, check=False
        )
    else:
        assert body.prompt is not None
        (encoded,) = await encode_prompts(
            service, [body.prompt], add_special_tokens=body.add_special_tokens, check=False
        )
    result: dict[str, Any] = {
        "count": len(encoded.ids),
        "max_model_len": service.llm.plan.max_model_len,
        "tokens": encoded.ids,
    }
    return JSONResponse(result)


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
    service: Service = request.app.state.service
    service.model_name(body.model)
    tokenizer = service.llm.tokenizer
    if tokenizer is None:
        raise ApiError(400, "this model has no tokenizer")
    checked_ids = service.llm.requests.checked_ids

    def decode() -> str:
        ids = checked_ids(body.tokens) if body.tokens else []
        return tokenizer.decode(ids, body.skip_special_tokens)

    many = len(body.tokens) > _MANY_IDS
    return JSONResponse({"prompt": await asyncio.to_thread(decode) if many else decode()})
