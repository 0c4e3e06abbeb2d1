"""Whatever else happens, a request gets the tokens of a naive loop: the whole text through the model for each token.

Every feature of the engine alone, every pair of them, and all together, in fp32 on the CPU. The naive loop shares the
model and the sampler with the engine, and nothing of what is tested: no scheduling, no reuse of keys and values.
Prefill and decode round differently, by 1e-6 of a logit; at these seeds no choice of a token is that close.
"""

from __future__ import annotations

import dataclasses
from itertools import combinations
from typing import Any

import pytest

from hayate import LLM, SamplingParams
from hayate.checkpoint.config_json import ConfigReader
from hayate.config import PAGE_SIZE
from hayate.models.decoder import init_random
from hayate.models.families import parse_config
from hayate.runtime.request import Request, Sample
from hayate.runtime.sampler import Sampler
from hayate.runtime.scheduler import Step

_DENSE = {
    "architectures": ["MistralForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "max_position_embeddings": 256,
    "sliding_window": 70,  # across two pages
    "torch_dtype": "float32",
}
_MOE = {
    **_DENSE,
    "architectures": ["MixtralForCausalLM"],
    "sliding_window": None,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
_DYNAMIC = {
    **_DENSE,
    "architectures": ["LlamaForCausalLM"],
    "sliding_window": None,
    "rope_scaling": {"rope_type": "dynamic", "factor": 4.0},
    "max_position_embeddings": 125,  # some prompts are longer, and some come to be
}
del _DYNAMIC["sliding_window"]

# Options that bring a feature about; the others are in how `_Run` submits.
OPTIONS: dict[str, dict[str, Any]] = {
    "chunks": {"max_num_batched_tokens": PAGE_SIZE, "max_chunk_tokens": PAGE_SIZE},
    "prefix cache": {"prefix_cache": True},
    "preemption": {"kv_pages": 5},
    "few at a time": {"max_num_seqs": 2},
    "samples": {},
    "others aborted": {},
    "priorities": {"max_num_seqs": 2},
    "late arrivals": {},
}


def make_llm(config: dict[str, Any], **options: Any) -> LLM:
    parsed = parse_config(ConfigReader(dict(config), "test"))
    llm = LLM.from_random(parsed, device="cpu", prefix_cache=False, kv_memory=2**23, **options)
    init_random(llm.engine.runner.model, std=0.3)  # large, so that the text does not repeat itself
    return llm


def _ids(count: int, seed: int) -> list[int]:
    return [3 + (seed * 97 + i * (13 + seed)) % 311 for i in range(count)]


# Several begin alike, and several come to a new page while they answer.
_COMMON = _ids(187, seed=0)
PROMPTS = [
    _COMMON[:122],
    _COMMON[:128],
    _COMMON,
    _COMMON[:58],
    _COMMON[:70] + _ids(53, 1),
    _ids(3, 2),
    _ids(65, 3),
    _ids(150, 4),
]
_GREEDY = SamplingParams(temperature=0, max_tokens=8)
PARAMS = [
    _GREEDY,
    SamplingParams(temperature=1.0, seed=5, max_tokens=8),
    SamplingParams(temperature=0.8, top_k=20, top_p=0.9, seed=6, max_tokens=7),
    SamplingParams(temperature=0, repetition_penalty=1.4, max_tokens=12),
    SamplingParams(temperature=1.2, min_p=0.05, seed=8, frequency_penalty=0.5, max_tokens=8),
    _GREEDY,
    SamplingParams(temperature=0, max_tokens=1),
    SamplingParams(temperature=1.0, seed=9, logit_bias={5: 3.0}, max_tokens=8),
]
# The same with two samples of those that draw.
SEVERAL = [dataclasses.replace(p, n=2 if p.temperature else 1) for p in PARAMS]


def naive_loop(llm: LLM, prompt: list[int], sample: Sample) -> list[int]:
    """The tokens of a sample, the whole text computed anew for each."""
    output = sample.row.output_ids
    while len(output) < sample.sequence.limit - len(prompt):
        logits = llm.logits(prompt + output)[-1:]
        output += Sampler().sample(logits, [sample.row]).to_list()
    return output


class _Run:
    """One engine with the features asked for, and what it did."""

    def __init__(self, llm: LLM, features: tuple[str, ...], seed: int) -> None:
        self.features = features
        options = {k: v for name in features for k, v in OPTIONS[name].items()}
        pages = options.pop("kv_pages", 60)
        page_bytes = llm.plan.kv_bytes // llm.plan.num_pages
        self.llm = LLM.sharing(llm, kv_memory=pages * page_bytes, **options)
        self.engine = self.llm.engine
        self.seed = seed
        self.steps: list[Step] = []

    def step(self) -> None:
        plan = self.engine.scheduler.next_batch

        def noted() -> Step | None:
            step = plan()
            self.steps += [step] if step is not None else []
            return step

        self.engine.scheduler.next_batch = noted  # type: ignore[method-assign]
        self.engine.step()
        self.engine.scheduler.next_batch = plan  # type: ignore[method-assign]
        self.engine.scheduler.check()

    def outputs(self, params: list[SamplingParams]) -> list[list[list[int]]]:
        """The tokens of every sample of every prompt."""
        requests: list[Request] = []
        extra: list[Request] = []
        for i, (prompt, p) in enumerate(zip(PROMPTS, params, strict=True)):
            priority = (5, 5, 0, 3, 0, 5, 1, 2)[i] if "priorities" in self.features else 0
            if "others aborted" in self.features:
                other = _COMMON[: 20 * i + 1] + _ids(20, self.seed + i)
                extra.append(self.llm.requests.of_prompt(other, _GREEDY, priority=priority))
                self.engine.submit(extra[-1])
            requests.append(self.llm.requests.of_prompt(prompt, p, priority=priority))
            self.engine.submit(requests[-1])
            if "late arrivals" in self.features or "priorities" in self.features:
                for _ in range(3):
                    self.step()
            if i % 2 and extra:
                self.engine.abort(extra.pop(0))
        while not all(r.finished for r in requests):
            self.step()
            if extra and len(self.steps) % 4 == 0:
                self.engine.abort(extra.pop())
        for request in extra:
            self.engine.abort(request)
        return [[s.output.token_ids for s in r.samples] for r in requests]

    def check_that_it_happened(self) -> None:
        scheduler, features = self.engine.scheduler, self.features
        if "chunks" in features:
            assert any(not all(step.samples) for step in self.steps)
            assert max(sum(step.num_tokens) for step in self.steps) <= PAGE_SIZE
        if "prefix cache" in features:
            assert scheduler.num_prompt_tokens_cached >= PAGE_SIZE
        else:
            assert scheduler.num_prompt_tokens_cached == 0
        if "preemption" in features or "priorities" in features:
            assert scheduler.num_preemptions > 0
        if "few at a time" in features:
            assert max(len(step.sequences) for step in self.steps) == 2
        if "late arrivals" in features:
            assert any(0 < step.num_decode < len(step.sequences) for step in self.steps)
        assert not scheduler.has_work
        assert self.engine.pages.num_free == self.llm.plan.num_pages


@pytest.fixture(scope="module", params=[_DENSE, _MOE], ids=["window", "moe"])
def case(request):
    """A model, and the tokens of every sample by the naive loop."""
    llm = make_llm(request.param)
    made = [llm.requests.of_prompt(*pair) for pair in zip(PROMPTS, SEVERAL, strict=True)]
    return llm, [[naive_loop(llm, r.prompt_ids, s) for s in r.samples] for r in made]


def check(case, features: tuple[str, ...]) -> None:
    llm, tokens = case
    params = SEVERAL
    if "samples" not in features:
        params, tokens = PARAMS, [samples[:1] for samples in tokens]
    run = _Run(llm, features, seed=len(features))
    assert run.outputs(params) == tokens
    run.check_that_it_happened()
    if "prefix cache" in features:  # once more, on what the first round has left behind
        assert run.outputs(params) == tokens


def _name(features: tuple[str, ...]) -> str:
    return " + ".join(features) if 0 < len(features) < 3 else "all" if features else "none"


@pytest.mark.parametrize("features", [(), *((f,) for f in OPTIONS), tuple(OPTIONS)], ids=_name)
def test_a_feature_changes_no_token(case, features):
    check(case, features)


@pytest.mark.parametrize("case", [_DENSE], ids=["window"], indirect=True)
@pytest.mark.parametrize("features", list(combinations(OPTIONS, 2)), ids=_name)
def test_two_features_change_no_token(case, features):
    check(case, features)


def test_samples_share_the_prompt_and_differ(case):
    llm, tokens = case
    run = _Run(llm, ("prefix cache",), seed=0)
    request = run.llm.requests.of_prompt(PROMPTS[7], dataclasses.replace(PARAMS[7], n=3))
    run.engine.submit(request)
    while not request.finished:
        run.step()
    assert run.steps[0].num_tokens == (150, 150 - 128, 150 - 128)
    outputs = [s.output.token_ids for s in request.samples]
    assert outputs[:2] == tokens[7]
    assert len({tuple(t) for t in outputs}) == 3


@pytest.mark.parametrize("features", [("chunks",), ("preemption",), tuple(OPTIONS)], ids=_name)
def test_rope_by_the_length_of_the_prompt(features):
    """Dynamic NTK: keys depend on the prompt's length. The naive loop, which has no prompt, is each request alone."""
    llm = make_llm(_DYNAMIC, max_model_len=256)
    params = SEVERAL if "samples" in features else PARAMS
    made = [llm.requests.of_prompt(*pair) for pair in zip(PROMPTS, params, strict=True)]
    alone = []
    for request in made:
        llm.engine.submit(request)
        while not request.finished:
            llm.engine.step()
        alone.append([s.output.token_ids for s in request.samples])
    run = _Run(llm, features, seed=1)
    assert run.outputs(params) == alone
    run.check_that_it_happened()
