"""Decoding on the CPU: the native calls of one step, recorded for each batch size and run again.

What CUDA graphs are to a GPU: between two hundred short calls a step, Python costs as much as a sixth of reading
the weights. The batch lives in static tensors that are written in place before each replay.

The native linear layers take a few tokens at a time. Where the processor has no matrix instructions for bfloat16
they are several times faster than PyTorch's products even so: there a larger step is replayed in parts.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from hayate.config import EnginePlan
from hayate.kernels import cpu
from hayate.models.batch import Batch
from hayate.models.decoder import CausalLM
from hayate.models.rope_table import RopeTable
from hayate.runtime.kv_cache import KVCache
from hayate.runtime.launched import Launched
from hayate.runtime.scheduler import Step
from hayate.runtime.sequence import Sequence
from hayate.runtime.sequence_rows import SequenceRows
from hayate.runtime.step_inputs import next_tokens

MAX_TOKENS = 8  # of one replay; beyond, the linear layers are matrix products of PyTorch
MAX_PARTS = 8


@dataclass(frozen=True)
class _Recorded:
    batch: Batch
    recording: cpu.Recording
    logits: torch.Tensor  # (tokens, V), written by each replay


class Recordings:
    """Small decode and verify steps by replay, where every operation has a native form."""

    def __init__(
        self,
        model: CausalLM,
        plan: EnginePlan,
        kv: KVCache,
        rope: RopeTable,
        rows: SequenceRows,
    ) -> None:
        self.model, self.plan, self.kv, self.rope, self.rows = model, plan, kv, rope, rows
        # By sequences and queries of each; None: such a step cannot be replayed.
        self._recorded: dict[tuple[int, int], _Recorded | None] = {}
        self._max_parts = MAX_PARTS
        if plan.dtype != "bfloat16" or multiplies_bfloat16():
            self._max_parts = 1

    def forward(self, step: Step) -> Launched | None:
        """Run a step; its logits are valid until the next call. None, and nothing done, if it cannot be replayed."""
        queries, count = step.num_tokens[0], len(step.sequences)
        sizes = self._parts(count, queries)
        if not (
            sizes
            and all(step.samples)
            and step.num_tokens.count(queries) == count
            and step.num_drafts.count(queries - 1) == count
        ):
            return None
        if len(sizes) == 1:
            logits, first_run = self._run(step.sequences, queries)
            return Launched.of(step, logits=logits, first_run=first_run)
        parts, begin, first_run = [], 0, False
        for size in sizes:
            logits, recorded = self._run(step.sequences[begin : begin + size], queries)
            parts.append(logits.clone())
            begin, first_run = begin + size, first_run or recorded
        return Launched.of(step, logits=torch.cat(parts), first_run=first_run)

    def _parts(self, count: int, queries: int) -> list[int]:
        """Sequences in each replay, as equal as can be; empty if the step is not for replay."""
        most = MAX_TOKENS // queries
        while most and self._recorded.get((most, queries), self) is None:
            most //= 2  # of wide layers only fewer tokens have a native form
        num_parts = -(-count // most) if most else 0
        if num_parts > self._max_parts:
            return []
        sizes = [(count + i) // num_parts for i in range(num_parts)]
        known = self._recorded
        return [] if any(known.get((n, queries), self) is None for n in sizes) else sizes

    def _run(self, sequences: Seq[Sequence], queries: int) -> tuple[torch.Tensor, bool]:
        """Logits of the next tokens of `sequences`, and whether that was recorded only now."""
        key = len(sequences), queries
        known = self._recorded.get(key)
        if known is not None:
            self._write(known.batch, sequences, queries)
            known.recording.replay()
            return known.logits, False
        batch = self._static_batch(*key)
        self._write(batch, sequences, queries)
        with cpu.Recording() as recording:
            logits = self.model(batch)
        usable = recording.reason is None
        self._recorded[key] = _Recorded(batch, recording, logits) if usable else None
        return logits, True

    def _static_batch(self, size: int, queries: int) -> Batch:
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(*shape, dtype=dtype)

        return Batch(
            token_ids=zeros(size * queries),
            rope_rows=zeros(size * queries),
            cos_sin=self.rope.cos_sin,
            slots=zeros(size * queries),
            cu_seqlens_q=torch.arange(size + 1, dtype=torch.int32) * queries,
            seq_lens=zeros(size, dtype=torch.int32),
            page_table=zeros(size, self.rows.pages.shape[1], dtype=torch.int32),
            max_seqlen_q=queries,
            max_seqlen_k=self.plan.max_model_len,
            k_caches=self.kv.k,
            v_caches=self.kv.v,
        )

    def _write(self, batch: Batch, sequences: Seq[Sequence], queries: int) -> None:
        places, B = np.array(self.rows.place(sequences)), self.plan.page_size
        begins = np.array([s.num_computed for s in sequences])
        positions = (begins[:, None] + np.arange(queries)).reshape(-1)
        pages = self.rows.pages[np.repeat(places, queries), positions // B]
        batch.token_ids.numpy()[:] = [
            token
            for s in sequences
            for token in next_tokens(s, s.num_computed, s.num_computed + queries)
        ]
        batch.rope_rows.numpy()[:] = positions
        batch.slots.numpy()[:] = pages.astype(np.int64) * B + positions % B
        batch.seq_lens.numpy()[:] = begins + queries
        batch.page_table.numpy()[:] = self.rows.pages[places]


def multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for products of bfloat16 numbers; True where that is not known."""
    try:
        words = set(Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0].split())
    except OSError:
        return True
    return not words.isdisjoint(("avx512_bf16", "amx_bf16", "bf16"))
