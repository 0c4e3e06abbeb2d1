"""The operations, each with a reference, a Triton kernel and the choice between them.

Everything public is here by name (`from hayate.kernels import linear`). A function may have the
name of its file; then the attribute of the package is the function.
"""

from hayate.kernels._dispatch import Implementation, batch_invariant, implementation_for, use
from hayate.kernels.attention import attention, attention_scores
from hayate.kernels.elementwise import add, gelu_tanh, mul, relu2, scale, silu, silu_and_mul
from hayate.kernels.embedding import embedding
from hayate.kernels.encoder_attention import encoder_attention
from hayate.kernels.image_resize import image_patches
from hayate.kernels.linear import Activation, gemm, gemm_batched, gemv, linear
from hayate.kernels.moe import moe_mlp, moe_route
from hayate.kernels.nf4 import (
    NF4Weight,
    nf4_dequantize,
    nf4_linear,
    nf4_pack,
    nf4_quantize,
)
from hayate.kernels.norm import Norm, apply_norm, layernorm, layernorm1p, rmsnorm, rmsnorm_residual
from hayate.kernels.rope import rope, rope_and_cache, rope_freqs
from hayate.kernels.sampling import advance_decode, argmax, sample
from hayate.kernels.softmax import softmax, softmax_topk
from hayate.kernels.token_mask import apply_token_mask

__all__ = [
    "Activation",
    "Implementation",
    "NF4Weight",
    "Norm",
    "add",
    "advance_decode",
    "apply_norm",
    "apply_token_mask",
    "argmax",
    "attention",
    "attention_scores",
    "batch_invariant",
    "embedding",
    "encoder_attention",
    "gelu_tanh",
    "gemm",
    "gemm_batched",
    "gemv",
    "image_patches",
    "implementation_for",
    "layernorm",
    "layernorm1p",
    "linear",
    "moe_mlp",
    "moe_route",
    "mul",
    "nf4_dequantize",
    "nf4_linear",
    "nf4_pack",
    "nf4_quantize",
    "relu2",
    "rmsnorm",
    "rmsnorm_residual",
    "rope",
    "rope_and_cache",
    "rope_freqs",
    "sample",
    "scale",
    "silu",
    "silu_and_mul",
    "softmax",
    "softmax_topk",
    "use",
]
