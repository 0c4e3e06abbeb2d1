"""Structured output end to end: every answer parses, and who shares the engine makes no difference."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hayate import LLM, SamplingParams, StructuredOutput
from hayate.checkpoint.smollm2 import smollm2_folder
from hayate.errors import UsageError
from tests.engine.test_llm import TEXT, write_tokenizer
from tests.engine.tiny import tiny
from tests.parity import models

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 10},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
PARAMS = SamplingParams(
    temperature=1.0, seed=5, max_tokens=200, structured=StructuredOutput.json_schema(SCHEMA)
)
FREE = SamplingParams(temperature=1.0, seed=5, max_tokens=60, ignore_eos=True)


def check(text: str) -> None:
    value = json.loads(text)
    assert value.keys() == {"name", "age", "tags"}
    assert isinstance(value["name"], str) and len(value["name"]) <= 10
    assert type(value["age"]) is int and 0 <= value["age"] <= 120
    assert len(value["tags"]) <= 2 and set(value["tags"]) <= {"a", "b"}


def open_tiny(folder: Path, **options: Any) -> LLM:
    return LLM(folder, **{"device": "cpu", "kv_memory": "16M", **options})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of random weights in fp32, with more ids than its tokenizer has tokens."""
    folder = tmp_path_factory.mktemp("structured")
    family, fields = models.CASES["llama"]
    models.CASES["structured"] = (family, {**fields, "vocab_size": 320})
    models.make("structured", folder, dtype=torch.float32)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return open_tiny(folder)


def tokens_of(llm: LLM, prompts: list[str], params: Any) -> list[list[list[int]]]:
    return [[o.token_ids for o in r.outputs] for r in llm.generate(prompts, params)]


def test_samples_all_parse(llm: LLM) -> None:
    outputs = llm.generate(TEXT[0], replace(PARAMS, n=6))[0].outputs
    for output in outputs:
        assert output.finish_reason == "stop" and output.stop_reason is None
        check(output.text)
    assert len({output.text for output in outputs}) == 6


def test_a_batch_changes_nothing(llm: LLM) -> None:
    """Structured rows, rows with penalties and free rows together give what each gives alone."""
    params = [
        PARAMS,
        FREE,
        replace(PARAMS, structured=StructuredOutput.choice(["yes", "no", "疾風"]), n=2),
        replace(FREE, repetition_penalty=1.2),
        replace(PARAMS, structured=StructuredOutput.regex("[a-z]{3,5} [0-9]+!"), min_tokens=4),
    ]
    prompts = [TEXT[i % 3] for i in range(5)]
    alone = [tokens_of(llm, [p], s)[0] for p, s in zip(prompts, params, strict=True)]
    assert tokens_of(llm, prompts, params) == alone
    answers = llm.generate(prompts, params)
    check(answers[0].outputs[0].text)
    assert all(o.text in ("yes", "no", "疾風") for o in answers[2].outputs)
    assert re.fullmatch("[a-z]{3,5} [0-9]+!", answers[4].outputs[0].text)


def test_streams_concatenate(llm: LLM) -> None:
    chunks = list(llm.stream(TEXT[1], PARAMS))
    whole = llm.generate(TEXT[1], PARAMS)[0].outputs[0]
    assert "".join(c.text for c in chunks) == whole.text
    assert chunks[-1].finish_reason == "stop"


def test_preemption_changes_nothing(folder: Path, llm: LLM) -> None:
    prompts = [f"{i}: {text}" for i in range(3) for text in TEXT]
    params = replace(
        PARAMS, structured=StructuredOutput.regex("([a-z]{4} ){16}[a-z]+"), max_tokens=90
    )
    expected = tokens_of(llm, prompts, params)
    per_token = llm.config.kv_bytes_per_token(4)
    crowded = open_tiny(folder, kv_memory=per_token * 64 * 8, max_model_len=256)
    assert tokens_of(crowded, prompts, params) == expected
    assert crowded.engine.stats.num_preemptions > 0


