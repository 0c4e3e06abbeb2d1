"""`hayate serve` as a process: from the first answer of /health to the exit code."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from hayate import AsyncLLM
from hayate.cli import main as cli
from hayate.errors import GpuFault
from hayate.server.options import ServerOptions
from hayate.server.run import serve
from tests.server.serving import Command, until

LONG = {"prompt": "abc", "max_tokens": 600, "ignore_eos": True, "temperature": 0, "stream": True}


def test_loading_serving_draining(folder: Path, tmp_path: Path) -> None:
    """One process: health while it loads, keys, drain on SIGTERM with a stream open, exit code 0."""
    keys = tmp_path / "keys"
    keys.write_text("from-file\n\n")
    arguments = ("--api-key-file", str(keys), "--json-logs", "--max-model-len", "1600")
    with Command(folder, *arguments, wait=False, HAYATE_API_KEY="from-environment") as server:
        url = server.wait_for(r"http://[0-9.:]+")
        loading = httpx.get(f"{url}/health")
        assert (loading.status_code, loading.json()["status"]) == (503, "loading")
        until(lambda: httpx.get(f"{url}/health").status_code == 200, 60)
        assert httpx.get(f"{url}/v1/models").status_code == 401
        for key in ("from-file", "from-environment"):
            models = httpx.get(f"{url}/v1/models", headers={"x-api-key": key}).json()
            assert models["data"][0]["id"] == folder.name
            assert models["data"][0]["max_model_len"] == 1600
        headers = {"x-api-key": "from-file"}
        with (
            httpx.Client(base_url=url, headers=headers, timeout=60) as http,
            http.stream("POST", "/v1/completions", json=LONG) as response,
        ):
            lines = response.iter_lines()
            assert next(lines).startswith("data: ")
            server.process.send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert server.end() == 0
        log = [json.loads(line) for line in server.log().splitlines()]
        assert any(line["message"] == "ready" and "plan" in line for line in log)
        done = [line for line in log if line.get("path") == "/v1/completions"]
        assert done[0]["generated_tokens"] == 600
        assert "from-" not in server.log()
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")


def serving(load: Any, act: Callable[[str], None], caplog: pytest.LogCaptureFixture) -> None:
    """`serve` in this thread, with `act` on its address in another."""
    failures: list[BaseException] = []

    def work() -> None:
        try:
            until(lambda: caplog.records, 20)
            url = next(r.fields["url"] for r in caplog.records if hasattr(r, "fields"))
            until(lambda: httpx.get(f"{url}/health").status_code == 200, 60)
            act(url)
        except BaseException as error:
            failures.append(error)
            os.kill(os.getpid(), signal.SIGTERM)

    helper = threading.Thread(target=work, daemon=True)
    helper.start()
    try:
        serve(load, ServerOptions(port=0))
    finally:
        helper.join(10)
        assert not failures, failures


@pytest.fixture(autouse=True)
def logs_to_caplog(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def configure(*_: object) -> None:
        caplog.set_level("INFO", logger="hayate.server")

    monkeypatch.setattr("hayate.server.run.configure", configure)


def accepts(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.ConnectError:
        return False


def test_ctrl_c_twice_stops_at_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    def act(url: str) -> None:
        with (
            httpx.Client(base_url=url, timeout=60) as http,
            http.stream("POST", "/v1/completions", json={**LONG, "n": 100}) as response,
        ):
            lines = response.iter_lines()
            assert next(lines)
            os.kill(os.getpid(), signal.SIGINT)
            until(lambda: not accepts(url))
            assert next(lines) is not None  # it still answers who was there
            os.kill(os.getpid(), signal.SIGINT)
            with contextlib.suppress(httpx.RemoteProtocolError):
                assert "data: [DONE]" not in list(lines)

    llm = AsyncLLM(folder, device="cpu", kv_memory="64M")
    with pytest.raises(KeyboardInterrupt):
        serving(lambda _: llm, act, caplog)
    until(lambda: not llm.engine.has_work)


def test_an_engine_that_dies_ends_the_server(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The waiting request is told; then `serve` raises the reason, which has the exit code 6."""
    llm = AsyncLLM(folder, device="cpu", kv_memory="4M")

    def die() -> list[Any]:
        raise GpuFault("the GPU failed while running: test")

    def act(url: str) -> None:
        monkeypatch.setattr(llm.engine, "step", die)
        answer = httpx.post(f"{url}/v1/completions", json={"prompt": "abc", "max_tokens": 5})
        assert answer.status_code == 500
        assert "GpuFault" in answer.text

    with pytest.raises(GpuFault, match="test") as caught:
        serving(lambda _: llm, act, caplog)
    assert caught.value.exit_code == 6


def test_an_engine_that_dies_while_nobody_waits(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = AsyncLLM(folder, device="cpu", kv_memory="4M")
    left = threading.Event()

    def die() -> list[Any]:
        assert left.wait(10)
        raise GpuFault("the GPU failed while running: test")

    def act(url: str) -> None:
        monkeypatch.setattr(llm.engine, "step", die)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/completions", json={"prompt": "abc"}, timeout=0.3)
        time.sleep(0.2)  # until the server has seen that the client left
        left.set()

    with pytest.raises(GpuFault, match="test"):
        serving(lambda _: llm, act, caplog)


def test_a_model_that_cannot_be_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", str(tmp_path), "--port", "0", "--device", "cpu"]) == 3
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("hayate: error: ")
    assert str(tmp_path) in last


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ((), "MODEL"),
        (("a", "--model", "b"), "once"),
        (("a", "--api-key", ""), "API key"),
        (("a", "--api-key", "ü"), "API key"),
        (("a", "--api-key-file", "/nowhere"), "/nowhere"),
        (("a", "--api-key-file", "/dev/null"), "no key"),
        (("a", "--port", "70000"), "--port"),
        (("a", "--host", "no.such.host.invalid"), "--host"),
        (("a", "--max-body-size", "0"), "--max-body-size"),
        (("a", "--dtype", "int3"), "--dtype"),
        (("a", "--device", "tpu"), "--device"),
        (("a", "--num-draft-tokens", "3"), "--speculative"),
        (("a", "--frobnicate"), "frobnicate"),
    ],
)
def test_wrong_usage(
    arguments: tuple[str, ...], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["serve", *arguments]) == 2
    assert word in capsys.readouterr().err


def test_an_empty_key_in_the_environment_is_no_open_door(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HAYATE_API_KEY", "")
    assert cli.main(["serve", "a"]) == 2
    assert "API key" in capsys.readouterr().err


def test_a_port_in_use(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert cli.main(["serve", str(folder), "--port", port]) == 2
    assert port in capsys.readouterr().err


def test_an_open_door_is_pointed_out(caplog: pytest.LogCaptureFixture) -> None:
    from hayate.server.run import _warn

    with caplog.at_level("WARNING", logger="hayate.server"):
        _warn(ServerOptions())
        _warn(ServerOptions(host="0.0.0.0", api_keys=("k",)))
        assert not caplog.records
        _warn(ServerOptions(host="0.0.0.0"))
    assert "API key" in caplog.text


def test_help_lists_every_option_of_the_documentation() -> None:
    import typer

    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    group = typer.main.get_command(cli.app)
    names = {
        name
        for parameter in group.commands["serve"].params  # type: ignore[attr-defined]
        for name in parameter.opts
        if name.startswith("--")
    }
    assert names <= set(re.findall(r"--[a-z][a-z-]*", text))
