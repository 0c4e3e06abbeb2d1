"""Small random models of every architecture, made by transformers: the oracle of the parity tests.

Shapes are chosen where shortcuts break: head_dim is not hidden / heads, fewer KV heads than heads, odd
sizes, partial rotary, sliding windows shorter than the prompts, norms away from identity.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

transformers.utils.logging.disable_progress_bar()

COMMON: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 1e4,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 5e5,
}
_LONGROPE = {
    "rope_type": "longrope",
    "factor": 4.0,
    "original_max_position_embeddings": 40,
    "rope_theta": 1e4,
    "short_factor": [1.0 + 0.1 * i for i in range(4)],
    "long_factor": [2.0 + 0.7 * i for i in range(4)],
}
_DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
_LINEAR = {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4}

# name -> (transformers config class, fields that differ from COMMON)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"head_dim": 16}),
    "llama-bias-tied": (
        "Llama",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama-llama3": ("Llama", {"rope_parameters": _LLAMA3}),
    "llama-linear": ("Llama", {"rope_parameters": _LINEAR}),
    "llama-yarn": ("Llama", {"rope_parameters": _YARN}),
    "llama-dynamic": ("Llama", {"rope_parameters": _DYNAMIC, "max_position_embeddings": 40}),
    "llama-longrope": ("Llama", {"rope_parameters": _LONGROPE}),
    "mistral": ("Mistral", {"head_dim": 16, "sliding_window": None}),
    "mistral-window": ("Mistral", {"head_dim": 16, "sliding_window": 11}),
    "nemotron": ("Nemotron", {"head_dim": 16}),
    "nemotron-bias": ("Nemotron", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}),
    "mixtral-window": (
        "Mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 13},
    ),
    "mixtral-mqa": (
        "Mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 4, "num_key_value_heads": 1},
    ),
    "olmoe": ("Olmoe", {"num_experts": 8, "num_experts_per_tok": 3}),
    "olmoe-clip": (
        "Olmoe",
        {"num_experts": 8, "num_experts_per_tok": 3, "clip_qkv": 0.4, "norm_topk_prob": True},
    ),
    "qwen3-moe": (
        "Qwen3Moe",
        {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "head_dim": 16,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
    "qwen3-moe-plain": (
        "Qwen3Moe",
        {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "head_dim": 16,
            "decoder_sparse_step": 2,
        },
    ),
}


def make(
    name: str,
    folder: Path,
    *,
    dtype: torch.dtype,
    max_shard_size: str = "10GB",
    all_experts: bool = False,
):
    """Build the random transformers model of a case, save it to `folder` and return it.

    With `all_experts` every expert is active, so that the output depends continuously on the router's logits:
    in low precision a choice of experts near a tie may flip, which no rounding bound covers.
    """
    family, fields = CASES[name]
    fields = {**COMMON, **fields}
    if all_experts and "num_experts_per_tok" in fields:
        fields["num_experts_per_tok"] = fields.get("num_experts") or fields["num_local_experts"]
    config = getattr(transformers, f"{family}Config")(**fields)
    torch.manual_seed(sum(map(ord, name)))
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases start at one or zero: move them
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.copy_(torch.randn_like(parameter) * 0.15)
    model = model.to(dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model
