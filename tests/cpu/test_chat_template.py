"""Chat templates against transformers on the same folder; hostile and broken templates."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models
from transformers import PreTrainedTokenizerFast

from hayate.errors import ModelError, UsageError
from hayate.text.chat_template import ChatTemplate

CHATML = """{% for message in messages %}
{% if loop.first and message.role != 'system' %}
<|im_start|>system
You are helpful.<|im_end|>
{% endif %}
<|im_start|>{{ message['role'] }}
{{ message['content'] | trim }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}
<|im_start|>assistant
{% endif %}"""

# Headers around every turn, BOS in the template, tools as JSON in the system turn.
HEADERS = """{{- bos_token }}
{%- set ns = namespace(system='') %}
{%- if messages[0]['role'] == 'system' %}
    {%- set ns.system = messages[0]['content'] %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- '<|h|>system<|/h|>\\n\\n' + ns.system }}
{%- if tools is not none %}
    {%- for tool in tools %}
        {{- tool | tojson(indent=4) }}
        {{- '\\n' }}
    {%- endfor %}
    {{- tools | tojson }}
{%- endif %}
{{- '<|eot|>' }}
{%- for message in messages %}
    {%- if message.role == 'skip' %}{% continue %}{% endif %}
    {{- '<|h|>' ~ message.role ~ '<|/h|>\\n\\n' ~ message.content | trim ~ '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|h|>assistant<|/h|>\\n\\n' }}{% endif %}"""

INST = """{{ bos_token }}{% for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('roles must alternate user/assistant') }}
{%- endif %}
{%- if message['role'] == 'user' %}
{{ '[INST] ' + message['content'] + ' [/INST]' }}
{%- else %}
{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}
{%- endif %}
{% endfor %}"""

EXTRA_ID = """{{ '<extra_id_0>System' }}{% for m in messages %}{% if m['role'] == 'system' %}
{{ '\\n' + m['content'].strip() }}{% if tools or contexts %}{{ '\\n' }}{% endif %}{% endif %}
{% endfor %}
{% if tools %}{% for t in tools %}{{ '\\n<tool> ' + t|tojson + ' </tool>' }}{% endfor %}{% endif %}
{{ '\\n\\n' }}{% for m in messages %}{% if m['role'] == 'user' %}
{{ '<extra_id_1>User\\n' + m['content'].strip() + '\\n' }}{% elif m['role'] == 'assistant' %}
{{ '<extra_id_1>Assistant\\n' + m['content'].strip() + '\\n' }}{% endif %}{% endfor %}
{% if add_generation_prompt %}{{ '<extra_id_1>Assistant\\n' }}{% endif %}"""

TEMPLATES = {"chatml": CHATML, "headers": HEADERS, "inst": INST, "extra_id": EXTRA_ID}
CONVERSATIONS = {
    "one turn": [{"role": "user", "content": "Hi <b>&東京</b>\n"}],
    "turns": [
        {"role": "user", "content": " a"},
        {"role": "assistant", "content": "b "},
        {"role": "user", "content": "c"},
    ],
    "system": [
        {"role": "system", "content": "Be kind.\n"},
        {"role": "user", "content": "{{ 7 * 7 }}"},
    ],
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "It's <wet> & 'cold' 天気 \u00e9",
            "parameters": {"type": "object", "properties": {"b": {}, "a": {"type": "string"}}},
        },
    }
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
USER = [{"role": "user", "content": "hello"}]


def reference_of(folder: Path, template: Any) -> PreTrainedTokenizerFast:
    """A saved folder with the template, opened by transformers."""
    vocabulary = {"<s>": 0, "</s>": 1, "a": 2}
    backend = Backend(models.WordLevel(vocabulary, unk_token="a"))
    reference = PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)
    reference.chat_template = template
    reference.save_pretrained(folder)
    return reference


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["", "tools"])
@pytest.mark.parametrize("prompt", [True, False])
def test_agrees_with_transformers(
    tmp_path: Path, template: str, conversation: str, tools: Any, prompt: bool
) -> None:
    reference = reference_of(tmp_path, TEMPLATES[template])
    messages = CONVERSATIONS[conversation]
    ours = ChatTemplate.from_folder(tmp_path)
    if template == "inst" and conversation == "system":
        with pytest.raises(UsageError, match="roles must alternate"):
            ours.render(messages, prompt, tools=tools)
        return
    expected = reference.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=prompt, tools=tools
    )
    assert ours.render(messages, prompt, tools=tools) == expected


def test_templates_of_the_config_by_name(tmp_path: Path) -> None:
    named = [
        {"name": "tool_use", "template": "T{{ tools | length }}"},
        {"name": "default", "template": "D{{ eos_token }}"},
    ]
    config = {"chat_template": named, "eos_token": {"content": "</s>", "lstrip": False}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    template = ChatTemplate.from_folder(tmp_path)
    assert template.render(USER) == "D</s>"
    assert template.render(USER, tools=TOOLS) == "T1"


def test_the_file_wins_over_the_config(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "config"}))
    assert ChatTemplate.from_folder(tmp_path).render(USER) == "config"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert ChatTemplate.from_folder(tmp_path).render(USER) == "file"


def test_variables_of_the_caller() -> None:
    template = ChatTemplate("{% if not enable_thinking %}/no_think{% endif %}")
    assert template.render(USER, enable_thinking=False) == "/no_think"
    assert template.render(USER, enable_thinking=True) == ""


def test_the_date() -> None:
    assert ChatTemplate("{{ strftime_now('%Y') }}").render(USER).isdecimal()


def test_a_message_that_calls_tools_needs_no_content() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.tool_calls }}{% endfor %}")
    assert template.render([{"role": "assistant", "content": None, "tool_calls": ["x"]}]) == "['x']"


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "messages"),
        ("hello", "messages"),
        ({"role": "user", "content": "x"}, "messages"),
        (["hello"], r"messages\[0\]"),
        ([{"content": "x"}], r'messages\[0\]: "role"'),
        ([{"role": 1, "content": "x"}], r'messages\[0\]: "role"'),
        ([*USER, {"role": "user"}], r'messages\[1\]: "content"'),
        ([{"role": "user", "content": ["x"]}], r'messages\[0\]: "content"'),
    ],
)
def test_malformed_messages(messages: Any, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        ChatTemplate(CHATML).render(messages)


def test_no_template_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no chat template.*chat_template\.jinja"):
        ChatTemplate.from_folder(tmp_path)


@pytest.mark.parametrize("value", [3, [{"name": "default"}], ["x"], {"default": "x"}])
def test_a_template_of_the_wrong_type(tmp_path: Path, value: Any) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
    with pytest.raises(ModelError, match=r"tokenizer_config\.json: chat_template"):
        ChatTemplate.from_folder(tmp_path)


@pytest.mark.parametrize("source", ["{% if %}", "{{ x", "{% unknown %}", "{% for x in y %}"])
def test_a_template_that_is_not_jinja(source: str) -> None:
    with pytest.raises(ModelError, match=r"f\.jinja: the chat template is not valid Jinja, line 1"):
        ChatTemplate(source, file="f.jinja")


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__name__ }}",
        "{{ raise_exception.__globals__['jinja2'] }}",
        "{{ ''|attr('__class__')|attr('mro') }}",
        "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
        "{{ self._TemplateReference__context.environment.globals }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'system'}) }}",
        "{% include '/etc/passwd' %}",
        "{% for i in range(1000000000) %}x{% endfor %}",
        LOOP,
        "{% set f = range %}{% for a in f(99999) %}{% for b in f(99999) %}{% endfor %}{% endfor %}",
        "{% macro m() %}" + LOOP + "{% endmacro %}{{ m() }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ 'x' * 1000000000 }}",
        "{{ 1000000000 * [1] }}",
        "{{ 10 ** 1000000000 }}",
        "{{ undefined_name.attribute }}",
        "{{ 1 / 0 }}",
    ],
)
def test_hostile_and_failing_templates(source: str) -> None:
    messages = [dict(USER[0])]
    with pytest.raises(ModelError, match="the chat template failed"):
        ChatTemplate(source).render(messages)
    assert messages == USER


def test_loop_steps_are_counted_anew_for_each_rendering() -> None:
    template = ChatTemplate("{% for i in range(99999) %}{% endfor %}ok")
    assert [template.render(USER) for _ in range(7)] == ["ok"] * 7


def test_rendering_from_many_threads() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}")
    conversations = [[{"role": "user", "content": str(i)}] for i in range(64)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(template.render, conversations)) == [str(i) for i in range(64)]
