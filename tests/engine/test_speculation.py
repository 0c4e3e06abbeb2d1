"""Speculative decoding end to end: the same tokens as without, from the same distribution, whatever is guessed."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import transformers

from hayate import LLM, SamplingParams
from hayate.checkpoint.smollm2 import smollm2_folder
from hayate.errors import ModelError, UsageError
from hayate.runtime import draft_model
from hayate.runtime.ngram import NgramProposer
from hayate.runtime.sequence import Sequence
from tests.engine.test_llm import TEXT, write_tokenizer
from tests.engine.tiny import TINY, tiny
from tests.parity import models

NUM_LAYERS = 3
PROMPTS = [[3 + (i * 7 + j * (i + 1)) % 200 for j in range(15 + 9 * i)] for i in range(3)]
PROMPTS.append([5, 9, 14, 30, 77] * 6)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model, and as its draft the same without the last layer, which matters little."""
    fields = {**models.COMMON, "vocab_size": 320, "head_dim": 16, "num_hidden_layers": NUM_LAYERS}
    torch.manual_seed(1)
    target = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields)).eval()
    with torch.no_grad():
        for parameter in target.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.15)
        last = target.model.layers[-1]
        last.self_attn.o_proj.weight *= 0.3
        last.mlp.down_proj.weight *= 0.3
    fields = {**fields, "num_hidden_layers": NUM_LAYERS - 1}
    draft = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields)).eval()
    draft.load_state_dict(target.state_dict(), strict=False)
    folders = {}
    for name, model in (("target", target), ("draft", draft)):
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
        write_tokenizer(folders[name])
    return folders


@pytest.fixture(scope="module")
def plain(folders):
    return LLM(folders["target"], device="cpu", dtype="float32", kv_memory="8M")


def always(llm: LLM) -> LLM:
    """Verify drafts at every step, whether it pays or not."""
    speculator = llm.engine.speculation.speculator
    speculator.wants = bool
    speculator._choose = lambda sequences, limits: speculator.draft_sizes[-1]
    return llm


class Oracle:
    """Knows what the model will say, and says something else now and then."""

    shadows = True
    first_run = False

    def __init__(self, plain: LLM) -> None:
        self.plain = plain
        self.answers: dict[tuple, list[int]] = {}

    def answer(self, sequence: Sequence) -> list[int]:
        key = (tuple(sequence.prompt_ids), sequence.seed, repr(sequence.params))
        if key not in self.answers:
            params = dataclasses.replace(sequence.params, n=1, seed=sequence.seed, logprobs=None)
            self.answers[key] = tokens_of(self.plain, [sequence.prompt_ids], params)[0]
        return self.answers[key]

    def propose(self, sequences, counts) -> list[list[int]]:
        guesses = []
        for sequence, count in zip(sequences, counts, strict=True):
            done, answer = len(sequence.output_ids), self.answer(sequence)
            guess = [*answer, *[0] * count][done : done + count]
            guesses.append([t if (done + i) % 5 else (t + 1) % 300 for i, t in enumerate(guess)])
        return guesses

    def preparation_seconds(self, sequences) -> float:
        return 0.0

    def observe(self, sequence, token) -> None: ...

    def record(self, sequence, num_drafts, num_accepted) -> None: ...

    def forget(self, sequence) -> None: ...


@pytest.fixture(scope="module", params=["ngram", "draft model", "oracle"])
def drafting(request, folders, plain):
    name = str(folders["draft"]) if request.param == "draft model" else "ngram"
    options = {"device": "cpu", "dtype": "float32", "kv_memory": "8M"}
    llm = always(LLM(folders["target"], speculative=name, num_draft_tokens=5, **options))
    if request.param == "oracle":
        llm.engine.speculation.speculator.proposer = Oracle(plain)
    return llm


def tokens_of(llm: LLM, prompts, params) -> list[list[int]]:
    return [o.token_ids for out in llm.generate(prompts, params) for o in out.outputs]


def assert_clean(llm: LLM) -> None:
    """Nothing is left of any sequence."""
    engine = llm.engine
    engine.scheduler.check()
    assert not engine.has_work
    assert engine.pages.num_free == llm.plan.num_pages
    speculator = engine.speculation.speculator
    assert not speculator._active
    proposer = speculator.proposer
    if isinstance(proposer, draft_model.DraftModelProposer):
        assert not proposer._mirrors
        assert proposer.pages.num_free == llm.plan.num_pages
    if isinstance(proposer, NgramProposer):
        assert not proposer._histories


# -- the same tokens ----------------------------------------------------------------------------------

