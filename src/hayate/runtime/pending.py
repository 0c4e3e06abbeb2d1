"""Tokens of a launched step on their way to the host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from hayate.runtime.launched import Download, Launched
from hayate.runtime.outputs import PositionLogprobs, TokenLogprob
from hayate.runtime.sampler import Sampler
from hayate.runtime.sampling_row import SamplingRow
from hayate.runtime.scheduler import Step
from hayate.runtime.sequence import Sequence
from hayate.runtime.upload import upload


@dataclass(frozen=True)
class Pending:
    """What a step gives, output by output, `num_outputs[i]` of them for `sequences[i]`."""

    step: Step
    launched: Launched
    sequences: tuple[Sequence, ...]
    num_outputs: tuple[int, ...]
    download: Download
    num_logprobs: tuple[int | None, ...] = ()  # of each output; empty when none asks

    def wait(self) -> tuple[list[int], list[PositionLogprobs | None]]:
        """Token, -1 where the logits were not finite, and log-probabilities of each output; waits for the device."""
        tokens, *logprobs = self.download.wait()
        if self.launched.tokens is not None and self.launched.index != range(len(tokens)):
            tokens = [tokens[row] for row in self.launched.index]
        return tokens, list(self._logprobs(tokens, *logprobs)) if logprobs else [None] * len(tokens)

    def _logprobs(
        self, tokens: list[int], taken: list, top_ids: list, top: list
    ) -> list[PositionLogprobs | None]:
        return [
            None
            if count is None
            else PositionLogprobs(
                TokenLogprob(token, logprob),
                tuple(map(TokenLogprob, ids[:count], best[:count])),
            )
            for count, token, logprob, ids, best in zip(
                self.num_logprobs, tokens, taken, top_ids, top, strict=True
            )
        ]


def pending_tokens(step: Step, launched: Launched) -> Pending:
    """The tokens that the device has chosen by itself."""
    assert launched.tokens is not None
    return Pending(
        step, launched, launched.sequences, launched.num_outputs, Download(launched.tokens)
    )


@torch.inference_mode()
def sample_pending(
    step: Step, launched: Launched, sampler: Sampler, row_of: Callable[[Sequence], SamplingRow]
) -> tuple[Pending, torch.Tensor]:
    """Let the host's sampler choose from the logits of `launched`; sequences that have ended meanwhile are left out.

    Also gives the tokens (outputs,) on the device. Does not wait for a GPU.
    """
    assert launched.logits is not None
    sequences, counts = launched.sequences, launched.num_outputs
    index = np.array(launched.index, np.int64)
    if any(s.status == "finished" for s in sequences):
        alive = [s.status != "finished" for s in sequences]
        index = index[np.repeat(alive, counts)]
        sequences = tuple(s for s, keep in zip(sequences, alive, strict=True) if keep)
        counts = tuple(n for n, keep in zip(counts, alive, strict=True) if keep)
    if not sequences:
        empty = torch.zeros(0, dtype=torch.int64)
        return Pending(step, launched, (), (), Download(empty)), empty
    logits = launched.logits
    if len(index) != len(logits) or (index != np.arange(len(index))).any():
        logits = logits.index_select(0, upload([index], logits.device)[0])
    rows = list(map(row_of, sequences))
    drafts = None
    if any(n > 1 for n in counts):
        drafts = [s.draft_ids[: n - 1] for s, n in zip(sequences, counts, strict=True)]
    sampled = sampler.sample(logits, rows, drafts)
    tokens = torch.where(sampled.finite > 0, sampled.tokens, -1)
    wanted = tuple(
        s.params.logprobs for s, n in zip(sequences, counts, strict=True) for _ in range(n)
    )
    asked = [n for n in wanted if n is not None]
    if not asked:
        return Pending(step, launched, sequences, counts, Download(tokens)), tokens
    found = sampler.logprobs(logits, sampled.tokens, max(asked))
    download = Download(tokens, found.token, found.top_ids, found.top)
    return Pending(step, launched, sequences, counts, download, wanted), tokens
