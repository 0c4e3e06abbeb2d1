"""TrainConfig: everything a training run is made of, from a TOML file and the command line.

Each table of the file is a dataclass below; a key it does not have is refused by name. Every field can also be given as
`--table.field value`. The resolved configuration is written into each checkpoint.
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hayate.errors import UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found]


@dataclass(frozen=True)
class ModelSection:
    """What is trained: a preset drawn at random, or a checkpoint folder to go on from."""

    preset: str | None = None  # moe-tiny, moe-150m, moe-1b, moe-6.9b, dense-tiny, ...
    init_from: str | None = None  # folder, or a name that `hayate pull` knows
    init_std: float = (
        0.02  # of random matrices; those that write the residual stream get std / sqrt(2 L)
    )
    vocab_size: int | None = (
        None  # None: of the preset, or of the data's tokenizer where that is larger
    )
    max_position_embeddings: int | None = None  # written to config.json; None: as the preset says


@dataclass(frozen=True)
class DataSection:
    """Folders of `hayate data prepare`."""

    train: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()  # how often each is drawn; empty: by their tokens
    validation: tuple[str, ...] = ()  # empty: the validation.safetensors of the train folders


@dataclass(frozen=True)
class BatchSection:
    sequence_length: int = 1024
    tokens_per_step: int = 65_536  # of all processes; accumulation follows from it
    tokens_per_micro_batch: int = 16_384  # of one process: what stands in memory at once


@dataclass(frozen=True)
class OptimizerSection:
    """AdamW (arXiv 1711.05101)."""

    lr: float = 3e-4  # peak
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # of matrices; norms and biases have none
    decay_embeddings: bool = False
    clip: float = 1.0  # global norm of the gradient; 0: off
    nonfinite: Literal["stop", "skip"] = "stop"  # a step whose gradient is not finite
    max_skipped: int = 10  # in a row, with `skip`


@dataclass(frozen=True)
class ScheduleConfig:
    """See schedule.py."""

    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    num_steps: int = 1000
    warmup_steps: int = 100
    final: float = 0.1  # share of the peak at the end
    decay_share: float = 0.2  # of the run after warm-up, for wsd


@dataclass(frozen=True)
class LossSection:
    """See loss.py."""

    balance: Literal["sequence", "global", "bias", "none"] = "sequence"
    aux: float = 0.01  # coefficient of the load-balancing loss, whose value is 1 when balanced
    z: float = 0.001  # coefficient of the router z-loss
    bias_rate: float = 0.001  # of balance = "bias"


@dataclass(frozen=True)
class PrecisionSection:
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # weights and activations
    master: Literal["float32", "stochastic_rounding"] = (
        "float32"  # how bf16 weights keep small updates
    )
    moments: Literal["float32", "bfloat16", "int8"] = "float32"
    recompute: Literal["none", "selective", "full"] = (
        "none"  # what the backward pass computes again
    )
    deterministic: bool = False


@dataclass(frozen=True)
class CheckpointSection:
    every: int = 500  # steps; 0: at the end only
    keep: int = 2  # the newest; 0: all


@dataclass(frozen=True)
class EvalSection:
    every: int = 250  # steps; 0: at the end only
    tokens: int = 262_144  # of each held-out source
    prompts: tuple[str, ...] = ()  # continued at each evaluation
    sample_tokens: int = 48


@dataclass(frozen=True)
class LogSection:
    every: int = 10  # steps
    router_every: int = 50  # steps between lines of router health
    tensorboard: bool = False
    wandb: str | None = None  # project


@dataclass(frozen=True)
class TrainConfig:
    output: str = "runs/default"
    seed: int = 0
    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    batch: BatchSection = field(default_factory=BatchSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loss: LossSection = field(default_factory=LossSection)
    precision: PrecisionSection = field(default_factory=PrecisionSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    eval: EvalSection = field(default_factory=EvalSection)
    log: LogSection = field(default_factory=LogSection)

    def __post_init__(self) -> None:
        _check(self)

    @property
    def sequences_per_step(self) -> int:
        return self.batch.tokens_per_step // self.batch.sequence_length

    @property
    def sequences_per_micro_batch(self) -> int:
        return self.batch.tokens_per_micro_batch // self.batch.sequence_length

    def to_dict(self) -> dict[str, Any]:
        """As the TOML file that would give this configuration, None left out."""
        return {k: v for k, v in _plain(dataclasses.asdict(self)).items() if v is not None}


def load_train_config(file: Path | None, overrides: Mapping[str, str]) -> TrainConfig:
    """The configuration of `file` (None: the defaults), with `overrides`: 'optimizer.lr' -> '3e-4'.

    Raises UsageError naming the file, the field, the value and what is allowed.
    """
    values: dict[str, Any] = {}
    if file is not None:
        try:
            values = tomllib.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(f"{file} cannot be read ({error.strerror})") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UsageError(f"{file} is not valid TOML: {error}") from None
    for name, text in overrides.items():
        _insert(values, name, text)
    return _build(TrainConfig, values, where=str(file or "the command line"), prefix="")


def _build(kind: type, values: Any, *, where: str, prefix: str) -> Any:
    if not isinstance(values, dict):
        raise UsageError(f"{where}: [{prefix.rstrip('.')}] must be a table, it is {values!r}")
    hints = typing.get_type_hints(kind)
    arguments = {}
    for key, value in values.items():
        if key not in hints:
            raise UsageError(f"{where}: {prefix}{key} is unknown{_nearest(key, hints)}")
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            arguments[key] = _build(hint, value, where=where, prefix=f"{key}.")  # type: ignore[arg-type]
        else:
            arguments[key] = _convert(value, hint, f"{where}: {prefix}{key}")
    return kind(**arguments)


def _insert(values: dict[str, Any], name: str, text: str) -> None:
    """Set the field `name` of nested tables to what `text` says."""
    kind: Any = TrainConfig
    *tables, key = name.split(".")
    for table in tables:
        kind = typing.get_type_hints(kind).get(table)
        if not dataclasses.is_dataclass(kind):
            raise UsageError(
                f"--{name} is unknown{_nearest(table, typing.get_type_hints(TrainConfig))}"
            )
        values = values.setdefault(table, {})
    hints = typing.get_type_hints(kind)
    if key not in hints or dataclasses.is_dataclass(hints[key]):
        raise UsageError(f"--{name} is unknown{_nearest(key, hints)}")
    values[key] = _convert(_parse(text, hints[key]), hints[key], f"--{name}")


def _nearest(key: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"


def _parse(text: str, hint: Any) -> Any:
    """A word of the command line as a value of TOML."""
    if typing.get_origin(hint) is tuple:
        element = typing.get_args(hint)[0]
        return [_parse(part, element) for part in text.split(",") if part]
    if str in (hint, *typing.get_args(hint)) or typing.get_origin(hint) is Literal:
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _convert(value: Any, hint: Any, where: str) -> Any:
    """`value` checked against the type of its field; lists become tuples, integers floats where one is asked for."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in arguments:
            raise UsageError(f"{where} must be one of {', '.join(arguments)}; it is {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UsageError(f"{where} must be a list; it is {value!r}")
        return tuple(_convert(v, arguments[0], where) for v in value)
    if type(None) in arguments:
        hint = next(a for a in arguments if a is not type(None))
        return None if value is None else _convert(value, hint, where)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise UsageError(f"{where} must be {_TYPE_NAMES[hint]}; it is {value!r}")
    return value


_TYPE_NAMES = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items() if v is not None}
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def _check(config: TrainConfig) -> None:
    batch, optimizer, schedule = config.batch, config.optimizer, config.schedule

    def require(condition: bool, name: str, value: object, expected: str) -> None:
        if not condition:
            raise UsageError(f"{name} {value} must be {expected}")

    L = batch.sequence_length
    require(L >= 1, "batch.sequence_length", L, "at least 1")
    for name in ("tokens_per_step", "tokens_per_micro_batch"):
        count = getattr(batch, name)
        require(
            count >= L and count % L == 0,
            f"batch.{name}",
            count,
            f"a multiple of the sequence length {L}",
        )
    for name in ("lr", "eps"):
        require(
            getattr(optimizer, name) > 0, f"optimizer.{name}", getattr(optimizer, name), "positive"
        )
    for name in ("beta1", "beta2"):
        beta = getattr(optimizer, name)
        require(0 <= beta < 1, f"optimizer.{name}", beta, "at least 0 and below 1")
    for name in ("weight_decay", "clip"):
        require(
            getattr(optimizer, name) >= 0,
            f"optimizer.{name}",
            getattr(optimizer, name),
            "at least 0",
        )
    require(schedule.num_steps >= 1, "schedule.num_steps", schedule.num_steps, "at least 1")
    require(
        0 <= schedule.warmup_steps < schedule.num_steps,
        "schedule.warmup_steps",
        schedule.warmup_steps,
        f"at least 0 and below num_steps ({schedule.num_steps})",
    )
    require(0 <= schedule.final <= 1, "schedule.final", schedule.final, "between 0 and 1")
    require(
        0 < schedule.decay_share <= 1,
        "schedule.decay_share",
        schedule.decay_share,
        "above 0, at most 1",
    )
    require(
        config.precision.dtype == "bfloat16" or config.precision.master == "float32",
        "precision.master",
        config.precision.master,
        "float32 where the weights are float32",
    )
    for name in ("every", "keep"):
        count = getattr(config.checkpoint, name)
        require(count >= 0, f"checkpoint.{name}", count, "at least 0")
    require(config.log.every >= 1, "log.every", config.log.every, "at least 1")
    weights = config.data.weights
    require(
        not weights or len(weights) == len(config.data.train),
        "data.weights",
        list(weights),
        f"one a source; there are {len(config.data.train)}",
    )
