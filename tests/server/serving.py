"""Starts servers for tests: in a thread of this process, or as the command."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from hayate.server.protocol import HttpProtocol


def until(condition: Callable[[], object], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)


@contextlib.contextmanager
def running(app: ASGIApp) -> Iterator[str]:
    """The address of `app`, served in a thread until the block ends."""
    config = uvicorn.Config(
        app,
        port=0,
        http=HttpProtocol,
        log_level="error",
        lifespan="off",
        timeout_graceful_shutdown=5,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(15)
        assert not thread.is_alive()


class Command:
    """`hayate serve` in a process of its own; `log()` is its standard error so far."""

    def __init__(
        self, folder: Path, *arguments: str, wait: bool = True, **environment: str
    ) -> None:
        self._lines: list[str] = []
        command = [
            sys.executable,
            "-m",
            "hayate",
            "serve",
            str(folder),
            "--port",
            "0",
            "--device",
            "cpu",
        ]
        self.process = subprocess.Popen(
            [*command, *arguments],
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = ""
        if wait:
            self.url = self.wait_for(r"http://[0-9.:]+")
            self.wait_for(r"\bready\b")  # asking /health again and again would hold up the loading

    def _read(self) -> None:
        assert self.process.stderr is not None
        self._lines.extend(iter(self.process.stderr.readline, ""))

    def log(self) -> str:
        return "".join(self._lines)

    def wait_for(self, pattern: str) -> str:
        until(lambda: re.search(pattern, self.log()) or self.process.poll() is not None, 60)
        match = re.search(pattern, self.log())
        assert match, self.log()
        return match[0]

    def end(self, seconds: float = 30) -> int:
        """The exit code."""
        code = self.process.wait(seconds)
        self._reader.join(5)
        return code

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
