"""The log: one line a request, as text or JSON; and the outermost layer of the application, which writes it.

No prompt, answer or message of a failed request is in it unless `log_prompts` asks for that.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
import traceback
import uuid
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hayate.server.errors import CLIENT_GONE, as_api_error
from hayate.server.metrics import Metrics
from hayate.server.options import ServerOptions

log = logging.getLogger("hayate.server")
_CONTEXT = "hayate.context"  # the scope's key of the `Context`
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass
class Context:
    """One request, and what its line in the log says beside path and status."""

    id: str
    fields: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, scope: Scope) -> Context:
        context: Context = scope[_CONTEXT]
        return context


class RequestLog:
    """Names each request (its own X-Request-Id, or a new one), logs and counts it, and answers what nobody foresaw."""

    def __init__(self, app: ASGIApp, options: ServerOptions, metrics: Metrics) -> None:
        self._app = app
        self._log_errors = options.log_prompts
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        context = scope[_CONTEXT] = Context(
            given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        )
        start, status = time.perf_counter(), CLIENT_GONE

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = context.id
                headers["x-content-type-options"] = "nosniff"
            await send(message)

        self._metrics.requests_open += 1
        try:
            await self._app(scope, receive, named)
        except Exception as error:  # a defect, or a failure of the engine
            log_failure(context, error, self._log_errors)
            if status == CLIENT_GONE:
                await as_api_error(error).response(scope["path"])(scope, receive, named)
        finally:
            seconds = time.perf_counter() - start
            self._metrics.requests_open -= 1
            self._metrics.finished(scope["path"], status, seconds)
            fields = {
                "request_id": context.id,
                "method": scope["method"],
                "path": scope["path"],
                "status": status,
                "ms": round(seconds * 1e3, 1),
                **context.fields,
            }
            level = logging.DEBUG if scope["path"] in ("/health", "/metrics") else logging.INFO
            log.log(level, "request", extra={"fields": fields})


def log_failure(context: Context, error: BaseException, with_message: bool) -> None:
    """Where `error` came from. Its message may hold parts of a prompt: it is left out unless asked for."""
    place = "".join(traceback.format_tb(error.__traceback__))
    message = f"{type(error).__name__}: {error}" if with_message else type(error).__name__
    fields = {"request_id": context.id, "error": message, "traceback": place}
    log.error("request failed", extra={"fields": fields})


class TextFormatter(logging.Formatter):
    """`INFO 11-21 08:26:15 message key=value ...`; values with blanks or controls are quoted."""

    def format(self, record: logging.LogRecord) -> str:
        time_text = self.formatTime(record, "%m-%d %H:%M:%S")
        pairs = [f"{k}={_plain(v)}" for k, v in getattr(record, "fields", {}).items()]
        text = " ".join([record.levelname, time_text, record.getMessage(), *pairs])
        return text + ("\n" + self.formatException(record.exc_info) if record.exc_info else "")


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (ISO 8601, UTC), level, message, and the record's own fields."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure(options: ServerOptions, verbose: bool = False) -> None:
    """Send the server's log, and uvicorn's, to standard error in the form asked for."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if options.json_logs else TextFormatter())
    for name in ("hayate.server", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.DEBUG if verbose and name == "hayate.server" else logging.INFO)


def _plain(value: object) -> str:
    text = str(value)
    return text if re.fullmatch(r"[!-~]+", text) and '"' not in text else json.dumps(text)
