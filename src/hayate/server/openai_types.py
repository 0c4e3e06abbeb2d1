"""The bodies of OpenAI's endpoints. A field that is not declared here is refused by name.

`Refused` marks fields of OpenAI's that this server does not implement: null, their default, is
accepted. "No effect" marks fields that cannot change an answer.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from hayate.sampling_params import SamplingParams, StructuredOutput
from hayate.server.errors import ApiError

Refused: TypeAlias = None
_T = TypeVar("_T")
MAX_ITEMS = 4096  # of lists in a body: messages, parts of a message, prompts
_MAX_TOKEN_IDS = 2**20
_MAX_FIELDS = 256  # of an object; each that is wrong costs a complaint
MAX_TOP_LOGPROBS = 20
# Names in chat_template_kwargs that mean something else where the template's variables are handed on.
_NO_VARIABLES = {
    "messages", "tools", "add_generation_prompt", "self", "tokenizer", "template", "vision", "max_len",
    "max_slices", "files", "plans", "use_image_id", "num_queries",
}  # fmt: skip
_DEFAULT_COMPLETION_TOKENS = 16  # as OpenAI has it


class Body(BaseModel):
    """Strict: "1" is no number, and nothing is ignored."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _check_size(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > _MAX_FIELDS:
            raise ValueError(f"an object has {len(value)} fields, more than {_MAX_FIELDS}")
        return value


def _few(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > MAX_ITEMS:
        raise ValueError(f"it has {len(value)} entries, more than {MAX_ITEMS}")
    return value


def _checked(value: _T) -> _T:
    """`value`, which must have a form in UTF-8 and JSON: no lone surrogate, no NaN."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise ValueError("it is not valid Unicode: a surrogate stands alone") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return value


Text = Annotated[str, AfterValidator(_checked)]  # where no tokenizer will check it
JsonObject = Annotated[dict[str, Any], AfterValidator(_checked)]
# One wrong item is enough: a complaint about each of 300,000 would take seconds.
Items: TypeAlias = Annotated[list[_T], Field(max_length=MAX_ITEMS, fail_fast=True)]
TokenIds = Annotated[list[int], Field(max_length=_MAX_TOKEN_IDS, fail_fast=True)]
Entries: TypeAlias = Annotated[dict[str, _T], BeforeValidator(_few)]


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # no effect: padding is never added


class StructuredOutputs(Body):
    """Of what form the answer must be, beyond what response_format offers; exactly one of these."""

    json_schema: JsonObject | None = Field(None, alias="json")
    regex: str | None = None
    choice: Items[str] | None = None
    grammar: str | None = None  # llguidance's dialect of Lark

    def structured(self) -> StructuredOutput:
        given = {name: value for name, value in self if value is not None}
        if len(given) != 1:
            raise ApiError(
                400,
                "structured_outputs needs exactly one of json, regex, choice and grammar",
                param="structured_outputs",
            )
        ((name, value),) = given.items()
        make: Any = getattr(StructuredOutput, name)
        result: StructuredOutput = make(value)
        return result


class Sampling(Body):
    """What all of OpenAI's text endpoints have in common, and this server's own options."""

    model: str | None = None  # there is one model: it need not be named
    frequency_penalty: float | None = None
    logit_bias: Entries[float] | None = None
    n: int | None = None
    presence_penalty: float | None = None
    seed: int | None = None
    stop: Text | Items[Text] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    user: str | None = None  # no effect
    # Not OpenAI's:
    ignore_eos: bool | None = None
    min_p: float | None = None
    min_tokens: int | None = None
    repetition_penalty: float | None = None
    skip_special_tokens: bool | None = None
    stop_token_ids: Items[int] | None = None
    structured_outputs: StructuredOutputs | None = None
    top_k: int | None = None

    @model_validator(mode="after")
    def _check(self) -> Sampling:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def params(
        self,
        *,
        max_tokens: int | None,
        logprobs: int | None,
        structured: StructuredOutput | None = None,
        **changes: Any,
    ) -> SamplingParams:
        """The engine's options. UsageError for values outside their ranges."""
        own = self.structured_outputs
        if structured is not None and own is not None:
            raise ApiError(
                400,
                "structured_outputs cannot go with response_format, or with a tool call that is required",
                param="structured_outputs",
            )
        names = (
            "frequency_penalty", "logit_bias", "n", "presence_penalty", "seed", "stop", "temperature", "top_p",
            "ignore_eos", "min_p", "min_tokens", "repetition_penalty", "skip_special_tokens", "stop_token_ids",
            "top_k",
        )  # fmt: skip
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return SamplingParams(
            **{**given, **changes},
            max_tokens=max_tokens,
            logprobs=logprobs,
            structured=own.structured() if own is not None else structured,
        )


# -- /v1/completions -------------------------------------------------------------------------------


class CompletionRequest(Sampling):
    prompt: str | TokenIds | Items[str] | Items[TokenIds]
    best_of: int | None = None  # only 1, or n: nothing is ranked
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    max_tokens: int | None = None
    suffix: Refused = None

    @model_validator(mode="after")
    def _check_completion(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError(
                "best_of is implemented only where it equals n: samples are not ranked"
            )
        if self.prompt == []:
            raise ValueError("prompt is an empty list")
        if self.echo and self.logprobs is not None:
            raise ValueError(
                "echo with logprobs is not implemented: prompts have no log-probabilities"
            )
        return self

    def prompts(self) -> list[str | list[int]]:
        prompt: Any = self.prompt
        is_one = isinstance(prompt, str) or (prompt and isinstance(prompt[0], int))
        return [prompt] if is_one else prompt

    def sampling(self) -> SamplingParams:
        tokens = _DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens
        return self.params(max_tokens=tokens, logprobs=self.logprobs)


# -- /v1/chat/completions --------------------------------------------------------------------------


class TextPart(Body):
    type: Literal["text"]
    text: str


class ImageUrl(Body):
    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(Body):
    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]
Content = str | Items[Part]


class FunctionCall(Body):
    name: str
    arguments: str  # JSON


class ToolCall(Body):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class InstructionMessage(Body):
    role: Literal["system", "developer"]
    content: Content
    name: Refused = None


class UserMessage(Body):
    role: Literal["user"]
    content: Content
    name: Refused = None


class AssistantMessage(Body):
    role: Literal["assistant"]
    content: Content | None = None
    tool_calls: Items[ToolCall] | None = None
    name: Refused = None
    audio: Refused = None
    function_call: Refused = None
    # What answers have, so that they can be sent back as they came.
    refusal: Refused = None
    annotations: list[Any] | None = Field(None, max_length=0)


class ToolMessage(Body):
    role: Literal["tool"]
    content: Content
    tool_call_id: str


ChatMessage = Annotated[
    InstructionMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")
]
ChatMessages = Annotated[
    list[ChatMessage], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)
]


