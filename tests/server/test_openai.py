"""OpenAI's own client against the server; the truth is what the model gives without a server."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import openai
import pytest

from hayate import LLM, SamplingParams, StructuredOutput
from hayate.runtime.outputs import PositionLogprobs, TokenLogprob
from hayate.server.logprobs import TokenNames, chat_logprobs
from hayate.text.tokenizer import Tokenizer

MODEL = "tiny-chat"
MESSAGES: list[Any] = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "What is gravity? 重力とは"},
]
TURNS: list[Any] = [dict(m) for m in MESSAGES]
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "size": {"enum": [1, 2, 3]}},
    "required": ["ok", "size"],
    "additionalProperties": False,
}
GREEDY = SamplingParams(temperature=0, max_tokens=24)


def text(outputs: list[Any]) -> str:
    return str(outputs[0].outputs[0].text)


# -- chat ------------------------------------------------------------------------------------------


def test_chat_equals_offline(client: openai.OpenAI, offline: LLM) -> None:
    wanted = offline.chat(TURNS, GREEDY)[0]
    got = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, temperature=0, max_completion_tokens=24
    )
    (choice,) = got.choices
    assert choice.message.content == wanted.outputs[0].text
    assert choice.finish_reason == "length"
    assert got.usage is not None
    assert got.usage.prompt_tokens == len(wanted.prompt_token_ids)
    assert got.usage.completion_tokens == 24
    assert got.usage.total_tokens == got.usage.prompt_tokens + 24


def test_chat_stream_equals_offline(client: openai.OpenAI, offline: LLM) -> None:
    wanted = text(offline.chat(TURNS, GREEDY))
    stream = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        temperature=0,
        max_tokens=24,
        stream=True,
        stream_options={"include_usage": True},
    )
    events = list(stream)
    assert events[0].choices[0].delta.role == "assistant"
    assert "".join(e.choices[0].delta.content or "" for e in events if e.choices) == wanted
    assert [e.choices[0].finish_reason for e in events if e.choices][-1] == "length"
    assert [e.usage is not None for e in events] == [False] * (len(events) - 1) + [True]
    assert events[-1].usage is not None
    assert events[-1].usage.completion_tokens == 24
    assert len({e.id for e in events}) == 1


def test_async_client_with_many_streams(url: str, offline: LLM) -> None:
    prompts = [f"number {i}" for i in range(40)]
    wanted = [o.outputs[0].text for o in offline.generate(prompts, GREEDY)]

    async def main() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0
        ) as client:

            async def one(prompt: str) -> str:
                stream = await client.completions.create(
                    model=MODEL, prompt=prompt, temperature=0, max_tokens=24, stream=True
                )
                return "".join([e.choices[0].text async for e in stream])

            return await asyncio.gather(*map(one, prompts))

    assert asyncio.run(main()) == wanted


def test_samples_and_seed(client: openai.OpenAI, offline: LLM) -> None:
    params = SamplingParams(temperature=1.0, n=3, seed=7, max_tokens=12)
    wanted = [o.text for o in offline.chat(TURNS, params)[0].outputs]
    assert len(set(wanted)) == 3
    arguments: dict[str, Any] = {
        "model": MODEL,
        "messages": MESSAGES,
        "temperature": 1.0,
        "n": 3,
        "seed": 7,
        "max_tokens": 12,
    }
    got = client.chat.completions.create(**arguments)
    assert [c.message.content for c in got.choices] == wanted
    streamed = ["", "", ""]
    for event in client.chat.completions.create(**arguments, stream=True):
        for choice in event.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == wanted


def test_stop(client: openai.OpenAI, offline: LLM) -> None:
    whole = text(offline.generate("abc", GREEDY))
    stop = whole[10]
    got = client.completions.create(
        model=MODEL, prompt="abc", temperature=0, max_tokens=24, stop=[stop, "\0\0"]
    )
    assert got.choices[0].text == whole[: whole.index(stop)]
    assert got.choices[0].finish_reason == "stop"


def test_penalties_and_bias_reach_the_engine(client: openai.OpenAI, offline: LLM) -> None:
    params = SamplingParams(
        temperature=0,
        max_tokens=24,
        presence_penalty=1.5,
        frequency_penalty=0.7,
        repetition_penalty=1.3,
    )
    wanted = text(offline.generate("abc", params))
    assert wanted != text(offline.generate("abc", GREEDY))
    got = client.completions.create(
        model=MODEL,
        prompt="abc",
        temperature=0,
        max_tokens=24,
        presence_penalty=1.5,
        frequency_penalty=0.7,
        extra_body={"repetition_penalty": 1.3},
    )
    assert got.choices[0].text == wanted
    biased = client.completions.create(
        model=MODEL, prompt="abc", temperature=0, max_tokens=5, logit_bias={"64": 100}
    )
    assert offline.tokenizer is not None
    assert biased.choices[0].text == offline.tokenizer.decode([64]) * 5


def test_chat_logprobs(client: openai.OpenAI, offline: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=3)
    wanted = offline.chat(TURNS, params)[0].outputs[0].logprobs
    assert wanted is not None
    arguments: dict[str, Any] = {
        "model": MODEL,
        "messages": MESSAGES,
        "temperature": 0,
        "max_tokens": 8,
        "logprobs": True,
        "top_logprobs": 3,
    }
    whole = client.chat.completions.create(**arguments).choices[0].logprobs
    events = client.chat.completions.create(**arguments, stream=True)
    streamed = [
        p for e in events for c in e.choices if c.logprobs for p in c.logprobs.content or ()
    ]
    assert whole is not None
    for content in (whole.content, streamed):
        assert content is not None
        assert [p.logprob for p in content] == [p.token.logprob for p in wanted]
        tops = [[t.logprob for t in p.top_logprobs] for p in content]
        assert tops == [[t.logprob for t in p.top] for p in wanted]
        for position in content:
            assert position.bytes is not None
            raw = bytes(position.bytes)
            name = raw.decode("latin-1").encode("unicode_escape").decode()
            assert position.token in (raw.decode(errors="ignore"), f"bytes:{name}")
    assert content is not None
    joined = b"".join(bytes(p.bytes or ()) for p in content)
    assert joined.decode(errors="replace") == text(offline.chat(TURNS, params))


def test_completion_logprobs_and_offsets(client: openai.OpenAI) -> None:
    arguments: dict[str, Any] = {
        "model": MODEL,
        "prompt": "abc",
        "temperature": 0,
        "max_tokens": 8,
        "logprobs": 2,
    }
    whole = client.completions.create(**arguments).choices[0].logprobs
    assert whole is not None
    assert whole.token_logprobs is not None
    assert whole.top_logprobs is not None
    assert len(whole.token_logprobs) == 8
    for value, top in zip(whole.token_logprobs, whole.top_logprobs, strict=True):
        assert max(top.values()) == value  # greedy: the token taken is the best
    streamed: list[int] = []
    for event in client.completions.create(**arguments, stream=True):
        if event.choices and event.choices[0].logprobs:
            streamed += event.choices[0].logprobs.text_offset or []
    assert streamed == whole.text_offset


# -- completions -----------------------------------------------------------------------------------


def test_prompts_of_all_kinds(client: openai.OpenAI, offline: LLM) -> None:
    assert offline.tokenizer is not None
    texts = ["abc", "xyz!"]
    ids = [offline.tokenizer.encode(t) for t in texts]
    wanted = [o.outputs[0].text for o in offline.generate(texts, GREEDY)]
    arguments: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 24}
    for prompt in (texts, ids):
        got = client.completions.create(prompt=prompt, **arguments)
        assert [c.text for c in got.choices] == wanted
        assert got.usage is not None
        assert got.usage.prompt_tokens == sum(map(len, ids))
    for one in (texts[0], ids[0]):
        assert client.completions.create(prompt=one, **arguments).choices[0].text == wanted[0]
    streamed = ["", "", "", ""]
    stream = client.completions.create(prompt=texts, n=2, stream=True, **arguments)
    for event in stream:
        streamed[event.choices[0].index] += event.choices[0].text
    assert streamed == [wanted[0], wanted[0], wanted[1], wanted[1]]


@pytest.mark.parametrize("stream", [False, True])
def test_echo(client: openai.OpenAI, offline: LLM, stream: bool) -> None:
    wanted = "abc" + text(offline.generate("abc", GREEDY))
    got: Any = client.completions.create(
        model=MODEL, prompt="abc", temperature=0, max_tokens=24, echo=True, stream=stream
    )
    events = got if stream else [got]
    assert "".join(e.choices[0].text for e in events) == wanted


def test_the_default_length_is_openais(client: openai.OpenAI) -> None:
    got = client.completions.create(
        model=MODEL, prompt="abc", temperature=0, extra_body={"ignore_eos": True}
    )
    assert got.usage is not None
    assert got.usage.completion_tokens == 16


# -- structured output -----------------------------------------------------------------------------


def test_json_schema(client: openai.OpenAI) -> None:
    got = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}},
        seed=3,
    )
    value = json.loads(got.choices[0].message.content or "")
    assert set(value) == {"ok", "size"}
    assert value["size"] in (1, 2, 3)
    assert got.choices[0].finish_reason == "stop"


def test_json_object(client: openai.OpenAI, offline: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=40, structured=StructuredOutput.json_object())
    got = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        response_format={"type": "json_object"},
        temperature=0,
        max_tokens=40,
    )
    assert got.choices[0].message.content == text(offline.chat(TURNS, params))
    assert (got.choices[0].message.content or "").startswith("{")


@pytest.mark.parametrize(
    ("wanted", "accepts"),
    [
        ({"regex": "[0-9]{3}"}, lambda t: len(t) == 3 and t.isdecimal()),
        ({"choice": ["yes", "no"]}, lambda t: t in ("yes", "no")),
        ({"grammar": 'start: "a" "b"+ "c"'}, lambda t: re.fullmatch("ab+c?", t)),
        ({"json": {"type": "boolean"}}, lambda t: t in ("true", "false")),
    ],
)
def test_other_forms(client: openai.OpenAI, wanted: dict[str, Any], accepts: Any) -> None:
    got = client.completions.create(
        model=MODEL,
        prompt="abc",
        max_tokens=20,
        seed=1,
        extra_body={"structured_outputs": wanted},
    )
    assert accepts(got.choices[0].text), got.choices[0].text


# -- responses -------------------------------------------------------------------------------------


def test_responses(client: openai.OpenAI, offline: LLM) -> None:
    wanted = text(offline.chat(TURNS, GREEDY))
    got = client.responses.create(
        model=MODEL,
        instructions="be brief",
        input=[
            {"role": "user", "content": [{"type": "input_text", "text": MESSAGES[1]["content"]}]}
        ],
        temperature=0,
        max_output_tokens=24,
    )
    assert got.output_text == wanted
    assert got.status == "incomplete"
    assert got.incomplete_details is not None
    assert got.incomplete_details.reason == "max_output_tokens"
    assert got.usage is not None
    assert got.usage.output_tokens == 24


def test_responses_stream(client: openai.OpenAI, offline: LLM) -> None:
    wanted = text(offline.chat(TURNS[1:], GREEDY))
    events = list(
        client.responses.create(
            model=MODEL,
            input=MESSAGES[1]["content"],
            temperature=0,
            max_output_tokens=24,
            stream=True,
        )
    )
    assert [e.sequence_number for e in events] == list(range(len(events)))
    assert events[0].type == "response.created"
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == wanted
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.output_text == wanted
    form: Any = {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA}}
    with client.responses.stream(model=MODEL, input="x", text=form) as stream:
        assert set(json.loads(stream.get_final_response().output_text)) == {"ok", "size"}


def test_responses_schema(client: openai.OpenAI) -> None:
    got = client.responses.create(
        model=MODEL,
        input="x",
        text={"format": {"type": "json_schema", "name": "a", "schema": SCHEMA}},
    )
    assert set(json.loads(got.output_text)) == {"ok", "size"}
    assert got.status == "completed"


# -- tools -----------------------------------------------------------------------------------------


def tool(name: str, **function: Any) -> Any:
    parameters = {
        "type": "object",
        "properties": {"unit": {"enum": ["c", "f"]}},
        "required": ["unit"],
        "additionalProperties": False,
    }
    return {
        "type": "function",
        "function": {"name": name, "parameters": parameters, **function},
    }


TOOLS = [tool("get_weather"), tool("get_time")]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "get_time"}}]
)
def test_a_tool_call_that_is_required(client: openai.OpenAI, choice: Any, stream: bool) -> None:
    got: Any = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, tools=TOOLS, tool_choice=choice, stream=stream, seed=4
    )
    if stream:
        deltas = [c for e in got for c in e.choices]
        assert deltas[-1].finish_reason == "tool_calls"
        assert not any(d.delta.content for d in deltas)
        (call,) = [t for d in deltas for t in d.delta.tool_calls or ()]
        assert call.index == 0
    else:
        (answer,) = got.choices
        assert (answer.finish_reason, answer.message.content) == ("tool_calls", None)
        (call,) = answer.message.tool_calls
    names = ["get_time"] if isinstance(choice, dict) else ["get_weather", "get_time"]
    assert call.function.name in names
    assert json.loads(call.function.arguments)["unit"] in ("c", "f")
    assert call.id


def test_tools_and_their_results_reach_the_template(client: openai.OpenAI, offline: LLM) -> None:
    """Without a call in the answer it is what the model says to the same prompt."""
    call = {"name": "get_time", "arguments": {"unit": "c"}}
    turns = [
        *TURNS,
        {"role": "assistant", "content": "", "tool_calls": [{"function": call}]},
        {"role": "tool", "content": "noon"},
    ]
    functions = [
        {"type": "function", "function": {"description": "", **t["function"]}} for t in TOOLS
    ]
    for entry in functions:
        f = entry["function"]
        entry["function"] = {
            "description": "",
            "parameters": f["parameters"],
            "name": f["name"],
        }
    prompt = offline.chat_template.render(turns, tools=functions)
    assert offline.tokenizer is not None
    ids = offline.tokenizer.encode(prompt, add_special_tokens=False)
    params = SamplingParams(temperature=0, max_tokens=24, skip_special_tokens=False)
    messages = [
        *MESSAGES,
        {
            "role": "assistant",
            "tool_calls": [
                {
                    "id": "a",
                    "type": "function",
                    "function": {"name": "get_time", "arguments": '{"unit":"c"}'},
                }
            ],
        },
        {"role": "tool", "content": "noon", "tool_call_id": "a"},
    ]
    got = client.chat.completions.create(
        model=MODEL, messages=messages, tools=TOOLS, temperature=0, max_tokens=24
    )
    assert got.choices[0].message.content == text(offline.generate([ids], params))
    none = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        tools=TOOLS,
        tool_choice="none",
        temperature=0,
        max_tokens=24,
    )
    assert none.choices[0].message.content == text(offline.chat(TURNS, GREEDY))


def test_strict_tools_leave_the_model_free_to_talk(client: openai.OpenAI) -> None:
    got = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        tools=[tool("f", strict=True)],
        temperature=0,
        max_tokens=8,
    )
    assert got.choices[0].message.content
    assert got.choices[0].finish_reason == "length"


# -- the rest --------------------------------------------------------------------------------------


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == MODEL
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="gpt-4", prompt="a")
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"


def test_content_parts_and_developer_are_what_templates_know(
    client: openai.OpenAI, offline: LLM
) -> None:
    wanted = text(
        offline.chat(
            [{"role": "system", "content": "be brief"}, {"role": "user", "content": "a\nb"}], GREEDY
        )
    )
    got = client.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "developer", "content": "be brief"},
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            },
        ],
        temperature=0,
        max_tokens=24,
    )
    assert got.choices[0].message.content == wanted


def test_template_variables(client: openai.OpenAI, offline: LLM) -> None:
    prompt = offline.chat_template.render(TURNS, prefill="Well,")
    assert offline.tokenizer is not None
    ids = offline.tokenizer.encode(prompt, add_special_tokens=False)
    got = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        temperature=0,
        max_tokens=24,
        extra_body={"chat_template_kwargs": {"prefill": "Well,"}},
    )
    assert got.choices[0].message.content == text(offline.generate([ids], GREEDY))


def test_names_of_tokens_are_decoded_once(offline: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = offline.tokenizer
    assert tokenizer is not None
    decoded: list[int] = []
    decode = Tokenizer.decode

    def counted(self: Tokenizer, ids: list[int], skip_special_tokens: bool = True) -> str:
        decoded.extend(ids)
        return decode(self, ids, skip_special_tokens)

    wanted = [TokenNames(tokenizer)(70 + i % 5) for i in range(20)]
    monkeypatch.setattr(Tokenizer, "decode", counted)
    top = (TokenLogprob(75, -1.0),)
    positions = [PositionLogprobs(TokenLogprob(70 + i % 5, -0.1), top) for i in range(20)]
    content = chat_logprobs(positions, TokenNames(tokenizer))["content"]
    assert [entry["token"] for entry in content] == wanted
    assert sorted(decoded) == [70, 71, 72, 73, 74, 75]
