"""Speculative decoding: guess several tokens, let one step of the model verify them all.

A *verify step* computes the newest token of a sequence and k guessed ones (*drafts*) after it, and samples after
each. A draft is accepted when it equals the token that the model samples in its place, with the random number
that belongs to that place. So the tokens are those of ordinary decoding, whatever the proposer guesses, and only
the speed is at stake (Leviathan, Kalman and Matias, "Fast Inference from Transformers via Speculative Decoding",
2023, with the draft distribution being a point). This module decides when it pays.

Choosing. A verify step of S sequences with at most k drafts each takes r(S, k) times as long as a decode step;
r is the median of the latest measurements. From the proposer's statistics a step is expected to yield E tokens.
The k with the largest E / (S r) is taken if that is clearly above 1.

The bound. Ordinary decoding runs pipelined and costs speculation nothing. An account of time, in seconds times
sequences, earns `SHARE` of every ordinary decode step; a verify step adds to it the time its tokens would have
taken otherwise, less its own. A step is allowed only while the account can pay for the case that every draft is
rejected, the refilling of the pipeline afterwards included. So at any moment

    time spent <= time of ordinary decoding * (1 + SHARE)

save for what one step takes beyond the worst that was assumed for it; the account pays that back before the next.
The account is emptied when the last sequence leaves, so that the bound holds for each request that runs alone, not
only on average over good and bad ones; and it has a ceiling, so that it holds anew after a passage that went well.
A proposer that cannot be tried in the shadow of ordinary decoding (a draft model) keeps the account from one request
for the next, or it would begin late in each: for it the bound is over requests together.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

from hayate.config import EnginePlan
from hayate.models.decoder import CausalLM
from hayate.runtime.draft_model import DraftModelProposer
from hayate.runtime.ngram import NgramProposer
from hayate.runtime.sequence import Sequence
from hayate.runtime.step_costs import StepCosts

SHARE = 0.025  # of the time of ordinary decoding, that speculation may lose
_MARGIN = 1.15  # a verify step is expected to be faster by this factor at least
_CEILING = 64.0  # most the account holds, in decode steps of the sequences that run
_REST = 4  # steps before the question is asked again after a drain for nothing
_DRAFT_SIZES = (1, 3, 7, 15)  # with the token before them, rows that fill a tile


class Proposer(Protocol):
    """Guesses tokens.

    shadows: it learns how good it is from tokens that were not verified, too. first_run: the latest proposal did
    something that will not be repeated, such as capturing a graph.
    """

    shadows: bool
    first_run: bool

    def observe(self, sequence: Sequence, token: int) -> None: ...
    def expected(self, sequence: Sequence, count: int) -> float: ...
    def propose(self, sequences: Seq[Sequence], counts: Seq[int]) -> list[list[int]]: ...
    def record(self, sequence: Sequence, num_drafts: int, num_accepted: int) -> None: ...
    def preparation_seconds(self, sequences: Seq[Sequence]) -> float: ...
    def forget(self, sequence: Sequence) -> None: ...


class Matcher(Protocol):
    """What structured output knows of a sequence's next tokens."""

    def forced(self) -> list[int]:
        """The tokens that must come next, in order; [] where there is a choice."""
        ...

    def valid_prefix(self, ids: Seq[int]) -> int:
        """How many of `ids`, from the first, the grammar allows next."""
        ...


@dataclass
class SpeculationStats:
    """Totals since the engine began."""

    num_drafted: int = 0
    num_accepted: int = 0
    num_verify_steps: int = 0

    @property
    def acceptance_rate(self) -> float:
        """Share of the drafts that were accepted; 0 before the first."""
        return self.num_accepted / self.num_drafted if self.num_drafted else 0.0


