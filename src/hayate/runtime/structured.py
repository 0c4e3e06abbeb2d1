"""Structured output: a grammar says which tokens may come next (llguidance, MIT).

A `GrammarCompiler` belongs to a model's tokenizer and keeps what it has compiled. A `Matcher` follows one sample: its
state is a function of the sample's output tokens and nothing else, so preemption and restarts do not touch it, and
`rollback` takes back tokens that were only guessed.

A token is allowed if the bytes of the output with it can still become a text of the grammar. Where the next bytes are
certain, only the token with which the tokenizer itself would write them is allowed (`Matcher.forced` tells it), as the
model has learnt from such tokens. Special tokens are no text: they are allowed where a grammar names them, and the
tokens that end the sequence wherever the text is complete as it stands.

Where nothing can follow, the output is complete (`Matcher.is_complete`) and the sequence should end with "stop" at
once: no step is spent on an end token, and it ends too where the model has none, or `ignore_eos` or `min_tokens`
forbid them.

The output can only break off early: at `max_tokens`, at a stop string, or at a token of `stop_token_ids`.

JSON is compact or spaced as the model likes, but no gap is longer than 64 characters: small models otherwise may
write newlines until `max_tokens`. A schema's own `x-guidance` object (llguidance's) goes before that.

Tokenizers that drop a space at the start of a text (Llama 2's) also do so with the start of the output.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hayate.errors import ModelError, UsageError
from hayate.sampling_params import StructuredOutput
from hayate.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher

_MAX_COMPILED = 128  # grammars kept, the least recently used go
_JSON_OPTIONS = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,64}"}
_END_TEXT = "<|end of structured output|>"  # a token that llguidance has and the model has not
_NAMES = {
    "json_object": "the JSON object",
    "json_schema": "the JSON schema",
    "regex": "the regex",
    "choice": "the list of choices",
    "grammar": "the grammar",
}


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise UsageError(
            f"structured output needs the Python package llguidance, which cannot be imported ({error}): "
            "pip install llguidance; where it has no wheel for this platform, pip builds it with Rust"
        ) from error
    return llguidance


@functools.cache
def _executor() -> LLExecutor:
    return _llguidance().LLExecutor()


class Matcher:
    """Follows the output of one sample through a grammar. Made by `GrammarCompiler.matcher`.

    num_words: int32 words of a mask row; token i is bit i % 32 of word i // 32, 1 where allowed.
    """

    def __init__(
        self, inner: LLMatcher, private_end: int, num_words: int, end_ids: Collection[int]
    ) -> None:
        self.num_words = num_words
        self._inner = inner
        self._private_end = private_end
        self._end_ids = frozenset(i for i in end_ids if i < 32 * num_words)
        self._num_ended = 0  # end tokens accepted; llguidance does not see them

    @property
    def error(self) -> str | None:
        """Why the grammar cannot be followed further (it became too complex), or None."""
        return _first_line(self._inner.get_error()) if self._inner.is_error() else None

    @property
    def is_complete(self) -> bool:
        """The text matches and no text can follow, or the sequence's end token was accepted."""
        return self._num_ended > 0 or (self._inner.is_stopped() and not self._inner.is_error())

    @property
    def is_accepting(self) -> bool:
        """The text so far matches the grammar as it stands; more may be possible."""
        return self._num_ended > 0 or (self._inner.is_accepting() and not self._inner.is_error())

    def fill(self, row: np.ndarray) -> None:
        """Write the mask of the next token to `row`: (num_words,) int32, contiguous.

        All bits are 0 after an error. All are 1 where the output is complete and there is no end
        token: what is drawn there does not count.
        """
        self._inner.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        self._add_ends(row)

    def _add_ends(self, row: np.ndarray) -> None:
        """Turn llguidance's mask into ours: its private end token out, our end tokens in."""
        if self._inner.is_error():
            row[:] = 0
            return
        _set_bit(row, self._private_end, False)
        if self.is_accepting:
            for token_id in self._end_ids:
                _set_bit(row, token_id, True)
            if not self._end_ids and self.is_complete:
                row[:] = -1

    def accept(self, token_id: int) -> None:
        """Append a token to the output.

        Raises:
            ModelError: the grammar does not allow the token; the state is as before.
        """
        if self._num_ended or (token_id in self._end_ids and self._inner.is_accepting()):
            self._num_ended += 1
        elif self._inner.try_consume_tokens([token_id]) != 1:
            cause = f" ({self.error})" if self.error else ""
            raise ModelError(
                f"structured output: the grammar does not allow token {token_id} here{cause}; the tokenizer "
                "may not be able to write what the grammar asks for: make the grammar simpler, or allow more"
            )

    def rollback(self, count: int) -> None:
        """Take back the last `count` tokens accepted."""
        ended = min(count, self._num_ended)
        self._num_ended -= ended
        if count > ended and not self._inner.rollback(count - ended):
            raise AssertionError("more tokens taken back than were accepted")

    def forced(self) -> list[int]:
        """Tokens that must come next, whatever the model says: the mask of each allows it alone."""
        return [] if self.is_complete else list(self._inner.compute_ff_tokens())

    def valid_prefix(self, ids: Sequence[int]) -> int:
        """How many of `ids` could be accepted one after another; an end token is not counted."""
        count = next((i for i, token_id in enumerate(ids) if token_id in self._end_ids), len(ids))
        return 0 if self.is_complete else int(self._inner.validate_tokens(list(ids[:count])))


