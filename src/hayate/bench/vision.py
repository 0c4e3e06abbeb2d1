"""`hayate bench vision`: describing an image, stage by stage, each beside the least time that it can take."""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from PIL import Image

from hayate.bench import roofline
from hayate.bench.gates import check_decode
from hayate.bench.roofline import StepCost
from hayate.bench.subject import environment, open_llm
from hayate.bench.vision_costs import CARDS, Card, stage_costs
from hayate.config import format_bytes
from hayate.errors import HayateError, UsageError
from hayate.models.vision_config import VisionConfig
from hayate.runtime.conversation import Conversation, PromptImage
from hayate.runtime.llm import LLM
from hayate.vision.image import open_image, preprocess
from hayate.vision.slicing import SlicePlan, plan_slices
from hayate.vision_core.profile import DEFAULT_SAMPLING

TEXT_TOKENS = 150  # of the prompt: chat template, instruction and fields of the built-in form
_BEFORE = 20  # of them, in front of the image
STAGES = ("jpeg", "preprocess", "encode", "prefill", "decode")  # the last one is a token's


def run(
    *,
    model: str | None,
    preset: str | None,
    device: str,
    dtype: str,
    image_size: int,
    new_tokens: list[int],
    runs: int,
    project_to: str | None,
    engine: dict[str, Any],
    report: Callable[[str], None],
    **_: Any,
) -> dict[str, Any]:
    """Measure one request at a time with VisionCore's sampling options, without the form's grammar."""
    if project_to is not None and project_to not in CARDS:
        raise UsageError(f"--project-to {project_to!r} is unknown; choose from {', '.join(CARDS)}")
    if min(new_tokens) < 2:
        raise UsageError(f"--new-tokens {min(new_tokens)}: decoding begins with the second token")
    plan, vision = _plan(model, preset, image_size)
    prompt_tokens = TEXT_TOKENS + plan.num_pictures * (vision.num_queries + 2)
    llm = open_llm(
        model=model,
        preset=preset,
        device=device,
        dtype=dtype,
        batch=1,
        length=prompt_tokens + max(new_tokens),
        **engine,
    )
    here = Card(
        environment(llm.device)["device"],
        roofline.measure_read_bandwidth(llm.device),
        roofline.measure_matmul_flops(llm.device, getattr(torch, llm.plan.dtype)),
    )
    report(
        f"ceiling: {here.read_bandwidth / 1e9:,.1f} GB/s, {roofline.teraflops(here.matmul_flops)} TFLOP/s"
    )
    costs = stage_costs(llm, plan, prompt_tokens=prompt_tokens, new_tokens=max(new_tokens))
    check_decode(llm, _text_ids(llm)[:64], new_tokens=8)
    _check_encoder(llm, plan)
    report(
        "gate: decoded tokens agree with one prefill; a picture's embeddings do not depend on the others"
    )
    files = [_jpeg(image_size, seed) for seed in range(runs + 1)]
    measured = [_once(llm, plan, file, new_tokens) for file in files][1:]  # the first warms up
    seconds = {name: statistics.median(m[name] for m in measured) for name in measured[0]}
    stages = {name: _stage(seconds[name], costs.get(name), here) for name in STAGES}
    report(
        f"image {image_size}x{image_size}: {plan.num_pictures} pictures, {plan.num_patches} patches, "
        f"{prompt_tokens} tokens of prompt (median of {runs})"
    )
    _print(llm, stages, seconds, new_tokens, report)
    result: dict[str, Any] = {
        "bench": "vision",
        "model": preset or model,
        "image_size": image_size,
        "num_pictures": plan.num_pictures,
        "prompt_tokens": prompt_tokens,
        "read_bandwidth_gbs": _digits(here.read_bandwidth / 1e9),
        "matmul_tflops": _digits(here.matmul_flops / 1e12),
        "stages": stages,
        **_figures(llm, seconds, new_tokens),
    }
    if project_to is not None:
        card = CARDS[project_to]
        result["projection"] = _project(card, seconds, costs, here, new_tokens, report)
    return result


