"""Prompt look-up against brute force; the policy in simulated time: never 3 % slower, much faster where it can be."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from hayate.runtime.ngram import NgramProposer, _History
from hayate.runtime.sequence import Sequence
from hayate.runtime.speculative import Speculator
from hayate.sampling_params import SamplingParams

VOCABULARY = 200


def new_sequence(prompt: list[int], num_tokens: int = 1000) -> Sequence:
    return Sequence(prompt, SamplingParams(temperature=0, max_tokens=num_tokens), 10**6, 0)


def append(proposer, sequence: Sequence, token: int) -> None:
    sequence.output_ids.append(token)
    proposer.observe(sequence, token)


# -- prompt look-up ---------------------------------------------------------------------------------


def brute_force(tokens: list[int]) -> tuple[int, int] | None:
    """(place after the latest earlier occurrence, size) of the longest of the last 4, 3 or 2 tokens that has one."""
    for size in (4, 3, 2):
        for place in range(len(tokens) - 1, size - 1, -1):
            if tokens[place - size : place] == tokens[-size:]:
                return place, size
    return None


def test_source_is_that_of_brute_force():
    """Each time the source is looked up. The index may forget an n-gram for another that falls on its slot."""
    rng = random.Random(1)
    lookups = agreed = 0
    for _ in range(20):
        prompt = [rng.randrange(9) for _ in range(40)]
        history = _History(prompt, room=30_000)
        for _ in range(150):
            expected_next = None if history.source is None else history.tokens[history.source]
            token = rng.randrange(9)
            history.push(token)
            if expected_next == token:
                continue  # followed, not looked up
            lookups += 1
            found = brute_force(history.tokens)
            if found is None:
                agreed += history.matched == 0
            else:
                agreed += (history.source, history.matched) == found
    # Of 3 * 190 n-grams in tables of 65536 slots each meets another in under 1 % of the cases.
    assert agreed / lookups > 0.99
    assert lookups > 1000


def test_indexing_a_prompt_at_once_is_indexing_its_tokens():
    rng = random.Random(2)
    text = [rng.randrange(VOCABULARY) for _ in range(500)]
    at_once, one_by_one = _History(text, room=1000), _History([], room=1000)
    for token in text:
        one_by_one.push(token)
    for a, b in zip(at_once._tables, one_by_one._tables, strict=True):
        # Before there are n tokens the slots of n-grams are those of shorter texts: these do no harm.
        differing = sum(x != y for x, y in zip(a, b, strict=True))
        assert differing <= 4
    assert at_once._slots == one_by_one._slots


def test_follows_a_copy_and_steps_over_an_edit():
    proposer, prompt = NgramProposer(), list(range(10, 60))
    sequence = new_sequence(prompt)
    for token in (10, 11):
        append(proposer, sequence, token)
    assert proposer.propose([sequence], [6]) == [[12, 13, 14, 15, 16, 17]]
    for token in (12, 13, 14, 99):  # 99 stands where the prompt has 15
        append(proposer, sequence, token)
    assert proposer.propose([sequence], [3]) == [[16, 17, 18]]
    append(proposer, sequence, 98)  # and that was no copy any more
    assert proposer.propose([sequence], [3]) == [[]]


def test_a_loop_is_guessed_beyond_its_end():
    proposer = NgramProposer()
    sequence = new_sequence([1, 2, 3])
    for token in (7, 8, 9, 7, 8, 9):
        append(proposer, sequence, token)
    assert proposer.propose([sequence], [8]) == [[7, 8, 9, 7, 8, 9, 7, 8]]


def test_latest_occurrence_wins_and_longest_before_it():
    proposer = NgramProposer()
    #                        5 after 1 2 3 4;    6 after 2 3 4;    7 after 3 4, the latest
    sequence = new_sequence([1, 2, 3, 4, 5, 0, 2, 3, 4, 6, 0, 0, 3, 4, 7, 9, 9, 1, 2, 3])
    append(proposer, sequence, 4)
    assert proposer.propose([sequence], [1]) == [[5]]
    sequence = new_sequence([3, 4, 6, 3, 4, 7, 9, 3])
    proposer = NgramProposer()
    append(proposer, sequence, 4)
    assert proposer.propose([sequence], [1]) == [[7]]


def test_memory_is_bounded():
    rng = random.Random(3)
    history = _History([rng.randrange(50_000) for _ in range(200_000)], room=400_000)
    assert sum(t.nbytes for t in history._tables) <= 3 * 4 * 2**16
    copied = history.tokens[-500:-480]
    for token in copied:
        history.push(token)
    assert history.guess(5) == history.tokens[199_520:199_525]  # recent text is still found


def test_expected_is_what_happens():
    """Copies that break with probability 0.15 a token: the estimate of accepted drafts agrees with their number."""
    rng = random.Random(4)
    prompt = [rng.randrange(5000) for _ in range(2000)]
    proposer, sequence = NgramProposer(), new_sequence(prompt, 20_000)
    place, estimated, happened = 0, [], []
    stream = []
    while len(stream) < 12_000:
        if rng.random() < 0.15:
            place = rng.randrange(1900)
        place = (place + 1) % 1990
        stream.append(prompt[place])
    for i, token in enumerate(stream[:-8]):
        append(proposer, sequence, token)
        drafts = proposer.propose([sequence], [5])[0]
        if i > 2000 and drafts:
            right = next((j for j in range(5) if drafts[j] != stream[i + 1 + j]), 5)
            estimated.append(proposer.expected(sequence, 5))
            happened.append(right)
    assert len(happened) > 3000
    mean = sum(happened) / len(happened)
    # The standard error of the mean of 3000 correlated counts with deviation 2 is below 0.1; the prior adds as much.
    assert sum(estimated) / len(estimated) == pytest.approx(mean, abs=0.2)


# -- the policy in simulated time ---------------------------------------------------------------------

DECODE = 0.01  # seconds


@dataclass
class Machine:
    """What steps take: a verify step with k drafts `cost(k)` decode steps, the decode step after it `refill` more."""

    cost: Callable[[int], float]
    refill: float
    noise: float = 0.0

    def jitter(self, rng: random.Random) -> float:
        return rng.lognormvariate(0.0, self.noise)


# A GPU whose memory is the limit; a native CPU whose cost goes in stairs; a compute-bound batch; long launches.
MACHINES = {
    "flat": Machine(lambda k: 1.1 + 0.01 * k, 0.4),
    "stairs": Machine(lambda k: 1.7 if k <= 3 else 2.05, 0.0),
    "linear": Machine(lambda k: 1.0 + 0.25 * k, 0.2),
    "launches": Machine(lambda k: 1.6 + 0.05 * k, 0.6),
    "noisy": Machine(lambda k: 1.3 + 0.05 * k, 0.3, noise=0.05),
}
# Gives the token at place i, given what the proposer guesses for it (None: nothing) and whether it is verified now.
Stream = Callable[[int, int | None, bool], int]


@dataclass
class Outcome:
    time: float  # with speculation
    plain: float  # of the same tokens without
    worst: float  # largest of time / plain - 1 at any token


def simulate(
    speculator: Speculator,
    machine: Machine,
    stream: Stream,
    prompt: list[int],
    num_tokens: int,
    rng: random.Random,
) -> Outcome:
    """One sequence alone, as the engine runs it. All time that speculation costs is counted, whoever records it."""
    sequence = new_sequence(prompt, num_tokens)
    time = plain = worst = 0.0
    drained = False

    def take(token: int) -> None:
        sequence.output_ids.append(token)
        speculator.observe(sequence, token)

    while (done := len(sequence.output_ids)) < num_tokens:
        drafts: list[int] = []
        if done and speculator.wants([sequence]):
            drafts = speculator.propose([sequence], [num_tokens - done - 1])[0]
            drained = True
        if drafts:
            accepted = 0
            while True:
                guess = drafts[accepted] if accepted < len(drafts) else None
                token = stream(done + accepted, guess, True)
                take(token)
                if token != guess:
                    break
                accepted += 1
            seconds = DECODE * machine.cost(len(drafts)) * machine.jitter(rng)
            time += seconds
            plain += DECODE * (accepted + 1)
            speculator.record_verify([sequence], [len(drafts)], [accepted], seconds)
        else:
            shadow = speculator.proposer.propose([sequence], [1])[0] or [None]
            take(stream(done, shadow[0], False))
            seconds = DECODE * machine.jitter(rng)
            plain += seconds
            seconds += DECODE * machine.refill if drained else 0.0
            time += seconds
            speculator.record_decode(1, seconds)
            drained = False
        worst = max(worst, time / plain - 1)
    speculator.forget(sequence)
    return Outcome(time, plain, worst)


def random_text(rng: random.Random, num_tokens: int) -> list[int]:
    return [rng.randrange(VOCABULARY) for _ in range(num_tokens)]


def copies(rng: random.Random, prompt: list[int], longest: int, between: int) -> Stream:
    """Passages of the prompt, up to so long, and between them random text, up to so long."""
    text: list[int] = []
    while len(text) < 2000:
        start = rng.randrange(len(prompt) - 2)
        text += prompt[start : start + rng.randint(2, longest)]
        text += random_text(rng, rng.randint(0, between))
    return lambda i, guess, verified: text[i]


def traitor(rng: random.Random, faithful: float) -> Stream:
    """The worst: guesses come true as long as they cost nothing, and (but for a share) fail when they are verified."""

    def token(i: int, guess: int | None, verified: bool) -> int:
        if guess is not None and (not verified or rng.random() < faithful):
            return guess
        return rng.randrange(VOCABULARY) if guess is None else (guess + 1) % VOCABULARY

    return token


def stream_of(kind: int, rng: random.Random, prompt: list[int]) -> Stream:
    if kind == 0:
        return traitor(rng, faithful=0.0)
    if kind == 1:
        return traitor(rng, faithful=rng.random())
    return copies(rng, prompt, rng.choice((3, 6, 12, 50)), rng.choice((0, 2, 10, 50)))


@pytest.mark.parametrize("machine", MACHINES)
def test_never_three_percent_slower(machine):
    """At no token of any of 500 streams: honest, changing and treacherous ones, short and long, in any order."""
    rng = random.Random(5)
    speculators = [Speculator(NgramProposer(), k) for k in (4, 7, 15)]
    for i in range(500):
        if i % 50 == 0:  # one that knows nothing of this machine yet
            speculators[i // 50 % 3] = Speculator(
                NgramProposer(), speculators[i // 50 % 3].draft_sizes[-1]
            )
        speculator = speculators[i % 3]
        prompt = random_text(rng, 60)
        length = rng.choice((20, 60, 120, 300))
        stream = stream_of(i % 4, rng, prompt)
        outcome = simulate(speculator, MACHINES[machine], stream, prompt, length, rng)
        assert outcome.worst < 0.03, (i, outcome)
    verified = sum(s.stats.num_verify_steps for s in speculators)
    assert verified > 200  # it did speculate


@pytest.mark.parametrize("machine", MACHINES)
def test_copies_are_much_faster(machine):
    """A text that is a copy with an edit every 25 tokens or so: the time at 300 tokens, the start included."""
    rng = random.Random(6)
    speculator = Speculator(NgramProposer(), 7)
    outcomes = []
    for _ in range(20):
        prompt = random_text(rng, 400)
        text = [rng.randrange(VOCABULARY) if rng.random() < 0.04 else t for t in prompt]
        stream = lambda i, guess, verified, text=text: text[i]  # noqa: E731
        outcomes.append(simulate(speculator, MACHINES[machine], stream, prompt, 300, rng))
    speed_up = sum(o.plain for o in outcomes) / sum(o.time for o in outcomes)
    assert speed_up > 1.6
    assert speculator.stats.acceptance_rate > 0.6
    # The drafts are as long as they can be where they cost little.
    if machine == "flat":
        assert speculator.stats.num_drafted / speculator.stats.num_verify_steps > 5


def test_a_machine_on_which_it_never_pays():
    """Each draft costs a whole decode step: after a few attempts nothing more is verified."""
    rng = random.Random(7)
    speculator = Speculator(NgramProposer(), 7)
    machine = Machine(lambda k: 1.5 + k, 0.5)
    prompt = random_text(rng, 500)
    outcome = simulate(speculator, machine, lambda i, guess, verified: prompt[i], prompt, 450, rng)
    assert outcome.time / outcome.plain < 1.03
    assert 0 < speculator.stats.num_verify_steps < 20


def test_an_expensive_surprise_is_paid_back():
    """Each verify step takes ten times what was assumed at worst: for a long while there is no other."""
    rng = random.Random(8)
    speculator = Speculator(NgramProposer(), 7)
    machine = Machine(lambda k: 20.0, 0.0)
    prompt = random_text(rng, 3000)
    outcome = simulate(speculator, machine, lambda i, guess, verified: prompt[i], prompt, 2900, rng)
    assert 0 < speculator.stats.num_verify_steps <= 6
    assert outcome.time / outcome.plain < 1.03


def test_a_batch_pays_together():
    """Eight sequences, four of which copy: the batch is faster; eight that betray: not 3 % slower in all."""
    machine = Machine(lambda k: 1.15 + 0.05 * k, 0.3)
    for treacherous in (False, True):
        rng = random.Random(9)
        speculator = Speculator(NgramProposer(), 7)
        sequences = [new_sequence(random_text(rng, 600)) for _ in range(8)]
        time = plain = 0.0
        drained = False

        def token(i: int, sequence: Sequence, guess: int | None, verified: bool) -> int:
            if treacherous:  # noqa: B023
                if guess is None:
                    return rng.randrange(VOCABULARY)  # noqa: B023
                return (guess + verified) % VOCABULARY
            done = len(sequence.output_ids)
            return sequence.prompt_ids[done] if i < 4 else rng.randrange(VOCABULARY)  # noqa: B023

        while len(sequences[0].output_ids) < 500:
            drafts: list[list[int]] = [[]] * 8
            if sequences[0].output_ids and speculator.wants(sequences):
                limits = [min(590 - len(s.output_ids), 100) for s in sequences]
                drafts, drained = speculator.propose(sequences, limits), True
            if any(drafts):
                counts = []
                for i, (sequence, ids) in enumerate(zip(sequences, drafts, strict=True)):
                    accepted = 0
                    for guess in [*ids, None]:
                        taken = token(i, sequence, guess, True)
                        sequence.output_ids.append(taken)
                        speculator.observe(sequence, taken)
                        if taken != guess:
                            break
                        accepted += 1
                    counts.append(accepted)
                lengths = [len(ids) for ids in drafts]
                seconds = DECODE * machine.cost(max(lengths))
                speculator.record_verify(sequences, lengths, counts, seconds)
                plain += DECODE * (8 + sum(counts)) / 8
            else:
                for i, sequence in enumerate(sequences):
                    shadow = speculator.proposer.propose([sequence], [1])[0] or [None]
                    taken = token(i, sequence, shadow[0], False)
                    sequence.output_ids.append(taken)
                    speculator.observe(sequence, taken)
                seconds = DECODE * (1 + machine.refill * drained)
                speculator.record_decode(8, seconds)
                plain, drained = plain + DECODE, False
            time += seconds
        if treacherous:
            assert time / plain < 1.03
        else:
            assert plain / time > 1.3


# -- structured output, ends ---------------------------------------------------------------------------


class EvenMatcher:
    """A grammar of even tokens in which 40 must be followed by 2 and 4."""

    def __init__(self, sequence: Sequence) -> None:
        self.sequence = sequence

    def forced(self) -> list[int]:
        return [2, 4] if self.sequence.output_ids[-1] == 40 else []

    def valid_prefix(self, ids) -> int:
        return next((i for i, token in enumerate(ids) if token % 2), len(ids))


def ready(speculator: Speculator, sequence: Sequence, tokens: list[int]) -> None:
    """Take `tokens` by decode steps, so many that any verify step is affordable."""
    for token in tokens:
        sequence.output_ids.append(token)
        speculator.observe(sequence, token)
    for _ in range(1000):
        speculator.record_decode(1, DECODE)


def test_drafts_end_at_what_the_grammar_forbids():
    speculator = Speculator(NgramProposer(), 7)
    speculator.matcher_of = EvenMatcher
    prompt = [*range(10, 36, 2), 37, 38, 42, 44, 46, 48]
    sequence = new_sequence(prompt)
    ready(speculator, sequence, prompt[:11])
    assert speculator.wants([sequence])
    (drafts,) = speculator.propose([sequence], [50])
    assert drafts == [32]  # 32, 34 would be two: lengths are 1, 3, 7


def test_forced_tokens_are_drafts():
    speculator = Speculator(NgramProposer(), 3)
    speculator.matcher_of = EvenMatcher
    sequence = new_sequence([10, 12, 14])
    ready(speculator, sequence, [8, 40])
    assert speculator.wants([sequence])
    assert speculator.propose([sequence], [50]) == [[2]]


def test_limits_bound_drafts():
    speculator = Speculator(NgramProposer(), 7)
    prompt = list(range(50))
    sequence = new_sequence(prompt)
    ready(speculator, sequence, prompt[:9])
    assert speculator.propose([sequence], [0]) == [[]]
    for limit in (1, 2, 3, 6, 7, 40):
        (drafts,) = speculator.propose([sequence], [limit])
        length = max((k for k in (1, 3, 7) if k <= limit), default=0)
        assert drafts == prompt[9 : 9 + length]


def test_forgotten_sequences_leave_nothing():
    speculator = Speculator(NgramProposer(), 7)
    sequences = [new_sequence(list(range(30))) for _ in range(3)]
    for sequence in sequences:
        ready(speculator, sequence, [1, 2, 3])
    for sequence in sequences:
        speculator.forget(sequence)
        speculator.forget(sequence)
    assert not speculator._active
    assert not speculator.proposer._histories
    fresh = new_sequence(list(range(30)))
    for token in (1, 2, 3, 4):
        fresh.output_ids.append(token)
        speculator.observe(fresh, token)
    assert not speculator.wants([fresh])  # what others earned is gone: the bound is for each


def test_statistics():
    speculator = Speculator(NgramProposer(), 3)
    sequence = new_sequence([1, 2, 3])
    speculator.record_verify([sequence], [3], [2], None)
    speculator.record_verify([sequence], [1], [1], 0.1)
    stats = speculator.stats
    assert (stats.num_drafted, stats.num_accepted, stats.num_verify_steps) == (4, 3, 2)
    assert stats.acceptance_rate == 0.75
