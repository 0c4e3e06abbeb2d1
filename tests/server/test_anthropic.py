"""Anthropic's own client against /v1/messages."""

from __future__ import annotations

from typing import Any

import anthropic
import pytest

from hayate import LLM, SamplingParams

MODEL = "tiny-chat"
GREEDY = SamplingParams(temperature=0, max_tokens=24)
TOOL: Any = {
    "name": "get_weather",
    "description": "the weather",
    "input_schema": {
        "type": "object",
        "properties": {"unit": {"enum": ["c", "f"]}},
        "required": ["unit"],
        "additionalProperties": False,
    },
}
TURNS: list[Any] = [{"role": "system", "content": "brief"}, {"role": "user", "content": "hi"}]


def test_message_equals_offline(claude: anthropic.Anthropic, offline: LLM) -> None:
    wanted = offline.chat(TURNS, GREEDY)[0]
    arguments: dict[str, Any] = {
        "model": MODEL,
        "max_tokens": 24,
        "extra_body": {"temperature": 0},
        "system": "brief",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
    }
    got = claude.messages.create(**arguments)
    (block,) = got.content
    assert block.text == wanted.outputs[0].text
    assert got.stop_reason == "max_tokens"
    cached = got.usage.cache_read_input_tokens or 0
    assert got.usage.input_tokens + cached == len(wanted.prompt_token_ids)
    assert got.usage.output_tokens == 24
    with claude.messages.stream(**arguments) as stream:
        assert "".join(stream.text_stream) == wanted.outputs[0].text
        final = stream.get_final_message()
    assert final.stop_reason == "max_tokens"
    assert final.usage.output_tokens == 24


def test_stop_sequence(claude: anthropic.Anthropic, offline: LLM) -> None:
    whole = offline.chat(TURNS, GREEDY)[0].outputs[0].text
    stop = whole[8:10]
    got = claude.messages.create(
        model=MODEL,
        max_tokens=24,
        extra_body={"temperature": 0},
        system=[{"type": "text", "text": "brief", "cache_control": {"type": "ephemeral"}}],
        messages=[{"role": "user", "content": "hi"}],
        stop_sequences=[stop],
    )
    assert (got.stop_reason, got.stop_sequence) == ("stop_sequence", stop)
    assert got.content[0].text == whole[: whole.index(stop)]


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}])
def test_tools(claude: anthropic.Anthropic, choice: Any) -> None:
    arguments: dict[str, Any] = {
        "model": MODEL,
        "max_tokens": 200,
        "tools": [TOOL],
        "tool_choice": choice,
        "messages": [{"role": "user", "content": "hi"}],
    }
    with claude.messages.stream(**arguments) as stream:
        streamed = stream.get_final_message()
    for got in (claude.messages.create(**arguments), streamed):
        assert got.stop_reason == "tool_use"
        (call,) = got.content
        assert call.type == "tool_use"
        assert call.name == "get_weather"
        assert call.input["unit"] in ("c", "f")
    # The call and its result go back into a conversation.
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "sun"}
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": [call.model_dump(exclude_none=True)]},
        {"role": "user", "content": [result, {"type": "text", "text": "and?"}]},
    ]
    answer = claude.messages.create(model=MODEL, max_tokens=4, tools=[TOOL], messages=turns)
    assert answer.content


def test_count_tokens(claude: anthropic.Anthropic, offline: LLM) -> None:
    got = claude.messages.count_tokens(
        model=MODEL, system="brief", messages=[{"role": "user", "content": "hi"}]
    )
    assert got.input_tokens == len(offline.chat(TURNS, GREEDY)[0].prompt_token_ids)


def test_errors_have_anthropics_form(claude: anthropic.Anthropic) -> None:
    messages: Any = [{"role": "user", "content": "hi"}]
    with pytest.raises(anthropic.NotFoundError) as missing:
        claude.messages.create(model="claude", max_tokens=4, messages=messages)
    assert missing.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]
    with pytest.raises(anthropic.BadRequestError, match="thinking"):
        claude.messages.create(
            model=MODEL,
            max_tokens=4000,
            messages=messages,
            thinking={"type": "enabled", "budget_tokens": 2000},
        )
    image = {"type": "base64", "media_type": "image/png", "data": "AAAA"}
    picture: Any = [{"role": "user", "content": [{"type": "image", "source": image}]}]
    with pytest.raises(anthropic.BadRequestError, match="no images"):
        claude.messages.create(model=MODEL, max_tokens=4, messages=picture)
