"""The prefix cache: what is found, what is kept, what is shared."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from hayate.runtime.prefix_cache import PrefixCache, page_key
from tests.cpu.simulated_engine import SimulatedEngine, naive, sequence

PAGE = 4


def engine_of(num_pages: int = 1000, budget: int = 256, **options) -> SimulatedEngine:
    return SimulatedEngine(
        num_pages, PAGE, max_num_seqs=64, max_num_batched_tokens=budget, **options
    )


def run_one(engine: SimulatedEngine, prompt: list[int], max_tokens: int = 2, seed: int = 0):
    """One request from beginning to end."""
    seq = sequence(prompt, max_tokens, seed=seed)
    engine.scheduler.add(seq)
    engine.run()
    assert seq.output_ids == naive(seq)
    return seq


def test_keys_are_equal_only_for_equal_beginnings():
    first = page_key(b"", [1, 2, 3])
    assert page_key(b"", (1, 2, 3)) == first
    others = [page_key(b"", [1, 2, 4]), page_key(b"", [1, 2]), page_key(first, [1, 2, 3])]
    # Neither Python's hash (-1 and -2 have one) nor a join of digits tells these apart.
    others += [page_key(b"", [12, 3]), page_key(b"", [1, 23]), page_key(b"", [2**40 + 1, 2, 3])]
    assert len({first, *others}) == 7


def test_the_longest_unused_goes_first():
    cache = PrefixCache()
    keys = [bytes([i]) for i in range(3)]
    for page, key in enumerate(keys):
        cache.put(key, page)
        cache.retire(page)
    cache.revive(0)
    cache.retire(0)
    assert cache.evict() == 1
    assert [cache.find(key) for key in keys] == [0, None, 2]
    assert [cache.evict(), cache.evict()] == [2, 0]
    assert cache.num_unused == 0


def test_of_equal_pages_the_first_is_found():
    cache = PrefixCache()
    cache.put(b"a", 5)
    cache.put(b"a", 6)
    assert cache.find(b"a") == 5
    assert 6 not in cache


def common_prefix(a: list[int], b: list[int]) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 30),  # which text it goes on from, if there are so many
            st.integers(0, 60),  # how much of that it keeps
            st.lists(st.integers(1, 2), min_size=1, max_size=12),
            st.integers(1, 12),
        ),
        max_size=15,
    )
)
def test_hits_are_the_longest_run_of_full_pages(work):
    """With room for all, a prompt finds all full pages that any text before it has begun with, and no more."""
    engine = engine_of()
    texts: list[list[int]] = [[]]
    hits = queried = 0
    for which, keep, own, max_tokens in work:
        prompt = texts[which % len(texts)][:keep] + own
        # The last token of a text is never computed, nor is that of a prompt ever taken from the cache.
        common = max(common_prefix(prompt[:-1], text[:-1]) for text in texts)
        seq = run_one(engine, prompt, max_tokens)
        assert seq.num_cached == common // PAGE * PAGE
        texts.append(prompt + seq.output_ids)
        hits += seq.num_cached
        queried += len(prompt)
    assert engine.scheduler.num_prompt_tokens_cached == hits
    assert engine.scheduler.num_prompt_tokens_queried == queried


def test_samples_share_the_prompt_in_its_first_step():
    engine = engine_of(budget=64)
    prompt = [1, 2, 3] * 6 + [4]  # four full pages and three tokens
    samples = [sequence(prompt, 8, seed=s) for s in range(6)]
    for seq in samples:
        engine.scheduler.add(seq)
    step = engine.launch()
    assert step.num_tokens == (19, 3, 3, 3, 3, 3)
    shared = {tuple(s.page_ids[:4]) for s in samples}
    assert len(shared) == 1
    assert len({s.page_ids[4] for s in samples}) == 6
    engine.receive()
    engine.run()
    assert [s.output_ids for s in samples] == [naive(s) for s in samples]


def test_samples_of_a_long_prompt_wait_for_its_chunks():
    """Nothing is computed twice, though the prompt takes several steps."""
    engine = engine_of(budget=16)
    samples = [sequence([5, 6] * 20 + [7], 2, seed=s) for s in range(3)]
    for seq in samples:
        engine.scheduler.add(seq)
    counts = []
    while any(not s.output_ids for s in samples):
        counts.append(engine.launch().num_tokens)
        engine.receive()
    assert counts == [(16,), (16,), (1, 1, 9)]


def test_a_prompt_of_full_pages_computes_its_last_page():
    engine = engine_of()
    prompt = [1, 2, 3, 4] * 3
    run_one(engine, prompt, 1)
    assert run_one(engine, prompt, 1).num_cached == 8
    assert run_one(engine, [*prompt, 9], 1).num_cached == 12


def test_a_conversation_goes_on_from_its_answer():
    engine = engine_of()
    first = run_one(engine, [1, 2, 3, 4, 5], 11, seed=2)
    text = first.prompt_ids + first.output_ids
    second = run_one(engine, [*text, 7, 7, 7])
    assert second.num_cached == (len(text) - 1) // PAGE * PAGE
    assert second.num_cached > 4  # more than the first prompt


def test_pages_in_use_are_found():
    engine = engine_of()
    first = sequence([1, 2, 3, 4] * 2 + [5], 20, seed=1)
    engine.scheduler.add(first)
    engine.launch()
    engine.receive()
    assert first.status == "running"
    second = sequence([1, 2, 3, 4] * 2 + [6], 20)
    engine.scheduler.add(second)
    engine.launch()
    assert second.num_cached == 8
    assert second.page_ids[:2] == first.page_ids[:2]
    engine.finish(first)  # the second goes on with the pages
    engine.receive()
    engine.run()
    assert second.output_ids == naive(second)


def test_what_was_used_last_is_kept():
    """And the end of a text goes before its beginning."""
    engine = engine_of(num_pages=10)
    old, new = [1] * 17, [2] * 17  # five pages each, of which four are full
    run_one(engine, old, 1)
    run_one(engine, new, 1)
    run_one(engine, [3] * 17, 1)  # two pages are free: three of `old` have to go
    assert run_one(engine, new, 1).num_cached == 16
    assert run_one(engine, old, 1).num_cached == 4


def test_without_the_cache_nothing_is_found():
    engine = engine_of(prefix_cache=False)
    for _ in range(2):
        assert run_one(engine, [1] * 20).num_cached == 0
    assert engine.pages.num_cached == 0


def test_what_is_not_shareable_is_not_shared():
    engine = engine_of()
    prompt = [1] * 20
    alone = sequence(prompt, 2, shareable=False)
    engine.scheduler.add(alone)
    engine.run()
    assert engine.pages.num_cached == 0
    run_one(engine, prompt)
    second = sequence(prompt, 2, shareable=False)
    engine.scheduler.add(second)
    engine.run()
    assert (alone.num_cached, second.num_cached) == (0, 0)
    assert alone.output_ids == second.output_ids == naive(second)


def test_what_was_forgotten_is_computed_again():
    engine = engine_of()
    run_one(engine, [1] * 20)
    assert engine.pages.num_cached > 0
    engine.pages.forget()
    assert engine.pages.num_cached == 0
    assert run_one(engine, [1] * 20).num_cached == 0
    assert run_one(engine, [1] * 20).num_cached == 16


def test_a_preempted_sequence_finds_its_own_pages():
    engine = engine_of(num_pages=40)
    low = sequence([1, 2, 3, 4, 5] * 4, 20, seed=1, priority=1)
    engine.scheduler.max_num_seqs = 1
    engine.scheduler.add(low)
    engine.launch()
    engine.receive()
    urgent = sequence([9], 1)
    engine.scheduler.add(urgent)
    engine.run()
    assert low.num_preemptions == 1
    assert low.num_cached == 0  # what the request found when it came
    assert low.output_ids == naive(low)
