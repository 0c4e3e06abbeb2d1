"""AsyncLLM: many callers over one engine; each gets what it gets alone, and nothing ever hangs."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Iterator

import pytest

from hayate import LLM, AsyncLLM, SamplingParams
from hayate.errors import GpuFault, OutOfMemory, UsageError
from hayate.runtime.outputs import RequestOutput, StreamChunk
from tests.engine.tiny import KV_BYTES_PER_TOKEN, tiny

GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
ENDLESS = SamplingParams(temperature=0, max_tokens=900, ignore_eos=True)
PROMPTS = [[3 + (7 * i + 3 * j) % 300 for j in range(5 + 11 * i)] for i in range(8)]


def run(main: Awaitable[None]) -> None:
    """Run `main`; a test that hangs fails."""

    async def bounded() -> None:
        await asyncio.wait_for(main, timeout=60)

    asyncio.run(bounded())


@pytest.fixture(scope="module")
def alone() -> list[list[int]]:
    llm = tiny(LLM)
    return [tokens(llm.generate(p, GREEDY)) for p in PROMPTS]


@pytest.fixture
def llm() -> Iterator[AsyncLLM]:
    """A fresh one for each test; whatever the test did to it, its thread must end."""
    llm = tiny(AsyncLLM)
    yield llm
    llm._thread.close(drain=False)
    llm._thread.join()
    assert llm._thread._live == {}


def tokens(outputs: list[RequestOutput]) -> list[int]:
    return outputs[0].outputs[0].token_ids


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what the engine thread does before its next step."""
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end, "it never came"
        await asyncio.sleep(0.001)


async def idle(llm: AsyncLLM) -> None:
    """Wait until nothing runs; all memory must be free then, and nothing remembered."""
    await until(lambda: not llm.engine.has_work and not llm._thread._live)
    assert llm.engine.pages.num_free == llm.plan.num_pages
    assert not llm._mail.boxes
    assert not llm._by_id


# -- what callers get ------------------------------------------------------------------------------


def test_many_at_once_equal_alone(llm: AsyncLLM, alone: list[list[int]]) -> None:
    async def main() -> None:
        calls = (llm.generate(p, GREEDY) for p in PROMPTS)
        assert [tokens(o) for o in await asyncio.gather(*calls)] == alone
        listed = await llm.generate(PROMPTS, [GREEDY] * len(PROMPTS))
        assert [o.outputs[0].token_ids for o in listed] == alone
        await idle(llm)

    run(main())


def test_streams_at_once_equal_alone(llm: AsyncLLM, alone: list[list[int]]) -> None:
    async def stream(prompt: list[int]) -> list[int]:
        chunks = [c async for c in llm.stream(prompt, GREEDY)]
        assert [c.request is not None for c in chunks] == [False] * (len(chunks) - 1) + [True]
        assert chunks[-1].finish_reason == "length"
        return [t for c in chunks for t in c.token_ids]

    async def main() -> None:
        assert await asyncio.gather(*map(stream, PROMPTS)) == alone

    run(main())


def test_a_reader_that_sleeps_holds_up_nobody(llm: AsyncLLM, alone: list[list[int]]) -> None:
    async def main() -> None:
        lazy = llm.stream(PROMPTS[0], GREEDY)
        read = [await anext(lazy)]
        assert tokens(await llm.generate(PROMPTS[1], GREEDY)) == alone[1]
        await until(lambda: not llm.engine.has_work)
        read += [c async for c in lazy]
        assert [t for c in read for t in c.token_ids] == alone[0]

    run(main())


def test_several_loops_in_several_threads(llm: AsyncLLM, alone: list[list[int]]) -> None:
    found: dict[int, list[int]] = {}

    def work(i: int) -> None:
        async def main() -> None:
            for _ in range(3):
                found[i] = tokens(await llm.generate(PROMPTS[i], GREEDY))

        run(main())

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(PROMPTS))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert [found[i] for i in range(len(PROMPTS))] == alone


# -- ending early ----------------------------------------------------------------------------------


