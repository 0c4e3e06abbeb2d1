"""`hayate bench serve`: counts against the server's own, percentiles against numpy, failures of every kind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from hayate import AsyncLLM
from hayate.bench.http_client import HttpClient
from hayate.bench.serve import figures
from hayate.bench.serve_load import Measurement, Workload, run_load
from hayate.bench.serve_targets import Answer, Endpoint
from hayate.server.app import create_app
from hayate.server.options import ServerOptions
from tests.cpu.test_cli import assert_fails, run
from tests.server.checkpoint import write_checkpoint
from tests.server.serving import running

SMALL = ("--requests", 6, "--input", 20, "--output", 9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny-chat")


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[AsyncLLM]:
    llm = AsyncLLM(folder, device="cpu", kv_memory="16M")
    yield llm
    asyncio.run(llm.shutdown(drain=False))


@pytest.fixture(scope="module")
def url(llm: AsyncLLM) -> Iterator[str]:
    with running(create_app(llm)) as url:
        yield url


def report_of(*arguments: object) -> dict[str, Any]:
    result = run("bench", "serve", *arguments, "--json")
    assert result.returncode == 0, result.stderr
    report: dict[str, Any] = json.loads(result.stdout)
    return report


def counted(url: str) -> dict[str, float]:
    lines = [line.split() for line in httpx.get(f"{url}/metrics").text.splitlines()]
    return {words[0]: float(words[1]) for words in lines if words[0] != "#"}


# -- over HTTP -------------------------------------------------------------------------------------


def test_counts_are_those_of_the_server(url: str) -> None:
    before = counted(url)
    report = report_of(
        "--url", url, "--concurrency", 2, *SMALL, "--slo-ttft", 1e6, "--slo-tpot", 1e6
    )
    after = counted(url)
    assert (report["complete"], report["failed"], report["exact_lengths"]) == (6, 0, True)
    # Two requests come before the load: one of 2 tokens that tries the endpoint, one of 4 that warms it up.
    name = "hayate_generated_tokens_total"
    assert after[name] - before[name] == 6 * 9 + 2 + 4
    # Seconds are reported to 0.1 ms, rates to 0.01.
    slack = 1e-4 / report["seconds"]
    assert report["output_tokens_per_second"] == pytest.approx(
        54 / report["seconds"], rel=slack + 1e-3
    )
    assert report["total_tokens_per_second"] == pytest.approx(
        174 / report["seconds"], rel=slack + 1e-3
    )
    assert report["goodput_share"] == 1
    # The client's first token cannot come before the server has it.
    first = "hayate_time_to_first_token_seconds_sum"
    assert report["ttft_ms"]["p99"] * 6 >= 1e3 * (after[first] - before[first]) / 8 * 6 * 0.9 - 1
    assert 0 < report["client_share"] < 1


def test_text_and_plot(url: str, tmp_path: Path) -> None:
    file = tmp_path / "load.png"
    result = run("bench", "serve", "--url", url + "/v1/", "--rate", 100, *SMALL, "--plot", file)
    assert result.returncode == 0, result.stderr
    assert [line.split(":")[0] for line in result.stdout.splitlines()] == [
        "load", "answers", "throughput", "first token", "per token after it", "between pieces", "client", "plot",
    ]  # fmt: skip
    assert file.read_bytes().startswith(b"\x89PNG")


def test_percentiles_are_those_of_numpy(url: str) -> None:
    workload = Workload(requests=11, input=8, output=6, seed=3, rate=None, concurrency=3)
    measurement = asyncio.run(run_load(Endpoint(url, None, None), workload, None))
    found = figures(measurement, None, None)
    answers = measurement.answers
    assert len(answers) == 11
    expected = {
        "ttft_ms": [a.times[0] - a.start for a in answers],
        "tpot_ms": [(a.times[-1] - a.times[0]) / 5 for a in answers],
        "itl_ms": np.concatenate([np.diff(a.times) for a in answers]),
    }
    for name, times in expected.items():
        for q in (50, 90, 99):
            # Rounded to 1 us. "higher": a time that was measured, never the mean of two.
            truth = 1e3 * np.percentile(times, q, method="higher")
            assert found[name][f"p{q}"] == pytest.approx(truth, abs=5.1e-4)
    for a in answers:  # an answer has its times in order, and each prompt its own
        assert a.start < a.times[0] and sorted(a.times) == a.times and a.times[-1] <= (a.end or 0)
        assert (a.num_prompt, a.num_generated) == (8, 6)
    at_once = [sum(b.start <= a.start < (b.end or 0) for b in answers) for a in answers]
    assert max(at_once) <= 3


def test_poisson_arrivals() -> None:
    def workload(seed: int, requests: int = 4000) -> Workload:
        return Workload(requests, 5, 5, seed, rate=8.0, concurrency=None)

    arrivals = workload(7).arrivals()
    assert arrivals == workload(7).arrivals() != workload(8).arrivals()
    assert workload(7).prompts() == workload(7).prompts() != workload(8).prompts()
    assert workload(7, 1).arrivals() == [0.0]
    gaps = np.diff(arrivals)
    # Of n exponential gaps the mean has a deviation of 1/sqrt(n); a share p one of sqrt(p (1 - p) / n).
    assert len(gaps) == 3999
    assert gaps.mean() == pytest.approx(1 / 8, rel=5 / np.sqrt(3999))
    for multiple in (0.5, 1.0, 2.0):
        share = np.exp(-multiple)
        assert (gaps > multiple / 8).mean() == pytest.approx(
            share, abs=5 * np.sqrt(share * (1 - share) / 3999)
        )


def test_an_open_loop_does_not_wait_for_answers(url: str) -> None:
    workload = Workload(requests=12, input=8, output=40, seed=1, rate=400.0, concurrency=None)
    measurement = asyncio.run(run_load(Endpoint(url, None, None), workload, None))
    starts = [a.start for a in measurement.answers]
    assert np.subtract(starts, starts[0]) == pytest.approx(workload.arrivals(), abs=1e-6)
    assert len(measurement.complete) == 12
    # All are due within 0.03 s on average; the answers take far longer together, so several were open at once.
    at_once = [
        sum(b.start <= a.start < (b.end or 0) for b in measurement.answers)
        for a in measurement.answers
    ]
    assert max(at_once) > 1


def test_goodput_by_hand() -> None:
    def answer(first: float, rest: float, error: str | None = None) -> Answer:
        times = [10 + first, 10 + first + 9 * rest]
        return Answer(10.0, times, times[-1], 5, 10, error)

    answers = [
        answer(0.1, 0.01),
        answer(0.1, 0.05),
        answer(0.4, 0.01),
        answer(0.1, 0.01, "HTTP 500"),
    ]
    found = figures(Measurement(answers), slo_ttft=200, slo_tpot=20)
    seconds = 0.1 + 9 * 0.05
    assert found["goodput_requests_per_second"] == pytest.approx(1 / seconds, rel=1e-4)
    assert found["goodput_share"] == 0.25
    assert figures(Measurement(answers), slo_ttft=200, slo_tpot=None)["goodput_share"] == 0.5
    assert "goodput_share" not in figures(Measurement(answers), None, None)
    assert found["errors"] == {"HTTP 500": 1}
    assert not found["holds"]


# -- failures --------------------------------------------------------------------------------------


def test_refused_requests_are_counted(llm: AsyncLLM) -> None:
    # Not 1: the first two requests come one after the other, and a place is free only after the last byte of an answer.
    with running(create_app(llm, ServerOptions(max_requests=2))) as url:
        result = run("bench", "serve", "--url", url, "--concurrency", 6, *SMALL)
    assert result.returncode == 1
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("error:")]
    assert "HTTP 429" in line and "no more are accepted" in line
    failed = int(line.split()[1])
    assert 1 <= failed <= 4  # of six at once two are sure to be answered
    assert f"answers: {6 - failed} complete, {failed} failed" in result.stdout


def test_a_key_is_sent(llm: AsyncLLM) -> None:
    with running(create_app(llm, ServerOptions(api_keys=("secret",)))) as url:
        assert_fails_after_head(("--url", url), "401")
        assert report_of("--url", url, "--api-key", "secret", *SMALL)["complete"] == 6
        assert_fails_after_head(
            ("--url", url, "--api-key", "secret", "--model", "other"), "404", "other"
        )


def assert_fails_after_head(arguments: tuple[object, ...], *parts: str) -> None:
    result = run("bench", "serve", *arguments, *SMALL)
    assert result.returncode == 1
    assert all(part in result.stderr for part in parts), result.stderr
    assert "throughput" not in result.stdout


def test_nobody_there() -> None:
    assert_fails_after_head(("--url", "http://127.0.0.1:9"), "127.0.0.1:9")


def another_server(behaviour: str) -> FastAPI:
    """An endpoint that is not ours: it knows no ignore_eos; `behaviour` begins with the third request."""
    app = FastAPI()
    seen = 0

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        nonlocal seen
        body = await request.json()
        if "ignore_eos" in body:
            return JSONResponse({"error": {"message": "unknown field ignore_eos"}}, 400)
        seen += 1
        return StreamingResponse(events(body, behaviour if seen > 2 else ""))

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"data": [{"id": "theirs"}]})

    return app


async def events(body: dict[str, Any], behaviour: str) -> Any:
    assert body["model"] == "theirs"
    tokens = min(body["max_tokens"], 5)
    for _ in range(tokens):
        yield b'data: {"choices":[{"index":0,"text":"a"}]}\n\n'
        if behaviour == "error":
            yield b'data: {"error": {"message": "out of paper"}}\n\n'
            return
        if behaviour == "broken":
            raise OSError
    usage = {
        "prompt_tokens": len(body["prompt"]) + (behaviour == "adds"),
        "completion_tokens": tokens,
    }
    if behaviour != "silent":
        yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n".encode()
    yield b"data: [DONE]\n\n"


@pytest.mark.parametrize(
    ("behaviour", "error"),
    [
        ("", None),
        ("error", "in the stream: out of paper"),
        ("broken", "IncompleteReadError"),
        ("silent", "without usage"),
        ("adds", "21 prompt tokens were counted, 20 sent"),
    ],
)
def test_another_server(behaviour: str, error: str | None) -> None:
    with running(another_server(behaviour)) as url:
        result = run("bench", "serve", "--url", url, *SMALL, "--json")
    report = json.loads(result.stdout)
    assert not report["exact_lengths"]
    if error is None:
        assert (report["complete"], report["failed"]) == (6, 0)
        assert report["output_tokens_per_second"] == pytest.approx(30 / report["seconds"], rel=0.01)
        assert result.returncode == 0
    else:
        ((text, count),) = report["errors"].items()
        assert error in text and count == report["failed"] == 6
        assert result.returncode == 1


def test_an_interrupted_load_is_reported(url: str) -> None:
    answered = counted(url)["hayate_generated_tokens_total"] + 200

    def interrupt() -> None:
        end = time.monotonic() + 60
        while counted(url)["hayate_generated_tokens_total"] < answered and time.monotonic() < end:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    helper = threading.Thread(target=interrupt)
    helper.start()
    load = ("--requests", 100_000, "--input", 5, "--output", 10, "--concurrency", 2)
    result = run("bench", "serve", "--url", url, *load)
    helper.join()
    assert result.returncode == 130
    assert "failed, interrupted (over HTTP)" in result.stdout
    complete = int(result.stdout.split("answers: ")[1].split()[0])
    assert 18 <= complete < 100_000  # 200 tokens less the first two requests, less two unfinished
    assert httpx.get(f"{url}/health").status_code == 200


@pytest.mark.parametrize("framing", ["content-length", "close", "chunked"])
def test_bodies_of_every_framing(framing: str) -> None:
    text = json.dumps({"a": "x" * 100_000}).encode()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"GET /base/v1/models HTTP/1.1\r\n") and b"Bearer k\r\n" in head
        if framing == "content-length":
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-LENGTH: %d\r\n\r\n" % len(text) + text)
        elif framing == "close":
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + text)
        else:
            half = len(text) // 2
            parts = [b"%x;x=y\r\n%s\r\n" % (len(p), p) for p in (text[:half], text[half:], b"")]
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"".join(parts))
        writer.close()

    async def fetch() -> dict[str, object]:
        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        client = HttpClient(f"http://127.0.0.1:{port}/base/v1", "k")
        try:
            first = await client.json("/v1/models")
            assert (
                await client.json("/v1/models") == first
            )  # the closed connection is not used again
            return first
        finally:
            client.close()
            server.close()

    assert asyncio.run(fetch()) == json.loads(text)


# -- without a URL ---------------------------------------------------------------------------------


def test_in_process(folder: Path) -> None:
    preset = ("--preset", "dense-tiny", "--random-weights")
    for subject in (("--in-process", "--model", folder), preset):
        report = report_of(*subject, "--device", "cpu", *SMALL, "--kv-memory", "16M")
        assert (report["complete"], report["mode"]) == (6, "in process")
        assert report["ttft_ms"]["p50"] > 0
        assert report["itl_ms"]["p50"] > 0


def test_own_server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAYATE_API_KEY", "of the user's own server")
    options = ("--kv-memory", "16M", "--no-prefix-cache", "--max-num-seqs", 2)
    report = report_of("--model", folder, "--device", "cpu", *SMALL, *options)
    assert (report["complete"], report["mode"]) == (6, "over HTTP")


def test_a_server_that_does_not_start(folder: Path, tmp_path: Path) -> None:
    result = run("bench", "serve", "--model", tmp_path / "none", "--device", "cpu", *SMALL)
    assert result.returncode == 2
    assert "none" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--url", "here"), ("--url 'here'",)),
        (("--url", "http://a", "--device", "cpu"), ("--url", "options of the engine")),
        (("--url", "http://a", "--kv-memory", "1G"), ("--url", "options of the engine")),
        (("--model", "a", "--api-key", "k"), ("--api-key", "--url")),
        (("--model", "a", "--rate", 1, "--concurrency", 1), ("--rate", "--concurrency")),
        (("--model", "a", "--batch", 1), ("--batch", "bench serve")),
        ((), ("--model", "--preset")),
    ],
)
def test_wrong_options(arguments: tuple[object, ...], parts: tuple[str, ...]) -> None:
    result = run("bench", "serve", *arguments, "--json")
    assert_fails(result, 2, *parts)
