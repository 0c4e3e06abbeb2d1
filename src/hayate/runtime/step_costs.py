"""What steps take, learnt from measurements: the half of the decision whether speculation pays."""

from __future__ import annotations

import statistics
from collections import deque

_MEMORY = (
    1024  # decode steps after which the oldest measurement of each kind of verify step is dropped
)
_OUTLIER = 2.0  # what was supposed, so many times, is the most that one measurement may say


class _Measured:
    """The latest measurements of one figure, after one that was assumed before there were any."""

    def __init__(self, assumed: list[float]) -> None:
        self._values = deque(assumed, maxlen=9)
        self._median: float | None = None

    def add(self, value: float) -> None:
        self._values.append(value)
        self._median = None

    def forget_oldest(self) -> bool:
        """Drop a measurement; False when it was the last."""
        self._values.popleft()
        self._median = None
        return bool(self._values)

    def __len__(self) -> int:
        return len(self._values)

    @property
    def median(self) -> float:
        if self._median is None:
            self._median = statistics.median(self._values)
        return self._median

    @property
    def worst(self) -> float:
        """The largest of the latest."""
        return max(list(self._values)[-3:])


class StepCosts:
    """What decode and verify steps take, as measured. Seconds for decode steps, else multiples of a decode step."""

    def __init__(self) -> None:
        self._decode: dict[int, _Measured] = {}
        self._verify: dict[tuple[int, int], _Measured] = {}
        self._refill = _Measured([0.5])
        self._steps = 0

    @property
    def refill(self) -> tuple[float, float]:
        """(likely, at worst): what the first decode step after a verify step takes beyond the others."""
        return self._refill.median, self._refill.worst

    def decode(self, num_sequences: int) -> float | None:
        """Seconds of a decode step; None before a few were measured."""
        known = self._decode.get(_group(num_sequences))
        return known.median if known is not None and len(known) >= 3 else None

    def verify(self, num_sequences: int, num_drafts: int) -> tuple[float, float]:
        """(likely, at worst). Before it was measured, low enough to be tried and high enough to pay for."""
        group = _group(num_sequences)
        known = self._verify.get((group, num_drafts))
        if known is not None:
            return known.median, known.worst
        likely, worst = _likely(num_drafts), _worst(num_drafts)
        for (other, size), fewer in self._verify.items():
            if other == group and size < num_drafts:
                likely = max(likely, fewer.median)
                worst = max(worst, fewer.worst)
        return likely, worst

    def add_decode(self, num_sequences: int, seconds: float) -> None:
        self._decode.setdefault(_group(num_sequences), _Measured([])).add(seconds)
        self._steps += 1
        if (
            self._steps % _MEMORY == 0
        ):  # what is not measured any more is tried again, sooner or later
            self._verify = {k: m for k, m in self._verify.items() if m.forget_oldest()}

    def add_refill(self, ratio: float) -> None:
        self._refill.add(min(ratio, _OUTLIER))

    def add_verify(self, num_sequences: int, num_drafts: int, ratio: float) -> None:
        _, supposed = self.verify(num_sequences, num_drafts)
        key = _group(num_sequences), num_drafts
        # The assumption stays among the measurements at first: one bad one does not decide.
        known = self._verify.setdefault(key, _Measured([_likely(num_drafts)]))
        known.add(min(ratio, _OUTLIER * supposed))


def _likely(num_drafts: int) -> float:
    """A verify step in decode steps, before any was measured: as good as it may be."""
    return 1.2 + 0.05 * num_drafts


def _worst(num_drafts: int) -> float:
    """The same, as bad as it is supposed to be."""
    return 1.6 + 0.25 * num_drafts


def _group(num_sequences: int) -> int:
    """Batch sizes that are taken to cost the same."""
    return num_sequences if num_sequences <= 8 else 1 << (num_sequences - 1).bit_length()
