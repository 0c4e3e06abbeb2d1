"""KVCache: the keys and values of all layers, in pages of B tokens."""

from __future__ import annotations

import torch

from hayate.models.config import ModelConfig


class KVCache:
    """One tensor (L, 2, P, B, G, K); `k[layer]` and `v[layer]` are views (P, B, G, K).

    On the CPU the memory is reserved, and taken from the system only as pages are written.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_pages: int,
        page_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        shape = (config.num_layers, 2, num_pages, page_size, config.num_kv_heads, config.head_dim)
        self.data = torch.empty(shape, device=device, dtype=dtype)
        self.k = [layer[0] for layer in self.data]
        self.v = [layer[1] for layer in self.data]
        self.num_pages = num_pages
        self.page_size = page_size
