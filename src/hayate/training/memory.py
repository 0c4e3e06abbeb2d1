"""How much memory a run takes, before anything is allocated."""

from __future__ import annotations

from hayate.models.config import ModelConfig
from hayate.training.config import TrainConfig

_MOMENT_BYTES = {"float32": 8.0, "bfloat16": 4.0, "int8": 2.0 + 8 / 256}


def memory_plan(model: ModelConfig, config: TrainConfig) -> dict[str, int]:
    """Bytes by purpose for one process: exact for weights, gradients and optimizer, an estimate for activations.

    Activations: what the backward pass keeps of one micro-batch, a layer: inputs of the norms, queries, keys, values
    and output of attention, and the pre-activation of the MLP; with recomputation, what remains of that.
    """
    element = 2 if config.precision.dtype == "bfloat16" else 4
    n = model.num_parameters
    master = 4 * n if element == 2 and config.precision.master == "float32" else 0
    tokens = config.batch.tokens_per_micro_batch
    D, attention = model.hidden_size, model.qkv_size + model.num_heads * model.head_dim
    mlp = 0
    for layer in range(model.num_layers):
        if model.moe is not None and model.is_sparse(layer):
            mlp += model.moe.num_active * (2 * model.moe.ffn_size + D)
        else:
            mlp += (2 if model.activation == "silu_and_mul" else 1) * model.ffn_size
    residual = model.num_layers * 2 * D
    kept = {
        "none": residual + model.num_layers * (attention + 2 * D) + mlp,
        "selective": residual + model.num_layers * (attention + 2 * D),
        "full": model.num_layers * D,
    }[config.precision.recompute]
    return {
        "weights": element * n,
        "gradients": element * n,
        "fp32 master weights": master,
        "moments": int(_MOMENT_BYTES[config.precision.moments] * n),
        "activations (estimate)": tokens * kept * element,
    }
