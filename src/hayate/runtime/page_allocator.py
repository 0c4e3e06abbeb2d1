"""Who uses which page of the KV cache. No torch here.

Every page is one of: free; in use by the sequences that its count says; reusable, that is unused but with contents
that a later prompt may begin with. Full pages are shared, and written by nobody after that; the page a
sequence writes to is its own.

A page may be handed on while a launched step still works on it: steps run in the order in which they were launched.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from hayate.runtime.prefix_cache import PrefixCache, page_key
from hayate.runtime.sequence import Sequence


class PageAllocator:
    """Hands out pages of `page_size` tokens, and finds pages that hold what a prompt begins with.

    Without `prefix_cache` nothing is found, and a released page is free at once.
    """

    def __init__(self, num_pages: int, page_size: int, *, prefix_cache: bool = True) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.prefix_cache = prefix_cache
        self._cache = PrefixCache()
        self._free = list(range(num_pages - 1, -1, -1))  # a stack with the lowest number on top
        self._users = [0] * num_pages

    @property
    def num_free(self) -> int:
        """Pages that can be handed out now: those that nobody uses, reusable ones included."""
        return len(self._free) + self._cache.num_unused

    @property
    def num_cached(self) -> int:
        """Of the free pages, those that hold something reusable."""
        return self._cache.num_unused

    def pages_needed(self, sequence: Sequence, num_tokens: int) -> int:
        """Pages to add so that `sequence` has room for `num_tokens` tokens in all."""
        return max(-(-num_tokens // self.page_size) - len(sequence.page_ids), 0)

    def extend(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give `sequence` room for `num_tokens` tokens in all. False, and nothing changed, if too few are free."""
        needed = self.pages_needed(sequence, num_tokens)
        if needed > self.num_free:
            return False
        for _ in range(needed):
            page = self._free.pop() if self._free else self._cache.evict()
            self._users[page] = 1
            sequence.page_ids.append(page)
        return True

    def reuse(self, sequence: Sequence) -> int:
        """Give a sequence without pages the longest run of full pages that hold its first tokens.

        Returns how many tokens that is; the last token is never among them, for its logits are wanted.
        """
        assert not sequence.page_ids
        if not (self.prefix_cache and sequence.shareable):
            return 0
        for index in range((sequence.num_tokens - 1) // self.page_size):
            page = self._cache.find(self._key(sequence, index))
            if page is None:
                break
            if self._users[page] == 0:
                self._cache.revive(page)
            self._users[page] += 1
            sequence.page_ids.append(page)
        sequence.num_published = len(sequence.page_ids)
        return len(sequence.page_ids) * self.page_size

    def publish(self, sequence: Sequence, num_tokens: int) -> None:
        """Let others share the full pages among the first `num_tokens` tokens.

        These are known, and their keys and values are written before any step reads them that is launched later.
        """
        if not (self.prefix_cache and sequence.shareable):
            return
        for index in range(sequence.num_published, num_tokens // self.page_size):
            self._cache.put(self._key(sequence, index), sequence.page_ids[index])
            sequence.num_published = index + 1

    def release(self, sequence: Sequence) -> None:
        """Take back all pages of `sequence`; what it published stays reusable."""
        # The last first, so that the end of a text is forgotten before its beginning.
        for page in reversed(sequence.page_ids):
            self._users[page] -= 1
            if self._users[page]:
                continue
            if page in self._cache:
                self._cache.retire(page)
            else:
                self._free.append(page)
        sequence.page_ids.clear()
        sequence.num_published = 0

    def forget(self) -> None:
        """Drop everything reusable: nothing that was computed so far is shared from now on."""
        self._free += self._cache.clear()

    def check(self, holders: Iterable[Sequence]) -> None:
        """AssertionError unless every page is free, reusable, or in use by just the `holders` that list it."""
        uses = Counter(page for sequence in holders for page in sequence.page_ids)
        assert [uses[p] for p in range(self.num_pages)] == self._users, "wrong counts of users"
        unused = self._cache.check(set(uses))
        assert sorted([*uses, *unused, *self._free]) == list(range(self.num_pages)), "lost pages"

    def _key(self, sequence: Sequence, index: int) -> bytes:
        """The key of the sequence's full page `index`, whose tokens are known."""
        keys, size = sequence.page_keys, self.page_size
        while len(keys) <= index:
            begin = len(keys) * size
            end = begin + size
            parent = keys[-1] if keys else b""
            shown = [
                (s.start - begin, min(s.end, end) - begin, s.index, s.digest)
                for s in sequence.spans_in(begin, end)
            ]
            keys.append(page_key(parent, sequence.tokens(begin, end), shown))
        return keys[index]
