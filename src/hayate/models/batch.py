"""Batch: everything one forward pass needs, packed without padding.

Tokens of all sequences lie one after another; sequence s owns rows `cu_seqlens_q[s]:cu_seqlens_q[s + 1]`. Its
keys and values, this step's included, are found through `page_table[s]`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Batch:
    """One step's input. Integers on the model's device; lengths that shape the launch also as Python ints."""

    token_ids: torch.Tensor  # (T,) int64
    rope_rows: (
        torch.Tensor
    )  # (T,) int64, rows of cos_sin; a token's position, save for rescaled prompts
    cos_sin: torch.Tensor  # (rows, rotary_dim) fp32
    slots: torch.Tensor  # (T,) int64, where the keys and values go; negative: nowhere
    cu_seqlens_q: torch.Tensor  # (S + 1,) int32
    seq_lens: torch.Tensor  # (S,) int32, length of the keys, this step's included
    page_table: torch.Tensor  # (S, pages of the longest sequence) int32
    max_seqlen_q: int
    max_seqlen_k: int
    k_caches: list[torch.Tensor]  # per layer (P, B, G, K)
    v_caches: list[torch.Tensor]
    output_rows: torch.Tensor | None = None  # (R,) int64, rows whose logits are wanted; None = all
    # So many sequences at the front have exactly one query; counted only where others have more.
    num_decode: int = 0
    # Tokens that show a picture: their rows (R,) int64, and what is there instead of the embedding of their id.
    embedding_rows: torch.Tensor | None = None
    embedding_values: torch.Tensor | None = None  # (R, D) in the model's dtype
