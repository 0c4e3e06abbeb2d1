"""The strict reader of config.json: what it takes, what it refuses and in which words."""

from __future__ import annotations

from pathlib import Path

import pytest

from hayate.checkpoint.config_json import ConfigReader
from hayate.errors import ModelError


def reader(**fields: object) -> ConfigReader:
    return ConfigReader(fields, "m/config.json")


def written(folder: Path, text: str | bytes) -> Path:
    file = folder / "config.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def test_a_file_is_read(tmp_path: Path) -> None:
    config = ConfigReader.open(written(tmp_path, '{"name": "疾風", "n": 3, "r": {"theta": 1e4}}'))
    assert config.require("name", str) == "疾風"
    assert config.require("n", int) == 3
    section = config.section("r")
    assert section is not None
    assert section.require("theta", float) == 1e4


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ('{"a": 1,}', "not valid JSON"),
        (b'{"a": "\xff"}', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[1, 2]", "holds [1, 2], not an object"),
        ("null", "holds null, not an object"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', '"c" stands there twice'),
    ],
)
def test_what_is_no_json_object_is_refused(
    tmp_path: Path, text: str | bytes, fragment: str
) -> None:
    file = written(tmp_path, text)
    with pytest.raises(ModelError) as caught:
        ConfigReader.open(file)
    assert str(file) in str(caught.value)
    assert fragment in str(caught.value)


def test_missing_file_and_folder_in_its_place(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json is missing; is .* the folder of"):
        ConfigReader.open(tmp_path / "config.json")
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ModelError, match=r"config\.json: cannot be read"):
        ConfigReader.open(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("value", "kind", "result"),
    [
        (3, int, 3),
        (3.5, float, 3.5),
        (3, float, 3.0),
        (True, bool, True),
        ("x", str, "x"),
        ([1], list, [1]),
        ({"a": 1}, dict, {"a": 1}),
        (3, (int, list), 3),
        ([3], (int, list), [3]),
    ],
)
def test_values_of_the_right_type(value: object, kind: type, result: object) -> None:
    for got in (reader(k=value).require("k", kind), reader(k=value).get("k", kind, None)):
        assert got == result
        assert type(got) is type(result)


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        ("3", int, '"3"; it must be an integer'),
        (True, int, "true; it must be an integer"),
        (True, float, "true; it must be a finite number"),
        (3.0, int, "3.0; it must be an integer"),
        (1, bool, "1; it must be true or false"),
        (1, str, "1; it must be a string"),
        ("x", list, '"x"; it must be a list'),
        ([], dict, "[]; it must be an object"),
        (float("nan"), float, "NaN; it must be a finite number"),
        (float("inf"), float, "Infinity; it must be a finite number"),
        (-(10**400), float, "it must be a finite number"),
        ("x", (int, list), '"x"; it must be an integer or a list'),
    ],
)
def test_wrong_type_is_named_with_the_value(value: object, kind: type, message: str) -> None:
    for read in (
        lambda c: c.require("k", kind),
        lambda c: c.get("k", kind, None),
    ):
        with pytest.raises(ModelError) as caught:
            read(reader(k=value))
        assert str(caught.value).startswith("m/config.json: k is ")
        assert str(caught.value).endswith(message)
        assert len(str(caught.value)) < 250


def test_absent_and_null() -> None:
    config = reader(null=None)
    for key in ("null", "gone"):
        assert config.get(key, int, 5) == 5
        assert config.section(key) is None
    with pytest.raises(ModelError, match=r"config\.json: gone is missing; it must be an integer"):
        config.require("gone", int)
    with pytest.raises(ModelError, match=r"config\.json: null is null; it must be an integer"):
        config.require("null", int)
    assert "null" in config
    assert "gone" not in config


def test_expect_takes_only_what_is_implemented() -> None:
    config = reader(act="silu", one=1, yes=True, null=None)
    assert config.expect("act", ("silu", "swish"), "silu") == "silu"
    assert config.expect("gone", ("silu",), "silu") == "silu"
    assert config.expect("null", (False,), False) is False
    assert config.expect("null", (1, None), 1) is None
    assert config.expect("one", (1, None), None) == 1
    with pytest.raises(
        ModelError, match=r'm/config\.json: act is "silu"; hayate implements "gelu"'
    ):
        config.expect("act", ("gelu",), "gelu")
    with pytest.raises(ModelError, match=r"yes is true; hayate implements 1$"):
        config.expect("yes", (1,), 1)
    with pytest.raises(
        ModelError, match=r"one is 1; hayate implements false, or the field left out"
    ):
        config.expect("one", (False, None), None)
    with pytest.raises(
        ModelError, match=r"act is .*; hayate implements none, or the field left out"
    ):
        config.expect("act", (None,), None)


def test_sections_name_their_path_and_are_false_when_empty() -> None:
    config = reader(rope={"inner": {"factor": "8"}}, empty={}, text="x")
    rope = config.section("rope")
    assert rope
    inner = rope.section("inner")
    assert inner
    with pytest.raises(ModelError, match=r'm/config\.json: rope\.inner\.factor is "8"'):
        inner.require("factor", float)
    assert inner.where("x") == "m/config.json: rope.inner.x"
    empty = config.section("empty")
    assert empty is not None
    assert not empty
    with pytest.raises(ModelError, match=r"text is \"x\"; it must be an object"):
        config.section("text")


def test_unread_lists_what_nobody_asked_for() -> None:
    config = reader(a=1, b=2, c=3, d={"x": 1}, e=None)
    config.require("a", int)
    config.expect("e", (None,), None)
    section = config.section("d")
    assert section is not None
    assert "b" in config  # looking is not reading
    assert config.unread() == ["b", "c"]
    assert section.unread() == ["x"]
