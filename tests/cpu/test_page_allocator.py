"""Pages: handed out, shared, counted, taken back."""

from __future__ import annotations

import pytest

from hayate.runtime.page_allocator import PageAllocator
from tests.cpu.simulated_engine import sequence

PAGE = 4


def test_pages_of_a_fresh_cache_are_consecutive():
    pages = PageAllocator(6, PAGE)
    a, b = sequence(5), sequence(5)
    assert pages.extend(a, 5)
    assert pages.extend(b, 9)
    assert (a.page_ids, b.page_ids) == ([0, 1], [2, 3, 4])
    pages.check([a, b])


def test_extend_is_all_or_nothing():
    pages = PageAllocator(3, PAGE)
    a, b = sequence(5), sequence(5)
    assert pages.extend(a, 8)
    assert pages.extend(a, 8)  # it has room already
    assert pages.pages_needed(b, 8) == 2
    assert not pages.extend(b, 8)
    assert b.page_ids == []
    assert pages.num_free == 1
    pages.release(a)
    assert pages.extend(b, 12)
    pages.check([b])


def test_reusable_pages_are_handed_out_when_no_other_is_left():
    pages = PageAllocator(4, PAGE)
    a = sequence(9)
    assert pages.extend(a, 9)
    pages.publish(a, 9)
    pages.release(a)
    assert (pages.num_free, pages.num_cached) == (4, 2)
    b = sequence([8] * 8)
    assert pages.extend(b, 8)  # the two others
    assert pages.num_cached == 2
    assert pages.extend(b, 12)
    assert pages.num_cached == 1
    again = sequence(9)
    assert pages.reuse(again) == PAGE  # the beginning was kept
    pages.check([b, again])
    assert not pages.extend(b, 16)


def test_a_shared_page_is_free_when_nobody_uses_it():
    pages = PageAllocator(4, PAGE)
    a, b = sequence(6), sequence(6)
    assert pages.extend(a, 6)
    pages.publish(a, 6)
    assert pages.reuse(b) == PAGE
    assert pages.extend(b, 6)
    pages.check([a, b])
    pages.release(a)
    assert pages.num_free == 2
    pages.check([b])
    pages.release(b)
    assert pages.num_free == 4
    pages.check([])


def test_pages_in_use_that_were_forgotten_are_not_shared():
    pages = PageAllocator(4, PAGE)
    a, b = sequence(9), sequence(9)
    assert pages.extend(a, 9)
    pages.publish(a, 4)
    pages.forget()
    assert pages.reuse(b) == 0
    pages.release(a)
    assert pages.num_cached == 0
    pages.check([])


@pytest.mark.parametrize("fault", ["lost", "twice", "miscounted", "cached"])
def test_check_finds_faults(fault):
    pages = PageAllocator(4, PAGE)
    a = sequence(9)
    assert pages.extend(a, 9)
    pages.publish(a, 9)
    pages.check([a])
    if fault == "lost":
        pages._free.pop()
    elif fault == "twice":
        pages._free.append(a.page_ids[0])
    elif fault == "miscounted":
        pages._users[a.page_ids[0]] = 2
    else:
        pages._cache.retire(pages._free[0])
    with pytest.raises(AssertionError):
        pages.check([a])
