"""Where each tensor of the checkpoint goes: q, k, v fused; gate and up fused; experts stacked.

Everything else has the same name on both sides. The table is read forwards to load and backwards to save.
"""

from __future__ import annotations

from collections.abc import Iterator

from hayate.checkpoint.placements import Placement
from hayate.models.config import ModelConfig, MoEConfig

# Tensors old checkpoints carry that no decoder needs.
IGNORED_TENSORS = (r".*\.rotary_emb\.inv_freq", r".*\.masked_bias", r".*\.attn\.bias")


def placements(config: ModelConfig) -> list[Placement]:
    """All fused or stacked tensors of `config`'s architecture."""
    return [p for layer in range(config.num_layers) for p in _layer(config, layer)]


def _layer(config: ModelConfig, layer: int) -> Iterator[Placement]:
    prefix = f"model.layers.{layer}."
    HK, GK = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    kinds = ["weight"] + ["bias"] * config.qkv_bias
    for kind in kinds:
        target = f"{prefix}self_attn.qkv_proj.{kind}"
        sources = {
            f"{prefix}self_attn.{name}_proj.{kind}": n
            for name, n in zip("qkv", (HK, GK, GK), strict=True)
        }
        yield from _concat(target, sources)
    if config.moe is not None and config.is_sparse(layer):
        yield from _experts(config.moe, prefix)
    elif config.activation == "silu_and_mul":
        for kind in ["weight"] + ["bias"] * config.mlp_bias:
            names = (f"{prefix}mlp.gate_proj.{kind}", f"{prefix}mlp.up_proj.{kind}")
            yield from _concat(
                f"{prefix}mlp.gate_up_proj.{kind}", dict.fromkeys(names, config.ffn_size)
            )


def _concat(target: str, sources: dict[str, int]) -> Iterator[Placement]:
    start = 0
    for source, rows in sources.items():
        yield Placement(source, target, (slice(start, start + rows),))
        start += rows


def _experts(moe: MoEConfig, prefix: str) -> Iterator[Placement]:
    F = moe.ffn_size
    yield Placement(f"{prefix}{moe.router}.weight", f"{prefix}mlp.router.weight", ())
    for e in range(moe.num_experts):
        expert = f"{prefix}{moe.experts}.{e}."
        yield Placement(f"{expert}{moe.gate}.weight", f"{prefix}mlp.gate_up_proj", (e, slice(0, F)))
        yield Placement(
            f"{expert}{moe.up}.weight", f"{prefix}mlp.gate_up_proj", (e, slice(F, 2 * F))
        )
        yield Placement(f"{expert}{moe.down}.weight", f"{prefix}mlp.down_proj", (e,))
