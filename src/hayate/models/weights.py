"""Where each tensor of the checkpoint goes: q, k, v fused; gate and up fused; experts stacked.

Everything else has the same name on both sides. The table is read forwards to load and backwards to save.
"""

from __future__ import annotations

from collections.abc import Iterator

from hayate.checkpoint.placements import Placement, concat, stack
from hayate.models.config import ModelConfig, MoEConfig
from hayate.models.vision_config import VisionConfig

# Tensors old checkpoints carry that no decoder needs.
IGNORED_TENSORS = (r".*\.rotary_emb\.inv_freq", r".*\.masked_bias", r".*\.attn\.bias")


def placements(config: ModelConfig) -> list[Placement]:
    """All fused or stacked tensors of `config`'s architecture."""
    decoder = "" if config.vision is None else "llm."
    placed = [p for layer in range(config.num_layers) for p in _layer(config, decoder, layer)]
    if config.vision is not None:
        placed += _vision(config.vision)
    return placed


def _layer(config: ModelConfig, decoder: str, layer: int) -> Iterator[Placement]:
    prefix = f"{decoder}model.layers.{layer}."
    HK, GK = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    for kind in ["weight"] + ["bias"] * config.qkv_bias:
        sources = [f"{prefix}self_attn.{name}_proj.{kind}" for name in "qkv"]
        yield from concat(f"{prefix}self_attn.qkv_proj.{kind}", sources, (HK, GK, GK))
    if config.moe is not None and config.is_sparse(layer):
        yield from _experts(config.moe, prefix)
    elif config.activation == "silu_and_mul":
        for kind in ["weight"] + ["bias"] * config.mlp_bias:
            sources = [f"{prefix}mlp.{name}_proj.{kind}" for name in ("gate", "up")]
            yield from concat(
                f"{prefix}mlp.gate_up_proj.{kind}", sources, (config.ffn_size, config.ffn_size)
            )


def _vision(vision: VisionConfig) -> Iterator[Placement]:
    for layer in range(vision.num_layers):
        prefix = f"vpm.encoder.layers.{layer}.self_attn."
        for kind in ("weight", "bias"):
            sources = [f"{prefix}{name}_proj.{kind}" for name in "qkv"]
            yield from concat(f"{prefix}qkv_proj.{kind}", sources, (vision.hidden_size,) * 3)


def _experts(moe: MoEConfig, prefix: str) -> Iterator[Placement]:
    def tensors(name: str) -> list[str]:
        return [f"{prefix}{moe.experts}.{e}.{name}.weight" for e in range(moe.num_experts)]

    F = moe.ffn_size
    yield Placement(f"{prefix}{moe.router}.weight", f"{prefix}mlp.router.weight", ())
    yield from stack(f"{prefix}mlp.gate_up_proj", tensors(moe.gate), slice(0, F))
    yield from stack(f"{prefix}mlp.gate_up_proj", tensors(moe.up), slice(F, 2 * F))
    yield from stack(f"{prefix}mlp.down_proj", tensors(moe.down))
