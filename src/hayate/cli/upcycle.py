"""`hayate upcycle`: a dense model becomes a mixture of experts that `hayate train` goes on from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from hayate.cli import options


def upcycle(
    model: Annotated[
        str,
        typer.Argument(metavar="DIR|NAME", help="Dense model: folder, hub id, or smollm2-135m."),
    ],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    experts: Annotated[int, typer.Option(metavar="N", help="Experts a layer.")] = 8,
    active: Annotated[int, typer.Option(metavar="N", help="Experts a token uses.")] = 2,
    noise: Annotated[
        float,
        typer.Option(metavar="SHARE", help="Of a matrix's deviation, added to tell experts apart."),
    ] = 0.0,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the routers and the noise.")] = 0,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Copy each MLP of a dense model into the experts of a mixture, with new routers.

    Without noise the result gives the logits of the dense model; `hayate train --model.init_from OUT` goes on from it.
    """
    from hayate.checkpoint.hub import resolve_model
    from hayate.training import upcycle as upcycling

    mixture = upcycling.upcycle(
        resolve_model(model),
        output,
        num_experts=experts,
        num_active=active,
        noise=noise,
        seed=seed,
    )
    if as_json:
        sizes = (mixture.num_parameters, mixture.num_active_parameters)
        print(json.dumps(dict(zip(("parameters", "active_parameters"), sizes, strict=True))))
        return
    typer.echo(
        f"{output}: {mixture.architecture}, {mixture.num_parameters / 1e6:,.1f} M parameters, "
        f"{mixture.num_active_parameters / 1e6:,.1f} M active"
    )
