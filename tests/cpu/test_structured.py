"""Structured output: masks against enumerated languages, outputs against json and re, errors by name."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from hayate.checkpoint.smollm2 import smollm2_folder
from hayate.errors import ModelError, UsageError
from hayate.runtime.sampler import Sampler
from hayate.runtime.sampling_row import SamplingRow
from hayate.runtime.structured import GrammarCompiler, Matcher, fill_masks
from hayate.sampling_params import SamplingParams, StructuredOutput
from hayate.text.tokenizer import GenerationDefaults, Tokenizer

CORPUS = [
    '{"name": "Ada", "age": 36, "tags": ["a", "b"], "ok": true}',
    "yes no hello help 日本 😀 12",
]
PADDING = 40  # ids of the model that no token has
MARK = "\u2581"


# The byte-level alphabet (GPT-2, 2019): its characters, in the order of the bytes they stand for.
_KEPT = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_MOVED = [byte for byte in range(256) if byte not in _KEPT]
ALPHABET = {chr(b): b for b in _KEPT} | {chr(256 + i): b for i, b in enumerate(_MOVED)}


def byte_level() -> Backend:
    """No special token at all."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS * 5, trainer)
    return backend


def sentencepiece(decoder: object) -> Backend:
    """BPE with byte fallback, as Llama 2 has it."""
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    backend = Backend(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Replace(" ", MARK)])
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<unk>", "</s>", *names], show_progress=False
    )
    backend.train_from_iterator(CORPUS * 5, trainer)
    plain = json.loads(backend.to_str())
    plain["added_tokens"] = [t for t in plain["added_tokens"] if t["content"] not in names]
    backend = Backend.from_str(json.dumps(plain))
    backend.decoder = decoder
    return backend


def llama() -> Backend:
    steps = [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    return sentencepiece(decoders.Sequence(steps))


def metaspace() -> Backend:
    return sentencepiece(decoders.Metaspace(MARK, "never"))


def wordpiece() -> Backend:
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    backend.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(special_tokens=["[UNK]"], show_progress=False)
    )
    return backend


def write(backend: Backend, folder: Any) -> Tokenizer:
    (folder / "tokenizer.json").write_text(backend.to_str(), encoding="utf-8")
    return Tokenizer(folder)


class World:
    """A tokenizer, its compiler, and the bytes of every token, found without llguidance."""

    def __init__(self, tokenizer: Tokenizer, end_ids: tuple[int, ...]) -> None:
        self.tokenizer = tokenizer
        self.end_ids = end_ids
        self.vocab_size = tokenizer.vocab_size + PADDING
        self.compiler = GrammarCompiler(tokenizer, self.vocab_size, end_ids)
        byte_level = "ByteLevel" in str(tokenizer.backend.decoder)
        self.bytes = [self._bytes(i, byte_level) for i in range(tokenizer.vocab_size)]

    def _bytes(self, token_id: int, byte_level: bool) -> bytes | None:
        """None for a special token."""
        text = self.tokenizer.token_text(token_id)
        assert text is not None
        if token_id in self.tokenizer.special_ids:
            return None
        if byte_level:
            return bytes(ALPHABET[char] for char in text)
        if match := re.fullmatch("<0x(..)>", text):
            return bytes.fromhex(match[1])
        return text.replace(MARK, " ").encode()

    def matcher(self, structured: StructuredOutput) -> Matcher:
        return self.compiler.matcher(structured, self.end_ids)

    def text(self, ids: list[int]) -> bytes:
        return b"".join(self.bytes[i] or b"" for i in ids if i not in self.end_ids)


@cache
def world_of(build: Callable[[], Backend]) -> World:
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        tokenizer = write(build(), Path(folder))
    end = tokenizer.backend.token_to_id("</s>")
    return World(tokenizer, () if end is None else (end,))


@cache
def smollm2() -> World:
    assert (smollm2_folder() / "config.json").is_file(), "run `hayate pull smollm2-135m` first"
    return World(Tokenizer(smollm2_folder()), (2,))


