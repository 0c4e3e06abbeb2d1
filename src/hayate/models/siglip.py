"""SigLIP's vision encoder with positions for pictures of any shape (arXiv 2303.15343, 2307.06304).

    x = patches @ patch_embedding^T + position_embedding[bucket]
    x = x + out_proj(attention(LN1(x)));  x = x + fc2(gelu_tanh(fc1(LN2(x))))      in each layer
    out = post_layernorm(x)

The patches of all pictures are packed, without padding; a patch attends to those of its picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hayate.kernels.encoder_attention import encoder_attention
from hayate.kernels.linear import linear
from hayate.kernels.norm import Norm, apply_norm
from hayate.models.decoder import Embedding
from hayate.models.layers import Linear, NormParameters
from hayate.models.vision_config import VisionConfig


class Pictures(NamedTuple):
    """Where the patches of packed pictures lie, row by row within each."""

    rows: Tensor  # (N,) int64, a patch's row in its picture
    columns: Tensor  # (N,) int64
    buckets: Tensor  # (N,) int64, its row of the position embedding
    cu_seqlens: Tensor  # (S + 1,) int32, cumulative numbers of patches
    max_seqlen: int
    max_side: int  # the largest row or column, plus one


def pack_pictures(
    sizes: Sequence[tuple[int, int]], grid_side: int, device: torch.device
) -> Pictures:
    """Of pictures of `sizes` (height, width) in patches. For the buckets see `position_buckets`."""
    rows = torch.cat([torch.arange(h).repeat_interleave(w) for h, w in sizes])
    columns = torch.cat([torch.arange(w).repeat(h) for h, w in sizes])
    buckets = torch.cat([position_buckets(h, w, grid_side) for h, w in sizes])
    lengths = [h * w for h, w in sizes]
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    # One copy to the device for all three.
    rows, columns, buckets = torch.stack([rows, columns, buckets]).to(device)
    return Pictures(
        rows, columns, buckets, ends.to(device), max(lengths), max(max(size) for size in sizes)
    )


def position_buckets(height: int, width: int, grid_side: int) -> Tensor:
    """Row of the (grid_side^2, E) position embedding for each patch of a picture, (height * width,) int64.

    Patch i of n along a side has coordinate i / n and so bucket floor(grid_side * i / n) of that side.
    """
    rows = torch.arange(height) * grid_side // height
    columns = torch.arange(width) * grid_side // width
    return (rows[:, None] * grid_side + columns).flatten()


class _PatchEmbedding(nn.Module):
    """The checkpoint's convolution (E, 3, p, p). Its patches do not overlap, so it is a product."""

    def __init__(self, config: VisionConfig, *, dtype: torch.dtype) -> None:
        super().__init__()
        E, p = config.hidden_size, config.patch_size
        self.weight = nn.Parameter(torch.empty(E, 3, p, p, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(E, dtype=dtype))

    def forward(self, patches_NP: Tensor, residual: Tensor) -> Tensor:
        return linear(patches_NP, self.weight.flatten(1), self.bias, residual=residual)


class _Embeddings(nn.Module):
    def __init__(self, config: VisionConfig, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.patch_embedding = _PatchEmbedding(config, dtype=dtype)
        self.position_embedding = Embedding(config.grid_side**2, config.hidden_size, dtype=dtype)

    def forward(self, patches_NP: Tensor, buckets: Tensor) -> Tensor:
        x_NE: Tensor = self.patch_embedding(patches_NP, self.position_embedding(buckets))
        return x_NE


class _Attention(nn.Module):
    """Attention within a picture; q, k and v are one projection."""

    def __init__(self, config: VisionConfig, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        E = config.hidden_size
        self.qkv_proj = Linear(E, 3 * E, bias=True, dtype=dtype)
        self.out_proj = Linear(E, E, bias=True, dtype=dtype)

    def forward(self, x_NE: Tensor, norm: Norm, pictures: Pictures) -> Tensor:
        qkv = self.qkv_proj(x_NE, norm=norm).view(-1, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.unbind(1)
        out_NHK = encoder_attention(
            q,
            k,
            v,
            pictures.cu_seqlens,
            pictures.cu_seqlens,
            max_seqlen_q=pictures.max_seqlen,
            scale=self.head_dim**-0.5,
        )
        return self.out_proj(out_NHK.flatten(1), residual=x_NE)


class _MLP(nn.Module):
    def __init__(self, config: VisionConfig, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.ffn_size, bias=True, dtype=dtype)
        self.fc2 = Linear(config.ffn_size, config.hidden_size, bias=True, dtype=dtype)

    def forward(self, x_NE: Tensor, norm: Norm) -> Tensor:
        return self.fc2(self.fc1(x_NE, norm=norm, activation="gelu_tanh"), residual=x_NE)


class _Layer(nn.Module):
    def __init__(self, config: VisionConfig, *, dtype: torch.dtype) -> None:
        super().__init__()
        E, eps = config.hidden_size, config.norm_eps
        self.layer_norm1 = NormParameters(E, "layernorm", eps, dtype=dtype)
        self.self_attn = _Attention(config, dtype=dtype)
        self.layer_norm2 = NormParameters(E, "layernorm", eps, dtype=dtype)
        self.mlp = _MLP(config, dtype=dtype)

    def forward(self, x_NE: Tensor, pictures: Pictures) -> Tensor:
        x_NE = self.self_attn(x_NE, self.layer_norm1(), pictures)
        return self.mlp(x_NE, self.layer_norm2())


class _Encoder(nn.Module):
    def __init__(self, config: VisionConfig, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(config, dtype=dtype) for _ in range(config.num_layers))


class SiglipEncoder(nn.Module):
    """All layers and the final norm; names as in the checkpoint, below `vpm.`."""

    def __init__(self, config: VisionConfig, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.embeddings = _Embeddings(config, dtype=dtype)
        self.encoder = _Encoder(config, dtype=dtype)
        self.post_layernorm = NormParameters(
            config.hidden_size, "layernorm", config.norm_eps, dtype=dtype
        )

    def forward(self, patches_NP: Tensor, pictures: Pictures) -> Tensor:
        """Features (N, E) of patches (N, 3 * p * p), each flattened as (colour, y, x)."""
        x_NE = self.embeddings(patches_NP, pictures.buckets)
        for layer in self.encoder.layers:
            x_NE = layer(x_NE, pictures)
        return apply_norm(x_NE, self.post_layernorm())
