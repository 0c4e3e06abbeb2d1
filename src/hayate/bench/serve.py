"""`hayate bench serve`: many clients at once, over HTTP or in this process: latencies, throughput, goodput.

The client is one thread and must not be what is measured. `http_client` costs it some ten microseconds a piece of
an answer (7.6 were measured, with 40,000 pieces from 8 streams at once), and its processor time is reported beside
the result: with `client_share` near 1 the figures are the client's. In an open loop times count from the moment a
request was due, so that a late client shows in the first tokens instead of hiding there.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from hayate.bench.burst import Progress, percentiles
from hayate.bench.serve_load import Measurement, Workload, run_load
from hayate.bench.serve_targets import Endpoint, InProcess, Target, own_server
from hayate.bench.subject import environment
from hayate.errors import UsageError
from hayate.runtime.async_llm import AsyncLLM
from hayate.runtime.device import resolve_device

_BUSY = 0.7  # share of a processor from which on the client itself is in question


def run(
    *,
    model: str | None,
    preset: str | None,
    url: str | None,
    api_key: str | None,
    in_process: bool,
    device: str,
    dtype: str,
    rate: float | None,
    concurrency: int | None,
    requests: int,
    input: int,
    output: int,
    seed: int,
    slo_ttft: float | None,
    slo_tpot: float | None,
    plot: Path | None,
    engine: dict[str, Any],
    report: Callable[[str], None],
    bar: Callable[[str], AbstractContextManager[Progress | None]],
    **_: Any,
) -> dict[str, Any]:
    """Send the workload to `url`; without one, to a server of `model` in a process of its own or, with
    `in_process` or a preset, to an AsyncLLM in this process.

    slo_ttft, slo_tpot: milliseconds to the first token, and a token after it, that an answer may take to count
    as goodput. engine: options of `AsyncLLM`. Ctrl-C ends the load; what was answered until then is reported.
    """
    if rate is not None and concurrency is not None:
        raise UsageError(
            "--rate and --concurrency exclude each other: say when requests come, or how many at once"
        )
    local = preset or in_process or engine or (device, dtype) != ("auto", "auto")
    _check(url, api_key, bool(local), plot)
    concurrency = concurrency or (None if rate else 16)
    workload = Workload(requests, input, output, seed, rate, concurrency)
    report(f"load: {workload.describe()}")
    how = "in process" if in_process or preset else "over HTTP"
    with contextlib.ExitStack() as stack:
        target: Target
        if how == "in process":
            target = InProcess(_open(model, preset, {"device": device, "dtype": dtype, **engine}))
        elif url is None:
            assert model is not None
            address = stack.enter_context(own_server(model, _serve_options(device, dtype, engine)))
            target = Endpoint(address, None, None)
        else:
            target = Endpoint(url, api_key, model)
        with bar("requests") as progress:
            measurement = asyncio.run(run_load(target, workload, progress))
    result = {
        "bench": "serve",
        "model": preset or model,
        "url": url,
        "mode": how,
        **{
            name: getattr(workload, name)
            for name in ("requests", "input", "output", "seed", "rate", "concurrency")
        },
        "exact_lengths": target.exact,
        **figures(measurement, slo_ttft, slo_tpot),
        **_environment(url, device),
    }
    _report(result, report)
    if plot is not None:
        from hayate.bench.serve_plot import draw

        draw(measurement.answers, f"{preset or model or url}: {workload.describe()}", plot)
        report(f"plot: {plot}")
    return result


def _check(url: str | None, api_key: str | None, local: bool, plot: Path | None) -> None:
    """UsageError for options that would be ignored, and for a picture that could not be drawn after minutes."""
    if url is not None and local:
        raise UsageError(
            "--url is a server that runs already: options of the engine mean nothing to it"
        )
    if api_key is not None and url is None:
        raise UsageError("--api-key is for --url: no other server is asked")
    if plot is not None:
        from hayate.training.plot import open_pyplot

        open_pyplot()


def _open(model: str | None, preset: str | None, options: dict[str, Any]) -> AsyncLLM:
    if preset is not None:
        return AsyncLLM.from_random(preset, **options)
    assert model is not None
    return AsyncLLM(model, **options)


def _serve_options(device: str, dtype: str, engine: dict[str, Any]) -> list[str]:
    """The engine's options as those of `hayate serve`."""
    arguments = ["--device", device, "--dtype", dtype]
    for name, value in engine.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{option}" if value else f"--no-{option}")
        else:
            arguments += [f"--{option}", str(value)]
    return arguments


