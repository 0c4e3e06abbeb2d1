"""`hayate quantize`: a model folder with its linear layers in 4 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hayate.cli import options
from hayate.errors import UsageError


def quantize(
    model: Annotated[
        str, typer.Argument(metavar="DIR|NAME", help="Folder, hub id org/name, or smollm2-135m.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    format: Annotated[str, typer.Option(help="nf4, as bitsandbytes writes it.")] = "nf4",
    double_quant: Annotated[
        bool, typer.Option("--double-quant/--no-double-quant", help="Quantise the scales, too.")
    ] = True,
    skip: Annotated[
        list[str] | None,
        typer.Option(help="A layer that stays as it is; repeatable.", metavar="NAME"),
    ] = None,
    revision: options.Revision = None,
    verbose: options.Verbose = False,
) -> None:
    """Write a model with its linear layers in 4 bits: a folder that transformers reads, too."""
    if format != "nf4":
        raise UsageError(f"--format {format!r} is unknown; use nf4")
    from hayate.checkpoint.hub import resolve_model
    from hayate.cli.progress import counting_bar
    from hayate.models.quantize import quantize_checkpoint

    folder = resolve_model(model, revision)
    with counting_bar("quantizing") as progress:
        quantize_checkpoint(folder, out, double=double_quant, skip=skip or (), progress=progress)
    print(out)
