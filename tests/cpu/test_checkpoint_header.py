"""Header validation against the safetensors library, and hostile files one by one."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from hayate.checkpoint.header import DTYPE_BYTES, read_header
from hayate.checkpoint.placements import TORCH_DTYPES
from hayate.errors import ModelError

# What the library accepts and we refuse on purpose: ambiguity, extensions, dtypes we cannot hold.
STRICTER = re.compile(
    r"described twice|has '\w+' twice|__metadata__ holds|__metadata__ is None|not by an object"
    r"|which the format does not know|which hayate does not read|more than any memory holds"
)


def entry(dtype: str = "F32", shape: object = (1,), offsets: object = (0, 4)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def file_bytes(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def library_reads(content: bytes) -> dict[str, tuple] | None:
    """name -> (dtype, shape, bytes) as the library reads it; None when it refuses the file."""
    try:
        tensors = safetensors.deserialize(content)
    except safetensors.SafetensorError:
        return None
    return {name: (t["dtype"], tuple(t["shape"]), bytes(t["data"])) for name, t in tensors}


def we_read(file: Path) -> dict[str, tuple]:
    content = file.read_bytes()
    return {
        name: (t.dtype, t.shape, content[t.begin : t.end]) for name, t in read_header(file).items()
    }


def agree(file: Path, content: bytes) -> None:
    """We refuse what the library refuses; what we accept has its values; else we are STRICTER."""
    file.write_bytes(content)
    expected = library_reads(content)
    actual, message = None, ""
    try:
        actual = we_read(file)
    except ModelError as error:
        message = str(error)
    if actual is None:
        assert str(file) in message
        assert expected is None or STRICTER.search(message), message
    else:
        assert actual == expected


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("header") / "x.safetensors"


# name, content, fragments of the message beside the file's name
HOSTILE = {
    "empty": (b"", ["only 0 bytes"]),
    "no_length": (b"\1\2\3", ["only 3 bytes"]),
    "length_past_end": (file_bytes({}, length=99), ["claims 99", "has 10"]),
    "length_huge": (file_bytes({}, length=2**63), ["9223372036854775808", "100000000"]),
    "git_lfs": (b"version https://git-lfs.github.com/spec/v1\n", ["Git LFS", "git lfs pull"]),
    "not_utf8": (file_bytes(b'{"\xff":1}'), ["UTF-8 at byte 2"]),
    "not_json": (file_bytes(b'{"a":'), ["JSON is not valid"]),
    "json_constant": (file_bytes(b'{"a":NaN}'), ["NaN"]),
    "json_deep": (file_bytes(b"[" * 100_000), ["JSON is not valid"]),
    "trailing_comma": (file_bytes(b"{},"), ["JSON is not valid"]),
    "a_list": (file_bytes([]), ["[]", "not an object"]),
    "a_number": (file_bytes(7), ["7", "not an object"]),
    "metadata_number": (file_bytes({"__metadata__": {"k": 1}}), ["__metadata__ 'k' is 1"]),
    "metadata_list": (file_bytes({"__metadata__": []}), ["__metadata__ is []"]),
    "entry_number": (file_bytes({"a": 3}), ["'a'", "described by 3"]),
    "no_dtype": (file_bytes({"a": {"shape": [], "data_offsets": [0, 0]}}), ["'a'", "no dtype"]),
    "bad_dtype": (file_bytes({"a": entry("f32")}, bytes(4)), ["'a'", "dtype 'f32'"]),
    "dtype_list": (file_bytes({"a": entry(["F32"])}, bytes(4)), ["'a'", "dtype ['F32']"]),  # type: ignore[arg-type]
    "shape_null": (file_bytes({"a": entry(shape=None)}, bytes(4)), ["'a'", "shape None"]),
    "shape_negative": (file_bytes({"a": entry(shape=[-1])}, bytes(4)), ["'a'", "shape [-1]"]),
    "shape_minus_zero": (
        file_bytes(b'{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}'),
        ["'a'", "shape [-0.0]"],
    ),
    "shape_bool": (file_bytes({"a": entry(shape=[True])}, bytes(4)), ["'a'", "shape [True]"]),
    "shape_float": (file_bytes({"a": entry(shape=[1.0])}, bytes(4)), ["'a'", "shape [1.0]"]),
    "shape_text": (file_bytes({"a": entry(shape="1")}, bytes(4)), ["'a'", "shape '1'"]),
    "shape_overflow": (
        file_bytes({"a": entry(shape=[2**31, 2**31, 4])}, bytes(4)),
        ["'a'", "more than any memory"],
    ),
    "shape_overflow_wraps": (  # 2**64 elements: 0 in 64 bits
        file_bytes({"a": entry(shape=[2**32, 2**32], offsets=[0, 0])}),
        ["'a'", "more than any memory"],
    ),
    "shape_65_bits": (file_bytes({"a": entry(shape=[2**64])}, bytes(4)), ["'a'", "shape ["]),
    "shape_million_digits": (
        file_bytes(b'{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,4]}}' % (b"9" * 10**6)),
        ["'a'", "shape [inf]"],
    ),
    "offsets_three": (file_bytes({"a": entry(offsets=[0, 4, 4])}, bytes(4)), ["'a'", "[0, 4, 4]"]),
    "offsets_negative": (file_bytes({"a": entry(offsets=[-4, 0])}, bytes(4)), ["'a'", "[-4, 0]"]),
    "offsets_reversed": (file_bytes({"a": entry(offsets=[4, 0])}, bytes(4)), ["'a'", "[4, 0]"]),
    "offsets_text": (file_bytes({"a": entry(offsets="04")}, bytes(4)), ["'a'", "'04'"]),
    "span_short": (file_bytes({"a": entry(shape=[2])}, bytes(4)), ["'a'", "needs 8", "span 4"]),
    "truncated": (file_bytes({"a": entry()}, bytes(3)), ["'a'", "ends at byte", "fetch it again"]),
    "trailing": (file_bytes({"a": entry()}, bytes(6)), ["2 bytes after tensor 'a'"]),
    "trailing_no_tensor": (file_bytes({}, bytes(6)), ["6 bytes after the header"]),
    "hole_first": (file_bytes({"a": entry(offsets=[4, 8])}, bytes(8)), ["4 bytes", "'a'"]),
    "hole": (
        file_bytes({"a": entry(), "b": entry(offsets=[8, 12])}, bytes(12)),
        ["4 bytes between tensor 'a' and tensor 'b'"],
    ),
    "overlap": (
        file_bytes({"a": entry(shape=[2], offsets=[0, 8]), "b": entry(offsets=[4, 8])}, bytes(8)),
        ["'b' overlaps tensor 'a'"],
    ),
    "same_bytes": (file_bytes({"a": entry(), "b": entry()}, bytes(4)), ["'b' overlaps tensor 'a'"]),
    "surrogate_name": (file_bytes(b'{"\\ud800":{}}'), ["'\\ud800'", "not valid Unicode"]),
}
STRICTER_CASES = {
    "tensor_twice": (
        file_bytes(
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
            b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
            bytes(4),
        ),
        ["'a' is described twice"],
    ),
    "metadata_twice": (file_bytes(b'{"__metadata__":{"k":"","k":""}}'), ["'k' twice"]),
    "unknown_key": (file_bytes({"a": {**entry(), "scale": 2}}, bytes(4)), ["'a' has 'scale'"]),
    "sub_byte": (file_bytes({"a": entry("F4", [8])}, bytes(4)), ["'a'", "'F4'", "among BF16"]),
    "e8m0": (file_bytes({"a": entry("F8_E8M0", [4])}, bytes(4)), ["'a'", "'F8_E8M0'"]),
    "zero_times_2_63": (
        file_bytes({"a": entry(shape=[2**64 - 1, 0], offsets=[0, 0])}),
        ["'a'", "more than any memory"],
    ),
    "zero_times_huge": (
        file_bytes({"a": entry(shape=[0, 2**40, 2**40], offsets=[0, 0])}),
        ["'a'", "more than any memory"],
    ),
}


@pytest.mark.parametrize("case", [*HOSTILE, *STRICTER_CASES])
def test_hostile_file_is_refused_naming_file_and_tensor(case: str, tmp_path: Path) -> None:
    content, fragments = {**HOSTILE, **STRICTER_CASES}[case]
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(ModelError) as caught:
        read_header(file)
    message = str(caught.value)
    assert message.startswith(f"{file}: ")
    assert all(fragment in message for fragment in fragments), message
    assert len(message) < 700  # a hostile name or value does not flood the terminal
    assert message.isprintable()
    assert (library_reads(content) is not None) == (case in STRICTER_CASES)


def test_a_field_given_twice_names_the_tensor(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    raw = b'{"w":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    file.write_bytes(file_bytes(raw, bytes(4)))
    with pytest.raises(ModelError, match="tensor 'w' has 'dtype' twice"):
        read_header(file)


def test_missing_file_and_folder_are_model_errors(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"gone\.safetensors: cannot be read \(No such file"):
        read_header(tmp_path / "gone.safetensors")
    with pytest.raises(ModelError, match="not a regular file"):
        read_header(tmp_path)


def test_every_prefix_of_a_file_is_refused(scratch: Path) -> None:
    content = file_bytes({"a": entry(), "b": entry("BF16", (3,), (4, 10))}, bytes(10))
    assert library_reads(content) is not None
    for length in range(len(content)):
        scratch.write_bytes(content[:length])
        with pytest.raises(ModelError):
            read_header(scratch)


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
def test_every_dtype_has_the_library_s_size_and_name(dtype: str, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    tensor = torch.zeros(3, dtype=TORCH_DTYPES[dtype])
    save_file({"w": tensor}, file)
    info = read_header(file)["w"]
    assert (info.dtype, info.shape, info.num_bytes) == (dtype, (3,), 3 * tensor.itemsize)
    assert info.num_bytes == info.num_elements * DTYPE_BYTES[dtype]


names = st.text(max_size=8).filter(lambda n: n != "__metadata__")
shapes = st.lists(st.integers(0, 3), max_size=4)


@settings(max_examples=100, deadline=None)
@given(
    tensors=st.dictionaries(
        names, st.tuples(st.sampled_from(sorted(DTYPE_BYTES)), shapes), max_size=5
    ),
    # min_size: with empty metadata and no tensor, safetensors 0.8 writes a file it cannot read.
    metadata=st.none()
    | st.dictionaries(st.text(max_size=4), st.text(max_size=4), min_size=1, max_size=2),
)
def test_files_of_the_library_are_read_alike(
    scratch: Path, tensors: dict[str, tuple[str, list[int]]], metadata: dict[str, str] | None
) -> None:
    made = {
        name: torch.ones(shape, dtype=torch.float32).to(TORCH_DTYPES[dtype])
        for name, (dtype, shape) in tensors.items()
    }
    save_file(made, scratch, metadata=metadata)
    assert we_read(scratch) == library_reads(scratch.read_bytes())


# Values a mutation may put in any place of a header.
values = st.sampled_from(
    [
        0,
        1,
        2,
        4,
        8,
        12,
        2**31,
        2**63 - 1,
        2**63,
        2**64,
        -1,
        1.0,
        True,
        None,
        "F32",
        "F4",
        "BOOL",
        "",
    ]
) | st.lists(st.integers(-1, 9), max_size=3)


@st.composite
def mutated_headers(draw: st.DrawFn) -> bytes:
    """A valid file of up to three tensors with up to two faults."""
    header: dict = {}
    position = 0
    for name in ["a", "b", "c"][: draw(st.integers(0, 3))]:
        dtype = draw(st.sampled_from(["F32", "BF16", "U8", "F64"]))
        shape = draw(shapes)
        size = DTYPE_BYTES[dtype]
        for n in shape:
            size *= n
        header[name] = entry(dtype, shape, [position, position + size])
        position += size
    num_data = max(0, position + draw(st.sampled_from([0] * 6 + [-1, 1, 4])))
    for _ in range(draw(st.integers(0, 2))):
        place = draw(st.sampled_from([*header, "__metadata__", "new"]))
        if place not in header or not isinstance(header[place], dict) or draw(st.booleans()):
            header[place] = draw(values | st.dictionaries(st.text(max_size=2), values, max_size=2))
            continue
        field = draw(st.sampled_from(["dtype", "shape", "data_offsets", "extra"]))
        if isinstance(header[place].get(field), list) and header[place][field]:
            i = draw(st.integers(0, len(header[place][field]) - 1))
            header[place][field][i] = draw(values)
        else:
            header[place][field] = draw(values)
    return file_bytes(header, bytes(num_data))


@settings(max_examples=400, deadline=None)
@given(content=mutated_headers())
def test_faulty_headers_are_judged_as_the_library_does(scratch: Path, content: bytes) -> None:
    agree(scratch, content)


@settings(max_examples=400, deadline=None)
@given(
    flips=st.lists(st.tuples(st.integers(0, 165), st.integers(0, 255)), min_size=1, max_size=3),
    text=st.sampled_from([b"", b"0", b"-", b",", b'"', b"}", b"\\u0041", b"\xc3", b" ", b"e1"]),
)
def test_changed_bytes_are_judged_as_the_library_does(
    scratch: Path, flips: list[tuple[int, int]], text: bytes
) -> None:
    header = {"a": entry(), "weight": entry("BF16", (3,), (4, 10)), "__metadata__": {"k": "v"}}
    content = bytearray(file_bytes(header, bytes(10)))
    for position, value in flips:
        content[position % len(content)] = value
    at = flips[0][0] % len(content)
    content[at:at] = text
    agree(scratch, bytes(content))