class GrammarCompiler:
    """Compiles structured outputs against one tokenizer. Any thread may use it.

    vocab_size: the model's, which may be more than the tokenizer has. eos_token_ids: the model's
    end tokens; they are never text.

    Raises:
        UsageError: llguidance is not installed. ModelError: it cannot read this kind of tokenizer.
    """

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Collection[int] = ()
    ) -> None:
        self._llguidance = _llguidance()
        self._private_end, text = _tokenizer_json(tokenizer, eos_token_ids)
        n_vocab = max(vocab_size, self._private_end + 1)
        try:
            self._tokenizer = self._llguidance.LLTokenizer(
                text, n_vocab=n_vocab, eos_token=self._private_end
            )
        except ValueError as error:
            raise ModelError(
                f"{tokenizer.file}: structured output works with byte-level and SentencePiece-like tokenizers "
                f"whose ids have no gaps, this one is different ({error}); use a model with such a tokenizer"
            ) from error
        self.num_words = -(-n_vocab // 32)
        self._compiled = functools.lru_cache(_MAX_COMPILED)(self._compile)

    def matcher(self, structured: StructuredOutput, end_ids: Collection[int]) -> Matcher:
        """A matcher at the start of an output; `end_ids` are the tokens that end its sequence.

        Raises:
            UsageError: the grammar is not valid, uses what llguidance does not support, or allows no text.
        """
        compiled = self._compiled(structured)
        return Matcher(compiled.deep_copy(), self._private_end, self.num_words, end_ids)

    def _compile(self, structured: StructuredOutput) -> LLMatcher:
        inner = self._llguidance.LLMatcher(
            self._tokenizer,
            self._grammar(structured),
            log_level=0,
            limits=self._llguidance.LLParserLimits(verbose_errors=False),
        )
        name = _NAMES[structured.kind]
        if inner.is_error():
            complaint = inner.get_error().strip()
            raise UsageError(
                f"structured: {name} is refused: {complaint}{_places(structured, complaint)}"
            )
        row = np.zeros(self.num_words, np.int32)
        matcher = Matcher(inner.deep_copy(), self._private_end, self.num_words, ())
        matcher.fill(row)
        if matcher.is_complete or not row.any():
            cause = f" ({matcher.error})" if matcher.error else ""
            raise UsageError(
                f"structured: {name} allows no text, or only the empty one, with this model's tokens{cause}; "
                "it must allow some text"
            )
        return inner

    def _grammar(self, structured: StructuredOutput) -> str:
        maker = self._llguidance.LLMatcher
        if structured.kind == "json_object":
            return maker.grammar_from_json_schema({"type": "object"}, defaults=_JSON_OPTIONS)
        if structured.kind == "json_schema":
            schema = json.loads(structured.source)
            own = schema.get("x-guidance")
            # The pattern would win over this option of the schema's own.
            is_set = isinstance(own, dict) and "whitespace_flexible" in own
            return maker.grammar_from_json_schema(schema, defaults={} if is_set else _JSON_OPTIONS)
        if structured.kind == "regex":
            return maker.grammar_from_regex(structured.source)
        if structured.kind == "choice":
            texts = (json.dumps(t, ensure_ascii=False) for t in json.loads(structured.source))
            return maker.grammar_from_lark("start: " + " | ".join(texts))
        return maker.grammar_from_lark(structured.source)


def fill_masks(rows: Sequence[tuple[Matcher, Sequence[int]]], masks: np.ndarray) -> None:
    """The masks of several samples, each with the drafts whose verification it takes part in.

    rows: matchers, all different, of one compiler; each with the tokens guessed to come next. masks: (R, words) int32,
    contiguous, with 1 + len(drafts) rows for each in turn: of the next token, and of the one after each draft. After
    a draft that is not allowed all bits are 1: what is drawn there does not count. Rows without drafts are filled at
    once, in threads.
    """
    together = []
    index = 0
    for matcher, drafts in rows:
        if drafts:
            _fill_drafts(matcher, drafts, masks[index : index + 1 + len(drafts)])
        else:
            together.append((matcher, index))
        index += 1 + len(drafts)
    assert index == masks.shape[0]
    if len(together) > 1:
        _executor().unsafe_compute_mask_ptr(
            [(matcher._inner, i) for matcher, i in together],
            masks.ctypes.data,
            masks.shape[1] * masks.itemsize,
            masks.shape[0],
        )
        for matcher, i in together:
            matcher._add_ends(masks[i])
    else:
        for matcher, i in together:
            matcher.fill(masks[i])


def _fill_drafts(matcher: Matcher, drafts: Sequence[int], masks: np.ndarray) -> None:
    masks[:] = -1
    matcher.fill(masks[0])
    accepted = 0
    for draft, before, after in zip(drafts, masks, masks[1:], strict=False):
        if not before[draft >> 5] >> (draft & 31) & 1:
            break
        matcher.accept(draft)
        accepted += 1
        matcher.fill(after)
    matcher.rollback(accepted)


def _set_bit(row: np.ndarray, token_id: int, value: bool) -> None:
    bits = row.view(np.uint32)
    bit = np.uint32(1 << (token_id & 31))
    if value:
        bits[token_id >> 5] |= bit
    else:
        bits[token_id >> 5] &= ~bit


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]


