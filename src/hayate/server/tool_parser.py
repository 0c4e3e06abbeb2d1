"""Tool calls in a model's answer, read as the answer comes."""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Sequence
from dataclasses import dataclass, field

_ID_ALPHABET = string.ascii_letters + string.digits


@dataclass(frozen=True)
class ToolFormat:
    """Calls are written `begin {"name": ..., arguments: {...}} end`; with `is_list`, as a JSON list of these.

    A call without an end goes to the end of the text. Without a beginning, the whole text is a call if it begins
    with a brace.
    """

    begin: str
    end: str
    arguments: str = "arguments"  # the key
    is_list: bool = False


@dataclass(frozen=True)
class Call:
    """A tool call of the model. arguments: the text of a JSON object."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: "".join(secrets.choice(_ID_ALPHABET) for _ in range(9)))


class ToolParser:
    """Splits an answer, as it comes, into text and calls. What is no valid call stays text.

    names: of the functions that may be called. one: whatever follows the first call is dropped.
    """

    def __init__(self, form: ToolFormat, names: Sequence[str], one: bool = False) -> None:
        self._form = form
        self._names = frozenset(names)
        self._one = one
        self._held = ""  # text that may be the beginning of a call, or a call that has no end yet
        self._in_call = False
        self._at_start = True
        self.num_calls = 0

    def push(self, text: str) -> tuple[str, list[Call]]:
        """The text and the calls that are certain now."""
        self._held += text
        shown = ""
        calls: list[Call] = []
        while not (self._one and self.num_calls):
            if not self._in_call:
                shown += self._take_text()
                if not self._in_call:
                    break
            end = self._held.find(self._form.end) if self._form.end else -1
            if end < 0:
                break
            length = end + len(self._form.end)
            body, self._held = self._held[:end], self._held[length:]
            shown += self._take_call(body, self._form.end, calls)
        return shown, calls

    def finish(self) -> tuple[str, list[Call]]:
        """What was held back, now that the answer is complete."""
        held, self._held = self._held, ""
        calls: list[Call] = []
        if self._one and self.num_calls:
            return "", []
        return (self._take_call(held, "", calls) if self._in_call else held), calls

    def _take_text(self) -> str:
        """Text up to the beginning of a call, without what may yet become one."""
        begin = self._form.begin
        if not begin:
            if self._at_start and not self._held.strip():
                return ""
            self._in_call = self._at_start and self._held.lstrip().startswith("{")
            self._at_start = False
            return "" if self._in_call else self._hold(0)
        at = self._held.find(begin)
        if at >= 0:
            text, self._held = self._held[:at], self._held[at + len(begin) :]
            self._in_call = True
            return text.rstrip()
        text = self._held
        mark = next(n for n in range(len(begin) - 1, -1, -1) if text.endswith(begin[:n]))
        # Blanks before a call belong to it.
        return self._hold(len(text) - len(text[: len(text) - mark].rstrip()))

    def _hold(self, count: int) -> str:
        """All text but the last `count` characters."""
        length = len(self._held) - count
        text, self._held = self._held[:length], self._held[length:]
        return text

    def _take_call(self, body: str, end: str, calls: list[Call]) -> str:
        """Add the calls of `body`; the text that it is instead, if it is none."""
        self._in_call = False
        found = self._parse(body)
        if found is None:
            return f"{self._form.begin}{body}{end}"
        if self._one:
            found = found[:1]
        calls += found
        self.num_calls += len(found)
        return ""

    def _parse(self, body: str) -> list[Call] | None:
        """The calls of `body`; None unless all are valid, and their arguments can be sent on as JSON in UTF-8."""
        try:
            value = json.loads(body)
        except (ValueError, RecursionError):
            return None
        entries = value if self._form.is_list and isinstance(value, list) else [value]
        calls = []
        for entry in entries:
            if not isinstance(entry, dict) or not isinstance(
                arguments := entry.get(self._form.arguments), dict
            ):
                return None
            name = entry.get("name")
            if not isinstance(name, str) or name not in self._names:
                return None
            try:
                # Python's reader takes NaN, 1e999 (inf) and lone surrogates, which are no JSON.
                text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
                text.encode()
            except (ValueError, RecursionError):
                return None
            calls.append(Call(name, text))
        return calls or None
