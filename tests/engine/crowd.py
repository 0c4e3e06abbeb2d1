"""Requests of all kinds that come and go, and a judge of each of their tokens: for CPU and GPU tests of the engine."""

from __future__ import annotations

import random
from collections.abc import Sequence as Seq

import torch

from hayate import LLM, SamplingParams
from hayate.runtime.request import Request
from hayate.runtime.sampler import philox_uniform
from hayate.runtime.sequence import Sequence
from hayate.runtime.speculation import Speculation
from hayate.runtime.speculative import SpeculationStats

KINDS = {
    "greedy": {"temperature": 0.0},
    "draw": {"temperature": 0.3},
    "filtered": {"temperature": 0.3, "top_k": 20, "top_p": 0.9},
    "penalised": {"temperature": 0.3, "repetition_penalty": 1.2},
    "logprobs": {"temperature": 0.0, "logprobs": 2},
    "biased": {"temperature": 0.3, "logit_bias": {7: 2.0}},
}


def draw_requests(llm: LLM, count: int, rng: random.Random, kinds: Seq[str]) -> list[Request]:
    """Prompts of 1 to 200 tokens, some beginning alike; outputs of 1 to 100."""
    requests: list[Request] = []
    for i in range(count):
        prompt = [rng.randrange(3, llm.config.vocab_size) for _ in range(rng.choice(LENGTHS))]
        if requests and rng.random() < 0.3:
            prompt = requests[-1].prompt_ids[:64] + prompt
        options = KINDS[rng.choice(kinds)]
        params = SamplingParams(
            **options, seed=i, max_tokens=rng.choice((1, 2, 30, 60, 100)), ignore_eos=True
        )
        requests.append(llm.requests.of_prompt(prompt, params))
    return requests


LENGTHS = (1, 5, 64, 65, 130, 200)


def run(llm: LLM, requests: Seq[Request], rng: random.Random, arrivals: float = 0.5) -> None:
    """Submit the requests one by one between steps until all have finished; the engine stays sound throughout."""
    queue = list(requests)
    while queue or llm.engine.has_work:
        while queue and rng.random() < arrivals:
            llm.engine.submit(queue.pop(0))
        llm.engine.step()
        llm.engine.scheduler.check()
    for request in requests:
        assert request.error is None
    assert llm.engine.pages.num_free == llm.plan.num_pages


def judge(llm: LLM, request: Request, slack: float) -> None:
    """Each token is what the logits of one prefill over the whole text give, with the token's own random number.

    slack: of a greedy token, how far its logit may be below the largest, as a share of the largest magnitude; of a
    drawn token, how far from its place in the cumulative distribution the random number may be.
    """
    (sample,) = request.samples
    tokens, params, prompt = sample.output.token_ids, sample.sequence.params, request.prompt_ids
    assert sample.output.finish_reason == "length"
    assert len(tokens) == params.max_tokens
    logits = llm.logits(prompt + tokens).double()[len(prompt) - 1 : -1]
    if params.logprobs is not None:
        found = [p.token.logprob for p in sample.output.logprobs]
        wanted = torch.log_softmax(logits, -1)[torch.arange(len(tokens)), torch.tensor(tokens)]
        assert (torch.tensor(found) - wanted).abs().max() < slack * logits.abs().max()
    for step, token in enumerate(tokens):
        row = logits[step].clone()
        for token_id, bias in (params.logit_bias or {}).items():
            row[token_id] += bias
        if params.repetition_penalty != 1:
            seen = torch.tensor(sorted({*prompt, *tokens[:step]}))
            penalty = params.repetition_penalty
            row[seen] = torch.where(row[seen] > 0, row[seen] / penalty, row[seen] * penalty)
        if params.temperature == 0:
            assert row.max() - row[token] <= slack * row.abs().max(), (step, token)
            continue
        p = _kept(torch.softmax(row / params.temperature, -1), params)
        u = philox_uniform(sample.sequence.seed, step, 0)
        end = p[: token + 1].sum() / p.sum()
        begin = end - p[token] / p.sum()
        assert begin - slack <= u <= end + slack, (step, token, begin, u, end)


def _kept(p: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """p after top-k and then top-p, by sorting."""
    order = p.argsort(descending=True, stable=True)
    ranked = p[order]
    if params.top_k:
        ranked[params.top_k :] = 0
    ahead = ranked.cumsum(0) - ranked
    ranked[ahead >= params.top_p * ranked.sum()] = 0
    return torch.zeros_like(p).scatter_(0, order, ranked)


class KnownAnswers:
    """Stands in for a `Speculator`: proposes what is known to come, with mistakes, at random times."""

    draft_sizes = (1, 3, 7)

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.stats = SpeculationStats()
        self.answers: dict[tuple, list[int]] = {}

    def install(self, llm: LLM, answers: Seq[Request]) -> None:
        for request in answers:
            sequence = request.samples[0].sequence
            self.answers[tuple(sequence.prompt_ids), sequence.seed] = sequence.output_ids
        pads = llm.engine.runner.verifies_faster_padded
        llm.engine.speculation = Speculation(self, pads)  # type: ignore[arg-type]

    def observe(self, sequence: Sequence, token: int) -> None:
        assert sequence.output_ids[-1] == token

    def forget(self, sequence: Sequence) -> None:
        pass

    def wants(self, sequences: Seq[Sequence]) -> bool:
        return bool(sequences) and self.rng.random() < 0.5

    def propose(self, sequences: Seq[Sequence], limits: Seq[int]) -> list[list[int]]:
        result = []
        for sequence, limit in zip(sequences, limits, strict=True):
            assert not sequence.num_in_flight
            known = self.answers[tuple(sequence.prompt_ids), sequence.seed]
            begin = len(sequence.output_ids)
            drafts = known[begin : begin + min(self.rng.choice((0, 1, 3, 7)), limit)]
            if drafts and self.rng.random() < 0.4:
                drafts[self.rng.randrange(len(drafts))] = 5
            result.append(drafts)
        return result

    def record_decode(self, num_sequences: int, seconds: float) -> None:
        assert seconds > 0

    def record_verify(
        self, sequences: Seq, drafted: Seq[int], accepted: Seq[int], seconds: float | None
    ) -> None:
        assert all(0 <= a <= d for a, d in zip(accepted, drafted, strict=True))
        self.stats.num_verify_steps += 1
        self.stats.num_drafted += sum(drafted)
        self.stats.num_accepted += sum(accepted)
