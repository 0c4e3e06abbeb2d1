"""Chat templates: a conversation to the prompt text its model was trained on.

A template is a program that came with the weights, so it runs in Jinja's immutable sandbox: no
attribute that leads to Python's internals, no change to the messages, and a bound on the work it
may do.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from hayate.errors import ModelError, UsageError
from hayate.text.tokenizer import read_json_object, read_special_tokens

MAX_LOOP_STEPS = 500_000  # of all loops in one rendering
MAX_REPEATED_LENGTH = 1_000_000  # of a string or list made with `*`
MAX_EXPONENT = 64

_COUNT_LOOP_STEP = "count_loop_step"

Message = Mapping[str, Any]


class ChatTemplate:
    """A chat template with the special tokens it may name.

    source: the Jinja text. special_tokens: variables such as `bos_token`. file: named in messages.

    Raises:
        ModelError: the template is not valid Jinja.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str] | None = None,
        *,
        tool_use_source: str | None = None,
        file: str | Path = "the chat template",
    ) -> None:
        self._file = file
        self._special_tokens = dict(special_tokens or {})
        self._environment = _Environment()
        self._lock = threading.Lock()  # the environment counts the loop steps of one rendering
        self._template = self._compile(source)
        self._tool_use = None if tool_use_source is None else self._compile(tool_use_source)

    @classmethod
    def from_folder(cls, folder: str | Path) -> ChatTemplate:
        """A checkpoint's template: chat_template.jinja, else that of tokenizer_config.json.

        A list of named templates is accepted: "default" is used, and "tool_use" when tools are
        given.

        Raises:
            ModelError: there is none, or it is not valid.
        """
        folder = Path(folder)
        special_tokens = read_special_tokens(folder)
        file = folder / "chat_template.jinja"
        if file.is_file():
            try:
                source = file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ModelError(f"cannot read {file}: {error}; download it again") from error
            return cls(source, special_tokens, file=file)
        file = folder / "tokenizer_config.json"
        named = _named_templates(read_json_object(file).get("chat_template"), file)
        if "default" not in named:
            raise ModelError(
                f"{folder} has no chat template (chat_template.jinja, or chat_template in "
                "tokenizer_config.json): this is probably a base model; give it a plain prompt, or "
                "put the template of its instruct model into chat_template.jinja"
            )
        return cls(
            named["default"], special_tokens, tool_use_source=named.get("tool_use"), file=file
        )

    def _compile(self, source: str) -> jinja2.Template:
        try:
            return self._environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(
                f"{self._file}: the chat template is not valid Jinja, line {error.lineno}: "
                f"{error.message}"
            ) from error
        except (RecursionError, SyntaxError, MemoryError, OverflowError) as error:
            raise ModelError(
                f"{self._file}: the chat template cannot be compiled: {error}"
            ) from error

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt text of a conversation.

        messages: in order, each `{"role": str, "content": str}`; an assistant message that calls
        tools may leave the content out. add_generation_prompt: end with the header of the
        assistant's turn. tools: JSON schemas of functions. kwargs: further variables of the
        template (`enable_thinking=False`). Encode the result with `add_special_tokens=False`: the
        template writes BOS itself where it is wanted.

        Raises:
            UsageError: a message is malformed, or the template refuses the conversation.
            ModelError: the template fails, or does what the sandbox does not allow.
        """
        _check_messages(messages)
        template = self._tool_use if tools and self._tool_use is not None else self._template
        variables = {
            **self._special_tokens,
            "documents": None,
            **kwargs,
            "messages": messages,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            with self._lock:
                self._environment.loop_steps_left = MAX_LOOP_STEPS
                return template.render(variables)
        except UsageError:
            raise
        except Exception as error:  # a template is a program: it can fail in any way
            reason = str(error) or type(error).__name__
            raise ModelError(f"{self._file}: the chat template failed: {reason}") from error


def _named_templates(value: object, file: Path) -> dict[str, str]:
    """`chat_template` of tokenizer_config.json as name -> source; a single string is "default"."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    entries = value if isinstance(value, list) else [value]
    named = {}
    for entry in entries:
        name = entry.get("name") if isinstance(entry, Mapping) else None
        source = entry.get("template") if isinstance(entry, Mapping) else None
        if not isinstance(name, str) or not isinstance(source, str):
            raise ModelError(
                f"{file}: chat_template must be a string or a list of {{name, template}} objects"
            )
        named[name] = source
    return named


def _check_messages(messages: Sequence[Message]) -> None:
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise UsageError(
            'messages must be a list with at least one {"role": ..., "content": ...} object; '
            f"it is {messages!r:.80}"
        )
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise UsageError(
                f'messages[{i}] must be an object with "role" and "content"; it is {message!r:.80}'
            )
        role = message.get("role")
        if not isinstance(role, str) or not role:
            raise UsageError(
                f'messages[{i}]: "role" must be a string such as "user"; it is {role!r:.80}'
            )
        content = message.get("content")
        if content is None and message.get("tool_calls"):
            continue
        if not isinstance(content, str):
            raise UsageError(f'messages[{i}]: "content" must be a string; it is {content!r:.80}')


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with what chat templates expect to find and bounds on loops and repetition."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag]
        )
        self.loop_steps_left = 0
        self.filters["tojson"] = _to_json
        self.filters[_COUNT_LOOP_STEP] = _count_loop_step
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Parse, and begin the body of every loop with a step of the count."""
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            # A filter is called directly, without the checks the sandbox makes for a function.
            step = nodes.Filter(nodes.Const(None), _COUNT_LOOP_STEP, [], [], None, None)
            loop.body.insert(0, nodes.ExprStmt(step, lineno=loop.lineno))
        return tree

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            if not isinstance(right, int | float) or abs(right) > MAX_EXPONENT:
                raise OverflowError(f"the exponent {right!r} is too large")
        else:
            for sequence, count in ((left, right), (right, left)):
                repeats = isinstance(sequence, str | list | tuple) and isinstance(count, int)
                if repeats and len(sequence) * count > MAX_REPEATED_LENGTH:
                    raise OverflowError(f"it repeats a value {count} times")
        return super().call_binop(context, operator, left, right)


@jinja2.pass_context  # which also keeps Jinja from evaluating it once, when compiling
def _count_loop_step(context: Context, _: None) -> None:
    environment = context.environment
    assert isinstance(environment, _Environment)
    environment.loop_steps_left -= 1
    if environment.loop_steps_left < 0:
        raise OverflowError(f"it loops more than {MAX_LOOP_STEPS} times")


class _GenerationTag(Extension):
    """`{% generation %} ... {% endgeneration %}` marks text for training; here it only groups."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: object) -> NoReturn:
    raise UsageError(f"the chat template refuses the conversation: {message}")


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as training data has it: nothing escaped for HTML, keys in the order given."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