def _figures(llm: LLM, seconds: dict[str, float], new_tokens: list[int]) -> dict[str, Any]:
    return {
        "first_token_ms": round(seconds["first_token"] * 1e3, 3),
        "tokens_per_second": round(1 / seconds["decode"], 2),
        "seconds": {str(count): _digits(seconds[f"total_{count}"]) for count in new_tokens},
        "dtype": llm.plan.dtype,
        "weight_bytes": llm.plan.weight_bytes,
        "peak_memory_bytes": llm.peak_memory_bytes(),
        **environment(llm.device),
    }


def _print(
    llm: LLM,
    stages: dict[str, dict[str, float]],
    seconds: dict[str, float],
    new_tokens: list[int],
    report: Callable[[str], None],
) -> None:
    for line in _table(stages):
        report(line)
    report(f"first token after {seconds['first_token'] * 1e3:,.1f} ms")
    for count in new_tokens:
        report(f"{count} new tokens: {seconds[f'total_{count}']:.2f} s")
    peak = ", ".join(f"{format_bytes(b)} {where}" for where, b in llm.peak_memory_bytes().items())
    report(f"peak memory: {peak}; weights {format_bytes(llm.plan.weight_bytes)}")


def _plan(model: str | None, preset: str | None, side: int) -> tuple[SlicePlan, VisionConfig]:
    """How an image of `side` squared is cut."""
    from hayate.checkpoint.hub import resolve_model
    from hayate.models import load_config, preset_config

    config = preset_config(preset) if preset else load_config(resolve_model(str(model)))
    vision = config.vision
    if vision is None:
        raise UsageError(f"{preset or model} takes no images; `bench vision` is for models that do")
    plan = plan_slices(
        side,
        side,
        max_slices=vision.max_slices if vision.slice_mode else 1,
        resolution=vision.slice_side,
        patch_size=vision.patch_size,
    )
    return plan, vision


