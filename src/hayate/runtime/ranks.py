"""Ranks: the processes of a tensor-parallel model, started, told and watched by rank 0.

Rank 0 is the user's process. Each worker is another Python process, joined to it by a socket: rank 0 sends messages,
the worker reports. All of them are one process group of `torch.distributed`, by which tensors are exchanged.

Nobody outlives the others. A worker that ends by itself, or is killed, is seen by a thread of rank 0, which ends the
rest; whoever waits for it in a sum is released. The end of rank 0, however sudden, closes the sockets: workers have a
thread that waits for that.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing import connection
from typing import Any

import torch
import torch.distributed as dist

from hayate.errors import DeviceError, HayateError, UsageError, WorkerFault
from hayate.runtime import device as devices

_TIMEOUT = timedelta(minutes=5)  # of one sum, for what no thread sees: a process that is stopped
_GRACE = 10.0  # seconds for a process to end by itself
_PROGRAM = "from hayate.runtime.tensor_parallel import work; work({rank}, {size}, {device!r}, {fd}, {port})"


@dataclass(eq=False)
class _Worker:
    rank: int
    process: subprocess.Popen
    wire: connection.Connection
    reports: dict[str, Any] = field(default_factory=dict)


class Ranks:
    """The workers of a group of `size` processes, this one included, on `device` and the GPUs after it.

    free_bytes: what each process can take on its device, the least of all.

    Raises DeviceError where there are fewer GPUs, UsageError in a process that has a process group already.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.size, self.device = size, device
        self.failure: BaseException | None = None  # why the group is of no use any more
        self._changed = threading.Condition()  # guards `failure` and the workers' reports
        self._closing = False
        self._busy = threading.Event()  # this process may wait for the others in a sum
        self._workers: list[_Worker] = []
        self._num_threads = torch.get_num_threads()
        _check_devices(size, device)
        if device.type == "cpu":  # they share its cores
            torch.set_num_threads(max(1, self._num_threads // size))
        try:
            with self.working():
                self._store, port = _listen(size)
                self._workers = [_start(rank, size, device, port) for rank in range(1, size)]
                self._watcher = threading.Thread(
                    target=self._watch, name="hayate-ranks", daemon=True
                )
                self._watcher.start()
                found = self.wait_for("ready to join")
                join(self._store, 0, size, device)
        except BaseException:
            self.close()
            raise
        free = min(devices.free_bytes(device), *found)
        self.free_bytes = free // size if device.type == "cpu" else free

    @property
    def pids(self) -> list[int]:
        """The process ids of the workers, rank 1 first."""
        return [w.process.pid for w in self._workers]

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Inside, this process waits for others. If they fail, and its GPU cannot be released, it ends."""
        self._busy.set()
        try:
            yield
        finally:
            self._busy.clear()

    def send(self, *message: Any) -> None:
        """Tell all workers. Raises the reason when they are gone."""
        data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        for worker in self._workers:
            try:
                worker.wire.send_bytes(data)
            except OSError as error:
                raise self.explain(error) from error

    def wait_for(self, name: str) -> list[Any]:
        """The workers' reports of that name, when all are there. Raises the reason when one fails instead."""
        with self._changed:
            self._changed.wait_for(
                lambda: self.failure is not None or all(name in w.reports for w in self._workers)
            )
            if self.failure is not None:
                raise self.failure
            return [w.reports[name] for w in self._workers]

    def explain(self, error: BaseException) -> BaseException:
        """Why this process could not go on, with `error`; the group is of no use from then on."""
        with self._changed:  # a failure elsewhere is noticed here and by the watcher, in any order
            self._changed.wait_for(lambda: self.failure is not None, timeout=_GRACE / 4)
        if self.failure is None:
            self._fail(
                error if isinstance(error, HayateError) else _fault("rank 0", self.size, error)
            )
        assert self.failure is not None
        return self.failure

    def close(self) -> None:
        """End the workers. Nothing happens a second time."""
        with self._changed:
            if self._closing:
                return
            self._closing = True
        if self.failure is None:
            with contextlib.suppress(BaseException):
                self.send("close")
        deadline = time.monotonic() + (_GRACE if self.failure is None else 0)
        for worker in self._workers:
            try:
                worker.process.wait(max(deadline - time.monotonic(), 0.01))
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
        if self._workers and self._watcher is not threading.current_thread():
            self._watcher.join(_GRACE)
        for worker in self._workers:
            worker.wire.close()
        leave(self.device)
        if self.device.type == "cpu":
            torch.set_num_threads(self._num_threads)

    # -- in the watching thread ---------------------------------------------------------------------

    def _watch(self) -> None:
        wires = {worker.wire: worker for worker in self._workers}
        while wires:
            for wire in connection.wait(list(wires)):
                worker = wires[wire]  # type: ignore[index]
                try:
                    name, value = worker.wire.recv()
                except (EOFError, OSError):
                    del wires[worker.wire]
                    self._lost(worker)
                    continue
                if name == "failed":
                    self._fail(self._cause(worker, *value))
                with self._changed:
                    worker.reports[name] = value
                    self._changed.notify_all()

    def _lost(self, worker: _Worker) -> None:
        worker.process.wait()
        self._fail(self._death_of(worker))

    def _death_of(self, worker: _Worker) -> WorkerFault:
        code = worker.process.returncode
        how = f"ended with exit code {code}"
        if code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        return WorkerFault(
            f"rank {worker.rank} of {self.size} (process {worker.process.pid}) {how}; the model is in parts and "
            "needs all of them: load it again"
        )

    def _cause(self, worker: _Worker, error: BaseException, trace: str) -> BaseException:
        """What a worker reports may be only that it lost another: then that one's end is the cause."""
        deadline = time.monotonic() + (0.5 if isinstance(error, WorkerFault) else 0.0)
        while time.monotonic() < deadline:
            for other in self._workers:
                if other is not worker and (other.process.poll() or 0) < 0:
                    return self._death_of(other)
            time.sleep(0.01)
        error.__cause__ = RuntimeError(f"in rank {worker.rank}:\n{trace}")
        return error

    def _fail(self, failure: BaseException) -> None:
        """The first failure counts, and ends all workers."""
        with self._changed:
            if self._closing or self.failure is not None:
                return
            self.failure = failure
            self._changed.notify_all()
        for worker in self._workers:
            worker.process.kill()
        if self.device.type == "cuda":  # gloo sees the closed connections by itself
            threading.Thread(target=self._end_if_stuck, name="hayate-stuck", daemon=True).start()
            # It may wait for CUDA graphs that hold the group, hence in a thread of its own.
            threading.Thread(target=leave, args=(self.device,), daemon=True).start()

    def _end_if_stuck(self) -> None:
        """A GPU kernel that waits for memory of a dead process never ends, nor does whoever waits for the kernel."""
        deadline = time.monotonic() + _GRACE
        while time.monotonic() < deadline:
            if not self._busy.is_set():
                return
            time.sleep(0.05)
        print(f"hayate: error: {self.failure}", file=sys.stderr, flush=True)
        os._exit(getattr(self.failure, "exit_code", WorkerFault.exit_code))


def join(store: dist.Store, rank: int, size: int, device: torch.device) -> None:
    """Become `rank` of the default process group: by NCCL on GPUs, by gloo over the loopback interface on the CPU."""
    options: dict[str, Any] = {
        "store": store,
        "rank": rank,
        "world_size": size,
        "timeout": _TIMEOUT,
    }
    # Groups meet under a number that a process counts up; an attempt that failed leaves it behind, and the others, new
    # processes, begin at 0.
    dist.distributed_c10d._world.group_count = 0
    if device.type == "cuda":
        dist.init_process_group("nccl", device_id=device, **options)
        return
    before = os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        dist.init_process_group("gloo", **options)
    finally:
        if before == "lo":
            del os.environ["GLOO_SOCKET_IFNAME"]


def leave(device: torch.device) -> None:
    """Leave the group, if in one. On GPUs what still runs in it is given up: CUDA graphs may hold on to it."""
    if not dist.is_initialized():
        return
    with contextlib.suppress(Exception):  # other processes of it may have gone
        if device.type == "cuda":
            dist.distributed_c10d._abort_process_group()
        else:
            dist.destroy_process_group()


def device_of(rank: int, device: torch.device) -> torch.device:
    """The device of a rank: on GPUs, the one so many after rank 0's."""
    return device if device.type == "cpu" else torch.device("cuda", device.index + rank)


def end_with_parent(fd: int) -> None:
    """Start a thread that ends this process when the other side of the socket `fd` has closed."""

    def watch() -> None:
        poll = select.poll()
        poll.register(fd, select.POLLRDHUP | select.POLLHUP)
        while not poll.poll():
            pass
        os._exit(0)

    threading.Thread(target=watch, name="hayate-parent", daemon=True).start()


def _check_devices(size: int, device: torch.device) -> None:
    if dist.is_initialized():
        raise UsageError(
            f"--tensor-parallel {size}: this process belongs to a process group of torch.distributed already, of "
            "another model or of your own; close that first, or use a process of its own"
        )
    if device.type == "cuda" and device.index + size > torch.cuda.device_count():
        raise DeviceError(
            f"--tensor-parallel {size} from {device} on needs GPUs {device.index} to {device.index + size - 1}, but "
            f"there are {torch.cuda.device_count()} (counted from 0)"
        )


def _listen(size: int) -> tuple[dist.TCPStore, int]:
    """A store at a port of the loopback interface, which no other machine can reach."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    store = dist.TCPStore(
        "127.0.0.1",
        port,
        size,
        is_master=True,
        timeout=_TIMEOUT,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    return store, port


def _start(rank: int, size: int, device: torch.device, port: int) -> _Worker:
    ours, theirs = socket.socketpair()
    with theirs:
        program = _PROGRAM.format(
            rank=rank, size=size, device=str(device_of(rank, device)), fd=theirs.fileno(), port=port
        )
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        if device.type == "cpu":
            environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
        process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.DEVNULL,
            stdout=2,  # standard output is the user's
            env=environment,
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # Ctrl-C is for rank 0, which tells the others
        )
    return _Worker(rank, process, connection.Connection(ours.detach()))


def _fault(who: str, size: int, error: BaseException) -> WorkerFault:
    fault = WorkerFault(f"{who} of {size} failed: {type(error).__name__}: {error}")
    fault.__cause__ = error
    return fault


def reportable(rank: int, size: int, error: BaseException) -> tuple[BaseException, str]:
    """`error` as rank 0 shall raise it, and where it came from, for the wire."""
    if not isinstance(error, HayateError):
        fault: HayateError = _fault(f"rank {rank}", size, error)
    else:
        fault = type(error)(str(error))
    return fault, "".join(traceback.format_exception(type(error), error, error.__traceback__))
