"""SmolLM2-135M-Instruct: golden answers, and logits against transformers on the same weights."""

from __future__ import annotations

import pytest
import torch

from hayate import LLM, SamplingParams
from hayate.checkpoint.smollm2 import smollm2_folder

pytestmark = pytest.mark.real_model
FOLDER = smollm2_folder()
GREEDY = SamplingParams(temperature=0, max_tokens=18)


@pytest.fixture(scope="module")
def llm() -> LLM:
    assert (FOLDER / "config.json").is_file(), "run `hayate pull smollm2-135m` first"
    return LLM(FOLDER, device="cpu", kv_memory="64M")


def test_golden_continuation(llm):
    """As transformers continues it in bf16; later tokens hang on near ties and are left out."""
    out = llm.generate("The capital of France is", GREEDY)[0].outputs[0]
    assert out.token_ids[:8] == [7042, 30, 198, 198, 504, 2988, 314, 42]
    assert out.text.startswith(" Paris.\n\nThe answer is: 2")


def test_golden_answer(llm):
    messages = [{"role": "user", "content": "What is gravity?"}]
    out = llm.chat(messages, SamplingParams(temperature=0, max_tokens=16))[0]
    assert len(out.prompt_token_ids) == 34
    wanted = "Gravity is a fundamental concept in physics that describes the curvature of spacetime"
    assert out.outputs[0].text.startswith(wanted)


def test_logits_of_a_text_in_fp32():
    import transformers

    llm = LLM(FOLDER, device="cpu", dtype="float32", kv_memory="64M")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    text = "Alice was beginning to get very tired of sitting by her sister on the bank. 東京は日本の首都です。"
    ids = llm.tokenizer.encode(text)
    with torch.no_grad():
        wanted = theirs(torch.tensor([ids])).logits[0]
    error = (llm.logits(ids) - wanted).abs().max() / wanted.abs().max()
    assert error < 1e-4  # thirty layers of fp32 rounding: 1e-5 was seen


def test_recorded_steps_equal_prefill_with_many_streams(llm):
    """Batches of 1 to 9 sequences, below and above what can be recorded, give the same fp32 text."""
    exact = LLM(FOLDER, device="cpu", dtype="float32", kv_memory="128M")
    prompts = [
        f"Number {i}: the {word}"
        for i, word in enumerate(
            ["sea", "sky", "hill", "fox", "king", "tree", "fire", "ice", "sun"]
        )
    ]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    alone = [exact.generate(p, params)[0].outputs[0].token_ids for p in prompts]
    for count in (2, 5, 9):
        together = exact.generate(prompts[:count], params)
        assert [o.outputs[0].token_ids for o in together] == alone[:count]
