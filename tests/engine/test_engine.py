"""The engine's loop on the CPU: crowds, drafts, priorities, deadlines, failures. fp32, so rounding hides nothing."""

from __future__ import annotations

import random
import time

import pytest
import torch

from hayate import LLM, SamplingParams
from hayate.errors import GpuFault, ModelError, UsageError
from tests.engine import crowd
from tests.engine.tiny import KV_BYTES_PER_TOKEN, tiny

GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
# fp32 logits of order 10 differ by some 1e-5 between batches, probabilities by as much at temperature 0.3.
SLACK = 1e-3


@pytest.mark.parametrize("num_pages", [200, 14])
def test_a_crowd_that_comes_and_goes(num_pages):
    """Chunks beside decoding, prefixes shared, few pages: every token is that of its own text."""
    rng = random.Random(num_pages)
    llm = tiny(
        LLM,
        kv_memory=num_pages * 64 * KV_BYTES_PER_TOKEN,
        max_num_seqs=12,
        max_num_batched_tokens=256,
        max_chunk_tokens=64,
    )
    requests = crowd.draw_requests(llm, 40, rng, tuple(crowd.KINDS))
    crowd.run(llm, requests, rng)
    for request in requests:
        crowd.judge(llm, request, SLACK)
    stats = llm.engine.stats
    assert stats.num_prefix_tokens_found > 0
    assert stats.num_generated_tokens == sum(
        r.samples[0].sequence.params.max_tokens for r in requests
    )
    assert (stats.num_running, stats.num_waiting, stats.num_pages_used) == (0, 0, 0)


def test_drafts_change_nothing_but_the_number_of_steps():
    rng = random.Random(1)
    llm = tiny(LLM, max_num_seqs=12, max_chunk_tokens=64)
    requests = crowd.draw_requests(llm, 25, rng, tuple(crowd.KINDS))
    crowd.run(llm, requests, rng)
    before = llm.engine.num_steps
    again = [llm.requests.of_prompt(r.prompt_ids, r.samples[0].sequence.params) for r in requests]
    speculator = crowd.KnownAnswers(rng)
    speculator.install(llm, requests)
    crowd.run(llm, again, rng)
    for first, second in zip(requests, again, strict=True):
        crowd.judge(llm, second, SLACK)
        assert second.samples[0].output.token_ids == first.samples[0].output.token_ids
    assert speculator.stats.acceptance_rate > 0.5
    assert llm.engine.num_steps - before < 0.8 * before


def test_n_samples_compute_their_prompt_once():
    llm = tiny(LLM)
    params = SamplingParams(temperature=1.0, seed=3, n=4, max_tokens=20, ignore_eos=True)
    prompt = [3 + i % 300 for i in range(200)]
    together = llm.generate([prompt], params)[0].outputs
    # 200 tokens for the first, and 200 - 192, after the last full page, for each other.
    assert llm.engine.stats.num_prompt_tokens == 200 + 3 * 8
    alone = tiny(LLM, prefix_cache=False)
    assert [o.token_ids for o in together] == [
        o.token_ids for o in alone.generate([prompt], params)[0].outputs
    ]
    assert len({tuple(o.token_ids) for o in together}) == 4


def test_a_deadline_ends_what_runs_and_what_waits():
    llm = tiny(LLM, max_num_seqs=1)
    params = SamplingParams(temperature=0, max_tokens=900, ignore_eos=True)
    late = [llm.requests.of_prompt([5, 6, 7], params, timeout=2.0) for _ in range(2)]
    other = llm.requests.of_prompt([5, 6, 7], GREEDY)
    for request in (*late, other):
        llm.engine.submit(request)
    for _ in range(3):
        llm.engine.step()
    time.sleep(max(late[1].deadline - time.perf_counter(), 0))
    events = []
    while llm.engine.has_work:
        events += llm.engine.step()
    outputs = [r.samples[0].output for r in late]
    assert [o.finish_reason for o in outputs] == ["timeout", "timeout"]
    assert outputs[0].token_ids == llm.generate([[5, 6, 7]], params)[0].outputs[0].token_ids[:3]
    assert outputs[1].token_ids == []
    assert (
        other.samples[0].output.token_ids
        == llm.generate([[5, 6, 7]], GREEDY)[0].outputs[0].token_ids
    )
    assert [c.finish_reason for _, c in events if c.request is not None].count("timeout") == 2
    assert llm.engine.pages.num_free == llm.plan.num_pages


