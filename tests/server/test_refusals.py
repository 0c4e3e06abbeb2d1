"""What the server does not accept, and in what words: nothing is ignored, and nothing hostile gets through."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from hayate import AsyncLLM
from hayate.server.app import create_app
from hayate.server.openai_types import ChatRequest
from hayate.server.options import ServerOptions
from hayate.server.responses import ResponsesRequest
from tests.server.serving import running

USER = {"role": "user", "content": "hi"}
CHAT = "/v1/chat/completions"


def refusal(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


def chat(http: httpx.Client, **fields: Any) -> httpx.Response:
    body = {"messages": [USER], "max_tokens": 2, **fields}
    return http.post(CHAT, content=json.dumps(body), headers={"content-type": "application/json"})


# -- fields ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("functions", []),
        ("function_call", "auto"),
        ("audio", {"voice": "alloy"}),
        ("prediction", {"type": "content", "content": "x"}),
        ("reasoning_effort", "low"),
        ("web_search_options", {}),
        ("verbosity", "low"),
        ("store", True),
        ("modalities", ["text", "audio"]),
        ("best_of", 2),
        ("frobnicate", 1),
        ("Temperature", 0.5),
    ],
)
def test_a_field_that_is_not_implemented_is_named(
    http: httpx.Client, field: str, value: object
) -> None:
    error = refusal(chat(http, **{field: value}))
    assert error["type"] == "invalid_request_error"
    assert field in error["message"]
    assert error["param"].startswith(field)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("user", "u"),
        ("metadata", {"a": "b"}),
        ("store", False),
        ("service_tier", "auto"),
        ("functions", None),
        ("reasoning_effort", None),
        ("logit_bias", None),
        ("stop", None),
        ("parallel_tool_calls", True),
        ("response_format", {"type": "text"}),
    ],
)
def test_defaults_and_what_has_no_effect_are_accepted(
    http: httpx.Client, field: str, value: object
) -> None:
    assert chat(http, **{field: value}).status_code == 200


def test_every_field_of_openais_is_known() -> None:
    """Each field of the client's own types is implemented, without effect, or refused by name."""
    from openai.types import completion_create_params, responses
    from openai.types.chat import completion_create_params as chat_params

    from hayate.server.openai_types import CompletionRequest

    for model, theirs in (
        (ChatRequest, chat_params.CompletionCreateParamsBase),
        (CompletionRequest, completion_create_params.CompletionCreateParamsBase),
        (ResponsesRequest, responses.response_create_params.ResponseCreateParamsBase),
    ):
        assert set(theirs.__annotations__) <= set(model.model_fields)


def test_every_field_of_anthropics_is_known() -> None:
    from anthropic.types import message_create_params

    from hayate.server.anthropic_types import MessagesRequest

    theirs = set(message_create_params.MessageCreateParamsBase.__annotations__)
    assert theirs <= set(MessagesRequest.model_fields)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "warm"}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"n": 10**30}, "n"),
        ({"n": True}, "n"),
        ({"seed": -1}, "seed"),
        ({"seed": 10**40}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"logit_bias": {"300": 1}}, "logit_bias"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"5": None}}, "logit_bias.5"),
        ({"logit_bias": {"5": 1e39}}, "logit_bias"),
        ({"logit_bias": {"1" * 5000: 1}}, "logit_bias"),
        ({"stop": "x" * 40_000}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 65}, "stop"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant"}]}, "messages[0].content"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0]"),
        ({"messages": [{**USER, "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{**USER, "name": "Bob"}]}, "messages[0].name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"structured_outputs": {}}, "structured_outputs"),
    ],
)
def test_a_wrong_value_is_named(http: httpx.Client, fields: dict[str, Any], param: str) -> None:
    error = refusal(chat(http, **fields))
    assert error["param"] == param
    assert len(error["message"]) < 400


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"top_logprobs": 2}, "logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"tool_choice": "required"}, "tools"),
        ({"structured_outputs": {"regex": "("}}, "regex"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 5}}}},
            "schema",
        ),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "response_format",
        ),
    ],
)
def test_what_does_not_go_together(http: httpx.Client, fields: dict[str, Any], word: str) -> None:
    assert word in refusal(chat(http, **fields))["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_errors_of_the_engine_come_before_the_stream(http: httpx.Client, stream: bool) -> None:
    error = refusal(chat(http, messages=[{**USER, "content": "x" * 3000}], stream=stream))
    assert error["code"] == "context_length_exceeded"
    assert refusal(chat(http, logit_bias={"999": 1}, stream=stream))["param"] == "logit_bias"


def test_images_are_refused_by_name(http: httpx.Client) -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    error = refusal(chat(http, messages=[{"role": "user", "content": [part]}]))
    assert "image" in error["message"]
    assert error["param"] == "messages[0].content[0]"


def test_completions_and_responses(http: httpx.Client) -> None:
    for path, fields, word in (
        ("/v1/completions", {"prompt": "a", "suffix": "b"}, "suffix"),
        ("/v1/completions", {"prompt": "a", "best_of": 3}, "best_of"),
        ("/v1/completions", {"prompt": "a", "echo": True, "logprobs": 1}, "echo"),
        ("/v1/completions", {"prompt": ""}, "empty"),
        ("/v1/completions", {"prompt": []}, "prompt"),
        ("/v1/completions", {"prompt": [5, 999]}, "999"),
        ("/v1/completions", {"prompt": ["a"] * 17}, "n"),
        ("/v1/completions", {}, "prompt"),
        ("/v1/responses", {"input": "a", "previous_response_id": "r"}, "previous_response_id"),
        ("/v1/responses", {"input": "a", "store": True}, "store"),
        ("/v1/responses", {"input": "a", "tools": [{"type": "web_search"}]}, "tools"),
        ("/tokenize", {}, "prompt"),
        ("/detokenize", {"tokens": [-1]}, "-1"),
    ):
        assert word in refusal(http.post(path, json=fields))["message"], (path, fields)


def test_a_base_model_has_no_chat(tmp_path: Any) -> None:
    from tests.server.checkpoint import write_checkpoint

    llm = AsyncLLM(write_checkpoint(tmp_path / "base", template=None), device="cpu", kv_memory="4M")
    with running(create_app(llm)) as url, httpx.Client(base_url=url) as http:
        assert "chat template" in refusal(chat(http))["message"]
        tools = [{"type": "function", "function": {"name": "f"}}]
        assert "chat template" in refusal(chat(http, tools=tools))["message"]
        ok = http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})
        assert ok.status_code == 200


