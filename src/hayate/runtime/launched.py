"""A step after its launch: what it will give, and how that comes to the host."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from hayate.runtime.scheduler import Step
from hayate.runtime.sequence import Sequence


@dataclass(frozen=True)
class Launched:
    """Outputs of a step: one for each sequence that samples, `drafts + 1` for one that verifies.

    Either `logits` (>= R, V) or `tokens` (>= R,) is there; output i is row `index[i]` of it.
    """

    sequences: tuple[Sequence, ...]  # those that sample, in the order of their outputs
    num_outputs: tuple[int, ...]  # of each of them
    index: Seq[int]
    logits: torch.Tensor | None = None
    tokens: torch.Tensor | None = None  # int64, -1 where the logits were not finite
    first_run: bool = False  # something was captured or recorded: the time taken says nothing

    @classmethod
    def of(
        cls,
        step: Step,
        *,
        index: Seq[int] | None = None,
        logits: torch.Tensor | None = None,
        tokens: torch.Tensor | None = None,
        first_run: bool = False,
    ) -> Launched:
        """What `step` gives. index: by default the outputs are the first rows, in order."""
        sequences, outputs = step.sequences, tuple(n + 1 for n in step.num_drafts)
        if not all(step.samples):
            chosen = [i for i, samples in enumerate(step.samples) if samples]
            sequences = tuple(sequences[i] for i in chosen)
            outputs = tuple(outputs[i] for i in chosen)
        if index is None:
            index = range(sum(outputs))
        return cls(sequences, outputs, index, logits, tokens, first_run)


class Download:
    """Tensors on their way to the host: copied once what was launched before is done."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        self._ready: torch.cuda.Event | None = None
        self._host = tensors
        if tensors and tensors[0].is_cuda:
            self._host = tuple(
                torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors
            )
            for host, tensor in zip(self._host, tensors, strict=True):
                host.copy_(tensor, non_blocking=True)
            self._ready = torch.cuda.Event()
            self._ready.record()

    def wait(self) -> list[list]:
        """The tensors as lists; waits until they are there."""
        if self._ready is not None:
            self._ready.synchronize()
        return [t.tolist() for t in self._host]
