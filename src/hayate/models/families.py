"""config.json of each supported architecture -> ModelConfig.

Every field that shapes the computation is read here. A field that would change the maths and that the decoder
does not implement is refused by name; so is a field nobody here has heard of.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hayate.checkpoint.config_json import ConfigReader
from hayate.errors import ModelError
from hayate.models.config import ModelConfig, MoEConfig
from hayate.models.quantization import read_quantization
from hayate.models.rope_config import read_rope
from hayate.models.unknown_fields import refuse_unknown_fields
from hayate.models.vision_config import read_vision

# Fields that change the maths, and the only values the decoder implements.
_ONLY: dict[str, tuple[Any, ...]] = {
    "pretraining_tp": (1, None),
    "rope_interleaved": (False, None),
    "use_mrope": (False, None),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False, None),
}
_ACTIVATIONS = {"silu": "silu_and_mul", "swish": "silu_and_mul"}


def _sizes(config: ConfigReader, *, kv_default: int | None, head_dim_default: int | None) -> dict:
    """The fields every architecture has."""
    hidden = config.require("hidden_size", int)
    heads = config.require("num_attention_heads", int)
    given = "num_key_value_heads" in config  # an explicit null means: as many as heads
    kv_heads = config.get("num_key_value_heads", int, None) if given else kv_default
    kv_heads = heads if kv_heads is None else kv_heads
    if heads < 1 or kv_heads < 1:
        raise ModelError(f"{config.where('num_key_value_heads')}: {heads} heads over {kv_heads}")
    head_dim = config.get("head_dim", int, None)
    for legacy in ("attention_head_dim", "kv_channels"):
        head_dim = head_dim or config.get(legacy, int, None)
    head_dim = head_dim or head_dim_default
    if head_dim is None:
        if hidden % heads:
            raise ModelError(
                f"{config.where('head_dim')} is missing and hidden_size {hidden} is not a multiple of "
                f"num_attention_heads {heads}"
            )
        head_dim = hidden // heads
    if heads % kv_heads:
        raise ModelError(
            f"{config.where('num_attention_heads')} is {heads}, not a multiple of num_key_value_heads {kv_heads}"
        )
    sizes = {
        "vocab_size": config.require("vocab_size", int),
        "hidden_size": hidden,
        "num_layers": config.require("num_hidden_layers", int),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "ffn_size": config.require("intermediate_size", int),
        "max_position_embeddings": config.require("max_position_embeddings", int),
        "tie_embeddings": config.get("tie_word_embeddings", bool, False),
    }
    for key, value in sizes.items():
        if not isinstance(value, bool) and value < 1:
            raise ModelError(f"{config.file}: {key} is {value}; it must be at least 1")
    return sizes


def _rms(config: ConfigReader) -> dict:
    activation = config.expect("hidden_act", tuple(_ACTIVATIONS), "silu")
    return {
        "norm": "rmsnorm",
        "norm_eps": config.get("rms_norm_eps", float, 1e-6),
        "activation": _ACTIVATIONS[activation],
    }


def _rope(config: ConfigReader, sizes: dict, **defaults: float) -> dict:
    rope = read_rope(
        config,
        head_dim=sizes["head_dim"],
        max_position_embeddings=sizes["max_position_embeddings"],
        **defaults,
    )
    return {"rope": rope}


def _biases(config: ConfigReader) -> dict:
    bias = config.get("attention_bias", bool, False)
    return {"qkv_bias": bias, "o_bias": bias}


def _one_window(config: ConfigReader, num_layers: int, default: int | None) -> dict:
    """The same window in every layer. Absent means `default`; an explicit null means none."""
    window = config.get("sliding_window", int, None) if "sliding_window" in config else default
    return {"windows": (window,) * num_layers if window else ()}


def _switched_windows(config: ConfigReader, num_layers: int, first_default: int) -> dict:
    """Qwen: `use_sliding_window`, from layer `max_window_layers` on, unless `layer_types` tells."""
    window = config.get("sliding_window", int, None) if "sliding_window" in config else 4096
    if not config.get("use_sliding_window", bool, False):
        window = None
    first = config.get("max_window_layers", int, first_default)
    types = config.get("layer_types", list, None)
    if types is None:
        types = [
            "sliding_attention" if window and i >= first else "full_attention"
            for i in range(num_layers)
        ]
    unknown = [t for t in types if t not in ("full_attention", "sliding_attention")]
    if unknown or len(types) != num_layers:
        raise ModelError(
            f"{config.where('layer_types')} must name full_attention or sliding_attention "
            f"for each of {num_layers} layers; found {len(types)} entries {sorted(set(map(str, types)))}"
        )
    windows = tuple(window if t == "sliding_attention" else None for t in types)
    return {"windows": windows if any(windows) else ()}


def _llama(config: ConfigReader) -> dict:
    sizes = _sizes(config, kv_default=None, head_dim_default=None)
    mlp_bias = config.get("mlp_bias", bool, False)
    return {
        **sizes,
        **_rms(config),
        **_rope(config, sizes),
        **_biases(config),
        "mlp_bias": mlp_bias,
    }


def _mistral(config: ConfigReader) -> dict:
    sizes = _sizes(config, kv_default=8, head_dim_default=None)
    windows = _one_window(config, sizes["num_layers"], default=4096)
    return {**sizes, **_rms(config), **_rope(config, sizes), **windows}


def _qwen2(config: ConfigReader) -> dict:
    sizes = _sizes(config, kv_default=32, head_dim_default=None)
    windows = _switched_windows(config, sizes["num_layers"], first_default=28)
    return {**sizes, **_rms(config), **_rope(config, sizes), **windows, "qkv_bias": True}


def _qwen3(config: ConfigReader) -> dict:
    sizes = _sizes(config, kv_default=32, head_dim_default=128)
    windows = _switched_windows(config, sizes["num_layers"], first_default=28)
    common = {**_rms(config), **_rope(config, sizes), **_biases(config)}
    return {**sizes, **common, **windows, "qk_norm": "head"}


def _nemotron(config: ConfigReader) -> dict:
    sizes = _sizes(config, kv_default=None, head_dim_default=None)
    config.expect("hidden_act", ("relu2",), "relu2")
    eps = 1e-5
    for key in ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"):
        eps = config.get(key, float, eps)
    fields = {"norm": "layernorm1p", "norm_eps": eps, "activation": "relu2"}
    mlp_bias = config.get("mlp_bias", bool, False)
    rope = _rope(config, sizes, default_partial=0.5)
    return {**sizes, **fields, **rope, **_biases(config), "mlp_bias": mlp_bias}


def _experts(config: ConfigReader, key: str, **fields: Any) -> MoEConfig:
    experts = config.require(key, int)
    active = config.require("num_experts_per_tok", int)
    if not 1 <= active <= experts:
        raise ModelError(
            f"{config.where('num_experts_per_tok')} is {active}; there are {experts} experts"
        )
    if fields["ffn_size"] < 1:
        raise ModelError(f"{config.file}: the experts' width is {fields['ffn_size']}, not positive")
    return MoEConfig(num_experts=experts, num_active=active, **fields)


def _mixtral(config: ConfigReader) -> dict:
    sizes = _sizes(config, kv_default=8, head_dim_default=None)
    moe = _experts(
        config,
        "num_local_experts",
        ffn_size=sizes["ffn_size"],
        renormalize=True,
        router="block_sparse_moe.gate",
        experts="block_sparse_moe.experts",
        gate="w1",
        up="w3",
        down="w2",
    )
    windows = _one_window(config, sizes["num_layers"], default=None)
    rope = _rope(config, sizes, default_theta=1e6)
    rms = {**_rms(config), "norm_eps": config.get("rms_norm_eps", float, 1e-5)}
    return {**sizes, **rms, **rope, **windows, "moe": moe}


def _olmoe(config: ConfigReader) -> dict:
    sizes = _sizes(config, kv_default=None, head_dim_default=None)
    renormalize = config.get("norm_topk_prob", bool, False)
    key = "num_local_experts" if "num_local_experts" in config else "num_experts"
    moe = _experts(config, key, ffn_size=sizes["ffn_size"], renormalize=renormalize)
    rms = {**_rms(config), "norm_eps": config.get("rms_norm_eps", float, 1e-5)}
    fields = {"qk_norm": "full", "qkv_clip": config.get("clip_qkv", float, None), "moe": moe}
    return {**sizes, **rms, **_rope(config, sizes), **_biases(config), **fields}


def _qwen3_moe(config: ConfigReader) -> dict:
    sizes = _sizes(config, kv_default=4, head_dim_default=None)
    renormalize = config.get("norm_topk_prob", bool, False)
    key = "num_local_experts" if "num_local_experts" in config else "num_experts"
    moe = _experts(
        config, key, ffn_size=config.require("moe_intermediate_size", int), renormalize=renormalize
    )
    step = config.get("decoder_sparse_step", int, 1)
    dense = set(_integers(config, "mlp_only_layers"))
    if step < 1:
        raise ModelError(f"{config.where('decoder_sparse_step')} is {step}; it must be at least 1")
    dense |= {i for i in range(sizes["num_layers"]) if (i + 1) % step}
    windows = {}
    if config.get("use_sliding_window", bool, False):
        windows = _one_window(config, sizes["num_layers"], default=4096)
    fields = {"qk_norm": "head", "moe": moe, "dense_layers": frozenset(dense)}
    return {**sizes, **_rms(config), **_rope(config, sizes), **_biases(config), **windows, **fields}


def _minicpmv(config: ConfigReader) -> dict:
    # First of all, for other versions have other fields.
    vision = read_vision(config, config.require("hidden_size", int))
    return {**_qwen2(config), "vision": vision}


FAMILIES: dict[str, Callable[[ConfigReader], dict]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "NemotronForCausalLM": _nemotron,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
    "MixtralForCausalLM": _mixtral,
    "OlmoeForCausalLM": _olmoe,
    "Qwen3MoeForCausalLM": _qwen3_moe,
    "MiniCPMV": _minicpmv,
}
_DTYPES = {"bfloat16", "float16", "float32"}


def load_config(folder: str | Path) -> ModelConfig:
    """Read `folder`/config.json.

    Raises ModelError when the file is missing or malformed, the architecture is not supported, or a field asks
    for something the decoder does not implement.
    """
    return parse_config(ConfigReader.open(Path(folder) / "config.json"))


def parse_config(config: ConfigReader) -> ModelConfig:
    """Turn an open config.json into a ModelConfig (see `load_config`)."""
    names = config.get("architectures", list, None) or []
    name = next((n for n in names if isinstance(n, str) and n in FAMILIES), None)
    if name is None:
        found = ", ".join(map(str, names)) or "nothing"
        raise ModelError(
            f"{config.where('architectures')} names {found}; hayate runs {', '.join(FAMILIES)}"
        )
    for key, allowed in _ONLY.items():
        config.expect(key, allowed, allowed[-1])
    fields = FAMILIES[name](config)
    dtype = config.get("dtype", str, None) or config.get("torch_dtype", str, None) or "bfloat16"
    if dtype not in _DTYPES:
        raise ModelError(f"{config.where('dtype')} is {dtype!r}; hayate runs {sorted(_DTYPES)}")
    # Which layers are NF4 only the tensors tell: see `runtime.loading.open_checkpoint`.
    nf4_modules = frozenset[str]() if read_quantization(config) else None
    refuse_unknown_fields(config, name)
    return ModelConfig(
        architecture=name,
        dtype=dtype,
        nf4_modules=nf4_modules,
        bos_token_id=config.get("bos_token_id", int, None),
        eos_token_ids=_token_ids(config, "eos_token_id"),
        **fields,
    )


def _token_ids(config: ConfigReader, key: str) -> tuple[int, ...]:
    value = config.get(key, (int, list), None)
    return (value,) if isinstance(value, int) else tuple(_integers(config, key))


def _integers(config: ConfigReader, key: str) -> list[int]:
    values = config.get(key, list, [])
    if not all(type(v) is int for v in values):
        raise ModelError(f"{config.where(key)} must hold integers only; it is {values}")
    return values
