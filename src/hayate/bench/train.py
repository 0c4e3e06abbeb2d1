"""`hayate bench train`: tokens a second of whole training steps (forward, backward, clipping, AdamW), against
transformers."""

from __future__ import annotations

import gc
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from hayate.bench import roofline
from hayate.bench.subject import environment
from hayate.checkpoint.writer import save
from hayate.errors import HayateError, UsageError
from hayate.kernels import training as ops
from hayate.models.decoder import CausalLM, build_model, init_random
from hayate.models.weights import placements
from hayate.runtime.device import device_errors, peak_memory_bytes, resolve_device
from hayate.training.config import ModelSection, TrainConfig, load_train_config
from hayate.training.forward import TrainingBatch, TrainingModel
from hayate.training.loss import LossParts, StepLoss, StepSize
from hayate.training.metrics import peak_matrix_rate, training_flops_per_token
from hayate.training.model_source import config_json, load_weights, model_config
from hayate.training.optimizer import Optimizer

WARMUP_STEPS = 2


@dataclass(frozen=True)
class Tokens:
    """One step's random tokens: M sequences of L, a document each, all on the device."""

    ids: Tensor  # (M, L)
    targets: Tensor  # (M, L)
    micro: int  # sequences of a micro-batch

    @classmethod
    def random(cls, config: TrainConfig, vocab_size: int, device: torch.device) -> Tokens:
        generator = torch.Generator().manual_seed(config.seed)
        shape = (config.sequences_per_step, config.batch.sequence_length + 1)
        ids = torch.randint(3, vocab_size, shape, generator=generator).to(device)
        return cls(
            ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), config.sequences_per_micro_batch
        )

    def micro_batches(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.ids.split(self.micro), self.targets.split(self.micro), strict=True))


class Contender(Protocol):
    def loss(self, tokens: Tokens) -> float:
        """Mean cross-entropy a target, in nats; nothing changes."""

    def step(self, tokens: Tokens) -> None:
        """One step of the optimizer on all of `tokens`."""


class Hayate:
    """The step of `hayate train`, the balancing loss included."""

    def __init__(self, model: CausalLM, config: TrainConfig) -> None:
        self.config = config
        runner = TrainingModel(
            model.train().requires_grad_(True),
            config.batch.sequence_length,
            recompute=config.precision.recompute,
        )
        self.runner, self.loss_of = runner, StepLoss(runner, config.loss)
        self.optimizer = Optimizer(model, config.optimizer, config.precision, seed=config.seed)

    @torch.no_grad()
    def loss(self, tokens: Tokens) -> float:
        total = 0.0
        for ids, targets in tokens.micro_batches():
            batch = _batch(ids, targets)
            hidden, _ = self.runner.hidden_states(batch)
            losses = ops.linear_cross_entropy_per_token(hidden, self.runner.head, batch.targets)
            total += float(losses.double().sum())
        return total / tokens.ids.numel()

    def step(self, tokens: Tokens) -> None:
        size = StepSize(tokens.ids.numel(), tokens.ids.numel())
        parts = LossParts.zeros(
            self.loss_of.num_sparse, self.loss_of.num_experts, tokens.ids.device
        )
        for ids, targets in tokens.micro_batches():
            self.loss_of.backward(_batch(ids, targets), size, parts)
        self.optimizer.step(self.config.optimizer.lr)
        self.loss_of.after_step(parts)


