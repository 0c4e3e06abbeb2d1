"""The application: every endpoint over one model, behind the layers that guard them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, FastAPI, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response

from hayate import __version__
from hayate.server import chat, completions, errors, messages, page, responses, tokenize, vision
from hayate.server.auth import Guard
from hayate.server.limits import Limits
from hayate.server.logging import RequestLog
from hayate.server.options import ServerOptions
from hayate.server.service import Service

if TYPE_CHECKING:
    from hayate.runtime.async_llm import AsyncLLM

router = APIRouter()


def create_app(llm: AsyncLLM | None, options: ServerOptions | None = None) -> FastAPI:
    """An ASGI application that serves `llm`. It does not shut `llm` down.

    Without `llm` every endpoint but /health, /metrics and /version answers 503, until
    `app.state.service.ready(llm)` is called.
    """
    options = options or ServerOptions()
    # No documentation pages: theirs load programs from elsewhere.
    app = FastAPI(title="hayate", version=__version__, docs_url=None, redoc_url=None)
    service = app.state.service = Service(options)
    errors.install(app)
    for part in (chat, completions, responses, messages, tokenize, vision, page):
        app.include_router(part.router)
    app.include_router(router)
    # The last one added is the outermost.
    app.add_middleware(Limits, options=options)
    app.add_middleware(Guard, options=options)
    if options.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=options.allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id"],
        )
    app.add_middleware(RequestLog, options=options, metrics=service.metrics)
    if llm is not None:
        service.ready(llm)
    return app


@router.get("/health")
async def health(request: Request) -> Response:
    """200 when requests are served, else 503; `status` says which state it is."""
    service: Service = request.app.state.service
    service.note_failure()
    if service.state == "ready":
        return JSONResponse({"status": "ok"})
    body: dict[str, Any] = {"status": service.state}
    if service.state == "loading":
        body["bytes_loaded"], body["bytes_total"] = service.bytes_loaded
    return JSONResponse(body, 503)


@router.get("/version")
async def version() -> Response:
    return JSONResponse({"version": __version__})


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    service: Service = request.app.state.service
    return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)


@router.get("/v1/models")
async def models(request: Request) -> Response:
    service: Service = request.app.state.service
    return JSONResponse({"object": "list", "data": [_model(service, n) for n in service.names]})


@router.get("/v1/models/{name:path}")
async def model(name: str, request: Request) -> Response:
    service: Service = request.app.state.service
    return JSONResponse(_model(service, service.model_name(name)))


def _model(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "hayate",
        "max_model_len": service.llm.plan.max_model_len,
    }
