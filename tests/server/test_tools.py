"""Tool calls: found in templates, in answers cut anywhere, and made sure of by grammars."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hayate import LLM
from hayate.errors import UsageError
from hayate.runtime.structured import GrammarCompiler
from hayate.server.tool_parser import ToolFormat, ToolParser
from hayate.server.tools import find_format, required_call, tool_use, valid_calls
from hayate.text.chat_template import ChatTemplate

HERMES = ToolFormat("<tool_call>", "</tool_call>")
NEMOTRON = ToolFormat("<toolcall>", "</toolcall>")
MISTRAL = ToolFormat("[TOOL_CALLS]", "", is_list=True)
LLAMA = ToolFormat("", "", "parameters")
FUNCTIONS = [
    {
        "name": name,
        "parameters": {
            "type": "object",
            "properties": {"x": {"type": "integer"}},
            "required": ["x"],
            "additionalProperties": False,
        },
    }
    for name in ("f", "g")
]


def parse(form: ToolFormat, answer: str, size: int, one: bool = False) -> tuple[str, list[Any]]:
    """The text and the calls of an answer that comes in pieces of `size` characters."""
    parser = ToolParser(form, ["f", "g"], one)
    text, calls = "", []
    for start in range(0, len(answer), size):
        shown, found = parser.push(answer[start : start + size])
        text += shown
        calls += found
    shown, found = parser.finish()
    assert parser.num_calls == len(calls) + len(found)
    return text + shown, [(c.name, json.loads(c.arguments)) for c in [*calls, *found]]


F, G = ("f", {"x": 1}), ("g", {"x": 2})
CALL_F = '{"name": "f", "arguments": {"x": 1}}'
CALL_G = '{"arguments": {"x": 2}, "name": "g"}'
ANSWERS = [
    (HERMES, "hello", "hello", []),
    (HERMES, f"<tool_call>\n{CALL_F}\n</tool_call>", "", [F]),
    (HERMES, f"I look. \n<tool_call>{CALL_F}</tool_call>", "I look.", [F]),
    (HERMES, f"<tool_call>{CALL_F}</tool_call>\n<tool_call>{CALL_G}</tool_call>", "", [F, G]),
    (HERMES, f"<tool_call>\n{CALL_F}", "", [F]),
    (HERMES, "a < b <tool_ <tool_cal", "a < b <tool_ <tool_cal", []),
    (HERMES, "<tool_call>nonsense</tool_call>!", "<tool_call>nonsense</tool_call>!", []),
    (
        HERMES,
        '<tool_call>{"name": "h", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "h", "arguments": {}}</tool_call>',
        [],
    ),
    (HERMES, '<tool_call>{"name": "f"}</tool_call>', '<tool_call>{"name": "f"}</tool_call>', []),
    (NEMOTRON, f"<toolcall> {CALL_F} </toolcall>", "", [F]),
    (MISTRAL, f"[TOOL_CALLS] [{CALL_F}, {CALL_G}]", "", [F, G]),
    (MISTRAL, "[TOOL", "[TOOL", []),
    (MISTRAL, "[TOOL_CALLS] [", "[TOOL_CALLS] [", []),
    (LLAMA, '{"name": "f", "parameters": {"x": 1}}', "", [F]),
    (LLAMA, '\n{"name": "f", "parameters": {"x": 1}}', "", [F]),
    (LLAMA, 'see {"name": "f", "parameters": {}}', 'see {"name": "f", "parameters": {}}', []),
    (LLAMA, '{"a": 1}', '{"a": 1}', []),
    # What Python reads as JSON and no client would, nor names that no dictionary may look up.
    *(
        (LLAMA, text, text, [])
        for text in (
            '{"name": [], "parameters": {}}',
            '{"name": {}, "parameters": {}}',
            '{"name": "f", "parameters": {"x": NaN}}',
            '{"name": "f", "parameters": {"x": [-1e999]}}',
            '{"name": "f", "parameters": {"x": "\\ud83d"}}',
            '{"name": "f", "parameters": {"\\udc00": 1}}',
        )
    ),
]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(("form", "answer", "text", "calls"), ANSWERS)
def test_answers(form: ToolFormat, answer: str, text: str, calls: list[Any], size: int) -> None:
    assert parse(form, answer, size) == (text, calls)


@pytest.mark.parametrize("size", [1, 1000])
def test_one_call_at_most(size: int) -> None:
    both = f"<tool_call>{CALL_F}</tool_call><tool_call>{CALL_G}</tool_call> bye"
    assert parse(HERMES, both, size, one=True) == ("", [F])
    assert parse(MISTRAL, f"[TOOL_CALLS][{CALL_F}, {CALL_G}]", size, one=True) == ("", [F])


def test_text_is_not_held_back() -> None:
    parser = ToolParser(HERMES, ["f"])
    assert parser.push("a <b <tool") == ("a <b", [])
    assert parser.push("box ") == (" <toolbox", [])
    assert parser.finish() == (" ", [])


# -- templates -------------------------------------------------------------------------------------

_TURN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
_TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}"
_END = "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


def calls(written: str) -> str:
    return f"{_TOOLS}{_TURN}{{% for c in m.tool_calls or [] %}}{written}{{% endfor %}}{_END}"


@pytest.mark.parametrize(
    ("source", "form"),
    [
        (calls("<tool_call>{{ c.function | tojson }}</tool_call>"), HERMES),
        (calls("<toolcall> {{ c.function | tojson }} </toolcall>"), NEMOTRON),
        (calls("[TOOL_CALLS] [{{ c.function | tojson }}]"), MISTRAL),
        (
            calls(
                '{"name": "{{ c.function.name }}", "parameters": {{ c.function.arguments | tojson }}}'
            ),
            LLAMA,
        ),
        (calls("call {{ c.function.name }} with {{ c.function.arguments | tojson }}"), None),
        (calls("<fn>{{ c.function | tojson }}</fn>"), None),
        (f"{_TURN}{_END}", None),
        (f"{_TOOLS}{_TURN}{_END}", None),
        ("{{ raise_exception('no tools') if tools }}" + _TURN + _END, None),
    ],
)
def test_the_format_is_found_in_the_template(source: str, form: ToolFormat | None) -> None:
    assert find_format(ChatTemplate(source)) == form


# -- grammars --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiler(offline: LLM) -> GrammarCompiler:
    assert offline.tokenizer is not None
    return GrammarCompiler(offline.tokenizer, offline.config.vocab_size, (257,))


@pytest.mark.parametrize("form", [HERMES, NEMOTRON, MISTRAL, LLAMA])
def test_a_required_call(compiler: GrammarCompiler, offline: LLM, form: ToolFormat) -> None:
    tokenizer = offline.tokenizer
    assert tokenizer is not None
    structured = required_call(form, FUNCTIONS, tokenizer)
    good = f'{{"name": "g", "{form.arguments}": {{"x": 12}}}}'
    if form.is_list:
        good = f"[{good}]"
    answers = [f"{form.begin}{good}{form.end}"]
    if form.begin:
        answers.append(f"{form.begin}\n{good}\n{form.end}" if form.end else f"{form.begin} {good}")
    for answer in answers:
        matcher = compiler.matcher(structured, (257,))
        ids = tokenizer.encode(answer, add_special_tokens=False)
        assert matcher.valid_prefix(ids) == len(ids), answer
        for i in ids:
            matcher.accept(i)
        assert matcher.is_accepting
        assert parse(form, answer, 3)[1] == [("g", {"x": 12})]
    for bad in (answers[0].replace('"g"', '"h"'), answers[0].replace("12", '"12"'), "hello"):
        ids = tokenizer.encode(bad, add_special_tokens=False)
        assert compiler.matcher(structured, (257,)).valid_prefix(ids) < len(ids), bad


@pytest.mark.parametrize("form", [HERMES, MISTRAL])
def test_calls_that_are_valid_if_made(
    compiler: GrammarCompiler, offline: LLM, form: ToolFormat
) -> None:
    tokenizer = offline.tokenizer
    assert tokenizer is not None
    structured = valid_calls(form, FUNCTIONS, tokenizer)
    call = f'{{"name": "f", "{form.arguments}": {{"x": 1}}}}'
    call = f"{form.begin}[{call}]" if form.is_list else f"{form.begin}{call}{form.end}"
    for answer, is_valid in (
        ("just text", True),
        (f"text {call}", True),
        (call.replace('"f"', '"h"'), False),
        (f"{form.begin}{{}}", False),
    ):
        matcher = compiler.matcher(structured, (257,))
        ids = tokenizer.encode(answer, add_special_tokens=False)
        assert (matcher.valid_prefix(ids) == len(ids)) == is_valid, answer
    with pytest.raises(UsageError, match="strict"):
        valid_calls(LLAMA, FUNCTIONS, tokenizer)


def test_marks_that_are_special_tokens(offline: LLM) -> None:
    """Special tokens are no text: a grammar must name them by id."""
    assert offline.tokenizer is not None
    form = ToolFormat("<|im_start|>", "<|im_end|>")
    source = required_call(form, FUNCTIONS, offline.tokenizer).source
    assert "<[258]>" in source
    assert "<[259]>" in source
    compiler = GrammarCompiler(offline.tokenizer, offline.config.vocab_size, (257,))
    for make in (required_call, valid_calls):
        matcher = compiler.matcher(make(form, FUNCTIONS, offline.tokenizer), (257,))
        answer = '<|im_start|>{"name": "f", "arguments": {"x": 1}}<|im_end|>'
        ids = offline.tokenizer.encode(answer, add_special_tokens=False)
        assert {258, 259} <= set(ids)
        assert matcher.valid_prefix(ids) == len(ids)


def test_what_a_request_wants() -> None:
    assert tool_use(None, [], choice="auto") is None
    assert tool_use(HERMES, FUNCTIONS, choice="none") is None
    use = tool_use(HERMES, FUNCTIONS, choice="auto", name="g")
    assert use is not None
    assert use.required
    assert [f["name"] for f in use.functions] == ["g"]
    for functions, choice, name, form in (
        ([], "required", None, HERMES),
        (FUNCTIONS, "auto", "h", HERMES),
        (FUNCTIONS, "auto", None, None),
        ([*FUNCTIONS, FUNCTIONS[0]], "auto", None, HERMES),
    ):
        with pytest.raises(UsageError):
            tool_use(form, functions, choice=choice, name=name)