class Function(Body):
    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    parameters: JsonObject | None = None  # a JSON schema
    strict: bool | None = None  # arguments are sure to be valid under the schema


class Tool(Body):
    type: Literal["function"]
    function: Function


class FunctionName(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: FunctionName


class JsonSchema(Body):
    name: str | None = None  # no effect, nor has the description
    description: str | None = None
    schema_: JsonObject = Field(default_factory=lambda: {"type": "object"}, alias="schema")
    strict: bool | None = None  # no effect: the answer is always valid


class TextFormat(Body):
    type: Literal["text"]


class JsonObjectFormat(Body):
    type: Literal["json_object"]


class JsonSchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")
]


def structured_of(
    format: TextFormat | JsonObjectFormat | JsonSchemaFormat | None,
) -> StructuredOutput | None:
    """What a response_format asks for."""
    if isinstance(format, JsonSchemaFormat):
        return StructuredOutput.json_schema(format.json_schema.schema_)
    return StructuredOutput.json_object() if isinstance(format, JsonObjectFormat) else None


class ChatRequest(Sampling):
    messages: ChatMessages
    logprobs: bool | None = None
    max_completion_tokens: int | None = None
    max_tokens: int | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    tools: Annotated[list[Tool], Field(max_length=128, fail_fast=True)] | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    chat_template_kwargs: JsonObject | None = None  # not OpenAI's: variables of the template
    # No effect:
    metadata: Entries[str] | None = None
    modalities: Items[Literal["text"]] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None
    # Refused:
    audio: Refused = None
    function_call: Refused = None
    functions: Refused = None
    moderation: Refused = None
    prediction: Refused = None
    prompt_cache_options: Refused = None
    reasoning_effort: Refused = None
    verbosity: Refused = None
    web_search_options: Refused = None

    @model_validator(mode="after")
    def _check_chat(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise ValueError(
                "max_tokens is the former name of max_completion_tokens; give one of them"
            )
        if taken := _NO_VARIABLES & set(self.chat_template_kwargs or ()):
            raise ValueError(f"chat_template_kwargs must not have {sorted(taken)[0]}")
        return self

    def sampling(self, structured: StructuredOutput | None, **changes: Any) -> SamplingParams:
        """structured: what the tools ask for, if they do."""
        wanted = structured_of(self.response_format)
        if wanted is not None and structured is not None:
            raise ApiError(
                400,
                "response_format cannot go with a tool call that is required",
                param="response_format",
            )
        tokens = (
            self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        )
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self.params(
            max_tokens=tokens, logprobs=logprobs, structured=wanted or structured, **changes
        )
