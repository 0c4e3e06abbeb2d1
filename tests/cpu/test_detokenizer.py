"""The incremental detokenizer against decoding the whole sequence at once.

HAYATE_TEST_MODEL may name a checkpoint folder; its tokenizer is then tested as well.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from hayate.checkpoint.smollm2 import smollm2_folder
from hayate.text import detokenizer as module
from hayate.text.detokenizer import IncrementalDetokenizer
from hayate.text.tokenizer import Tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog, again and again.",
    "東京の空は青い。東京へ行く人は空を見る。",
    "naïve café 12 🙂🙂 👩‍👩‍👧 ok",
]
SPECIALS = ["<s>", "</s>", "<|user|>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
MARK = "\u2581"


def byte_level() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens([AddedToken("<think> 東", special=False)])  # not in the byte alphabet
    return backend


def sentencepiece(*steps: object) -> Backend:
    """Metaspace BPE with byte fallback; most Japanese and all emoji are not in the vocabulary."""
    backend = Backend(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend(MARK), normalizers.Replace(" ", MARK)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<unk>", *SPECIALS, *BYTES], show_progress=False
    )
    backend.train_from_iterator([CORPUS[0], "東京 12"], trainer)
    plain = json.loads(backend.to_str())
    plain["added_tokens"] = [t for t in plain["added_tokens"] if t["content"] not in BYTES]
    backend = Backend.from_str(json.dumps(plain))
    backend.decoder = decoders.Sequence(list(steps)) if steps else None
    return backend


def llama() -> Backend:
    return sentencepiece(
        decoders.Replace(MARK, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    )


def gemma() -> Backend:
    return sentencepiece(decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse())


def metaspace() -> Backend:
    return sentencepiece(decoders.Metaspace(MARK, "always"))


def metaspace_never() -> Backend:
    return sentencepiece(decoders.Metaspace(MARK, "never"))


def no_decoder() -> Backend:
    return sentencepiece()


def wordpiece() -> Backend:
    return sentencepiece(decoders.WordPiece(MARK, cleanup=True))


def strip_each_token() -> Backend:
    return sentencepiece(decoders.ByteFallback(), decoders.Strip(MARK, 1, 0))


def replace_in_the_whole_text() -> Backend:
    return sentencepiece(
        decoders.ByteFallback(), decoders.Fuse(), decoders.Replace(Regex("[xe]$"), "?")
    )


STREAMED = [byte_level, llama, gemma, metaspace, metaspace_never]
DECODED_WHOLE = [no_decoder, wordpiece, strip_each_token, replace_in_the_whole_text]


@cache
def tokenizer_of(build: Callable[[], Backend], folder: Path) -> Tokenizer:
    folder = folder / build.__name__
    folder.mkdir()
    (folder / "tokenizer.json").write_text(build().to_str(), encoding="utf-8")
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


@st.composite
def streams(draw: st.DrawFn, tokenizer: Tokenizer) -> list[list[int]]:
    """Ids cut into pushes, of real text, any tokens, bytes, special tokens and ids of no token."""
    byte_ids = byte_ids_of(tokenizer)
    text = st.text(alphabet="the fox 東京鬱🙂👩\u200d é\n", max_size=8).map(
        lambda text: tokenizer.encode(text, add_special_tokens=False)
    )
    any_ids = st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=4)
    some_bytes = st.lists(st.sampled_from(byte_ids or [0]), max_size=5)
    special = st.lists(st.sampled_from(sorted(tokenizer.special_ids) or [0]), max_size=2)
    parts = draw(st.lists(st.one_of(text, any_ids, some_bytes, special), max_size=8))
    ids = [token_id for part in parts for token_id in part]
    cuts = sorted(draw(st.lists(st.integers(0, len(ids)), max_size=3)))
    if draw(st.booleans()):
        return [[token_id] for token_id in ids]
    return [ids[a:b] for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]


@cache
def byte_ids_of(tokenizer: Tokenizer) -> list[int]:
    tokens = ((i, tokenizer.token_text(i)) for i in range(tokenizer.vocab_size))
    return [i for i, token in tokens if token and (len(token) == 1 or token in BYTES)]


def check(tokenizer: Tokenizer, pushes: list[list[int]], skip: bool) -> None:
    """The pieces make up the whole text, and none is cut inside a character."""
    detokenizer = IncrementalDetokenizer(tokenizer, skip)
    whole = tokenizer.decode([i for push in pushes for i in push], skip)
    text = ""
    for push in pushes:
        text += detokenizer.push(push)
        # A piece has U+FFFD only where the whole text has it too: never for half a character.
        assert whole.startswith(text)
    assert text + detokenizer.flush() == whole


@pytest.mark.parametrize("build", STREAMED + DECODED_WHOLE)
@pytest.mark.parametrize("skip", [True, False])
def test_pieces_make_up_the_whole_text(
    build: Callable[[], Backend], skip: bool, folder: Path
) -> None:
    tokenizer = tokenizer_of(build, folder)

    @settings(deadline=None, max_examples=80)
    @given(pushes=streams(tokenizer))
    def property_holds(pushes: list[list[int]]) -> None:
        check(tokenizer, pushes, skip)

    property_holds()


@pytest.mark.parametrize("build", [byte_level, llama, gemma])
def test_bytes_that_are_not_utf8(build: Callable[[], Backend], folder: Path) -> None:
    """The edges of UTF-8: overlong forms, surrogates, beyond U+10FFFF, cut characters."""
    tokenizer = tokenizer_of(build, folder)
    by_text = {tokenizer.token_text(i): i for i in range(tokenizer.vocab_size)}
    names = {byte: char for char, byte in module._BYTE_OF.items()}
    ids = [by_text.get(BYTES[b], by_text.get(names[b])) for b in range(256)]
    interesting = [0x41, 0x80, 0x9F, 0xA0, 0xBF, 0xC0, 0xC2, 0xE0, 0xE3, 0xED, 0xF0, 0xF4, 0xF5]
    for a in interesting:
        for b in interesting:
            for c in interesting:
                check(tokenizer, [[ids[a]], [ids[b]], [ids[c]], [ids[0x80]]], True)


@pytest.mark.parametrize("build", STREAMED)
def test_known_decoders_need_no_whole_decode(build: Callable[[], Backend], folder: Path) -> None:
    detokenizer = IncrementalDetokenizer(tokenizer_of(build, folder))
    assert not isinstance(detokenizer._stream, module._WholeStream)


@pytest.mark.parametrize("build", [byte_level, llama])
def test_a_character_comes_whole_with_its_last_token(
    build: Callable[[], Backend], folder: Path
) -> None:
    tokenizer = tokenizer_of(build, folder)
    ids = tokenizer.encode("x鬱 the", add_special_tokens=False)
    detokenizer = IncrementalDetokenizer(tokenizer)
    pieces = [detokenizer.push([token_id]) for token_id in ids]
    assert len(ids) > len([piece for piece in pieces if piece])  # 鬱 is several tokens
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) == "x鬱 the"
    assert detokenizer.flush() == ""


def test_a_character_that_is_cut_off_comes_with_the_flush(folder: Path) -> None:
    tokenizer = tokenizer_of(byte_level, folder)
    ids = tokenizer.encode("鬱")
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert detokenizer.push(ids[:-1]) == ""
    assert detokenizer.flush() == "\ufffd"


def test_what_is_held_stays_bounded(folder: Path) -> None:
    """10,000 tokens, invalid ones among them: no part of the state grows with the sequence."""
    tokenizer = tokenizer_of(byte_level, folder)
    detokenizer = IncrementalDetokenizer(tokenizer)
    for i in range(10_000):
        detokenizer.push([i % tokenizer.vocab_size])
        assert len(detokenizer._stream._utf8.getstate()[0]) < 4


@pytest.mark.real_model
def test_tokenizer_of_a_real_model() -> None:
    tokenizer = Tokenizer(smollm2_folder())

    @settings(deadline=None, max_examples=300)
    @given(pushes=streams(tokenizer), skip=st.booleans())
    def property_holds(pushes: list[list[int]], skip: bool) -> None:
        check(tokenizer, pushes, skip)

    property_holds()
