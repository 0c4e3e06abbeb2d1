"""Streams, limits, metrics, logs: how the server behaves while it serves."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from hayate import AsyncLLM
from hayate.errors import GpuFault
from hayate.server.app import create_app
from hayate.server.logging import JsonFormatter, TextFormatter
from hayate.server.options import ServerOptions
from tests.server.serving import running, until

ENDLESS = {"prompt": "abc", "max_tokens": 2000, "ignore_eos": True, "temperature": 0}
COMPLETIONS = "/v1/completions"


@contextlib.contextmanager
def raw_request(url: str, body: dict[str, Any]) -> Iterator[socket.socket]:
    """A request whose connection the test holds, to break it off."""
    host, port = url.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        yield connection


def metrics(url: str) -> dict[str, float]:
    """Every sample without labels, and with: `name{label=value}`."""
    found = {}
    for family in text_string_to_metric_families(httpx.get(f"{url}/metrics").text):
        for sample in family.samples:
            labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


# -- clients that leave ----------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_request(llm: AsyncLLM, url: str, stream: bool) -> None:
    until(lambda: not llm.engine.has_work)
    with raw_request(url, {**ENDLESS, "n": 4, "stream": stream}) as connection:
        until(lambda: llm.stats().num_running == 4)
        if stream:
            assert connection.recv(10).startswith(b"HTTP/1.1 2")
    left = time.monotonic()
    until(lambda: not llm.engine.has_work)
    assert time.monotonic() - left < 2  # 2000 steps would take longer
    assert llm.stats().num_pages_used == 0
    assert httpx.post(url + COMPLETIONS, json={**ENDLESS, "max_tokens": 1}).status_code == 200


def test_a_client_that_does_not_read_holds_up_nobody(llm: AsyncLLM, url: str) -> None:
    with raw_request(url, {**ENDLESS, "n": 8, "stream": True}):
        until(lambda: llm.stats().num_running == 8)
        assert httpx.post(url + COMPLETIONS, json={**ENDLESS, "max_tokens": 8}).status_code == 200
    until(lambda: not llm.engine.has_work)


def test_half_a_request_is_nothing(url: str, llm: AsyncLLM) -> None:
    host, port = url.removeprefix("http://").split(":")
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        time.sleep(0.05)
    assert httpx.get(f"{url}/health").status_code == 200
    assert not llm.engine.has_work


# -- limits ----------------------------------------------------------------------------------------


def test_too_many_requests(llm: AsyncLLM) -> None:
    with (
        running(create_app(llm, ServerOptions(max_requests=2))) as url,
        raw_request(url, {**ENDLESS, "stream": True}),
        raw_request(url, ENDLESS),
    ):
        until(lambda: llm.stats().num_running == 2)
        refused = httpx.post(url + COMPLETIONS, json=ENDLESS)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        anthropic = httpx.post(f"{url}/v1/messages", json={})
        assert anthropic.json()["error"]["type"] == "rate_limit_error"
        assert httpx.get(f"{url}/health").status_code == 200
    until(lambda: not llm.engine.has_work)


# -- many streams ----------------------------------------------------------------------------------


def test_many_streams_at_once(url: str) -> None:
    """More streams than are served without a pause: each gets all its tokens, in fewer events."""
    count, tokens = 256, 20
    num_events = 0

    async def main() -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, limits=limits, timeout=60) as http:

            async def one(i: int) -> None:
                nonlocal num_events
                body = {**ENDLESS, "prompt": [i % 250 + 1, 2], "max_tokens": tokens, "stream": True}
                body["logit_bias"] = {"64": 100}
                async with http.stream("POST", COMPLETIONS, json=body) as response:
                    events = [line async for line in response.aiter_lines() if line]
                assert events[-1] == "data: [DONE]"
                num_events += len(events)
                texts = [json.loads(e[6:])["choices"][0]["text"] for e in events[:-1]]
                assert len("".join(texts)) == tokens
                assert len(set("".join(texts))) == 1

            await asyncio.gather(*map(one, range(count)))

    asyncio.run(main())
    assert num_events < count * tokens
    assert metrics(url)["hayate_streams_open"] == 0


# -- metrics ---------------------------------------------------------------------------------------


def test_metrics(llm: AsyncLLM) -> None:
    with running(create_app(llm)) as url:
        before = metrics(url)
        done = {**ENDLESS, "prompt": "x" * 200, "max_tokens": 10}
        for _ in range(2):
            assert httpx.post(url + COMPLETIONS, json=done).status_code == 200
        assert httpx.post(url + COMPLETIONS, json={**done, "n": 0}).status_code == 400
        assert httpx.get(f"{url}/v1/models/other-{'x' * 50}").status_code == 404
        after = metrics(url)

        def grown(name: str) -> float:
            return after[name] - before.get(name, 0)

        assert grown("hayate_generated_tokens_total") == 20
        assert grown("hayate_prefix_cache_queries_total") == 400
        assert grown("hayate_prefix_cache_hits_total") == 192  # whole pages of the first
        assert grown("hayate_prompt_tokens_total") == 208
        for name, count in (
            ("time_to_first_token_seconds_count", 2),
            ("time_per_output_token_seconds_count", 2),
            ("request_duration_seconds_count", 2),
            ("request_prompt_tokens_sum", 400),
            ("request_generated_tokens_sum", 20),
            ("samples_finished_total{reason=length}", 2),
            ("http_requests_total{endpoint=/v1/completions,status=200}", 2),
            ("http_requests_total{endpoint=/v1/completions,status=400}", 1),
            ("http_requests_total{endpoint=/v1/models,status=404}", 1),
        ):
            assert grown(f"hayate_{name}") == count, name
        assert grown("hayate_time_to_first_token_seconds_sum") < grown(
            "hayate_request_duration_seconds_sum"
        )
        for name in ("requests_running", "requests_waiting", "kv_cache_usage_ratio"):
            assert after[f"hayate_{name}"] == 0
        assert after["hayate_http_requests_open"] == 1  # the one that asks
        assert after["hayate_ready"] == 1
        for name in ("draft_tokens", "draft_tokens_accepted", "preemptions", "engine_steps"):
            assert f"hayate_{name}_total" in after


# -- states ----------------------------------------------------------------------------------------


def test_before_and_after_loading(llm: AsyncLLM) -> None:
    app = create_app(None)
    service = app.state.service
    with running(app) as url:
        service.bytes_loaded = (5, 10)
        loading = httpx.get(f"{url}/health")
        assert loading.status_code == 503
        assert loading.json() == {"status": "loading", "bytes_loaded": 5, "bytes_total": 10}
        refused = httpx.post(url + COMPLETIONS, json=ENDLESS)
        assert refused.status_code == 503
        assert "retry-after" in refused.headers
        assert refused.json()["error"]["code"] == "server_loading"
        assert metrics(url)["hayate_ready"] == 0
        service.ready(llm)
        assert httpx.get(f"{url}/health").json() == {"status": "ok"}
        assert httpx.post(url + COMPLETIONS, json={**ENDLESS, "max_tokens": 1}).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_dies(folder: Path, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    llm = AsyncLLM(folder, device="cpu", kv_memory="4M")
    app = create_app(llm)
    ended = threading.Event()
    app.state.service.on_failure = ended.set

    def die() -> list[Any]:
        raise GpuFault("the GPU failed while running: test")

    with running(app) as url, raw_request(url, {**ENDLESS, "stream": stream}) as connection:
        until(lambda: llm.stats().num_generated_tokens > 5)
        monkeypatch.setattr(llm.engine, "step", die)
        assert ended.wait(5)
        answer = b""
        connection.settimeout(5)
        while not answer.endswith(b"0\r\n\r\n") and b"GpuFault" not in answer:
            part = connection.recv(65536)
            answer += part
            assert part
        assert b"GpuFault" in answer
        assert (b"HTTP/1.1 200" if stream else b"HTTP/1.1 500") in answer
        assert isinstance(app.state.service.failure, GpuFault)
        assert httpx.get(f"{url}/health").json() == {"status": "failed"}
        assert httpx.get(f"{url}/health").status_code == 503
        later = httpx.post(url + COMPLETIONS, json=ENDLESS)
        assert later.status_code == 503
        assert later.json()["error"]["code"] == "server_failed"
        assert metrics(url)["hayate_ready"] == 0


def test_health_sees_that_the_engine_has_died(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although the only request had left."""
    llm = AsyncLLM(folder, device="cpu", kv_memory="4M")
    left = threading.Event()

    def die() -> list[Any]:
        assert left.wait(10)
        raise GpuFault("the GPU failed while running: test")

    app = create_app(llm)
    with running(app) as url:
        monkeypatch.setattr(llm.engine, "step", die)
        with raw_request(url, ENDLESS):
            until(lambda: llm.engine.has_work)
        until(lambda: metrics(url)["hayate_http_requests_open"] == 1)  # the one that asks
        left.set()
        until(lambda: llm.dead)
        assert httpx.get(f"{url}/health").status_code == 503
    assert app.state.service.failure is llm.dead


