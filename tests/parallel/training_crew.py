"""Processes that stay for many tests of data-parallel training, and what they are asked to do."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hayate.models.presets import PRESETS
from hayate.training import sharded_parameters
from hayate.training.parallel import World
from hayate.training.state import find_checkpoints
from tests.training.runs import tiny_config, trainer, weights

# Forks of one process that has imported torch and never run it.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.parallel.training_crew"])
_SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 16,
    "intermediate_size": 40,
}
SMALL = {
    "moe-tiny": PRESETS["moe-tiny"] | _SIZES | {"num_local_experts": 4},
    "dense-tiny": PRESETS["dense-tiny"] | _SIZES,
}


class Crew:
    """`size` processes in one gloo group; `crew(work, ...)` runs work(world, ...) in each and gives their results."""

    def __init__(self, size: int) -> None:
        self.size = size
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self._pipes, self._processes = [], []
        for rank in range(size):
            ours, theirs = _CONTEXT.Pipe()
            process = _CONTEXT.Process(target=_member, args=(theirs, rank, size, port), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def __call__(self, work: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
        for pipe in self._pipes:
            pipe.send((work, args, options))
        results = []
        for rank, pipe in enumerate(self._pipes):
            assert pipe.poll(120), f"process {rank} of {self.size} does not answer"
            results.append(pipe.recv())
        for failure in results:
            assert not isinstance(failure, Failure), failure.text
        return results

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(60)
            assert process.exitcode == 0


@dataclasses.dataclass
class Failure:
    text: str


def _member(pipe: Any, rank: int, size: int, port: int) -> None:
    torch.set_num_threads(1)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    values = (rank, size, rank, size, "127.0.0.1", port)
    os.environ.update({name: str(value) for name, value in zip(names, values, strict=True)})
    PRESETS.update(SMALL)
    sharded_parameters.BUCKET_ELEMENTS = 12_000  # several buckets for a small model
    with World.from_environment("cpu") as world:
        while (wanted := pipe.recv()) is not None:
            work, args, options = wanted
            try:
                pipe.send(work(world, *args, **options))
            except BaseException:
                pipe.send(Failure(traceback.format_exc()))


class NoLog:
    def write(self, row: dict) -> None:
        pass


@dataclasses.dataclass
class Outcome:
    losses: list[float]
    weights: dict[str, torch.Tensor]
    counts: torch.Tensor  # load shares after the last step
    biases: torch.Tensor | None
    slices: list[tuple[str, int, int]]  # parameter, begin, elements
    state_bytes: int


def run_steps(
    world: World,
    data: Path,
    output: Path,
    *,
    until: int,
    resume: bool = False,
    save: bool = False,
    **overrides: str,
) -> Outcome:
    """Train up to step `until` of a run, and write a checkpoint there if asked."""
    config = tiny_config(data, output, **{"checkpoint__every": "0", **overrides})
    run = trainer(config, world=world, resume=resume)
    while run.progress.step < until:
        run._step(NoLog())
    if save:
        run._save()
        run.checkpointer.wait()
    return Outcome(
        run.progress.losses,
        weights(run),
        run.loss.load_shares,
        run.training_model.selection_biases,
        [(s.name, s.begin, s.weight.numel()) for s in run.optimizer.slices],
        sum(s.data.numel() * s.data.element_size() for s in run.optimizer.state().values()),
    )


def evaluate(world: World, data: Path, output: Path) -> list[dict]:
    config = tiny_config(data, output, eval__tokens="160", eval__prompts="the quick")
    return trainer(config, world=world).evaluator.run(0)


def meet_a_bad_gradient(world: World, data: Path, output: Path) -> tuple[bool, int, str]:
    """Process 1 alone has a NaN. Are weights unchanged; optimizer steps; how the run ends."""
    options = {"optimizer__nonfinite": "skip", "optimizer__max_skipped": "1"}
    run = trainer(tiny_config(data, output, **options), world=world)
    before = weights(run)
    if world.rank == 1:
        next(run.model.parameters()).register_hook(lambda g: g * float("nan"))
    run._step(NoLog())
    same = all(torch.equal(before[n], w) for n, w in weights(run).items())
    try:
        run._step(NoLog())
    except Exception as error:
        return same, run.optimizer.num_steps, f"{type(error).__name__}: {error}"
    return same, run.optimizer.num_steps, "went on"


def stop_by_a_signal(world: World, data: Path, output: Path) -> tuple[str, int, list[int]]:
    """The last process alone gets SIGTERM during the third step."""
    run = trainer(tiny_config(data, output, checkpoint__every="0"), world=world)
    step = run._step

    def signalled(log: Any) -> None:
        if run.progress.step == 2 and world.rank == world.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        step(log)

    run._step = signalled  # type: ignore[method-assign]
    reason = run.train()
    return reason, run.progress.step, [c.step for c in find_checkpoints(output)]
