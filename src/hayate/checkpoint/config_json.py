"""Strict reading of config.json and its kin: fields by name and type, nothing guessed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, overload

from hayate.errors import ModelError

T = TypeVar("T")
D = TypeVar("D")

_JSON_NAMES = {
    bool: "true or false",
    int: "an integer",
    float: "a finite number",
    str: "a string",
    list: "a list",
    dict: "an object",
}


class ConfigReader:
    """The fields of one JSON object, read by name; remembers which were read.

    A field that is null counts as absent: that is how these files spell "not set". `key in reader`
    tells an explicit null from an absent field. An empty reader is false.
    """

    def __init__(self, fields: Mapping[str, Any], file: str | Path, prefix: str = "") -> None:
        self.file = file
        self._fields = fields
        self._prefix = prefix
        self._read: set[str] = set()

    @classmethod
    def open(cls, file: str | Path) -> ConfigReader:
        """Read `file`.

        Raises ModelError when it is missing, not JSON, not an object, or has a field twice.
        """
        path = Path(file)
        try:
            value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
        except FileNotFoundError as error:
            raise ModelError(
                f"{path} is missing; is {path.parent} the folder of a Hugging Face model?"
            ) from error
        except OSError as error:
            raise ModelError(
                f"{path}: cannot be read ({error.strerror}); check the path and its permissions"
            ) from error
        except (ValueError, RecursionError) as error:
            raise ModelError(f"{path}: not valid JSON ({error}); fetch the file again") from error
        if not isinstance(value, dict):
            raise ModelError(f"{path}: holds {_show(value)}, not an object; fetch the file again")
        return cls(value, path)

    def where(self, key: str) -> str:
        """`key` for a message: the file, and the path of the field within it."""
        return f"{self.file}: {self._prefix}{key}"

    @overload
    def require(self, key: str, kind: type[T]) -> T: ...
    @overload
    def require(self, key: str, kind: tuple[type, ...]) -> Any: ...
    def require(self, key: str, kind: type | tuple[type, ...]) -> Any:
        """The field, of type `kind` or one of several.

        Where float is asked for, an integer will do and comes as a float, and NaN and the
        infinities will not; a boolean is never a number. Raises ModelError when the field is
        absent, null or of another type.
        """
        value = self._take(key)
        if value is None:
            state = "null" if key in self._fields else "missing"
            raise ModelError(f"{self.where(key)} is {state}; it must be {_names(kind)}")
        return self._typed(key, value, kind)

    @overload
    def get(self, key: str, kind: type[T], default: D) -> T | D: ...
    @overload
    def get(self, key: str, kind: tuple[type, ...], default: Any) -> Any: ...
    def get(self, key: str, kind: type | tuple[type, ...], default: Any) -> Any:
        """Like `require`, and `default`, as it is, when the field is absent or null."""
        value = self._take(key)
        return default if value is None else self._typed(key, value, kind)

    def expect(self, key: str, allowed: tuple[Any, ...], default: Any) -> Any:
        """The field (`default` when absent or null), refused by name unless one of `allowed`.

        For fields that change the maths and of which only these values are implemented.
        """
        value = self._take(key)
        if value is None:
            return None if key in self._fields and None in allowed else default
        for candidate in allowed:
            # True == 1 in Python, not in JSON.
            if value == candidate and isinstance(value, bool) == isinstance(candidate, bool):
                return value
        choices = " or ".join(_show(a) for a in allowed if a is not None) or "none"
        raise ModelError(
            f"{self.where(key)} is {_show(value)}; hayate implements {choices}"
            + (", or the field left out" if None in allowed else "")
        )

    def section(self, key: str) -> ConfigReader | None:
        """The object under `key` as a reader of its own; None when absent or null."""
        value = self._take(key)
        if value is None:
            return None
        return ConfigReader(self._typed(key, value, dict), self.file, f"{self._prefix}{key}.")

    def unread(self) -> list[str]:
        """Fields of this object, not of its sections, that nobody asked for, in file order."""
        return [key for key in self._fields if key not in self._read]

    def __contains__(self, key: str) -> bool:
        return key in self._fields

    def __len__(self) -> int:
        return len(self._fields)

    def _take(self, key: str) -> Any:
        self._read.add(key)
        return self._fields.get(key)

    def _typed(self, key: str, value: Any, kind: type | tuple[type, ...]) -> Any:
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if type(value) is int and int not in kinds and float in kinds:  # type(): a bool is an int
            value = float(value) if abs(value) < 2**1023 else math.inf
        if type(value) not in kinds or (type(value) is float and not math.isfinite(value)):
            raise ModelError(f"{self.where(key)} is {_show(value)}; it must be {_names(kind)}")
        return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for key, value in pairs:
        if key in fields:
            raise ValueError(f"{_show(key)} stands there twice")
        fields[key] = value
    return fields


def _names(kind: type | tuple[type, ...]) -> str:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return " or ".join(_JSON_NAMES[k] for k in kinds)


def _show(value: Any) -> str:
    """`value` as JSON spells it, in ASCII, cut after 120 characters."""
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."