WORLDS = [
    pytest.param(lambda: world_of(byte_level), id="byte-level"),
    pytest.param(lambda: world_of(llama), id="llama"),
    pytest.param(lambda: world_of(metaspace), id="metaspace"),
    pytest.param(smollm2, id="smollm2", marks=pytest.mark.real_model),
]


def ids_of(row: np.ndarray) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist())


def allowed(matcher: Matcher) -> set[int]:
    row = np.full(matcher.num_words, 0x55555555, np.int32)
    matcher.fill(row)
    return ids_of(row)


# Finite languages: what is enumerated on the right is the truth for what is written on the left.
LANGUAGES = {
    "choice": (
        StructuredOutput.choice(["yes", "no", "no thanks", 'a "quoted"\\\n', "日本 😀", " hello"]),
        ["yes", "no", "no thanks", 'a "quoted"\\\n', "日本 😀", " hello"],
    ),
    "common start": (
        StructuredOutput.choice(["hello", "help", "helper"]),
        ["hello", "help", "helper"],
    ),
    "regex": (
        StructuredOutput.regex("(hel|12 )?[ab]{1,3}(c|日)[0-9]"),
        [
            f"{start}{''.join(middle)}{char}{digit}"
            for start in ("", "hel", "12 ")
            for n in (1, 2, 3)
            for middle in product("ab", repeat=n)
            for char in "c日"
            for digit in "0123456789"
        ],
    ),
    "schema": (
        StructuredOutput.json_schema(
            {
                "type": "object",
                "properties": {"ok": {"type": "boolean"}, "n": {"enum": [1, None, "é"]}},
                "required": ["ok", "n"],
                "additionalProperties": False,
                "x-guidance": {"whitespace_flexible": False},
            }
        ),
        [f'{{"ok":{ok},"n":{n}}}' for ok in ("true", "false") for n in ("1", "null", '"é"')],
    ),
    "grammar": (
        StructuredOutput.grammar(
            'start: pair ("+" pair)?\npair: "x" | "hello " DIGIT\nDIGIT: /[01]/'
        ),
        [
            *(pairs := ["x", "hello 0", "hello 1"]),
            *(f"{a}+{b}" for a, b in product(pairs, repeat=2)),
        ],
    ),
}


@pytest.mark.parametrize("make_world", WORLDS)
@pytest.mark.parametrize("language", LANGUAGES)
def test_masks_against_enumeration(make_world: Callable[[], World], language: str) -> None:
    """Walk at random; at every step compare with all tokens of the vocabulary.

    Where only one byte can follow, llguidance may insist on the token that the tokenizer would
    write; everywhere else exactly the tokens are allowed with which a text of the language begins.
    """
    world = make_world()
    structured, texts = LANGUAGES[language]
    complete = {text.encode() for text in texts}
    prefixes = {text[:end] for text in complete for end in range(len(text) + 1)}
    rng = np.random.default_rng(0)
    num_exact = 0
    for _ in range(12):
        matcher, prefix, ended = world.matcher(structured), b"", False
        while not matcher.is_complete:
            expected = {
                i for i, token in enumerate(world.bytes) if token and prefix + token in prefixes
            }
            found = allowed(matcher)
            ends = set(world.end_ids) if prefix in complete else set()
            assert found & set(world.end_ids) == ends
            found -= ends
            forced = matcher.forced()
            if forced:
                assert found == {forced[0]} <= expected
            else:
                assert found == expected
                num_exact += 1
            token_id = int(rng.choice(sorted(found | ends)))
            matcher.accept(token_id)
            ended = token_id in ends
            prefix += b"" if ended else world.bytes[token_id] or b""
        assert prefix in complete
        if not ended:
            assert allowed(matcher) == set(world.end_ids or range(32 * matcher.num_words))
    assert num_exact > 5  # the comparison above did take place


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {
            "type": "array",
            "items": {"enum": ["a", "b", "é\n", '"']},
            "minItems": 1,
            "maxItems": 3,
        },
        "size": {"anyOf": [{"type": "null"}, {"type": "number", "maximum": 10, "minimum": -10}]},
        "child": {"$ref": "#/$defs/leaf"},
    },
    "required": ["name", "age", "tags", "child"],
    "additionalProperties": False,
    "$defs": {
        "leaf": {
            "type": "object",
            "properties": {"id": {"type": "string", "pattern": "^[a-z]{2}-[0-9]+$"}},
            "required": ["id"],
            "additionalProperties": False,
        }
    },
}