class Transformers:
    """The same weights in transformers with torch's fused AdamW, its states in the dtype of the weights."""

    def __init__(self, folder: Path, config: TrainConfig, device: torch.device) -> None:
        try:
            import transformers
        except ImportError:
            raise UsageError("--compare transformers: transformers is not installed") from None
        self.version, self.clip = transformers.__version__, config.optimizer.clip
        dtype = getattr(torch, config.precision.dtype)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self.model.to(device).train()
        optimizer = config.optimizer
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=optimizer.lr,
            betas=(optimizer.beta1, optimizer.beta2),
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            fused=True,
        )

    def _cross_entropy(self, ids: Tensor, targets: Tensor) -> Tensor:
        logits = self.model(input_ids=ids, use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")

    @torch.no_grad()
    def loss(self, tokens: Tokens) -> float:
        return (
            sum(float(self._cross_entropy(*micro)) for micro in tokens.micro_batches())
            / tokens.ids.numel()
        )

    def step(self, tokens: Tokens) -> None:
        for micro in tokens.micro_batches():
            (self._cross_entropy(*micro) / tokens.ids.numel()).backward()
        if self.clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


@dataclass(frozen=True)
class Measured:
    first_loss: float
    last_loss: float
    seconds: list[float]  # of each step after the warm-up
    peak_memory: int

    def rate(self, config: TrainConfig) -> float:
        return config.batch.tokens_per_step / statistics.median(self.seconds)


def run(
    *,
    model: str | None,
    preset: str | None,
    device: str,
    dtype: str,
    config: Path | None,
    sequence_length: int,
    tokens_per_step: int,
    tokens_per_micro_batch: int | None,
    runs: int,
    compare: str | None,
    report: Callable[[str], None],
    **_: Any,
) -> dict[str, Any]:
    """Measure `runs` steps on one batch of random tokens; the speed does not depend on what they say."""
    where = resolve_device(device)
    plan = _configuration(
        config,
        device=where,
        dtype=dtype,
        sequence_length=sequence_length,
        tokens_per_step=tokens_per_step,
        tokens_per_micro_batch=tokens_per_micro_batch or tokens_per_step,
    )
    section = ModelSection(preset=preset, init_from=model)
    fields = config_json(section, 0)
    shape = model_config(fields)
    flops = training_flops_per_token(shape, sequence_length)
    ceiling = roofline.measure_matmul_flops(where, getattr(torch, plan.precision.dtype))
    report(
        f"ceiling: {roofline.teraflops(ceiling)} TFLOP/s of a matrix product over {flops / 1e9:.3g} GFLOP a token "
        f"= {ceiling / flops:,.0f} tok/s"
    )
    tokens = Tokens.random(plan, shape.vocab_size, where)
    theirs = None
    with tempfile.TemporaryDirectory() as scratch, device_errors(where, doing="bench train"):
        ours = _measure(
            lambda: Hayate(_first_weights(section, fields, plan, where, scratch), plan),
            tokens,
            runs,
            where,
        )
        _check_learns("hayate", ours)
        if compare:
            rival_version = ""

            def make_rival() -> Contender:
                nonlocal rival_version
                rival = Transformers(Path(scratch), plan, where)
                rival_version = rival.version
                return rival

            theirs = _measure(
                make_rival, tokens, runs, where, gate=lambda loss: _check_same(ours, loss, plan)
            )
    gate = f"the loss on random tokens falls from {ours.first_loss:.4f} to {ours.last_loss:.4f}"
    if theirs:
        gate += f"; transformers: {theirs.first_loss:.4f} to {theirs.last_loss:.4f}"
    report(f"gate: {gate}")
    result = {
        "bench": "train",
        "model": preset or model,
        "dtype": plan.precision.dtype,
        "tokens": "random",
        "config": plan.to_dict(),
        "flops_per_token": flops,
        "matmul_tflops": round(ceiling / 1e12, 3),
        **_figures(ours, plan, flops, ceiling, where),
        **environment(where),
    }
    report(f"hayate: {_line(result)} (median of {runs} steps)")
    if theirs:
        other = _figures(theirs, plan, flops, ceiling, where)
        ratio = ours.rate(plan) / theirs.rate(plan)
        result |= {f"transformers_{name}": value for name, value in other.items()}
        result["ratio_to_transformers"] = round(ratio, 3)
        report(f"transformers {rival_version}: {_line(other)}; hayate is {ratio:.2f}x as fast")
    return result


def _configuration(
    file: Path | None, *, device: torch.device, dtype: str, **batch: int
) -> TrainConfig:
    """The optimizer, loss and precision of `file`, the batch and the dtype of the command line."""
    overrides = {f"batch.{name}": str(count) for name, count in batch.items()}
    if dtype != "auto":
        overrides["precision.dtype"] = dtype
    elif file is None and device.type == "cpu":
        overrides["precision.dtype"] = "float32"  # few CPUs are fast in bfloat16
    return load_train_config(file, overrides)


def _first_weights(
    section: ModelSection,
    fields: dict[str, Any],
    plan: TrainConfig,
    device: torch.device,
    scratch: str,
) -> CausalLM:
    """The weights that both begin with, written to `scratch` as well."""
    dtype = getattr(torch, plan.precision.dtype)
    model = build_model(model_config(fields), device=device, dtype=dtype)
    if section.init_from is not None:
        from hayate.checkpoint.hub import resolve_model

        load_weights(model, resolve_model(section.init_from))
    else:
        init_random(model, seed=plan.seed)
    save(dict(model.named_parameters()), placements(model.config), scratch)
    (Path(scratch) / "config.json").write_text(json.dumps(fields))
    return model


def _measure(
    make: Callable[[], Contender],
    tokens: Tokens,
    runs: int,
    device: torch.device,
    gate: Callable[[float], None] = lambda loss: None,
) -> Measured:
    """Make the contender, let it do its steps, and free its memory: two do not fit beside each other."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    contender = make()
    first = contender.loss(tokens)
    gate(first)
    seconds = []
    for _ in range(WARMUP_STEPS + runs):
        begin = time.perf_counter()
        contender.step(tokens)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begin)
    memory = peak_memory_bytes(device)
    result = Measured(
        first, contender.loss(tokens), seconds[WARMUP_STEPS:], memory.get("device", memory["host"])
    )
    del contender
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return result


def _check_learns(name: str, measured: Measured) -> None:
    if not measured.last_loss < measured.first_loss:
        raise HayateError(
            f"{name} does not learn: the loss on the same tokens goes from {measured.first_loss:.4f} to "
            f"{measured.last_loss:.4f}; no speed is reported for wrong results"
        )


def _check_same(ours: Measured, theirs: float, plan: TrainConfig) -> None:
    """Means of many tokens' losses: what rounding does to single tokens (2^-9 of a logit in bf16) averages out."""
    limit = 1e-2 if plan.precision.dtype == "bfloat16" else 1e-4
    if not math.isclose(ours.first_loss, theirs, rel_tol=limit):
        raise HayateError(
            f"the loss before the first step is {ours.first_loss:.6f}, in transformers {theirs:.6f}; "
            "no speed is reported for wrong results"
        )


def _figures(
    measured: Measured, plan: TrainConfig, flops: float, ceiling: float, device: torch.device
) -> dict[str, Any]:
    rate = measured.rate(plan)
    figures = {
        "tokens_per_second": round(rate, 1),
        "step_seconds": [round(s, 4) for s in measured.seconds],
        "share_of_ceiling": round(rate * flops / ceiling, 4),
        "peak_memory": measured.peak_memory,  # on a CPU of the process so far
    }
    peak = peak_matrix_rate(device)
    return figures | ({"mfu": round(rate * flops / peak, 4)} if peak else {})


def _line(figures: dict[str, Any]) -> str:
    parts = [
        f"{figures['tokens_per_second']:,.0f} tok/s",
        f"{figures['share_of_ceiling']:.1%} of the ceiling",
    ]
    if "mfu" in figures:
        parts.append(f"MFU {figures['mfu']:.1%}")
    parts.append(f"peak memory {figures['peak_memory'] / 2**30:.1f} GiB")
    return ", ".join(parts)


def _batch(ids: Tensor, targets: Tensor) -> TrainingBatch:
    M, L = ids.shape
    starts = torch.arange(0, M * L, L, dtype=torch.int32, device=ids.device)
    return TrainingBatch(
        ids.flatten(),
        targets.flatten(),
        torch.arange(L, device=ids.device).repeat(M),
        starts.repeat_interleave(L),
        L,
    )
