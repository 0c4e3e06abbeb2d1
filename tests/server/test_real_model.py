"""SmolLM2-135M-Instruct behind the server: real tokenizer, template and tools' absence."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import openai
import pytest

from hayate import AsyncLLM
from hayate.checkpoint.smollm2 import smollm2_folder
from hayate.server.app import create_app
from tests.server.serving import running

pytestmark = pytest.mark.real_model
QUESTION = {"role": "user", "content": "What is gravity?"}


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    llm = AsyncLLM(smollm2_folder(), device="cpu", kv_memory="64M")
    with running(create_app(llm)) as url:
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    asyncio.run(llm.shutdown(drain=False))


def test_golden_answer(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="smollm2-135m", messages=[QUESTION], temperature=0, max_tokens=16, stream=True
    )
    text = "".join(e.choices[0].delta.content or "" for e in stream)
    wanted = "Gravity is a fundamental concept in physics that describes the curvature of spacetime"
    assert text.startswith(wanted)


def test_json_answer(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "large": {"type": "boolean"}},
        "required": ["city", "large"],
        "additionalProperties": False,
    }
    got = client.chat.completions.create(
        model="smollm2-135m",
        messages=[{"role": "user", "content": "Name a city, as JSON."}],
        temperature=0,
        max_tokens=60,
        response_format={"type": "json_schema", "json_schema": {"name": "c", "schema": schema}},
    )
    assert set(json.loads(got.choices[0].message.content or "")) == {"city", "large"}


def test_its_template_knows_no_tools(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="knows no tools"):
        client.chat.completions.create(
            model="smollm2-135m",
            messages=[QUESTION],
            tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}],
        )