# -- logs ------------------------------------------------------------------------------------------


def log_of(
    llm: AsyncLLM,
    monkeypatch: pytest.MonkeyPatch,
    formatter: logging.Formatter,
    act: Callable[[str], None],
    **options: Any,
) -> str:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    logger = logging.getLogger("hayate.server")
    monkeypatch.setattr(logger, "handlers", [handler])
    monkeypatch.setattr(logger, "level", logging.INFO)
    with running(create_app(llm, ServerOptions(**options))) as url:
        act(url)
        until(
            lambda: (
                '"path": "/tokenize"' in stream.getvalue() or "path=/tokenize" in stream.getvalue()
            )
        )
    return stream.getvalue()


SECRET = "meet me at the old bridge"


def talk(url: str) -> None:
    message = {"role": "user", "content": SECRET}
    body = {"messages": [message], "max_tokens": 3, "ignore_eos": True}
    httpx.post(f"{url}/v1/chat/completions", json=body, headers={"x-request-id": "abc"})
    httpx.post(f"{url}/v1/chat/completions", json={**body, "stream": True})
    httpx.post(f"{url}/v1/chat/completions", json={**body, "stop": ["", SECRET]})
    httpx.post(f"{url}/v1/chat/completions", json={**body, SECRET: SECRET})
    httpx.post(f"{url}/v1/chat/completions", json={"messages": [{"role": SECRET}]})
    httpx.post(f"{url}/v1/chat/completions", content=SECRET)
    httpx.post(f"{url}/tokenize", json={"prompt": SECRET})


