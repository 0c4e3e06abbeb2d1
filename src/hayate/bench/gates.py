"""Correctness gates: no speed is reported for wrong results."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hayate.errors import HayateError
from hayate.runtime.llm import LLM
from hayate.sampling_params import SamplingParams


def check_decode(llm: LLM, prompt: list[int], *, new_tokens: int) -> None:
    """Raise unless greedy decoding picks the tokens that a single prefill of the whole text would pick."""
    params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    check_greedy(llm, prompt, llm.generate(prompt, params)[0].outputs[0].token_ids)


def check_greedy(llm: LLM, prompt: Sequence[int], tokens: Sequence[int]) -> None:
    """Raise unless each of `tokens`, generated after `prompt`, is the most likely one up to rounding."""
    gap, limit = greedy_gap(llm, prompt, tokens), tie_limit(llm)
    if not gap <= limit:
        raise HayateError(
            f"decoding disagrees with prefill: a token's logit is {gap:.3g} of the scale below the best "
            f"(limit {limit:.3g}); no speed is reported for wrong results"
        )


def greedy_gap(llm: LLM, prompt: Sequence[int], tokens: Sequence[int]) -> float:
    """How far the logit of a taken token lies below the best, relative to the largest logit; the worst of all.

    The logits are those of one prefill over prompt and tokens.
    """
    logits = llm.logits([*prompt, *tokens])[len(prompt) - 1 : -1]
    taken = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    return float(((logits.amax(-1) - taken) / logits.abs().amax(-1)).max())


def tie_limit(llm: LLM) -> float:
    """The `greedy_gap` that the dtype's rounding allows.

    Relative rounding, over about 8 roundings a layer, five standard deviations.
    """
    epsilon = {"float32": 2.0**-24, "float16": 2.0**-11}.get(llm.plan.dtype, 2.0**-9)
    return 5 * epsilon * (8 * llm.config.num_layers) ** 0.5
