"""Log-probabilities in OpenAI's two forms."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from hayate.runtime.outputs import PositionLogprobs, TokenLogprob
from hayate.text.detokenizer import token_bytes
from hayate.text.tokenizer import Tokenizer

_MAX_NAMES = 4096  # kept at once, of one request
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenNames:
    """The text of single tokens. A part of a character is written `bytes:\\xe9`, as OpenAI does."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._name = lru_cache(_MAX_NAMES)(self._decoded)

    def __call__(self, token_id: int) -> str:
        name, part = self._name(token_id)
        return name if part is None else "bytes:" + "".join(f"\\x{byte:02x}" for byte in part)

    def bytes_of(self, token_id: int) -> list[int]:
        name, part = self._name(token_id)
        return list(name.encode() if part is None else part)

    def _decoded(self, token_id: int) -> tuple[str, bytes | None]:
        """The text; where that is none by itself, the bytes."""
        if self._tokenizer is None:
            return str(token_id), None
        written = self._tokenizer.token_text(token_id) or ""
        if "\u2581" in written:  # SentencePiece: decoding one token alone would drop its space
            return written.replace("\u2581", " "), None
        text = self._tokenizer.decode([token_id], skip_special_tokens=False)
        if "\ufffd" not in text:
            return text, None
        byte = _BYTE_TOKEN.fullmatch(written)
        return text, bytes([int(byte[1], 16)]) if byte else token_bytes(written)


def chat_logprobs(positions: Iterable[PositionLogprobs], names: TokenNames) -> dict[str, Any]:
    """`choices[].logprobs` of a chat completion."""

    def entry(token: TokenLogprob) -> dict[str, Any]:
        return {
            "token": names(token.token_id),
            "logprob": token.logprob,
            "bytes": names.bytes_of(token.token_id),
        }

    content = [{**entry(p.token), "top_logprobs": [entry(t) for t in p.top]} for p in positions]
    return {"content": content, "refusal": None}


def completion_logprobs(
    positions: Iterable[PositionLogprobs], names: TokenNames, offset: int = 0
) -> dict[str, Any]:
    """`choices[].logprobs` of a completion. offset: characters of the text before the first position."""
    result: dict[str, Any] = {
        "tokens": [],
        "token_logprobs": [],
        "top_logprobs": [],
        "text_offset": [],
    }
    for position in positions:
        text = names(position.token.token_id)
        result["tokens"].append(text)
        result["token_logprobs"].append(position.token.logprob)
        result["top_logprobs"].append({names(t.token_id): t.logprob for t in position.top})
        result["text_offset"].append(offset)
        offset += len(text)
    return result