def test_json_log(llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    text = log_of(llm, monkeypatch, JsonFormatter(), talk)
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["status"] for line in lines] == [200, 200, 400, 400, 400, 415, 200]
    first = lines[0]
    assert first["request_id"] == "abc"
    assert first["generated_tokens"] == 3
    assert first["finish"] == "length"
    assert lines[1]["prompt_tokens"] == first["prompt_tokens"] > len(SECRET)
    assert first["ms"] >= first["first_token_ms"] > 0
    assert len({line["request_id"] for line in lines}) == len(lines)
    assert SECRET not in text


def test_no_prompt_is_logged_even_when_the_server_fails(
    llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(_: object, prompts: object, *__: object) -> None:
        raise RuntimeError(f"cannot run {SECRET} {prompts}")

    def act(url: str) -> None:
        talk(url)

    with monkeypatch.context() as patch:
        patch.setattr(AsyncLLM, "generate", fail)
        for asked in (False, True):
            text = log_of(llm, patch, TextFormatter(), act, log_prompts=asked)
            assert "RuntimeError" in text
            assert "test_serving.py" in text  # the traceback
            assert (SECRET in text) == asked


def test_prompts_are_logged_on_demand(llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    text = log_of(llm, monkeypatch, JsonFormatter(), talk, log_prompts=True)
    first = json.loads(text.splitlines()[0])
    assert SECRET in first["prompt"]
    assert len(first["answers"]) == 1


def test_a_line_of_text_cannot_be_forged() -> None:
    record = logging.LogRecord("hayate.server", logging.INFO, "", 0, "request", (), None)
    record.fields = {"path": "/a\nINFO forged", "status": 404, "odd": 'a "b"', "key": "plain-1"}
    line = TextFormatter().format(record)
    assert "\n" not in line
    assert 'path="/a\\nINFO forged" status=404 odd="a \\"b\\"" key=plain-1' in line
