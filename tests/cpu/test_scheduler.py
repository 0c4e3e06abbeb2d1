"""The scheduler under random workloads, and its rules one by one. The engine is simulated (`simulated_engine`)."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from hayate.errors import OutOfMemory
from tests.cpu.simulated_engine import SimulatedEngine, naive, sequence

PAGE = 4

# arrival, tokens of the common text it begins with, own tokens, max_tokens, samples, priority, shareable
requests = st.tuples(
    st.integers(0, 30),
    st.integers(0, 25),
    st.integers(1, 15),
    st.integers(1, 40),
    st.sampled_from([1, 1, 1, 3]),
    st.sampled_from([0, 0, 0, 1, 2]),
    st.sampled_from([True] * 9 + [False]),
)
engines = st.builds(
    lambda page_size, num_pages, num_seqs, budget, chunk, prefix_cache: SimulatedEngine(
        -(-80 // page_size) + num_pages,  # one sequence fits, and a little more
        page_size,
        prefix_cache=prefix_cache,
        max_num_seqs=num_seqs,
        max_num_batched_tokens=max(budget, page_size),
        max_chunk_tokens=max(min(chunk, budget), page_size),
    ),
    st.sampled_from([1, 2, 4, 8]),
    st.integers(0, 20),
    st.integers(1, 10),
    st.integers(4, 64),
    st.integers(4, 64),
    st.sampled_from([True, True, False]),
)


def add_all(engine: SimulatedEngine, sequences) -> None:
    for seq in sequences:
        engine.scheduler.add(seq)


# Not shrunk: most of an example is its seed, and the rules that the simulation checks say what is wrong.
@settings(max_examples=500, deadline=None, phases=[Phase.reuse, Phase.generate])
@given(
    engine=engines,
    work=st.lists(requests, min_size=1, max_size=12),
    seed=st.integers(0, 2**32),
    rates=st.tuples(*[st.sampled_from([0, 0, 0.05]) for _ in range(2)]),
    draft_rate=st.sampled_from([0, 0.3]),
    late=st.booleans(),
)
def test_everybody_gets_its_tokens(engine, work, seed, rates, draft_rate, late):
    """Random arrivals, cancellations, failed steps, drafts, tokens late by a step, and far too few pages: all
    finish, with the tokens of a plain loop, and every page comes back. The simulation checks each step."""
    random = Random(seed)
    text = [random.randrange(1, 5) for _ in range(25)]
    arrivals = []
    for when, common, own, max_tokens, samples, priority, shareable in work:
        ids = text[:common] + [random.randrange(1, 5) for _ in range(own)]
        for seed in range(samples):
            fields = {"seed": seed, "priority": priority, "shareable": shareable}
            arrivals.append((when, sequence(ids, max_tokens, **fields)))
    aborted = set()
    todo = sorted(arrivals, key=lambda item: -item[0])
    for clock in range(10_000):
        while todo and todo[-1][0] <= clock:
            engine.scheduler.add(todo.pop()[1])
        if not todo and not engine.scheduler.has_work:
            break
        live = [*engine.scheduler.running, *engine.scheduler.waiting]
        if live and random.random() < rates[0]:
            aborted.add(random.choice(live))
            engine.finish(next(s for s in live if s in aborted and s.status != "finished"))
        if random.random() < rates[1]:
            engine.fail()
        for seq in engine.scheduler.decoding:
            if not seq.num_in_flight and random.random() < draft_rate:
                engine.guess(seq, random.randint(1, 5), random)
        if engine.launch() is None:
            assert engine.pending or not engine.scheduler.has_work
            late_now = False
        else:
            late_now = late and random.random() < 0.6
        while len(engine.pending) > late_now:
            engine.receive()
    assert len(engine.done) == len(arrivals), "somebody starved"
    for _, seq in arrivals:
        expected = naive(seq)
        if seq in aborted:
            expected = expected[: len(seq.output_ids)]
        assert seq.output_ids == expected
    assert engine.pages.num_free == engine.pages.num_pages


# -- order ----------------------------------------------------------------------------------------


def started(engine: SimulatedEngine, sequences) -> list:
    """All `sequences` in the order in which they are first computed."""
    add_all(engine, sequences)
    order: list = []
    while engine.scheduler.has_work:
        step = engine.launch()
        engine.receive()
        order += [s for s in step.sequences if s not in order]
    return order


def test_first_come_first_served():
    engine = SimulatedEngine(200, PAGE, max_num_seqs=2, max_num_batched_tokens=16)
    queue = [sequence(n, 3) for n in (30, 3, 9, 1, 20)]
    assert started(engine, queue) == queue


def test_urgent_first_then_first_come():
    engine = SimulatedEngine(200, PAGE, max_num_seqs=1, max_num_batched_tokens=16)
    queue = [sequence(5, 2, priority=p) for p in (1, 0, 2, 0, 1)]
    assert started(engine, queue) == [queue[i] for i in (1, 3, 0, 4, 2)]


@pytest.mark.parametrize("lack", ["seats", "pages"])
def test_urgent_preempts_the_least_urgent(lack):
    """And only for that: an equal one waits."""
    seats, pages = (2, 100) if lack == "seats" else (9, 9)
    engine = SimulatedEngine(pages, PAGE, max_num_seqs=seats, max_num_batched_tokens=64)
    low, lower = sequence([1] * 15, 4, priority=1), sequence([2] * 14, 4, priority=2)
    add_all(engine, [lower, low])
    engine.launch()
    equal = sequence([3] * 13, 4, priority=2)
    engine.scheduler.add(equal)
    step = engine.launch()
    assert set(step.sequences) == {low, lower}
    urgent = sequence([4] * 12, 4)
    engine.scheduler.add(urgent)
    engine.receive()
    step = engine.launch()
    assert step.sequences == (low, urgent)
    assert engine.scheduler.waiting == [lower, equal]
    assert engine.scheduler.num_preemptions == lower.num_preemptions == 1


# -- the budget -----------------------------------------------------------------------------------


def test_a_long_prompt_comes_in_chunks_beside_decoding():
    engine = SimulatedEngine(
        200, PAGE, max_num_seqs=8, max_num_batched_tokens=64, max_chunk_tokens=16
    )
    first = sequence([5] * 100, 12)
    engine.scheduler.add(first)
    step = engine.launch()
    assert step.num_tokens == (64,)  # alone it takes the whole budget
    assert step.samples == (False,)
    engine.receive()
    step = engine.launch()
    assert step.num_tokens == (36,)
    assert step.samples == (True,)
    engine.receive()
    later = sequence([6] * 40, 12)
    engine.scheduler.add(later)
    counts = []
    while later.num_uncomputed > 1:
        step = engine.launch()
        engine.receive()
        assert step.sequences == (first, later)
        assert step.num_decode == 1
        counts.append(step.num_tokens)
    assert counts == [(1, 16), (1, 16), (1, 8)]


def test_prompts_share_what_is_left_of_the_budget():
    engine = SimulatedEngine(200, PAGE, max_num_seqs=8, max_num_batched_tokens=32)
    queue = [sequence([i] * n, 3) for i, n in enumerate((10, 10, 20, 3), 1)]
    add_all(engine, queue)
    assert engine.launch().num_tokens == (10, 10, 12)
    engine.receive()
    step = engine.launch()
    assert step.sequences == tuple(queue)
    assert step.num_tokens == (1, 1, 8, 3)
    assert step.num_decode == 2


def test_more_sequences_than_tokens_in_the_budget():
    engine = SimulatedEngine(200, 1, max_num_seqs=50, max_num_batched_tokens=3)
    queue = [sequence([1 + i], 5) for i in range(9)]
    add_all(engine, queue)
    engine.run()
    assert [s.output_ids for s in queue] == [naive(s) for s in queue]


# -- pages ----------------------------------------------------------------------------------------


def test_the_youngest_is_preempted_and_goes_on():
    engine = SimulatedEngine(5, PAGE, max_num_seqs=8, max_num_batched_tokens=64)
    old, young = sequence([1] * 7, 9, seed=3), sequence([2] * 7, 9, seed=4)
    add_all(engine, [old, young])
    engine.run()
    assert (old.num_preemptions, young.num_preemptions) == (0, 1)
    assert [s.output_ids for s in (old, young)] == [naive(old), naive(young)]
    assert len(young.output_ids) > 2  # it had begun


def test_a_prompt_begins_when_there_is_room_for_all_of_it():
    """Not for its first chunk only: what runs would need the pages back."""
    engine = SimulatedEngine(10, PAGE, max_num_seqs=8, max_num_batched_tokens=8)
    (first,) = long_lived(0, 1)
    second = sequence([11] * 36, 2)
    add_all(engine, [first, second])
    engine.run()
    assert engine.done == [first, second]
    assert engine.scheduler.num_preemptions == 0


def test_room_is_kept_for_what_runs():
    engine = SimulatedEngine(9, PAGE, max_num_seqs=8, max_num_batched_tokens=64)
    queue = long_lived(0, 4)  # two pages each
    later = sequence([11, 12], 2)
    add_all(engine, [*queue, later])
    assert engine.launch().sequences == tuple(queue)
    assert engine.pages.num_free == 1
    engine.receive()
    assert later not in engine.launch().sequences


def test_a_prompt_that_can_never_fit_is_refused():
    engine = SimulatedEngine(2, PAGE, max_num_seqs=1, max_num_batched_tokens=8)
    with pytest.raises(OutOfMemory, match=r"prompt of 8 tokens.*take 9 places.*holds 8"):
        engine.scheduler.add(sequence(8, 2))
    fits = sequence(8, 1)
    engine.scheduler.add(fits)
    engine.run()
    assert fits.output_ids == naive(fits)


# -- ahead of the tokens --------------------------------------------------------------------------


def long_lived(seed_from: int, count: int, prompt: int = 6, max_tokens: int = 12) -> list:
    """Sequences that no stop token ends early."""
    found = []
    for seed in range(seed_from, seed_from + 1000):
        seq = sequence([1 + seed % 9] * prompt, max_tokens, seed=seed)
        if len(naive(seq)) == max_tokens and len(found) < count:
            found.append(seq)
    return found


def test_an_unchanged_set_is_the_same_step_in_the_same_order():
    engine = SimulatedEngine(100, PAGE, max_num_seqs=8, max_num_batched_tokens=64)
    queue = long_lived(0, 5)
    add_all(engine, queue)
    engine.launch()
    steps = []
    for _ in range(8):
        steps.append(engine.launch())  # the token before is still in flight
        engine.receive()
    assert all(step is steps[0] for step in steps)
    assert steps[0].is_decode
    assert steps[0].sequences == tuple(queue)
    engine.finish(queue[2])
    assert engine.launch().sequences == (*queue[:2], *queue[3:])


def test_no_step_beyond_the_last_token():
    engine = SimulatedEngine(100, PAGE, max_num_seqs=8, max_num_batched_tokens=64)
    (seq,) = long_lived(0, 1, max_tokens=3)
    engine.scheduler.add(seq)
    for _ in range(3):
        assert engine.launch() is not None
        if len(engine.pending) > 1:
            engine.receive()
    assert engine.launch() is None  # two tokens known, the third in flight
    assert engine.scheduler.has_work
    engine.receive()
    assert not engine.scheduler.has_work


def test_preempted_with_a_token_in_flight():
    engine = SimulatedEngine(100, PAGE, max_num_seqs=1, max_num_batched_tokens=64)
    (low,) = long_lived(0, 1)
    low.priority = 1
    engine.scheduler.add(low)
    engine.launch()
    urgent = sequence([9] * 5, 1)
    engine.scheduler.add(urgent)
    assert engine.launch().sequences == (urgent,)
    assert (low.status, low.num_in_flight, low.page_ids) == ("waiting", 1, [])
    engine.finish(urgent)
    assert engine.launch() is None  # the only other one waits for its token
    engine.receive()
    assert engine.launch().sequences == (low,)
    assert len(low.output_ids) == 1


def test_after_a_failed_step_all_begin_again_with_their_tokens():
    engine = SimulatedEngine(100, PAGE, max_num_seqs=8, max_num_batched_tokens=64)
    queue = long_lived(0, 3)
    add_all(engine, queue)
    for _ in range(4):
        engine.launch()
        engine.receive()
    engine.fail()
    assert engine.scheduler.waiting == queue
    assert [len(s.output_ids) for s in queue] == [4] * 3
    assert engine.pages.num_cached == 0  # nothing of what the failed step wrote
    engine.run()
    assert [s.output_ids for s in queue] == [naive(s) for s in queue]


# -- drafts ---------------------------------------------------------------------------------------


def test_drafts_are_verified_after_what_decodes():
    engine = SimulatedEngine(100, PAGE, max_num_seqs=8, max_num_batched_tokens=64)
    queue = long_lived(0, 3)
    add_all(engine, queue)
    engine.launch()
    engine.receive()
    right = naive(queue[0])
    queue[0].draft_ids = [*right[1:3], right[3] + 1]
    step = engine.launch()
    assert step.sequences == (queue[1], queue[2], queue[0])
    assert step.num_tokens == (1, 1, 4)
    assert step.num_drafts == (0, 0, 3)
    assert step.num_decode == 2
    # Until the host knows how many were right, the sequence rests.
    assert queue[0] not in engine.launch().sequences
    engine.receive()
    assert queue[0].output_ids == right[:4]
    assert queue[0].num_uncomputed == 1
    assert engine.launch().sequences == tuple(queue)


def test_drafts_on_their_way_are_not_shared():
    """Preempted while drafts are being verified: what is reusable are the tokens that are known."""
    engine = SimulatedEngine(100, PAGE, max_num_seqs=1, max_num_batched_tokens=64)
    (low,) = long_lived(0, 1)
    low.priority = 1
    engine.scheduler.add(low)
    engine.launch()
    engine.receive()
    low.draft_ids = [22, 22, 22]
    assert engine.launch().num_drafts == (3,)  # 10 tokens computed, 7 known
    urgent = sequence([11], 1)
    engine.scheduler.add(urgent)
    assert engine.launch().sequences == (urgent,)
    assert engine.pages.num_cached == 1
    engine.receive()
    assert len(low.output_ids) >= 2
    engine.receive()
    engine.run()
    assert low.output_ids == naive(low)


def test_drafts_end_at_the_limit_and_at_the_budget():
    engine = SimulatedEngine(100, PAGE, max_num_seqs=3, max_num_batched_tokens=8)
    queue = long_lived(0, 3, prompt=1, max_tokens=5)
    add_all(engine, queue)
    engine.launch()
    engine.receive()
    queue[0].draft_ids = naive(queue[0])[1:]  # four, of which the last cannot be reached by a draft
    queue[1].draft_ids = naive(queue[1])[1:]
    step = engine.launch()
    assert step.sequences == (queue[2], queue[0], queue[1])
    assert step.num_drafts == (0, 3, 2)  # 8 - 3 tokens are left for drafts
    engine.receive()
    assert queue[0].output_ids == naive(queue[0])
    assert queue[0].status == "finished"
    assert queue[1].output_ids == naive(queue[1])[:4]
