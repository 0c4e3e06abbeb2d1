"""Limits that hold before anything is parsed: how many requests at once, how large, of which type."""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hayate.server.errors import ApiError, ClientGone
from hayate.server.options import ServerOptions

FORM_PATH = "/v1/vision/analyze"  # the only one that takes multipart/form-data
_BODY_SECONDS = 60.0  # a body that takes longer to arrive is given up
_BODIES_PER_REQUEST = 4  # so many bodies may be on their way for each request that may run


class Limits:
    """Takes in the whole body of each POST, within the limits, before the application sees the request.

    Only `application/json` is accepted: a web page of another origin can send other types without
    the browser asking the server first. A form is one of these, so where it is taken the page it came
    from, if it did, must be this server's own or one of the allowed origins.
    """

    def __init__(self, app: ASGIApp, options: ServerOptions) -> None:
        self._app = app
        self._max_requests = options.max_requests
        self._max_bytes = options.max_body_bytes
        self._origins = options.allowed_origins
        self._max_bodies = _BODIES_PER_REQUEST * options.max_requests
        self._running = 0  # those whose body is here: one that never comes takes no place
        self._bodies = 0  # on their way

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        try:
            headers = Headers(scope=scope)
            self._check_type(headers, scope["path"])
            self._check_count(self._bodies, self._max_bodies)
            self._check_count(self._running, self._max_requests)
            self._bodies += 1
            try:
                body = await self._body(headers, receive)
            finally:
                self._bodies -= 1
            self._check_count(self._running, self._max_requests)  # others were faster
        except ApiError as error:
            error.headers["Connection"] = "close"  # the rest of the body is not read
            await error.response(scope["path"])(scope, receive, send)
            return
        except ClientGone:
            return
        self._running += 1
        try:
            await self._app(scope, _replay(body, receive), send)
        finally:
            self._running -= 1

    def _check_count(self, count: int, limit: int) -> None:
        if count >= limit:
            raise ApiError(
                429,
                f"{count} requests are being answered or read, no more are accepted; try again later",
                code="rate_limit_exceeded",
                headers={"Retry-After": "1"},
            )

    def _check_type(self, headers: Headers, path: str) -> None:
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == "application/json":
            return
        if path != FORM_PATH or kind != "multipart/form-data":
            also = " or multipart/form-data" if path == FORM_PATH else ""
            raise ApiError(415, f"Content-Type must be application/json{also}; it is {kind!r:.80}")
        origin = headers.get("origin")
        own = origin is None or origin.partition("://")[2] == headers.get("host")
        if not own and origin not in self._origins and "*" not in self._origins:
            raise ApiError(
                403,
                "forms of web pages of another origin are not taken; allow it with --allowed-origin",
                code="origin_not_allowed",
            )

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 18 or int(length) > self._max_bytes:
            raise self._too_large()
        try:
            return await asyncio.wait_for(self._read(receive), _BODY_SECONDS)
        except asyncio.TimeoutError:
            raise ApiError(
                408, f"the body did not arrive within {_BODY_SECONDS:.0f} seconds"
            ) from None

    async def _read(self, receive: Receive) -> bytes:
        parts = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            parts += message.get("body", b"")
            if len(parts) > self._max_bytes:
                raise self._too_large()
            if not message.get("more_body", False):
                return bytes(parts)

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the body is larger than {self._max_bytes} bytes (--max-body-size)",
            code="body_too_large",
        )


def _replay(body: bytes, receive: Receive) -> Receive:
    """`receive` that gives the body first, then what else comes: that the client has gone."""
    message: Message | None = {"type": "http.request", "body": body, "more_body": False}

    async def replayed() -> Message:
        nonlocal message
        first, message = message, None
        return first or await receive()

    return replayed
