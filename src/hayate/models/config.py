"""ModelConfig: everything that shapes the decoder, in one vocabulary for all architectures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hayate.kernels.rope import RopeParameters
from hayate.models.vision_config import VisionConfig

NormKind = Literal["rmsnorm", "layernorm1p"]
Activation = Literal["silu_and_mul", "relu2"]
QkNorm = Literal["head", "full"]


@dataclass(frozen=True)
class MoEConfig:
    """Mixture of experts in place of the MLP: softmax over all E, the best A, SwiGLU experts of width F."""

    num_experts: int
    num_active: int
    ffn_size: int
    renormalize: bool  # the A weights are scaled to sum to one
    router: str = "mlp.gate"  # module names in the checkpoint, below `model.layers.{i}.`
    experts: str = "mlp.experts"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


@dataclass(frozen=True)
class ModelConfig:
    """Shape and wiring of a decoder. Sizes are counts; letters as in docs/notation.md."""

    architecture: str
    vocab_size: int  # V, rows of the embedding (the tokenizer may have fewer)
    hidden_size: int  # D
    num_layers: int  # L
    num_heads: int  # H
    num_kv_heads: int  # G
    head_dim: int  # K, never derived where config.json gives it
    ffn_size: int  # F of the dense MLP
    max_position_embeddings: int
    rope: RopeParameters
    norm: NormKind = "rmsnorm"
    norm_eps: float = 1e-6
    activation: Activation = "silu_and_mul"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: QkNorm | None = None
    qkv_clip: float | None = None
    windows: tuple[int | None, ...] = ()  # sliding window of each layer; empty = none anywhere
    moe: MoEConfig | None = None
    dense_layers: frozenset[int] = frozenset()  # layers of a MoE model that have a dense MLP
    tie_embeddings: bool = False
    vision: VisionConfig | None = None  # of a model that takes pictures
    dtype: str = "bfloat16"  # of the checkpoint; where layers are NF4, of everything else
    nf4_modules: frozenset[str] | None = None  # linear layers in NF4; None: not a quantised model
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        assert self.num_heads % self.num_kv_heads == 0
        assert not self.windows or len(self.windows) == self.num_layers

    def window(self, layer: int) -> int | None:
        return self.windows[layer] if self.windows else None

    def is_sparse(self, layer: int) -> bool:
        return self.moe is not None and layer not in self.dense_layers

    @property
    def qkv_size(self) -> int:
        """Rows of the fused projection: (H + 2 G) K."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def num_parameters(self) -> int:
        vision = self.vision.num_parameters if self.vision else 0
        return vision + self._count_parameters(self.moe.num_experts if self.moe else 0)

    @property
    def num_active_parameters(self) -> int:
        """Parameters that take part in one token of text: A of E experts, the embedding included."""
        return self._count_parameters(self.moe.num_active if self.moe else 0)

    @property
    def num_streamed_parameters(self) -> int:
        """Parameters a decode step must read for one token: the active ones, less the rows of the
        embedding table that are not looked up (all but one) unless it is also the head."""
        embedding = 0 if self.tie_embeddings else (self.vocab_size - 1) * self.hidden_size
        return self.num_active_parameters - embedding

    def kv_bytes_per_token(self, dtype_bytes: int = 2) -> int:
        """Bytes of keys and values one token takes in the cache, over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * dtype_bytes

    def _count_parameters(self, experts_counted: int) -> int:
        D, V = self.hidden_size, self.vocab_size
        norm = D * (2 if self.norm == "layernorm1p" else 1)
        attention = self.qkv_size * D + D * self.num_heads * self.head_dim
        attention += self.qkv_size * self.qkv_bias + D * self.o_bias
        if self.qk_norm == "head":
            attention += 2 * self.head_dim
        elif self.qk_norm == "full":
            attention += (self.num_heads + self.num_kv_heads) * self.head_dim
        matrices = 3 if self.activation == "silu_and_mul" else 2
        total = V * D * (1 if self.tie_embeddings else 2) + norm
        for layer in range(self.num_layers):
            total += attention + 2 * norm
            if self.moe is not None and self.is_sparse(layer):
                total += self.moe.num_experts * D  # router
                total += experts_counted * 3 * D * self.moe.ffn_size
            else:
                total += matrices * D * self.ffn_size
                if self.mlp_bias:
                    total += (matrices - 1) * self.ffn_size + D
        return total
