"""`hayate bench`: measure, beside the ceiling that this device sets. The work is in
`hayate.bench`."""

from __future__ import annotations

import json
from enum import Enum
from importlib import import_module
from typing import Annotated, Any

import typer

from hayate.cli import options
from hayate.config import parse_dtype
from hayate.errors import UsageError


class Kind(str, Enum):
    """What is measured; each is a module of `hayate.bench`."""

    decode = "decode"
    prefill = "prefill"
    load = "load"
    kernels = "kernels"


class Rival(str, Enum):
    """What the result is compared with, in the same run."""

    transformers = "transformers"


DEFAULTS: dict[str, Any] = {
    "model": None,
    "preset": None,
    "prompt_tokens": 128,
    "new_tokens": 128,
    "batch": 1,
    "runs": 5,
    "compare": None,
}
OPTIONS_OF = {
    Kind.decode: set(DEFAULTS),
    Kind.prefill: set(DEFAULTS) - {"new_tokens"},
    Kind.load: {"model", "preset", "runs"},
    Kind.kernels: {"runs"},
}


def bench(
    kind: Annotated[Kind, typer.Argument(help="What to measure.")],
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", metavar="DIR|NAME", help="Folder, hub id, or smollm2-135m."),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="A full-size architecture (with --random-weights)."),
    ] = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Do not load weights, draw them.")
    ] = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    prompt_tokens: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Length of the prompt (128).")
    ] = None,
    new_tokens: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Tokens to generate (128).")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Sequences at once (1).")
    ] = None,
    runs: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="The median of N counts (5).")
    ] = None,
    compare: Annotated[
        Rival | None, typer.Option(help="Measure this one as well, on the same model.")
    ] = None,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Measure speed: the ceiling first, then the result as a share of it."""
    given = {
        "model": model,
        "preset": preset,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "batch": batch,
        "runs": runs,
        "compare": compare.value if compare else None,
    }
    given = {name: value for name, value in given.items() if value is not None}
    _check(kind, given, random_weights)
    run = import_module(f"hayate.bench.{kind.value}").run
    result = run(
        **{**DEFAULTS, **given},
        random_weights=random_weights,
        device=options.checked_device(device),
        dtype=parse_dtype(dtype),
        report=(lambda line: None) if as_json else print,
    )
    if as_json:
        print(json.dumps(result, ensure_ascii=False))


def _check(kind: Kind, given: dict[str, Any], random_weights: bool) -> None:
    """UsageError for an option that this measurement would ignore, or one that it lacks."""
    if ignored := given.keys() - OPTIONS_OF[kind]:
        option = "--" + sorted(ignored)[0].replace("_", "-")
        raise UsageError(f"{option} means nothing to `bench {kind.value}`; leave it out")
    if "model" in OPTIONS_OF[kind] and ("model" in given) == ("preset" in given):
        raise UsageError("say what to measure: either --model DIR|NAME or --preset NAME")
    if ("preset" in given) != random_weights:
        raise UsageError("--preset NAME and --random-weights go together: a preset has no weights")
