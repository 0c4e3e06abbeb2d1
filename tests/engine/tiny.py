"""A model of random weights so small that a step takes about a millisecond."""

from __future__ import annotations

from typing import Any, TypeVar

from hayate.checkpoint.config_json import ConfigReader
from hayate.models.decoder import init_random
from hayate.models.families import parse_config
from hayate.runtime.loaded_model import LoadedModel

TINY = parse_config(
    ConfigReader(
        {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 320,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10_000.0,
            "max_position_embeddings": 1024,
            "torch_dtype": "float32",
        },
        "tiny",
    )
)
KV_BYTES_PER_TOKEN = TINY.kv_bytes_per_token(4)

_M = TypeVar("_M", bound=LoadedModel)


def tiny(kind: type[_M], **options: Any) -> _M:
    """A tiny `LLM` or `AsyncLLM` in fp32 on the CPU, its weights so large that the text does not repeat itself."""
    model = kind.from_random(TINY, **{"device": "cpu", "kv_memory": 2**24, **options})
    init_random(model.engine.runner.model, std=0.25)
    return model
