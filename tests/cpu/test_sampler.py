"""The sampler: random numbers, filters, penalties and draws.

The truth is NumPy in float64, transformers, and the published answers of Philox.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hayate.errors import ModelError
from hayate.kernels.sampling import uniform_reference
from hayate.runtime import sampler as module
from hayate.runtime.logits_processing import LogitsChanges
from hayate.runtime.sampler import DrawOptions, Sampler, philox4x32, philox_uniform
from hayate.runtime.sampling_row import SamplingRow, positions_of
from hayate.sampling_params import SamplingParams
from hayate.text.tokenizer import GenerationDefaults

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def row(
    seed: int = 0,
    *,
    prompt: list[int] | None = None,
    output: list[int] | None = None,
    stop_ids: tuple[int, ...] = (),
    sample_index: int = 0,
    **params: Any,
) -> SamplingRow:
    resolved = SamplingParams(**params).resolved(GenerationDefaults())
    return SamplingRow(
        resolved, seed, prompt or [], output or [], frozenset(stop_ids), sample_index
    )


def kept(logits: Tensor, rows: list[SamplingRow]) -> Tensor:
    """(S, V) float32: unnormalised probabilities, 0 where a filter removed the token."""
    options = DrawOptions.build(positions_of(rows), logits.shape[1], logits.device)
    return module._kept(logits - logits.amax(-1, keepdim=True), options)


def random_logits(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # known answers published with the Random123 library
        ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(counter: str, key: str, words: str) -> None:
    c0, c1, c2, c3 = (int(word, 16) for word in counter.split())
    k0, k1 = (int(word, 16) for word in key.split())
    assert philox4x32((c0, c1, c2, c3), (k0, k1)) == tuple(int(w, 16) for w in words.split())


@settings(deadline=None)
@given(seed=st.integers(0, 2**63 - 1), step=st.integers(0, 2**31), index=st.integers(0, 2**31 - 1))
def test_uniform_is_the_one_of_the_kernel(seed: int, step: int, index: int) -> None:
    u = philox_uniform(seed, step, index)
    assert 0 <= u < 1
    expected = uniform_reference(*(torch.tensor([value]) for value in (seed, step, index)))
    assert u == expected.item()


def test_uniform_numbers_are_uniform() -> None:
    """Counts of 20 bins over 10,000 draws. Chi-square of 19 degrees of freedom: mean 19, deviation
    6.2; 45 is exceeded by chance in less than 1 of 1,000 seeds, and the seeds here are fixed."""
    for draws in (
        [philox_uniform(7, step, 0) for step in range(10_000)],
        [philox_uniform(seed, 3, 0) for seed in range(10_000)],
        [philox_uniform(7, 3, index) for index in range(10_000)],
    ):
        counts, _ = np.histogram(draws, bins=20, range=(0, 1))
        assert ((counts - 500) ** 2 / 500).sum() < 45


@pytest.mark.parametrize("dtype", DTYPES)
def test_greedy_is_argmax(dtype: torch.dtype) -> None:
    logits = random_logits(5, 1000).to(dtype)
    expected = [int(np.argmax(line)) for line in logits.double().numpy()]  # the first of equals
    before = logits.clone()
    assert Sampler().sample(logits, [row() for _ in range(5)]).to_list() == expected
    # The other path, which a row with options makes the whole batch take.
    mixed = [row() for _ in range(4)] + [row(repetition_penalty=1.5)]
    assert Sampler().sample(logits, mixed).to_list() == expected
    assert torch.equal(logits, before)


def test_greedy_takes_the_lowest_id_of_equals() -> None:
    logits = torch.zeros(2, 5000)
    logits[0, [4000, 17, 900]] = 2.0
    assert Sampler().sample(logits, [row(), row()]).to_list() == [17, 0]
    assert Sampler().sample(logits, [row(), row(presence_penalty=1)]).to_list() == [17, 0]


def reference_kept(logits: np.ndarray, params: SamplingParams) -> tuple[np.ndarray, float]:
    """(V,) bool in float64 by sorting, and how near the nearest decision of top_p and min_p was."""
    assert params.temperature is not None
    p = np.exp((logits.astype(np.float64) - logits.max()) / params.temperature)
    keep = np.ones(len(p), bool)
    margin = 1.0
    if params.top_k and 0 < params.top_k < len(p):
        keep &= logits >= np.sort(logits)[-params.top_k]
    if params.top_p is not None and params.top_p < 1:
        total = p[keep].sum()
        for value in sorted(set(p[keep]), reverse=True):
            ahead = p[keep & (p > value)].sum() / total
            margin = min(margin, abs(ahead - params.top_p))
            if ahead >= params.top_p:
                keep &= p > value
                break
    if params.min_p:
        margin = min(margin, np.abs(p[keep] - params.min_p).min())
        keep &= p >= params.min_p
    return keep, margin


# Logits in steps of 1/8, so that equals are frequent and others differ clearly in float32 too.
LOGITS = st.lists(st.integers(-60, 60), min_size=2, max_size=200).map(
    lambda values: np.array(values, np.float32) / 8
)
OPTIONS = st.fixed_dictionaries(
    {
        "temperature": st.floats(0.4, 3.0),
        "top_k": st.one_of(st.just(0), st.integers(1, 220)),
        "top_p": st.one_of(st.just(1.0), st.floats(0.01, 0.999)),
        "min_p": st.one_of(st.just(0.0), st.floats(0.001, 1.0)),
    }
)


@pytest.mark.parametrize("candidates", [(128, 2048), (2, 8, 32), ()])
def test_filters_keep_what_sorting_keeps(
    candidates: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_TOP_P_CANDIDATES", candidates)

    @settings(deadline=None, max_examples=200)
    @given(logits=LOGITS, options=st.lists(OPTIONS, min_size=1, max_size=3))
    def property_holds(logits: np.ndarray, options: list[dict[str, Any]]) -> None:
        rows = [row(**o) for o in options]
        expected = []
        for each in rows:
            keep, margin = reference_kept(logits, each.params)
            assume(margin > 1e-5)  # float32 has 1e-7; sums of 200 stay far inside
            expected.append(keep)
        found = kept(torch.from_numpy(logits).repeat(len(rows), 1), rows)
        assert np.array_equal(found.numpy() > 0, np.stack(expected))

    property_holds()


@pytest.mark.parametrize(
    ("options", "warpers"),
    [
        ({"top_k": 40}, [TopKLogitsWarper(40)]),
        ({"top_p": 0.8}, [TopPLogitsWarper(0.8)]),
        ({"min_p": 0.05}, [MinPLogitsWarper(0.05)]),
        (
            {"top_k": 100, "top_p": 0.9, "min_p": 0.02},
            [TopKLogitsWarper(100), TopPLogitsWarper(0.9), MinPLogitsWarper(0.02)],
        ),
    ],
)
def test_filters_as_in_transformers(options: dict[str, Any], warpers: list[Any]) -> None:
    """Random logits, no equals: the same tokens, and the same probabilities to float32."""
    logits = random_logits(20, 5000)
    expected = TemperatureLogitsWarper(0.7)(None, logits)
    for warper in warpers:
        expected = warper(None, expected)
    found = kept(logits, [row(temperature=0.7, **options) for _ in range(20)])
    assert torch.equal(found > 0, expected > -math.inf)
    # exp of arguments up to 50 with relative error 2^-24 each: 50 * 6e-8, and theirs as much again
    torch.testing.assert_close(
        found / found.sum(-1, keepdim=True), expected.softmax(-1), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 2.0, "top_k": 7},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.5, "min_p": 0.1},
        {"temperature": 1.3, "top_k": 10, "top_p": 0.9, "min_p": 0.05},
    ],
)
def test_the_distribution_of_draws(options: dict[str, Any]) -> None:
    """6,000 draws of different seeds and steps against the float64 distribution.

    Chi-square with at most 11 degrees of freedom; 38 is exceeded by chance in less than 1 of 10,000
    seeds, and the seeds here are fixed.
    """
    logits = random_logits(12, seed=5) / 2
    rows = [row(seed, output=[0] * step, **options) for seed in range(300) for step in range(20)]
    tokens = Sampler().sample(logits.repeat(len(rows), 1), rows).to_list()
    keep, _ = reference_kept(logits.numpy(), rows[0].params)
    p = np.where(keep, np.exp(logits.double().numpy() / options["temperature"]), 0)
    expected = p / p.sum() * len(tokens)
    counts = np.bincount(tokens, minlength=12)
    assert counts[~keep].sum() == 0
    assert ((counts - expected)[keep] ** 2 / expected[keep]).sum() < 38


def test_the_draw_inverts_the_distribution_in_vocabulary_order() -> None:
    logits = random_logits(50, 3000, seed=2)
    rows = [row(seed, output=[1] * 4, temperature=0.9, sample_index=2) for seed in range(50)]
    tokens = Sampler().sample(logits, rows).to_list()
    for seed, token in enumerate(tokens):
        x = logits[seed].double().numpy()
        p = np.exp((x - x.max()) / 0.9)
        edges = np.concatenate([[0], np.cumsum(p) / p.sum()])
        u = philox_uniform(seed, 4, 2)
        # float32 exponentials of arguments up to 30 err by 2e-6 of the whole, at most
        assert edges[token] - 2e-6 <= u <= edges[token + 1] + 2e-6


def test_the_draw_at_the_borders() -> None:
    """u = 0 passes over removed tokens; a sum that equals u's share exactly does not exceed it."""
    p = torch.tensor([0.0, 0.0, 1.0, 0.0, 1.0, 2.0, 0.0])
    u = [0.0, 0.24, 0.25, 0.5, 1 - 2**-24]
    tokens = module._draw(p.repeat(len(u), 1), torch.tensor(u, dtype=torch.float64))
    assert tokens.tolist() == [2, 2, 4, 5, 5]


