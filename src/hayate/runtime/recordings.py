"""Decoding on the CPU: the native calls of one step, recorded for each batch size and run again.

What CUDA graphs are to a GPU: between two hundred short calls a step, Python costs as much as a sixth of reading
the weights. The batch lives in static tensors that are written in place before each replay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hayate.kernels import cpu
from hayate.models.batch import Batch
from hayate.runtime.sequence import Sequence

if TYPE_CHECKING:
    from hayate.runtime.runner import Runner

MAX_BATCH_SIZE = 8  # beyond, the linear layers are matrix products of PyTorch


@dataclass
class _Recorded:
    batch: Batch
    recording: cpu.Recording
    logits: torch.Tensor  # (S, V), written by each replay


class DecodeRecordings:
    """Decode steps of up to 8 sequences by replay where every operation has a native form, else as usual."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self._recorded: dict[int, _Recorded | None] = {}  # None: this size cannot be replayed

    def forward(self, sequences: tuple[Sequence, ...]) -> torch.Tensor:
        """Logits (S, V) after one more token of each sequence; valid until the next call."""
        size, runner = len(sequences), self.runner
        known = self._recorded.get(size)
        if known is not None:
            self._write(known.batch, sequences)
            known.recording.replay()
            return known.logits
        if size > MAX_BATCH_SIZE or size in self._recorded:
            return runner.model(runner.build_batch(sequences, (1,) * size))
        batch = self._static_batch(size)
        self._write(batch, sequences)
        with cpu.Recording() as recording:
            logits = runner.model(batch)
        usable = recording.reason is None
        self._recorded[size] = _Recorded(batch, recording, logits) if usable else None
        return logits

    def _static_batch(self, size: int) -> Batch:
        plan, kv = self.runner.plan, self.runner.kv
        width = -(-plan.max_model_len // plan.page_size)
        return Batch(
            token_ids=torch.zeros(size, dtype=torch.int64),
            rope_rows=torch.zeros(size, dtype=torch.int64),
            cos_sin=self.runner.rope.cos_sin,
            slots=torch.zeros(size, dtype=torch.int64),
            cu_seqlens_q=torch.arange(size + 1, dtype=torch.int32),
            seq_lens=torch.zeros(size, dtype=torch.int32),
            page_table=torch.zeros(size, width, dtype=torch.int32),
            max_seqlen_q=1,
            max_seqlen_k=plan.max_model_len,
            k_caches=kv.k,
            v_caches=kv.v,
        )

    def _write(self, batch: Batch, sequences: tuple[Sequence, ...]) -> None:
        B = self.runner.plan.page_size
        positions = [s.num_computed for s in sequences]
        pages = [s.page_ids for s in sequences]
        tokens = [s.tokens(p, p + 1)[0] for s, p in zip(sequences, positions, strict=True)]
        slots = [t[p // B] * B + p % B for t, p in zip(pages, positions, strict=True)]
        batch.token_ids.copy_(torch.tensor(tokens))
        batch.rope_rows.copy_(torch.tensor(positions))
        batch.slots.copy_(torch.tensor(slots))
        batch.seq_lens.copy_(torch.tensor([p + 1 for p in positions]))
        for row, ids in enumerate(pages):
            batch.page_table[row, : len(ids)] = torch.tensor(ids)
