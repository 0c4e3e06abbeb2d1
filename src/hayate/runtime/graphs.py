"""Decoding on a GPU: one CUDA graph a batch size, from the embedding to the sampled token.

The state of the batch (last token, position, length, page table, sampling options) lives in static buffers on
the device, and the graph itself advances it. So a step is one graph launch; the host never waits inside it, and
reads the tokens of step n while step n + 1 runs. The buffers are written by the host only when the set of
sequences changes or a sequence gets a page.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from hayate.kernels import sampling
from hayate.models.batch import Batch
from hayate.runtime.runner import Runner
from hayate.runtime.sequence import Sequence

BATCH_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)


# How tokens are chosen: the largest logit; a draw from all; a draw after top-k and top-p.
Choice = Literal["greedy", "draw", "filtered draw"]


@dataclass
class PendingTokens:
    """Tokens on their way to the host: `sequences[i]` gets `wait()[i]`."""

    sequences: tuple[Sequence, ...]
    tokens: torch.Tensor  # (S,) int64, pinned; -1 where the logits were not finite
    ready: torch.cuda.Event

    def wait(self) -> list[int]:
        self.ready.synchronize()
        return self.tokens.tolist()


@dataclass
class _Graph:
    graph: torch.cuda.CUDAGraph
    tokens: torch.Tensor  # (size,) int64, the graph's output


class DecodeGraphs:
    """Decode steps of up to `max_num_seqs` sequences by graph replay; graphs are captured when first needed."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        plan, device = runner.plan, runner.device
        self.sizes = [s for s in BATCH_SIZES if s < plan.max_num_seqs] + [plan.max_num_seqs]
        S = plan.max_num_seqs
        # One column more: a row that has ended may advance past its last page before the host knows.
        width = -(-plan.max_model_len // plan.page_size) + 1

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.token_ids, self.positions, self.slots = zeros(S), zeros(S), zeros(S) - 1
        self.seeds, self.steps = zeros(S), zeros(S)
        self.seq_lens, self.top_k = zeros(S, dtype=torch.int32), zeros(S, dtype=torch.int32)
        self.page_table = zeros(S, width, dtype=torch.int32)
        self.temperature = zeros(S, dtype=torch.float32)
        self.top_p, self.min_p = self.temperature + 1, self.temperature.clone()
        self.cu_seqlens_q = torch.arange(S + 1, dtype=torch.int32, device=device)
        self._graphs: dict[tuple[int, Choice], _Graph] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._rows: tuple[Sequence, ...] = ()
        self._num_pages: list[int] = []
        self._choice: Choice = "greedy"
        self._host = [torch.empty(S, dtype=torch.int64, pin_memory=True) for _ in range(2)]
        self._turn = 0

    def continues(self, sequences: tuple[Sequence, ...]) -> bool:
        """True when the device's state is that of `sequences`, one step after the last."""
        return self._rows == sequences

    def reset(self) -> None:
        """Forget the device's state: the next step writes it anew."""
        self._rows = ()

    @torch.inference_mode()
    def step(self, sequences: tuple[Sequence, ...]) -> PendingTokens:
        """Launch one decode step and advance `num_computed` and `num_in_flight`; does not wait."""
        size = next(s for s in self.sizes if s >= len(sequences))
        if not self.continues(sequences):
            self._choice = _choice(sequences)
            graph = self._graph(size)
            self._write_rows(sequences, size)
        else:
            graph = self._graph(size)
            self._write_new_pages()
        graph.graph.replay()
        host = self._host[self._turn][: len(sequences)]
        self._turn ^= 1
        host.copy_(graph.tokens[: len(sequences)], non_blocking=True)
        ready = torch.cuda.Event()
        ready.record()
        for sequence in sequences:
            sequence.num_computed += 1
            sequence.num_in_flight += 1
        return PendingTokens(sequences, host, ready)

    def _write_rows(self, sequences: tuple[Sequence, ...], size: int) -> None:
        """Write the whole state for `sequences`, whose tokens are all known to the host."""
        B, pad = self.runner.plan.page_size, size - len(sequences)
        last = [s.num_tokens - 1 for s in sequences]
        assert all(s.num_computed == p for s, p in zip(sequences, last, strict=True))
        pages = [s.page_ids for s in sequences]
        width = max(map(len, pages))

        def write(buffer: torch.Tensor, values: list, fill: float = 0) -> None:
            buffer[:size].copy_(torch.tensor(values + [fill] * pad, dtype=buffer.dtype))

        write(self.token_ids, [s.tokens(p, p + 1)[0] for s, p in zip(sequences, last, strict=True)])
        write(self.positions, last)
        write(self.seq_lens, [p + 1 for p in last])
        write(
            self.slots,
            [t[p // B] * B + p % B for t, p in zip(pages, last, strict=True)],
            fill=-1,
        )
        table = torch.tensor([p + [0] * (width - len(p)) for p in pages], dtype=torch.int32)
        self.page_table[: len(sequences), :width].copy_(table)
        write(self.steps, [len(s.output_ids) for s in sequences])
        write(self.seeds, [s.seed for s in sequences])
        if self._choice != "greedy":
            params = [s.params for s in sequences]
            write(self.temperature, [p.temperature for p in params])
            write(self.top_k, [min(p.top_k or 0, 2**31 - 1) for p in params])
            write(self.top_p, [p.top_p for p in params], fill=1)
            write(self.min_p, [p.min_p for p in params])
        self._rows = sequences
        self._num_pages = [len(s.page_ids) for s in sequences]

    def _write_new_pages(self) -> None:
        for row, sequence in enumerate(self._rows):
            known, pages = self._num_pages[row], sequence.page_ids
            if len(pages) > known:
                new = torch.tensor(pages[known:], dtype=torch.int32)
                self.page_table[row, known : len(pages)].copy_(new)
                self._num_pages[row] = len(pages)

    def _graph(self, size: int) -> _Graph:
        key = (size, self._choice)
        if key not in self._graphs:
            self._graphs[key] = self._capture(*key)
        return self._graphs[key]

    def _capture(self, size: int, choice: Choice) -> _Graph:
        # Rows of length 0 take part in nothing: no page is written while warming up and capturing.
        self.reset()
        self.seq_lens[:size].zero_()
        self.slots[:size].fill_(-1)
        self.positions[:size].zero_()
        stream = torch.cuda.Stream(self.runner.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step_body(size, choice)  # compiles kernels and sets up cuBLAS
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            tokens = self._step_body(size, choice)
        return _Graph(graph, tokens)

    def _step_body(self, size: int, choice: Choice) -> torch.Tensor:
        """Embedding to token, then the state advanced by one."""
        runner = self.runner
        logits = runner.model(
            Batch(
                token_ids=self.token_ids[:size],
                rope_rows=self.positions[:size],
                cos_sin=runner.rope.cos_sin,
                slots=self.slots[:size],
                cu_seqlens_q=self.cu_seqlens_q[: size + 1],
                seq_lens=self.seq_lens[:size],
                page_table=self.page_table[:size],
                max_seqlen_q=1,
                max_seqlen_k=runner.plan.max_model_len,
                k_caches=runner.kv.k,
                v_caches=runner.kv.v,
            )
        )
        if choice == "greedy":
            tokens = sampling.argmax(logits)
        else:
            tokens = sampling.sample(
                logits,
                self.temperature[:size],
                self.top_k[:size],
                self.top_p[:size],
                self.min_p[:size],
                self.seeds[:size],
                self.steps[:size],
                filters=choice == "filtered draw",
            )
        sampling.advance_decode(
            tokens,
            self.token_ids[:size],
            self.positions[:size],
            self.seq_lens[:size],
            self.slots[:size],
            self.page_table[:size],
            self.steps[:size],
            page_size=runner.plan.page_size,
        )
        return tokens


def _choice(sequences: tuple[Sequence, ...]) -> Choice:
    params = [s.params for s in sequences]
    if all(p.temperature == 0 for p in params):
        return "greedy"
    filtered = any((p.top_k or 0) > 0 or (p.top_p or 1) < 1 for p in params)
    return "filtered draw" if filtered else "draw"
