"""`hayate bench`: measure, beside the ceiling that this device sets. The work is in
`hayate.bench`."""

from __future__ import annotations

import json
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from hayate.cli import options
from hayate.cli.progress import counting_bar
from hayate.config import parse_dtype
from hayate.errors import UsageError


class Kind(str, Enum):
    """What is measured; each is a module of `hayate.bench`."""

    decode = "decode"
    prefill = "prefill"
    ttft = "ttft"
    throughput = "throughput"
    equality = "equality"
    speculation = "speculation"
    load = "load"
    kernels = "kernels"
    train = "train"
    vision = "vision"
    serve = "serve"


class Rival(str, Enum):
    """What the result is compared with, in the same run."""

    transformers = "transformers"


MODEL = ("model", "preset")
ENGINE = (  # options of `LLM`; the default is the engine's
    "kv_memory",
    "max_num_seqs",
    "max_num_batched_tokens",
    "max_chunk_tokens",
    "prefix_cache",
    "batch_invariant",
    "speculative",
    "num_draft_tokens",
    "tensor_parallel",
)
# What each measurement takes, with its default; those of ENGINE have none.
OPTIONS_OF: dict[Kind, dict[str, Any]] = {
    Kind.decode: {
        **dict.fromkeys((*MODEL, *ENGINE, "compare")),
        "prompt_tokens": [128],
        "new_tokens": [128],
        "batch": 1,
        "runs": 5,
    },
    Kind.prefill: {
        **dict.fromkeys((*MODEL, *ENGINE, "compare")),
        "prompt_tokens": [128],
        "batch": 1,
        "runs": 5,
    },
    Kind.ttft: {
        **dict.fromkeys((*MODEL, *ENGINE)),
        "prompt_tokens": [1000, 8192, 32768],
        "new_tokens": [64],
        "runs": 3,
        "cached": False,
    },
    Kind.throughput: {
        **dict.fromkeys((*MODEL, *ENGINE)),
        "requests": 256,
        "input": 1000,
        "output": 200,
    },
    Kind.equality: dict.fromkeys(MODEL),
    Kind.speculation: {
        **dict.fromkeys(("model", "kv_memory", "speculative", "num_draft_tokens")),
        "new_tokens": [256],
        "runs": 3,
    },
    Kind.load: {**dict.fromkeys(MODEL), "runs": 5},
    Kind.kernels: {"runs": 5},
    Kind.train: {
        **dict.fromkeys((*MODEL, "compare", "config", "tokens_per_micro_batch")),
        "sequence_length": 1024,
        "tokens_per_step": 16_384,
        "runs": 5,
    },
    Kind.vision: {
        **dict.fromkeys((*MODEL, "kv_memory", "max_num_batched_tokens", "project_to")),
        "image_size": 512,
        "new_tokens": [128, 512],
        "runs": 5,
    },
    Kind.serve: {
        **dict.fromkeys((*MODEL, *ENGINE, "url", "api_key", "rate", "concurrency")),
        **dict.fromkeys(("slo_ttft", "slo_tpot", "plot")),
        "requests": 256,
        "input": 1000,
        "output": 200,
        "seed": 0,
        "in_process": False,
    },
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
        str | None,
        typer.Option(metavar="N[,N...]", help="Length of the prompt (128); of several for ttft."),
    ] = None,
    new_tokens: Annotated[
        str | None,
        typer.Option(
            metavar="N[,N...]", help="Tokens to generate (128, ttft 64); several for vision."
        ),
    ] = None,
    requests: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Requests handed in at once (256).")
    ] = None,
    input: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Tokens of each request's prompt (1000).")
    ] = None,
    output: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Tokens of each answer (200).")
    ] = None,
    url: Annotated[
        str | None, typer.Option(metavar="URL", help="A server of OpenAI's protocol that runs.")
    ] = None,
    api_key: Annotated[str | None, typer.Option(metavar="KEY", help="For --url.")] = None,
    in_process: Annotated[
        bool, typer.Option("--in-process", help="No server: what HTTP costs is the difference.")
    ] = False,
    rate: Annotated[
        float | None, typer.Option(metavar="R", min=1e-3, help="Requests a second, Poisson.")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Clients that wait their turn (16).")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="Of prompts and arrivals (0).")
    ] = None,
    slo_ttft: Annotated[
        float | None, typer.Option(metavar="MS", min=0, help="Goodput: longest first token.")
    ] = None,
    slo_tpot: Annotated[
        float | None, typer.Option(metavar="MS", min=0, help="Goodput: longest token after it.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw it as a PNG.")] = None,
    cached: Annotated[
        bool, typer.Option("--cached", help="Each prompt a second time, from the prefix cache.")
    ] = False,
    batch: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Sequences at once (1).")
    ] = None,
    runs: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="The median of N counts (5, ttft 3).")
    ] = None,
    compare: Annotated[
        Rival | None, typer.Option(help="Measure this one as well, on the same model.")
    ] = None,
    sequence_length: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Tokens of a training sequence (1024).")
    ] = None,
    tokens_per_step: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Tokens of a training step (16384).")
    ] = None,
    tokens_per_micro_batch: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Of them at once (all).")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Training configuration: optimizer, loss, precision."),
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Side of the image in pixels (512).")
    ] = None,
    project_to: Annotated[
        str | None, typer.Option(metavar="CARD", help="Estimate for another card too: rtx4060.")
    ] = None,
    kv_memory: options.KvMemory = None,
    max_num_seqs: options.MaxNumSeqs = None,
    max_num_batched_tokens: options.MaxNumBatchedTokens = None,
    max_chunk_tokens: options.MaxChunkTokens = None,
    prefix_cache: options.PrefixCache = True,
    batch_invariant: options.BatchInvariant = False,
    speculative: options.Speculative = None,
    num_draft_tokens: options.NumDraftTokens = None,
    tensor_parallel: options.TensorParallel = None,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Measure speed: the ceiling first, then the result as a share of it.

    decode, prefill: batches of one shape. ttft: the first token of one prompt. throughput: many requests at once.
    equality: whether a request's tokens depend on what happens around it. speculation: with drafts and without.
    train: whole training steps on random tokens. vision: describing an image, stage by stage. serve: a server under
    load, by --rate or --concurrency. load, kernels: as they say.
    """
    given = options.given(
        {
            "model": model,
            "preset": preset,
            "prompt_tokens": _lengths(prompt_tokens, "--prompt-tokens"),
            "new_tokens": _lengths(new_tokens, "--new-tokens"),
            "image_size": image_size,
            "project_to": project_to,
            "requests": requests,
            "input": input,
            "output": output,
            "url": url,
            "api_key": api_key,
            "in_process": in_process or None,
            "rate": rate,
            "concurrency": concurrency,
            "seed": seed,
            "slo_ttft": slo_ttft,
            "slo_tpot": slo_tpot,
            "plot": plot,
            "cached": cached or None,
            "batch": batch,
            "runs": runs,
            "compare": compare.value if compare else None,
            "sequence_length": sequence_length,
            "tokens_per_step": tokens_per_step,
            "tokens_per_micro_batch": tokens_per_micro_batch,
            "config": config,
            "kv_memory": kv_memory,
            "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": max_num_batched_tokens,
            "max_chunk_tokens": max_chunk_tokens,
            "prefix_cache": None if prefix_cache else False,
            "batch_invariant": batch_invariant or None,
            "speculative": speculative,
            "num_draft_tokens": num_draft_tokens,
            "tensor_parallel": tensor_parallel,
        }
    )
    _check(kind, given, random_weights)
    chosen = {**OPTIONS_OF[kind], **given}
    for name, takes_several in (("prompt_tokens", Kind.ttft), ("new_tokens", Kind.vision)):
        if name in chosen and kind is not takes_several:
            if len(chosen[name]) > 1:
                option = "--" + name.replace("_", "-")
                text = ",".join(map(str, chosen[name]))
                raise UsageError(f"{option} {text}: `bench {kind.value}` takes one length")
            chosen[name] = chosen[name][0]
    run = import_module(f"hayate.bench.{kind.value}").run
    result = run(
        **{name: value for name, value in chosen.items() if name not in ENGINE},
        engine={name: value for name, value in given.items() if name in ENGINE},
        random_weights=random_weights,
        device=options.checked_device(device),
        dtype=parse_dtype(dtype),
        report=(lambda line: None) if as_json else print,
        bar=counting_bar,
    )
    if as_json:
        print(json.dumps(result, ensure_ascii=False))
    if result.get("interrupted"):
        raise KeyboardInterrupt
    if not result.get("holds", True):
        raise typer.Exit(1)


def _lengths(text: str | None, option: str) -> list[int] | None:
    """'1000,8192' -> [1000, 8192]."""
    if text is None:
        return None
    try:
        lengths = [int(part) for part in text.split(",")]
    except ValueError:
        lengths = [0]
    if min(lengths) < 1:
        raise UsageError(f"{option} {text!r} must be a number of tokens, or several with commas")
    return lengths


def _check(kind: Kind, given: dict[str, Any], random_weights: bool) -> None:
    """UsageError for an option that this measurement would ignore, or one that it lacks."""
    if ignored := given.keys() - OPTIONS_OF[kind].keys():
        option = "--" + sorted(ignored)[0].replace("_", "-")
        option = "--no-prefix-cache" if option == "--prefix-cache" else option
        raise UsageError(f"{option} means nothing to `bench {kind.value}`; leave it out")
    needs_model = "url" not in given  # behind which there is one
    if needs_model and "model" in OPTIONS_OF[kind] and ("model" in given) == ("preset" in given):
        raise UsageError("say what to measure: either --model DIR|NAME or --preset NAME")
    if ("preset" in given) != random_weights:
        raise UsageError("--preset NAME and --random-weights go together: a preset has no weights")
    options.check_speculation(given)
