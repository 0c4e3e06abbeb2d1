"""SamplingParams: how one request chooses its tokens and when it stops."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from hayate.errors import UsageError

if TYPE_CHECKING:
    from hayate.text.tokenizer import GenerationDefaults

MAX_LOGPROBS = 100
MAX_STOPS = 64
MAX_STOP_LENGTH = 1024  # characters of one stop string
MAX_LOGIT_BIAS = 100.0  # OpenAI's range; far beyond it a logit would be inf in float32
_MAX_ID_DIGITS = 20  # of a token id written as a string: int() refuses thousands
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class StructuredOutput:
    """What the whole output of a request must match. Make one with the class methods.

    Types are checked here; what only the grammar's compiler can judge (an unsupported keyword, a
    regex that does not parse) is checked when the request is submitted.

    Raises:
        UsageError: the value is of the wrong type, or empty.
    """

    kind: Literal["json_object", "json_schema", "regex", "choice", "grammar"]
    source: str  # the schema or the list of choices as JSON, the regex, the grammar; "" if none

    @classmethod
    def json_object(cls) -> StructuredOutput:
        """Any JSON object."""
        return cls("json_object", "")

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | str) -> StructuredOutput:
        """JSON that is valid under `schema`, a mapping or the text of one."""
        value: object = schema
        if isinstance(schema, str):
            try:
                value = json.loads(schema)
            except (ValueError, RecursionError) as error:
                raise UsageError(f"json_schema is not valid JSON: {error}") from error
        if not isinstance(value, Mapping):
            raise _error("json_schema", value, "a JSON object")
        try:
            source = json.dumps(dict(value), ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise UsageError(f"json_schema cannot be written as JSON: {error}") from error
        return cls("json_schema", source)

    @classmethod
    def regex(cls, pattern: str) -> StructuredOutput:
        r"""Text that `pattern`, in the syntax of Rust's regex crate, matches from start to end.

        There `\d`, `\w` and `\s` are Unicode's; for ASCII digits write [0-9].
        """
        return cls("regex", _text("regex", pattern))

    @classmethod
    def choice(cls, choices: Iterable[str]) -> StructuredOutput:
        """One of `choices`, exactly."""
        if isinstance(choices, str) or not isinstance(choices, Iterable):
            raise _error("choice", choices, "a list of strings")
        texts = [_text("choice", choice) for choice in choices]
        if not texts:
            raise _error("choice", texts, "a list of one string or more")
        return cls("choice", json.dumps(list(dict.fromkeys(texts)), ensure_ascii=False))

    @classmethod
    def grammar(cls, lark: str) -> StructuredOutput:
        """Text that the rule `start` of a grammar in llguidance's dialect of Lark derives."""
        return cls("grammar", _text("grammar", lark))