def test_closing_an_iterator_and_cancelling_a_task_free_everything(llm: AsyncLLM) -> None:
    async def main() -> None:
        stream = llm.stream(PROMPTS[3], ENDLESS)
        await anext(stream)
        task = asyncio.create_task(llm.generate(PROMPTS, ENDLESS))
        await until(lambda: len(llm._thread._live) == 9)
        await stream.aclose()
        await until(lambda: len(llm._thread._live) == 8)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await idle(llm)

    run(main())


def test_leaving_a_loop_over_a_stream_frees_it(llm: AsyncLLM) -> None:
    async def main() -> None:
        async for chunk in llm.stream(PROMPTS[3], ENDLESS):
            assert chunk.token_ids
            break
        await idle(llm)

    run(main())


def test_abort_by_name(llm: AsyncLLM) -> None:
    async def main() -> None:
        stream = llm.stream(PROMPTS[0], ENDLESS, request_id="a")
        read = [await anext(stream)]
        with pytest.raises(UsageError, match="'a'"):
            await anext(llm.stream(PROMPTS[1], GREEDY, request_id="a"))
        assert llm.abort("a")
        assert not llm.abort("b")
        read += [c async for c in stream]
        assert read[-1].finish_reason == "abort"
        assert read[-1].request is not None
        (output,) = read[-1].request.outputs
        assert output.token_ids == [t for c in read for t in c.token_ids]
        assert 0 < len(output.token_ids) < 900
        await idle(llm)
        assert not llm.abort("a")

    run(main())


def test_a_timeout_ends_with_what_there_is(llm: AsyncLLM) -> None:
    async def main() -> None:
        short, plain = await asyncio.gather(
            llm.generate(PROMPTS[0], ENDLESS, timeout=0.1), llm.generate(PROMPTS[1], GREEDY)
        )
        assert short[0].metrics.total_time >= 0.1
        assert short[0].outputs[0].finish_reason == "timeout"
        assert 0 < len(tokens(short)) < 900
        assert plain[0].outputs[0].finish_reason == "length"
        await idle(llm)

    run(main())


def test_a_loop_that_is_gone_frees_its_requests(llm: AsyncLLM) -> None:
    streams = []  # else closing the loop would end them in good order

    async def main() -> None:
        streams.append(llm.stream(PROMPTS[0], ENDLESS))
        await anext(streams[0])

    loop = asyncio.new_event_loop()
    loop.run_until_complete(main())
    loop.close()
    end = time.monotonic() + 5
    while llm.engine.has_work:
        assert time.monotonic() < end
        time.sleep(0.001)
    assert llm.engine.pages.num_free == llm.plan.num_pages


# -- failure ---------------------------------------------------------------------------------------


def test_wrong_requests_are_refused_at_once(llm: AsyncLLM) -> None:
    async def main() -> None:
        for wrong in ([], [320], "text", None):
            with pytest.raises(UsageError):
                await llm.generate([wrong], GREEDY)
        with pytest.raises(UsageError, match="2 sampling params"):
            await llm.generate(PROMPTS, [GREEDY] * 2)
        with pytest.raises(UsageError, match="timeout"):
            await llm.generate(PROMPTS, GREEDY, timeout=0)
        with pytest.raises(UsageError, match="priority"):
            await llm.generate(PROMPTS, GREEDY, priority=1.5)
        with pytest.raises(UsageError, match="tokenizer"):
            await llm.chat([{"role": "user", "content": "hello"}])
        await idle(llm)

    run(main())


def test_a_request_that_can_never_run_fails_alone(alone: list[list[int]]) -> None:
    small = tiny(AsyncLLM, kv_memory=2 * 64 * KV_BYTES_PER_TOKEN)

    async def main() -> None:
        async with small:
            assert small.plan.max_model_len == 128
            prompts = [PROMPTS[0], [5] * 127 + [6], PROMPTS[1]]
            # The context holds it, the answer's first token included, only when the limits disagree: make them.
            object.__setattr__(small.plan, "max_model_len", 1024)
            with pytest.raises(OutOfMemory) as caught:
                await small.generate(prompts, GREEDY)
            first, failed, last = caught.value.outputs
            assert [tokens([first]), tokens([last])] == alone[:2]
            assert failed.outputs[0].finish_reason == "error"
            assert isinstance(failed.error, OutOfMemory)

    run(main())


