"""Turning a growing sequence of token ids into text, piece by piece.

The pieces of one sequence, joined, are exactly `tokenizer.decode(all ids)`, and no piece ends
inside a character. Both hold for every sequence of ids, also for bytes that are not UTF-8, because
each stream below follows the decoder of tokenizer.json step by step and holds back just what later
tokens can still change:

* ByteLevel: the bytes of a character that is not complete.
* Replace, ByteFallback, Fuse, Strip (SentencePiece): a run of byte tokens `<0x..>`, until the run
  ends: one bad byte turns its whole run into U+FFFD.
* Metaspace: nothing.
* any other decoder: the sequence is decoded from its start each time. Slower (linear in its length
  for each token), but right.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from hayate.text.tokenizer import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_REPLACEMENT = "\ufffd"


class IncrementalDetokenizer:
    """The text of one sequence as its tokens arrive.

    `push(ids)` takes the next ids and returns the text that is now certain, perhaps none; `flush()`
    returns the rest when the sequence has ended, and must be the last call. A push costs O(1) for
    each token, amortised, for every decoder but the last kind above.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._stream = _stream_for(tokenizer)

    def push(self, ids: Iterable[int]) -> str:
        return self._stream.push(self._tokens(ids))

    def flush(self) -> str:
        return self._stream.flush()

    def _tokens(self, ids: Iterable[int]) -> Iterator[str]:
        """The vocabulary's texts of `ids`, without skipped ids and those outside it."""
        for token_id in ids:
            if token_id not in self._skipped:
                token = self._tokenizer.token_text(token_id)
                if token is not None:
                    yield token


class _Stream(Protocol):
    def push(self, tokens: Iterable[str]) -> str: ...

    def flush(self) -> str: ...


def _byte_level_alphabet() -> dict[str, int]:
    """Character -> byte: printable Latin-1 is itself, the other bytes are U+0100 onwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(0x100 + i): byte for i, byte in enumerate(others)})
    return alphabet


_BYTE_OF = _byte_level_alphabet()


class _ByteLevelStream:
    """Tokens are bytes in the byte-level alphabet; with any other character, plain text."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, tokens: Iterable[str]) -> str:
        return "".join(self._utf8.decode(token_bytes(token)) for token in tokens)

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


def token_bytes(token: str) -> bytes:
    """The bytes of a token of a byte-level vocabulary, as that writes it."""
    try:
        return bytes([_BYTE_OF[char] for char in token])
    except KeyError:
        return token.encode("utf-8")


class _PieceStream:
    """Tokens are pieces of text: replace, then byte fallback, then strip the start of the text.

    replacements: (old, new) pairs applied to each token in order. byte_fallback: tokens `<0x..>`
    are bytes; a run of them that is not UTF-8 gives one U+FFFD a token. strip: (character, count):
    at most `count` of it are taken off the start of the text. drop_in_first: a character that
    disappears from the first token.
    """

    def __init__(
        self,
        replacements: Sequence[tuple[str, str]] = (),
        byte_fallback: bool = False,
        strip: tuple[str, int] = ("", 0),
        drop_in_first: str = "",
    ) -> None:
        self._replacements = replacements
        self._byte_fallback = byte_fallback
        self._strip_char, self._strip_left = strip
        self._drop_in_first = drop_in_first
        self._run = bytearray()

    def push(self, tokens: Iterable[str]) -> str:
        return self._strip("".join(map(self._token, tokens)))

    def flush(self) -> str:
        return self._strip(self._end_run())

    def _token(self, token: str) -> str:
        if self._drop_in_first:
            token = token.replace(self._drop_in_first, "")
            self._drop_in_first = ""
        for old, new in self._replacements:
            token = token.replace(old, new)
        if self._byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            self._run.append(int(match[1], 16))
            return ""
        return self._end_run() + token if self._run else token

    def _end_run(self) -> str:
        run, self._run = self._run, bytearray()
        try:
            return run.decode("utf-8")
        except UnicodeDecodeError:
            return _REPLACEMENT * len(run)

    def _strip(self, text: str) -> str:
        while self._strip_left and text:
            if text[0] != self._strip_char:
                self._strip_left = 0
                break
            self._strip_left -= 1
            text = text[1:]
        return text


class _WholeStream:
    """Any decoder: decode all tokens so far, emit what was not emitted, hold back what may change.

    steps: the decoder's steps. What a text-wide Replace will change is not foreseeable, so with one
    of these the whole text waits for `flush`.
    """

    def __init__(self, tokenizer: Tokenizer, steps: Sequence[dict[str, Any]]) -> None:
        self._decoder = tokenizer.backend.decoder
        self._tokens: list[str] = []
        self._emitted = 0
        kinds = [step["type"] for step in steps]
        joined = [i for i, kind in enumerate(kinds) if kind in ("Fuse", "ByteLevel")]
        self._waits = bool(joined) and "Replace" in kinds[joined[0] :]

    def push(self, tokens: Iterable[str]) -> str:
        self._tokens.extend(tokens)
        if self._waits or not self._tokens or _BYTE_TOKEN.fullmatch(self._tokens[-1]):
            return ""
        return self._emit(self._decode().rstrip(_REPLACEMENT))

    def flush(self) -> str:
        return self._emit(self._decode())

    def _decode(self) -> str:
        if self._decoder is None:
            return " ".join(self._tokens)
        return self._decoder.decode(self._tokens)

    def _emit(self, text: str) -> str:
        piece = text[self._emitted :]
        self._emitted += len(piece)
        return piece


def _stream_for(tokenizer: Tokenizer) -> _Stream:
    """The stream that follows the tokenizer's decoder."""
    decoder = tokenizer.backend.decoder
    steps = [] if decoder is None else _flatten(json.loads(decoder.__getstate__()))
    if [step["type"] for step in steps] == ["ByteLevel"]:
        return _ByteLevelStream()
    return _piece_stream(steps) or _WholeStream(tokenizer, steps)


def _flatten(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    if decoder["type"] == "Sequence":
        return [step for inner in decoder["decoders"] for step in _flatten(inner)]
    return [decoder]


def _piece_stream(steps: Sequence[dict[str, Any]]) -> _PieceStream | None:
    """A stream for `Replace* ByteFallback? (Fuse Strip?)?` or `Metaspace`, else None."""
    if not steps:
        return None
    if len(steps) == 1 and steps[0]["type"] == "Metaspace":
        mark = steps[0]["replacement"]
        dropped = "" if steps[0]["prepend_scheme"] == "never" else mark
        return _PieceStream([(mark, " ")], drop_in_first=dropped)
    rest = list(steps)
    replacements = []
    while rest and rest[0]["type"] == "Replace" and rest[0]["pattern"].get("String"):
        step = rest.pop(0)
        replacements.append((step["pattern"]["String"], step["content"]))
    byte_fallback = bool(rest) and rest[0]["type"] == "ByteFallback"
    if byte_fallback:
        rest.pop(0)
    strip = ("", 0)
    if rest and rest[0]["type"] == "Fuse":
        rest.pop(0)
        if rest and rest[0]["type"] == "Strip" and rest[0]["stop"] == 0:
            step = rest.pop(0)
            strip = (step["content"], step["start"])
    return None if rest else _PieceStream(replacements, byte_fallback, strip)
