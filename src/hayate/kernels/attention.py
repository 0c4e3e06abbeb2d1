"""Attention over the paged KV cache.

The queries of a sequence are its last q_len tokens; query i stands at position
p_i = seq_len - q_len + i and sees the keys j <= p_i, and j > p_i - window if there is a window:

    out_i = sum_j softmax_j(scale * q_i . k_j) v_j

Query head h uses key/value head h // (H / G) (grouped queries, arXiv 2305.13245). Key j of sequence
s lies in page page_table[s, j // B] at offset j % B.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hayate.kernels import cpu
from hayate.kernels._dispatch import implementation_for, is_batch_invariant
from hayate.kernels.decode_attention import MAX_DECODE_ROWS, _decode_attention_triton
from hayate.kernels.flash_attention import launch_flash_attention
from hayate.kernels.invariant_attention import launch_invariant_attention
from hayate.kernels.short_decode_attention import (
    launch_short_decode_attention,
    takes_short_kernel,
)


def attention_scores(
    q: Tensor, k: Tensor, *, scale: float, window: int | None = None, causal: bool = True
) -> Tensor:
    """The weights of the keys, (H, Q, N) fp32: softmax of scale * q . k over the visible keys.

    The plain form, for tests and for looking at a model. q (Q, H, K), the last Q of N positions;
    k (N, G, K). A query that sees no key has weights of zero.
    """
    group = q.shape[1] // k.shape[1]
    keys = k.float().repeat_interleave(group, dim=1)
    scores = torch.einsum("qhk,nhk->hqn", q.float(), keys) * scale
    visible = _visible(q.shape[0], k.shape[0], window, q.device, causal=causal)
    return scores.masked_fill(~visible, float("-inf")).softmax(-1).nan_to_num(0.0)


def _visible(
    q_len: int, kv_len: int, window: int | None, device: torch.device, *, causal: bool = True
) -> Tensor:
    """(q_len, kv_len) bool: which keys each of the last q_len positions sees."""
    position = torch.arange(kv_len - q_len, kv_len, device=device)[:, None]
    j = torch.arange(kv_len, device=device)
    visible = j <= position if causal else torch.ones_like(j <= position)
    return visible if window is None else visible & (j > position - window)


def attention_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """The specification of `attention`: one sequence after the other, through PyTorch's SDPA."""
    outputs = []
    starts = cu_seqlens_q.tolist()
    for s, kv_len in enumerate(seq_lens.tolist()):
        queries = q[starts[s] : starts[s + 1]]
        q_len = queries.shape[0]
        if q_len == 0:
            continue
        if kv_len == 0:
            outputs.append(torch.zeros_like(queries))
            continue
        # Keys before the first query's window are seen by nobody.
        begin = 0 if window is None else max(kv_len - q_len - window + 1, 0)
        k = _gather(k_cache, page_table[s], begin, kv_len)
        v = _gather(v_cache, page_table[s], begin, kv_len)
        outputs.append(_attend(queries, k, v, scale, window))
    padding = q.shape[0] - starts[-1]
    return torch.cat([*outputs, q.new_zeros(padding, *q.shape[1:])])


