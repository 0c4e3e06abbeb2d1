"""Service: the state of one server, from loading over serving to its end."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from hayate.errors import ModelError
from hayate.server.errors import ApiError
from hayate.server.images import PixelBudget
from hayate.server.metrics import Metrics
from hayate.server.options import ServerOptions
from hayate.server.tool_parser import ToolFormat
from hayate.server.tools import find_format
from hayate.text.chat_template import ChatTemplate

if TYPE_CHECKING:
    from hayate.runtime.async_llm import AsyncLLM
    from hayate.runtime.engine_stats import EngineStats

State = Literal["loading", "ready", "failed"]


class Service:
    """What all endpoints share. `ready` and `fail` may be called from any thread.

    on_failure: called once when the server cannot go on; `failure` says why.
    """

    def __init__(self, options: ServerOptions) -> None:
        self.options = options
        self.metrics = Metrics(self._stats)
        self.open_pixels = PixelBudget(options.max_open_pixels)
        self.created = int(time.time())
        self.state: State = "loading"
        self.bytes_loaded = (0, 0)  # of how many
        self.failure: BaseException | None = None
        self.on_failure: Callable[[], None] = lambda: None
        self.names = options.served_model_names
        self._llm: AsyncLLM | None = None

    def ready(self, llm: AsyncLLM) -> None:
        """The model is loaded."""
        if not self.names:
            self.names = (llm.folder.name if llm.folder is not None else "random",)
        self._llm = llm
        self.state = "ready"

    def fail(self, error: BaseException) -> None:
        """The model could not be loaded, or its engine has died."""
        if self.failure is None:
            self.failure, self.state = error, "failed"
            self.on_failure()

    def note_failure(self) -> None:
        """See whether the engine has died; whoever finds out first calls `fail`."""
        if self._llm is not None and self._llm.dead is not None:
            self.fail(self._llm.dead)

    @property
    def llm(self) -> AsyncLLM:
        """The model; 503 when it cannot serve."""
        if self.state == "ready" and self._llm is not None:
            return self._llm
        reason = "the model is still loading"
        if self.state == "failed":
            name = type(self.failure).__name__
            reason = f"the engine has failed ({name}); the server must be restarted"
        raise ApiError(503, reason, code=f"server_{self.state}", headers={"Retry-After": "5"})

    def model_name(self, asked: str | None) -> str:
        """The name to answer with; 404 for a model that is not served here, 503 while none is."""
        self.llm  # noqa: B018
        if asked is None or asked in self.names:
            return asked or self.names[0]
        raise ApiError(
            404,
            f"the model {asked!r:.200} is not served here; there is {', '.join(self.names)}",
            param="model",
            code="model_not_found",
        )

    @functools.cached_property
    def tool_format(self) -> ToolFormat | None:
        """How the model's chat template writes tool calls; None when it knows of none."""
        return find_format(self.chat_template())

    def chat_template(self) -> ChatTemplate:
        """The model's chat template; 400 when it has none."""
        try:
            return self.llm.chat_template
        except ModelError:
            raise ApiError(
                400, "this model has no chat template: it continues texts, use /v1/completions"
            ) from None

    def _stats(self) -> EngineStats | None:
        return self._llm.stats() if self._llm is not None and self.state != "failed" else None
