"""What goes wrong in a request, in the forms in which OpenAI's and Anthropic's clients expect it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from hayate.errors import RequestTooLarge, UsageError

_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_FIELD = re.compile(r"(\w+)(?:\[\d+\])* must be ")  # how `SamplingParams` begins its messages
CLIENT_GONE = 499  # in the log alone: nobody is there to read an answer


class ApiError(Exception):
    """An answer that is no success.

    param: the field at fault, such as `messages[0].content`. code: for programs.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers or {}

    def body(self, path: str) -> dict[str, Any]:
        """The JSON of the answer, in the form of the protocol that `path` belongs to."""
        if path.startswith("/v1/messages"):
            kind = _ANTHROPIC_TYPES.get(
                self.status, "api_error" if self.status >= 500 else _ANTHROPIC_TYPES[400]
            )
            return {"type": "error", "error": {"type": kind, "message": self.message}}
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        if self.status == 429:
            kind = "rate_limit_error"
        return {
            "error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        }

    def response(self, path: str) -> Response:
        return Response(
            json.dumps(self.body(path)), self.status, self.headers, media_type="application/json"
        )


class ClientGone(Exception):
    """The client closed the connection before the answer was complete."""


def as_api_error(error: BaseException) -> ApiError:
    """What the client is told of `error`: its own mistakes in full, ours by name alone."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UsageError | RequestTooLarge):
        field = _FIELD.match(str(error))
        return ApiError(400, str(error), param=field[1] if field else None)
    kind = type(error).__name__
    return ApiError(
        500, f"the request failed in the server ({kind}); its log says more", code="internal_error"
    )


def install(app: FastAPI) -> None:
    """Have `app` answer every failure of a request in those forms."""

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return _invalid(error.errors(), error.body).response(request.url.path)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        message = {
            404: f"there is no {request.url.path} here",
            405: f"{request.method} is not a method of {request.url.path}",
            400: "the body is not valid JSON: it is nested too deeply, or a number in it is too long",
        }.get(error.status_code, str(error.detail))
        headers = dict(error.headers or {})
        return ApiError(error.status_code, message, headers=headers).response(request.url.path)

    @app.exception_handler(ApiError)
    async def api(request: Request, error: ApiError) -> Response:
        return error.response(request.url.path)

    @app.exception_handler(RequestTooLarge)
    @app.exception_handler(UsageError)
    async def usage(request: Request, error: UsageError | RequestTooLarge) -> Response:
        return as_api_error(error).response(request.url.path)

    @app.exception_handler(ClientGone)
    async def gone(request: Request, error: ClientGone) -> Response:
        return Response(status_code=CLIENT_GONE)


def _invalid(errors: Sequence[dict[str, Any]], body: object) -> ApiError:
    # Of a union every member complains; the one that got deepest into the value is the one that was meant.
    worst = max(errors, key=lambda e: len(e["loc"]))
    if worst["type"] == "json_invalid":
        reason = worst.get("ctx", {}).get("error", "")
        return ApiError(
            400, f"the body is not valid JSON: {reason} at character {worst['loc'][-1]}"
        )
    param = _param(worst, body)
    if worst["type"] == "extra_forbidden":
        return ApiError(
            400,
            f"{param} is not a field that this endpoint implements",
            param=param,
            code="unknown_parameter",
        )
    if worst["type"] == "none_required":
        return ApiError(
            400,
            f"{param} is not implemented by this server",
            param=param,
            code="unsupported_parameter",
        )
    if worst["type"] == "value_error":  # a check of our own
        complaint = str(worst["ctx"]["error"])
        return ApiError(400, f"{param}: {complaint}" if param else complaint, param=param or None)
    if not param:
        return ApiError(400, "the body must be a JSON object")
    return ApiError(400, f"{param}: {worst['msg']}", param=param)


def _param(error: dict[str, Any], body: object) -> str:
    """('messages', 0, 'user', 'content', 'str') -> 'messages[0].content'.

    Pydantic's locations hold names of types among those of fields; only fields are found in the body.
    """
    text = ""
    *inner, last = error["loc"][1:] or ("",)
    for part in (*inner, last):
        if isinstance(part, int) and isinstance(body, list):
            text, body = f"{text}[{part}]", body[part]
        elif isinstance(body, dict) and part in body:
            text, body = f"{text}.{part}", body[part]
    if error["type"] == "missing":
        text += f".{last}"
    return text.lstrip(".")
