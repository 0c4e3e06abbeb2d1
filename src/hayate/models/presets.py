"""Full-size architectures by name, for benchmarks on random weights and for training from nothing.

Each entry is the config.json of the model it is named after.
"""

from __future__ import annotations

from typing import Any

from hayate.checkpoint.config_json import ConfigReader
from hayate.errors import UsageError
from hayate.models.config import ModelConfig
from hayate.models.families import parse_config


def _own_moe(**sizes: Any) -> dict[str, Any]:
    """Our own mixture of experts: one key/value head of width 64, wide SwiGLU experts, RoPE; as Mixtral."""
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": 32_000,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "max_position_embeddings": 32_768,
        **sizes,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "nemotron-mini-4b": {
        "architectures": ["NemotronForCausalLM"],
        "vocab_size": 256_000,
        "hidden_size": 3072,
        "intermediate_size": 9216,
        "num_hidden_layers": 32,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "relu2",
        "norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
        "rope_theta": 10_000.0,
        "max_position_embeddings": 4096,
    },
    "minitron-8b": {  # Mistral-NeMo-Minitron-8B
        "architectures": ["MistralForCausalLM"],
        "vocab_size": 131_072,
        "hidden_size": 4096,
        "intermediate_size": 11_520,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 1_000_000.0,
        "sliding_window": None,
        "max_position_embeddings": 131_072,
    },
    "moe-6.9b": _own_moe(  # 6.88B parameters, 1.8B active
        hidden_size=768,
        num_hidden_layers=30,
        num_attention_heads=12,
        intermediate_size=6144,
        num_local_experts=16,
        num_experts_per_tok=4,
    ),
    "moe-1b": _own_moe(  # 0.98B, 0.34B active
        hidden_size=768,
        num_hidden_layers=16,
        num_attention_heads=12,
        intermediate_size=1536,
        num_local_experts=16,
        num_experts_per_tok=4,
    ),
    "moe-150m": _own_moe(  # 153M, 75M active
        hidden_size=512,
        num_hidden_layers=12,
        num_attention_heads=8,
        intermediate_size=768,
        num_local_experts=8,
        num_experts_per_tok=2,
    ),
    "moe-tiny": _own_moe(  # minutes on two CPU cores
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=256,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=1024,
    ),
    "dense-tiny": {  # moe-tiny with one expert: a plain MLP
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 32_000,
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
        "max_position_embeddings": 1024,
    },
    "qwen2.5-7b": {
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": 152_064,
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "max_position_embeddings": 32_768,
    },
    "llama-3.1-8b": {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "max_position_embeddings": 131_072,
    },
    "smollm2-135m": {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 100_000.0,
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
    },
}


def preset_config(name: str) -> ModelConfig:
    """The ModelConfig of a preset. UsageError for an unknown name."""
    if name not in PRESETS:
        raise UsageError(f"--preset {name!r} is unknown; choose from {', '.join(PRESETS)}")
    return parse_config(ConfigReader(PRESETS[name], file=f"preset {name}"))