def test_a_template_without_tools(tmp_path: Any) -> None:
    from tests.server.checkpoint import write_checkpoint

    plain = "{% for m in messages %}{{ m.content }}{% endfor %}"
    llm = AsyncLLM(write_checkpoint(tmp_path / "plain", plain), device="cpu", kv_memory="4M")
    with running(create_app(llm)) as url, httpx.Client(base_url=url) as http:
        tools = [{"type": "function", "function": {"name": "f"}}]
        assert "tools" in refusal(chat(http, tools=tools))["message"]
        assert chat(http, tools=tools, tool_choice="none").status_code == 200


# -- hostile bodies --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"messages":' * 10_000,
        b'{"messages": [{"role": "user", "content": ' + b"[" * 50_000,
        b'{"max_tokens": ' + b"9" * 50_000 + b', "messages": [{"role": "user", "content": "x"}]}',
        b'{"temperature": NaN, "messages": [{"role": "user", "content": "x"}]}',
        b'{"temperature": Infinity, "messages": [{"role": "user", "content": "x"}]}',
        b'{"temperature": 1e999, "messages": [{"role": "user", "content": "x"}]}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "x"}], "stop": "\\udfff"}',
        b'{"messages": [{"role": "user", "content": "x"}], "\\ud800": 1}',
        b'{"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"prefill": "\\ud800"}}',
        b'{"messages": [{"role": "user", "content": "x"}], "response_format": '
        b'{"type": "json_schema", "json_schema": {"schema": {"const": "\\ud800"}}}}',
        b'{"messages": [{"role": "user", "content": "x"}], "response_format": '
        b'{"type": "json_schema", "json_schema": {"schema": {"const": NaN}}}}',
        b'{"messages": [' + b'{"role": "user", "content": ""},' * 5000 + b"{}]}",
    ],
    ids=range(20),
)
def test_a_hostile_body_is_refused(http: httpx.Client, body: bytes) -> None:
    response = http.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400, response.text[:300]
    refusal(response)
    assert len(response.content) < 2000
    assert http.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"user": "\ud800"}, "user"),
        ({"metadata": {"a": "\ud800"}}, "metadata.a"),
        ({"metadata": {"\ud800": "a"}}, "metadata"),
        (
            {"text": {"format": {"type": "json_schema", "name": "\ud800", "schema": {}}}},
            "text.format.name",
        ),
    ],
)
def test_what_responses_gives_back_is_unicode(
    http: httpx.Client, fields: dict[str, Any], param: str
) -> None:
    body = json.dumps({"input": "a", "max_output_tokens": 2, **fields})
    headers = {"content-type": "application/json"}
    error = refusal(http.post("/v1/responses", content=body, headers=headers))
    assert error["param"].startswith(param)
    assert "surrogate" in error["message"]


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded"])
def test_only_json_is_read(http: httpx.Client, kind: str) -> None:
    """What a web page may send without asking (no CORS preflight) is never run."""
    body = json.dumps({"messages": [USER]})
    refusal(http.post(CHAT, content=body, headers={"content-type": kind}), 415)


def test_a_body_that_is_too_large(http: httpx.Client) -> None:
    large = json.dumps({"messages": [{**USER, "content": "x" * 200_000}]}).encode()
    refusal(http.post(CHAT, content=large, headers={"content-type": "application/json"}), 413)

    def chunks() -> Any:  # without a Content-Length
        for i in range(0, len(large), 10_000):
            yield large[i : i + 10_000]

    refusal(http.post(CHAT, content=chunks(), headers={"content-type": "application/json"}), 413)


