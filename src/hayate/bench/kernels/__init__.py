"""`hayate bench kernels`: each kernel beside what memory and matrix units allow, once its results are right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hayate.bench import roofline
from hayate.bench.kernels import attending, heads, products, rowwise
from hayate.bench.kernels.case import Case, Setting, tensors
from hayate.bench.kernels.warm import compile_all
from hayate.bench.subject import environment
from hayate.bench.timing import Pass, medians, num_copies
from hayate.errors import HayateError
from hayate.runtime.device import resolve_device

FAMILIES: dict[str, Callable[[Setting], list[Case]]] = {
    "elementwise": rowwise.elementwise_cases,
    "softmax": rowwise.softmax_cases,
    "softmax_topk": rowwise.softmax_topk_cases,
    "rmsnorm": rowwise.rmsnorm_cases,
    "rmsnorm_residual": rowwise.rmsnorm_residual_cases,
    "layernorm1p": rowwise.layernorm1p_cases,
    "embedding": rowwise.embedding_cases,
    "rope_and_cache": heads.rope_cases,
    "argmax": heads.argmax_cases,
    "sample": heads.sample_cases,
    "moe_route": products.moe_route_cases,
    "moe_mlp": products.moe_mlp_cases,
    "decode attention": attending.decode_cases,
    "prompt attention": attending.prompt_cases,
    "flash attention": attending.flash_cases,
    "linear": products.linear_cases,
}

_HEADER = (
    f"{'kernel':17} {'shape':34} {'us':>10} {'rate':>13} {'floor us':>9} {'share':>6}  rival us"
)


def run(
    *, device: str, dtype: str, runs: int, report: Callable[[str], None], **_: Any
) -> dict[str, Any]:
    """Check and time every kernel family; one that is wrong gets no figures.

    Raises HayateError at the end when a family was wrong, naming it.
    """
    target = resolve_device(device)
    if target.type == "cuda":
        torch.cuda.set_device(target)
    on = Setting(target, torch.bfloat16 if dtype == "auto" else getattr(torch, dtype))
    bandwidth = roofline.measure_read_bandwidth(target)
    matmul = roofline.measure_matmul_flops(target, on.dtype)
    torch.manual_seed(0)
    report(
        f"ceiling: {bandwidth / 1e9:,.1f} GB/s read bandwidth, {matmul / 1e12:,.2f} TFLOP/s in a matrix product; "
        f"a floor is the slower of a call's bytes and operations at those rates"
    )
    if on.gpu:
        compile_all({name: len(family(on)) for name, family in FAMILIES.items()}, on, report)
    report("gate: a family is timed where all its results are right, to rounding, against float64")
    report(_HEADER)
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    for name, family in FAMILIES.items():
        try:
            found = [_measure(case, on, runs) for case in family(on)]
        except _Wrong as error:
            failed.append(f"{name} ({error})")
            report(f"{name:17} FAILED: {error}")
            continue
        finally:
            if on.gpu:
                torch.cuda.empty_cache()
        for row in found:
            row = {"kernel": name, **_with_floor(row, bandwidth, matmul)}
            rows.append(row)
            report(_line(row))
    if failed:
        raise HayateError(f"wrong results, so no speed is reported: {'; '.join(failed)}")
    return {
        "bench": "kernels",
        "dtype": str(on.dtype).removeprefix("torch."),
        "read_bandwidth_gbs": round(bandwidth / 1e9, 2),
        "matmul_tflops": round(matmul / 1e12, 6),
        "kernels": rows,
        **environment(target),
    }


class _Wrong(Exception):
    """A kernel's result is not what its formula gives, or it failed to run; says which and how."""


def _measure(case: Case, on: Setting, runs: int) -> dict[str, Any]:
    """The seconds of one call of the case and of its rivals; _Wrong without any if the result is."""
    row: dict[str, Any] = {"shape": case.shape, "note": case.note, "seconds": None, "rivals": {}}
    row |= {"num_bytes": case.num_bytes, "flops": case.flops}
    try:
        operands = [case.make()]
        size = sum(x.nbytes for x in tensors(operands[0]))
        copies = num_copies(on.device, touched=case.num_bytes, size=size)
        operands += [case.make() for _ in range(copies - 1)]
    except torch.OutOfMemoryError:
        return row | {"note": "skipped: the memory is too small"}
    # A guess is enough here: it decides how many calls are timed together.
    least = case.num_bytes / 5e12 + case.flops / 1e15
    try:
        ours = Pass(case.run, operands, on.device, least_seconds=least)
        if on.gpu:  # the graph writes to the same memory each time; it must overwrite all of this
            ours.run()
            _poison(ours.first)
        ours.run()
        error = case.error(operands[0], ours.first)
    except torch.OutOfMemoryError:
        return row | {"note": "skipped: the memory is too small"}
    except Exception as failure:  # whatever a kernel raises says that this family does not work
        message = (str(failure).strip() or "no message").splitlines()[0]
        raise _Wrong(f"{case.shape}: {type(failure).__name__}: {message}") from failure
    if not error <= 1:
        raise _Wrong(f"{case.shape}: the error is {error:.3g} times what rounding allows")
    rivals = {}
    for name, function in case.rivals.items():
        try:
            rivals[name] = Pass(function, operands, on.device, least_seconds=least)
        except RuntimeError:  # this backend does not exist here
            continue
    row["seconds"], *others = medians([ours, *rivals.values()], runs)
    row["rivals"] = dict(zip(rivals, others, strict=True))
    return row


def _poison(result: Any) -> None:
    """Overwrite a result in place, so that the next replay of the graph must write all of it."""
    for x in tensors(result):
        x.fill_(float("nan") if x.is_floating_point() else -7)


def _with_floor(row: dict[str, Any], bandwidth: float, matmul: float) -> dict[str, Any]:
    """The row in its final form: microseconds, rates, floor, share."""
    memory, math = row["num_bytes"] / bandwidth, row["flops"] / matmul
    floor, seconds = max(memory, math), row["seconds"]
    result: dict[str, Any] = {
        "shape": row["shape"],
        "note": row["note"],
        "bytes": int(row["num_bytes"]),
        "flops": int(row["flops"]),
        "bound": "memory" if memory >= math else "compute",
        "floor_us": round(floor * 1e6, 3),
    }
    if seconds is None:
        return result | {"us": None, "share": None}
    return result | {
        "us": round(seconds * 1e6, 3),
        "share": round(floor / seconds, 4),
        "gbs": round(row["num_bytes"] / seconds / 1e9, 2),
        "tflops": round(row["flops"] / seconds / 1e12, 4),
        "rivals_us": {name: round(s * 1e6, 3) for name, s in row["rivals"].items()},
    }


def _line(row: dict[str, Any]) -> str:
    """A line of the table."""
    start = f"{row['kernel']:17} {row['shape']:34}"
    if row["us"] is None:
        return f"{start} {row['note']}"
    fast = f"{row['gbs']:,.0f} GB/s" if row["bound"] == "memory" else f"{row['tflops']:.4g} TFLOP/s"
    rivals = ", ".join(f"{name} {us:,.2f}" for name, us in row["rivals_us"].items())
    figures = f"{row['us']:10,.2f} {fast:>13} {row['floor_us']:9,.2f} {row['share']:6.1%}"
    return "  ".join(part for part in (f"{start} {figures}", rivals, row["note"]) if part)
