"""Checkpoints of a run: written whole or not at all, while training goes on, and read back bit for bit.

    RUN/step-00000500/            a Hugging Face folder: config.json, model.safetensors, the tokenizer
        optimizer/                torch.distributed.checkpoint: "<state>.<parameter>", and what the loss remembers
        training.json             step and the resolved configuration

A checkpoint is written to a neighbour of another name, flushed to the disk and renamed; older ones are removed only
after that. So whenever the process dies the newest complete checkpoint stays. Of several processes each writes its
part of the optimizer's state, the first also the weights; all see the same folder.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hayate.checkpoint.writer import save
from hayate.errors import ModelError
from hayate.models.decoder import CausalLM
from hayate.models.weights import placements
from hayate.runtime.device import free_bytes
from hayate.training.parallel import World
from hayate.training.prepare import TOKENIZER_FILES
from hayate.training.sliced_state import StateSlice, load_slices, save_slices

STATE_FILE = "training.json"
_NAME = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class SavedStep:
    """A complete checkpoint on disk."""

    folder: Path
    step: int
    optimizer_steps: int  # fewer than `step` where steps were skipped
    config: dict[str, Any]


def find_checkpoints(run: Path) -> list[SavedStep]:
    """The complete checkpoints of a run, oldest first. ModelError when one says nothing sensible."""
    found = []
    for folder in run.glob("step-*") if run.is_dir() else ():
        if _NAME.fullmatch(folder.name) and (folder / STATE_FILE).is_file():
            try:
                state = json.loads((folder / STATE_FILE).read_text())
                steps = int(state["step"]), int(state["optimizer_steps"])
                found.append(SavedStep(folder, *steps, dict(state["config"])))
            except (ValueError, KeyError, TypeError) as error:
                raise ModelError(
                    f"{folder / STATE_FILE} is damaged ({error}); remove {folder} to go on from the checkpoint before"
                ) from None
    return sorted(found, key=lambda saved: saved.step)


def load_state(folder: Path, state: Mapping[str, StateSlice]) -> None:
    """Fill `state` from the checkpoint in `folder`; ModelError when it does not fit."""
    load_slices(folder / "optimizer", state)


class Checkpointer:
    """Writes checkpoints of one run in the background, one at a time.

    The state is first copied to host memory, so that training may change it; where that has no room, the step
    waits for the disk instead, and says so once.
    """

    def __init__(
        self,
        run: Path,
        *,
        config: dict[str, Any],
        config_json: dict[str, Any],
        tokenizer: Path | None,
        keep: int,
        world: World,
    ) -> None:
        self.world = world
        self.run, self.config, self.config_json = run, config, config_json
        self.tokenizer, self.keep = tokenizer, keep
        self.waits_for_disk = False
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(
        self, step: int, model: CausalLM, state: Mapping[str, StateSlice], *, optimizer_steps: int
    ) -> Path:
        """Begin to write the checkpoint of `step`; raises what the one before failed with. Called by all processes."""
        self.wait()
        named = model.named_parameters() if self.world.is_first else ()
        weights = {name: p.detach() for name, p in named}
        tensors = (*weights.values(), *(s.data for s in state.values()))
        needed = sum(t.numel() * t.element_size() for t in tensors)
        room = free_bytes(torch.device("cpu")) / self.world.local_size
        self.waits_for_disk = needed > 0.8 * room
        if not self.waits_for_disk:
            weights = {name: t.to("cpu", copy=True) for name, t in weights.items()}
            state = {
                name: replace(s, data=s.data.detach().to("cpu", copy=True))
                for name, s in state.items()
            }
        placed = placements(model.config)
        folder = self.run / f"step-{step:08d}"
        summary = {"step": step, "optimizer_steps": optimizer_steps, "config": self.config}

        def write() -> None:
            try:
                self._write(folder, summary, weights, placed, state)
            except BaseException as error:  # raised by the next call, on the caller's thread
                self._error = error

        if self.waits_for_disk:
            write()
            self.wait()
        else:
            self._thread = threading.Thread(target=write, name="checkpoint")
            self._thread.start()
        return folder

    def wait(self) -> None:
        """Return when the last checkpoint is on disk. Raises what it failed with."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise ModelError(
                f"the checkpoint could not be written to {self.run}: {error}"
            ) from error

    def _write(
        self,
        folder: Path,
        summary: dict,
        weights: dict,
        placed: list,
        state: Mapping[str, StateSlice],
    ) -> None:
        work = folder.with_name(f".{folder.name}.partial")
        with self._together():
            if self.world.is_first:
                shutil.rmtree(work, ignore_errors=True)  # of a process that was killed
                (work / "optimizer").mkdir(parents=True)
        with self._together():
            save_slices(work / "optimizer", state, self.world)
        with self._together():
            if self.world.is_first:
                self._finish(work, folder, summary, weights, placed)

    @contextmanager
    def _together(self) -> Iterator[None]:
        """All processes have done this, or all raise."""
        failed = True
        try:
            yield
            failed = False
        finally:
            elsewhere = self.world.any_failed(failed)
        if elsewhere:
            raise ModelError("another process of the run failed")

    def _finish(self, work: Path, folder: Path, summary: dict, weights: dict, placed: list) -> None:
        save(weights, placed, work)
        _write_json(work / "config.json", self.config_json)
        if self.tokenizer is not None:
            for name in TOKENIZER_FILES:
                if (self.tokenizer / name).is_file():
                    shutil.copy(self.tokenizer / name, work / name)
        _write_json(work / STATE_FILE, summary)
        _sync(work)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(work, folder)
        _sync(folder.parent)
        if self.keep:
            for old in find_checkpoints(self.run)[: -self.keep]:
                shutil.rmtree(old.folder)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as stream:
        json.dump(value, stream, indent=2, ensure_ascii=False)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())


def _sync(folder: Path) -> None:
    """Make the names in `folder` durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
