"""The tokenizer of a folder against transformers on the same folder, and generation_config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from hayate.errors import ModelError, UsageError
from hayate.text.tokenizer import GenerationDefaults, Tokenizer

CORPUS = [
    "The quick brown fox, naïve and 12 years old.",
    "東京の空は青い。東京へ行く。",
    "🙂🙂 👩‍👧 ok\n\tx",
]
TEXTS = ["The fox", "  two  spaces\n", "東京の空 🙂", "<s>The", "a<|user|>b</s>", "", "naïve"]


@pytest.fixture(scope="module")
def backend_json() -> str:
    """A byte-level BPE with <s> = 0, </s> = 1 and no post-processor, as tokenizer.json holds it."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend.to_str()


def with_bos(backend_json: str) -> str:
    backend = Backend.from_str(backend_json)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return backend.to_str()


def folder_of(path: Path, tokenizer_json: str, **config: Any) -> Path:
    (path / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    if config:
        (path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return path


NAMED = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize("adds_bos", [False, True])
def test_agrees_with_transformers(tmp_path: Path, backend_json: str, adds_bos: bool) -> None:
    reference = PreTrainedTokenizerFast(
        tokenizer_object=Backend.from_str(with_bos(backend_json) if adds_bos else backend_json),
        **NAMED,
        additional_special_tokens=["<|user|>"],
    )
    reference.add_tokens([AddedToken("fox", special=False)])
    reference.save_pretrained(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.special_ids == set(reference.all_special_ids)
    assert tokenizer.vocab_size == len(reference)
    assert tokenizer.bos_token == "<s>"
    assert tokenizer.eos_token_ids == (1,)
    for text in TEXTS:
        ids = reference(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.encode(text, add_special_tokens=False) == ids
        if not text.startswith("<s>"):
            assert tokenizer.encode(text) == reference(text)["input_ids"]
        for skip in (True, False):
            assert tokenizer.decode(ids, skip) == reference.decode(ids, skip_special_tokens=skip)
    assert [tokenizer.token_text(i) for i in range(5)] == reference.convert_ids_to_tokens(range(5))


def test_tokens_that_only_the_config_knows(tmp_path: Path, backend_json: str) -> None:
    size = Backend.from_str(backend_json).get_vocab_size()
    folder_of(
        tmp_path,
        backend_json,
        **NAMED,
        added_tokens_decoder={
            "0": {"content": "<s>", "special": True},
            str(size): {"content": "<|im_end|>", "special": True, "normalized": False},
            str(size + 1): {"content": "<think>", "special": False},
        },
    )
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.encode("a<|im_end|><think>")[1:] == [size, size + 1]
    assert tokenizer.special_ids == {0, 1, size}
    assert tokenizer.decode([size, size + 1]) == "<think>"


def test_the_older_added_tokens_file(tmp_path: Path, backend_json: str) -> None:
    size = Backend.from_str(backend_json).get_vocab_size()
    folder_of(tmp_path, backend_json)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<extra_id_0>": size}))
    assert Tokenizer(tmp_path).encode("<extra_id_0>") == [size]


def test_an_added_token_with_another_id_is_refused(tmp_path: Path, backend_json: str) -> None:
    folder_of(tmp_path, backend_json, added_tokens_decoder={"9999": {"content": "<|x|>"}})
    with pytest.raises(ModelError, match=r"<\|x\|>.*9999"):
        Tokenizer(tmp_path)


def test_special_tokens_map_is_read_and_a_named_token_becomes_special(
    tmp_path: Path, backend_json: str
) -> None:
    plain = json.loads(backend_json)
    plain["added_tokens"] = []  # "<s>" and "</s>" are then ordinary entries of the vocabulary
    folder_of(tmp_path, json.dumps(plain))
    assert Tokenizer(tmp_path).special_ids == frozenset()
    named = {"bos_token": {"content": "<s>", "lstrip": False}, "pad_token": "<missing>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(named))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.bos_token == "<s>"
    assert tokenizer.special_ids == {0}
    assert tokenizer.encode("<s>") == [0]


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("asks_for_bos", [False, True])
def test_bos_comes_once(
    tmp_path: Path, backend_json: str, adds_bos: bool, asks_for_bos: bool
) -> None:
    tokenizer_json = with_bos(backend_json) if adds_bos else backend_json
    tokenizer = Tokenizer(folder_of(tmp_path, tokenizer_json, **NAMED, add_bos_token=asks_for_bos))
    plain = tokenizer.encode("The fox", add_special_tokens=False)
    assert 0 not in plain
    expected = [0, *plain] if adds_bos or asks_for_bos else plain
    assert tokenizer.encode("The fox") == expected
    assert tokenizer.encode("<s>The fox") == [0, *plain]
    assert tokenizer.encode("<s>The fox", add_special_tokens=False) == [0, *plain]


def test_truncation_and_padding_of_the_file_are_off(tmp_path: Path, backend_json: str) -> None:
    backend = Backend.from_str(backend_json)
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    tokenizer = Tokenizer(folder_of(tmp_path, backend.to_str()))
    text = "The quick brown fox, naïve"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_ids_of_no_token_give_no_text(tmp_path: Path, backend_json: str) -> None:
    tokenizer = Tokenizer(folder_of(tmp_path, backend_json))
    ids = tokenizer.encode("fox")
    assert tokenizer.decode([10**6, *ids, 151_935]) == "fox"
    assert tokenizer.token_text(10**6) is None


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json is missing"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": 3}'])
def test_a_broken_tokenizer_file_is_named(tmp_path: Path, content: str) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json is not a valid tokenizer"):
        Tokenizer(folder_of(tmp_path, content))


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_a_broken_config_file_is_named(tmp_path: Path, backend_json: str, content: bytes) -> None:
    folder_of(tmp_path, backend_json)
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"tokenizer_config\.json"):
        Tokenizer(tmp_path)


def test_a_lone_surrogate_is_the_users_error(tmp_path: Path, backend_json: str) -> None:
    tokenizer = Tokenizer(folder_of(tmp_path, backend_json))
    with pytest.raises(UsageError, match="not valid Unicode"):
        tokenizer.encode("a\udcff")


def defaults_of(path: Path, config_eos: Any = (), **values: Any) -> GenerationDefaults:
    (path / "generation_config.json").write_text(json.dumps(values))
    return GenerationDefaults.from_folder(path, config_eos)


def test_no_generation_config(tmp_path: Path) -> None:
    assert GenerationDefaults.from_folder(tmp_path, [2]) == GenerationDefaults(eos_token_ids=(2,))


def test_end_tokens_are_those_of_both_files(tmp_path: Path) -> None:
    assert defaults_of(tmp_path, [2], eos_token_id=[7, 2]).eos_token_ids == (2, 7)
    assert defaults_of(tmp_path, 2, eos_token_id=7).eos_token_ids == (2, 7)
    assert defaults_of(tmp_path, None, eos_token_id=None).eos_token_ids == ()


def test_recommendations_are_read(tmp_path: Path) -> None:
    found = defaults_of(
        tmp_path,
        do_sample=True,
        temperature=0.6,
        top_k=20,
        top_p=0.95,
        min_p=None,
        repetition_penalty=1.1,
        max_new_tokens=10,
        transformers_version="4.51.0",
    )
    assert found == GenerationDefaults(
        do_sample=True, temperature=0.6, top_k=20, top_p=0.95, repetition_penalty=1.1
    )


@pytest.mark.parametrize(
    "values",
    [{"temperature": -1}, {"top_p": "high"}, {"do_sample": 1}, {"eos_token_id": ["</s>"]}],
)
def test_a_wrong_recommendation_is_named(tmp_path: Path, values: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=rf"generation_config\.json.*{next(iter(values))}"):
        defaults_of(tmp_path, **values)
