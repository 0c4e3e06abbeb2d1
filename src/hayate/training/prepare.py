"""`hayate data prepare`: documents -> token files, the held-out ones apart.

The result is a folder that a training run names as its data:

    train.safetensors        token file (see token_file.py)
    validation.safetensors   the held-out documents, unless none were asked for
    tokenizer.json ...       the tokenizer that made them, copied

Which documents are held out depends on their text alone, so it stays the same when files are added or reordered, and a
document that occurs twice is never on both sides.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from hayate.errors import UsageError
from hayate.text.tokenizer import Tokenizer
from hayate.training.documents import find_files, read_documents
from hayate.training.token_file import TokenFileWriter

TRAIN_FILE, VALIDATION_FILE = "train.safetensors", "validation.safetensors"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_DOCUMENTS_AT_ONCE = 256  # tokenised in parallel


@dataclass(frozen=True)
class PrepareReport:
    """What was written, and from how much."""

    num_files: int
    num_bytes: int  # of UTF-8 text
    num_documents: int
    num_empty: int  # documents without a token, left out
    num_train_tokens: int
    num_validation_tokens: int


def tokenizer_digest(folder: Path) -> str:
    """SHA-256 of tokenizer.json: token files and models of one tokenizer have the same."""
    return hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()


def prepare(
    paths: list[Path],
    tokenizer_folder: Path,
    output: Path,
    *,
    field: str = "text",
    held_out: float = 0.005,
    progress: Callable[[Path, int, int], None] | None = None,
) -> PrepareReport:
    """Tokenise all documents of `paths` into the folder `output`, which must not hold token files yet.

    held_out: the share of documents that goes to the validation file, 0 <= held_out < 1. progress is called with
    the file at hand, the number of documents and of tokens so far. Raises UsageError as `read_documents` does, and
    when nothing is left to train on. Nothing is left behind after an error.
    """
    if not 0 <= held_out < 1:
        raise UsageError(f"--held-out {held_out} must be at least 0 and below 1")
    files = find_files(paths)
    for name in (TRAIN_FILE, VALIDATION_FILE):
        if (output / name).exists():
            raise UsageError(f"{output / name} exists; remove it or name another folder")
    tokenizer = Tokenizer(tokenizer_folder)
    if not tokenizer.eos_token_ids:
        raise UsageError(
            f"the tokenizer in {tokenizer_folder} names no end token (eos_token in tokenizer_config.json)"
        )
    count = _Count()
    with ExitStack() as stack:
        train, validation = (
            stack.enter_context(_OptionalWriter(output / name, tokenizer, tokenizer_folder))
            for name in (TRAIN_FILE, VALIDATION_FILE)
        )
        for file in files:
            for texts in _batches(read_documents(file, field)):
                encoded = tokenizer.backend.encode_batch_fast(texts, add_special_tokens=False)
                for text, encoding in zip(texts, encoded, strict=True):
                    count.document(text, bool(encoding.ids))
                    side = validation if _is_held_out(text, held_out) else train
                    side.add(encoding.ids)
                if progress:
                    progress(file, count.documents, train.num_tokens + validation.num_tokens)
        if not train.num_tokens:
            raise UsageError(f"no document with text is left to train on in {len(files)} files")
    for name in TOKENIZER_FILES:
        if (tokenizer_folder / name).is_file():
            shutil.copy(tokenizer_folder / name, output / name)
    return PrepareReport(
        len(files),
        count.bytes,
        count.documents,
        count.empty,
        train.num_tokens,
        validation.num_tokens,
    )


class _Count:
    def __init__(self) -> None:
        self.documents = self.empty = self.bytes = 0

    def document(self, text: str, has_tokens: bool) -> None:
        self.documents += 1
        self.empty += not has_tokens
        self.bytes += len(text.encode("utf-8", "surrogatepass"))


class _OptionalWriter(ExitStack):
    """A token file that is made when its first document comes."""

    def __init__(self, path: Path, tokenizer: Tokenizer, folder: Path) -> None:
        super().__init__()
        self._make = lambda: TokenFileWriter(
            path,
            vocab_size=tokenizer.vocab_size,
            eos_token_id=tokenizer.eos_token_ids[0],
            tokenizer=tokenizer_digest(folder),
        )
        self._writer: TokenFileWriter | None = None

    @property
    def num_tokens(self) -> int:
        return 0 if self._writer is None else self._writer.num_tokens

    def add(self, token_ids: list[int]) -> None:
        if not token_ids:
            return
        if self._writer is None:
            self._writer = self.enter_context(self._make())
        self._writer.add(token_ids)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    iterator = iter(texts)
    while batch := list(islice(iterator, _DOCUMENTS_AT_ONCE)):
        yield batch


def _is_held_out(text: str, share: float) -> bool:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") < share * 2**64
