"""The web page: GET /, its files under /static/, and GET /v1/server-info, which tells it what it may offer."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from hayate import __version__
from hayate.server.errors import ApiError
from hayate.server.service import Service

router = APIRouter()
STATIC = Path(__file__).parent / "static"
TYPES = {  # the system's own table of types differs from one to the next
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Nothing from elsewhere, no inline program, and no text that becomes markup: the browser itself refuses
# `innerHTML`. Were the page ever to show an answer wrongly, that answer still could not run or send anything.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # asked for anew each time, answered 304 while it is the same
}


@router.get("/")
async def index(request: Request) -> Response:
    return _answer(request, "index.html")


@router.get("/static/{name}")
async def static(name: str, request: Request) -> Response:
    return _answer(request, name)


@router.get("/v1/server-info")
async def server_info(request: Request) -> Response:
    """What the page needs beside /v1/models. 503 while the model is loading.

    chat: whether the model has a chat template. images: whether messages may hold images. analyze:
    whether POST /v1/vision/analyze answers.
    """
    service: Service = request.app.state.service
    llm = service.llm
    has_template, sees = _has_template(service), llm.config.vision is not None
    info: dict[str, Any] = {
        "version": __version__,
        "model": service.names[0],
        "max_model_len": llm.plan.max_model_len,
        "chat": has_template,
        "images": has_template and sees,
        "analyze": has_template and sees,
    }
    return JSONResponse(info)


def _has_template(service: Service) -> bool:
    try:
        service.chat_template()
    except ApiError:
        return False
    return True


@functools.cache
def _files() -> dict[str, tuple[bytes, str]]:
    """The content and entity tag of each file by its name; no other name is looked for."""
    found = {}
    for path in STATIC.iterdir():
        if path.suffix in TYPES:
            content = path.read_bytes()
            found[path.name] = content, f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    return found


def _answer(request: Request, name: str) -> Response:
    if name not in _files():
        raise ApiError(404, f"there is no {request.url.path} here")
    content, tag = _files()[name]
    headers = {**_HEADERS, "ETag": tag, "Content-Type": TYPES[Path(name).suffix]}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers)
