"""Token files: a tokenised corpus on disk, memory-mapped.

A token file is a safetensors file, so any tool that reads those can look into it:

    tokens          (N,) U16 or U32, the documents one after the other, each with its end token
    document_ends   (M,) U64, ascending: document i is tokens[document_ends[i - 1]:document_ends[i]]
    __metadata__    format "tokens", version "1", vocab_size, eos_token_id, tokenizer (SHA-256 of tokenizer.json)

U16 holds vocabularies of up to 65,536 entries.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from hayate.checkpoint.header import read_header, read_metadata
from hayate.errors import ModelError, UsageError

_HEADER_BYTES = 1024  # reserved in front; the sizes are known only at the end
_KEYS = ("vocab_size", "eos_token_id", "tokenizer")
_DTYPES: dict[str, np.dtype] = {
    "U16": np.dtype("<u2"),
    "U32": np.dtype("<u4"),
    "U64": np.dtype("<u8"),
}


@dataclass(frozen=True)
class TokenFile:
    """An open token file. `tokens` and `document_ends` are read from the disk as they are touched."""

    path: Path
    tokens: np.ndarray  # (N,) uint16 or uint32
    document_ends: np.ndarray  # (M,) uint64
    vocab_size: int
    eos_token_id: int
    tokenizer: str  # SHA-256 of the tokenizer.json that made it

    @classmethod
    def open(cls, path: str | Path) -> TokenFile:
        """Map `path`. ModelError, naming the file, when it is no token file or is damaged."""
        path = Path(path)
        if not path.is_file():
            raise ModelError(f"{path} is missing; make token files with `hayate data prepare`")
        header, metadata = read_header(path), read_metadata(path)
        if metadata.get("format") != "tokens" or header.keys() != {"tokens", "document_ends"}:
            raise ModelError(f"{path} is not a token file; make one with `hayate data prepare`")
        if metadata.get("version") != "1":
            raise ModelError(
                f"{path} is of version {metadata.get('version')!r}, this program reads 1; prepare it again"
            )
        if missing := [key for key in _KEYS if key not in metadata]:
            raise ModelError(f"{path} has no {missing[0]} in its metadata; prepare it again")
        arrays = {}
        for name, info in header.items():
            if len(info.shape) != 1 or info.dtype not in _DTYPES:
                raise ModelError(f"{path}: {name} is {info.dtype} {info.shape}; prepare it again")
            # An empty map is an error of the system.
            arrays[name] = (
                np.memmap(path, _DTYPES[info.dtype], "r", info.begin, info.shape)
                if info.num_bytes
                else np.empty(0, _DTYPES[info.dtype])
            )
        tokens, ends = arrays["tokens"], arrays["document_ends"]
        if len(ends) == 0 or int(ends[-1]) != len(tokens) or np.any(ends[1:] <= ends[:-1]):
            raise ModelError(f"{path}: its documents do not cover its tokens; prepare it again")
        vocab_size, eos, tokenizer = (metadata[key] for key in _KEYS)
        return cls(path, tokens, ends, int(vocab_size), int(eos), tokenizer)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        return len(self.document_ends)

    def document(self, index: int) -> np.ndarray:
        """The tokens of one document, its end token included."""
        begin = int(self.document_ends[index - 1]) if index else 0
        return self.tokens[begin : int(self.document_ends[index])]


class TokenFileWriter:
    """Writes documents one by one; the file appears under its name, complete, when the block ends without error.

    with TokenFileWriter(path, vocab_size=32_000, eos_token_id=2, tokenizer=digest) as writer:
        writer.add([5, 6, 7])
    """

    def __init__(
        self, path: str | Path, *, vocab_size: int, eos_token_id: int, tokenizer: str
    ) -> None:
        self.path = Path(path)
        if not 0 <= eos_token_id < vocab_size:
            raise UsageError(
                f"eos_token_id {eos_token_id} is outside the vocabulary of {vocab_size}"
            )
        self.dtype = "U16" if vocab_size <= 2**16 else "U32"
        self.num_tokens = 0
        self.num_documents = 0
        self._vocab_size, self._eos, self._tokenizer = vocab_size, eos_token_id, tokenizer
        self._ends: list[int] = []
        self._work = self.path.with_name(f".{self.path.name}.{os.getpid()}.incomplete")

    def __enter__(self) -> TokenFileWriter:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = self._work.open("wb")
        self._stream.seek(_HEADER_BYTES)
        return self

    def add(self, token_ids: Sequence[int]) -> None:
        """Append one document; its end token is added here. An empty one is left out."""
        if not len(token_ids):
            return
        array = np.asarray(token_ids, dtype=np.int64)
        low, high = int(array.min()), int(array.max())
        if low < 0 or high >= self._vocab_size:
            raise UsageError(
                f"token id {low if low < 0 else high} is outside the vocabulary of {self._vocab_size}"
            )
        ids = np.empty(len(array) + 1, _DTYPES[self.dtype])
        ids[:-1], ids[-1] = array, self._eos
        self._stream.write(ids.tobytes())
        self.num_tokens += len(ids)
        self.num_documents += 1
        self._ends.append(self.num_tokens)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            with self._stream:
                if error is None:
                    self._finish()
            if error is None:
                os.replace(self._work, self.path)
        finally:
            self._work.unlink(missing_ok=True)

    def _finish(self) -> None:
        if not self._ends:
            raise UsageError(f"{self.path}: there is no document to write")
        ends = np.array(self._ends, _DTYPES["U64"])
        self._stream.write(ends.tobytes())
        middle = self.num_tokens * _DTYPES[self.dtype].itemsize
        header = {
            "__metadata__": {
                "format": "tokens",
                "version": "1",
                "vocab_size": str(self._vocab_size),
                "eos_token_id": str(self._eos),
                "tokenizer": self._tokenizer,
            },
            "tokens": {
                "dtype": self.dtype,
                "shape": [self.num_tokens],
                "data_offsets": [0, middle],
            },
            "document_ends": {
                "dtype": "U64",
                "shape": [len(ends)],
                "data_offsets": [middle, middle + ends.nbytes],
            },
        }
        # The format allows spaces after the JSON: the header fills what was reserved.
        text = json.dumps(header).encode().ljust(_HEADER_BYTES - 8)
        assert len(text) == _HEADER_BYTES - 8
        self._stream.seek(0)
        self._stream.write(len(text).to_bytes(8, "little") + text)
        self._stream.flush()
        os.fsync(self._stream.fileno())
