"""Runner: a scheduled step -> tensors -> the model -> logits, or tokens where the device can choose them alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as Seq

import numpy as np
import torch

from hayate.config import EnginePlan
from hayate.kernels import batch_invariant
from hayate.models.batch import Batch
from hayate.models.decoder import CausalLM
from hayate.models.rope_table import RopeTable
from hayate.runtime.graphs import Graphs
from hayate.runtime.kv_cache import KVCache
from hayate.runtime.launched import Launched
from hayate.runtime.recordings import Recordings
from hayate.runtime.scheduler import Step
from hayate.runtime.sequence import Sequence
from hayate.runtime.sequence_rows import SequenceRows, draw
from hayate.runtime.step_inputs import build_batch
from hayate.runtime.upload import upload


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
        self.rows = SequenceRows(plan, self.device)
        self.graphs = self.recordings = None
        if self.device.type == "cuda":
            self.graphs = Graphs(model, plan, self.kv, self.rope, self.rows)
        elif plan.tensor_parallel == 1:  # a recording cannot hold sums over processes
            self.recordings = Recordings(model, plan, self.kv, self.rope, self.rows)

    @torch.inference_mode()
    def launch(self, step: Step, *, on_device: bool) -> Launched:
        """Start `step` and advance `num_computed` and `num_in_flight`; a GPU is not waited for.

        on_device: every sequence that samples may do so on a GPU, by its temperature, top-k, top-p and min-p alone.
        """
        with batch_invariant(self.plan.batch_invariant):
            launched = self._launch(step, on_device=on_device and self.graphs is not None)
        for sequence, count, samples in zip(
            step.sequences, step.num_tokens, step.samples, strict=True
        ):
            sequence.num_computed += count
            sequence.num_in_flight += samples
        return launched

    def _launch(self, step: Step, *, on_device: bool) -> Launched:
        if self.graphs is not None:
            if step.is_decode:
                return self.graphs.decode(step, on_device=on_device)
            if self.graphs.can_verify(step):
                return self.graphs.verify(step, on_device=on_device)
            self.graphs.forget_state()
        elif self.recordings is not None and (launched := self.recordings.forward(step)):
            return launched
        outputs = [
            drafts + 1 if samples else 0
            for drafts, samples in zip(step.num_drafts, step.samples, strict=True)
        ]
        batch = self._batch(step.sequences, step.num_tokens, outputs, step.num_decode)
        launched = Launched.of(step, logits=self.model(batch))
        return self._drawn(launched) if on_device and launched.sequences else launched

    def _drawn(self, launched: Launched) -> Launched:
        """The tokens of all rows of logits, chosen on the device."""
        assert launched.logits is not None
        rows, counts = self.rows, np.array(launched.num_outputs)
        places = rows.place(launched.sequences)
        firsts = np.array([len(s.output_ids) + s.num_in_flight for s in launched.sequences])
        starts = np.cumsum(counts) - counts
        steps = np.arange(counts.sum()) + np.repeat(firsts - starts, counts)
        index, steps_there = upload([np.repeat(np.array(places), counts), steps], self.device)
        tokens = draw(
            launched.logits,
            rows.choice(places),
            rows.options.index_select(1, index),
            rows.seeds.index_select(0, index),
            steps_there,
        )
        if len(tokens) == len(places):
            rows.tokens.index_copy_(0, index, tokens)
        return dataclasses.replace(launched, logits=None, tokens=tokens)

    @torch.inference_mode()
    def keep_tokens(self, sequences: Seq[Sequence], tokens: torch.Tensor) -> None:
        """Note the tokens (S,) just sampled by the host's sampler: the next step may need them before the host."""
        if self.graphs is not None and sequences:
            (index,) = upload([np.array(self.rows.place(sequences))], self.device)
            self.rows.tokens.index_copy_(0, index, tokens)

    def verifies_faster_padded(self, num_sequences: int, queries: int) -> bool:
        """Whether verify steps of this shape are replayed, if every sequence has exactly so many queries."""
        return self.graphs is not None and self.graphs.verifies(num_sequences, queries)

    def release(self, sequence: Sequence) -> None:
        """Forget a sequence that has ended."""
        self.rows.release(sequence)

    def reset(self) -> None:
        """After a failed step: nothing on the device is trusted but the weights."""
        self.rows.clear()
        if self.graphs is not None:
            self.graphs.forget_state()

    @torch.inference_mode()
    def all_logits(self, sequence: Sequence) -> torch.Tensor:
        """Logits (T, V) after every token of `sequence`, whose pages are allocated."""
        count = sequence.num_uncomputed
        rows = SequenceRows(dataclasses.replace(self.plan, max_num_seqs=1), self.device)
        batch = self._batch((sequence,), (count,), (count,), 0, rows)
        sequence.num_computed = sequence.num_tokens
        with batch_invariant(self.plan.batch_invariant):
            return self.model(batch)

    def _batch(
        self,
        sequences: Seq[Sequence],
        counts: Seq[int],
        outputs: Seq[int],
        num_decode: int,
        rows: SequenceRows | None = None,
    ) -> Batch:
        return build_batch(
            sequences,
            counts,
            outputs,
            num_decode=num_decode,
            rows=rows or self.rows,
            rope=self.rope,
            kv=self.kv,
        )
