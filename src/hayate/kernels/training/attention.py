"""Causal attention over packed windows of documents, with gradients.

T = M windows of L tokens. Row t sees the rows j of its own window with document_starts[t] <= j <= t, and
j > t - window if there is one:

    out_t = sum_j p_tj v_j,   p_tj = softmax_j(scale * q_t . k_j)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hayate.errors import UsageError
from hayate.kernels.training._dispatch import implementation
from hayate.kernels.training.attention_backward import attention_backward
from hayate.kernels.training.attention_forward import attention_forward

__all__ = ["document_attention", "document_attention_reference"]


def visible_keys(document_starts: Tensor, sequence_length: int, window: int | None) -> Tensor:
    """(M, L, L) bool: whether the query (second axis) sees the key (last axis)."""
    L = sequence_length
    row = torch.arange(L, device=document_starts.device)
    first = document_starts.view(-1, L) - L * torch.arange(
        document_starts.numel() // L, device=document_starts.device
    ).unsqueeze(1)
    if window is not None:
        first = torch.maximum(first, row - window + 1)
    return (row <= row[:, None]) & (row >= first[..., None])


def document_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    document_starts: Tensor,
    *,
    sequence_length: int,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """`document_attention` in PyTorch: all scores at once, in fp32."""
    (T, H, K), G, L = q.shape, k.shape[1], sequence_length
    q_, k_, v_ = (x.float().view(T // L, L, G, -1, K) for x in (q, k, v))
    scores = torch.einsum("mtgak,mjgbk->mgatj", q_ * scale, k_)
    hidden = ~visible_keys(document_starts, L, window)
    p = scores.masked_fill(hidden[:, None, None], float("-inf")).softmax(-1)
    return torch.einsum("mgatj,mjgbk->mtgak", p, v_).reshape(T, H, K).to(q.dtype)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, length: int, scale: float
) -> Tensor:
    """PyTorch's attention on windows of `length`; with no mask each is one document."""
    T, H, K = q.shape
    q_, k_, v_ = (x.view(T // length, length, -1, K).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q_,
        k_,
        v_,
        attn_mask=None if mask is None else mask[:, None],
        is_causal=mask is None,
        scale=scale,
        enable_gqa=k.shape[1] != H,
    )
    return out.transpose(1, 2).reshape(T, H, K)


# Documents of fewer rows than this on average are cheaper all at once, with a mask.
_LEAST_ROWS_A_DOCUMENT = 16


def _by_document(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    document_starts: Tensor,
    sequence_length: int,
    scale: float,
    window: int | None,
) -> Tensor:
    """For the CPU: each document by itself, so that nothing outside it is computed."""
    lengths = document_starts.unique_consecutive(return_counts=True)[1].tolist()
    cut = window is not None and window < max(lengths)
    if cut or len(q) < _LEAST_ROWS_A_DOCUMENT * len(lengths):
        mask = visible_keys(document_starts, sequence_length, window)
        return _sdpa(q, k, v, mask, sequence_length, scale)
    if min(lengths) == max(lengths):
        return _sdpa(q, k, v, None, lengths[0], scale)
    documents = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    return torch.cat([_sdpa(q, k, v, None, len(q), scale) for q, k, v in documents])


class _DocumentAttention(torch.autograd.Function):
    """The Triton kernels."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        document_starts: Tensor,
        sequence_length: int,
        scale: float,
        window: int | None,
    ) -> Tensor:
        ctx.options = {"sequence_length": sequence_length, "scale": scale, "window": window}
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out, lse = attention_forward(q, k, v, document_starts, **ctx.options)
        ctx.save_for_backward(q, k, v, out, lse, document_starts)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, starts = ctx.saved_tensors
        dout = dout.contiguous()
        grads = attention_backward(q, k, v, out, lse, dout, starts, **ctx.options)
        return *grads, None, None, None, None


def document_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    document_starts: Tensor,
    *,
    sequence_length: int,
    scale: float,
    window: int | None = None,
    whole_windows: bool = False,
) -> Tensor:
    """Causal attention inside each document of each window; with gradients to q, k and v.

    Args:
        q: (T, H, K); k, v: (T, G, K), H a multiple of G; contiguous, one dtype.
        document_starts: (T,) int32, the absolute row of the first token of the token's document, not
            before its window; nondecreasing within a window.
        sequence_length: L, T a multiple of it.
        window: a row sees only the last `window` rows, itself included.
        whole_windows: the caller knows that each window is one document, so that faster forms may run.

    Returns (T, H, K) in q's dtype.
    """
    T, H, K = q.shape
    if k.shape != v.shape or k.shape[0] != T or k.shape[2] != K or H % k.shape[1]:
        raise UsageError(
            f"document_attention takes q (T, H, K), k and v (T, G, K) with H a multiple of G, got "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if sequence_length < 1 or T % sequence_length or document_starts.shape != (T,):
        raise UsageError(
            f"{T} rows and document_starts {tuple(document_starts.shape)} are not whole windows of "
            f"{sequence_length} rows"
        )
    run = implementation(q)
    if run == "triton":
        options = (sequence_length, scale, window)
        return _DocumentAttention.apply(q, k, v, document_starts, *options)
    if run == "reference":
        return document_attention_reference(
            q, k, v, document_starts, sequence_length=sequence_length, scale=scale, window=window
        )
    return _by_document(q, k, v, document_starts, sequence_length, scale, window)
