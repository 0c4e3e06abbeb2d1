"""The bodies of Anthropic's endpoints; see `openai_types` for what is refused and what has no effect."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from hayate.server.openai_types import MAX_ITEMS, Body, JsonObject, Refused, Text


class CacheControl(Body):
    """No effect: what prompts have in common is found by itself."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class TextBlock(Body):
    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None
    citations: Refused = None


class Base64Source(Body):
    type: Literal["base64"]
    media_type: Literal["image/jpeg", "image/png", "image/gif", "image/webp"]
    data: str

    @property
    def source(self) -> str:
        """As a data: URL."""
        return f"data:{self.media_type};base64,{self.data}"


class UrlSource(Body):
    type: Literal["url"]
    url: str

    @property
    def source(self) -> str:
        return self.url


class ImageBlock(Body):
    type: Literal["image"]
    source: Annotated[Base64Source | UrlSource, Field(discriminator="type")]
    cache_control: CacheControl | None = None


class ToolUseBlock(Body):
    type: Literal["tool_use"]
    id: str
    name: str
    input: JsonObject
    cache_control: CacheControl | None = None
    caller: Refused = None


class ToolResultBlock(Body):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | Annotated[list[TextBlock], Field(max_length=MAX_ITEMS)] = ""
    is_error: bool | None = None  # no effect: templates know results alone
    cache_control: CacheControl | None = None


Block = Annotated[
    TextBlock | ImageBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")
]


class Message(Body):
    role: Literal["user", "assistant"]
    content: str | Annotated[list[Block], Field(max_length=MAX_ITEMS)]


class AnthropicTool(Body):
    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    input_schema: JsonObject
    description: str | None = None
    strict: bool | None = None
    type: Literal["custom"] | None = None
    cache_control: CacheControl | None = None


class ToolChoice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Body):
    type: Literal["disabled"]


class CountRequest(Body):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_ITEMS)]
    model: str | None = None
    system: str | Annotated[list[TextBlock], Field(max_length=MAX_ITEMS)] | None = None
    thinking: Thinking | None = None
    tool_choice: ToolChoice | None = None
    tools: Annotated[list[AnthropicTool], Field(max_length=128)] | None = None
    cache_control: CacheControl | None = None
    output_config: Refused = None


class MessagesRequest(CountRequest):
    max_tokens: int
    metadata: dict[str, str | None] | None = None  # no effect
    service_tier: Literal["auto", "standard_only"] | None = None  # no effect
    stop_sequences: list[Text] | None = None
    stream: bool | None = None
    temperature: float | None = Field(None, ge=0, le=1)
    top_k: int | None = None
    top_p: float | None = None
    container: Refused = None
    diagnostics: Refused = None
    inference_geo: Refused = None
    speed: Refused = None
    user_profile_id: Refused = None
    workspace_id: Refused = None
