"""Who may ask: API keys, and the Host header."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from hayate.server.errors import ApiError
from hayate.server.options import ServerOptions


def is_public(path: str) -> bool:
    """Paths that need no key: health, and the web page, which holds nothing secret. All others do."""
    return path in ("/health", "/") or path.startswith("/static/")


class Keys:
    """The API keys, as digests: comparing takes the same time whatever is wrong with a key."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    def accept(self, key: str) -> bool:
        digest = _digest(key)
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return any(matches)  # after all comparisons


class Guard:
    """Refuses requests without a valid key (401), or with a Host that is not ours (403)."""

    def __init__(self, app: ASGIApp, options: ServerOptions) -> None:
        self._app = app
        self._hosts = options.hosts
        self._keys = Keys(options.api_keys) if options.api_keys else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._check(Headers(scope=scope), scope["path"])
            except ApiError as error:
                await error.response(scope["path"])(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, headers: Headers, path: str) -> None:
        if self._hosts is not None and _without_port(headers.get("host", "")) not in self._hosts:
            raise ApiError(
                403,
                "the Host header names a host that this server does not answer for; allow it with --allowed-host",
                code="host_not_allowed",
            )
        if self._keys is None or is_public(path):
            return
        if not self._keys.accept(_key_in(headers)):
            raise ApiError(
                401,
                "a valid API key is needed, as `Authorization: Bearer KEY` or `x-api-key: KEY`",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _key_in(headers: Headers) -> str:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")


def _without_port(host: str) -> str:
    name, colon, port = host.lower().rpartition(":")
    return name if colon and port.isdecimal() else host.lower()
