"""The load of `hayate bench serve`: random prompts that come at random or by turns, and what is seen of them."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from itertools import accumulate

from hayate.bench.burst import Progress
from hayate.bench.serve_targets import Answer, Endpoint, Target, measure
from hayate.errors import HayateError

_IDS = range(3, 256)  # token ids that every vocabulary has

Send = Callable[[list[int], float], Coroutine[None, None, None]]  # prompt, when it is due


@dataclass(frozen=True)
class Workload:
    """Random prompts of one length. rate: requests a second, Poisson; or concurrency: clients that wait their turn."""

    requests: int
    input: int
    output: int
    seed: int
    rate: float | None
    concurrency: int | None

    def prompts(self) -> list[list[int]]:
        draw = random.Random(self.seed)
        return [draw.choices(_IDS, k=self.input) for _ in range(self.requests)]

    def arrivals(self) -> list[float]:
        """Seconds from the first request at which each is due."""
        assert self.rate is not None
        draw = random.Random(self.seed)
        gaps = [draw.expovariate(self.rate) for _ in range(self.requests - 1)]
        return list(accumulate(gaps, initial=0.0))

    def describe(self) -> str:
        if self.rate is not None:
            how = f"Poisson, {self.rate:g} requests/s, seed {self.seed}"
        else:
            how = f"{self.concurrency} clients, each one request after the other"
        return f"{self.requests} requests of {self.input} + {self.output} tokens; {how}"


@dataclass
class Measurement:
    """All answers in the order of their requests, and the processor time of the client's thread."""

    answers: list[Answer] = field(default_factory=list)
    client_seconds: float = 0.0
    interrupted: bool = False

    @property
    def complete(self) -> list[Answer]:
        return [a for a in self.answers if a.complete]

    @property
    def seconds(self) -> float:
        """From the first request to the last end."""
        ends = [a.end for a in self.answers if a.end is not None]
        return max(ends) - self.answers[0].start if ends else 0.0


async def run_load(target: Target, workload: Workload, progress: Progress | None) -> Measurement:
    """Send all of it, after a first request that is not counted. Ctrl-C ends it early: see `interrupted`.

    Raises:
        HayateError: already the first request fails.
    """
    measurement = Measurement()
    prompts = workload.prompts()
    try:
        if isinstance(target, Endpoint):
            await target.open(prompts[-1])
        warm_up = Answer(time.perf_counter())
        await measure(target, prompts[-1][::-1], min(workload.output, 4), warm_up)
        if warm_up.error is not None:
            raise HayateError(f"a first request failed: {warm_up.error}")
        send = _sender(target, workload, measurement, progress)
        load = (
            _poisson(send, prompts, workload.arrivals())
            if workload.rate
            else _clients(send, prompts, workload)
        )
        task = asyncio.ensure_future(load)
        with _interruptible(task):
            began = time.thread_time()
            try:
                await task
            except asyncio.CancelledError:
                measurement.interrupted = True
            measurement.client_seconds = time.thread_time() - began
    finally:
        await target.close()
    return measurement


def _sender(
    target: Target, workload: Workload, measurement: Measurement, progress: Progress | None
) -> Send:
    done = 0

    async def send(prompt: list[int], due: float) -> None:
        nonlocal done
        answer = Answer(due)
        measurement.answers.append(answer)
        await measure(target, prompt, workload.output, answer)
        done += 1
        if progress is not None:
            progress(done, workload.requests)

    return send


async def _poisson(send: Send, prompts: list[list[int]], arrivals: list[float]) -> None:
    begin = time.perf_counter()
    async with _tasks() as tasks:
        for prompt, arrival in zip(prompts, arrivals, strict=True):
            await asyncio.sleep(begin + arrival - time.perf_counter())
            tasks.append(asyncio.ensure_future(send(prompt, begin + arrival)))


async def _clients(send: Send, prompts: list[list[int]], workload: Workload) -> None:
    turn = iter(prompts)

    async def client() -> None:
        for prompt in turn:
            await send(prompt, time.perf_counter())

    async with _tasks() as tasks:
        tasks += [asyncio.ensure_future(client()) for _ in range(workload.concurrency or 1)]


@contextlib.asynccontextmanager
async def _tasks() -> AsyncIterator[list[asyncio.Future[None]]]:
    """A list of tasks that are waited for at the end, and cancelled together when the waiting is."""
    tasks: list[asyncio.Future[None]] = []
    try:
        yield tasks
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.contextmanager
def _interruptible(task: asyncio.Future[None]) -> Iterator[None]:
    """Ctrl-C cancels `task`; outside the main thread nothing changes."""
    loop = asyncio.get_running_loop()
    try:
        loop.add_signal_handler(signal.SIGINT, task.cancel)
    except (ValueError, RuntimeError, NotImplementedError):
        yield
        return
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)
