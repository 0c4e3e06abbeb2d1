"""A tiny MiniCPM-V 2.6 as a checkpoint folder: config, tokenizer, weights in bf16 or NF4.

Tensor names and shapes are written down here once more, from the published checkpoint, so that the loader is
tested against them and not against its own table.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from torch import Tensor

SPECIAL_TOKENS = [
    *("<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "</image>"),
    *("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<point>", "</point>"),
    *("<slice>", "</slice>", "<image_id>", "</image_id>"),
]
NUM_BYTES = 256  # ordinary tokens: one for each byte; the special ones follow in the order above
UNK_ID = NUM_BYTES
END_OF_TEXT_ID, IM_END_ID = NUM_BYTES + 1, NUM_BYTES + 3

TINY_CONFIG: dict[str, Any] = {
    "version": 2.6,
    "architectures": ["MiniCPMV"],
    "model_type": "minicpmv",
    "vocab_size": 288,  # a few more rows than tokens, as the published model has
    "hidden_size": 256,
    "intermediate_size": 320,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "max_position_embeddings": 4096,
    "max_window_layers": 2,
    "sliding_window": 131072,
    "use_sliding_window": False,
    "bos_token_id": END_OF_TEXT_ID,
    "eos_token_id": IM_END_ID,
    "torch_dtype": "bfloat16",
    "batch_vision_input": True,
    "drop_vision_last_layer": False,
    "image_size": 448,
    "patch_size": 14,
    "query_num": 8,
    "slice_mode": True,
    # Pictures of about 112 x 112 pixels, 64 patches.
    "slice_config": {
        "max_slice_nums": 9,
        "patch_size": 14,
        "scale_resolution": 112,
        "model_type": "minicpmv",
    },
    # As in the published model, heads are 72 wide, and an MLP's rows are no multiple of 64.
    "vision_config": {
        "hidden_size": 144,
        "image_size": 980,
        "intermediate_size": 208,
        "model_type": "siglip",
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "patch_size": 14,
    },
}
QUANTIZATION_CONFIG = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "_load_in_4bit": True,
    "load_in_8bit": False,
    "_load_in_8bit": False,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8",
    "llm_int8_skip_modules": ["out_proj", "kv_proj", "lm_head"],
    "llm_int8_threshold": 6.0,
    "llm_int8_has_fp16_weight": False,
    "llm_int8_enable_fp32_cpu_offload": False,
}
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the bf16 checkpoint of a model of these sizes."""
    return {**_language_shapes(config), **_encoder_shapes(config), **_resampler_shapes(config)}


def _language_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    D, F, V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = D // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"llm.model.embed_tokens.weight": (V, D)}
    for i in range(config["num_hidden_layers"]):
        layer = f"llm.model.layers.{i}."
        for name, rows in (("q", D), ("k", kv), ("v", kv)):
            shapes[f"{layer}self_attn.{name}_proj.weight"] = (rows, D)
            shapes[f"{layer}self_attn.{name}_proj.bias"] = (rows,)
        shapes |= {
            f"{layer}self_attn.o_proj.weight": (D, D),
            f"{layer}mlp.gate_proj.weight": (F, D),
            f"{layer}mlp.up_proj.weight": (F, D),
            f"{layer}mlp.down_proj.weight": (D, F),
            f"{layer}input_layernorm.weight": (D,),
            f"{layer}post_attention_layernorm.weight": (D,),
        }
    return {**shapes, "llm.model.norm.weight": (D,), "llm.lm_head.weight": (V, D)}


