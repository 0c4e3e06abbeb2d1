"""Decode and verify steps on a GPU: one CUDA graph for each size, from the embedding to the token or the logits.

The state of the batch (last token, position, page table, sampling options) lies on the device, in `SequenceRows`,
and a decode graph advances it itself. So a step of an unchanged set of sequences is one graph launch; the host never
waits inside it, and reads the tokens of step n while step n + 1 runs. When the set changes the host writes the
positions anew; the last tokens are there already, also those that it does not know yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from hayate.config import EnginePlan
from hayate.kernels import sampling
from hayate.models.batch import Batch
from hayate.models.decoder import CausalLM
from hayate.models.rope_table import RopeTable
from hayate.runtime.kv_cache import KVCache
from hayate.runtime.launched import Launched
from hayate.runtime.scheduler import Step
from hayate.runtime.sequence_rows import NOT_IN_USE, Choice, SequenceRows, draw
from hayate.runtime.step_inputs import next_tokens
from hayate.runtime.upload import upload

BATCH_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
MAX_VERIFY_TOKENS = 64  # beyond, a launch by hand costs little beside the step itself

Flavour = Choice | Literal["logits"]


@dataclass(frozen=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    output: torch.Tensor  # (rows, V) logits or (rows,) tokens, written by each replay
    starts: torch.Tensor  # cu_seqlens_q, which each replay reads


class Graphs:
    """Steps by graph replay, captured when first needed."""

    def __init__(
        self,
        model: CausalLM,
        plan: EnginePlan,
        kv: KVCache,
        rope: RopeTable,
        rows: SequenceRows,
    ) -> None:
        self.model, self.plan, self.kv, self.rope, self.rows = model, plan, kv, rope, rows
        device, S = rows.device, plan.max_num_seqs
        self.sizes = [s for s in BATCH_SIZES if s < S] + [S]
        inputs = torch.zeros(3, rows.tokens.numel(), dtype=torch.int64, device=device)
        self.token_ids, self.rope_rows, self.slots = inputs
        self.seq_lens = torch.zeros(S, dtype=torch.int32, device=device)
        # Of a verify step: token ids, RoPE rows, slots, steps and rows of its queries; lengths, rows of its sequences.
        self.verify_inputs = torch.zeros(7, MAX_VERIFY_TOKENS, dtype=torch.int64, device=device)
        self._graphs: dict[tuple[int, int, Flavour], _Graph] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._step: Step | None = None  # the decode step whose next one the device's state is
        self._places: list[int] = []
        self._size = 0
        self._choice: Choice = "greedy"

    def forget_state(self) -> None:
        """The next decode step writes all positions anew: another step ran between, or one failed."""
        self._step = None

    def clear(self) -> None:
        """Drop all graphs, and with them what they hold."""
        self.forget_state()
        self._graphs.clear()

    # -- decode steps -----------------------------------------------------------------------------

    def decode(self, step: Step, *, on_device: bool) -> Launched:
        """Launch a decode step; on_device: with the sampling."""
        unchanged = step is self._step
        if unchanged:
            self.rows.add_pages(self._places, step.sequences)
        else:
            self._place(step)
        flavour: Flavour = self._choice if on_device else "logits"
        graph, captured = self._graph(self._size, 1, flavour)
        if captured or not unchanged:
            self._write_state(step)
        self._step = None  # until the replay has been launched
        graph.graph.replay()
        self._step = step
        return Launched(
            step.sequences,
            step.num_tokens,
            self._places,
            logits=None if on_device else graph.output,
            tokens=graph.output if on_device else None,
            first_run=captured,
        )

    def _place(self, step: Step) -> None:
        """Find rows for the sequences, such that a graph not larger than needed holds them."""
        places = self.rows.place(step.sequences)
        wanted = self._bucket(len(places))
        if max(places) >= wanted:
            places = self.rows.move_below(wanted, step.sequences)
        self._places, self._size = places, self._bucket(max(places) + 1)
        self._choice = self.rows.choice(places)

    def _bucket(self, count: int) -> int:
        return next(s for s in self.sizes if s >= count)

    def _write_state(self, step: Step) -> None:
        """Positions and steps of all rows as after the step before; last tokens, where the host knows them."""
        size, rows = self._size, self.rows
        state = np.zeros((3, size), np.int64)
        state[0], state[2] = NOT_IN_USE, -1
        places = np.array(self._places)
        state[0, places] = [s.num_computed - 1 for s in step.sequences]
        state[1, places] = [len(s.output_ids) + s.num_in_flight - 1 for s in step.sequences]
        state[2, places] = [
            -1 if s.num_in_flight else (s.output_ids or s.prompt_ids)[-1] for s in step.sequences
        ]
        ((positions, steps, known),) = upload([state], rows.device)
        rows.positions[:size].copy_(positions)
        rows.steps[:size].copy_(steps)
        rows.tokens[:size].copy_(torch.where(known >= 0, known, rows.tokens[:size]))

    def _decode_body(self, size: int, flavour: Flavour, starts: torch.Tensor) -> torch.Tensor:
        """The state advanced by one, embedding to logits, and the token unless the flavour is "logits"."""
        rows = self.rows
        sampling.advance_decode(
            rows.tokens[:size],
            rows.positions[:size],
            rows.steps[:size],
            rows.page_table[:size],
            self.token_ids[:size],
            self.rope_rows[:size],
            self.slots[:size],
            self.seq_lens[:size],
            page_size=self.plan.page_size,
        )
        logits = self.model(
            Batch(
                token_ids=self.token_ids[:size],
                rope_rows=self.rope_rows[:size],
                cos_sin=self.rope.cos_sin,
                slots=self.slots[:size],
                cu_seqlens_q=starts,
                seq_lens=self.seq_lens[:size],
                page_table=rows.page_table[:size],
                max_seqlen_q=1,
                max_seqlen_k=self.plan.max_model_len,
                k_caches=self.kv.k,
                v_caches=self.kv.v,
            )
        )
        if flavour == "logits":
            return logits
        tokens = draw(logits, flavour, rows.options[:, :size], rows.seeds[:size], rows.steps[:size])
        return rows.tokens[:size].copy_(tokens)

    # -- verify steps -----------------------------------------------------------------------------

    def can_verify(self, step: Step) -> bool:
        """Every sequence has the same number of drafts, and the step is small."""
        queries = step.num_tokens[0]
        if not self.verifies(len(step.sequences), queries):
            return False
        return (
            step.num_drafts[0] == queries - 1 > 0
            and all(step.samples)
            and step.num_tokens.count(queries) == len(step.num_tokens)
            and step.num_drafts.count(queries - 1) == len(step.num_drafts)
        )

    def verifies(self, num_sequences: int, queries: int) -> bool:
        """Whether there are graphs for so many sequences with so many queries each: a few sizes."""
        return (
            queries in (2, 4, 8, 16, self.plan.num_draft_tokens + 1)
            and self._bucket(num_sequences) * queries <= MAX_VERIFY_TOKENS
        )

    def verify(self, step: Step, *, on_device: bool) -> Launched:
        """Launch a step for which `can_verify`; on_device: with the sampling, all queries' tokens."""
        queries, count = step.num_tokens[0], len(step.sequences)
        size = self._bucket(count)
        places = self.rows.place(step.sequences)
        flavour: Flavour = self.rows.choice(places) if on_device else "logits"
        self.forget_state()
        graph, captured = self._graph(size, queries, flavour)
        inputs = np.zeros((7, MAX_VERIFY_TOKENS), np.int64)
        inputs[2] = -1
        sequence_of = np.repeat(np.arange(count), queries)
        begins = np.array([s.num_computed for s in step.sequences])
        after = np.tile(np.arange(queries), count)
        rows_of, used = np.array(places), slice(0, queries * count)
        positions, B = begins[sequence_of] + after, self.plan.page_size
        inputs[0, used] = [
            token
            for s in step.sequences
            for token in next_tokens(s, s.num_computed, s.num_computed + queries)
        ]
        inputs[1, used] = positions
        pages = self.rows.pages[rows_of[sequence_of], positions // B].astype(np.int64)
        inputs[2, used] = pages * B + positions % B
        inputs[3, used] = np.array([len(s.output_ids) for s in step.sequences])[sequence_of] + after
        inputs[4, used] = rows_of[sequence_of]
        inputs[5, :count] = begins + queries
        inputs[6, :count] = rows_of
        self.verify_inputs.copy_(upload([inputs], self.rows.device)[0])
        graph.graph.replay()
        return Launched(
            step.sequences,
            step.num_tokens,
            range(queries * count),
            logits=None if on_device else graph.output,
            tokens=graph.output if on_device else None,
            first_run=captured,
        )

    def _verify_body(
        self, size: int, queries: int, flavour: Flavour, starts: torch.Tensor
    ) -> torch.Tensor:
        rows, num_tokens = self.rows, size * queries
        token_ids, rope_rows, slots, steps, query_rows, _, _ = self.verify_inputs[:, :num_tokens]
        seq_lens, places = self.verify_inputs[5:, :size]
        logits = self.model(
            Batch(
                token_ids=token_ids,
                rope_rows=rope_rows,
                cos_sin=self.rope.cos_sin,
                slots=slots,
                cu_seqlens_q=starts,
                seq_lens=seq_lens.to(torch.int32),
                page_table=rows.page_table.index_select(0, places),
                max_seqlen_q=queries,
                max_seqlen_k=self.plan.max_model_len,
                k_caches=self.kv.k,
                v_caches=self.kv.v,
            )
        )
        if flavour == "logits":
            return logits
        options = rows.options.index_select(1, query_rows)
        return draw(logits, flavour, options, rows.seeds.index_select(0, query_rows), steps)

    # -- capture ----------------------------------------------------------------------------------

    def _graph(self, size: int, queries: int, flavour: Flavour) -> tuple[_Graph, bool]:
        key = (size, queries, flavour)
        captured = key not in self._graphs
        if captured:
            self._graphs[key] = self._capture(*key)
        return self._graphs[key], captured

    def _capture(self, size: int, queries: int, flavour: Flavour) -> _Graph:
        """Run the step once, over rows that are not in use, and capture it. Positions are lost; tokens are kept."""
        rows = self.rows
        starts = torch.arange(size + 1, dtype=torch.int32, device=rows.device) * queries
        tokens = rows.tokens.clone()
        rows.positions.fill_(NOT_IN_USE)
        self.verify_inputs.zero_()
        self.verify_inputs[2] = -1

        def body() -> torch.Tensor:
            if queries == 1:
                return self._decode_body(size, flavour, starts)
            return self._verify_body(size, queries, flavour, starts)

        stream = torch.cuda.Stream(rows.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            body()  # compiles kernels and sets up cuBLAS
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on using the GPU meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = body()
        rows.tokens.copy_(tokens)
        return _Graph(graph, output, starts)
