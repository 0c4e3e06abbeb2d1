"""Bytes of a checkpoint straight to their destination, by many threads at once.

Every tensor is cut into chunks, so that threads share the large ones; the chunks are read in the
order they lie in the files. On the CPU a chunk is read into the parameter's own memory. For a GPU
it is read into pinned memory and copied from there, while the same thread reads its next chunk
into a second buffer. Where dtypes differ, a chunk is cast on the device of its destination.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hayate.checkpoint.header import TensorInfo, show
from hayate.checkpoint.index import Checkpoint
from hayate.checkpoint.placements import TORCH_DTYPES, Placement, box_of, check_placements
from hayate.errors import ModelError

# Large enough to hide the cost of a Python step and of a copy's start; with 16 threads and two
# pinned buffers each, 256 MiB of host memory.
CHUNK_BYTES = 8 * 2**20
MAX_THREADS = 16

Progress = Callable[[int, int], None]  # bytes done, bytes in all


class LoadReport(NamedTuple):
    """What a load moved (bytes read from files) and how long it took."""

    num_bytes: int
    seconds: float

    @property
    def gigabytes_per_second(self) -> float:
        return self.num_bytes / self.seconds / 1e9 if self.seconds else 0.0


class _Chunk(NamedTuple):
    """`num_bytes` of the tensor's file and the view that they fill.

    They lie in runs of `run` bytes, the first at `offset`, each `step` after the one before.
    """

    tensor: TensorInfo
    offset: int
    num_bytes: int
    destination: Tensor
    run: int
    step: int

    @property
    def needs_no_cast(self) -> bool:
        """The bytes are the destination's bytes as they are."""
        same_dtype = self.destination.dtype == TORCH_DTYPES[self.tensor.dtype]
        return same_dtype and self.destination.is_contiguous()

    def decode(self, raw: Tensor) -> Tensor:
        """View `raw` (num_bytes,) uint8 with the tensor's dtype and the destination's shape."""
        return raw.view(TORCH_DTYPES[self.tensor.dtype]).view(self.destination.shape)


class _Mover(Protocol):
    """One thread's way to one device."""

    def move(self, chunk: _Chunk, fd: int) -> None:
        """Read `chunk` from `fd` and send it to its destination; it may arrive later."""

    def finish(self) -> None:
        """Return when everything sent has arrived."""


def load(
    checkpoint: Checkpoint,
    parameters: Mapping[str, Tensor],
    placements: Sequence[Placement] = (),
    *,
    ignore: Sequence[str] = (),
    threads: int | None = None,
    progress: Progress | None = None,
) -> LoadReport:
    """Fill `parameters` in place with the tensors of `checkpoint`, cast to each parameter's dtype.

    First checks that everything fits (`check_placements`). `parameters` may lie on several devices;
    the work is complete on return. progress: called now and then, and at the end, from this thread.
    Host memory beyond the destination is at most 2 * CHUNK_BYTES a thread. Raises ModelError when
    something does not fit (nothing is written then) or a file cannot be read to its end.
    """
    wanted = check_placements(checkpoint, parameters, placements, ignore)
    return load_checked(checkpoint, parameters, wanted, threads=threads, progress=progress)


