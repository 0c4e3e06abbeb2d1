"""Full-size architectures by name, for benchmarks on random weights and for training from nothing.

Each entry is the config.json of the model it is named after.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from hayate.checkpoint.config_json import ConfigReader
from hayate.errors import UsageError
from hayate.models.config import ModelConfig
from hayate.models.decoder import meta_model
from hayate.models.families import parse_config
from hayate.models.quantization import linear_names


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


_MINICPM_V: dict[str, Any] = {
    "architectures": ["MiniCPMV"],
    "version": 2.6,
    "vocab_size": 151_666,
    "hidden_size": 3584,
    "intermediate_size": 18_944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": False,
    "max_position_embeddings": 32_768,
    "drop_vision_last_layer": False,
    "patch_size": 14,
    "query_num": 64,
    "slice_config": {"max_slice_nums": 9, "patch_size": 14},
    "vision_config": {
        "model_type": "siglip",
        "hidden_size": 1152,
        "image_size": 980,
        "intermediate_size": 4304,
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
    },
    "bos_token_id": 151_643,
    "eos_token_id": 151_645,
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
    "minicpm-v-2.6": _MINICPM_V,
    "minicpm-v-2.6-int4": {
        **_MINICPM_V,
        "quantization_config": {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": "bfloat16",
            "llm_int8_skip_modules": ["out_proj", "kv_proj", "lm_head"],
        },
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
    """The ModelConfig of a preset. UsageError for an unknown name.

    Of a quantised one every linear layer is NF4 that its publisher does not skip: no tensors tell which.
    """
    if name not in PRESETS:
        raise UsageError(f"--preset {name!r} is unknown; choose from {', '.join(PRESETS)}")
    config = parse_config(ConfigReader(PRESETS[name], file=f"preset {name}"))
    if config.nf4_modules is None:
        return config
    skipped = PRESETS[name]["quantization_config"]["llm_int8_skip_modules"]
    modules = linear_names(meta_model(config, dtype=torch.bfloat16))
    wanted = frozenset(m for m in modules if m.rpartition(".")[2] not in skipped)
    return dataclasses.replace(config, nf4_modules=wanted)