def _gather(cache: Tensor, pages: Tensor, begin: int, end: int) -> Tensor:
    """Positions [begin, end) of a sequence, (end - begin, G, K): a view where its pages adjoin."""
    page_size = cache.shape[1]
    first = begin // page_size
    ids = pages[first : -(-end // page_size)].tolist()
    if ids == list(range(ids[0], ids[0] + len(ids))):
        rows = cache[ids[0] : ids[0] + len(ids)]
    else:
        rows = cache[ids]
    return rows.flatten(0, 1)[begin - first * page_size : end - first * page_size]


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """One sequence: q (Q, H, K), the last Q of the N positions of k and v (N, G, K)."""
    (q_len, num_heads, head_dim), (kv_len, num_kv_heads, _) = q.shape, k.shape
    keys, values = k.transpose(0, 1)[None], v.transpose(0, 1)[None]
    if q_len == 1:
        # No mask; the heads of a group become queries, so that keys are not repeated.
        packed = q.view(1, num_kv_heads, num_heads // num_kv_heads, head_dim)
        out = F.scaled_dot_product_attention(packed, keys, values, scale=scale)
        return out.reshape(q.shape)
    whole = q_len == kv_len and (window is None or window >= kv_len)
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        keys,
        values,
        attn_mask=None if whole else _mask(q_len, kv_len, window, q.dtype, q.device),
        is_causal=whole,
        scale=scale,
        enable_gqa=num_heads != num_kv_heads,
    )
    return out[0].transpose(0, 1)


@lru_cache(maxsize=2)  # every layer of a step asks for the same one, or for one of two windows
def _mask(
    q_len: int, kv_len: int, window: int | None, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The visible keys as numbers to add, which SDPA takes faster than a bool mask."""
    hidden = ~_visible(q_len, kv_len, window, device)
    mask = torch.zeros(q_len, kv_len, dtype=dtype, device=device)
    return mask.masked_fill_(hidden, float("-inf"))


def attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    window: int | None = None,
    num_decode: int = 0,
) -> Tensor:
    """Causal attention of fresh tokens over everything their sequences hold in the cache.

    Args:
        q: (T, H, K), the queries of all sequences one after the other.
        k_cache, v_cache: (P, B, G, K), contiguous but for the page axis; the fresh tokens' keys and
            values are in it already. Slots beyond a sequence's length are never used.
        page_table: (S, P) int32, the pages of each sequence in order.
        cu_seqlens_q: (S + 1,) int32, cumulative numbers of queries, starting with 0.
        seq_lens: (S,) int32, keys of each sequence, the fresh tokens included; 0 is padding, whose
            output rows are zero.
        max_seqlen_q, max_seqlen_k: the largest number of queries and keys of a sequence; for decode
            (at most 16 queries) bounds will do, so that a CUDA graph stays valid.
        scale: factor of the scores, usually K ** -0.5.
        window: how many positions a query sees, itself included; None is all.
        num_decode: so many sequences at the front have exactly one query each, which then do not
            share the tiles made for many; the result is the same.

    Returns (T, H, K) in q's dtype; rows after cu_seqlens_q[-1] are unspecified.
    """
    implementation = implementation_for(q)
    operands = (q, k_cache, v_cache, page_table, cu_seqlens_q, seq_lens)
    if implementation == "triton":
        if 0 < num_decode < seq_lens.numel():
            return _mixed_triton(*operands, num_decode, max_seqlen_q, scale, window)
        return _attention_triton(*operands, max_seqlen_q=max_seqlen_q, scale=scale, window=window)
    run = attention_reference
    if implementation == "native" and cpu.attention_fits(q, k_cache, v_cache, max_seqlen_q):
        run = cpu.attention
    return run(
        *operands,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        scale=scale,
        window=window,
    )


def _mixed_triton(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    num_decode: int,
    max_seqlen_q: int,
    scale: float,
    window: int | None,
) -> Tensor:
    """Single queries by the decode kernel, the sequences after them by the prefill kernel."""
    out = torch.empty_like(q)
    caches = (k_cache, v_cache)
    single = (page_table[:num_decode], cu_seqlens_q[: num_decode + 1], seq_lens[:num_decode])
    longer = (page_table[num_decode:], cu_seqlens_q[num_decode:], seq_lens[num_decode:])
    options: dict[str, Any] = {"scale": scale, "window": window}
    if is_batch_invariant():
        launch_invariant_attention(q, *caches, *single, max_seqlen_q=1, out=out, **options)
        launch_invariant_attention(
            q, *caches, *longer, max_seqlen_q=max_seqlen_q, out=out, **options
        )
    else:
        first = _decode_attention_triton(
            q[:num_decode], *caches, *single, max_seqlen_q=1, **options
        )
        out[:num_decode] = first
        launch_flash_attention(q, *caches, *longer, max_seqlen_q=max_seqlen_q, out=out, **options)
    return out


def _attention_triton(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    *,
    max_seqlen_q: int,
    scale: float,
    window: int | None,
) -> Tensor:
    operands = (q, k_cache, v_cache, page_table, cu_seqlens_q, seq_lens)
    few = max_seqlen_q <= 16 and max_seqlen_q * (q.shape[1] // k_cache.shape[2]) <= MAX_DECODE_ROWS
    options: dict[str, Any] = {"max_seqlen_q": max_seqlen_q, "scale": scale, "window": window}
    if is_batch_invariant():
        return launch_invariant_attention(*operands, **options)
    if few and takes_short_kernel(page_table, k_cache):
        return launch_short_decode_attention(*operands, **options)
    if few:
        return _decode_attention_triton(*operands, **options)
    return launch_flash_attention(*operands, **options)
