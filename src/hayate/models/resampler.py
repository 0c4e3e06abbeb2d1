"""The resampler: a picture's patches of any number to `num_queries` vectors of the language model's width.

    kv = LN_kv(x @ kv_proj^T)                                           (N, D)
    K = (kv + PE) Wk^T + bk;  V = kv Wv^T + bv;  Q = LN_q(query) Wq^T + bq
    y = LN_post(out_proj(softmax(Q K^T / sqrt(128)) V)) @ proj          (num_queries, D)

The position code PE (row, column) is on the keys only. Of a patch at row r and column c, with
omega_i = 10000^(-i / (D / 4)):

    PE = [sin(c omega), cos(c omega), sin(r omega), cos(r omega)]
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn

from hayate.kernels.elementwise import add
from hayate.kernels.encoder_attention import encoder_attention
from hayate.kernels.linear import linear
from hayate.kernels.norm import apply_norm
from hayate.models.layers import Linear, NormParameters
from hayate.models.siglip import Pictures
from hayate.models.vision_config import VisionConfig

_EPS = 1e-6


@lru_cache(maxsize=4)
def axis_codes(length: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[sin(p omega), cos(p omega)] of positions p < length, (length, size); omega as above, D = 2 size."""
    omega = 10_000.0 ** -(torch.arange(size // 2, dtype=torch.float64) / (size // 2))
    angles = torch.arange(length, dtype=torch.float64)[:, None] * omega
    return torch.cat([angles.sin(), angles.cos()], dim=1).float().to(dtype).to(device)


def position_codes(pictures: Pictures, size: int, dtype: torch.dtype) -> Tensor:
    """PE of every patch, (N, size): the column's code, then the row's."""
    length = -(-pictures.max_side // 128) * 128  # few lengths, for the cache
    codes = axis_codes(length, size // 2, dtype, pictures.rows.device)
    return codes[torch.stack([pictures.columns, pictures.rows], dim=1)].flatten(1)


class _CrossAttention(nn.Module):
    """The checkpoint keeps the three input projections in one matrix, as torch's MultiheadAttention."""

    def __init__(self, size: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * size, size, dtype=dtype))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * size, dtype=dtype))
        self.out_proj = Linear(size, size, bias=True, dtype=dtype)


class Resampler(nn.Module):
    """Names as in the checkpoint, below `resampler.`."""

    def __init__(self, config: VisionConfig, *, dtype: torch.dtype) -> None:
        super().__init__()
        D = config.output_size
        self.num_heads = config.num_resampler_heads
        self.query = nn.Parameter(torch.empty(config.num_queries, D, dtype=dtype))
        self.kv_proj = Linear(config.hidden_size, D, bias=False, dtype=dtype)
        self.attn = _CrossAttention(D, dtype=dtype)
        self.ln_q = NormParameters(D, "layernorm", _EPS, dtype=dtype)
        self.ln_kv = NormParameters(D, "layernorm", _EPS, dtype=dtype)
        self.ln_post = NormParameters(D, "layernorm", _EPS, dtype=dtype)
        self.proj = nn.Parameter(torch.empty(D, D, dtype=dtype))  # x @ proj, not its transpose

    def forward(self, x_NE: Tensor, pictures: Pictures) -> Tensor:
        """(S, num_queries, D) of the features of S pictures."""
        num_queries, D = self.query.shape
        num_pictures = pictures.cu_seqlens.numel() - 1
        (wq, wk, wv), (bq, bk, bv) = (
            p.chunk(3) for p in (self.attn.in_proj_weight, self.attn.in_proj_bias)
        )
        kv_ND = apply_norm(self.kv_proj(x_NE), self.ln_kv())
        codes_ND = position_codes(pictures, D, kv_ND.dtype)
        k_ND = linear(add(kv_ND, codes_ND), wk, bk)
        v_ND = linear(kv_ND, wv, bv)
        q_QD = linear(self.query, wq, bq, norm=self.ln_q())
        ends = torch.arange(num_pictures + 1, dtype=torch.int32, device=x_NE.device) * num_queries
        q, k, v = (
            x.view(x.shape[0], self.num_heads, -1)
            for x in (q_QD.repeat(num_pictures, 1), k_ND, v_ND)
        )
        out = encoder_attention(
            q,
            k,
            v,
            ends,
            pictures.cu_seqlens,
            max_seqlen_q=num_queries,
            scale=(D // self.num_heads) ** -0.5,
        )
        out = self.attn.out_proj(out.flatten(1))
        return linear(out, self.proj.t(), norm=self.ln_post()).view(num_pictures, num_queries, D)
