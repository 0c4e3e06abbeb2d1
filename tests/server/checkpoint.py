"""A tiny Llama with random weights, a byte-level tokenizer and a chat template that takes tools."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

VOCAB, WIDTH, FFN, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 264, 32, 48, 4, 2, 8, 1
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": WIDTH,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "vocab_size": VOCAB,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "dtype": "float32",
    "eos_token_id": 257,
}
TEMPLATE = (
    "{% if tools %}<tools>{% for t in tools %}{{ t | tojson }}{% endfor %}</tools>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{{ prefill or '' }}{% endif %}"
)


def write_checkpoint(folder: Path, template: str | None = TEMPLATE) -> Path:
    """The weights are so large that the text does not repeat itself."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * 0.4).astype(np.float32)

    tensors = {
        "model.embed_tokens.weight": draw(VOCAB, WIDTH),
        "lm_head.weight": draw(VOCAB, WIDTH),
        "model.norm.weight": draw(WIDTH) + 1,
    }
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        tensors |= {
            f"{name}.input_layernorm.weight": draw(WIDTH) + 1,
            f"{name}.post_attention_layernorm.weight": draw(WIDTH) + 1,
            f"{name}.self_attn.q_proj.weight": draw(HEADS * HEAD_DIM, WIDTH),
            f"{name}.self_attn.k_proj.weight": draw(KV_HEADS * HEAD_DIM, WIDTH),
            f"{name}.self_attn.v_proj.weight": draw(KV_HEADS * HEAD_DIM, WIDTH),
            f"{name}.self_attn.o_proj.weight": draw(WIDTH, HEADS * HEAD_DIM),
            f"{name}.mlp.gate_proj.weight": draw(FFN, WIDTH),
            f"{name}.mlp.up_proj.weight": draw(FFN, WIDTH),
            f"{name}.mlp.down_proj.weight": draw(WIDTH, FFN),
        }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>"}
    if template is not None:
        named["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return folder