@dataclass(frozen=True)
class SamplingParams:
    """Sampling options of one request, in the field's usual words.

    None means "as the checkpoint's generation_config.json says", and where that is silent: greedy,
    filters off. The order in which the options act on the logits is written in
    `runtime/sampler.py`.

    Raises:
        UsageError: a value is of the wrong type or outside its range; the message names field and
        value.
    """

    n: int = 1  # samples of the same prompt
    temperature: float | None = None  # 0 = greedy
    top_p: float | None = None  # 1 = off
    top_k: int | None = None  # 0 or -1 = off
    min_p: float | None = None  # 0 = off
    repetition_penalty: float | None = (
        None  # 1 = off; over prompt and output, where images are taken output
    )
    presence_penalty: float = 0.0  # over the output
    frequency_penalty: float = 0.0  # over the output
    logit_bias: dict[int, float] | None = None  # token id -> added to its logit; -100 to 100
    seed: int | None = None  # None = drawn anew
    stop: tuple[str, ...] = ()  # a string or an iterable of up to 64, of up to 1024 characters each
    stop_token_ids: tuple[int, ...] = ()
    max_tokens: int | None = None  # None = until the context is full
    min_tokens: int = 0  # nothing stops the sequence before
    logprobs: int | None = None  # how many of the most likely tokens to report at each position
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    structured: StructuredOutput | None = None  # what the output must match

    def __post_init__(self) -> None:
        self._check_numbers()
        self._set("logit_bias", _logit_bias(self.logit_bias))
        self._set("stop", _stop_strings(self.stop))
        self._set("stop_token_ids", _stop_token_ids(self.stop_token_ids))
        for name in ("ignore_eos", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise _error(name, getattr(self, name), "True or False")
        if not isinstance(self.structured, StructuredOutput | None):
            raise _error("structured", self.structured, "a StructuredOutput or None")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise _error(
                "min_tokens", self.min_tokens, f"at most max_tokens, which is {self.max_tokens}"
            )

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_numbers(self) -> None:
        self._real("temperature", 0.0, math.inf)
        self._real("top_p", 0.0, 1.0, low_open=True)
        self._real("min_p", 0.0, 1.0)
        self._real("repetition_penalty", 0.0, math.inf, low_open=True)
        self._real("presence_penalty", -2.0, 2.0, optional=False)
        self._real("frequency_penalty", -2.0, 2.0, optional=False)
        self._integer("n", 1, optional=False)
        self._integer("top_k", -1)
        self._integer("seed", 0, MAX_SEED)
        self._integer("max_tokens", 1)
        self._integer("min_tokens", 0, optional=False)
        self._integer("logprobs", 0, MAX_LOGPROBS)

    def _real(
        self, name: str, low: float, high: float, *, low_open: bool = False, optional: bool = True
    ) -> None:
        """Check for a finite number in [low, high], or (low, high]; make the field a float."""
        value = getattr(self, name)
        if value is None and optional:
            return
        bounds = f"above {low:g}" if low_open else f"at least {low:g}"
        if math.isfinite(high):
            bounds += f" and at most {high:g}"
        number = _finite(value)
        if number is None or number < low or number > high or (low_open and number == low):
            raise _error(name, value, f"a number {bounds}")
        self._set(name, number)

    def _integer(
        self, name: str, low: int, high: int | None = None, *, optional: bool = True
    ) -> None:
        """Check that the field is an integer in [low, high] and make it an int."""
        value = getattr(self, name)
        if value is None and optional:
            return
        number = _integer(value)
        if number is None or number < low or (high is not None and number > high):
            limit = "" if high is None else f" and at most {high}"
            raise _error(name, value, f"an integer, at least {low}{limit}")
        self._set(name, number)

    def resolved(self, defaults: GenerationDefaults) -> SamplingParams:
        """These options with every None that concerns sampling filled in.

        The checkpoint's recommendation comes first; then temperature 0 when it does not ask for
        sampling (1 when it does), top_p 1, top_k 0, min_p 0, repetition_penalty 1. In the result
        `top_k` is 0 when off. `max_tokens`, `seed` and `logprobs` stay as they are.
        """
        temperature = _first(defaults.temperature, 1.0) if defaults.do_sample else 0.0
        top_k = int(_first(self.top_k, defaults.top_k, 0))
        return replace(
            self,
            temperature=_first(self.temperature, temperature),
            top_p=_first(self.top_p, defaults.top_p, 1.0),
            top_k=max(top_k, 0),
            min_p=_first(self.min_p, defaults.min_p, 0.0),
            repetition_penalty=_first(self.repetition_penalty, defaults.repetition_penalty, 1.0),
        )

    def check_vocabulary(self, vocab_size: int) -> None:
        """UsageError when `logit_bias` or `stop_token_ids` name an id of vocab_size or more."""
        for name, ids in (
            ("logit_bias", self.logit_bias or ()),
            ("stop_token_ids", self.stop_token_ids),
        ):
            for token_id in ids:
                if token_id >= vocab_size:
                    raise _error(
                        name, token_id, f"token ids below the vocabulary size {vocab_size}"
                    )


def _error(name: str, value: object, expected: str) -> UsageError:
    return UsageError(f"{name} must be {expected}; it is {value!r:.200}")


def _text(name: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise _error(name, value, "a string that is not empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _error(name, value, f"valid Unicode; character {error.start} is not") from error
    return value


def _first(*values: Any) -> Any:
    """The first value that is not None."""
    return next(value for value in values if value is not None)


def _finite(value: object) -> float | None:
    """`value` as a float, or None when it is not a finite real number (bool and str are not)."""
    if isinstance(value, bool | str) or not hasattr(value, "__float__"):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _integer(value: object) -> int | None:
    """`value` as an int, or None when it is not an integer (bool is not, 2.0 is not)."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        return None
    return value.__index__()


def _logit_bias(value: object) -> dict[int, float] | None:
    """Keys may be ids written as strings, as JSON objects have them."""
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise _error("logit_bias", value, "a mapping from token id to a number")
    result: dict[int, float] = {}
    for key, bias in value.items():
        written = isinstance(key, str) and key.isdecimal() and len(key) <= _MAX_ID_DIGITS
        token_id = int(key) if written else _integer(key)
        number = _finite(bias)
        if token_id is None or token_id < 0:
            raise _error("logit_bias", key, "a mapping from token ids, 0 or above")
        if number is None or abs(number) > MAX_LOGIT_BIAS:
            bounds = f"from {-MAX_LOGIT_BIAS:g} to {MAX_LOGIT_BIAS:g}"
            raise _error("logit_bias", bias, f"a number {bounds} for token {token_id}")
        result[token_id] = number
    return result


def _stop_strings(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    strings = (value,) if isinstance(value, str) else value
    if not isinstance(strings, Iterable):
        raise _error("stop", value, "a string or a list of strings")
    result = tuple(strings)
    if len(result) > MAX_STOPS:
        raise _error("stop", len(result), f"at most {MAX_STOPS} strings")
    for string in result:
        if not isinstance(string, str) or not string:
            raise _error("stop", string, "a string, or a list of strings, none of them empty")
        if len(string) > MAX_STOP_LENGTH:
            raise _error("stop", string, f"strings of at most {MAX_STOP_LENGTH} characters")
    return result


def _stop_token_ids(value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise _error("stop_token_ids", value, "a list of token ids")
    result = []
    for item in value:
        token_id = _integer(item)
        if token_id is None or token_id < 0:
            raise _error("stop_token_ids", item, "a list of token ids, 0 or above")
        result.append(token_id)
    return tuple(result)
