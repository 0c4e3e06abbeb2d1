"""Running the server: the socket, the loading of the model beside it, signals, and the end."""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import uvicorn

from hayate.errors import UsageError
from hayate.sampling_params import SamplingParams
from hayate.server.app import create_app
from hayate.server.logging import configure, log
from hayate.server.options import ServerOptions
from hayate.server.protocol import HttpProtocol
from hayate.server.service import Service

if TYPE_CHECKING:  # torch is imported while the port answers already
    from hayate.runtime.async_llm import AsyncLLM

Load = Callable[[Callable[[int, int], None]], "AsyncLLM"]


def serve(load: Load, options: ServerOptions, *, verbose: bool = False) -> None:
    """Serve until a signal comes; the port answers while `load` still runs.

    load: makes the model; it is given a function to call with (bytes read, bytes in all).

    The first SIGINT or SIGTERM stops accepting and waits for what runs, `drain_timeout` at most; then this returns.

    Raises:
        KeyboardInterrupt: a second SIGINT, or one while loading.
        UsageError: the address cannot be bound.
        Exception: what `load` raised, or what ended the engine.
    """
    configure(options, verbose)
    listener = _bind(options)
    app = create_app(None, options)
    service: Service = app.state.service
    config = uvicorn.Config(
        app,
        http=HttpProtocol,
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=65,  # longer than most proxies keep theirs
        timeout_graceful_shutdown=math.ceil(options.drain_timeout),
    )
    server = _Server(config, service)
    service.on_failure = server.stop
    _warn(options)
    loader = threading.Thread(target=_load, args=(load, service), name="hayate-load", daemon=True)
    loader.start()
    server.run(sockets=[listener])
    if service.failure is not None:
        raise service.failure
    if service.state != "ready" or server.force_exit:
        raise KeyboardInterrupt
    asyncio.run(service.llm.shutdown(drain=False))  # nobody is left to drain for


class _Server(uvicorn.Server):
    """uvicorn's server, whose end by a signal is an end in good order: the signal is not raised again."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def stop(self) -> None:
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        self._service.note_failure()  # the engine may die while no request waits for it
        return await super().on_tick(counter)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handled = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in handled}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _bind(options: ServerOptions) -> socket.socket:
    """A socket that listens at the address."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)  # who comes before the server runs waits
    except OSError as error:
        raise UsageError(
            f"--host {options.host} --port {options.port}: {error.strerror or error}; choose another address"
        ) from error
    host, port = listener.getsockname()[:2]
    log.info("listening", extra={"fields": {"url": f"http://{_bracketed(host)}:{port}"}})
    return listener


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _warn(options: ServerOptions) -> None:
    if not options.is_loopback and not options.api_keys:
        log.warning(
            "anybody who can reach this address can use the model: set an API key (--api-key-file, HAYATE_API_KEY)"
        )


async def warm_up(llm: AsyncLLM) -> None:
    """Run once what is set up when it first runs, which can take seconds, before anybody waits for it."""
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    if llm.plan.max_model_len > 1:
        await llm.generate([[0]], params)


def _load(load: Load, service: Service) -> None:
    """In a thread of its own: it must not hold up the event loop, nor the end of the process."""

    def progress(done: int, total: int) -> None:
        service.bytes_loaded = (done, total)

    start = time.perf_counter()
    try:
        llm = load(progress)
        asyncio.run(warm_up(llm))
    except BaseException as error:  # `serve` raises it
        service.fail(error)
        return
    service.ready(llm)
    seconds = round(time.perf_counter() - start, 1)
    fields = {"model": service.names[0], "seconds": seconds, "plan": llm.plan.describe()}
    log.info("ready", extra={"fields": fields})