def test_paths_and_methods(http: httpx.Client) -> None:
    assert "/v1/nothing" in refusal(http.get("/v1/nothing"), 404)["message"]
    refusal(http.get(CHAT), 405)
    refusal(http.post("/health", json={}), 405)
    assert http.get("/docs").status_code == 404
    assert http.get("/openapi.json").json()["info"]["title"] == "hayate"


def test_an_engine_error_is_no_leak(llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unforeseen failure gives 500 in the right form, without its message."""

    async def fail(*_: object, **__: object) -> None:
        raise RuntimeError("secret text of the prompt")

    with running(create_app(llm)) as url, httpx.Client(base_url=url) as http:
        monkeypatch.setattr(AsyncLLM, "generate", fail)
        response = chat(http)
        assert refusal(response, 500)["type"] == "server_error"
        assert "secret" not in response.text
        monkeypatch.undo()
        assert chat(http).status_code == 200


def test_names_and_ids(http: httpx.Client) -> None:
    response = http.post("/tokenize", json={"prompt": "a"}, headers={"x-request-id": "mine-1"})
    assert response.headers["x-request-id"] == "mine-1"
    forged = http.post("/tokenize", json={"prompt": "a"}, headers={"x-request-id": 'a" b'})
    assert forged.headers["x-request-id"] != 'a" b'
    assert response.headers["x-content-type-options"] == "nosniff"


def test_tokenize_round_trip(http: httpx.Client) -> None:
    text = "重力 gravity \n\t</s>"
    tokens = http.post("/tokenize", json={"prompt": text}).json()
    assert tokens["count"] == len(tokens["tokens"])
    back = http.post("/detokenize", json={"tokens": tokens["tokens"]}).json()
    assert back == {"prompt": text}
    long = http.post("/tokenize", json={"prompt": "x" * 3000}).json()
    assert long["count"] == 3000 > long["max_model_len"]
    turn = http.post("/tokenize", json={"messages": [USER]}).json()["tokens"]
    again = http.post("/tokenize", json={"messages": [USER], "add_generation_prompt": False}).json()
    assert turn[: again["count"]] == again["tokens"]
    assert len(turn) > again["count"]


# -- who may ask -----------------------------------------------------------------------------------


def test_keys(llm: AsyncLLM) -> None:
    options = ServerOptions(api_keys=("first-key", "second-key"))
    with running(create_app(llm, options)) as url, httpx.Client(base_url=url) as http:
        assert http.get("/health").status_code == 200
        wrong = ({}, {"authorization": "Bearer first-ke"}, {"authorization": "Basic first-key"})
        for headers in (*wrong, {"x-api-key": ""}, {"authorization": b"Bearer \xff\xfe"}):
            for path in ("/v1/models", "/metrics", "/version", "/nothing", "/openapi.json"):
                response = http.get(path, headers=headers)
                assert refusal(response, 401)["code"] == "invalid_api_key"
        for headers in (
            {"authorization": "Bearer first-key"},
            {"authorization": "bearer second-key"},
            {"x-api-key": "first-key"},
        ):
            assert http.get("/v1/models", headers=headers).status_code == 200
        # With a key, any name of the machine will do.
        named = {"host": "model.example:80", "x-api-key": "first-key"}
        assert http.get("/v1/models", headers=named).status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200),
        ("127.0.0.1", 200),
        ("[::1]:8000", 200),
        ("LOCALHOST", 200),
        ("evil.example:8000", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost:80:80", 403),
        ("", 403),
    ],
)
def test_dns_rebinding(http: httpx.Client, host: str, status: int) -> None:
    assert http.get("/v1/models", headers={"host": host}).status_code == status


def test_hosts_that_are_allowed() -> None:
    assert ServerOptions(host="0.0.0.0").hosts is None
    assert ServerOptions(api_keys=("k",)).hosts is None
    assert "gpu.lan" in (ServerOptions(host="0.0.0.0", allowed_hosts=("GPU.lan",)).hosts or ())
    assert ServerOptions(host="::1").is_loopback
    assert not ServerOptions(host="0.0.0.0").is_loopback


def test_cors_is_off_unless_asked_for(http: httpx.Client, llm: AsyncLLM) -> None:
    headers = {
        "origin": "https://page.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "content-type",
    }
    response = http.options(CHAT, headers=headers)
    assert response.status_code == 405
    assert not any(name.startswith("access-control") for name in response.headers)
    options = ServerOptions(allowed_origins=("https://page.example",), api_keys=("k",))
    with running(create_app(llm, options)) as url:
        allowed = httpx.options(f"{url}{CHAT}", headers=headers)
        assert allowed.headers["access-control-allow-origin"] == "https://page.example"
        denied = httpx.options(
            f"{url}{CHAT}", headers={**headers, "origin": "https://evil.example"}
        )
        assert "access-control-allow-origin" not in denied.headers
        refused = httpx.get(f"{url}/v1/models", headers={"origin": "https://page.example"})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://page.example"