def mixed_rows() -> list[SamplingRow]:
    return [
        row(1, temperature=1.0),
        row(2),
        row(3, temperature=0.7, top_k=5, output=[4, 4, 9]),
        row(4, temperature=1.2, top_p=0.7, prompt=[1, 2, 3], repetition_penalty=1.3),
        row(5, temperature=0.9, min_p=0.1, output=[7], frequency_penalty=0.5),
        row(6, logit_bias={11: 30.0}),
        row(7, temperature=1.0, top_k=50, top_p=0.9, min_tokens=3, stop_ids=(0, 5)),
        row(1, temperature=1.0, sample_index=1),
    ]


def test_a_row_gets_the_same_token_alone_and_in_any_batch() -> None:
    logits = random_logits(8, 400, seed=3)
    together = Sampler().sample(logits, mixed_rows()).to_list()
    alone = [Sampler().sample(logits[i : i + 1], [mixed_rows()[i]]).to_list()[0] for i in range(8)]
    order = [5, 2, 7, 0, 3, 6, 1, 4]
    rows = mixed_rows()
    shuffled = Sampler().sample(logits[order], [rows[i] for i in order]).to_list()
    assert together == alone
    assert [together[i] for i in order] == shuffled


def test_seed_step_and_sample_index_each_change_the_draw() -> None:
    logits = torch.zeros(1, 100_000)
    draws = {
        Sampler().sample(logits, [each]).to_list()[0]
        for each in (
            row(1, temperature=1),
            row(2, temperature=1),
            row(1 + 2**32, temperature=1),
            row(1, temperature=1, output=[0]),
            row(1, temperature=1, sample_index=1),
        )
    }
    assert len(draws) == 5