class Speculator:
    """Decides which steps verify drafts, and which drafts. The module's text has the rules."""

    def __init__(self, proposer: Proposer, num_draft_tokens: int) -> None:
        """num_draft_tokens: the most drafts a sequence gets in one step."""
        self.proposer = proposer
        self.draft_sizes = (*(k for k in _DRAFT_SIZES if k < num_draft_tokens), num_draft_tokens)
        self.matcher_of: Callable[[Sequence], Matcher | None] = lambda sequence: None
        self.stats = SpeculationStats()
        self.costs = StepCosts()
        self._account = 0.0  # seconds times sequences
        self._active: set[Sequence] = set()
        self._preparation = 0.0  # seconds of the latest proposal that will not come again
        self._drained = False  # the pipeline is empty on account of speculation
        self._rest = 0  # steps until the question is worth asking again

    # -- what the engine tells ----------------------------------------------------------------------

    def observe(self, sequence: Sequence, token: int) -> None:
        """`token` has just been appended to `sequence.output_ids`, by whatever kind of step."""
        self._active.add(sequence)
        self.proposer.observe(sequence, token)

    def record_decode(self, num_sequences: int, seconds: float) -> None:
        """A decode step's tokens came `seconds` after those of the step before."""
        S, usual = num_sequences, self.costs.decode(num_sequences)
        if self._drained and usual is not None:
            excess = max(seconds - usual, 0.0)
            self.costs.add_refill(excess / usual)
            self._account -= S * excess
        else:
            self.costs.add_decode(S, seconds)
        self._drained = False
        self._earn(S, SHARE * S * min(seconds, self.costs.decode(S) or seconds))

    def record_verify(
        self,
        sequences: Seq[Sequence],
        num_drafts: Seq[int],
        num_accepted: Seq[int],
        seconds: float | None,
    ) -> None:
        """A verify step's tokens came `seconds` after those of the step before, `propose` included.

        seconds: None when it did something that will not be repeated, such as capturing a graph.
        """
        self.stats.num_verify_steps += 1
        self.stats.num_drafted += sum(num_drafts)
        self.stats.num_accepted += sum(num_accepted)
        for sequence, drafts, accepted in zip(sequences, num_drafts, num_accepted, strict=True):
            self.proposer.record(sequence, drafts, accepted)
        self._drained = True
        S = len(sequences)
        usual = self.costs.decode(S)
        if seconds is None or usual is None or self.proposer.first_run:
            return
        size = next(k for k in self.draft_sizes if k >= max(num_drafts))
        self.costs.add_verify(S, size, max(seconds - self._preparation, 0.0) / usual)
        self._earn(S, usual * (S + sum(num_accepted)) - S * seconds)

    def forget(self, sequence: Sequence) -> None:
        """The sequence has ended, in whatever way. Nothing happens for one that is not known."""
        self.proposer.forget(sequence)
        self._active.discard(sequence)
        if not self._active:
            self._rest = 0
            self._earn(1, 0.0)

    # -- what the engine asks -----------------------------------------------------------------------

    def wants(self, sequences: Seq[Sequence]) -> bool:
        """Whether the next step of these sequences, all that decode, should be a verify step.

        To be asked before a step is launched ahead. Microseconds a sequence, and large batches are refused
        without looking most of the time.
        """
        if self._account <= 0 or not sequences:
            return False
        if self._rest > 0:
            self._rest -= 1
            return False
        if self._choose(sequences, [self.draft_sizes[-1]] * len(sequences)):
            return True
        self._rest = len(sequences) // 8
        return False

    def propose(self, sequences: Seq[Sequence], limits: Seq[int]) -> list[list[int]]:
        """The drafts of each sequence; all of its tokens are known, none is in flight.

        limits: the most drafts each may get; it gets none or one of `draft_sizes`. All lists are empty when the
        last tokens have shown that a verify step would not pay.
        """
        self._drained = True
        self._preparation = 0.0
        size = self._choose(sequences, limits)
        drafts: list[list[int]] = [[] for _ in sequences]
        if size:
            self._preparation = self.proposer.preparation_seconds(sequences)
            counts = [self._largest_size(min(size, limit)) for limit in limits]
            proposed = self.proposer.propose(sequences, counts)
            drafts = list(map(self._structured, sequences, proposed, counts))
        if not any(drafts):
            self._rest = max(len(sequences) // 8, _REST)
        return drafts

    # -- rules ---------------------------------------------------------------------------------------

    def _choose(self, sequences: Seq[Sequence], limits: Seq[int]) -> int:
        """The drafts a sequence that the next step should verify at most; 0: an ordinary step."""
        S = len(sequences)
        usual = self.costs.decode(S)
        if usual is None:
            return 0
        refill, worst_refill = self.costs.refill
        preparation = self.proposer.preparation_seconds(sequences) / usual
        best, best_speed = 0, _MARGIN
        for size in self.draft_sizes:
            likely, worst = self.costs.verify(S, size)
            if S * (worst + worst_refill + preparation - 1) * usual > self._account:
                break
            expected = sum(map(self._expected, sequences, (min(size, n) for n in limits)))
            # Leaving the pipeline is paid for once, by the step that does.
            speed = (S + expected) / (S * (likely + (0.0 if self._drained else refill)))
            if speed > best_speed:
                best, best_speed = size, speed
        return best

    def _expected(self, sequence: Sequence, count: int) -> float:
        """Drafts accepted of `count`, on average."""
        matcher = self.matcher_of(sequence)
        forced = 0 if matcher is None else min(len(matcher.forced()), count)
        return max(float(forced), self.proposer.expected(sequence, count))

    def _structured(self, sequence: Sequence, drafts: list[int], count: int) -> list[int]:
        """The drafts, cut before the first that the sequence's grammar forbids; forced tokens take their place."""
        matcher = self.matcher_of(sequence)
        if matcher is None:
            return drafts
        drafts = matcher.forced()[:count] or drafts
        return drafts[: self._largest_size(matcher.valid_prefix(drafts))]

    def _largest_size(self, limit: int) -> int:
        """The most drafts within `limit`: few lengths, so that few graphs are captured."""
        return max((k for k in self.draft_sizes if k <= limit), default=0)

    def _earn(self, num_sequences: int, seconds: float) -> None:
        """Add to the account, within its bounds: a ceiling, and nothing that would be left to another request."""
        ceiling = _CEILING * num_sequences * (self.costs.decode(num_sequences) or 0.0)
        if self.proposer.shadows and not self._active:
            ceiling = 0.0
        self._account = min(self._account + seconds, ceiling)


def make_speculator(
    plan: EnginePlan, vocab_size: int, draft_model: CausalLM | None = None
) -> Speculator | None:
    """What `plan.speculative` asks for; `draft_model` where that names one. vocab_size: of the model drafted for."""
    if plan.speculative is None:
        return None
    if plan.speculative == "ngram":
        return Speculator(NgramProposer(), plan.num_draft_tokens)
    assert draft_model is not None, f"the draft model {plan.speculative} was not loaded"
    return Speculator(DraftModelProposer(draft_model, plan, vocab_size), plan.num_draft_tokens)
