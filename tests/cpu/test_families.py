"""config.json with values no model can have: refused by name, never a traceback or wrong maths."""

from __future__ import annotations

import pytest

from hayate.checkpoint.config_json import ConfigReader
from hayate.errors import ModelError
from hayate.models import PRESETS, parse_config

LLAMA = PRESETS["llama-3.1-8b"]
SCALING = LLAMA["rope_scaling"]
QWEN_MOE = {
    **PRESETS["qwen2.5-7b"],
    "architectures": ["Qwen3MoeForCausalLM"],
    "head_dim": 128,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
}


def parse(base: dict, **changes):
    return parse_config(ConfigReader({**base, **changes}, "config.json"))


@pytest.mark.parametrize(
    ("base", "changes", "named"),
    [
        (LLAMA, {"rope_scaling": None, "rope_theta": 0}, "rope_theta"),
        (LLAMA, {"rope_scaling": {**SCALING, "factor": 0}}, "factor"),
        (LLAMA, {"rope_scaling": {**SCALING, "low_freq_factor": 4.0}}, "high_freq_factor"),
        (LLAMA, {"rope_scaling": {**SCALING, "mystery": 1}}, "mystery"),
        (LLAMA, {"rope_scaling": {"rope_type": "spiral"}}, "spiral"),
        (LLAMA, {"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
        (LLAMA, {"attention_sinks": 4}, "attention_sinks"),
        (LLAMA, {"pretraining_tp": 2}, "pretraining_tp"),
        (LLAMA, {"quantization_config": {"bits": 4}}, "quantization_config"),
        (LLAMA, {"hidden_act": "gelu"}, "gelu"),
        (LLAMA, {"eos_token_id": ["2"]}, "eos_token_id"),
        (LLAMA, {"architectures": [["x"]]}, "architectures"),
        (LLAMA, {"num_key_value_heads": 5}, "num_key_value_heads"),
        (QWEN_MOE, {"decoder_sparse_step": 0}, "decoder_sparse_step"),
        (QWEN_MOE, {"mlp_only_layers": [[1]]}, "mlp_only_layers"),
        (QWEN_MOE, {"moe_intermediate_size": 0}, "width"),
        (QWEN_MOE, {"num_experts_per_tok": 9}, "num_experts_per_tok"),
    ],
)
def test_refused_by_name(base, changes, named):
    with pytest.raises(ModelError, match=named):
        parse(base, **changes)


def test_null_kv_heads_mean_as_many_as_heads():
    assert parse(PRESETS["qwen2.5-7b"], num_key_value_heads=None).num_kv_heads == 28
    assert parse(PRESETS["minitron-8b"], num_key_value_heads=None).num_kv_heads == 32


def test_head_dim_is_the_config_s():
    assert parse(PRESETS["minitron-8b"], head_dim=96).head_dim == 96


NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def test_nf4_is_read():
    """What the published checkpoints have; the fields for 8 bits change nothing."""
    saved = {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "load_in_8bit": False,
        "bnb_4bit_compute_dtype": "float16",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_use_double_quant": True,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": ["out_proj", "lm_head"],
        "llm_int8_threshold": 6.0,
    }
    assert parse(LLAMA, quantization_config={**NF4, **saved}).nf4_modules == frozenset()
    assert parse(LLAMA, quantization_config=NF4).nf4_modules == frozenset()
    assert parse(LLAMA).nf4_modules is None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quant_method is .gptq"),
        ({"load_in_8bit": True}, "load_in_8bit"),
        ({"load_in_4bit": False}, "load_in_4bit"),
        ({"bnb_4bit_quant_type": "fp4"}, "fp4"),
        ({"bnb_4bit_quant_type": None}, "bnb_4bit_quant_type"),
        ({"bnb_4bit_use_double_quant": 1}, "bnb_4bit_use_double_quant"),
        ({"bnb_4bit_compute_dtype": "int8"}, "bnb_4bit_compute_dtype"),
        ({"llm_int8_skip_modules": "lm_head"}, "llm_int8_skip_modules"),
        ({"group_size": 128}, "group_size"),
    ],
)
def test_other_quantisation_is_refused_by_name(changes, named):
    with pytest.raises(ModelError, match=f"quantization_config.*{named}"):
        parse(LLAMA, quantization_config={**NF4, **changes})