def changed(logits: Tensor, rows: list[SamplingRow]) -> Tensor:
    result = logits.clone()
    LogitsChanges.build(positions_of(rows), logits.shape[1], logits.device).apply(result)
    return result


def test_repetition_penalty_as_in_transformers() -> None:
    logits = random_logits(2, 300, seed=4)
    history = [[5, 5, 17, 200, 17], [1, 2, 299, 2, 0]]
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor(history), logits.clone())
    rows = [row(prompt=ids[:3], output=ids[3:], repetition_penalty=1.3) for ids in history]
    assert torch.equal(changed(logits, rows), expected)


def test_presence_and_frequency_count_the_output_only() -> None:
    logits = random_logits(1, 50, seed=6)
    output = [3, 3, 3, 8, 0]
    expected = logits.double()
    for token_id, count in Counter(output).items():
        expected[0, token_id] -= 0.75 * count + 0.5
    each = row(prompt=[3, 9, 9], output=output, presence_penalty=0.5, frequency_penalty=0.75)
    torch.testing.assert_close(changed(logits, [each]).double(), expected, rtol=2**-22, atol=1e-6)


def test_penalties_follow_a_growing_output() -> None:
    """The counts are kept from step to step; a fresh row that counts all at once must agree."""
    rng = np.random.default_rng(0)
    logits = random_logits(1, 300, seed=7)
    options = {"repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.1}
    prompt = [int(i) for i in rng.integers(0, 300, 100)]
    output: list[int] = []
    growing = SamplingRow(
        SamplingParams(**options).resolved(GenerationDefaults()), 0, prompt, output
    )
    for _ in range(60):
        fresh = row(prompt=prompt, output=list(output), **options)
        assert torch.equal(changed(logits, [growing]), changed(logits, [fresh]))
        output += [int(i) for i in rng.integers(0, 300, rng.integers(1, 5))]


def test_bias_comes_before_the_ban_and_the_penalties() -> None:
    logits = torch.tensor([[1.0, 2.0, -1.0, 0.5]])
    each = row(
        output=[1, 2],
        logit_bias={1: -3.0, 3: 100.0},
        repetition_penalty=2.0,
        presence_penalty=0.25,
        min_tokens=3,
        stop_ids=(3,),
    )
    # 2 - 3 = -1 -> -1 * 2 - 0.25; -1 -> -1 * 2 - 0.25; the ban holds against the bias
    assert changed(logits, [each]).tolist() == [[1.0, -2.25, -2.25, -math.inf]]


def test_ending_tokens_are_banned_before_min_tokens() -> None:
    logits = torch.tensor([[0.0, 5.0, 9.0]])
    output: list[int] = []
    params = SamplingParams(min_tokens=2).resolved(GenerationDefaults())
    each = SamplingRow(params, 0, [], output, frozenset({2, 70}))  # 70: outside the vocabulary
    for expected in (1, 1, 2):
        token = Sampler().sample(logits, [each]).to_list()[0]
        assert token == expected
        output.append(token)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.5}])
