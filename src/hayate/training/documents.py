"""Documents out of files: text, JSON Lines, Parquet, and Hugging Face datasets saved to disk.

| file                        | a document is                                       |
|-----------------------------|-----------------------------------------------------|
| *.txt, *.md                 | the whole file                                      |
| *.jsonl, *.jsonl.gz         | the string in the field `text` of each line         |
| *.parquet                   | the string in the column `text` of each row         |
| folder of `save_to_disk`    | the same, in its *.arrow files                      |
| another folder              | those of all such files in it, in the order of names |
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hayate.errors import UsageError

_TEXT, _JSON, _PARQUET, _ARROW = (
    (".txt", ".md"),
    (".jsonl", ".jsonl.gz"),
    (".parquet",),
    (".arrow",),
)
SUFFIXES = _TEXT + _JSON + _PARQUET + _ARROW
_ROWS_AT_ONCE = 1024


def find_files(paths: list[Path]) -> list[Path]:
    """The files that `paths` name, folders searched through. UsageError for what is missing or unknown."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file() and _known(p))
            if not inside:
                raise UsageError(f"{path} holds no file that ends in {', '.join(SUFFIXES)}")
            found += inside
        elif not path.is_file():
            raise UsageError(f"{path} does not exist")
        elif not _known(path):
            raise UsageError(
                f"{path} is of a kind that is not read; known are {', '.join(SUFFIXES)}"
            )
        else:
            found.append(path)
    return found


def read_documents(path: Path, field: str = "text") -> Iterator[str]:
    """The documents of one file, in order.

    `field` names the text in JSON Lines, Parquet and Arrow. Raises UsageError naming the file, and the line or the
    column, where it cannot be read: nothing is skipped in silence.
    """
    if path.name.endswith(_TEXT):
        yield _decode(path.read_bytes(), str(path))
    elif path.name.endswith(_JSON):
        yield from _json_lines(path, field)
    else:
        yield from _table_rows(path, field)


def _known(path: Path) -> bool:
    return path.name.endswith(SUFFIXES)


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{where} is not UTF-8 at byte {error.start}; convert it first, for example with iconv"
        ) from None


def _json_lines(path: Path, field: str) -> Iterator[str]:
    open_file: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with open_file(path, "rb") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield _json_text(line, field, f"{path}:{number}")
    except (gzip.BadGzipFile, EOFError) as error:
        raise UsageError(f"{path} is not a whole gzip file ({error})") from None


def _json_text(line: bytes, field: str, where: str) -> str:
    try:
        row = json.loads(_decode(line, where))
    except ValueError as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{where} is not JSON ({error})") from None
    if not isinstance(row, dict):
        raise UsageError(f"{where} holds {type(row).__name__}, not an object")
    if field not in row:
        raise UsageError(
            f"{where} has no field {field!r}, it has {', '.join(map(repr, row))}; name one with --field"
        )
    if not isinstance(row[field], str):
        raise UsageError(f"{where}: field {field!r} is {type(row[field]).__name__}, not a string")
    return row[field]


def _table_rows(path: Path, field: str) -> Iterator[str]:
    """Rows of a Parquet file, or of the Arrow stream that `datasets` writes."""
    try:
        import pyarrow  # type: ignore[import-untyped]
        import pyarrow.parquet  # type: ignore[import-untyped]
    except ImportError:
        raise UsageError(f"{path}: reading it needs pyarrow; install hayate[train]") from None
    try:
        if path.suffix == ".parquet":
            file = pyarrow.parquet.ParquetFile(path)
            schema, batches = file.schema_arrow, None
        else:
            batches = _arrow_reader(pyarrow, path)
            schema = batches.schema
        if field not in schema.names:
            raise UsageError(
                f"{path} has no column {field!r}, it has {', '.join(map(repr, schema.names))}; name one with --field"
            )
        if not _is_text(pyarrow.types, schema.field(field).type):
            raise UsageError(f"{path}: column {field!r} is {schema.field(field).type}, not text")
        if batches is None:
            batches = file.iter_batches(_ROWS_AT_ONCE, columns=[field])
        for batch in batches:
            for row, text in enumerate(
                batch.column(batch.schema.get_field_index(field)).to_pylist()
            ):
                if text is None:
                    raise UsageError(f"{path}: column {field!r} is null in row {row} of a batch")
                yield text
    except pyarrow.ArrowException as error:
        raise UsageError(f"{path} cannot be read ({error})") from None


def _arrow_reader(pyarrow: Any, path: Path) -> Any:
    """`datasets` writes the streaming form; other tools the file form."""
    source = pyarrow.memory_map(str(path))
    try:
        return pyarrow.ipc.open_stream(source)
    except pyarrow.ArrowInvalid:
        file = pyarrow.ipc.open_file(source)
        return pyarrow.RecordBatchReader.from_batches(
            file.schema, (file.get_batch(i) for i in range(file.num_record_batches))
        )


def _is_text(types: Any, kind: Any) -> bool:
    return types.is_string(kind) or types.is_large_string(kind)
