"""The host's sampler on the GPU: the tokens of the CPU, and not one wait."""

from __future__ import annotations

import pytest
import torch

from hayate.checkpoint.smollm2 import smollm2_folder
from hayate.runtime.sampler import Sampler
from hayate.runtime.sampling_row import SamplingRow
from hayate.runtime.structured import GrammarCompiler
from hayate.sampling_params import SamplingParams, StructuredOutput
from hayate.text.tokenizer import GenerationDefaults, Tokenizer

OPTIONS = [
    {"temperature": 1.0},
    {},
    {"temperature": 0.7, "top_k": 5, "structured": StructuredOutput.json_object()},
    {"temperature": 1.2, "top_p": 0.7, "repetition_penalty": 1.3},
    {"temperature": 0.9, "min_p": 0.1, "frequency_penalty": 0.5},
    {"logit_bias": {11: 30.0}, "structured": StructuredOutput.regex("[a-z ]{5,9}")},
    {"temperature": 1.0, "top_k": 50, "top_p": 0.9, "min_tokens": 3},
    {"structured": StructuredOutput.choice(["yes", "no"])},
]


@pytest.mark.real_model
def test_the_cpu_s_tokens_without_a_wait() -> None:
    assert (smollm2_folder() / "config.json").is_file(), "run `hayate pull smollm2-135m` first"
    compiler = GrammarCompiler(Tokenizer(smollm2_folder()), 49152, [2])
    rows = []
    for i, options in enumerate(OPTIONS * 4):
        params = SamplingParams(**options).resolved(GenerationDefaults())  # type: ignore[arg-type]
        matcher = params.structured and compiler.matcher(params.structured, [2])
        output = [] if matcher else [4, 4, 9][: i % 4]
        rows.append(
            SamplingRow(params, 2**40 + i, [1, 2, 3], output, frozenset({2}), i % 2, matcher)
        )
    drafts = [[9] if i % 5 == 0 else [] for i in range(len(rows))]
    # fp32 noise: no two logits so close that rounding decides between them
    host = torch.randn(len(rows) + sum(map(len, drafts)), 49152) * 3
    expected = Sampler().sample(host, rows, drafts).packed
    logits = host.cuda()
    Sampler().sample(logits, rows, drafts)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = Sampler().sample(logits, rows, drafts).packed
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found.cpu(), expected)
    assert torch.equal(logits.cpu(), host)