def _encoder_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    vision = config["vision_config"]
    E, F, p = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "vpm.embeddings.patch_embedding.weight": (E, 3, p, p),
        "vpm.embeddings.patch_embedding.bias": (E,),
        "vpm.embeddings.position_embedding.weight": ((vision["image_size"] // p) ** 2, E),
        "vpm.post_layernorm.weight": (E,),
        "vpm.post_layernorm.bias": (E,),
    }
    for i in range(vision["num_hidden_layers"]):
        layer = f"vpm.encoder.layers.{i}."
        linears = {f"self_attn.{n}_proj": (E, E) for n in ("q", "k", "v", "out")}
        for name, shape in {**linears, "mlp.fc1": (F, E), "mlp.fc2": (E, F)}.items():
            shapes[f"{layer}{name}.weight"] = shape
            shapes[f"{layer}{name}.bias"] = shape[:1]
        for name in ("layer_norm1", "layer_norm2"):
            shapes[f"{layer}{name}.weight"] = shapes[f"{layer}{name}.bias"] = (E,)
    return shapes


def _resampler_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    D, E = config["hidden_size"], config["vision_config"]["hidden_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "resampler.query": (config["query_num"], D),
        "resampler.kv_proj.weight": (D, E),
        "resampler.attn.in_proj_weight": (3 * D, D),
        "resampler.attn.in_proj_bias": (3 * D,),
        "resampler.attn.out_proj.weight": (D, D),
        "resampler.attn.out_proj.bias": (D,),
        "resampler.proj": (D, D),
    }
    for name in ("ln_q", "ln_kv", "ln_post"):
        shapes[f"resampler.{name}.weight"] = shapes[f"resampler.{name}.bias"] = (D,)
    return shapes


def is_quantised(name: str) -> bool:
    """Whether the int4 checkpoint holds this weight in NF4: `out_proj`, `kv_proj` and `lm_head` are left out,
    and what is no linear layer."""
    module, _, kind = name.rpartition(".")
    linear = module.endswith(("_proj", ".fc1", ".fc2"))
    return kind == "weight" and linear and not module.endswith(("out_proj", "kv_proj"))


def random_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Weights in bf16, large enough that every part matters: activations stay of order one."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        x = torch.randn(shape, generator=generator)
        if len(shape) > 1 and "embed_tokens" not in name and "position" not in name:
            fan_in = shape[0] if name == "resampler.proj" else x[0].numel()
            x *= 1.5 / fan_in**0.5
        elif name.endswith("bias"):
            x *= 0.2
        elif len(shape) == 1:
            x = 1 + 0.1 * x
        tensors[name] = x.to(torch.bfloat16)
    return tensors


def quantise(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The int4 form of a checkpoint as bitsandbytes writes it, and the weights it stands for; those of NF4 layers
    in fp32, before the rounding to the dtype of the computation."""
    from bitsandbytes.functional import quantize_4bit

    stored, meant = dict(tensors), dict(tensors)
    for name in filter(is_quantised, tensors):
        codes, state = quantize_4bit(tensors[name], quant_type="nf4", compress_statistics=True)
        parts = state.as_dict(packed=True)
        stored[name] = codes
        stored |= {f"{name}.{key}": value for key, value in parts.items()}
        meant[name] = _dequantised(codes, parts)
    return stored, meant


def _dequantised(codes: Tensor, parts: dict[str, Tensor]) -> Tensor:
    """Step by step, blocks counted along the flat weight (bitsandbytes on some CPUs counts them by rows)."""
    state = json.loads(bytes(parts["quant_state.bitsandbytes__nf4"].tolist()))
    halves = torch.stack([codes.flatten() >> 4, codes.flatten() & 15], dim=1).flatten()
    nested = parts["nested_quant_map"][parts["absmax"].long()]
    nested = nested * parts["nested_absmax"].repeat_interleave(256)[: len(nested)]
    scales = (nested + state["nested_offset"]).repeat_interleave(64)[: len(halves)]
    values = parts["quant_map"][halves.long()] * scales
    return values.view(state["shape"])


def tiny_config(**changes: Any) -> dict[str, Any]:
    """TINY_CONFIG with other fields; `slice_config` and `vision_config` are merged."""
    merged = {**TINY_CONFIG, **changes}
    for section in ("slice_config", "vision_config"):
        merged[section] = {**TINY_CONFIG[section], **changes.get(section, {})}
    return merged


def write_tokenizer(folder: Path) -> None:
    """One token a byte, and the special tokens; config and chat template beside it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL_TOKENS])
    assert backend.token_to_id("<unk>") == UNK_ID
    backend.save(str(folder / "tokenizer.json"))
    named = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": "<unk>"}
    fields = {**named, "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))


def write_minicpmv(
    folder: Path, *, nf4: bool = False, seed: int = 0, **changes: Any
) -> dict[str, Tensor]:
    """Write a whole checkpoint folder; returns the weights it stands for, by the names of the bf16 checkpoint.

    changes: fields of config.json (`tiny_config`).
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = tiny_config(**changes)
    stored = meant = random_tensors(config, seed)
    if nf4:
        stored, meant = quantise(stored)
        config["quantization_config"] = QUANTIZATION_CONFIG
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(
        json.dumps({"bos_token_id": END_OF_TEXT_ID, "eos_token_id": [IM_END_ID, END_OF_TEXT_ID]})
    )
    write_tokenizer(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(_preprocessor_fields(config)))
    return meant


def _preprocessor_fields(config: dict[str, Any]) -> dict[str, Any]:
    slices = config["slice_config"]
    return {
        "image_processor_type": "MiniCPMVImageProcessor",
        "max_slice_nums": slices["max_slice_nums"],
        "scale_resolution": slices["scale_resolution"],
        "patch_size": config["patch_size"],
        "use_image_id": config.get("use_image_id", True),
        "image_feature_size": config["query_num"],
        "slice_mode": config["slice_mode"],
        "norm_mean": [0.5] * 3,
        "norm_std": [0.5] * 3,
        "version": 2.6,
        "im_start": "<image>",
        "im_end": "</image>",
        "slice_start": "<slice>",
        "slice_end": "</slice>",
        "unk": "<unk>",
        "im_id_start": "<image_id>",
        "im_id_end": "</image_id>",
    }