@pytest.mark.parametrize(
    "spoil", [{3: math.nan}, {0: math.inf}, dict.fromkeys(range(20), -math.inf)]
)
def test_logits_that_are_not_finite(options: dict[str, Any], spoil: dict[int, float]) -> None:
    logits = random_logits(3, 20)
    expected = Sampler().sample(logits, [row(i, **options) for i in range(3)]).to_list()
    for token_id, value in spoil.items():
        logits[1, token_id] = value
    sampled = Sampler().sample(logits, [row(i, **options) for i in range(3)])
    assert sampled.finite.tolist() == [1, 0, 1]
    tokens = sampled.tokens.tolist()
    assert [tokens[0], tokens[2]] == [expected[0], expected[2]]
    assert 0 <= tokens[1] < 20
    with pytest.raises(ModelError, match=r"not finite.*row 1"):
        sampled.to_list()


def test_some_minus_infinity_is_allowed() -> None:
    logits = torch.full((1, 10), -math.inf)
    logits[0, 4] = 1.0
    assert Sampler().sample(logits, [row()]).to_list() == [4]
    assert Sampler().sample(logits, [row(temperature=1.0, top_p=0.5)]).to_list() == [4]


@pytest.mark.parametrize("temperature", [1e-300, 1e-45, 1e-6, 1e6])
def test_extreme_temperatures(temperature: float) -> None:
    logits = random_logits(1, 100)
    token = Sampler().sample(logits, [row(temperature=temperature, top_k=3)]).to_list()[0]
    top = logits.topk(3).indices[0].tolist()
    assert token == top[0] if temperature < 1 else token in top


@pytest.mark.parametrize("dtype", DTYPES)
def test_logprobs(dtype: torch.dtype) -> None:
    logits = random_logits(4, 500).to(dtype)
    tokens = torch.tensor([3, 499, 0, 42])
    found = Sampler().logprobs(logits, tokens, 5)
    expected = logits.double().log_softmax(-1)
    best = expected.topk(5, dim=-1)
    # log-probabilities up to 20 in size, from float32 logits: a few units of 20 * 2^-24
    torch.testing.assert_close(found.token.double(), expected[range(4), tokens], rtol=0, atol=5e-6)
    torch.testing.assert_close(found.top.double(), best.values, rtol=0, atol=5e-6)
    torch.testing.assert_close(expected.gather(1, found.top_ids), best.values, rtol=0, atol=5e-6)
    assert Sampler().logprobs(logits, tokens, 0).top.shape == (4, 0)


def test_drafts_are_verified_by_the_tokens_that_would_follow_them() -> None:
    """A row with drafts gets, at each position, what it would get if the drafts were its output."""
    drafts = [[9, 4, 4], [], [7, 11], [3], [0, 5, 8], [11, 2], [1, 5, 2], []]
    logits = random_logits(sum(len(d) + 1 for d in drafts), 400, seed=3)
    rows = mixed_rows()
    together = Sampler().sample(logits, rows, drafts).to_list()
    assert [r.output_ids for r in rows] == [r.output_ids for r in mixed_rows()]
    alone: list[int] = []
    for i, each in enumerate(drafts):
        for count in range(len(each) + 1):
            one = mixed_rows()[i]
            one.output_ids.extend(each[:count])
            alone += Sampler().sample(logits[len(alone)][None], [one]).to_list()
    assert together == alone