def _tokenizer_json(tokenizer: Tokenizer, eos_token_ids: Collection[int]) -> tuple[int, str]:
    """tokenizer.json as llguidance is to see it, and the id of an end token added for it alone.

    With an end token that the model does not have, the rule where a sequence may end is ours, and
    no token of the vocabulary has to be taken for one. The model's own are marked as special.
    """
    vocabulary = json.loads(tokenizer.backend.to_str())
    private_end = max(tokenizer.backend.get_vocab().values()) + 1
    added: list[dict[str, Any]] = vocabulary["added_tokens"]
    by_id = {token["id"]: token for token in added}
    ends = {i: text for i in eos_token_ids if (text := tokenizer.token_text(i)) is not None}
    for token_id, text in {**ends, private_end: _END_TEXT}.items():
        if token_id in by_id:
            by_id[token_id]["special"] = True
        else:
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            added.append({"id": token_id, "content": text, "special": True, **flags})
    added.sort(key=lambda token: token["id"])
    decoder = vocabulary["decoder"]
    if decoder is not None and decoder["type"] == "Metaspace":
        # llguidance looks here only for how tokens write bytes, and knows it in this form.
        replace = {"type": "Replace", "pattern": {"String": decoder["replacement"]}, "content": " "}
        steps = [replace, {"type": "ByteFallback"}, {"type": "Fuse"}]
        vocabulary["decoder"] = {"type": "Sequence", "decoders": steps}
    return private_end, json.dumps(vocabulary)


def _places(structured: StructuredOutput, complaint: str) -> str:
    """Where in the schema the keywords are that llguidance's message names in quotes."""
    if structured.kind != "json_schema":
        return ""
    names = set(re.findall(r'"([^"]+)"', complaint))
    found = [path for path, key in _keys(json.loads(structured.source)) if key in names]
    return f" (at {', '.join(found[:5])})" if found else ""


def _keys(value: object, path: str = "#") -> Iterator[tuple[str, str]]:
    """Every key in `value`, with its JSON pointer."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield f"{path}/{key}", key
            yield from _keys(item, f"{path}/{key}")
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _keys(item, f"{path}/{i}")
