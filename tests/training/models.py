"""Tiny random checkpoints, written by transformers, with the tokenizer of the tests' data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hayate.training.tokenizer_training import train_tokenizer
from tests.training.runs import TEXTS, VOCAB

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_OWN: dict[str, dict[str, Any]] = {
    "llama": {"rms_norm_eps": 1e-6, "tie_word_embeddings": True, "rope_theta": 20_000.0},
    "mistral": {"sliding_window": 24},
    "qwen2": {},
    "qwen3": {"tie_word_embeddings": True},
    "nemotron": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 96,
        "norm_topk_prob": True,
    },
}
ARCHITECTURES = tuple(_OWN)


def write_model(folder: Path, kind: str, **fields: Any) -> Path:
    """A model of architecture `kind` in fp32, its weights so large that logits differ by several units."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**_SIZES, **_OWN[kind], **fields})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    model.save_pretrained(folder)
    train_tokenizer(TEXTS, folder, vocab_size=VOCAB)
    return folder
