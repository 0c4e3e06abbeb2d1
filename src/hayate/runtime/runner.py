"""Runner: a scheduled step -> tensors -> the model -> logits."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch

from hayate.config import EnginePlan
from hayate.models.batch import Batch
from hayate.models.decoder import CausalLM
from hayate.models.rope_table import RopeTable
from hayate.runtime.kv_cache import KVCache
from hayate.runtime.recordings import DecodeRecordings
from hayate.runtime.scheduler import Step
from hayate.runtime.sequence import Sequence


class Runner:
    """Owns the model, the KV cache and the RoPE table on one device."""

    def __init__(self, model: CausalLM, plan: EnginePlan) -> None:
        self.model = model
        self.plan = plan
        self.device = torch.device(plan.device)
        config = model.config
        self.kv = KVCache(
            config,
            num_pages=plan.num_pages,
            page_size=plan.page_size,
            device=self.device,
            dtype=getattr(torch, plan.dtype),
        )
        self.rope = RopeTable(config.rope, plan.max_model_len, device=self.device)
        self.recordings = DecodeRecordings(self) if self.device.type == "cpu" else None

    @torch.inference_mode()
    def forward(self, step: Step) -> torch.Tensor:
        """Logits (S, V) after the last token of each sequence of `step`; advances `num_computed`."""
        if step.kind == "decode" and self.recordings is not None:
            logits = self.recordings.forward(step.sequences)
        else:
            logits = self.model(self.build_batch(step.sequences, step.num_tokens))
        for sequence, count in zip(step.sequences, step.num_tokens, strict=True):
            sequence.num_computed += count
        return logits

    @torch.inference_mode()
    def all_logits(self, sequence: Sequence) -> torch.Tensor:
        """Logits (T, V) after every token of `sequence`, whose pages are allocated."""
        batch = self.build_batch((sequence,), (sequence.num_uncomputed,))
        batch.output_rows = None
        sequence.num_computed = sequence.num_tokens
        return self.model(batch)

    def build_batch(self, sequences: Seq[Sequence], counts: Seq[int]) -> Batch:
        """Pack the next `counts[i]` tokens of each sequence."""
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        cu_seqlens, seq_lens, spans = [0], [], []
        B = self.plan.page_size
        for sequence, count in zip(sequences, counts, strict=True):
            begin, end = sequence.num_computed, sequence.num_computed + count
            token_ids += sequence.tokens(begin, end)
            positions += range(begin, end)
            pages = sequence.page_ids
            slots += [pages[p // B] * B + p % B for p in range(begin, end)]
            cu_seqlens.append(cu_seqlens[-1] + count)
            seq_lens.append(end)
            spans.append((begin, end))
        table = [s.page_ids for s in sequences]
        width = max(map(len, table))
        cos_sin, rope_rows = self.rope.rows(positions, spans)
        return Batch(
            token_ids=self._tensor(token_ids, torch.int64),
            rope_rows=self._tensor(rope_rows, torch.int64),
            cos_sin=cos_sin,
            slots=self._tensor(slots, torch.int64),
            cu_seqlens_q=self._tensor(cu_seqlens, torch.int32),
            seq_lens=self._tensor(seq_lens, torch.int32),
            page_table=self._tensor([p + [0] * (width - len(p)) for p in table], torch.int32),
            max_seqlen_q=max(counts),
            max_seqlen_k=max(seq_lens),
            k_caches=self.kv.k,
            v_caches=self.kv.v,
            output_rows=self._output_rows(cu_seqlens),
        )

    def _output_rows(self, cu_seqlens: list[int]) -> torch.Tensor | None:
        """The last row of each sequence; None when that is every row."""
        if cu_seqlens[-1] == len(cu_seqlens) - 1:
            return None
        return self._tensor([end - 1 for end in cu_seqlens[1:]], torch.int64)

    def _tensor(self, values: list, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype).to(self.device, non_blocking=True)
