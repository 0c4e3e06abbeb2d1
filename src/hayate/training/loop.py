"""Trainer: the loop. Batches in, gradients summed over micro-batches, one optimizer step, figures, checkpoints."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hayate.errors import ModelError, UsageError
from hayate.runtime.device import device_errors, peak_memory_bytes
from hayate.training.config import TrainConfig
from hayate.training.evaluation import Evaluator
from hayate.training.forward import TrainingBatch, TrainingModel
from hayate.training.loss import LossParts, StepLoss, StepSize
from hayate.training.metrics import MetricsLog, peak_matrix_rate, training_flops_per_token
from hayate.training.model_source import config_json, load_weights, new_model
from hayate.training.optimizer import Optimizer
from hayate.training.parallel import World
from hayate.training.prepare import TRAIN_FILE, VALIDATION_FILE
from hayate.training.schedule import learning_rate_share
from hayate.training.sharded_parameters import ShardedParameters
from hayate.training.sliced_state import StateSlice
from hayate.training.state import Checkpointer, SavedStep, find_checkpoints, load_state
from hayate.training.token_file import TokenFile
from hayate.training.token_stream import TokenStream

Report = Callable[[dict[str, Any]], None]


@dataclass
class Progress:
    """Where the run stands. All of it is in a checkpoint, or follows from the step."""

    step: int = 0  # steps done
    skipped_in_a_row: int = 0
    seconds_in_window: float = 0.0  # since the last line of the log
    tokens_in_window: int = 0
    stop_reason: str | None = None
    losses: list[float] = field(default_factory=list)  # of the steps of this process


class Trainer:
    """A run from its configuration, new or continued.

    Args:
        config: of the run.
        world: where it trains, and with which other processes; each makes its own Trainer.
        resume: go on from the newest checkpoint in `config.output` (UsageError when there is none).
        report: called with each row that also goes to metrics.jsonl, in the first process.

    Raises UsageError for what does not fit together, before anything is drawn or written.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        world: World,
        resume: bool = False,
        report: Report | None = None,
    ) -> None:
        self.config, self.world, self.device = config, world, world.device
        device = world.device
        self._check_shares()
        self.run = Path(config.output)
        self.report = report or (lambda row: None)
        self.progress = Progress()
        saved = self._saved(resume)
        self.stream, self.data_folder = self._open_data()
        first = self.stream.files[0]
        fields = config_json(config.model, first.vocab_size)
        dtype = getattr(torch, config.precision.dtype)
        with device_errors(device, doing="setting up training"):
            self.model = new_model(
                config.model, fields, device=device, dtype=dtype, seed=config.seed
            )
            self.training_model = TrainingModel(
                self.model,
                config.batch.sequence_length,
                recompute=config.precision.recompute,
                selection_biases=self._biases(),
            )
            self.loss = StepLoss(self.training_model, config.loss)
            if saved is not None:
                load_weights(self.model, saved.folder)
            self.shards = ShardedParameters(self.model, world) if world.size > 1 else None
            self.optimizer = Optimizer(
                self.model, config.optimizer, config.precision, seed=config.seed, shards=self.shards
            )
            if saved is not None:
                self._restore(saved)
        self.evaluator = Evaluator(
            self.training_model, self._validation_files(), config, self.data_folder, world
        )
        self.checkpointer = Checkpointer(
            self.run,
            config=config.to_dict(),
            config_json=fields | {"torch_dtype": config.precision.dtype},
            tokenizer=self.data_folder,
            keep=config.checkpoint.keep,
            world=world,
        )
        self.flops_per_token = training_flops_per_token(
            self.model.config, config.batch.sequence_length
        )

    # -- setting up -------------------------------------------------------------------------------

    def _check_shares(self) -> None:
        batch, size = self.config.batch, self.world.size
        if self.config.sequences_per_step % size:
            raise UsageError(
                f"batch.tokens_per_step {batch.tokens_per_step} is {self.config.sequences_per_step} sequences, which "
                f"{size} processes cannot share evenly; make it a multiple of {size * batch.sequence_length}"
            )

    def _saved(self, resume: bool) -> SavedStep | None:
        found = find_checkpoints(self.run)
        if resume:
            if not found:
                raise UsageError(
                    f"there is no checkpoint in {self.run} to resume from; leave out --resume"
                )
            return found[-1]
        if found:
            raise UsageError(
                f"{self.run} holds checkpoints of a run already; go on with --resume, or name another --output"
            )
        return None

    def _open_data(self) -> tuple[TokenStream, Path]:
        data = self.config.data
        if not data.train:
            raise UsageError("data.train names no folder; prepare one with `hayate data prepare`")
        stream = TokenStream(
            [TokenFile.open(Path(folder) / TRAIN_FILE) for folder in data.train],
            sequence_length=self.config.batch.sequence_length,
            weights=data.weights or None,
            seed=self.config.seed,
        )
        return stream, Path(data.train[0])

    def _validation_files(self) -> list[TokenFile]:
        data = self.config.data
        folders = data.validation or data.train
        paths = [Path(folder) / VALIDATION_FILE for folder in folders]
        return [TokenFile.open(path) for path in paths if data.validation or path.is_file()]

    def _biases(self) -> torch.Tensor | None:
        config = self.model.config
        if self.config.loss.balance != "bias" or config.moe is None:
            return None
        return torch.zeros(config.num_layers, config.moe.num_experts, device=self.device)

    def _state(self) -> dict[str, StateSlice]:
        """The state of this process. What the loss remembers is everybody's."""
        state = self.optimizer.state()
        state["load_shares"] = StateSlice.whole(self.loss.load_shares)
        if self.training_model.selection_biases is not None:
            state["selection_biases"] = StateSlice.whole(self.training_model.selection_biases)
        return state

    def _restore(self, saved: SavedStep) -> None:
        load_state(saved.folder, self._state())
        self.optimizer.num_steps = saved.optimizer_steps
        self.progress.step = saved.step

    # -- the loop ---------------------------------------------------------------------------------

    def train(self) -> str:
        """Run to the last step, or until a signal. Returns why it ended: "finished" or the signal's name."""
        config, progress = self.config, self.progress
        first = progress.step
        advice = f"start the run again, with --resume if {self.run} holds a checkpoint"
        with contextlib.ExitStack() as stack:
            log = None
            if self.world.is_first:
                log = MetricsLog(self.run, config.log, from_step=first)
                stack.callback(log.close)
            stack.enter_context(self._signals())
            stack.enter_context(self.world.peer_errors(advice))
            stack.enter_context(device_errors(self.device, doing="training"))
            stack.enter_context(self._determinism())
            while progress.step < config.schedule.num_steps and not self._stopped():
                self._step(log)
            every = config.checkpoint.every
            if progress.step > first and (not every or progress.step % every):
                self._save()
            self.checkpointer.wait()
        return progress.stop_reason or "finished"

    def _stopped(self) -> bool:
        """Whether a signal has come, to any of the processes: all end after the same step."""
        reason = self.progress.stop_reason
        number = self.world.max_on_host(signal.Signals[reason] if reason else 0)
        if number:
            self.progress.stop_reason = signal.Signals(number).name
        return number > 0

    def _step(self, log: MetricsLog | None) -> None:
        config, progress = self.config, self.progress
        begin = time.perf_counter()
        parts = self._gradients(progress.step)
        share = learning_rate_share(progress.step, config.schedule.num_steps, config.schedule)
        norm, made = self.optimizer.step(config.optimizer.lr * share)
        self._guard(norm, made)
        if made:
            self.loss.after_step(parts)
        progress.step += 1
        loss = float(parts.cross_entropy)
        progress.losses.append(loss)
        progress.seconds_in_window += time.perf_counter() - begin
        progress.tokens_in_window += config.batch.tokens_per_step
        last = progress.step == config.schedule.num_steps
        if progress.step % config.log.every == 0 or last or progress.step == 1:
            self._write(log, self._train_row(loss, norm, config.optimizer.lr * share, parts))
        if self.loss.num_sparse and (progress.step % config.log.router_every == 0 or last):
            self._write(log, self._router_row(parts))
        if (config.eval.every and progress.step % config.eval.every == 0) or last:
            for row in self.evaluator.run(progress.step):
                self._write(log, row)
        if config.checkpoint.every and progress.step % config.checkpoint.every == 0:
            self._save()

    def _gradients(self, step: int) -> LossParts:
        """The gradients of one step, summed over its micro-batches, and over processes those of `optimizer.slices`."""
        config = self.config
        world, micro = self.world, config.sequences_per_micro_batch
        size = config.sequences_per_step
        share = self.stream.batch(step, size, rank=world.rank, num_ranks=world.size)
        num_targets = world.sum_on_host(share.num_targets)
        total = StepSize(num_targets, config.batch.tokens_per_step)
        parts = LossParts.zeros(self.loss.num_sparse, self.loss.num_experts, self.device)
        size = size // world.size
        for begin in range(0, size, micro):
            if self.shards is not None and begin + micro >= size:
                self.shards.begin_reduction()
            rows = slice(begin, begin + micro)
            self.loss.backward(TrainingBatch.of(share[rows], self.device), total, parts)
        if self.shards is not None:
            self.shards.end_reduction()
        world.sum_(parts.tensors())
        return parts

    def _guard(self, norm: float, made: bool) -> None:
        """A gradient that is not finite changes nothing; it stops the run, or is skipped a few times."""
        progress, config = self.progress, self.config.optimizer
        if made:
            progress.skipped_in_a_row = 0
            return
        progress.skipped_in_a_row += 1
        if config.nonfinite == "stop" or progress.skipped_in_a_row > config.max_skipped:
            raise ModelError(
                f"the gradient of step {progress.step} is not finite (norm {norm}); nothing was changed by it. "
                'Lower optimizer.lr, or let such steps pass with optimizer.nonfinite = "skip"; the newest checkpoint '
                f"in {self.run} is sound"
            )

    def _save(self) -> None:
        self.checkpointer.save(
            self.progress.step, self.model, self._state(), optimizer_steps=self.optimizer.num_steps
        )

    # -- figures ----------------------------------------------------------------------------------

    def _write(self, log: MetricsLog | None, row: dict[str, Any]) -> None:
        if log is not None:
            log.write(row)
            self.report(row)

    def _train_row(self, loss: float, norm: float, lr: float, parts: LossParts) -> dict[str, Any]:
        progress = self.progress
        rate = progress.tokens_in_window / progress.seconds_in_window
        progress.tokens_in_window, progress.seconds_in_window = 0, 0.0
        row = {
            "kind": "train",
            "step": progress.step,
            "loss": loss,
            "grad_norm": norm,
            "lr": lr,
            "tokens_per_second": rate,
            "tokens": progress.step * self.config.batch.tokens_per_step,
        }
        peak = peak_matrix_rate(self.device)
        if peak is not None:
            row["mfu"] = rate * self.flops_per_token / (peak * self.world.size)
        memory = peak_memory_bytes(self.device)
        row["peak_memory"] = memory.get("device", memory["host"])
        if self.loss.num_sparse:
            row |= {"aux": float(parts.aux), "z": float(parts.z)}
        return row

    def _router_row(self, parts: LossParts) -> dict[str, Any]:
        """Router health: loads relative to balance (1 = even), a list a layer."""
        counts = parts.expert_counts
        load = counts / counts.mean(-1, keepdim=True).clamp(min=1e-9)
        return {
            "kind": "router",
            "step": self.progress.step,
            "load": [[round(x, 4) for x in layer] for layer in load.tolist()],
            "entropy": [round(x, 4) for x in parts.router_entropy.tolist()],
            "max_load": float(load.max()),
            "dead_experts": int((counts == 0).sum()),
        }

    # -- manners ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the run after the step at hand, with a checkpoint; a second one ends it at once.

        Of several processes each may get the signal twice, from the terminal and from their launcher, which also
        kills those that do not end.
        """

        def stop(number: int, frame: object) -> None:
            if self.progress.stop_reason:
                if self.world.size > 1:
                    return
                raise KeyboardInterrupt
            self.progress.stop_reason = signal.Signals(number).name

        wanted = (signal.SIGINT, signal.SIGTERM)
        try:
            before = {number: signal.signal(number, stop) for number in wanted}
        except ValueError:  # not the main thread: whoever owns that has the signals
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def _determinism(self) -> Iterator[None]:
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(before or self.config.precision.deterministic)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)