def test_a_dead_engine_raises_everywhere_and_hangs_nobody(
    llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die() -> list[tuple]:
        raise GpuFault("the GPU failed while running: test")

    async def main() -> None:
        stream = llm.stream(PROMPTS[0], ENDLESS)
        read: list[StreamChunk] = [await anext(stream)]
        waiting = [asyncio.create_task(llm.generate(p, ENDLESS)) for p in PROMPTS]
        await until(lambda: len(llm._thread._live) == 9)
        monkeypatch.setattr(llm.engine, "step", die)
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(r) for r in results] == [GpuFault] * 8
        assert len({id(r) for r in results}) == 8  # an exception is not shared between tasks

        async def rest() -> None:
            async for chunk in stream:
                read.append(chunk)

        with pytest.raises(GpuFault, match="test"):
            await rest()
        assert read[-1].finish_reason == "error"
        with pytest.raises(GpuFault, match="test"):
            await llm.generate(PROMPTS[0], GREEDY)
        await llm.shutdown()

    run(main())


# -- the thread's life -----------------------------------------------------------------------------


@pytest.mark.parametrize("drain", [True, False])
def test_shutdown(llm: AsyncLLM, drain: bool) -> None:
    params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)

    async def main() -> None:
        task = asyncio.create_task(llm.generate(PROMPTS[0], params))
        await until(lambda: len(llm._thread._live) == 1)
        await llm.shutdown(drain=drain)
        (output,) = (await task)[0].outputs
        assert output.finish_reason == ("length" if drain else "abort")
        assert llm.engine.pages.num_free == llm.plan.num_pages
        with pytest.raises(UsageError, match="shut down"):
            await llm.generate(PROMPTS[0], GREEDY)
        await llm.shutdown()

    run(main())


def test_cancelling_a_shutdown_drops_what_it_waits_for(llm: AsyncLLM) -> None:
    async def main() -> None:
        task = asyncio.create_task(llm.generate(PROMPTS[0], ENDLESS))
        await until(lambda: len(llm._thread._live) == 1)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(llm.shutdown(), timeout=0.05)
        assert (await task)[0].outputs[0].finish_reason == "abort"

    run(main())


def test_leaving_the_context_waits_or_drops(alone: list[list[int]]) -> None:
    async def main() -> None:
        async with tiny(AsyncLLM) as llm:
            task = asyncio.create_task(llm.generate(PROMPTS[0], GREEDY))
            await until(lambda: task.done() or len(llm._thread._live) == 1)
        assert tokens(await task) == alone[0]
        tasks = []

        async def fail_inside() -> None:
            async with tiny(AsyncLLM) as llm:
                tasks.append(asyncio.create_task(llm.generate(PROMPTS[0], ENDLESS)))
                await until(lambda: len(llm._thread._live) == 1)
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await fail_inside()
        assert (await tasks[0])[0].outputs[0].finish_reason == "abort"

    run(main())


def test_an_idle_engine_does_nothing(llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    has_something = llm._thread._has_something
    monkeypatch.setattr(llm._thread, "_has_something", lambda: looks.append(1) or has_something())

    async def main() -> None:
        await llm.generate(PROMPTS[0], GREEDY)
        await idle(llm)
        before = len(looks)
        await asyncio.sleep(0.3)
        assert len(looks) <= before + 1

    run(main())


def test_an_async_llm_that_is_dropped_ends_its_thread() -> None:
    llm = tiny(AsyncLLM)
    run(llm.generate(PROMPTS[0], GREEDY))  # type: ignore[arg-type]
    thread, reference = llm._thread, weakref.ref(llm)
    del llm
    gc.collect()
    assert reference() is None
    thread.join()


def test_a_process_ends_though_nobody_shuts_down() -> None:
    import subprocess
    import sys

    program = (
        "import asyncio\n"
        "from hayate import AsyncLLM, SamplingParams\n"
        "from tests.engine.tiny import tiny\n"
        "async def main(llm):\n"
        "    stream = llm.stream([5, 6, 7], SamplingParams(temperature=0, ignore_eos=True))\n"
        "    await anext(stream)\n"
        "    return stream\n"
        "llm = tiny(AsyncLLM)\n"
        "stream = asyncio.run(main(llm))\n"
        "print('done')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