CASES = {
    "greedy": SamplingParams(temperature=0, max_tokens=50, ignore_eos=True),
    "sampled": SamplingParams(temperature=0.8, seed=3, max_tokens=40, ignore_eos=True),
    "filtered": SamplingParams(
        temperature=1.2, top_k=20, top_p=0.9, min_p=0.02, seed=4, max_tokens=40, ignore_eos=True
    ),
    "penalties": SamplingParams(
        temperature=0.7,
        repetition_penalty=1.2,
        presence_penalty=0.3,
        frequency_penalty=0.2,
        logit_bias={17: 2.0},
        seed=5,
        max_tokens=40,
        ignore_eos=True,
    ),
    "samples": SamplingParams(temperature=1.0, n=3, seed=6, max_tokens=20, ignore_eos=True),
    "ends": SamplingParams(temperature=1.0, seed=7, min_tokens=5, max_tokens=50),
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_tokens(plain, drafting, case):
    """Alone and together. In fp32 a verify step rounds as little differently as no tie of random weights is near."""
    params = CASES[case]
    wanted = [tokens_of(plain, [p], params) for p in PROMPTS]
    before = dataclasses.replace(drafting.engine.speculation.stats)
    assert [tokens_of(drafting, [p], params) for p in PROMPTS] == wanted
    assert tokens_of(drafting, PROMPTS, params) == [ids for group in wanted for ids in group]
    after = drafting.engine.speculation.stats
    drafted = after.num_drafted - before.num_drafted
    accepted = after.num_accepted - before.num_accepted
    # Drafts of both kinds were there, or the test shows nothing. Random text has no n-grams to look up.
    proposer = drafting.engine.speculation.speculator.proposer
    if case == "greedy" or not isinstance(proposer, NgramProposer):
        assert 10 < accepted < drafted
    assert_clean(drafting)


def test_logprobs_are_those_without(plain, drafting):
    params = SamplingParams(temperature=0, logprobs=3, max_tokens=30, ignore_eos=True)
    for prompt in PROMPTS:
        one, other = (
            llm.generate([prompt], params)[0].outputs[0].logprobs for llm in (plain, drafting)
        )
        assert [p.token.token_id for p in one] == [p.token.token_id for p in other]
        # fp32 log-softmax of logits of magnitude 10, verify and decode apart: about 1e-6 of rounding.
        for a, b in zip(one, other, strict=True):
            assert b.token.logprob == pytest.approx(a.token.logprob, abs=1e-4)
            assert [t.token_id for t in a.top] == [t.token_id for t in b.top]


def test_max_tokens_within_a_draft(plain, drafting):
    """Every length, so that the last token falls on each place of a draft."""
    whole = tokens_of(plain, [PROMPTS[3]], CASES["greedy"])[0]
    for count in range(1, 16):
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        out = drafting.generate([PROMPTS[3]], params)[0].outputs[0]
        assert (out.token_ids, out.finish_reason) == (whole[:count], "length")
    assert_clean(drafting)


def test_stops_within_a_draft(plain, drafting):
    """Stop tokens and strings at every place: nothing after them is given, though it was accepted."""
    free = plain.generate(TEXT[0], CASES["greedy"])[0].outputs[0]
    for place in range(3, 30):
        token = free.token_ids[place]
        params = SamplingParams(
            temperature=0, max_tokens=40, stop_token_ids=(token,), ignore_eos=True
        )
        out = drafting.generate(TEXT[0], params)[0].outputs[0]
        assert out.token_ids == free.token_ids[: free.token_ids.index(token) + 1]
        assert out.finish_reason == "stop"
    for place in range(2, min(len(free.text), 20) - 2):
        stop = free.text[place : place + 2]
        params = SamplingParams(temperature=0, max_tokens=60, stop=stop, ignore_eos=True)
        out = drafting.generate(TEXT[0], params)[0].outputs[0]
        assert (out.text, out.stop_reason) == (free.text[: free.text.index(stop)], stop)
    assert_clean(drafting)


def test_to_the_end_of_the_context(plain, drafting):
    prompt = [3 + i % 40 for i in range(240)]
    params = SamplingParams(temperature=0, ignore_eos=True)
    assert tokens_of(drafting, [prompt], params) == tokens_of(plain, [prompt], params)
    assert_clean(drafting)


def test_preemption(plain, drafting):
    """A cache too small for all: some start over, with drafts under way, and the text is the same."""
    params = SamplingParams(temperature=0, max_tokens=120, ignore_eos=True)
    options = dataclasses.asdict(drafting.options)
    options["kv_memory"] = 6 * drafting.plan.kv_bytes // drafting.plan.num_pages
    tight = always(LLM(drafting.folder, **options))
    proposer = drafting.engine.speculation.speculator.proposer
    if isinstance(proposer, Oracle):
        tight.engine.speculation.speculator.proposer = proposer
    assert tokens_of(tight, PROMPTS, params) == tokens_of(plain, PROMPTS, params)
    assert tight.engine.scheduler.num_preemptions > 0
    assert tight.engine.speculation.stats.num_accepted > 0
    assert_clean(tight)


def test_abort_in_the_middle(plain, drafting):
    """One stream is closed between its drafts; the one beside it goes on as if alone."""
    params = CASES["greedy"]
    wanted = "".join(c.text for c in plain.stream([TEXT[1]][0], params))
    first, second = drafting.stream(TEXT[0], params), drafting.stream(TEXT[1], params)
    text = next(second).text
    for _ in range(7):
        next(first)
    first.close()
    assert text + "".join(c.text for c in second) == wanted
    assert_clean(drafting)


def test_a_failed_verify_step_harms_nobody_else(drafting, plain, monkeypatch):
    """It ends the requests in it; the next ones are whole, and nothing of the drafts is left."""
    stream = drafting.stream(TEXT[0], CASES["greedy"])
    next(stream)
    with monkeypatch.context() as patched:
        patched.setattr(drafting.engine.runner, "launch", lambda *_, **__: 1 / 0)
        drafting.engine.step()
    with pytest.raises(ZeroDivisionError):
        list(stream)
    assert tokens_of(drafting, PROMPTS, CASES["greedy"]) == tokens_of(
        plain, PROMPTS, CASES["greedy"]
    )
    assert_clean(drafting)


# -- the same distribution ----------------------------------------------------------------------------


def test_the_distribution_is_that_of_the_model(folders, plain):
    """Chi-square of the first three tokens, the last two of which come from a verify step, over 1000 seeds."""
    drafting = always(
        LLM(
            folders["target"],
            device="cpu",
            dtype="float32",
            kv_memory="8M",
            speculative=str(folders["draft"]),
            num_draft_tokens=3,
        )
    )
    prompt, kept, num_seeds = PROMPTS[1], 3, 1000
    params = [
        SamplingParams(temperature=1.0, top_k=kept, seed=s, max_tokens=3, ignore_eos=True)
        for s in range(num_seeds)
    ]
    counts: dict[tuple[int, ...], int] = {}
    for ids in tokens_of(drafting, [prompt] * num_seeds, params):
        counts[tuple(ids)] = counts.get(tuple(ids), 0) + 1
    expected = {(): 1.0}
    for _ in range(3):
        expected = {
            (*ids, token): p * share
            for ids, p in expected.items()
            for token, share in top_shares(plain, prompt + list(ids), kept)
        }
    assert counts.keys() <= expected.keys()
    statistic = sum(
        (counts.get(ids, 0) - num_seeds * p) ** 2 / (num_seeds * p) for ids, p in expected.items()
    )
    # P(chi-square of n degrees >= n + 2 sqrt(n x) + 2 x) <= exp(-x) (Laurent and Massart, 2000); x = 14: one in a
    # million. Cells in which fewer than a few are expected make it larger, seldom: that is what x leaves room for.
    freedom = len(expected) - 1
    assert statistic < freedom + 2 * math.sqrt(freedom * 14) + 2 * 14
    stats = drafting.engine.speculation.stats
    assert 0.1 < stats.acceptance_rate < 0.95


def top_shares(llm: LLM, ids: list[int], kept: int) -> list[tuple[int, float]]:
    top = llm.logits(ids)[-1].double().topk(kept)
    return list(zip(top.indices.tolist(), top.values.softmax(-1).tolist(), strict=True))


def test_common_random_numbers_are_accepted_more_often(folders, monkeypatch):
    """At temperature 1 a draft drawn with the target's own random number beats the draft model's favourite."""

    def acceptance() -> float:
        options = {"device": "cpu", "dtype": "float32", "kv_memory": "8M", "num_draft_tokens": 3}
        llm = always(LLM(folders["target"], speculative=str(folders["draft"]), **options))
        params = SamplingParams(temperature=1.0, seed=1, n=8, max_tokens=60, ignore_eos=True)
        llm.generate(PROMPTS, params)
        stats = llm.engine.speculation.stats
        assert stats.num_drafted > 1000
        return stats.acceptance_rate

    with_common_numbers = acceptance()
    usual = draft_model._Mirror.of.__func__

    def greedy(cls, target, max_len):
        mirror = usual(cls, target, max_len)
        mirror.row.temperature = 0.0
        return mirror

    monkeypatch.setattr(draft_model._Mirror, "of", classmethod(greedy))
    # Each rate has a standard error below sqrt(0.25 / 1000) = 0.016.
    assert with_common_numbers > acceptance() + 0.1


# -- the draft model ----------------------------------------------------------------------------------


def test_the_draft_model_is_in_the_plan(folders, plain):
    llm = LLM(folders["target"], device="cpu", kv_memory="8M", speculative=str(folders["draft"]))
    draft = llm.draft_model.config
    assert llm.plan.weight_bytes == 4 * (plain.config.num_parameters + draft.num_parameters)
    per_token = plain.config.kv_bytes_per_token(4) + draft.kv_bytes_per_token(4)
    assert llm.plan.num_pages == 2**23 // (64 * per_token)
    proposer = llm.engine.speculation.speculator.proposer
    assert proposer.runner.kv.num_pages == llm.plan.num_pages
    with pytest.raises(UsageError, match="not loaded"):
        LLM.sharing(plain, speculative=str(folders["draft"]))
    with pytest.raises(UsageError, match="random weights"):
        tiny(LLM, speculative="smollm2-135m")
    shared = always(LLM.sharing(llm))
    assert tokens_of(shared, PROMPTS, CASES["greedy"]) == tokens_of(plain, PROMPTS, CASES["greedy"])
    assert shared.stats().num_accepted_tokens > 0


def test_another_vocabulary_is_refused(folders, tmp_path):
    import json
    import shutil

    other = shutil.copytree(folders["draft"], tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    a, b = list(vocabulary)[50:52]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match=r"--speculative .*other.* same vocabulary.* 2 tokens"):
        LLM(folders["target"], device="cpu", kv_memory="8M", speculative=str(other))


def test_prompts_longer_than_the_drafts_context(folders, plain, tmp_path):
    """Up to there it drafts; beyond, the model goes on alone."""
    import json
    import shutil

    short = shutil.copytree(folders["draft"], tmp_path / "short")
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 48}))
    options = {"device": "cpu", "kv_memory": "8M", "speculative": str(short)}
    llm = always(LLM(folders["target"], **options))
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    assert tokens_of(llm, PROMPTS, params) == tokens_of(plain, PROMPTS, params)
    assert llm.stats().num_accepted_tokens > 0
    before = llm.stats().num_draft_tokens
    tokens_of(llm, [[3 + i % 99 for i in range(60)]], params)
    assert llm.stats().num_draft_tokens == before
    assert_clean(llm)