def load_checked(
    checkpoint: Checkpoint,
    parameters: Mapping[str, Tensor],
    placements: Sequence[Placement],
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> LoadReport:
    """`load` of just these placements, which are known to fit: of a share of the checkpoint, only that is read."""
    begin = time.perf_counter()
    chunks = [
        chunk
        for source, target, index, part in placements
        for chunk in _cut(checkpoint.tensors[source], part, parameters[target].detach()[index])
    ]
    chunks.sort(key=lambda chunk: (chunk.tensor.file, chunk.offset))
    num_bytes = sum(chunk.num_bytes for chunk in chunks)
    with ExitStack() as stack:
        fds = {}
        for file in dict.fromkeys(chunk.tensor.file for chunk in chunks):
            fds[file] = _open(file)
            stack.callback(os.close, fds[file])
        job = _Job(chunks, fds)
        job.run(min(threads or _default_threads(), len(chunks)), num_bytes, progress)
    return LoadReport(num_bytes, time.perf_counter() - begin)


class _Job:
    """The queue of chunks, worked off by threads; the first error stops all of them."""

    def __init__(self, chunks: Sequence[_Chunk], fds: Mapping[Path, int]) -> None:
        self._queue = deque(chunks)
        self._fds = fds
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._bytes_done = 0
        self._error: BaseException | None = None
        # What the caller's streams still do to the destinations comes first.
        devices = {chunk.destination.device for chunk in chunks}
        self._ready = {
            device: torch.cuda.current_stream(device).record_event()
            for device in devices
            if device.type == "cuda"
        }

    def run(self, threads: int, num_bytes: int, progress: Progress | None) -> None:
        """Work the queue off; whatever happens, no thread is left when this returns."""
        workers = [threading.Thread(target=self._work, name="hayate-load") for _ in range(threads)]
        try:
            for worker in workers:
                worker.start()
            for worker in workers:
                while worker.is_alive():
                    worker.join(timeout=0.05)
                    if progress is not None:
                        progress(self._bytes_done, num_bytes)
        finally:  # also on KeyboardInterrupt, which arrives in this thread
            self._stop.set()
            for worker in workers:
                if worker.ident is not None:
                    worker.join()
        if self._error is not None:
            raise self._error
        if progress is not None:
            progress(num_bytes, num_bytes)

    def _work(self) -> None:
        movers: dict[torch.device, _Mover] = {}
        try:
            # Inference mode writes to inference tensors, too.
            with torch.inference_mode(), ExitStack() as stack:
                while not self._stop.is_set() and self._queue:
                    try:
                        chunk = self._queue.popleft()
                    except IndexError:  # another thread took the last one
                        break
                    device = chunk.destination.device
                    if device not in movers:
                        movers[device] = self._mover(device)
                        stack.callback(movers[device].finish)
                    movers[device].move(chunk, self._fds[chunk.tensor.file])
                    with self._lock:
                        self._bytes_done += chunk.num_bytes
        except BaseException as error:
            with self._lock:
                self._error = self._error or error
            self._stop.set()

    def _mover(self, device: torch.device) -> _Mover:
        if device.type == "cuda":
            return _CudaMover(device, self._ready[device])
        return _HostMover()


class _HostMover:
    """Into the destination's own memory, or through one buffer for a cast or a strided view."""

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    def move(self, chunk: _Chunk, fd: int) -> None:
        if chunk.needs_no_cast and chunk.destination.device.type == "cpu":
            # as_strided: a contiguous view of one element may keep any stride through view(-1).
            flat = chunk.destination.as_strided((chunk.destination.numel(),), (1,))
            _read(chunk, fd, _bytes(flat.view(torch.uint8)))
            return
        if self._buffer is None:
            self._buffer = torch.empty(CHUNK_BYTES, dtype=torch.uint8)
        raw = self._buffer[: chunk.num_bytes]
        _read(chunk, fd, _bytes(raw))
        chunk.destination.copy_(chunk.decode(raw))

    def finish(self) -> None:
        pass


class _CudaMover:
    """Through two pinned buffers in turn, on a stream of its own.

    `ready`: the event after which the destinations may be written.
    """

    def __init__(self, device: torch.device, ready: torch.cuda.Event) -> None:
        with torch.cuda.device(device):
            self._stream = torch.cuda.Stream(device)
            self._pinned = [
                torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)
            ]
        # Blocking: a waiting thread sleeps instead of taking a core from those that read.
        self._copied = [torch.cuda.Event(blocking=True) for _ in range(2)]
        self._staging: Tensor | None = None
        self._turn = 0
        self._stream.wait_event(ready)

    def move(self, chunk: _Chunk, fd: int) -> None:
        turn = self._turn
        self._turn = 1 - turn
        self._copied[turn].synchronize()  # returns at once before the event's first record
        raw = self._pinned[turn][: chunk.num_bytes]
        _read(chunk, fd, _bytes(raw))
        with torch.cuda.stream(self._stream):
            if chunk.needs_no_cast:
                chunk.destination.copy_(chunk.decode(raw), non_blocking=True)
            else:
                # A cast within copy_ from the host would run on the CPU. One staging buffer is
                # enough: its uses follow each other on one stream.
                if self._staging is None:
                    device = self._stream.device
                    self._staging = torch.empty(CHUNK_BYTES, dtype=torch.uint8, device=device)
                staged = self._staging[: chunk.num_bytes]
                staged.copy_(raw, non_blocking=True)
                chunk.destination.copy_(chunk.decode(staged))
            self._copied[turn].record(self._stream)

    def finish(self) -> None:
        self._stream.synchronize()


