"""`hayate perplexity`: how well a model predicts a text, by position in the context."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from hayate.cli import options
from hayate.config import parse_dtype


def perplexity(
    model: Annotated[
        str, typer.Argument(metavar="DIR|NAME", help="Model: folder, hub id, or smollm2-135m.")
    ],
    data: Annotated[
        Path,
        typer.Argument(metavar="DATA", help="Folder of `hayate data prepare`, or a token file."),
    ],
    length: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Tokens of a window (the trained length, times --ntk)."
        ),
    ] = None,
    ntk: Annotated[
        float | None,
        typer.Option(metavar="FACTOR", help="A second time with dynamic NTK of this factor."),
    ] = None,
    windows: Annotated[int, typer.Option(metavar="N", min=1, help="Windows to average.")] = 8,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw both as a PNG.")] = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Measure perplexity by position in the context, also beyond the length a model was trained on.

    A folder is read with its held-out text where it has some, else with what it trains on.
    """
    import torch

    from hayate.checkpoint.hub import resolve_model
    from hayate.models import load_config
    from hayate.runtime.device import device_errors, resolve_device
    from hayate.training.context import loss_by_position, ntk_rope, plot_positions
    from hayate.training.model_source import open_model
    from hayate.training.prepare import TRAIN_FILE, VALIDATION_FILE
    from hayate.training.token_file import TokenFile

    folder = resolve_model(model)
    config = load_config(folder)
    ropes = {"as config.json says": config.rope}
    if ntk is not None:
        ropes[f"dynamic NTK, factor {ntk:g}"] = ntk_rope(config.rope, ntk)
    trained = config.max_position_embeddings
    length = length or int(trained * (ntk or 1))
    if data.is_dir():
        data /= VALIDATION_FILE if (data / VALIDATION_FILE).is_file() else TRAIN_FILE
    file, where = TokenFile.open(data), resolve_device(device)
    name = parse_dtype(dtype)
    with device_errors(where, doing="measuring perplexity"):
        loaded = open_model(
            folder, device=where, dtype=getattr(torch, config.dtype if name == "auto" else name)
        )
        curves = {
            label: loss_by_position(loaded, rope, file, length=length, num_windows=windows)
            for label, rope in ropes.items()
        }
    if plot is not None:
        plot_positions(curves, trained, plot)
    if as_json:
        points = {label: [asdict(point) for point in curve] for label, curve in curves.items()}
        print(json.dumps({"max_position_embeddings": trained, "loss": points}))
        return
    print(f"{'positions':>17}  " + "  ".join(f"{label:>24}" for label in curves))
    for row in zip(*curves.values(), strict=True):
        span = f"{row[0].begin:,} to {row[0].end:,}"
        print(f"{span:>17}  " + "  ".join(f"{point.perplexity:>24,.2f}" for point in row))
