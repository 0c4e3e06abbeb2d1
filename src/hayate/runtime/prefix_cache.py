"""Which pages hold the keys and values of which tokens, so that equal beginnings are computed once. No torch here.

A full page is known by a key that covers its tokens and all before them: SHA-256 of the key of the page before, the
token ids, and the pictures that tokens of the page show. Equal keys mean equal tokens and pictures (two different
prompts of one key would break SHA-256), at equal positions, hence equal keys and values. Python's own hash would not
do: it is not hard to find collisions for, and a collision shows one user the prompt of another.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable
from hashlib import sha256


def page_key(
    parent: bytes, token_ids: Iterable[int], pictures: Iterable[tuple[int, int, int, bytes]] = ()
) -> bytes:
    """The key of a full page: of the page before it (b"" for the first) and its own tokens.

    pictures: of each that the page shows: where it begins and where it ends within the page, counted from the page's
    first token; which one of its image's pictures it is; the digest of the image.
    """
    key = sha256(parent + array("Q", token_ids).tobytes())
    for start, end, index, digest in pictures:
        key.update(array("q", (start, end, index)).tobytes() + digest)
    return key.digest()


class PrefixCache:
    """Keys of pages, and the pages that nobody uses, the longest unused first to go.

    A page is either in use or *unused*; the owner says when that changes (`retire`, `revive`). Pages in use can be
    found too: a prompt is shared while it is being generated from.
    """

    def __init__(self) -> None:
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._unused: OrderedDict[int, None] = OrderedDict()  # the longest unused first

    def __contains__(self, page: int) -> bool:
        return page in self._key_of

    @property
    def num_unused(self) -> int:
        return len(self._unused)

    def find(self, key: bytes) -> int | None:
        """The page with these contents, if there is one."""
        return self._page_of.get(key)

    def put(self, key: bytes, page: int) -> None:
        """Let a page in use be found under `key`; the first page of equal contents stays the one that is found."""
        if key not in self._page_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def retire(self, page: int) -> None:
        """Nobody uses the page any more; its contents stay until `evict`."""
        self._unused[page] = None

    def revive(self, page: int) -> None:
        """An unused page is used again."""
        del self._unused[page]

    def evict(self) -> int:
        """Forget the page that has been unused the longest, and return it."""
        page, _ = self._unused.popitem(last=False)
        del self._page_of[self._key_of.pop(page)]
        return page

    def clear(self) -> list[int]:
        """Forget all contents; returns the pages that were unused."""
        unused = list(self._unused)
        self._page_of.clear()
        self._key_of.clear()
        self._unused.clear()
        return unused

    def check(self, in_use: set[int]) -> set[int]:
        """AssertionError unless the tables agree with each other and with `in_use`; returns the unused pages."""
        assert {page: key for key, page in self._page_of.items()} == self._key_of
        unused = set(self._unused)
        assert unused <= set(self._key_of), "an unused page without contents"
        assert set(self._key_of) <= unused | in_use, "contents of a page that was given away"
        return unused