def test_drafts_of_the_model_itself_are_all_accepted(folders, plain):
    """The cache of the mirror is right at every step: a model drafts for itself without an error."""
    options = {"device": "cpu", "dtype": "float32", "kv_memory": "16M"}
    name = str(folders["target"])
    llm = always(LLM(folders["target"], speculative=name, num_draft_tokens=4, **options))
    for case in ("greedy", "sampled", "filtered"):
        assert tokens_of(llm, PROMPTS, CASES[case]) == tokens_of(plain, PROMPTS, CASES[case])
    assert llm.engine.speculation.stats.acceptance_rate == 1.0


# -- the policy in the real engine ----------------------------------------------------------------------


def test_off_where_nothing_repeats():
    """A text without repetition, by the real policy: not a single verify step."""
    llm = tiny(LLM, speculative="ngram")
    params = SamplingParams(temperature=1.0, seed=1, max_tokens=300, ignore_eos=True)
    plain = tiny(LLM)
    prompts = [[(7 * i * i + 3 * i) % TINY.vocab_size for i in range(60)]]
    assert tokens_of(llm, prompts, params) == tokens_of(plain, prompts, params)
    assert llm.stats().num_verify_steps <= 6  # a few chance matches at most


@pytest.mark.real_model
def test_smollm2_copies_with_drafts():
    """In fp32: the same text, and most of it from verify steps."""
    llm = LLM(smollm2_folder(), device="cpu", dtype="float32", kv_memory="64M", speculative="ngram")
    plain = LLM.sharing(llm, speculative=None)
    line = "The harbour office opens at six; boats longer than twelve metres must register first.\n"
    params = SamplingParams(temperature=0, max_tokens=40)
    wanted = plain.generate(line * 3, params)[0].outputs[0].text
    assert always(llm).generate(line * 3, params)[0].outputs[0].text == wanted
    stats = llm.stats()
    assert stats.num_accepted_tokens > 20
    assert stats.num_verify_steps < 20
