"""A client that costs little: HTTP/1.1 on asyncio's streams, with no more than a benchmark needs.

General clients spend tenths of a millisecond on each piece of an answer, so that one process of them tires before
the server does. This one takes some ten microseconds, and looks into JSON only where a request ends.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncGenerator, AsyncIterator
from urllib.parse import urlsplit

from hayate.errors import UsageError

Exchange = tuple[asyncio.StreamReader, asyncio.StreamWriter, int, dict[str, str]]
_LIMIT = 1 << 20  # bytes of a line


class Refused(Exception):
    """An answer other than 200, with what the server said."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"HTTP {status}: {text:.300}")
        self.status = status


class HttpClient:
    """Requests to one server, each on a connection of its own unless an earlier one is idle.

    url: with or without a trailing /v1. UsageError when it is none.
    """

    def __init__(self, url: str, api_key: str | None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"--url {url!r} is not an address such as http://127.0.0.1:8000")
        self.url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1')}"
        self._prefix = urlsplit(self.url).path
        self._address = parts.hostname, parts.port or {"http": 80, "https": 443}[parts.scheme]
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._head = f"Host: {parts.netloc}\r\n"
        if api_key is not None:
            self._head += f"Authorization: Bearer {api_key}\r\n"
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def pieces(
        self, path: str, body: dict[str, object] | None = None
    ) -> AsyncGenerator[bytes, None]:
        """The body of the answer as it comes: GET, or POST of JSON.

        Raises:
            Refused: the status is not 200. OSError, EOFError: the connection broke.
        """
        reader, writer, status, headers = await self._exchange(self._request(path, body))
        reusable = False
        try:
            chunks = _body(reader, headers)
            if status != 200:
                raise Refused(status, b"".join([c async for c in chunks]).decode(errors="replace"))
            async for chunk in chunks:
                yield chunk
            framed = "content-length" in headers or "transfer-encoding" in headers
            reusable = framed and headers.get("connection", "").lower() != "close"
        finally:
            if reusable:
                self._idle.append((reader, writer))
            else:
                writer.close()

    async def json(self, path: str) -> dict[str, object]:
        """The JSON object at `path`."""
        value: dict[str, object] = json.loads(b"".join([c async for c in self.pieces(path)]))
        return value

    def close(self) -> None:
        for _, writer in self._idle:
            writer.close()

    async def _exchange(self, request: bytes) -> Exchange:
        """Send a request; returns the connection and the head of the answer."""
        host, port = self._address
        while True:
            fresh = not self._idle
            if fresh:
                connection = await asyncio.open_connection(host, port, ssl=self._tls, limit=_LIMIT)
            else:
                connection = self._idle.pop()
            reader, writer = connection
            try:
                writer.write(request)
                return reader, writer, *await _head(reader)
            except BaseException as error:
                writer.close()
                # A server may close a connection while it is idle; only a fresh one must not break.
                if fresh or not isinstance(error, (OSError, EOFError)):
                    raise

    def _request(self, path: str, body: dict[str, object] | None) -> bytes:
        verb, data = ("GET", b"") if body is None else ("POST", json.dumps(body).encode())
        kind = "" if body is None else "Content-Type: application/json\r\n"
        return (
            f"{verb} {self._prefix}{path} HTTP/1.1\r\n{self._head}{kind}Content-Length: {len(data)}\r\n\r\n"
        ).encode() + data


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    fields = [line.partition(":") for line in lines[1:] if line]
    return int(lines[0].split()[1]), {name.lower(): value.strip() for name, _, value in fields}


async def _body(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
    if headers.get("transfer-encoding", "").lower() == "chunked":
        while size := int((await reader.readuntil(b"\n")).partition(b";")[0], 16):
            yield (await reader.readexactly(size + 2))[:-2]
        while (await reader.readuntil(b"\n")).strip():
            pass  # trailers
    elif "content-length" in headers:
        yield await reader.readexactly(int(headers["content-length"]))
    else:
        while data := await reader.read(65536):
            yield data
