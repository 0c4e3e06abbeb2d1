"""`hayate upcycle`: a dense checkpoint as a mixture of experts (sparse upcycling, arXiv 2212.05055).

Each MLP is copied into E experts and every layer gets a router drawn at random. The weights of a token's active experts
sum to one and the experts are equal, so the mixture computes what the dense model computed, until training tells the
experts apart. `noise` makes them differ from the start: to each matrix of each expert is added a normal draw of `noise`
times the matrix's standard deviation.

| dense                                 | mixture              |
|---------------------------------------|----------------------|
| LlamaForCausalLM, MistralForCausalLM  | MixtralForCausalLM   |
| Qwen3ForCausalLM                      | Qwen3MoeForCausalLM  |
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hayate.checkpoint.config_json import ConfigReader
from hayate.checkpoint.writer import save
from hayate.errors import UsageError
from hayate.models.config import ModelConfig
from hayate.models.decoder import build_model
from hayate.models.families import parse_config
from hayate.models.weights import placements
from hayate.training.model_source import load_weights, model_config

_MIXTURES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"},
    "MistralForCausalLM": {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"},
    "Qwen3ForCausalLM": {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"},
}
# Fields that both sides spell alike and that are copied where they are given.
_COPIED = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "rope_scaling",
    "rope_parameters",
    "tie_word_embeddings",
    "max_position_embeddings",
)
_OTHER_FILES = ("tokenizer*", "special_tokens_map.json", "chat_template*", "generation_config.json")


def upcycle(
    source: Path,
    output: Path,
    *,
    num_experts: int = 8,
    num_active: int = 2,
    noise: float = 0.0,
    init_std: float = 0.02,
    seed: int = 0,
) -> ModelConfig:
    """Write the mixture made of the dense model in folder `source` to the new folder `output`.

    init_std: of the routers, drawn normal. Weights keep their dtype. Needs memory for the dense model, and with `noise`
    for the mixture. Returns the configuration of the mixture. Raises UsageError when an argument makes no sense, the
    model has no counterpart among the mixtures, or `output` holds a model already.
    """
    _check(output, num_experts, num_active, noise)
    fields = json.loads((source / "config.json").read_text(encoding="utf-8"))
    dense = model_config(fields)
    mixture_fields = _mixture_fields(dense, fields, num_experts, num_active)
    mixture = parse_config(ConfigReader(mixture_fields, file="config.json of the mixture"))
    _check_same(dense, mixture)
    model = build_model(dense, device=torch.device("cpu"), dtype=getattr(torch, dense.dtype))
    load_weights(model, source)
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        target, weight = name.removesuffix(".weight"), parameter.detach()
        if not target.endswith(("mlp.gate_up_proj", "mlp.down_proj")):
            weights[name] = weight
            continue
        weights[target] = _copies(weight, num_experts, noise, generator)
        if target.endswith("down_proj"):
            router = torch.randn(num_experts, dense.hidden_size, generator=generator) * init_std
            weights[target.replace("down_proj", "router.weight")] = router.to(weight.dtype)
    output.mkdir(parents=True, exist_ok=True)
    for pattern in _OTHER_FILES:
        for file in source.glob(pattern):
            shutil.copy(file, output / file.name)
    save(weights, placements(mixture), output)
    text = json.dumps(mixture_fields, indent=2, ensure_ascii=False)
    (output / "config.json").write_text(text + "\n", encoding="utf-8")
    return mixture


def _check(output: Path, num_experts: int, num_active: int, noise: float) -> None:
    if not 1 <= num_active <= num_experts:
        raise UsageError(f"--active {num_active} must be between 1 and the {num_experts} experts")
    if noise < 0:
        raise UsageError(f"--noise {noise} must be at least 0")
    if (output / "config.json").exists():
        raise UsageError(f"{output} holds a model already; remove it or name another folder")


def _mixture_fields(
    dense: ModelConfig, fields: dict[str, Any], num_experts: int, num_active: int
) -> dict[str, Any]:
    """config.json of the mixture. What is written is written in full: the families' defaults differ."""
    if dense.architecture not in _MIXTURES:
        raise UsageError(
            f"{dense.architecture} has no mixture of experts to become; upcycle takes {', '.join(_MIXTURES)}"
        )
    result = {
        **_MIXTURES[dense.architecture],
        **{key: fields[key] for key in _COPIED if key in fields},
        "vocab_size": dense.vocab_size,
        "hidden_size": dense.hidden_size,
        "intermediate_size": dense.ffn_size,
        "num_hidden_layers": dense.num_layers,
        "num_attention_heads": dense.num_heads,
        "num_key_value_heads": dense.num_kv_heads,
        "head_dim": dense.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": dense.norm_eps,
        "rope_theta": dense.rope.theta,
        "sliding_window": dense.window(0),
        "num_experts_per_tok": num_active,
        "torch_dtype": dense.dtype,
    }
    if result["model_type"] == "mixtral":
        return {**result, "num_local_experts": num_experts}
    return {
        **result,
        "num_experts": num_experts,
        "moe_intermediate_size": dense.ffn_size,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": dense.window(0) is not None,
    }


def _check_same(dense: ModelConfig, mixture: ModelConfig) -> None:
    """Refuse what the mixture's config.json cannot say, biases for example, by comparing what is read back."""
    back = dataclasses.replace(mixture, architecture=dense.architecture, moe=None)
    for field in dataclasses.fields(ModelConfig):
        ours, theirs = getattr(dense, field.name), getattr(back, field.name)
        if ours != theirs:
            raise UsageError(
                f"{mixture.architecture} cannot express {field.name} = {ours} of this {dense.architecture}; "
                "such a model cannot be upcycled"
            )


def _copies(weight: Tensor, num_experts: int, noise: float, generator: torch.Generator) -> Tensor:
    """(E, ...): views of one matrix, or E that differ a little."""
    stacked = weight.expand(num_experts, *weight.shape)
    if not noise:
        return stacked
    draws = torch.randn(stacked.shape, generator=generator)
    return (stacked.float() + noise * weight.float().std() * draws).to(weight.dtype)