def check_person(text: bytes) -> None:
    """By hand, so that the judge shares nothing with the grammar."""
    value = json.loads(text)
    assert {"name", "age", "tags", "child"} <= value.keys() <= PERSON["properties"].keys()  # type: ignore[attr-defined]
    assert isinstance(value["name"], str) and 1 <= len(value["name"]) <= 12
    assert type(value["age"]) is int and 0 <= value["age"] <= 150
    assert 1 <= len(value["tags"]) <= 3 and set(value["tags"]) <= {"a", "b", "é\n", '"'}
    if (size := value.get("size")) is not None:
        assert isinstance(size, int | float) and -10 <= size <= 10
    assert value["child"].keys() == {"id"}
    assert re.fullmatch("[a-z]{2}-[0-9]+", value["child"]["id"])


def generate(
    world: World, params: SamplingParams, num_rows: int, limit: int
) -> tuple[list[list[int]], list[Matcher]]:
    """A naive loop: logits are noise. Rows are all sampled until each is complete, or `limit`."""
    assert params.structured is not None
    ends = frozenset(world.end_ids)
    matchers = [world.matcher(params.structured) for _ in range(num_rows)]
    resolved = params.resolved(GenerationDefaults())
    rows = [SamplingRow(resolved, i, stop_ids=ends, matcher=m) for i, m in enumerate(matchers)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(limit):
        active = [r for r in rows if r.matcher is not None and not r.matcher.is_complete]
        if not active:
            break
        logits = torch.randn(len(active), world.vocab_size, generator=generator)
        for row, token in zip(active, Sampler().sample(logits, active).to_list(), strict=True):
            row.output_ids.append(token)
            assert row.matcher is not None
            row.matcher.accept(token)
    return [row.output_ids for row in rows], matchers


@pytest.mark.parametrize(
    ("make_world", "temperature"),
    [(lambda: world_of(llama), 0.0), (lambda: world_of(llama), 1e6)]
    + [pytest.param(*w.values, 1.0, id=w.id, marks=w.marks) for w in WORLDS],
)
def test_every_output_is_valid_under_the_schema(
    make_world: Callable[[], World], temperature: float
) -> None:
    world = make_world()
    params = SamplingParams(
        temperature=temperature, structured=StructuredOutput.json_schema(PERSON)
    )
    num_rows = 24 if world.vocab_size < 1000 else 4
    outputs, matchers = generate(world, params, num_rows=num_rows, limit=2000)
    assert all(m.is_complete for m in matchers)
    for ids in outputs:
        check_person(world.text(ids))


@pytest.mark.parametrize("options", [{"repetition_penalty": 1.9}, {"top_k": 3}, {"min_tokens": 30}])
def test_every_output_is_valid_whatever_the_other_options(options: dict[str, Any]) -> None:
    world = world_of(llama)
    params = SamplingParams(
        temperature=1.0,
        logit_bias={20: 50.0, 300: 20.0},
        structured=StructuredOutput.json_schema(PERSON),
        **options,
    )
    outputs, matchers = generate(world, params, num_rows=16, limit=2000)
    assert all(m.is_complete for m in matchers)
    for ids in outputs:
        check_person(world.text(ids))


@pytest.mark.parametrize("make_world", WORLDS)
def test_json_objects_parse_when_complete(make_world: Callable[[], World]) -> None:
    """Closing tokens are made likely: any JSON object may otherwise go on without end."""
    world = make_world()
    closing = {i: 10.0 for i, b in enumerate(world.bytes) if b in (b'"', b"}", b"]", b"0", b'":')}
    params = SamplingParams(
        temperature=1.0, logit_bias=closing, structured=StructuredOutput.json_object()
    )
    num_rows = 32 if world.vocab_size < 1000 else 8
    outputs, matchers = generate(world, params, num_rows=num_rows, limit=400)
    complete = [ids for ids, m in zip(outputs, matchers, strict=True) if m.is_complete]
    assert len(complete) > num_rows // 2
    assert all(type(json.loads(world.text(ids))) is dict for ids in complete)
    assert len({world.text(ids) for ids in complete}) > num_rows // 4


def test_whitespace_in_json_is_bounded() -> None:
    world = world_of(llama)
    space = {i: 40.0 for i, b in enumerate(world.bytes) if b and not b.strip(b" \n\t\r")}
    params = SamplingParams(
        temperature=0,
        logit_bias=space,
        structured=StructuredOutput.json_schema({"const": {"a": [1, 2]}}),
    )
    outputs, matchers = generate(world, params, num_rows=1, limit=2000)
    text = world.text(outputs[0])
    assert matchers[0].is_complete and json.loads(text) == {"a": [1, 2]}
    assert max(map(len, re.findall(rb"\s+", text))) == 64


def test_an_extensible_text_may_end_where_it_matches() -> None:
    world = world_of(llama)
    (end,) = world.end_ids
    structured = StructuredOutput.regex("ab+")
    matcher = world.matcher(structured)
    a, b = (world.bytes.index(char) for char in (b"a", b"b"))
    endless = world.compiler.matcher(structured, ())
    for m in (matcher, endless):
        m.accept(a)
        assert end not in allowed(m) and not m.is_accepting
        m.accept(b)
        assert m.is_accepting and not m.is_complete
    assert end in allowed(matcher) and end not in allowed(endless)
    matcher.accept(end)
    assert matcher.is_complete and matcher.forced() == [] and matcher.valid_prefix([b]) == 0
    matcher.rollback(1)
    assert not matcher.is_complete and allowed(matcher) - allowed(endless) == {end}


def test_end_tokens_are_those_of_the_sequence() -> None:
    """`stop_token_ids` may end a complete text too; ids outside the mask are left out."""
    world = world_of(byte_level)
    x = world.bytes.index(b"x")
    matcher = world.compiler.matcher(StructuredOutput.regex("yes|yes no"), [x, 10**6])
    for token_id in world.tokenizer.encode("yes", add_special_tokens=False):
        assert x not in allowed(matcher)
        matcher.accept(token_id)
    assert x in allowed(matcher)


def test_forced_tokens_are_the_only_ones_allowed() -> None:
    world = world_of(llama)
    matcher = world.matcher(StructuredOutput.regex("no 12 yes no (Ada|Bob)"))
    forced = matcher.forced()
    assert len(forced) > 2 and b"no 12 yes no ".startswith(world.text(forced))
    assert matcher.valid_prefix([*forced, world.end_ids[0]]) == len(forced)
    assert matcher.valid_prefix([forced[0], world.bytes.index(b"h"), forced[1]]) == 1
    for token_id in forced:
        assert allowed(matcher) == {token_id}
        matcher.accept(token_id)
    assert matcher.forced() == [] and len(allowed(matcher)) > 1


def test_a_token_that_is_not_allowed_changes_nothing() -> None:
    world = world_of(byte_level)
    matcher = world.matcher(StructuredOutput.regex("[ab]+c"))
    matcher.accept(world.bytes.index(b"a"))
    before = allowed(matcher)
    wrong = world.bytes.index(b"x")
    assert wrong not in before
    with pytest.raises(ModelError, match=f"token {wrong}"):
        matcher.accept(wrong)
    assert allowed(matcher) == before and matcher.error is None
    matcher.accept(world.bytes.index(b"c"))
    assert matcher.is_complete


SCHEMA = StructuredOutput.json_schema(PERSON)


def replay(world: World, ids: list[int]) -> Matcher:
    matcher = world.matcher(SCHEMA)
    for token_id in ids:
        matcher.accept(token_id)
    return matcher


@settings(deadline=None, max_examples=40)
@given(steps=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 10**6)), max_size=40))
def test_rollback_undoes_accept(steps: list[tuple[int, int]]) -> None:
    """The state is a function of the tokens: after any accepts and rollbacks as after a replay."""
    world = world_of(llama)
    matcher, ids = world.matcher(SCHEMA), []
    for kind, number in steps:
        if kind == 0 and ids:
            count = number % len(ids) + 1
            matcher.rollback(count)
            del ids[-count:]
        elif not (matcher.is_complete and set(ids) & set(world.end_ids)):
            choices = sorted(allowed(matcher))
            ids.append(choices[number % len(choices)])
            matcher.accept(ids[-1])
    fresh = replay(world, ids)
    assert allowed(matcher) == allowed(fresh)
    assert matcher.forced() == fresh.forced()
    assert (matcher.is_complete, matcher.is_accepting) == (fresh.is_complete, fresh.is_accepting)


