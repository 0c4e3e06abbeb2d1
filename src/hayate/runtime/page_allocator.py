"""Which pages of the KV cache are free. No torch here."""

from __future__ import annotations

from hayate.runtime.sequence import Sequence


class PageAllocator:
    """Hands out pages of `page_size` tokens. Lowest numbers first, so that one sequence's pages are consecutive."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages - 1, -1, -1))  # a stack with the lowest number on top

    @property
    def num_free(self) -> int:
        return len(self._free)

    def pages_needed(self, sequence: Sequence, num_tokens: int) -> int:
        """Pages to add so that `sequence` has room for `num_tokens` tokens in all."""
        return max(-(-num_tokens // self.page_size) - len(sequence.page_ids), 0)

    def extend(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give `sequence` room for `num_tokens` tokens in all. False, and nothing changed, if too few are free."""
        needed = self.pages_needed(sequence, num_tokens)
        if needed > len(self._free):
            return False
        sequence.page_ids.extend(self._free.pop() for _ in range(needed))
        return True

    def release(self, sequence: Sequence) -> None:
        """Take back all pages of `sequence`."""
        self._free.extend(reversed(sequence.page_ids))
        sequence.page_ids.clear()
        if len(self._free) == self.num_pages:  # idle: consecutive pages again
            self._free.sort(reverse=True)
