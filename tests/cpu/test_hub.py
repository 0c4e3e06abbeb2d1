"""Names to folders, against a small server that speaks the hub's protocol."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from hayate.checkpoint.hub import resolve_model
from hayate.errors import ModelError, UsageError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b'{"architectures": ["LlamaForCausalLM"]}',
    "generation_config.json": b"{}",
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "model-00001-of-00001.safetensors": b"weights",
    "model.safetensors.index.json": b"{}",
    # What stays on the hub:
    "README.md": b"# readme",
    "pytorch_model.bin": b"pickle",
    "consolidated.safetensors": b"the same weights again",
    "onnx/model.safetensors": b"another format",
}
WANTED = set(FILES) - {
    "README.md",
    "pytorch_model.bin",
    "consolidated.safetensors",
    "onnx/model.safetensors",
}


class Hub(BaseHTTPRequestHandler):
    """org/model is whole, org/pickle has no safetensors, org/gated asks for a licence."""

    protocol_version = "HTTP/1.1"
    requests: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.requests.append(
            f"{self.command} {path} {self.headers.get('authorization', '')}".strip()
        )
        parts = path.strip("/").split("/")
        if parts[0] == "api":  # /api/models/org/name/(revision|tree)/rev
            self._describe("/".join(parts[2:4]), parts[4:])
        else:  # /org/name/resolve/commit/file
            self._send_file("/".join(parts[:2]), "/".join(parts[4:]))

    def _describe(self, repo: str, rest: list[str]) -> None:
        if repo not in ("org/model", "org/pickle", "org/gated"):
            return self._refuse(404, "RepoNotFound")
        if rest and rest[-1] not in ("main", "v1", COMMIT):
            return self._refuse(404, "RevisionNotFound")
        names = ["config.json", "pytorch_model.bin"] if repo == "org/pickle" else list(FILES)
        if rest and rest[0] == "tree":
            entries = [
                {"type": "file", "path": n, "size": len(FILES[n]), "oid": etag(n)} for n in names
            ]
            return self._send(json.dumps(entries).encode())
        siblings = [{"rfilename": name} for name in names]
        answer = {"id": repo, "sha": COMMIT, "siblings": siblings, "private": False}
        return self._send(json.dumps(answer).encode())

    def _send_file(self, repo: str, name: str) -> None:
        if repo == "org/gated":
            return self._refuse(403, "GatedRepo")
        if name not in FILES:
            return self._refuse(404, "EntryNotFound")
        return self._send(FILES[name], ETag=f'"{etag(name)}"', **{"X-Repo-Commit": COMMIT})

    def _refuse(self, status: int, code: str) -> None:
        self._send(b"", status, **{"X-Error-Code": code, "X-Error-Message": code})

    def _send(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def etag(name: str) -> str:
    return hashlib.sha1(FILES[name]).hexdigest()


class Server:
    def __init__(self) -> None:
        handler = type("Handler", (Hub,), {"requests": []})
        self.requests: list[str] = handler.requests  # type: ignore[attr-defined]
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def hub() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


def pull(
    name: str, home: Path, *options: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    """`hayate pull name`; in a process, because the hub's library reads its variables once."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **variables}
    command = [sys.executable, "-m", "hayate", "pull", name, *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=home)


def assert_model_error(result: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert result.returncode == 3, result.stderr
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("hayate: error: ")
    for part in parts:
        assert part in message
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_only_what_is_needed_comes_and_only_once(hub: Server, tmp_path: Path) -> None:
    result = pull(
        "org/model", tmp_path, "--revision", "v1", HF_ENDPOINT=hub.url, HF_TOKEN="hf_secret"
    )
    assert result.returncode == 0, result.stderr
    folder = Path(result.stdout.strip())
    assert folder.is_relative_to(tmp_path)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {n: FILES[n] for n in WANTED}
    asked = [request for request in hub.requests if "org/model" in request]
    assert asked
    assert all(request.endswith("Bearer hf_secret") for request in asked), asked

    hub.requests.clear()
    again = pull("org/model", tmp_path, "--revision", "v1", HF_ENDPOINT=hub.url)
    assert again.stdout == result.stdout
    assert not [request for request in hub.requests if request.startswith("GET /org/model/resolve")]

    offline = pull("org/model", tmp_path, "--revision", "v1", HF_HUB_OFFLINE="1")
    assert offline.stdout == result.stdout


def test_quiet_prints_the_folder_alone(hub: Server, tmp_path: Path) -> None:
    result = pull("org/model", tmp_path, "--quiet", HF_ENDPOINT=hub.url)
    assert result.returncode == 0
    assert result.stderr == ""


def test_no_such_repository(hub: Server, tmp_path: Path) -> None:
    result = pull("org/nothing", tmp_path, HF_ENDPOINT=hub.url)
    assert_model_error(result, "'org/nothing' not found", hub.url, "spelling", "HF_TOKEN")


def test_gated_repository(hub: Server, tmp_path: Path) -> None:
    result = pull("org/gated", tmp_path, HF_ENDPOINT=hub.url)
    assert_model_error(result, "org/gated is gated", "accept its licence", "HF_TOKEN")


def test_no_such_revision(hub: Server, tmp_path: Path) -> None:
    result = pull("org/model", tmp_path, "--revision", "v9", HF_ENDPOINT=hub.url)
    assert_model_error(result, "no revision 'v9'", "--revision")


def test_repository_without_safetensors(hub: Server, tmp_path: Path) -> None:
    assert_model_error(
        pull("org/pickle", tmp_path, HF_ENDPOINT=hub.url), "org/pickle", "no *.safetensors files"
    )


def test_no_network(tmp_path: Path) -> None:
    with socket.socket() as closed:  # a port on which nobody listens
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        result = pull("org/model", tmp_path, HF_ENDPOINT=url)
    assert_model_error(result, "'org/model' not found", "cannot be reached", "check the network")


def test_offline_and_not_in_the_cache(tmp_path: Path) -> None:
    result = pull("org/model", tmp_path, HF_HUB_OFFLINE="1")
    assert_model_error(result, "'org/model' not found", "HF_HUB_OFFLINE is set", str(tmp_path))


@pytest.mark.parametrize(
    "name", ["nothing", "./nothing", "/nothing/here", "a/b/c", "org/", "", "../nothing-here"]
)
def test_a_path_that_is_not_there(name: str) -> None:
    with pytest.raises(ModelError, match=r"no such folder: .*smollm2-135m"):
        resolve_model(name)


def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    with pytest.raises(ModelError, match=r"org/name: config\.json is missing"):
        resolve_model(tmp_path / "org" / "name")
    (tmp_path / "org" / "name" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert resolve_model("org/name") == Path("org/name")  # a folder comes before a hub id
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/org/name") == tmp_path / "org" / "name"
    with pytest.raises(UsageError, match="--revision 'main' applies to hub ids only"):
        resolve_model("org/name", revision="main")
    with pytest.raises(ModelError, match=r"config\.json is a file"):
        resolve_model("org/name/config.json")