def _environment(url: str | None, device: str) -> dict[str, str]:
    if url is None:
        return environment(resolve_device(device))
    here = environment(resolve_device("cpu"))  # of the client: the server does not say
    return {name: here[name] for name in ("hayate", "python", "date")}


# -- the result ------------------------------------------------------------------------------------


def figures(
    measurement: Measurement, slo_ttft: float | None, slo_tpot: float | None
) -> dict[str, Any]:
    """Counts, rates over the whole run, and percentiles in milliseconds over the complete answers."""
    answers, complete = measurement.answers, measurement.complete
    errors = Counter(a.error for a in answers if a.error is not None)
    seconds = measurement.seconds or float("inf")
    generated = sum(a.num_generated for a in complete)
    prompt = sum(a.num_prompt for a in complete)
    result = {
        "complete": len(complete),
        "failed": sum(errors.values()),
        "errors": dict(errors.most_common(5)),
        "interrupted": measurement.interrupted,
        "holds": not errors,
        "seconds": round(measurement.seconds, 4),
        "requests_per_second": round(len(complete) / seconds, 4),
        "output_tokens_per_second": round(generated / seconds, 2),
        "total_tokens_per_second": round((generated + prompt) / seconds, 2),
        "ttft_ms": percentiles([a.first_token for a in complete]),
        "tpot_ms": percentiles([a.per_token for a in complete if a.num_generated > 1]),
        "itl_ms": percentiles([gap for a in complete for gap in a.gaps]),
        "client_share": round(measurement.client_seconds / seconds, 4),
    }
    if slo_ttft is not None or slo_tpot is not None:
        good = sum(
            1e3 * a.first_token <= (slo_ttft or float("inf"))
            and 1e3 * a.per_token <= (slo_tpot or float("inf"))
            for a in complete
        )
        result |= {
            "slo_ttft_ms": slo_ttft,
            "slo_tpot_ms": slo_tpot,
            "goodput_requests_per_second": round(good / seconds, 4),
            "goodput_share": round(good / max(len(answers), 1), 4),
        }
    return result


def _report(result: dict[str, Any], report: Callable[[str], None]) -> None:
    cut = ", interrupted" if result["interrupted"] else ""
    report(
        f"answers: {result['complete']} complete, {result['failed']} failed{cut} ({result['mode']})"
    )
    for error, count in result["errors"].items():
        report(f"error: {count} x {error}")
    if not result["exact_lengths"]:
        report("lengths: the endpoint refuses ignore_eos, so answers may be shorter")
    report(
        f"throughput: {result['requests_per_second']:,.2f} requests/s, {result['output_tokens_per_second']:,.1f} "
        f"output tok/s, {result['total_tokens_per_second']:,.1f} tok/s with the prompts"
    )
    for name, key in (
        ("first token", "ttft_ms"),
        ("per token after it", "tpot_ms"),
        ("between pieces", "itl_ms"),
    ):
        times = result[key]
        report(
            f"{name}: median {times['p50']:,.1f} ms, 90 % {times['p90']:,.1f} ms, 99 % {times['p99']:,.1f} ms"
        )
    if "goodput_share" in result:
        report(
            f"goodput: {result['goodput_requests_per_second']:,.2f} requests/s, {result['goodput_share']:.0%} of "
            "the requests within the limits"
        )
    doubt = "; it may be what limits the figures" if result["client_share"] > _BUSY else ""
    report(f"client: {result['client_share']:.0%} of one processor{doubt}")
