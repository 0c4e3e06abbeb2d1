"""When a sequence ends, and which of its text may be shown before that is known.

A sequence ends with the first of these:

* a stop string is complete: the text ends before it;
* a token of `stop_token_ids`, or an end token of the model unless `ignore_eos`: its text is not
  output;
* the token after which nothing can follow in a structured output: its text is output;
* the token number `max_tokens`.

A stop string is complete at its last character. Of several that are complete at the same character
the longest counts, so the result does not depend on how the text was cut into pieces. The first two
do not act before `min_tokens` tokens: a stop string must then end in the text that token number
`min_tokens` or a later one brings.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from hayate.runtime.outputs import FinishReason
from hayate.sampling_params import MAX_STOPS, SamplingParams


class TextStream(Protocol):
    """Where the text of tokens comes from, such as `text.detokenizer.IncrementalDetokenizer`."""

    def push(self, ids: Iterable[int]) -> str: ...

    def flush(self) -> str: ...


@dataclass(frozen=True)
class Emission:
    """Text that is now certain, and why the sequence ended if it did.

    stop_reason: the stop string or the token of `stop_token_ids`; None for an end token of the
    model.
    """

    text: str = ""
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


class StopChecker:
    """Follows one sequence, token by token.

    params: `stop`, `stop_token_ids`, `max_tokens`, `min_tokens` and `ignore_eos` count here.
    eos_ids: the model's end tokens. stream: gives the tokens' text; None when there is no
    tokenizer.
    """

    def __init__(
        self, params: SamplingParams, eos_ids: Iterable[int], stream: TextStream | None = None
    ) -> None:
        self._stream = stream
        self._stop_ids = frozenset(params.stop_token_ids)
        self._eos_ids = frozenset() if params.ignore_eos else frozenset(eos_ids)
        self._min_tokens = params.min_tokens
        self._max_tokens = params.max_tokens
        self._matchers = [_Matcher(string) for string in params.stop]
        self._held = ""
        self.num_tokens = 0

    def push(self, token_id: int, is_complete: bool = False) -> Emission:
        """Take the next token. An emission with a finish_reason is the last: do not push again.

        is_complete: a structured output is complete with this token (`Matcher.is_complete`).
        """
        self.num_tokens += 1
        may_stop = self.num_tokens >= self._min_tokens
        if may_stop and token_id in self._stop_ids:
            return self._end("stop", token_id)
        if may_stop and token_id in self._eos_ids:
            return self._end("stop", None)
        piece = "" if self._stream is None else self._stream.push((token_id,))
        emission = self._scan(piece, may_stop)
        if emission.finish_reason is None and (is_complete or self.num_tokens == self._max_tokens):
            end = self._end("stop" if is_complete else "length", None)
            return Emission(emission.text + end.text, end.finish_reason, end.stop_reason)
        return emission

    def finish(self) -> str:
        """The text still held back, for a sequence ended from outside (a cancelled request)."""
        return self._end("abort", None).text

    def _end(self, reason: FinishReason, stop_reason: int | None) -> Emission:
        """End of the sequence, unless the stream's last text completes a stop string."""
        tail = "" if self._stream is None else self._stream.flush()
        emission = self._scan(tail, self.num_tokens >= self._min_tokens)
        if emission.finish_reason is not None:
            return emission
        held, self._held = self._held, ""
        return Emission(emission.text + held, reason, stop_reason)

    def _scan(self, piece: str, may_stop: bool) -> Emission:
        """Add a piece of text; emit what cannot be part of a stop string, hold back the rest."""
        if not self._matchers:
            return Emission(piece)
        text = self._held + piece
        for end, char in enumerate(piece, start=len(self._held) + 1):
            complete = [matcher.string for matcher in self._matchers if matcher.advance(char)]
            if complete and may_stop:
                stop = max(complete, key=len)
                self._held = ""
                return Emission(text[: end - len(stop)], "stop", stop)
        held = max(matcher.length for matcher in self._matchers)
        self._held = text[len(text) - held :]
        return Emission(text[: len(text) - held])


class _Matcher:
    """Finds one string in a stream of characters (Knuth, Morris and Pratt 1977).

    `length` is the length of the longest proper prefix of the string that the text seen so far ends
    with.
    """

    def __init__(self, string: str) -> None:
        self.string = string
        self.length = 0
        self._borders = _borders(string)

    def advance(self, char: str) -> bool:
        """Take one character; True when the string is complete with it."""
        self.length = _extend(self.string, self._borders, self.length, char)
        complete = self.length == len(self.string)
        if complete:
            self.length = self._borders[-1]
        return complete


@lru_cache(maxsize=4 * MAX_STOPS)  # the samples of a request share their tables
def _borders(string: str) -> Sequence[int]:
    """Entry i is the length of the longest proper border of string[: i + 1]."""
    borders = [0]
    for char in string[1:]:
        borders.append(_extend(string, borders, borders[-1], char))
    return borders


def _extend(string: str, borders: Sequence[int], length: int, char: str) -> int:
    """The prefix of `string` matched when `char` follows a matched prefix of `length` characters."""
    while length and string[length] != char:
        length = borders[length - 1]
    return length + 1 if string[length] == char else 0
