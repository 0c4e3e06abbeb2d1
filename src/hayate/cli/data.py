"""`hayate data`: text into token files, and small texts to try with."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from hayate.cli import options

Paths = Annotated[
    list[Path],
    typer.Argument(
        metavar="PATH...", help="Files or folders: .txt .md .jsonl(.gz) .parquet .arrow"
    ),
]
Field = Annotated[str, typer.Option(metavar="NAME", help="Field or column that holds the text.")]


def prepare(
    paths: Paths,
    tokenizer: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder with tokenizer.json (a model's will do).")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where to write.")],
    field: Field = "text",
    held_out: Annotated[
        float, typer.Option(metavar="SHARE", help="Share of documents kept for validation.")
    ] = 0.005,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Tokenise documents into token files that `hayate train` reads."""
    from hayate.training import prepare as preparing

    with _counter() as progress:
        report = preparing.prepare(
            paths, tokenizer, output, field=field, held_out=held_out, progress=progress
        )
    if as_json:
        print(json.dumps(asdict(report)))
        return
    tokens = report.num_train_tokens + report.num_validation_tokens
    typer.echo(
        f"{report.num_documents:,} documents ({report.num_bytes / 1e6:,.1f} MB) of {report.num_files} files: "
        f"{report.num_train_tokens:,} tokens to train on, {report.num_validation_tokens:,} held out, "
        f"{report.num_bytes / tokens:.2f} bytes a token, in {output}"
    )
    if report.num_empty:
        typer.echo(f"{report.num_empty:,} documents were empty and left out")


def fetch(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="books, wiki.")],
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    verbose: options.Verbose = False,
) -> None:
    """Fetch small real texts; print their folders on standard output."""
    from hayate.training.corpora import fetch_corpus

    for name in names:
        print(fetch_corpus(name, progress=not quiet))


def train_tokenizer(
    paths: Paths,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where to write.")],
    vocab_size: Annotated[
        int, typer.Option(metavar="N", help="Entries of the vocabulary.")
    ] = 32_000,
    field: Field = "text",
    verbose: options.Verbose = False,
) -> None:
    """Train a byte-level BPE tokenizer; writes tokenizer.json and tokenizer_config.json."""
    import sys

    from hayate.training.documents import find_files, read_documents
    from hayate.training.tokenizer_training import train_tokenizer as train

    texts = (text for file in find_files(paths) for text in read_documents(file, field))
    size = train(texts, output, vocab_size=vocab_size, progress=sys.stderr.isatty())
    typer.echo(f"{size:,} tokens in {output / 'tokenizer.json'}")


@contextmanager
def _counter() -> Iterator[Callable[[Path, int, int], None] | None]:
    """A line on standard error that counts documents and tokens; nothing when that is no terminal."""
    import sys

    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console

    console = Console(stderr=True)
    with console.status("reading") as status:
        yield lambda file, documents, tokens: status.update(
            f"{file.name}: {documents:,} documents, {tokens:,} tokens"
        )
