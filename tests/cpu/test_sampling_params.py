"""SamplingParams: every field's range, what is accepted, and how None is filled in."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hayate.errors import UsageError
from hayate.sampling_params import SamplingParams
from hayate.text.tokenizer import GenerationDefaults


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("n", 1.0),
        ("n", True),
        ("temperature", -0.1),
        ("temperature", "1"),
        ("top_p", 0),
        ("top_p", 1.0001),
        ("top_k", -2),
        ("top_k", 1.5),
        ("min_p", -0.01),
        ("min_p", 1.01),
        ("repetition_penalty", 0),
        ("repetition_penalty", -1),
        ("presence_penalty", 2.01),
        ("presence_penalty", None),
        ("frequency_penalty", -2.01),
        ("logit_bias", {1: math.inf}),
        ("logit_bias", {1: 100.5}),
        ("logit_bias", {"1": -1e39}),  # finite, and infinite in float32
        ("logit_bias", {"1" * 5000: 1.0}),  # more digits than int() reads
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {"a": 1.0}),
        ("logit_bias", [1]),
        ("seed", -1),
        ("seed", 2**63),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", [1]),
        ("stop", 5),
        ("stop", ["x"] * 65),
        ("stop", "x" * 1025),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", "12"),
        ("stop_token_ids", 3),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("logprobs", -1),
        ("logprobs", 101),
        ("ignore_eos", 1),
        ("skip_special_tokens", "yes"),
    ],
)
def test_refused(field: str, value: object) -> None:
    with pytest.raises(UsageError, match=field):
        SamplingParams(**{field: value})


@pytest.mark.parametrize(
    "field",
    [
        "temperature",
        "top_p",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "top_k",
        "seed",
        "max_tokens",
        "n",
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_a_finite_number_is_refused(field: str, value: float) -> None:
    with pytest.raises(UsageError, match=field):
        SamplingParams(**{field: value})


def test_nan_in_logit_bias_is_refused() -> None:
    with pytest.raises(UsageError, match="logit_bias"):
        SamplingParams(logit_bias={3: math.nan})


def test_the_message_names_field_value_and_range() -> None:
    with pytest.raises(UsageError) as error:
        SamplingParams(top_p=1.5)
    assert str(error.value) == "top_p must be a number above 0 and at most 1; it is 1.5"


def test_a_long_value_is_cut_in_the_message() -> None:
    for fields in ({"stop": "x" * 40_000}, {"logit_bias": {"1" * 5000: 1.0}}):
        with pytest.raises(UsageError) as error:
            SamplingParams(**fields)
        assert len(str(error.value)) < 300


def test_the_range_of_logit_bias_is_named() -> None:
    with pytest.raises(UsageError, match=r"from -100 to 100 for token 7; it is 1e\+39"):
        SamplingParams(logit_bias={7: 1e39})


def test_min_tokens_above_max_tokens_is_refused() -> None:
    SamplingParams(min_tokens=4, max_tokens=4)
    with pytest.raises(UsageError, match="min_tokens"):
        SamplingParams(min_tokens=5, max_tokens=4)


def test_bounds_are_accepted() -> None:
    SamplingParams(
        n=1,
        temperature=0,
        top_p=1,
        top_k=-1,
        min_p=1,
        presence_penalty=-2,
        frequency_penalty=2,
        seed=2**63 - 1,
        logprobs=100,
        logit_bias={1: 100, 2: -100},
        stop=["x" * 1024] * 64,
    )


def test_forms_of_lists() -> None:
    params = SamplingParams(stop="END", stop_token_ids=[1, 2], logit_bias={"7": 1, 8: -2.5})
    assert params.stop == ("END",)
    assert params.stop_token_ids == (1, 2)
    assert params.logit_bias == {7: 1.0, 8: -2.5}
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams(stop=None, stop_token_ids=None).stop == ()


def test_numpy_numbers_become_python_numbers() -> None:
    params = SamplingParams(temperature=np.float32(0.5), top_k=np.int64(3), seed=np.uint32(9))
    assert (params.temperature, params.top_k, params.seed) == (0.5, 3, 9)
    assert type(params.temperature) is float
    assert type(params.seed) is int


def test_the_callers_mapping_is_copied() -> None:
    bias = {1: 1.0}
    params = SamplingParams(logit_bias=bias)
    bias[2] = 5.0
    assert params.logit_bias == {1: 1.0}


def test_resolved_without_recommendations_is_greedy() -> None:
    params = SamplingParams().resolved(GenerationDefaults())
    assert params.temperature == 0
    assert (params.top_k, params.top_p, params.min_p, params.repetition_penalty) == (0, 1, 0, 1)


def test_resolved_takes_the_checkpoints_recommendation() -> None:
    defaults = GenerationDefaults(
        do_sample=True,
        temperature=0.7,
        top_k=20,
        top_p=0.8,
        min_p=0.1,
        repetition_penalty=1.05,
    )
    params = SamplingParams(max_tokens=5).resolved(defaults)
    assert params == SamplingParams(
        temperature=0.7, top_k=20, top_p=0.8, min_p=0.1, repetition_penalty=1.05, max_tokens=5
    )


def test_resolved_when_sampling_without_a_temperature() -> None:
    assert SamplingParams().resolved(GenerationDefaults(do_sample=True)).temperature == 1


def test_resolved_ignores_the_temperature_when_the_checkpoint_does_not_sample() -> None:
    assert SamplingParams().resolved(GenerationDefaults(temperature=0.7)).temperature == 0


def test_resolved_keeps_what_the_user_said() -> None:
    defaults = GenerationDefaults(do_sample=True, temperature=0.7, top_k=20, top_p=0.8)
    params = SamplingParams(temperature=0, top_k=-1, top_p=1.0).resolved(defaults)
    assert (params.temperature, params.top_k, params.top_p) == (0, 0, 1)


def test_ids_outside_the_vocabulary_are_refused() -> None:
    params = SamplingParams(logit_bias={99: 1.0}, stop_token_ids=[5])
    params.check_vocabulary(100)
    with pytest.raises(UsageError, match="logit_bias"):
        params.check_vocabulary(99)
    with pytest.raises(UsageError, match="stop_token_ids"):
        SamplingParams(stop_token_ids=[5]).check_vocabulary(5)
