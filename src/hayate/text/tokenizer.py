"""The tokenizer of a checkpoint folder, and the sampling defaults its publisher recommends.

`tokenizer.json` is the truth and is read by the `tokenizers` library. The files beside it only add
what it leaves out: the names of the special tokens, tokens added later, and whether prompts begin
with BOS.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from hayate.errors import ModelError, UsageError
from hayate.sampling_params import SamplingParams


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, empty when there is no such file; ModelError when it is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"cannot read {path}: {error}; download the file again") from error
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not valid JSON ({error}); download the file again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def _content(token: object) -> str | None:
    """The text of a token written either as a string or as an object with `content`; else None."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def read_special_tokens(folder: Path) -> dict[str, str]:
    """Named special tokens, such as `{"bos_token": "<s>"}`.

    tokenizer_config.json wins over the older special_tokens_map.json.
    """
    named: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        for key, token in read_json_object(folder / name).items():
            text = _content(token)
            if key.endswith("_token") and text is not None:
                named[key] = text
    return named


class Tokenizer:
    """Text to token ids and back, for one checkpoint folder.

    Immutable after construction and safe to share between threads.

    Raises:
        ModelError: tokenizer.json is missing or not readable, or a token of tokenizer_config.json
        does not
            get the id written there.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.file = self.folder / "tokenizer.json"
        self.backend = self._open_backend()
        self._config = read_json_object(self.folder / "tokenizer_config.json")
        self.special_tokens: Mapping[str, str] = read_special_tokens(self.folder)
        self._add_tokens()
        self.bos_token = self.special_tokens.get("bos_token")
        self.bos_token_id = self._id_of(self.bos_token)
        eos_token_id = self._id_of(self.special_tokens.get("eos_token"))
        self.eos_token_ids: tuple[int, ...] = () if eos_token_id is None else (eos_token_id,)
        self.special_ids = frozenset(
            token_id
            for token_id, token in self.backend.get_added_tokens_decoder().items()
            if token.special
        )
        self.vocab_size: int = self.backend.get_vocab_size(with_added_tokens=True)

    def _open_backend(self) -> tokenizers.Tokenizer:
        if not self.file.is_file():
            raise ModelError(
                f"{self.file} is missing: the tokenizer is read from this file; download it with "
                "the model (a tokenizer.model alone must be converted by its publisher's tools)"
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(self.file))
        except Exception as error:  # the library raises bare Exception for every fault of the file
            raise ModelError(f"{self.file} is not a valid tokenizer: {error}") from error
        backend.no_truncation()
        backend.no_padding()
        return backend

    def _add_tokens(self) -> None:
        """Register the tokens that only the files beside tokenizer.json know; mark special ones."""
        special_texts = list(self.special_tokens.values())
        for key in ("additional_special_tokens", "extra_special_tokens"):
            tokens = self._config.get(key)
            if isinstance(tokens, Mapping):
                tokens = list(tokens.values())
            if isinstance(tokens, list):
                special_texts += [text for text in map(_content, tokens) if text]
        for token_id, entry in self._tokens_added_later():
            text = _content(entry)
            if not text:
                continue
            special = isinstance(entry, Mapping) and entry.get("special") is True
            if special:
                special_texts.append(text)
            if self.backend.token_to_id(text) is None:
                self._add_token(text, entry, special, token_id)
        added = self.backend.get_added_tokens_decoder()
        already_special = {token.content for token in added.values() if token.special}
        self.backend.add_special_tokens(
            [
                text
                for text in dict.fromkeys(special_texts)
                if text not in already_special and self.backend.token_to_id(text) is not None
            ]
        )

    def _add_token(self, text: str, entry: object, special: bool, token_id: int) -> None:
        flags = {
            key: entry[key]
            for key in ("single_word", "lstrip", "rstrip", "normalized")
            if isinstance(entry, Mapping) and isinstance(entry.get(key), bool)
        }
        add = self.backend.add_special_tokens if special else self.backend.add_tokens
        add([tokenizers.AddedToken(text, special=special, **flags)])
        actual_id = self.backend.token_to_id(text)
        if actual_id != token_id:
            raise ModelError(
                f"{self.folder}: the added token {text!r} should have id {token_id}, but the "
                f"vocabulary of tokenizer.json gives it {actual_id}; the tokenizer's files do not "
                "belong together, download them again"
            )

    def _tokens_added_later(self) -> list[tuple[int, object]]:
        """(id, token) in order of id; tokenizer_config.json wins over added_tokens.json."""
        found: dict[int, object] = {}
        for text, token_id in read_json_object(self.folder / "added_tokens.json").items():
            if isinstance(token_id, int):
                found[token_id] = text
        decoder = self._config.get("added_tokens_decoder")
        for key, token in decoder.items() if isinstance(decoder, Mapping) else ():
            if key.isdecimal():
                found[int(key)] = token
        return sorted(found.items(), key=lambda item: item[0])

    def _id_of(self, text: str | None) -> int | None:
        return None if text is None else self.backend.token_to_id(text)

    @cached_property
    def _prepends_bos(self) -> bool:
        """tokenizer_config.json asks for BOS, and tokenizer.json does not add it by itself."""
        if self._config.get("add_bos_token") is not True or self.bos_token_id is None:
            return False
        return self.bos_token_id not in self.backend.encode("a").ids

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; special tokens written out in it become their ids.

        With `add_special_tokens`, the tokens the model expects around a prompt (BOS, usually) are
        added; a prompt that already begins with BOS does not get a second one. Text rendered from a
        chat template already has all of them: encode it with `add_special_tokens=False`.

        Raises:
            UsageError: `text` has a lone surrogate, which no UTF-8 text contains.
        """
        _check_unicode(text)
        ids: list[int] = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        bos = self.bos_token_id
        if add_special_tokens and bos is not None:
            if self._prepends_bos:
                ids = [bos, *ids]
            if ids[:2] == [bos, bos] and self.bos_token and text.startswith(self.bos_token):
                ids = ids[1:]
        return ids

    @cached_property
    def special_texts(self) -> tuple[str, ...]:
        """The special tokens as they are written, the longest first."""
        texts = (self.backend.id_to_token(token_id) for token_id in self.special_ids)
        return tuple(sorted(filter(None, texts), key=lambda text: (-len(text), text)))

    @cached_property
    def _text_backend(self) -> tokenizers.Tokenizer:
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        backend.encode_special_tokens = True
        return backend

    def encode_as_text(self, text: str) -> list[int]:
        """Token ids of `text` and nothing around it; a special token written out in it stays ordinary text.

        Raises:
            UsageError: as `encode`.
        """
        _check_unicode(text)
        ids: list[int] = self._text_backend.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`; ids outside the vocabulary (padding of the embedding) give none."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str | None:
        """The token as the vocabulary writes it (not decoded); None for an id outside it."""
        return self.backend.id_to_token(token_id)


def _check_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(
            f"the text is not valid Unicode at character {error.start}: {error.reason}; "
            "give it as UTF-8"
        ) from error


@dataclass(frozen=True)
class GenerationDefaults:
    """What generation_config.json recommends; None where it is silent."""

    eos_token_ids: tuple[int, ...] = ()
    do_sample: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    @classmethod
    def from_folder(
        cls, folder: str | Path, config_eos: Sequence[int] | int | None = ()
    ) -> GenerationDefaults:
        """Read `folder`/generation_config.json, which may be absent.

        `config_eos`: the eos_token_id of config.json. The end tokens are its ids, then those only
        generation_config.json has. Lengths (max_new_tokens and the like) are not read: how much to
        generate is the request's decision.

        Raises:
            ModelError: a value is of the wrong type or outside its range.
        """
        file = Path(folder) / "generation_config.json"
        values = read_json_object(file)
        do_sample = values.get("do_sample")
        if do_sample is not None and not isinstance(do_sample, bool):
            raise ModelError(f"{file}: do_sample must be true or false, not {do_sample!r}")
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        recommended: dict[str, Any] = {name: values.get(name) for name in names}
        try:
            checked = SamplingParams(**recommended)
        except UsageError as error:
            raise ModelError(f"{file}: {error}") from error
        eos = [
            *_ids(config_eos, Path(folder) / "config.json"),
            *_ids(values.get("eos_token_id"), file),
        ]
        return cls(
            eos_token_ids=tuple(dict.fromkeys(eos)),
            do_sample=bool(do_sample),
            **{name: getattr(checked, name) for name in names},
        )


def _ids(value: object, file: Path) -> list[int]:
    """`value` (an id, a list of ids, or nothing) as a list."""
    if value is None:
        return []
    ids = []
    for token_id in value if isinstance(value, list | tuple) else [value]:
        if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
            raise ModelError(f"{file}: eos_token_id must be a token id or a list, not {value!r}")
        ids.append(token_id)
    return ids
