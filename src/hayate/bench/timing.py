"""How long one call takes when what it streams comes from memory, not from a cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

# Before it comes back to the same bytes a pass touches this much: on a GPU so many times its L2,
# some of which may survive a whole round (weights are read with the hint that they will not be
# needed again), on a CPU as much as is bearable.
_ROTATION_CACHES = 64
_ROTATION_CPU = 256e6
# Small operands would need thousands of copies; a model's own activations lie in the cache too.
_MAX_COPIES = 1024
# A graph lasts about this long at least, so that starting and timing it does not count.
_GRAPH_SECONDS = 1.5e-3
_MAX_LAUNCHES = 1024
_LAUNCH_SECONDS = 2e-6  # of a kernel with nothing to do, about
_LOOP_SECONDS = 0.2  # a loop on a CPU ends after this: what is so slow does not wait for memory


def num_copies(device: torch.device, *, touched: float, size: float) -> int:
    """Sets of operands to go around, where a call touches `touched` bytes of its `size`.

    They take at most a third of the free memory.
    """
    rotation = _ROTATION_CPU
    room = float("inf")
    if device.type == "cuda":
        rotation = _ROTATION_CACHES * torch.cuda.get_device_properties(device).L2_cache_size
        room = torch.cuda.mem_get_info(device)[0] / 3
    wanted = min(-(-rotation // max(touched, 1)), room // max(size, 1), _MAX_COPIES)
    return max(int(wanted), 1)


class Pass:
    """`function` on each of `operands` in turn: as one CUDA graph, several times round, or as a loop."""

    def __init__(
        self,
        function: Callable[[Any], Any],
        operands: Sequence[Any],
        device: torch.device,
        *,
        least_seconds: float,
    ) -> None:
        """Compile, warm up and capture. On a GPU `least_seconds` of one call decides how often round."""
        self._function = function
        self._operands = list(operands)
        self._graph: torch.cuda.CUDAGraph | None = None
        self.first: Any = None  # the result of the first call of the last pass
        if device.type == "cuda":
            once = len(operands) * (least_seconds + _LAUNCH_SECONDS)
            rounds = min(-(-_GRAPH_SECONDS // once), _MAX_LAUNCHES // len(operands))
            self._warm_up(device)
            self._operands *= max(int(rounds), 1)
            self._capture()

    def _warm_up(self, device: torch.device) -> None:
        """Compile, and let the function do what it does once for each weight, outside the graph."""
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for operands in self._operands:
                self._function(operands)
        torch.cuda.current_stream(device).wait_stream(stream)
        torch.cuda.synchronize(device)

    def _capture(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self.first = self._function(self._operands[0])
            for operands in self._operands[1:]:
                self._function(operands)

    def run(self) -> None:
        """One pass; on a GPU it is only started."""
        if self._graph is not None:
            self._graph.replay()
        else:
            self._loop()

    def _loop(self) -> float:
        """Call until the operands or the time run out; the seconds of a call on average."""
        start = time.perf_counter()
        for calls, operands in enumerate(self._operands, start=1):
            result = self._function(operands)
            if calls == 1:
                self.first = result
            seconds = time.perf_counter() - start
            if seconds > _LOOP_SECONDS:
                break
        return seconds / calls

    def seconds(self) -> float:
        """Run one pass; the seconds of a call on average."""
        if self._graph is None:
            return self._loop()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        self.run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / len(self._operands)


def medians(passes: Sequence[Pass], runs: int) -> list[float]:
    """Seconds a call of each pass, the median of `runs`; they take turns, after one to warm up."""
    times = [[p.seconds() for p in passes] for _ in range(runs + 1)][1:]
    return [statistics.median(column) for column in zip(*times, strict=True)]