def test_nan_fails_its_own_sample():
    """A row of the embedding is NaN: the request that has the token fails, those beside it do not."""
    llm = tiny(LLM)
    prompts = [[9, 10, 11], [9, 77, 11], [12, 13]]
    wanted = [o.outputs[0].token_ids for o in llm.generate(prompts, GREEDY)]
    assert all(77 not in [*tokens] for tokens in (*wanted, prompts[0], prompts[2]))
    llm.engine.runner.model.model.embed_tokens.weight.data[77] = torch.nan
    with pytest.raises(ModelError, match="not finite") as failure:
        llm.generate(prompts, GREEDY)
    outputs = [o.outputs[0] for o in failure.value.outputs]
    assert [o.finish_reason for o in outputs] == ["length", "error", "length"]
    assert [outputs[0].token_ids, outputs[2].token_ids] == [wanted[0], wanted[2]]
    assert llm.generate([prompts[0]], GREEDY)[0].outputs[0].token_ids == wanted[0]


def test_a_gpu_fault_ends_the_engine(monkeypatch):
    llm = tiny(LLM)
    request = llm.requests.of_prompt([5, 6, 7], GREEDY)
    llm.engine.submit(request)
    llm.engine.step()
    # What PyTorch raises when a kernel has failed; a real fault would take this process with it.
    message = "CUDA error: an illegal memory access was encountered"
    monkeypatch.setattr(
        llm.engine.runner, "_launch", lambda *_, **__: (_ for _ in ()).throw(RuntimeError(message))
    )
    llm.engine.step()
    assert isinstance(request.error, GpuFault)
    assert request.samples[0].output.finish_reason == "error"
    assert len(request.samples[0].output.token_ids) == 1
    assert not llm.engine.has_work
    with pytest.raises(GpuFault, match="illegal memory access"):
        llm.generate([[5]], GREEDY)


def test_an_interrupt_loses_nothing(monkeypatch):
    """KeyboardInterrupt passes through; afterwards everything goes on from the tokens it had."""
    llm = tiny(LLM)
    wanted = llm.generate([[5, 6, 7]], GREEDY)[0].outputs[0].token_ids
    request = llm.requests.of_prompt([5, 6, 7], GREEDY)
    llm.engine.submit(request)
    for _ in range(4):
        llm.engine.step()

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(llm.engine.runner, "_launch", interrupt)
        with pytest.raises(KeyboardInterrupt):
            llm.engine.step()
    while llm.engine.has_work:
        llm.engine.step()
    assert request.samples[0].output.token_ids == wanted
    llm.engine.scheduler.check()


def test_urgent_requests_go_first():
    llm = tiny(LLM, max_num_seqs=1)
    order = []
    requests = [llm.requests.of_prompt([5 + p], GREEDY, priority=p) for p in (3, 1, 2)]
    for request in requests:
        llm.engine.submit(request)
    while llm.engine.has_work:
        order += [r.priority for r, chunk in llm.engine.step() if chunk.request is not None]
    assert order == [1, 2, 3]


def test_options_of_the_scheduler_are_checked():
    for options, message in [
        ({"max_num_batched_tokens": 63}, "--max-num-batched-tokens 63"),
        ({"max_chunk_tokens": 10}, "--max-chunk-tokens 10"),
        ({"max_num_batched_tokens": 128, "max_chunk_tokens": 256}, "--max-chunk-tokens 256"),
        ({"max_num_seqs": 0}, "--max-num-seqs 0"),
        ({"num_draft_tokens": 16}, "--num-draft-tokens 16"),
        ({"speculative": ""}, "--speculative"),
    ]:
        with pytest.raises(UsageError, match=message):
            tiny(LLM, **options)
