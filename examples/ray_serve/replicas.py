"""hayate on a Ray cluster: replicas of one model, each an engine with the endpoints of `hayate serve`."""

import os
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from ray import serve

from hayate import AsyncLLM
from hayate.errors import UsageError
from hayate.server.app import create_app
from hayate.server.logging import configure
from hayate.server.options import ServerOptions
from hayate.server.run import warm_up


class Arguments(BaseModel, extra="forbid"):
    """`args` of the configuration file."""

    model: str  # a path that all machines see, or a name that each can fetch
    engine: dict[str, Any] = {}  # arguments of hayate.AsyncLLM
    server: dict[str, Any] = {}  # fields of hayate.server.options.ServerOptions, but for these:


ELSEWHERE = {
    "port": "http_options.port",
    "drain_timeout": "graceful_shutdown_timeout_s",
    "api_keys": "HAYATE_API_KEY in the environment of the machines",
}


@serve.deployment
@serve.ingress()
class Replica:
    """One engine, on one GPU or, tensor-parallel, on several of one machine."""

    async def __init__(self, arguments: Arguments) -> None:
        key = os.environ.get("HAYATE_API_KEY")
        server = {"served_model_names": (Path(arguments.model).name,), **arguments.server}
        self.options = ServerOptions(**server, api_keys=(key,) if key else ())
        configure(self.options)
        self.llm = AsyncLLM(arguments.model, **arguments.engine)
        await warm_up(self.llm)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self.llm, self.options)

    def check_health(self) -> None:
        """Ray replaces a replica for which this fails three times in a row."""
        if self.llm.dead is not None:
            raise RuntimeError(f"the engine has ended: {self.llm.dead}")

    async def __del__(self) -> None:  # after the last request, or when __init__ failed
        if hasattr(self, "llm"):
            await self.llm.shutdown(drain=False)


def application(arguments: Arguments) -> serve.Application:
    """What config.yaml names. Each replica gets as many GPUs as its engine uses."""
    for name in ELSEWHERE.keys() & arguments.server.keys():
        raise UsageError(f"args.server.{name}: Ray serves here; set {ELSEWHERE[name]}")
    on_cpu = arguments.engine.get("device") == "cpu"
    gpus = 0 if on_cpu else arguments.engine.get("tensor_parallel", 1)
    return Replica.options(ray_actor_options={"num_gpus": gpus}).bind(arguments)
