"""Thousands of mixed requests from several threads on one engine: nothing leaks, nothing is lost, nothing hangs.

HAYATE_SOAK_REQUESTS sets how many (default 2,000, half a minute): 200,000 is a good night's run.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import random
import threading
from collections import Counter
from contextlib import aclosing

import pytest

from hayate import LLM, AsyncLLM, SamplingParams
from hayate.bench.equality import AlwaysCheap
from hayate.errors import UsageError
from hayate.runtime.outputs import RequestOutput
from hayate.runtime.request import Request
from tests.engine.tiny import KV_BYTES_PER_TOKEN, TINY, tiny

REQUESTS = int(os.environ.get("HAYATE_SOAK_REQUESTS", "2000"))
THREADS, AT_ONCE = 4, 32
MAX_LEN = 320
# After a quarter of the requests every buffer has had its largest size. What a leak costs: a request with its
# chunks takes 10 KiB or more, so that one of four kept would be 4 MiB at 2,000 requests, and its prompt's page as much.
# What no leak costs: the C allocator's arenas wander by 1 to 2 MiB.
MAX_GROWTH = 4 * 2**20
KINDS = ("generate", "stream", "list", "close", "abort", "cancel", "timeout", "refused")
COMMON = [
    [7 + i * j % 300 for j in range(200)] for i in range(1, 4)
]  # beginnings that prompts share


class Client:
    """One thread's requests, and what became of them."""

    def __init__(self, llm: AsyncLLM, known: list[tuple[list[int], list[int]]], seed: int) -> None:
        self.llm = llm
        self.known = known
        self.random = random.Random(seed)
        self.name = str(seed)
        self.counts: Counter[str] = Counter()
        self.errors: list[BaseException] = []

    def work(self, requests: int) -> None:
        async def main() -> None:
            gate = asyncio.Semaphore(AT_ONCE)

            async def one(number: int) -> None:
                async with gate:
                    await self.request(number)

            await asyncio.wait_for(asyncio.gather(*map(one, range(requests))), timeout=3600)

        try:
            asyncio.run(main())
        except BaseException as error:
            self.errors.append(error)

    async def request(self, number: int) -> None:
        kind = self.random.choice(KINDS)
        priority = self.random.choice((0, 0, 0, -1, 1))
        if kind == "generate" and self.random.random() < 0.5:
            prompt, wanted = self.random.choice(self.known)
            (output,) = await self.llm.generate(prompt, greedy(), priority=priority)
            assert output.outputs[0].token_ids == wanted, "the crowd changed a request's tokens"
            self.counts["checked"] += 1
            return
        await getattr(self, kind)(number, priority)
        self.counts[kind] += 1

    async def generate(self, number: int, priority: int) -> None:
        params = self.params(number)
        (output,) = await self.llm.generate(self.prompt(), params, priority=priority)
        check(output, params)

    async def list(self, number: int, priority: int) -> None:
        params = [self.params(number) for _ in range(3)]
        prompts = [self.prompt() for _ in params]
        outputs = await self.llm.generate(prompts, params, priority=priority)
        for prompt, output, p in zip(prompts, outputs, params, strict=True):
            assert output.prompt_token_ids == prompt
            check(output, p)

    async def stream(self, number: int, priority: int) -> None:
        params, tokens = self.params(number), Counter[int]()
        async for chunk in self.llm.stream(self.prompt(), params, priority=priority):
            tokens[chunk.index] += len(chunk.token_ids)
        assert chunk.request is not None
        check(chunk.request, params)
        assert [tokens[o.index] for o in chunk.request.outputs] == [
            len(o.token_ids) for o in chunk.request.outputs
        ]

    async def close(self, number: int, priority: int) -> None:
        async with aclosing(self.llm.stream(self.prompt(), endless(), priority=priority)) as chunks:
            for _ in range(self.random.randrange(4)):
                await anext(chunks)

    async def abort(self, number: int, priority: int) -> None:
        name = f"{self.name}/{number}"
        reasons = []
        async for chunk in self.llm.stream(self.prompt(), endless(), request_id=name):
            reasons.append(chunk.finish_reason)
            if len(reasons) == 3:
                assert self.llm.abort(name)
        assert reasons[-1] == "abort"

    async def cancel(self, number: int, priority: int) -> None:
        task = asyncio.create_task(self.llm.generate(self.prompt(), endless(), priority=priority))
        await asyncio.sleep(self.random.uniform(0, 0.02))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def timeout(self, number: int, priority: int) -> None:
        seconds = self.random.uniform(0.0001, 0.03)
        (output,) = await self.llm.generate(self.prompt(), endless(), timeout=seconds)
        assert output.outputs[0].finish_reason in ("timeout", "length")

    async def refused(self, number: int, priority: int) -> None:
        wrong = self.random.choice(([], [TINY.vocab_size], [5] * MAX_LEN))
        with pytest.raises(UsageError):
            await self.llm.generate([wrong], greedy())

    def prompt(self) -> list[int]:
        common = self.random.choice(COMMON)[: self.random.choice((0, 0, 64, 150, 200))]
        return common + self.random.choices(range(3, 320), k=self.random.randrange(1, 60))

    def params(self, number: int) -> SamplingParams:
        draw = self.random
        return SamplingParams(
            n=draw.choice((1, 1, 1, 3)),
            temperature=draw.choice((0.0, 0.8, 1.5)),
            top_p=draw.choice((1.0, 0.9)),
            top_k=draw.choice((0, 20)),
            min_p=draw.choice((0.0, 0.1)),
            repetition_penalty=draw.choice((1.0, 1.0, 1.2)),
            frequency_penalty=draw.choice((0.0, 0.0, 0.5)),
            logit_bias=draw.choice((None, None, {5: 2.0})),
            logprobs=draw.choice((None, None, None, 2)),
            stop_token_ids=draw.choice(((), (9, 10, 11))),
            min_tokens=draw.choice((0, 3)),
            max_tokens=draw.randrange(3, 25),
            seed=draw.choice((None, number)),
        )


