"""Tool calls: how a model's chat template has them written, made sure of by a grammar, and read back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hayate.errors import HayateError, UsageError
from hayate.sampling_params import StructuredOutput
from hayate.server.tool_parser import ToolFormat, ToolParser
from hayate.text.chat_template import ChatTemplate
from hayate.text.tokenizer import Tokenizer

_PROBE = "probe_tool_name"


_FORMATS = (
    ToolFormat("<tool_call>", "</tool_call>"),  # Hermes; Qwen2.5, Qwen3, SmolLM2
    ToolFormat("<toolcall>", "</toolcall>"),  # Nemotron-Mini
    ToolFormat("[TOOL_CALLS]", "", is_list=True),  # Mistral
    ToolFormat("", "", "parameters"),  # Llama 3.1
)


def find_format(template: ChatTemplate) -> ToolFormat | None:
    """The format in which `template` writes calls of earlier turns; None when it takes no tools."""
    function = {
        "name": _PROBE,
        "description": "",
        "parameters": {"type": "object", "properties": {}},
    }
    tools = [{"type": "function", "function": function}]
    user = {"role": "user", "content": "?"}
    call = {
        "id": "probe0000",
        "type": "function",
        "function": {"name": _PROBE, "arguments": {"probe_key": "1"}},
    }
    turn = {"role": "assistant", "content": "", "tool_calls": [call]}
    try:
        prompt = template.render([user], tools=tools)
        text = template.render([user, turn], add_generation_prompt=False, tools=tools)
    except HayateError:
        return None
    if _PROBE not in prompt:
        return None
    before, _, between = text[: text.find("probe_key")].rpartition(_PROBE)
    for form in _FORMATS:
        # Without a mark, the call is all there is in the turn.
        marked = form.begin in before if form.begin else text.startswith(prompt.rstrip() + "{")
        if marked and f'"{form.arguments}"' in between:
            return form
    return None


# -- the grammar -----------------------------------------------------------------------------------


def required_call(
    form: ToolFormat, functions: Sequence[Mapping[str, Any]], tokenizer: Tokenizer
) -> StructuredOutput:
    """The answer is one call of one of `functions`, its arguments valid under their schema."""
    body = _call_body(form, functions, tokenizer)
    return StructuredOutput.grammar(f"start: {_literal(form.begin, tokenizer)} {body}\n")


def valid_calls(
    form: ToolFormat, functions: Sequence[Mapping[str, Any]], tokenizer: Tokenizer
) -> StructuredOutput:
    """Any text, in which every call is of one of `functions`, its arguments valid under their schema.

    Raises:
        UsageError: in this format nothing tells a call from a text.
    """
    if not form.begin:
        raise UsageError(
            "tools: `strict` is not implemented for this model unless tool_choice requires a call"
        )
    begin, body = _literal(form.begin, tokenizer), _call_body(form, functions, tokenizer)
    text = "TEXT: /(.|\\n)*/\n"
    if begin.startswith("<["):  # a special token is no text: the text before it ends by itself
        return StructuredOutput.grammar(f"start: (TEXT {begin} {body})* TEXT\n{text}")
    trigger = f"trigger[lazy]: TEXT {begin}\n"
    return StructuredOutput.grammar(f"start: (trigger {body})* TEXT\n{trigger}{text}")


def _call_body(
    form: ToolFormat, functions: Sequence[Mapping[str, Any]], tokenizer: Tokenizer
) -> str:
    """What follows the beginning of a call."""
    calls: list[dict[str, Any]] = [
        {
            "type": "object",
            "properties": {
                "name": {"const": function["name"]},
                form.arguments: function.get("parameters") or {"type": "object"},
            },
            "required": ["name", form.arguments],
            "additionalProperties": False,
        }
        for function in functions
    ]
    schema: dict[str, Any] = calls[0] if len(calls) == 1 else {"anyOf": calls}
    if form.is_list:
        schema = {"type": "array", "items": schema, "minItems": 1, "maxItems": 1}
    # As the templates write the calls of earlier turns.
    schema["x-guidance"] = {
        "whitespace_flexible": False,
        "item_separator": ", ",
        "key_separator": ": ",
    }
    gap = "/[ \\n]?/"
    end = f"{gap} {_literal(form.end, tokenizer)}" if form.end else ""
    return f"{gap if form.begin else ''} %json {json.dumps(schema)} {end}"


def _literal(text: str, tokenizer: Tokenizer) -> str:
    """`text` in a grammar, where special tokens are no text but named by their ids."""
    token_id = tokenizer.backend.token_to_id(text) if text else None
    if token_id is not None and token_id in tokenizer.special_ids:
        return f"<[{token_id}]>"
    return json.dumps(text) if text else ""


# -- what a request wants --------------------------------------------------------------------------


@dataclass(frozen=True)
class ToolUse:
    """The tools of one request. functions: name, description, parameters (a JSON schema), strict.

    required: one of `functions` must be called; else they may be. one: at most one call.
    """

    form: ToolFormat
    functions: Sequence[Mapping[str, Any]]
    required: bool
    one: bool

    def for_template(self) -> list[dict[str, Any]]:
        keys = ("name", "description", "parameters")
        return [
            {
                "type": "function",
                "function": {"description": "", "parameters": {"type": "object", "properties": {}}}
                | {key: f[key] for key in keys if f.get(key) is not None},
            }
            for f in self.functions
        ]

    def structured(self, tokenizer: Tokenizer) -> StructuredOutput | None:
        """The form the answer must have; None for any."""
        if self.required:
            return required_call(self.form, self.functions, tokenizer)
        if any(f.get("strict") for f in self.functions):
            return valid_calls(self.form, self.functions, tokenizer)
        return None

    def parser(self) -> ToolParser:
        return ToolParser(self.form, [f["name"] for f in self.functions], self.one)


def tool_use(
    form: ToolFormat | None,
    functions: Sequence[Mapping[str, Any]],
    *,
    choice: str,
    name: str | None = None,
    one: bool = False,
) -> ToolUse | None:
    """What a request wants with its tools; None when it has none, or wants none called.

    choice: "none", "auto" or "required"; name: the function that must be called.

    Raises:
        UsageError: the model's template knows no tools, or there is no function of that name.
    """
    if not functions:
        if choice == "required" or name is not None:
            raise UsageError("tool_choice requires a call, but there are no tools")
        return None
    names = [f["name"] for f in functions]
    if len(set(names)) < len(names):
        raise UsageError("tools: two functions have the same name")
    if choice == "none":
        return None
    if form is None:
        raise UsageError(
            "tools: this model's chat template knows no tools, or writes their calls in no form known here"
        )
    if name is not None and name not in names:
        raise UsageError(f"tool_choice names {name!r}, which is not one of the tools")
    chosen = [f for f in functions if name in (None, f["name"])]
    return ToolUse(form, chosen, choice == "required" or name is not None, one)