PICKS = st.lists(st.integers(0, 10**6), max_size=6)


def accept_some(matcher: Matcher, picks: list[int]) -> list[int]:
    """For each number, accept one of the tokens allowed then; returns them."""
    ids = []
    for pick in picks:
        choices = sorted(allowed(matcher))
        ids.append(choices[pick % len(choices)])
        matcher.accept(ids[-1])
    return ids


@settings(deadline=None, max_examples=20)
@given(rows=st.lists(st.tuples(PICKS, PICKS, st.booleans()), min_size=1, max_size=4))
def test_masks_of_drafts(rows: list[tuple[list[int], list[int], bool]]) -> None:
    """As after accepting the drafts; after one that is not allowed anything goes; no state changes."""
    world = world_of(llama)
    pairs, expected, before = [], [], []
    for past, future, has_wrong in rows:
        matcher = world.matcher(SCHEMA)
        ids = accept_some(matcher, past)
        drafts = accept_some(replay(world, ids), future)
        expected += [allowed(replay(world, ids + drafts[:i])) for i in range(len(drafts) + 1)]
        if has_wrong:
            last = world.bytes.index(b"\x07")  # a control character: nowhere in JSON
            drafts += [last, last]
            expected += [set(range(32 * matcher.num_words))] * 2
        pairs.append((matcher, drafts))
        before.append(allowed(matcher))
    masks = np.zeros((len(expected), pairs[0][0].num_words), np.int32)
    fill_masks(pairs, masks)
    assert [ids_of(mask) for mask in masks] == expected
    assert [allowed(matcher) for matcher, _ in pairs] == before