def greedy() -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=12)


def endless() -> SamplingParams:
    return SamplingParams(temperature=0)


def check(output: RequestOutput, params: SamplingParams) -> None:
    assert output.error is None
    assert len(output.outputs) == params.n
    for sample in output.outputs:
        assert sample.finish_reason in ("stop", "length")
        assert params.max_tokens is not None
        assert params.min_tokens <= len(sample.token_ids) <= params.max_tokens
        if sample.finish_reason == "length":
            assert len(sample.token_ids) == params.max_tokens
        if sample.finish_reason == "stop":
            assert sample.stop_reason == sample.token_ids[-1] in params.stop_token_ids
        assert (sample.logprobs is None) == (params.logprobs is None)
        assert sample.logprobs is None or len(sample.logprobs) == len(sample.token_ids)


def run(
    llm: AsyncLLM, known: list[tuple[list[int], list[int]]], requests: int, seed: int
) -> Counter:
    clients = [Client(llm, known, seed + i) for i in range(THREADS)]
    threads = [threading.Thread(target=c.work, args=(requests // THREADS,)) for c in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for client in clients:
        for error in client.errors:
            raise error
    return sum((client.counts for client in clients), Counter())


def resident_bytes() -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps for later is not in use
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_soak() -> None:
    plain = tiny(LLM)
    prompts = [[*COMMON[i % 3][: 40 * i], 5 + i, 6, 7] for i in range(6)]
    known = [(p, plain.generate(p, greedy())[0].outputs[0].token_ids) for p in prompts]
    llm = tiny(
        AsyncLLM,
        max_model_len=MAX_LEN,
        max_num_seqs=64,
        max_num_batched_tokens=256,
        max_chunk_tokens=64,
        kv_memory=24 * 64 * KV_BYTES_PER_TOKEN,  # five of the longest: some are preempted
        speculative="ngram",
    )
    assert llm.engine.speculation is not None
    llm.engine.speculation.speculator.costs = AlwaysCheap()
    run(llm, known, REQUESTS // 4, seed=0)
    before = resident_bytes()
    counts = run(llm, known, REQUESTS - REQUESTS // 4, seed=THREADS)
    asyncio.run(asyncio.wait_for(llm.shutdown(), timeout=60))
    growth = resident_bytes() - before

    stats = llm.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_pages_used) == (0, 0, 0)
    llm.engine.scheduler.check()  # every page is free or reusable
    assert llm.engine.pages.num_free == llm.plan.num_pages
    assert not (llm._mail.boxes or llm._by_id or llm._thread._live)
    assert not [o for o in gc.get_objects() if type(o) is Request], "a request is still held"
    assert growth < MAX_GROWTH, f"{growth / 2**20:.1f} MiB more than after the warm-up"
    # The crowd was a crowd.
    assert all(counts[kind] for kind in (*KINDS, "checked")), counts
    assert stats.num_preemptions > 0
    assert stats.num_prefix_tokens_found > 0
    assert 0 < stats.num_accepted_tokens < stats.num_draft_tokens
