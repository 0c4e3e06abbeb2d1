"""POST /v1/vision/analyze: what an image shows, in fields, or an answer about it in text (see `hayate.vision_core`)."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
import time
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from pydantic import Field, ValidationError, model_validator
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from hayate.errors import UsageError
from hayate.runtime.outputs import RequestOutput
from hayate.sampling_params import SamplingParams
from hayate.server.chat import finish_name
from hayate.server.errors import ApiError
from hayate.server.generation import Generation, Usage
from hayate.server.images import NamedImage, open_images
from hayate.server.limits import FORM_PATH
from hayate.server.logging import Context
from hayate.server.openai_types import Body
from hayate.server.service import Service
from hayate.server.stream import EventStream, Piece, data, until_gone
from hayate.vision_core.answers import Timings
from hayate.vision_core.forms import Form
from hayate.vision_core.profile import Profile, Wording, load_profile

if TYPE_CHECKING:
    from hayate.runtime.conversation import Conversation

router = APIRouter()
_FORMS = {"full": "analyze", "simple": "simple"}
_STAGES = ("decode", "preprocess", "encode", "prefill", "generate", "total")
_MAX_SIDE = 512  # as `hayate analyze` has it


class AnalyzeRequest(Body):
    image: str | bytes  # a URL; in a form also the file itself
    mode: Literal["full", "simple", "ask"] | None = None
    language: str | None = None
    question: str | None = None
    stream: bool | None = None
    model: str | None = None
    max_side: Annotated[int, Field(ge=1)] | Literal["full"] | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    seed: int | None = None

    @model_validator(mode="after")
    def _check(self) -> AnalyzeRequest:
        asks = self.mode == "ask"
        if asks != bool(self.question and self.question.strip()):
            raise ValueError("mode `ask` needs a question, the others have none")
        if self.stream and not asks:
            raise ValueError("stream: true needs mode `ask`: fields are read from a whole answer")
        return self

    def sampling(self, profile: Profile) -> SamplingParams:
        """The profile's options, with those given here in their place."""
        names = ("max_tokens", "temperature", "seed")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return dataclasses.replace(profile.sampling, **given)


_SCHEMA = {"schema": AnalyzeRequest.model_json_schema()}
_CONTENT = {"application/json": _SCHEMA, "multipart/form-data": _SCHEMA}


@router.post(FORM_PATH, openapi_extra={"requestBody": {"required": True, "content": _CONTENT}})
async def analyze(request: Request) -> Response:
    service: Service = request.app.state.service
    if service.llm.config.vision is None:
        raise ApiError(404, f"the model {service.names[0]} takes no images: it has no {FORM_PATH}")
    service.chat_template()
    body = await _read(request)
    model = service.model_name(body.model)
    profile = _profile()
    wording = _wording(profile, body.language)
    form = None if body.mode == "ask" else wording.form(_FORMS[body.mode or "full"])
    params = body.sampling(profile)
    begin = time.perf_counter()
    prompt, open_time, shrink_time = await _prompt(service, body, wording, form)
    generation = Generation(
        service,
        Context.of(request.scope),
        model,
        [prompt],
        params if form is None else form.params(params),
    )
    answer = _Answer(model, prompt, form, begin, open_time, shrink_time)
    if body.stream:
        return EventStream(generation, await generation.stream(), _Events(answer))
    return JSONResponse(answer.of(await until_gone(request.receive, generation.run())))


@functools.cache
def _profile() -> Profile:
    return load_profile()


def _wording(profile: Profile, language: str | None) -> Wording:
    try:
        return profile.wording(language)
    except UsageError as error:
        raise ApiError(400, str(error), param="language") from None


async def _prompt(
    service: Service, body: AnalyzeRequest, wording: Wording, form: Form | None
) -> tuple[Conversation, float, float]:
    """The prompt; seconds of opening the image and of making it smaller."""
    from hayate.vision.image import limit_side  # with torch

    begin = time.perf_counter()
    (pixels,) = await open_images(service, [NamedImage(body.image, "image")])
    opened = time.perf_counter()
    if body.max_side != "full":
        pixels = await asyncio.to_thread(limit_side, pixels, body.max_side or _MAX_SIDE)
    shrunk = time.perf_counter()
    messages = wording.messages([pixels], body.question or "" if form is None else form.prompt)
    read = functools.partial(service.llm.requests.read, messages, files=False)
    return await asyncio.to_thread(read), opened - begin, shrunk - opened


# -- the body --------------------------------------------------------------------------------------


async def _read(request: Request) -> AnalyzeRequest:
    kind = request.headers.get("content-type", "")
    is_form = kind.lower().startswith("multipart/")
    fields = await _form_fields(request) if is_form else await _json(request)
    try:
        # In a form all values are texts.
        return AnalyzeRequest.model_validate(fields, strict=not is_form)
    except ValidationError as error:
        located = [{**e, "loc": ("body", *e["loc"])} for e in error.errors()]
        raise RequestValidationError(located, body=fields) from None


async def _json(request: Request) -> Any:
    try:
        return json.loads(await request.body())
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not valid JSON") from None


async def _form_fields(request: Request) -> dict[str, Any]:
    limit = request.app.state.service.options.max_body_bytes
    try:
        async with request.form(max_files=1, max_fields=16, max_part_size=limit) as form:
            items = form.multi_items()
            fields = {
                name: await value.read() if isinstance(value, UploadFile) else value
                for name, value in items
            }
    except HTTPException as error:
        raise ApiError(400, f"the form cannot be read: {error.detail}") from None
    except ValueError as error:
        raise ApiError(400, f"the form cannot be read: {type(error).__name__}") from None
    if len(fields) != len(items):
        raise ApiError(400, "the form has two values for one field")
    return fields


# -- answers ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Answer:
    """The JSON of an answer, when it is complete."""

    model: str
    prompt: Conversation
    form: Form | None
    begin: float
    open_time: float
    shrink_time: float

    def of(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        (sample,) = outputs[0].outputs
        timings = Timings.of(
            outputs[0].metrics,
            open_time=self.open_time,
            shrink_time=self.shrink_time,
            total=time.perf_counter() - self.begin,
        )
        text, form, plan = sample.text, self.form, self.prompt.images[0].plan
        side = plan.patch_size
        return {
            "model": self.model,
            "fields": {"answer": text.strip()} if form is None else form.read(text),
            "finish_reason": finish_name(sample.finish_reason),
            "timings": {stage: getattr(timings, stage) for stage in _STAGES},
            "slices": {
                "grid": plan.grid,
                "sizes": [(width * side, height * side) for height, width in plan.sizes],
            },
            "usage": Usage.of(outputs).as_openai(),
        }


class _Events:
    """An answer in text as events: its pieces, then all that the answer has when it is not streamed."""

    def __init__(self, answer: _Answer) -> None:
        self._answer = answer

    def begin(self) -> str:
        return ""

    def piece(self, piece: Piece) -> str:
        return data(json.dumps({"text": piece.text})) if piece.text else ""

    def end(self, outputs: list[RequestOutput]) -> str:
        return data(json.dumps(self._answer.of(outputs))) + data("[DONE]")

    def error(self, error: ApiError) -> str:
        return data(json.dumps(error.body(FORM_PATH)))