def test_rows_without_structure_are_left_alone() -> None:
    world = world_of(llama)
    params = SamplingParams(temperature=1.0).resolved(GenerationDefaults())
    free = [SamplingRow(params, seed) for seed in range(4)]
    logits = torch.randn(4, world.vocab_size, generator=torch.Generator().manual_seed(1))
    alone = Sampler().sample(logits, free).to_list()
    mixed = list(free)
    for i in (0, 2):
        mixed[i] = SamplingRow(params, i, matcher=world.matcher(StructuredOutput.choice(["no"])))
    tokens = Sampler().sample(logits, mixed).to_list()
    assert (tokens[1], tokens[3]) == (alone[1], alone[3])
    for i in (0, 2):
        assert b"no".startswith(world.bytes[tokens[i]] or b"?")


def test_samples_do_not_share_a_state() -> None:
    world = world_of(llama)
    structured = StructuredOutput.choice(["yes", "no"])
    first, second = world.matcher(structured), world.matcher(structured)
    first.accept(world.bytes.index(b"y"))
    assert allowed(first) != allowed(second) == allowed(world.matcher(structured))


def test_a_model_s_end_token_is_never_text(tmp_path: Any) -> None:
    """Also where tokenizer.json has it as an ordinary word."""
    tokenizer = write(byte_level(), tmp_path)
    plain = GrammarCompiler(tokenizer, tokenizer.vocab_size)
    h = tokenizer.backend.token_to_id("h")
    assert h in allowed(plain.matcher(StructuredOutput.regex("(hi|x)+"), ()))
    ending = GrammarCompiler(tokenizer, tokenizer.vocab_size, [h])
    matcher = ending.matcher(StructuredOutput.regex("(hi|x)+"), [h])
    assert h not in allowed(matcher)
    matcher.accept(tokenizer.backend.token_to_id("x"))
    assert h in allowed(matcher)


