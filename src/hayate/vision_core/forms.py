"""Form: the fields that an answer has, as a prompt, as a JSON schema, and read back from the text of an answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hayate.sampling_params import SamplingParams, StructuredOutput

Value = str | list[str]
# JSON as `json.dumps` writes it, which models know best: nothing is left open between the values.
_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# What may be missing at the end of a text that broke off: the end of a value, of a list, of the object.
_ENDINGS = ("", "}", '"}', "]}", '"]}')


@dataclass(frozen=True)
class Field:
    """A field of an answer: a text, or a list of texts where `max_items` is given. Lengths in characters."""

    name: str
    description: str
    max_length: int  # of the text, or of each in the list
    max_items: int | None = None

    @property
    def schema(self) -> dict[str, Any]:
        text = {"type": "string", "maxLength": self.max_length}
        if self.max_items is None:
            return text
        return {"type": "array", "items": text, "maxItems": self.max_items}

    def value(self, found: object) -> Value:
        """`found` in a parsed answer as a value of this field; empty where it is missing or of another type."""
        if self.max_items is None:
            return _valid(found) if isinstance(found, str) else ""
        items = found if isinstance(found, list) else []
        return [_valid(item) for item in items if isinstance(item, str)]


@dataclass(frozen=True)
class Form:
    """What to ask about an image, and the fields of the answer, in their order."""

    instruction: str
    fields: tuple[Field, ...]

    @property
    def prompt(self) -> str:
        """The instruction, then a line a field."""
        lines = [f"- {field.name}: {field.description}" for field in self.fields]
        return "\n".join([self.instruction, *lines])

    @property
    def schema(self) -> dict[str, Any]:
        """JSON schema of the answer: every field, no others, nothing longer than the form says."""
        return {
            "type": "object",
            "properties": {field.name: field.schema for field in self.fields},
            "required": [field.name for field in self.fields],
            "additionalProperties": False,
            "x-guidance": _SPACING,
        }

    def params(self, sampling: SamplingParams) -> SamplingParams:
        """`sampling`, constrained to answers of this form."""
        return replace(sampling, structured=StructuredOutput.json_schema(self.schema))

    def read(self, text: str) -> dict[str, Value]:
        """The fields of an answer generated with `params`.

        Of a text that broke off (finish reason "length") what there is: its last value may be cut short, fields not
        begun are empty.
        """
        found = _parsed(text)
        return {field.name: field.value(found.get(field.name)) for field in self.fields}


def _parsed(text: str) -> Mapping[str, Any]:
    """The JSON object that `text` is, or the longest that is a beginning of it."""
    for end in range(len(text), 0, -1):
        for ending in _ENDINGS:
            try:
                found = json.loads(text[:end] + ending)
            except ValueError:
                continue
            if isinstance(found, dict):
                return found
    return {}


def _valid(text: str) -> str:
    """JSON can write half a surrogate pair, which is no character and cannot be printed: U+FFFD in its place."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
