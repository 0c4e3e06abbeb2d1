"""The operations of training: the same formulas as in `hayate.kernels`, with gradients.

Each file has the formula in PyTorch (`x_reference`, differentiated by autograd), Triton kernels for the
forward and the backward pass, and the public function. CUDA tensors take the kernels, CPU tensors what is
fastest in PyTorch; `hayate.kernels.use` forces one. No operation waits for the GPU, and shapes depend on
the number of tokens alone, so that a whole step can be captured in a CUDA graph. All sums are taken in a
fixed order: the same inputs give the same bits.
"""

from hayate.kernels.training.adamw import AdamWState, adamw_state, adamw_step
from hayate.kernels.training.attention import document_attention
from hayate.kernels.training.cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_per_token,
)
from hayate.kernels.training.elementwise import relu2, silu_and_mul
from hayate.kernels.training.experts import experts_mlp
from hayate.kernels.training.heads import split_heads
from hayate.kernels.training.norms import norm
from hayate.kernels.training.router import load_balance_loss, route, router_z_loss
from hayate.kernels.training.tensor_list import grad_norm

__all__ = [
    "AdamWState",
    "adamw_state",
    "adamw_step",
    "document_attention",
    "experts_mlp",
    "grad_norm",
    "linear_cross_entropy",
    "linear_cross_entropy_per_token",
    "load_balance_loss",
    "norm",
    "relu2",
    "route",
    "router_z_loss",
    "silu_and_mul",
    "split_heads",
]