@pytest.mark.parametrize(
    ("structured", "words"),
    [
        (StructuredOutput.json_schema({"type": "strin"}), ["JSON schema", "strin"]),
        (
            StructuredOutput.json_schema({"properties": {"a": {"type": "array", "contains": {}}}}),
            ["JSON schema", "contains", "#/properties/a/contains"],
        ),
        (StructuredOutput.json_schema({"$ref": "#/$defs/x"}), ["JSON schema", "/$defs/x"]),
        (StructuredOutput.json_schema({"type": "string", "pattern": "("}), ["unclosed group"]),
        (
            StructuredOutput.json_schema({"type": "string", "minLength": 5, "maxLength": 2}),
            ["minLength", "5", "2"],
        ),
        (StructuredOutput.regex("a(b"), ["the regex", "a(b", "unclosed group"]),
        (StructuredOutput.regex("(?=a)"), ["the regex", "look-around"]),
        (StructuredOutput.regex("[^\\x00-\\x{10FFFF}]"), ["the regex", "no text"]),
        (StructuredOutput.regex("()"), ["the regex", "no text"]),
        (StructuredOutput.grammar("start: thing"), ["the grammar", "thing", "1(8)"]),
        (StructuredOutput.grammar('first: "a"'), ["the grammar", "start"]),
    ],
)
def test_refused_when_compiled(structured: StructuredOutput, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        world_of(llama).matcher(structured)
    assert all(word in str(caught.value) for word in ["structured", *words])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: StructuredOutput.json_schema("[1]"), ["json_schema", "[1]"]),
        (lambda: StructuredOutput.json_schema('{"a": '), ["json_schema", "not valid JSON"]),
        (lambda: StructuredOutput.json_schema({"a": {1, 2}}), ["json_schema", "set"]),
        (lambda: StructuredOutput.json_schema(7), ["json_schema", "7"]),  # type: ignore[arg-type]
        (lambda: StructuredOutput.regex(""), ["regex", "''"]),
        (lambda: StructuredOutput.regex(b"a"), ["regex", "b'a'"]),  # type: ignore[arg-type]
        (lambda: StructuredOutput.regex("a\ud800"), ["regex", "character 1"]),
        (lambda: StructuredOutput.choice("yes"), ["choice", "'yes'"]),
        (lambda: StructuredOutput.choice([]), ["choice", "[]"]),
        (lambda: StructuredOutput.choice(["a", ""]), ["choice", "''"]),
        (lambda: StructuredOutput.choice([1]), ["choice", "1"]),  # type: ignore[list-item]
        (lambda: StructuredOutput.grammar(None), ["grammar", "None"]),  # type: ignore[arg-type]
        (lambda: SamplingParams(structured={"type": "object"}), ["structured", "object"]),  # type: ignore[arg-type]
    ],
)
def test_refused_at_once(make: Callable[[], object], words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        make()
    assert all(word in str(caught.value) for word in words)


def test_other_tokenizers_are_refused_by_name(tmp_path: Any) -> None:
    tokenizer = write(wordpiece(), tmp_path)
    with pytest.raises(ModelError, match=r"tokenizer\.json.*WordPiece"):
        GrammarCompiler(tokenizer, tokenizer.vocab_size)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        sys.modules, "llguidance", None
    )  # what Python does for an import that fails
    world = world_of(llama)
    with pytest.raises(UsageError, match="pip install llguidance"):
        GrammarCompiler(world.tokenizer, world.vocab_size)
