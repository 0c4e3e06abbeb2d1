"""Self-attention of fresh tokens over the paged cache: `rope_and_cache`, then `attention`.

Where every sequence has one fresh token, both are one Triton kernel (`decode_attention`): in decode
the time goes to waiting, and a kernel less is a wait less.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from hayate.kernels._dispatch import implementation_for, is_batch_invariant
from hayate.kernels.attention import attention, attention_reference
from hayate.kernels.decode_attention import (
    MAX_DECODE_ROWS,
    Projection,
    _decode_attention_triton,
)
from hayate.kernels.rope import rope_and_cache, rope_and_cache_reference
from hayate.kernels.short_decode_attention import takes_short_kernel

if TYPE_CHECKING:
    from hayate.kernels.norm import Norm

__all__ = ["self_attention", "self_attention_reference"]


def self_attention_reference(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    projection: Projection,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """The specification of `self_attention`."""
    num_kv_heads, head_dim = k_cache.shape[2:]
    q = rope_and_cache_reference(
        qkv,
        k_cache,
        v_cache,
        **projection._asdict(),
        num_heads=qkv.shape[1] // head_dim - 2 * num_kv_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
    )
    return attention_reference(
        q,
        k_cache,
        v_cache,
        page_table,
        cu_seqlens_q,
        seq_lens,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        scale=scale,
        window=window,
    )


# With more, the kernel without rotation, which holds two thirds of the registers, streams faster (us,
# 64 sequences of 1,100 tokens: 78 and 83; 256: 271 and 291).
_MAX_FUSED_SEQUENCES = 16


def _fits_one_kernel(
    qkv: Tensor, k_cache: Tensor, page_table: Tensor, max_seqlen_q: int, q_norm: Norm | None
) -> bool:
    """One token of few sequences, norms over single heads, and sums in no particular order."""
    num_kv_heads, head_dim = k_cache.shape[2:]
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    return (
        implementation_for(qkv) == "triton"
        and max_seqlen_q == 1
        and qkv.shape[0] <= _MAX_FUSED_SEQUENCES
        and num_heads // num_kv_heads <= MAX_DECODE_ROWS
        and (q_norm is None or q_norm.weight.numel() == head_dim)
        and not is_batch_invariant()
        and not takes_short_kernel(page_table, k_cache)
    )


def self_attention(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    projection: Projection,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    window: int | None = None,
    num_decode: int = 0,
) -> Tensor:
    """Norm, clip and rotate the heads of fresh tokens, cache keys and values, and attend.

        out = attention(rope_and_cache(qkv, ...), ...)

    Args:
        qkv: (T, (H + 2G) * K), per token all query heads, all key heads, all value heads.
        k_cache, v_cache: (P, B, G, K); the tokens' slots are written.
        projection: slots, positions, table of angles, norms and clip, as for `rope_and_cache`. A
            token's slot is the one at which the page table has its place in the sequence.
        the others: as for `attention`.

    Returns (T, H, K) in qkv's dtype. Rotated queries and keys are rounded to it once, as are the
    values after a clip.
    """
    table = (page_table, cu_seqlens_q, seq_lens)
    if _fits_one_kernel(qkv, k_cache, page_table, max_seqlen_q, projection.q_norm):
        return _decode_attention_triton(
            qkv,
            k_cache,
            v_cache,
            *table,
            max_seqlen_q=1,
            scale=scale,
            window=window,
            projection=projection,
        )
    num_kv_heads, head_dim = k_cache.shape[2:]
    q = rope_and_cache(
        qkv,
        k_cache,
        v_cache,
        **projection._asdict(),
        num_heads=qkv.shape[1] // head_dim - 2 * num_kv_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
    )
    return attention(
        q,
        k_cache,
        v_cache,
        *table,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        scale=scale,
        window=window,
        num_decode=num_decode,
    )
