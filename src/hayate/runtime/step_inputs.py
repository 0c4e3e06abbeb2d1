"""A step's sequences packed into a Batch: arrays by numpy, one upload, nothing waited for."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from itertools import chain

import numpy as np
import torch

from hayate.models.batch import Batch
from hayate.models.rope_table import RopeTable
from hayate.runtime.kv_cache import KVCache
from hayate.runtime.sequence import Sequence
from hayate.runtime.sequence_rows import SequenceRows
from hayate.runtime.upload import upload


def build_batch(
    sequences: Seq[Sequence],
    counts: Seq[int],
    output_counts: Seq[int],
    *,
    num_decode: int,
    rows: SequenceRows,
    rope: RopeTable,
    kv: KVCache,
) -> Batch:
    """The next `counts[i]` tokens of each sequence, with logits after the last `output_counts[i]` of them.

    Tokens whose ids the host does not know yet (`num_in_flight`) are taken from `rows.tokens`.
    """
    S, B, device = len(sequences), kv.page_size, rows.device
    places = rows.place(sequences)
    begins = np.array([s.num_computed for s in sequences])
    lengths = np.array(counts)
    ends, cu_seqlens = begins + lengths, np.zeros(S + 1, np.int32)
    np.cumsum(lengths, out=cu_seqlens[1:])
    T = int(cu_seqlens[-1])
    sequence_of = np.repeat(np.arange(S), lengths)
    positions = np.arange(T) + (begins - cu_seqlens[:-1])[sequence_of]
    row_of = np.array(places)
    pages = rows.pages[row_of[sequence_of], positions // B]
    slots = pages.astype(np.int64) * B + positions % B
    prompt_lens = np.array([len(s.prompt_ids) for s in sequences])
    cos_sin, rope_rows = rope.rows(positions, begins, ends, prompt_lens)
    unknown = [i for i, s in enumerate(sequences) if s.num_in_flight]
    shown, embeddings = _embeddings(sequences, begins.tolist(), ends.tolist(), cu_seqlens.tolist())
    arrays = [
        _token_ids(sequences, begins.tolist(), ends.tolist(), T),
        rope_rows,
        slots,
        cu_seqlens,
        ends.astype(np.int32),
        row_of,
        _output_rows(cu_seqlens, output_counts),
        cu_seqlens[unknown].astype(np.int64),
        row_of[unknown],
        shown,
    ]
    token_ids, rope_there, slots_there, starts, seq_lens, row_index, outputs, *rest = upload(
        arrays, device
    )
    target, source, shown_there = rest
    if unknown:
        token_ids.index_copy_(0, target, rows.tokens.index_select(0, source).clamp_(min=0))
    width = -(-int(ends.max()) // B)
    return Batch(
        token_ids=token_ids,
        rope_rows=rope_there,
        cos_sin=cos_sin,
        slots=slots_there,
        cu_seqlens_q=starts,
        seq_lens=seq_lens,
        page_table=rows.page_table[:, :width].index_select(0, row_index),
        max_seqlen_q=max(counts),
        max_seqlen_k=int(ends.max()),
        k_caches=kv.k,
        v_caches=kv.v,
        output_rows=None if len(outputs) == T else outputs,
        num_decode=num_decode if num_decode < S else 0,
        embedding_rows=shown_there if embeddings else None,
        embedding_values=torch.cat(embeddings) if embeddings else None,
    )


def next_tokens(sequence: Sequence, begin: int, end: int) -> list[int]:
    """Token ids at positions begin .. end - 1: known ones, then the drafts; 0 where one is in flight."""
    if end <= sequence.num_tokens:
        return sequence.tokens(begin, end)
    known = sequence.tokens(begin, sequence.num_tokens)
    missing = end - begin - len(known)
    return known + (sequence.draft_ids[:missing] or [0] * missing)


def _token_ids(
    sequences: Seq[Sequence], begins: list[int], ends: list[int], num_tokens: int
) -> np.ndarray:
    spans = map(next_tokens, sequences, begins, ends)
    return np.fromiter(chain.from_iterable(spans), np.int64, num_tokens)


def _embeddings(
    sequences: Seq[Sequence], begins: list[int], ends: list[int], cu_seqlens: list[int]
) -> tuple[np.ndarray, list[torch.Tensor]]:
    """The rows of the step's tokens that show pictures, and the embeddings there, in pieces, in the same order."""
    rows, pieces = [np.zeros(0, np.int64)], []
    for sequence, begin, end, row in zip(sequences, begins, ends, cu_seqlens, strict=False):
        for span in sequence.spans_in(begin, end):
            first, last = max(span.start, begin), min(span.end, end)
            assert span.embeddings is not None, "scheduled before its images were encoded"
            rows.append(np.arange(first, last) + (row - begin))
            pieces.append(span.embeddings[first - span.start : last - span.start])
    return np.concatenate(rows), pieces


def _output_rows(cu_seqlens: np.ndarray, output_counts: Seq[int]) -> np.ndarray:
    """The last `output_counts[i]` rows of each sequence, in order; the last row of all where none is wanted."""
    counts = np.array(output_counts)
    ends = np.cumsum(counts)
    if not ends[-1]:
        return cu_seqlens[-1:].astype(np.int64) - 1
    return np.arange(ends[-1]) + np.repeat(cu_seqlens[1:] - ends, counts)