def _cut(tensor: TensorInfo, part: tuple[slice, ...], destination: Tensor) -> Iterator[_Chunk]:
    """The chunks of `tensor`[`part`], each at most CHUNK_BYTES of the file."""
    itemsize = TORCH_DTYPES[tensor.dtype].itemsize
    limit = CHUNK_BYTES // itemsize
    offset, run, step = _runs(tensor, part)
    if run == step:  # without gaps
        for piece in _pieces(destination, limit):
            num_bytes = piece.numel() * itemsize
            yield _Chunk(tensor, tensor.begin + offset, num_bytes, piece, num_bytes, num_bytes)
            offset += num_bytes
        return
    assert run // itemsize <= limit, f"{tensor.name}: a row of {part} is longer than a chunk"
    limit -= limit % (run // itemsize)  # whole runs
    for piece in _pieces(destination, limit):
        num_bytes = piece.numel() * itemsize
        yield _Chunk(tensor, tensor.begin + offset, num_bytes, piece, run, step)
        offset += num_bytes // run * step


def _runs(tensor: TensorInfo, part: tuple[slice, ...]) -> tuple[int, int, int]:
    """Where the first byte of `part` lies in the tensor, how many lie together, and how far apart these runs begin.

    A part of whole rows is one run; then the last two are equal.
    """
    itemsize, shape = TORCH_DTYPES[tensor.dtype].itemsize, tensor.shape
    box = box_of(part, shape)
    cut = [d for d, size in enumerate(shape) if box[d] != (0, size)]
    if not cut:
        return 0, tensor.num_bytes, tensor.num_bytes
    assert len(cut) == 1, f"{tensor.name}: {part} is cut in several dimensions"
    (start, stop), inner = box[cut[0]], itemsize * math.prod(shape[cut[0] + 1 :])
    run = (stop - start) * inner
    step = shape[cut[0]] * inner if math.prod(shape[: cut[0]]) > 1 else run
    return start * inner, run, step


def _pieces(view: Tensor, limit: int) -> Iterator[Tensor]:
    """Views of `view`, in row-major order, with 1 to `limit` elements each."""
    if view.numel() == 0:
        return
    if view.numel() <= limit:
        yield view
    elif view.is_contiguous():
        yield from view.view(-1).split(limit)
    else:
        elements_a_row = view.numel() // view.shape[0]
        if elements_a_row > limit:
            for row in view.unbind(0):
                yield from _pieces(row, limit)
        else:
            yield from view.split(limit // elements_a_row)


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous uint8 CPU tensor."""
    return tensor.numpy().data


def _open(file: Path) -> int:
    try:
        return os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ModelError(
            f"{file}: cannot be read ({error.strerror}); check the path and its permissions"
        ) from error


def _read(chunk: _Chunk, fd: int, buffer: memoryview) -> None:
    """Fill `buffer` with the bytes of `chunk`; releases the GIL while reading."""
    for i in range(chunk.num_bytes // chunk.run):
        begin = i * chunk.run
        _read_run(
            chunk.tensor, fd, buffer[begin : begin + chunk.run], chunk.offset + i * chunk.step
        )


def _read_run(tensor: TensorInfo, fd: int, buffer: memoryview, offset: int) -> None:
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(fd, [buffer[done:]], offset + done)
        except OSError as error:
            raise ModelError(
                f"{tensor.file}: tensor {show(tensor.name)}: reading failed ({error.strerror}); check the disk, "
                "fetch the file again"
            ) from error
        if count == 0:
            raise ModelError(
                f"{tensor.file}: tensor {show(tensor.name)}: the file ends at byte {offset + done}, it was longer "
                "when it was opened; load again when nothing writes to it"
            )
        done += count


def _default_threads() -> int:
    """Twice the cores we may use: while one thread of a pair waits for the disk, one copies."""
    return min(MAX_THREADS, 2 * len(os.sched_getaffinity(0)))
