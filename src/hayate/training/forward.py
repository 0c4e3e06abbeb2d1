"""The decoder of `models`, run for training: the same modules and parameters, whole sequences, no cache.

    x = x + o_proj(attention(rope(qkv_proj(norm(x)))))        attention stays inside a document
    x = x + mlp(norm(x))                                      or the mixture of experts

What serving fuses into one kernel stands here as one differentiable operation after another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hayate.kernels import training as ops
from hayate.models.decoder import CausalLM, DecoderLayer
from hayate.models.layers import MLP, Attention, Linear, SparseMLP
from hayate.models.rope_table import RopeTable
from hayate.training.token_stream import TokenBatch

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class TrainingBatch:
    """M windows of L tokens, one after the other: T = M L rows."""

    token_ids: Tensor  # (T,) int64
    targets: Tensor  # (T,) int64, -100 where there is none
    positions: Tensor  # (T,) int64, inside the token's document piece
    document_starts: Tensor  # (T,) int32, row of the first token of the piece
    sequence_length: int  # L

    @classmethod
    def of(cls, batch: TokenBatch, device: torch.device) -> TrainingBatch:
        """`batch` on `device`, copied from pinned memory without a wait where that is a GPU."""
        M, L = batch.token_ids.shape
        starts = torch.from_numpy(batch.document_starts)
        positions = torch.arange(L) - starts
        starts = starts + torch.arange(M, dtype=torch.int32)[:, None] * L

        def upload(x: Tensor) -> Tensor:
            x = x.reshape(-1)
            return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x

        return cls(
            upload(torch.from_numpy(batch.token_ids)),
            upload(torch.from_numpy(batch.targets)),
            upload(positions.to(torch.int64)),
            upload(starts.to(torch.int32)),
            L,
        )


@dataclass(frozen=True)
class Routing:
    """What the router of one layer did with the T tokens."""

    logits: Tensor  # (T, E) fp32
    experts: Tensor  # (T, A) int32


class TrainingModel:
    """Runs a CausalLM for training.

    selection_biases: (L, E) fp32 or None; row l is added to the probabilities of layer l where experts are chosen.
    recompute: what the backward pass computes again instead of keeping: nothing; the MLPs, whose activations are by
        far the largest part of a mixture of experts; or whole layers.
    """

    def __init__(
        self,
        model: CausalLM,
        sequence_length: int,
        *,
        recompute: Recompute = "none",
        selection_biases: Tensor | None = None,
    ) -> None:
        self.model = model
        self.recompute = recompute
        self.selection_biases = selection_biases
        device = model.model.embed_tokens.weight.device
        self.cos_sin = RopeTable(model.config.rope, sequence_length, device=device).cos_sin

    @property
    def head(self) -> Tensor:
        """(V, D): the weight of the LM head, which may be the embedding table."""
        head = self.model.lm_head
        return self.model.model.embed_tokens.weight if head is None else head.weight

    def hidden_states(self, batch: TrainingBatch) -> tuple[Tensor, list[Routing]]:
        """What the head multiplies, (T, D), the last norm taken; and the routing of each sparse layer, in order."""
        decoder = self.model.model
        x_TD = F.embedding(batch.token_ids, decoder.embed_tokens.weight)
        routings = []
        for index, layer in enumerate(decoder.layers):
            assert isinstance(layer, DecoderLayer)
            bias = None if self.selection_biases is None else self.selection_biases[index]
            x_TD, routing = self._layer(layer, x_TD, batch, bias)
            if routing is not None:
                routings.append(routing)
        return ops.norm(x_TD, decoder.norm()), routings

    def _layer(
        self, layer: DecoderLayer, x_TD: Tensor, batch: TrainingBatch, bias: Tensor | None
    ) -> tuple[Tensor, Routing | None]:
        def whole(x: Tensor) -> tuple[Tensor, ...]:
            return mlp_block(attention_block(x))

        def attention_block(x: Tensor) -> Tensor:
            normed = ops.norm(x, layer.input_layernorm())
            return x + _attention(layer.self_attn, normed, batch, self.cos_sin)

        def mlp_block(x: Tensor) -> tuple[Tensor, ...]:
            normed = ops.norm(x, layer.post_attention_layernorm())
            if isinstance(layer.mlp, SparseMLP):
                out, logits, experts = _sparse_mlp(layer.mlp, normed, bias)
                return x + out, logits, experts
            return (x + _mlp(layer.mlp, normed),)

        # No operation draws random numbers, and all are deterministic: what is computed again comes out the same,
        # the choice of experts included.
        if self.recompute == "full":
            outputs = _recomputed(whole, x_TD)
        elif self.recompute == "selective":
            outputs = _recomputed(mlp_block, attention_block(x_TD))
        else:
            outputs = whole(x_TD)
        return outputs[0], Routing(outputs[1], outputs[2]) if len(outputs) > 1 else None


def _recomputed(block: Callable[[Tensor], tuple[Tensor, ...]], x_TD: Tensor) -> tuple[Tensor, ...]:
    return checkpoint(block, x_TD, use_reentrant=False, preserve_rng_state=False)


def _linear(layer: Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)


def _attention(layer: Attention, x_TD: Tensor, batch: TrainingBatch, cos_sin: Tensor) -> Tensor:
    c = layer.config
    q_THK, k_TGK, v_TGK = ops.split_heads(
        _linear(layer.qkv_proj, x_TD),
        cos_sin,
        batch.positions,
        num_heads=c.num_heads,
        num_kv_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        q_norm=layer.q_norm() if c.qk_norm else None,
        k_norm=layer.k_norm() if c.qk_norm else None,
        clip=c.qkv_clip,
    )
    out_THK = ops.document_attention(
        q_THK,
        k_TGK,
        v_TGK,
        batch.document_starts,
        sequence_length=batch.sequence_length,
        scale=c.head_dim**-0.5,
        window=layer.window,
    )
    return _linear(layer.o_proj, out_THK.flatten(1))


def _mlp(mlp: MLP, x_TD: Tensor) -> Tensor:
    if mlp.activation == "silu_and_mul":
        return _linear(mlp.down_proj, ops.silu_and_mul(_linear(mlp.gate_up_proj, x_TD)))
    return _linear(mlp.down_proj, ops.relu2(_linear(mlp.up_proj, x_TD)))


def _sparse_mlp(mlp: SparseMLP, x_TD: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The output (T, D), and logits and experts of the router."""
    logits, weights_TA, experts_TA = ops.route(
        x_TD,
        mlp.router.weight,
        num_active=mlp.moe.num_active,
        renormalize=mlp.moe.renormalize,
        selection_bias=bias,
    )
    out = ops.experts_mlp(x_TD, weights_TA, experts_TA, mlp.gate_up_proj, mlp.down_proj)
    return out, logits, experts_TA
