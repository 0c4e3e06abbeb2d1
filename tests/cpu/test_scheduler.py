"""The scheduler and the page allocator under random workloads: nothing lost, nothing shared, everybody served."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hayate.errors import OutOfMemory
from hayate.runtime.page_allocator import PageAllocator
from hayate.runtime.scheduler import Scheduler, Step
from hayate.runtime.sequence import Sequence
from hayate.sampling_params import SamplingParams

PAGE = 4


def sequence(prompt_len: int, max_len: int = 64) -> Sequence:
    return Sequence(list(range(prompt_len)), SamplingParams(temperature=0), max_len, seed=0)


def scheduler(num_pages: int, max_num_seqs: int = 8, budget: int = 64) -> Scheduler:
    pages = PageAllocator(num_pages, PAGE)
    return Scheduler(pages, max_num_seqs=max_num_seqs, max_num_batched_tokens=budget)


def check_pages(s: Scheduler) -> None:
    """Every page is free or owned by exactly one live sequence, and each sequence has room for what it computed."""
    owned = [p for q in [*s.running, *s.waiting] for p in q.page_ids]
    free = s.pages._free
    assert sorted(owned + free) == list(range(s.pages.num_pages))
    for q in s.running:
        assert len(q.page_ids) * PAGE >= q.num_computed
        assert q.num_computed <= q.num_tokens <= q.max_len


def run_step(step: Step) -> None:
    """What the runner and the sampler do to the lengths."""
    for q, count in zip(step.sequences, step.num_tokens, strict=True):
        assert count == q.num_uncomputed
        assert len(q.page_ids) * PAGE >= q.num_computed + count
        q.num_computed += count
        q.output_ids.append(0)


workload = st.lists(
    st.tuples(
        st.integers(1, 30), st.integers(1, 30), st.integers(0, 6)
    ),  # prompt, output, steps to wait
    min_size=1,
    max_size=20,
)


@settings(max_examples=300, deadline=None)
@given(
    workload,
    st.integers(16, 40),
    st.integers(1, 8),
    st.integers(8, 64),
    st.lists(st.integers(0, 400), max_size=4),
)
def test_everybody_is_served(work, num_pages, max_num_seqs, budget, cancel_at):
    """Random arrivals, lengths and cancellations: all finish, and every page comes back."""
    s = scheduler(num_pages, max_num_seqs, budget)
    arrivals = sorted(
        ((wait, sequence(p, max_len=min(p + n, num_pages * PAGE)), n) for p, n, wait in work),
        key=lambda item: item[0],
    )
    wanted = {id(q): n for _, q, n in arrivals}
    done: list[Sequence] = []
    for clock in range(5000):
        while arrivals and arrivals[0][0] <= clock:
            s.add(arrivals.pop(0)[1])
        if not s.has_work and not arrivals:
            break
        if clock in cancel_at and s.running:
            victim = s.running[0]
            s.finish(victim)
            done.append(victim)
        step = s.next_batch()
        check_pages(s)
        if step is None:
            assert not s.running and not s.waiting
            continue
        assert len(set(step.sequences)) == len(step.sequences) <= max_num_seqs
        if len(step.sequences) > 1 and step.kind == "prefill":
            assert sum(step.num_tokens) <= budget
        run_step(step)
        for q in step.sequences:
            if len(q.output_ids) >= wanted[id(q)] or q.num_tokens >= q.max_len:
                s.finish(q)
                done.append(q)
        check_pages(s)
    assert len(done) == len(work), "somebody starved"
    assert s.pages.num_free == num_pages


def test_first_come_first_served():
    s = scheduler(num_pages=100, max_num_seqs=2)
    queue = [sequence(3) for _ in range(4)]
    for q in queue:
        s.add(q)
    step = s.next_batch()
    assert step is not None
    assert step.sequences == tuple(queue[:2])
    s.finish(queue[0])
    run_step(Step("prefill", (queue[1],), (3,)))
    step = s.next_batch()
    assert step is not None
    assert step.sequences == (queue[2],)


def test_the_youngest_is_preempted_and_starts_over():
    s = scheduler(num_pages=4, budget=64)
    old, young = sequence(7), sequence(7)  # two pages each: full
    for q in (old, young):
        s.add(q)
    step = s.next_batch()
    assert step is not None
    run_step(step)  # 8 tokens known, 7 computed
    step = s.next_batch()
    assert step is not None
    run_step(step)  # 9 known, 8 computed: the next needs a page each
    step = s.next_batch()
    assert step is not None
    assert step.sequences == (old,)
    assert young.status == "waiting"
    assert young.num_computed == 0
    assert not young.page_ids
    assert young.num_uncomputed == 9  # its output is kept, and computed again with the prompt
    assert s.num_preemptions == 1


def test_a_prompt_that_can_never_fit_is_refused():
    s = scheduler(num_pages=2)
    with pytest.raises(OutOfMemory, match=r"8 tokens.*holds 8"):
        s.add(sequence(8))
