"""Clients that send without end, or not at all, or never read: they cost little, and hold up nobody."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from typing import Any

import httpx
import pytest
from pydantic import ValidationError
from starlette.types import Receive, Scope, Send

from hayate import AsyncLLM
from hayate.runtime.outputs import PositionLogprobs, StreamChunk, TokenLogprob
from hayate.server import protocol
from hayate.server.app import create_app
from hayate.server.errors import ClientGone
from hayate.server.openai_types import Body, ChatRequest, CompletionRequest
from hayate.server.options import ServerOptions
from hayate.server.stream import Piece, until_gone
from hayate.server.tokenize import DetokenizeRequest
from tests.server.serving import running, until

HALF = (
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Content-Length: 100\r\n\r\n{"
)
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"


def connect(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def rest(connection: socket.socket) -> bytes:
    """All that comes until the server closes the connection."""
    parts = []
    try:
        while part := connection.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


# -- heads -----------------------------------------------------------------------------------------


def test_a_head_without_end(url: str) -> None:
    with connect(url) as connection:
        # Exactly one byte too many, so that none is left unread when the server closes.
        sent = HEALTH + b"X-A: "
        connection.sendall(sent + b"a" * (protocol.MAX_HEAD_BYTES + 1 - len(sent)))
        assert rest(connection).startswith(b"HTTP/1.1 431 ")


@pytest.mark.parametrize(("size", "status"), [(60_000, b"200"), (70_000, b"431")])
def test_a_large_head(url: str, size: int, status: bytes) -> None:
    line = b"X-A: " + b"a" * 991 + b"\r\n"
    with connect(url) as connection:
        connection.sendall(HEALTH + line * (size // len(line)) + b"Connection: close\r\n\r\n")
        assert rest(connection).startswith(b"HTTP/1.1 " + status)


def test_trailers_without_end(url: str) -> None:
    head = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
    with connect(url) as connection:
        connection.sendall(head + b"Content-Type: application/json\r\n\r\n2\r\n{}\r\n0\r\nX: ")
        time.sleep(0.1)
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            connection.sendall(b"a" * 2**26)


def test_a_body_larger_than_a_head_may_be(http: httpx.Client) -> None:
    def parts() -> Any:
        yield b'{"prompt": "'
        for _ in range(100):
            yield b"x" * 1000
        yield b'"}'

    answer = http.post("/tokenize", content=parts(), headers={"content-type": "application/json"})
    assert answer.json()["count"] == 100_000


@pytest.mark.parametrize("sent", [b"", HEALTH])
def test_a_connection_without_a_request_is_closed(
    url: str, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.3)
    with connect(url) as connection:
        connection.sendall(sent)
        assert rest(connection) == b""


def test_between_requests_a_connection_may_idle(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.3)
    with connect(url) as connection:
        for _ in range(2):
            connection.sendall(HEALTH + b"\r\n")
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
            time.sleep(0.5)
        connection.sendall(HEALTH)
        begin = time.monotonic()
        assert rest(connection) == b""
        assert time.monotonic() - begin < 5


# -- bodies and answers ----------------------------------------------------------------------------


def test_half_bodies_take_no_place(llm: AsyncLLM) -> None:
    """They have places of their own, four times as many; when these are taken, others are refused."""
    body = {"prompt": "a", "max_tokens": 1}
    with running(create_app(llm, ServerOptions(max_requests=1))) as url:
        halves = []
        for count, status in ((3, 200), (1, 429)):
            for _ in range(count):
                halves.append(connect(url))
                halves[-1].sendall(HALF)
            time.sleep(0.2)  # until the server has seen them
            assert httpx.post(f"{url}/v1/completions", json=body).status_code == status
        for connection in halves:
            connection.close()
        until(lambda: httpx.post(f"{url}/v1/completions", json=body).status_code == 200)


def test_an_answer_that_nobody_reads_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "READ_SECONDS", 0.3)
    ended = threading.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def write() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for _ in range(int(scope["query_string"])):
                await send({"type": "http.response.body", "body": b"x" * 2**20, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

        with contextlib.suppress(ClientGone):
            await until_gone(receive, write())
        ended.set()

    with running(app) as url:
        with connect(url) as slow:  # takes longer than that in all, but never pauses as long
            slow.sendall(b"GET /?32 HTTP/1.0\r\n\r\n")
            length = 0
            while part := slow.recv(2**20):
                length += len(part)
                time.sleep(0.02)
            assert length > 32 * 2**20
        assert ended.wait(10)
        ended.clear()
        with connect(url) as deaf:
            deaf.sendall(b"GET /?1000 HTTP/1.0\r\n\r\n")
            assert ended.wait(10)


def test_joining_the_chunks_of_a_reader_that_fell_behind() -> None:
    chunks = [
        StreamChunk(3, f"{i} ", (i,), logprobs=(PositionLogprobs(TokenLogprob(i, -1.0), ()),))
        for i in range(30_000)
    ]
    begin = time.process_time()
    piece = Piece.of(3, [*chunks, StreamChunk(3, "end", (), "stop", 7)])
    assert time.process_time() - begin < 0.5  # quadratic: over a second
    assert piece.text.split() == [*map(str, range(30_000)), "end"]
    assert [p.token.token_id for p in piece.logprobs] == list(range(30_000))
    assert (piece.index, piece.num_tokens) == (3, 30_000)
    assert (piece.finish_reason, piece.stop_reason) == ("stop", 7)


# -- values ----------------------------------------------------------------------------------------

MANY = 300_000
USER = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        (DetokenizeRequest, {"tokens": [""] * MANY}),
        (CompletionRequest, {"prompt": [1] + [None] * MANY}),
        (CompletionRequest, {"prompt": [[None] * MANY] * 3}),
        (CompletionRequest, {"prompt": "a", "stop": [1] * MANY}),
        (CompletionRequest, {"prompt": "a", "stop": ["a"] * MANY}),
        (CompletionRequest, {"prompt": "a", "stop_token_ids": [""] * MANY}),
        (CompletionRequest, {"prompt": "a", "logit_bias": {str(i): None for i in range(MANY)}}),
        (ChatRequest, {"messages": [{}] * MANY}),
        (ChatRequest, {"messages": [{"role": "user", "content": [{}] * MANY}]}),
        (ChatRequest, {"messages": [USER], "tools": [{}] * MANY}),
        (ChatRequest, {"messages": [USER], "metadata": {str(i): 0 for i in range(MANY)}}),
        (ChatRequest, {"messages": [USER], **{f"a{i}": 0 for i in range(MANY)}}),
    ],
    ids=lambda value: next(reversed(value)) if isinstance(value, dict) else value.__name__,
)
def test_many_wrong_values_are_few_complaints(model: type[Body], fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        model.model_validate(fields)
    assert caught.value.error_count() <= 4  # one for each member of a union


def test_many_ids_are_decoded_beside_the_event_loop(
    llm: AsyncLLM, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    loops: list[bool] = []
    decode = llm.tokenizer.decode

    def noting(*arguments: Any) -> str:
        loops.append(asyncio._get_running_loop() is not None)
        return decode(*arguments)

    monkeypatch.setattr(llm.tokenizer, "decode", noting)
    tokens = http.post("/tokenize", json={"prompt": "x" * 20_000}).json()["tokens"]
    for ids in (tokens[:100], tokens):
        answer = http.post("/detokenize", json={"tokens": ids})
        assert answer.json() == {"prompt": "x" * len(ids)}
    assert loops == [True, False]
