"""`hayate pull`: fetch a model and print its folder."""

from __future__ import annotations

from typing import Annotated

import typer

from hayate.cli import options


def pull(
    model: Annotated[str, typer.Argument(metavar="NAME", help="Hub id org/name, or smollm2-135m.")],
    revision: options.Revision = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    verbose: options.Verbose = False,
) -> None:
    """Fetch a model unless it is there already; print its folder on standard output."""
    from hayate.checkpoint.hub import resolve_model

    print(resolve_model(model, revision, progress=not quiet))
