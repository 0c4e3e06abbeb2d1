"""The engine's pipeline and graphs on the GPU: every token judged by one prefill over its own text.

The slack, in bf16: a logit errs by some 1 % of the largest, as each layer rounds some ten values a token by 2^-9 and
prefill and decode sum in other orders; a probability at temperature 0.3 by some 15 % of itself. A wrong token,
position, page, seed or step is seen in the first few tokens that follow.
"""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from hayate import LLM, SamplingParams
from hayate.errors import ModelError
from hayate.models import ModelConfig, preset_config
from hayate.models.decoder import init_random
from tests.engine import crowd

SLACK = 0.1
SIMPLE = ("greedy", "draw", "filtered")


def small(name: str) -> ModelConfig:
    config = preset_config(name)
    fields = {"num_layers": 3, "vocab_size": 4096, "max_position_embeddings": 1024}
    if config.moe:
        fields["moe"] = dataclasses.replace(config.moe, ffn_size=512)
    return dataclasses.replace(config, **fields)


def make(name: str = "smollm2-135m", **options) -> LLM:
    options = {"kv_memory": "256M", "max_num_seqs": 24, "max_chunk_tokens": 128, **options}
    llm = LLM.from_random(small(name), device="cuda", **options)
    # Weights so large that the layers, not the embedding of the last token, decide what comes next.
    init_random(llm.engine.runner.model, std=0.05)
    return llm


@pytest.mark.parametrize("kinds", [SIMPLE, tuple(crowd.KINDS)], ids=["simple", "all kinds"])
@pytest.mark.parametrize("name", ["smollm2-135m", "qwen2.5-7b"])
def test_a_crowd_that_comes_and_goes(name, kinds):
    """Prompts join in chunks, sequences leave, rows are given on: all without draining the pipeline."""
    rng = random.Random(len(kinds))
    llm = make(name)
    requests = crowd.draw_requests(llm, 60, rng, kinds)
    crowd.run(llm, requests, rng)
    for request in requests:
        crowd.judge(llm, request, SLACK)
    assert llm.engine.stats.num_prefix_tokens_found > 0


def test_graphs_are_captured_once():
    """The same crowd again takes the same steps, of graphs that are there, and gives the same tokens."""
    llm = make(prefix_cache=False)
    tokens, captured = [], []
    for _ in range(2):
        rng = random.Random(5)
        requests = crowd.draw_requests(llm, 40, rng, SIMPLE)
        crowd.run(llm, requests, rng)
        tokens.append([r.samples[0].output.token_ids for r in requests])
        captured.append(len(llm.engine.runner.graphs._graphs))
    assert tokens[0] == tokens[1]
    assert captured[0] == captured[1]


def test_few_pages():
    """Sequences are preempted while their tokens are in flight, and come back."""
    rng = random.Random(6)
    config = small("smollm2-135m")
    llm = make(kv_memory=16 * 64 * config.kv_bytes_per_token(2), prefix_cache=False)
    requests = crowd.draw_requests(llm, 40, rng, tuple(crowd.KINDS))
    crowd.run(llm, requests, rng, arrivals=0.9)
    assert llm.engine.stats.num_preemptions > 0
    for request in requests:
        crowd.judge(llm, request, SLACK)


@pytest.mark.parametrize("kinds", [SIMPLE, tuple(crowd.KINDS)], ids=["simple", "all kinds"])
@pytest.mark.parametrize(("count", "arrivals"), [(40, 0.5), (12, 0.05)], ids=["many", "few"])
def test_drafts_change_nothing_but_the_number_of_steps(kinds, count, arrivals):
    """Few at a time are verified by graphs, many by hand; ordinary steps run between."""
    rng = random.Random(count)
    llm = make()
    requests = crowd.draw_requests(llm, count, rng, kinds)
    crowd.run(llm, requests, rng, arrivals)
    again = [llm.requests.of_prompt(r.prompt_ids, r.samples[0].sequence.params) for r in requests]
    speculator = crowd.KnownAnswers(rng)
    speculator.install(llm, requests)
    crowd.run(llm, again, rng, arrivals)
    for request in again:
        crowd.judge(llm, request, SLACK)
    # Proposals end being right where rounding made another text of it.
    assert speculator.stats.num_accepted > 0.1 * speculator.stats.num_drafted > 0
    if count == 12:
        assert any(queries > 1 for _, queries, _ in llm.engine.runner.graphs._graphs)


def test_a_request_among_others_waits_for_nobody():
    """The tokens of a step come one step late, no later: a stop token ends a sequence with one token dropped."""
    llm = make()
    free = llm.generate([[5, 6, 7]], SamplingParams(temperature=0, max_tokens=40))[0].outputs[0]
    stop = free.token_ids[10]
    end = free.token_ids.index(stop) + 1
    before = llm.engine.num_steps
    params = SamplingParams(temperature=0, max_tokens=40, stop_token_ids=(stop,))
    out = llm.generate([[5, 6, 7]], params)[0].outputs[0]
    assert out.token_ids == free.token_ids[:end]
    assert llm.engine.num_steps - before <= end + 1


def test_aborted_and_failed_requests_leave_the_others_whole():
    rng = random.Random(7)
    llm = make("minitron-8b")  # embeddings not tied: a row of NaN touches nobody else
    requests = crowd.draw_requests(llm, 30, rng, tuple(crowd.KINDS))
    poisoned = [
        llm.requests.of_prompt([9, 4095, 11], SamplingParams(temperature=t, max_tokens=30, seed=1))
        for t in (0.0, 0.7)
    ]
    llm.engine.runner.model.model.embed_tokens.weight.data[4095] = torch.nan
    requests = [r for r in requests if 4095 not in r.prompt_ids]
    for i, request in enumerate([*requests, *poisoned]):
        llm.engine.submit(request)
        llm.engine.step()
        if i % 7 == 3 and request not in poisoned:
            llm.engine.abort(request)
    while llm.engine.has_work:
        llm.engine.step()
    for request in poisoned:
        assert isinstance(request.error, ModelError)
    for request in requests:
        sample = request.samples[0]
        if sample.output.finish_reason != "abort" and 4095 not in sample.output.token_ids:
            crowd.judge(llm, request, SLACK)
    llm.engine.scheduler.check()
    assert llm.engine.pages.num_free == llm.plan.num_pages
