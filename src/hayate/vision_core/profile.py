"""Profile: the wording and the fields of analyses, and the sampling options, from a TOML file.

    [sampling]                    # optional; keys of SamplingParams
    temperature = 0.3

    [language.en]                 # one table a language
    system = "You see well."      # optional system message

    [language.en.analyze]         # the form of `analyze`; `simple` is that of `analyze_simple`
    instruction = "Describe the image in JSON:"

    [language.en.analyze.fields]  # in the order of the answer; max_items makes a field a list
    summary = { description = "in one sentence", max_length = 200 }
    objects = { description = "what is there", max_items = 8, max_length = 20 }

Every key is checked: one that is unknown, missing or of the wrong type is a UsageError that names it.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hayate.errors import UsageError
from hayate.sampling_params import SamplingParams
from hayate.vision_core.forms import Field, Form

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found]

DEFAULT_SAMPLING = SamplingParams(
    temperature=0.3, top_p=0.8, repetition_penalty=1.2, max_tokens=512
)
FORMS = ("analyze", "simple")
_FOLDER = Path(__file__).parent / "profiles"
_SAMPLING_KEYS = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
    *("presence_penalty", "frequency_penalty", "max_tokens", "seed"),
)
_MAX_LENGTH, _MAX_ITEMS = 8192, 256  # beyond any context, and what grammars are compiled for


@dataclass(frozen=True)
class Wording:
    """A profile in one language."""

    where: str  # for messages: the profile and its table
    system: str | None
    forms: Mapping[str, Form]

    def form(self, name: str) -> Form:
        """UsageError if the profile has no such form."""
        if name not in self.forms:
            raise UsageError(f"{self.where} has no form {name!r}; add a table {name} to it")
        return self.forms[name]

    def messages(self, images: Sequence[Any], text: str) -> list[dict[str, Any]]:
        """The conversation that shows `images` (whatever `LLM.chat` takes), then says `text`."""
        parts = [{"type": "image", "image": image} for image in images]
        user = {"role": "user", "content": [*parts, {"type": "text", "text": text}]}
        return [user] if self.system is None else [{"role": "system", "content": self.system}, user]


@dataclass(frozen=True)
class Profile:
    """See above. `wordings` by language, in the order of the file."""

    name: str
    sampling: SamplingParams
    wordings: Mapping[str, Wording]

    def wording(self, language: str | None = None) -> Wording:
        """In `language`; default: the first of the file. UsageError for one it does not have."""
        if language is None:
            return next(iter(self.wordings.values()))
        if language not in self.wordings:
            raise UsageError(
                f"profile {self.name} has no language {language!r}; it has {', '.join(self.wordings)}"
            )
        return self.wordings[language]


def load_profile(name: str | Path = "default") -> Profile:
    """A built-in profile by name, or one from a TOML file. UsageError for what is wrong with it."""
    built_in = {path.stem: path for path in sorted(_FOLDER.glob("*.toml"))}
    path = built_in.get(str(name), Path(name).expanduser())
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UsageError(
            f"--profile {name}: {error.strerror or error}; give a TOML file or one of {', '.join(built_in)}"
        ) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--profile {name} is not UTF-8 at byte {error.start}") from error
    try:
        fields = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"--profile {name} is not TOML: {error}") from error
    return _profile(str(name), _Table(f"profile {name}", "", fields))


class _Table:
    """A table of the file, whose values are taken one by one; what is left is unknown."""

    def __init__(self, file: str, path: str, values: dict[str, Any]) -> None:
        self.file = file
        self.path = path
        self.values = dict(values)

    def where(self, key: str) -> str:
        return f"{self.file}: {self.path}{key}"

    def take(self, key: str, kind: type, expected: str, *, required: bool = True) -> Any:
        """The value of `key`; None where it is missing and need not be there."""
        if key not in self.values:
            if required:
                raise UsageError(f"{self.where(key)} is missing; it must be {expected}")
            return None
        value = self.values.pop(key)
        if not isinstance(value, kind) or isinstance(value, bool) or value in ("", {}):
            raise UsageError(f"{self.where(key)} must be {expected}; it is {value!r}")
        return value

    def text(self, key: str, *, required: bool = True) -> Any:
        return self.take(key, str, "a text that is not empty", required=required)

    def number(self, key: str, most: int, *, required: bool = True) -> Any:
        """An integer from 1 to `most`."""
        expected = f"an integer from 1 to {most}"
        value = self.take(key, int, expected, required=required)
        if value is not None and not 1 <= value <= most:
            raise UsageError(f"{self.where(key)} must be {expected}; it is {value}")
        return value

    def table(self, key: str, *, required: bool = True) -> _Table | None:
        values = self.take(key, dict, "a table that is not empty", required=required)
        return None if values is None else _Table(self.file, f"{self.path}{key}.", values)

    def tables(self) -> dict[str, _Table]:
        """All that is left, each of which must be a table."""
        result = {key: self.table(key) for key in list(self.values)}
        return {key: table for key, table in result.items() if table is not None}

    def end(self, known: Sequence[str]) -> None:
        """UsageError if a value was not taken."""
        for key in self.values:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"; is {near[0]} meant?" if near else f"; it may be {', '.join(known)}"
            raise UsageError(f"{self.where(key)} is unknown{hint}")


def _profile(name: str, file: _Table) -> Profile:
    sampling = _sampling(file.table("sampling", required=False))
    languages = file.table("language")
    file.end(("sampling", "language"))
    assert languages is not None
    wordings = {language: _wording(table) for language, table in languages.tables().items()}
    return Profile(name, sampling, wordings)


def _sampling(table: _Table | None) -> SamplingParams:
    if table is None:
        return DEFAULT_SAMPLING
    changes = {key: table.values.pop(key) for key in _SAMPLING_KEYS if key in table.values}
    table.end(_SAMPLING_KEYS)
    try:
        return replace(DEFAULT_SAMPLING, **changes)
    except UsageError as error:
        raise UsageError(f"{table.file}: {table.path}{error}") from error


def _wording(table: _Table) -> Wording:
    system = table.text("system", required=False)
    found = {name: table.table(name, required=False) for name in FORMS}
    table.end(("system", *FORMS))
    forms = {name: _form(form) for name, form in found.items() if form is not None}
    where = f"{table.file}: {table.path.rstrip('.')}"
    if not forms:
        raise UsageError(f"{where} has no form; add a table {' or '.join(FORMS)}")
    return Wording(where, system, forms)


def _form(table: _Table) -> Form:
    instruction, fields = table.text("instruction"), table.table("fields")
    table.end(("instruction", "fields"))
    assert fields is not None
    return Form(instruction, tuple(_field(name, f) for name, f in fields.tables().items()))


def _field(name: str, table: _Table) -> Field:
    field = Field(
        name,
        table.text("description"),
        table.number("max_length", _MAX_LENGTH),
        table.number("max_items", _MAX_ITEMS, required=False),
    )
    table.end(("description", "max_length", "max_items"))
    return field
