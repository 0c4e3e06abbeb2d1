"""Prompt look-up: guess the next tokens from an earlier place where the text ran the same way. No torch here.

The tokens of a sequence, prompt and output, are indexed by their 4-, 3- and 2-grams. The *source* is the place
that guesses are read from: the token after the latest earlier occurrence of the newest 4-gram, else 3-gram, else
2-gram. It moves along with the text for as long as it predicts it, so that a copied passage is looked up once.
Where the text departs from a long copy, and nothing else is found, the source steps over one token: an edit
often replaces one and goes on.

Every token that arrives tests the source, whether its guess was verified on the device or not. So how often
guesses are right is known before anything is spent on them: counted a sequence, by how many tokens up to the
source have matched already, since the longer a match the likelier it goes on.

Saxena, "Prompt Lookup Decoding", 2023; Yang et al., "Inference with Reference: Lossless Acceleration of Large
Language Models", 2023.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np

from hayate.runtime.sequence import Sequence

_SIZES = (4, 3, 2)
# Odd, 32 bits; a token id (18 bits) times one of them, four times, fits in 63 bits.
_MULTIPLIERS = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F)
_HASH_SHIFT = 15
_SLOTS = (1 << 10, 1 << 16)  # of a table, least and most

# How probable it is that the guess is right after 0, 1, 2 .. matching tokens, before anything has been seen.
_PRIOR = (0.2, 0.4, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.9)
_PRIOR_WEIGHT = 3.0  # the prior counts as so many guesses
_MEMORY = 32.0  # guesses a count remembers: it is halved when it holds twice as many
_LONG_MATCH = 4  # a copy that has held so long is stepped along past a differing token


class _History:
    """One sequence: its tokens, their index, the source, and how often it was right."""

    def __init__(self, known: list[int], room: int) -> None:
        """known: the tokens so far. room: the tokens there may ever be; decides the size of the index."""
        self.tokens = list(known)
        self.source: int | None = None
        self.matched = 0  # tokens before the source that equal the newest tokens
        self.hits = [p * _PRIOR_WEIGHT for p in _PRIOR]
        self.trials = [_PRIOR_WEIGHT] * len(_PRIOR)
        slots = min(max(1 << (2 * room - 1).bit_length(), _SLOTS[0]), _SLOTS[1])
        self._mask = slots - 1
        # Slot -> the position after the latest n-gram that fell there. A newer n-gram replaces an older one, so
        # the memory is bounded and long texts forget their beginning; what is found is compared, so never wrong.
        self._tables = [self._indexed(n, slots).data for n in _SIZES]
        self._slots = self._newest_slots()

    def _indexed(self, size: int, slots: int) -> np.ndarray:
        """The table of all n-grams of the known tokens that have a successor."""
        table = np.zeros(slots, dtype=np.int32)
        last = len(self.tokens)  # the positions of successors are size .. last - 1
        if last > size:
            ids = np.array(self.tokens, dtype=np.int64)
            keys = np.zeros(last - size, dtype=np.int64)
            for back, multiplier in enumerate(_MULTIPLIERS[:size], start=1):
                keys += ids[size - back : last - back] * multiplier
            table[(keys >> _HASH_SHIFT) & self._mask] = np.arange(size, last, dtype=np.int32)
        return table

    def _newest_slots(self) -> tuple[int, int, int]:
        """Where the newest 4-, 3- and 2-gram belong; anywhere while there are fewer tokens."""
        *_, d, c, b, a = (0, 0, 0, 0, *self.tokens[-4:])
        two = a * _MULTIPLIERS[0] + b * _MULTIPLIERS[1]
        three = two + c * _MULTIPLIERS[2]
        four = three + d * _MULTIPLIERS[3]
        mask = self._mask
        return (
            (four >> _HASH_SHIFT) & mask,
            (three >> _HASH_SHIFT) & mask,
            (two >> _HASH_SHIFT) & mask,
        )

    def push(self, token: int) -> None:
        """Take the next token: test the source, index the n-grams that end before the token, move on."""
        tokens, source = self.tokens, self.source
        resumed = None
        if source is not None:
            hit = tokens[source] == token
            self._count(hit)
            if hit:
                self.source = source + 1
                self.matched += 1
            else:
                if self.matched >= _LONG_MATCH:
                    resumed = source + 1
                self.source = None
        place = len(tokens)
        tokens.append(token)
        for table, slot in zip(self._tables, self._slots):  # noqa: B905 (three each; hot)
            table[slot] = place
        self._slots = self._newest_slots()
        if self.source is None and not self._find():
            self.source, self.matched = resumed, 0

    def _count(self, hit: bool) -> None:
        level = min(self.matched, len(_PRIOR) - 1)
        self.hits[level] += hit
        self.trials[level] += 1
        if self.trials[level] > 2 * _MEMORY:
            self.hits[level] /= 2
            self.trials[level] /= 2

    def _find(self) -> bool:
        """Set the source to the token after the latest occurrence of the newest n-gram, the longest that has one."""
        tokens = self.tokens
        for size, table, slot in zip(_SIZES, self._tables, self._slots):  # noqa: B905
            place = table[slot]
            if place >= size and tokens[place - size : place] == tokens[-size:]:
                self.source, self.matched = place, size
                return True
        return False

    def guess(self, count: int) -> list[int]:
        """The next `count` tokens as they follow the source, which may run into the guess itself (a loop)."""
        if self.source is None:
            return []
        guess = self.tokens[self.source : self.source + count]
        period = len(guess)
        while len(guess) < count:
            guess.append(guess[-period])
        return guess

    def expected(self, count: int) -> float:
        """Of `count` guessed tokens, how many will be right before the first that is not."""
        if self.source is None:
            return 0.0
        level, last = self.matched, len(_PRIOR) - 1
        total, reach = 0.0, 1.0
        for _ in range(count):
            at = level if level < last else last
            reach *= self.hits[at] / self.trials[at]
            total += reach
            level += 1
        return total


class NgramProposer:
    """Guesses by prompt look-up, for many sequences. See the module's text."""

    shadows = True
    first_run = False

    def __init__(self) -> None:
        self._histories: dict[Sequence, _History] = {}

    def observe(self, sequence: Sequence, token: int) -> None:
        """`token` has just been appended to the sequence's output. O(1), 3 us; the first call indexes the prompt."""
        history = self._histories.get(sequence)
        if history is None:
            room = len(sequence.prompt_ids) + (sequence.params.max_tokens or sequence.max_len)
            known = sequence.prompt_ids + sequence.output_ids[:-1]
            history = _History(known, min(room, sequence.max_len))
            self._histories[sequence] = history
        history.push(token)

    def expected(self, sequence: Sequence, count: int) -> float:
        """How many of `count` drafts would be accepted, on average."""
        history = self._histories.get(sequence)
        return 0.0 if history is None else history.expected(count)

    def propose(self, sequences: Seq[Sequence], counts: Seq[int]) -> list[list[int]]:
        """Up to `counts[i]` tokens to follow sequence i; none where nothing is known."""
        histories = (self._histories.get(s) for s in sequences)
        return [
            [] if history is None else history.guess(count)
            for history, count in zip(histories, counts, strict=True)
        ]

    def record(self, sequence: Sequence, num_drafts: int, num_accepted: int) -> None:
        """Nothing to learn: `observe` has tested the same guesses."""

    def preparation_seconds(self, sequences: Seq[Sequence]) -> float:
        """Nothing has to be computed before a proposal."""
        return 0.0

    def forget(self, sequence: Sequence) -> None:
        self._histories.pop(sequence, None)
