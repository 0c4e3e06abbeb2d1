"""An engine over several processes, each with its part of every layer (models/sharding.py).

All ranks run the same engine: the same scheduler, pages, sampler and stop conditions on the same requests, so that
nothing crosses the processes but what came from outside, in the order in which it came (`submit`, `abort`, `step`,
`logits`), and the tensors that the model itself exchanges. The logits are gathered everywhere and every rank draws
the same token from them with the same seed. What depends on time or chance is decided by rank 0 and told: seeds, and
which requests have run out of time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import torch
import torch.distributed as dist

from hayate.checkpoint.reader import LoadReport
from hayate.config import EnginePlan
from hayate.errors import GpuFault, UsageError, to_raise
from hayate.kernels.all_reduce import Communicator
from hayate.models.config import ModelConfig
from hayate.models.decoder import CausalLM
from hayate.runtime import device as devices
from hayate.runtime import ranks as processes
from hayate.runtime.engine import Engine
from hayate.runtime.graphs import Graphs
from hayate.runtime.live_requests import Event
from hayate.runtime.loading import load_shard, open_checkpoint, random_shard
from hayate.runtime.outputs import PositionLogprobs
from hayate.runtime.ranks import Ranks
from hayate.runtime.request import Request
from hayate.runtime.request_builder import RequestBuilder
from hayate.runtime.sequence import Sequence


class Source(NamedTuple):
    """Where the weights come from: a checkpoint folder, or for None random numbers."""

    config: ModelConfig
    folder: Path | None
    seed: int = 0

    def load(
        self, plan: EnginePlan, progress: Callable[[int, int], None] | None = None
    ) -> tuple[CausalLM, LoadReport | None]:
        """The part of this process; all processes of the group load at once."""
        device = torch.device(plan.device)
        with devices.device_errors(device, doing="loading"):
            group = Communicator(device, getattr(torch, plan.dtype))
        if self.folder is None:
            return random_shard(self.config, plan, group, self.seed), None
        config, checkpoint = open_checkpoint(self.folder)
        return load_shard(config, checkpoint, plan, group, progress)


def _end(graphs: Graphs | None, ranks: Ranks) -> None:
    """End the workers. The graphs go first: NCCL lets go of a group only when none holds its kernels."""
    with ranks.working():
        if graphs is not None:
            graphs.clear()
        ranks.close()


class TensorParallelEngine(Engine):
    """The engine of rank 0, which tells the others. `close` ends them; so does the end of this object.

    When a process fails all requests end with the reason, which is `dead` then.
    """

    def __init__(self, model: CausalLM, plan: EnginePlan, ranks: Ranks) -> None:
        super().__init__(model, plan)
        self.ranks = ranks
        self._numbers: dict[Request, int] = {}  # of those that the others know
        self._next_number = 0
        self._stepping = False
        self._late: list[Request] = []  # to be aborted when the step has ended
        self._finalizer = weakref.finalize(self, _end, self.runner.graphs, ranks)

    @property
    def dead(self) -> GpuFault | None:
        """Why nothing runs any more: the failure of a process, from the moment on when it is known."""
        return self._dead if self.ranks.failure is None else self._failure()

    def submit(self, request: Request) -> None:
        self._check_alive()
        with _uninterrupted():
            super().submit(request)
            number, self._next_number = self._next_number, self._next_number + 1
            self._numbers[request] = number
            first = request.samples[0]
            params = dataclasses.replace(first.row.params, seed=first.sequence.seed)
            self.ranks.send("submit", number, request.prompt_ids, params, request.priority)

    def abort(self, request: Request) -> None:
        if self._stepping:  # from a generator that is collected in the middle of it
            self._late.append(request)
            return
        with _uninterrupted():
            super().abort(request)
            number = self._numbers.pop(request, None)
            if number is not None and self.dead is None and self._finalizer.alive:
                with contextlib.suppress(GpuFault):  # `dead` says so from then on
                    self.ranks.send("abort", number)

    def step(self) -> list[Event]:
        events: list[Event] = []
        with _uninterrupted():
            self._stepping = True
            try:
                with self.ranks.working():
                    events = super().step()
            except GpuFault as fault:  # told before the step began
                self._die(fault, events)
            finally:
                self._stepping = False
            if self.ranks.failure is not None and self._dead is None:
                self._die(self._failure(), events)
            for request, chunk in events:
                if chunk.request is not None:
                    self._numbers.pop(request, None)
            late, self._late = self._late, []
            for request in late:
                self.abort(request)
        return events

    def logits(self, ids: Seq[int]) -> torch.Tensor:
        self._check_alive()
        with _uninterrupted(), self.ranks.working():
            self.ranks.send("logits", list(ids))
            try:
                return super().logits(ids)
            except UsageError:  # of all ranks
                raise
            except Exception as error:
                raise self.ranks.explain(error) from error

    def close(self) -> None:
        self._finalizer()

    def _check_alive(self) -> None:
        if not self._finalizer.alive:
            raise UsageError("this model was closed, and its processes have ended; load it again")
        if self.dead is not None:
            raise to_raise(self.dead)

    def _failure(self) -> GpuFault:
        failure = self.ranks.failure
        if isinstance(failure, GpuFault):
            return failure
        fault = GpuFault(str(failure))
        fault.__cause__ = failure
        return fault

    def _expire(self, events: list[Event]) -> None:
        super()._expire(events)
        expired = {self._numbers.pop(request): None for request, _ in events}
        self.ranks.send("step", tuple(expired))

    def _append(
        self,
        sequence: Sequence,
        token: int,
        logprobs: PositionLogprobs | None,
        events: list[Event],
    ) -> None:
        if self.ranks.failure is not None:  # what was computed without the others is no token
            raise self._failure()
        super()._append(sequence, token, logprobs, events)

    def _recover(self, error: Exception, events: list[Event]) -> None:
        """The others may have gone on, or wait for this process: nothing can be saved."""
        self.ranks.explain(error)
        self._die(self._failure(), events)

    def _die(self, fault: GpuFault, events: list[Event]) -> None:
        self.ranks.explain(fault)
        super()._die(self._failure(), events)

    def _restart(self) -> None:
        self.ranks.explain(InterruptedError("interrupted in the middle of a step"))
        self._die(self._failure(), [])


class Follower(Engine):
    """The engine of another rank. A failure is not its to handle: the process reports it and ends."""

    def _recover(self, error: Exception, events: list[Event]) -> None:
        raise error

    def _die(self, fault: GpuFault, events: list[Event]) -> None:
        raise fault


def work(rank: int, size: int, device_name: str, fd: int, port: int) -> None:
    """The life of a worker, from its start to its end."""
    processes.end_with_parent(fd)
    wire, device = Connection(fd), torch.device(device_name)
    code = 0
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        store = dist.TCPStore("127.0.0.1", port, size, is_master=False)
        wire.send(("ready to join", devices.free_bytes(device)))
        processes.join(store, rank, size, device)
        _follow(wire, device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # rank 0 may still wait for what was launched here
    except EOFError:
        pass
    except BaseException as error:
        wire.send(("failed", processes.reportable(rank, size, error)))
        code = 1
    os._exit(code)  # nothing here is worth a wait: the group, the graphs, the threads


def _follow(wire: Connection, device: torch.device) -> None:
    """Build what rank 0 builds, and do what it does."""
    message = pickle.loads(wire.recv_bytes())
    if message[0] == "close":
        return
    _, source, plan = message
    plan = dataclasses.replace(plan, device=str(device))
    network, _ = source.load(plan)
    with devices.device_errors(device, doing="loading"):
        engine = Follower(network, plan)
    builder = RequestBuilder(source.config, plan, source.folder)
    wire.send(("loaded", None))
    requests: dict[int, Request] = {}
    numbers: dict[Request, int] = {}
    while True:
        kind, *values = pickle.loads(wire.recv_bytes())
        if kind == "step":
            for number in values[0]:
                engine.abort(requests.pop(number))
            for request, chunk in engine.step():
                if chunk.request is not None:
                    requests.pop(numbers.pop(request), None)
        elif kind == "submit":
            number, ids, params, priority = values
            request = builder.of_prompt(ids, params, priority=priority)
            requests[number], numbers[request] = request, number
            engine.submit(request)
        elif kind == "abort":
            engine.abort(requests.pop(values[0]))
        elif kind == "logits":
            with contextlib.suppress(UsageError):  # rank 0 raises it
                engine.logits(values[0])
        else:
            return


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Keep Ctrl-C until the end of the `with` block, that the ranks stay in step; a second one does not wait."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    held: list[FrameType | None] = []

    def hold(number: int, frame: FrameType | None) -> None:
        if held:
            before(number, frame)
        held.append(frame)

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if held:
        before(signal.SIGINT, held[0])
