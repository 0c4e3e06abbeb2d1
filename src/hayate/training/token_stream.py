"""Which tokens a training step sees: a pure function of the files, the seed and the step.

The tokens of a file are cut into windows of `sequence_length` inputs (and one more token, the last target). A run
is a sequence of windows, numbered from 0 over all steps; number i comes from a source drawn by weight with the
generator of the run, and within its source windows follow a new random order each epoch (Fisher-Yates by NumPy's
Philox, keyed by seed, source and epoch). So a run continues anywhere with nothing stored but the step, and any number
of processes see the same global batches: of B windows, process r of n takes rows r B/n to (r + 1) B/n.

A window may hold pieces of several documents. `document_starts` says where the piece of each token begins, so that
attention stays inside it, and positions count from there. The token after a document's end is no target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hayate.errors import UsageError
from hayate.training.token_file import TokenFile

IGNORE = -100  # the target of a token that predicts nothing, as in torch's cross_entropy


@dataclass(frozen=True)
class TokenBatch:
    """M windows of L tokens."""

    token_ids: np.ndarray  # (M, L) int64
    targets: np.ndarray  # (M, L) int64, IGNORE where there is none
    document_starts: (
        np.ndarray
    )  # (M, L) int32, column where the token's document (or its piece) begins

    @property
    def num_targets(self) -> int:
        return int((self.targets != IGNORE).sum())

    def __getitem__(self, rows: slice) -> TokenBatch:
        """Some of the windows."""
        return TokenBatch(self.token_ids[rows], self.targets[rows], self.document_starts[rows])


class TokenStream:
    """Windows of weighted token files, in their order for one run.

    Args:
        files: the sources; all of one tokenizer.
        weights: how often each is drawn, relative to the others; None: by their number of tokens.
        sequence_length: L.
        seed: of the run.
        shuffle: False gives the windows of the files in order, each once an epoch (for evaluation).

    Raises UsageError when a file has no whole window, or tokenizers differ.
    """

    def __init__(
        self,
        files: Sequence[TokenFile],
        *,
        sequence_length: int,
        weights: Sequence[float] | None = None,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        assert files
        self.files, self.sequence_length, self.seed, self.shuffle = (
            files,
            sequence_length,
            seed,
            shuffle,
        )
        self.num_windows = [(f.num_tokens - 1) // sequence_length for f in files]
        for file, count in zip(files, self.num_windows, strict=True):
            if count < 1:
                raise UsageError(
                    f"{file.path} has {file.num_tokens} tokens, less than a sequence of {sequence_length} and its "
                    "last target; use a shorter sequence length or more text"
                )
            if file.tokenizer != files[0].tokenizer:
                raise UsageError(
                    f"{file.path} and {files[0].path} come from different tokenizers; prepare them with one"
                )
        shares = np.asarray(
            [f.num_tokens for f in files] if weights is None else weights, np.float64
        )
        if len(shares) != len(files) or not np.all(shares > 0) or not np.all(np.isfinite(shares)):
            raise UsageError(f"data weights {list(shares)} must be one positive number a source")
        self._cumulative = np.cumsum(shares / shares.sum())
        self._orders: dict[tuple[int, int], np.ndarray] = {}
        self._seek(0)

    @property
    def num_sequences(self) -> int:
        """Windows of all sources together: an epoch."""
        return sum(self.num_windows)

    def batch(self, step: int, batch_size: int, *, rank: int = 0, num_ranks: int = 1) -> TokenBatch:
        """The windows of `rank` in the global batch of `batch_size` windows of `step`."""
        assert batch_size % num_ranks == 0
        share = batch_size // num_ranks
        windows = self._windows(step * batch_size, batch_size)[rank * share : (rank + 1) * share]
        L = self.sequence_length
        token_ids, targets = np.empty((share, L), np.int64), np.empty((share, L), np.int64)
        starts = np.empty((share, L), np.int32)
        for row, (source, window) in enumerate(windows):
            self._fill(source, window, token_ids[row], targets[row], starts[row])
        return TokenBatch(token_ids, targets, starts)

    def _fill(
        self,
        source: int,
        window: int,
        token_ids: np.ndarray,
        targets: np.ndarray,
        starts: np.ndarray,
    ) -> None:
        file, L = self.files[source], self.sequence_length
        begin = window * L
        piece = file.tokens[begin : begin + L + 1]
        token_ids[:], targets[:] = piece[:-1], piece[1:]
        ends = file.document_ends
        first, last = np.searchsorted(ends, [begin, begin + L], side="right")
        inside = ends[first:last].astype(np.int64) - begin  # where documents begin, but the first
        starts[:] = 0
        for column in inside[inside < L]:
            starts[column:] = column
        targets[inside - 1] = IGNORE

    def _windows(self, begin: int, count: int) -> list[tuple[int, int]]:
        """(source, window) of the numbers begin ... begin + count - 1 of the run."""
        if begin != self._position:
            self._seek(begin)
        result = []
        for source in self._draw_sources(count):
            result.append((source, self._window(source, self._drawn[source])))
            self._drawn[source] += 1
        self._position += count
        return result

    def _seek(self, position: int) -> None:
        """Count how often each source was drawn before `position`."""
        self._generator = np.random.Generator(np.random.Philox(key=[self.seed, 2**63]))
        self._position = 0
        self._drawn = [0] * len(self.files)
        while self._position < position:
            count = min(position - self._position, 2**20)
            drawn = np.bincount(self._draw_sources(count), minlength=len(self.files))
            self._drawn = [a + int(b) for a, b in zip(self._drawn, drawn, strict=True)]
            self._position += count

    def _draw_sources(self, count: int) -> np.ndarray:
        if len(self.files) == 1:
            return np.zeros(count, np.int64)
        u = self._generator.random(count)
        return np.minimum(np.searchsorted(self._cumulative, u, side="right"), len(self.files) - 1)

    def _window(self, source: int, drawn: int) -> int:
        epoch, index = divmod(drawn, self.num_windows[source])
        if not self.shuffle:
            return index
        if (source, epoch) not in self._orders:
            self._orders = {k: v for k, v in self._orders.items() if k[0] != source}
            key = np.random.Philox(key=[self.seed, (source << 32) | epoch])
            order = np.random.Generator(key).permutation(self.num_windows[source])
            self._orders[source, epoch] = order
        return int(self._orders[source, epoch][index])