def test_speculation_changes_nothing(folder: Path, llm: LLM) -> None:
    """The grammar drafts what it forces, the text before drafts the rest."""
    fixed = StructuredOutput.regex(
        "The gale blows over the hills\\. (The gale blows over the (sea|hills)\\. ){6}[ab]{20}"
    )
    params = replace(PARAMS, structured=fixed, repetition_penalty=1.1)
    expected = tokens_of(llm, TEXT, params)
    guessing = open_tiny(folder, speculative="ngram", num_draft_tokens=4)
    assert tokens_of(guessing, TEXT, params) == expected
    assert guessing.engine.stats.num_accepted_tokens > 0
    for output in guessing.generate(TEXT, PARAMS):
        check(output.outputs[0].text)


@pytest.mark.parametrize("options", [{"ignore_eos": True}, {"min_tokens": 50}, {}])
def test_a_complete_text_ends_the_sequence(llm: LLM, options: dict[str, Any]) -> None:
    params = replace(PARAMS, structured=StructuredOutput.choice(["yes", "no"]), **options)
    output = llm.generate(TEXT[0], params)[0].outputs[0]
    assert output.text in ("yes", "no") and output.finish_reason == "stop"


def test_max_tokens_cuts_what_is_not_complete(llm: LLM) -> None:
    params = replace(PARAMS, structured=StructuredOutput.regex("x{7}"))
    whole = llm.generate(TEXT[0], params)[0].outputs[0]
    count = len(whole.token_ids)
    exact = llm.generate(TEXT[0], replace(params, max_tokens=count))[0].outputs[0]
    assert (exact.text, exact.finish_reason) == ("x" * 7, "stop")
    short = llm.generate(TEXT[0], replace(params, max_tokens=count - 1))[0].outputs[0]
    assert short.finish_reason == "length" and short.text == whole.text[: len(short.text)]


def test_an_extensible_text_ends_at_the_end_token(llm: LLM) -> None:
    """A bias on the end token: it counts from where the text matches, no earlier."""
    params = replace(
        PARAMS,
        structured=StructuredOutput.regex("[a-z]{3}[a-z]*"),
        logit_bias={2: 100.0},
        skip_special_tokens=False,
    )
    output = llm.generate(TEXT[0], params)[0].outputs[0]
    assert output.finish_reason == "stop" and output.token_ids[-1] == 2
    assert re.fullmatch("[a-z]{3,6}", output.text)


def test_logprobs_are_those_of_the_model(llm: LLM) -> None:
    params = replace(PARAMS, logprobs=2)
    result = llm.generate(TEXT[2], params)[0]
    output = result.outputs[0]
    logits = llm.logits(result.prompt_token_ids + output.token_ids)
    rows = logits[len(result.prompt_token_ids) - 1 : -1].double().log_softmax(-1)
    assert output.logprobs is not None and len(output.logprobs) == len(output.token_ids)
    for row, position in zip(rows, output.logprobs, strict=True):
        # fp32 log-softmax of logits of magnitude 10: about 1e-6 of rounding, decode and prefill apart
        assert position.token.logprob == pytest.approx(
            row[position.token.token_id].item(), abs=1e-4
        )
        assert position.top[0].logprob == pytest.approx(row.max().item(), abs=1e-4)


def test_a_bad_grammar_is_refused_at_submit(llm: LLM) -> None:
    bad = replace(PARAMS, structured=StructuredOutput.regex("a(b"))
    with pytest.raises(UsageError, match=r"structured: the regex is refused.*\n.*"):
        llm.generate([TEXT[0], TEXT[1]], [PARAMS, bad])
    assert not llm.engine.has_work
    check(llm.generate(TEXT[0], PARAMS)[0].outputs[0].text)


def test_without_a_tokenizer() -> None:
    with pytest.raises(UsageError, match="tokenizer"):
        tiny(LLM).generate([[1, 2, 3]], PARAMS)


@pytest.mark.real_model
def test_real_model_fills_in_a_form() -> None:
    assert (smollm2_folder() / "config.json").is_file(), "run `hayate pull smollm2-135m` first"
    llm = LLM(smollm2_folder(), device="cpu", kv_memory="64M")
    question = [{"role": "user", "content": "Invent a person of 42 years called Ada."}]
    check(llm.chat(question, replace(PARAMS, temperature=0.8))[0].outputs[0].text)
    choice = replace(PARAMS, temperature=0, structured=StructuredOutput.choice(["red", "green"]))
    assert llm.chat(question, choice)[0].outputs[0].text in ("red", "green")