def _jpeg(side: int, seed: int) -> bytes:
    """A file of the size that photographs have: shapes of every size, and grain."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((side, side, 3))
    for blocks in (4, 16, 64):
        noise = rng.integers(0, 256, (blocks, blocks, 3), dtype=np.uint8)
        shapes = Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC)
        pixels += np.asarray(shapes) / 3
    pixels += rng.normal(0, 4, pixels.shape)
    file = io.BytesIO()
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


def _text_ids(llm: LLM) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, llm.config.vocab_size, (TEXT_TOKENS,), generator=generator).tolist()


def _prompt(llm: LLM, plan: SlicePlan, pixels: np.ndarray) -> Conversation:
    """Random tokens around an image; a picture stands between two tags."""
    vision, ids = llm.config.vision, _text_ids(llm)
    assert vision is not None
    picture = ids[:1] * (vision.num_queries + 2)
    starts = [_BEFORE + 1 + i * len(picture) for i in range(plan.num_pictures)]
    shown = PromptImage(pixels, plan, sha256(pixels.data).digest(), starts, vision.num_queries)
    return Conversation(None, ids[:_BEFORE] + picture * plan.num_pictures + ids[_BEFORE:], [shown])


def _once(llm: LLM, plan: SlicePlan, file: bytes, new_tokens: list[int]) -> dict[str, float]:
    """Seconds of each stage, to the first token, and in all for each number of new tokens."""
    seconds: dict[str, float] = {}
    for count in sorted(new_tokens):
        _forget(llm)
        params = replace(DEFAULT_SAMPLING, max_tokens=count, ignore_eos=True, seed=0)
        begin = time.perf_counter()
        pixels = open_image(file)
        opened = time.perf_counter() - begin
        output = llm.generate(_prompt(llm, plan, pixels), params)[0]
        seconds[f"total_{count}"] = time.perf_counter() - begin
        m = output.metrics
        known = m.image_preprocess_time + m.image_encode_time
        seconds |= {
            "jpeg": opened,
            "preprocess": m.image_preprocess_time,
            "encode": m.image_encode_time,
            "prefill": m.time_to_first_token - known,
            "first_token": opened + m.time_to_first_token,
            "decode": 1 / m.decode_tokens_per_second,
        }
    return seconds


def _forget(llm: LLM) -> None:
    """Each measurement begins without what the one before has left."""
    llm.engine.pages.forget()
    llm.engine.images.forget()


def _check_encoder(llm: LLM, plan: SlicePlan) -> None:
    """Raise unless each picture of a random image alone gives what it gives beside the others."""
    width, height = plan.size
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    dtype: torch.dtype = getattr(torch, llm.plan.dtype)
    pictures = preprocess(image, plan, llm.device, dtype)
    network: Any = llm.engine.runner.model
    together = network.encode(pictures.patches, pictures.sizes).float()
    pieces = pictures.patches.split([h * w for h, w in pictures.sizes])
    alone = torch.cat(
        [network.encode(p, [size]).float() for p, size in zip(pieces, pictures.sizes, strict=True)]
    )
    layers = llm.config.vision.num_layers if llm.config.vision else 0
    # As in `gates.tie_limit`: relative rounding, over about 8 roundings a layer, five standard deviations.
    limit = 5 * torch.finfo(dtype).eps / 4 * (8 * layers) ** 0.5
    error = float((together - alone).abs().max() / together.abs().max())
    if not error <= limit:
        raise HayateError(
            f"a picture's embeddings depend on the pictures beside it: they differ by {error:.3g} of the scale "
            f"(limit {limit:.3g}); no speed is reported for wrong results"
        )


def _digits(value: float) -> float:
    """Five digits, however small the value."""
    return float(f"{value:.5g}")


def _stage(seconds: float, cost: StepCost | None, here: Card) -> dict[str, float]:
    row = {"ms": _digits(seconds * 1e3)}
    if cost is not None:
        floor = here.floor(cost)
        row |= {
            "bytes": int(cost.num_bytes),
            "flops": cost.flops,
            "floor_ms": _digits(floor * 1e3),
            "share_of_ceiling": _digits(floor / seconds),
        }
    return row


def _table(stages: dict[str, dict[str, float]]) -> list[str]:
    lines = [f"{'stage':<12}{'ms':>10}{'GB':>9}{'TFLOP':>9}{'ceiling':>9}"]
    for name, row in stages.items():
        text = f"{name + (' /token' if name == 'decode' else ''):<12}{row['ms']:>10,.3f}"
        if "bytes" in row:
            text += f"{row['bytes'] / 1e9:>9.3f}{row['flops'] / 1e12:>9.3g}{row['share_of_ceiling']:>9.1%}"
        lines.append(text)
    return lines


def _project(
    card: Card,
    seconds: dict[str, float],
    costs: dict[str, StepCost],
    here: Card,
    new_tokens: list[int],
    report: Callable[[str], None],
) -> dict[str, Any]:
    """Each stage on another card: at the share of its ceiling that was reached here, and at the ceiling itself.

    The JPEG is decoded by the processor, and counts as measured here.
    """
    floors = {"jpeg": seconds["jpeg"], **{name: card.floor(c) for name, c in costs.items()}}
    times = {
        name: floor * seconds[name] / here.floor(costs[name]) if name in costs else floor
        for name, floor in floors.items()
    }

    def total(by_stage: dict[str, float], count: int) -> float:
        return sum(by_stage[n] for n in STAGES[:-1]) + (count - 1) * by_stage["decode"]

    report(
        f"projected to {card.name} ({card.read_bandwidth / 1e9:.0f} GB/s, {card.matmul_flops / 1e12:.1f} TFLOP/s), "
        "each stage at the share of the ceiling measured here; in brackets at the ceiling:"
    )
    for name in STAGES:
        report(f"  {name:<12}{times[name] * 1e3:>10,.2f} ms  ({floors[name] * 1e3:,.2f})")
    projected = {}
    for count in new_tokens:
        projected[str(count)] = _digits(total(times, count))
        report(f"  {count} new tokens: {total(times, count):.2f} s  ({total(floors, count):.2f})")
    return {
        "card": card.name,
        "read_bandwidth_gbs": card.read_bandwidth / 1e9,
        "matmul_tflops": round(card.matmul_flops / 1e12, 2),
        "stages_ms": {name: _digits(t * 1e3) for name, t in times.items()},
        "floors_ms": {name: _digits(t * 1e3) for name, t in floors.items()},
        "seconds": projected,
        "floor_seconds": {str(c): _digits(total(floors, c)) for c in new_tokens},
    }
