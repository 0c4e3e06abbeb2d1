"""The leaf modules: each owns parameters under the checkpoint's names and calls one kernel."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from hayate.kernels.decode_attention import Projection
from hayate.kernels.linear import Activation, linear
from hayate.kernels.moe import moe_mlp, moe_route
from hayate.kernels.nf4 import NF4Weight, nf4_linear, nf4_pack
from hayate.kernels.norm import Norm, NormKind
from hayate.kernels.self_attention import self_attention
from hayate.models.batch import Batch
from hayate.models.config import ModelConfig, MoEConfig


class Linear(nn.Module):
    """`residual + act(norm(x) @ weight.T + bias)`; weight (N, D) as in the checkpoint."""

    def __init__(self, in_size: int, out_size: int, *, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_size, in_size, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_size, dtype=dtype)) if bias else None

    def forward(
        self,
        x: Tensor,
        *,
        norm: Norm | None = None,
        activation: Activation | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        return linear(
            x,
            self.weight,
            self.bias,
            norm=norm,
            activation=activation,
            residual=residual,
            # The residual stream is only read by its next block; autograd needs it whole.
            overwrite_residual=not torch.is_grad_enabled(),
        )


class NF4Linear(nn.Module):
    """`Linear` with its weight in 4 bits, as `kernels.nf4` packs it; `in_size` a multiple of 16."""

    def __init__(self, in_size: int, out_size: int, *, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_size = in_size
        codes, scales, self.block = _nf4_row(in_size)
        self.codes = nn.Parameter(
            torch.empty(out_size, codes, dtype=torch.uint8), requires_grad=False
        )
        self.scales = nn.Parameter(torch.empty(out_size, scales), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_size, dtype=dtype)) if bias else None

    @property
    def packed(self) -> NF4Weight:
        return NF4Weight(self.codes, self.scales, self.block, self.in_size)

    def fill(self, weight: NF4Weight, first_row: int = 0) -> None:
        """Take `weight` as the rows from `first_row` on."""
        rows = slice(first_row, first_row + weight.shape[0])
        self.codes[rows].copy_(weight.codes)
        self.scales[rows].copy_(weight.scales)

    def forward(
        self,
        x: Tensor,
        *,
        norm: Norm | None = None,
        activation: Activation | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        return nf4_linear(
            x,
            self.packed,
            self.bias,
            norm=norm,
            activation=activation,
            residual=residual,
            overwrite_residual=not torch.is_grad_enabled(),
        )


@cache
def _nf4_row(in_size: int) -> tuple[int, int, int]:
    """Bytes of codes and number of scales in a packed row, and the values a scale is for."""
    codes = torch.zeros(in_size // 2, dtype=torch.uint8, device="cpu")
    row = nf4_pack(codes, torch.zeros(-(-in_size // 64), device="cpu"), 1, in_size)
    return row.codes.shape[1], row.scales.shape[1], row.block


class NormParameters(nn.Module):
    """Weight (and bias) of a norm. It is applied inside the operation that follows it."""

    def __init__(self, size: int, kind: NormKind, eps: float, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.kind: NormKind = kind
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype))
        self.bias = None if kind == "rmsnorm" else nn.Parameter(torch.empty(size, dtype=dtype))

    def forward(self) -> Norm:
        return Norm(self.kind, self.weight, self.bias, self.eps)


class Attention(nn.Module):
    """Causal attention over the paged cache; q, k and v are one projection."""

    def __init__(self, config: ModelConfig, layer: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        self.window = config.window(layer)
        D, HK = config.hidden_size, config.num_heads * config.head_dim
        GK = config.num_kv_heads * config.head_dim
        self.qkv_proj = Linear(D, config.qkv_size, bias=config.qkv_bias, dtype=dtype)
        self.o_proj = Linear(HK, D, bias=config.o_bias, dtype=dtype)
        if config.qk_norm is not None:
            q_size, k_size = (config.head_dim,) * 2 if config.qk_norm == "head" else (HK, GK)
            self.q_norm = NormParameters(q_size, "rmsnorm", config.norm_eps, dtype=dtype)
            self.k_norm = NormParameters(k_size, "rmsnorm", config.norm_eps, dtype=dtype)

    def forward(self, x_TD: Tensor, norm: Norm, batch: Batch) -> Tensor:
        c = self.config
        k_cache, v_cache = batch.k_caches[self.layer], batch.v_caches[self.layer]
        qkv = self.qkv_proj(x_TD, norm=norm)  # (T, (H + 2 G) K)
        out_THK = self_attention(
            qkv,
            k_cache,
            v_cache,
            batch.page_table,
            batch.cu_seqlens_q,
            batch.seq_lens,
            Projection(
                batch.slots,
                batch.rope_rows,
                batch.cos_sin,
                q_norm=self.q_norm() if c.qk_norm else None,
                k_norm=self.k_norm() if c.qk_norm else None,
                clip=c.qkv_clip,
            ),
            max_seqlen_q=batch.max_seqlen_q,
            max_seqlen_k=batch.max_seqlen_k,
            scale=c.head_dim**-0.5,
            window=self.window,
            num_decode=batch.num_decode,
        )
        return self.o_proj(out_THK.flatten(1), residual=x_TD)


class MLP(nn.Module):
    """SwiGLU (gate and up are one projection) or squared ReLU."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype) -> None:
        super().__init__()
        D, F, bias = config.hidden_size, config.ffn_size, config.mlp_bias
        self.activation = config.activation
        if config.activation == "silu_and_mul":
            self.gate_up_proj = Linear(D, 2 * F, bias=bias, dtype=dtype)
        else:
            self.up_proj = Linear(D, F, bias=bias, dtype=dtype)
        self.down_proj = Linear(F, D, bias=bias, dtype=dtype)

    def forward(self, x_TD: Tensor, norm: Norm) -> Tensor:
        up = self.gate_up_proj if self.activation == "silu_and_mul" else self.up_proj
        h_TF = up(x_TD, norm=norm, activation=self.activation)
        return self.down_proj(h_TF, residual=x_TD)


class SparseMLP(nn.Module):
    """Mixture of SwiGLU experts, stacked: gate_up (E, 2F, D), down (E, D, F)."""

    def __init__(self, config: ModelConfig, moe: MoEConfig, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.moe = moe
        E, D, F = moe.num_experts, config.hidden_size, moe.ffn_size
        self.router = Linear(D, E, bias=False, dtype=dtype)
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * F, D, dtype=dtype))
        self.down_proj = nn.Parameter(torch.empty(E, D, F, dtype=dtype))

    def forward(self, x_TD: Tensor, norm: Norm) -> Tensor:
        weights_TA, experts_TA = moe_route(
            x_TD,
            self.router.weight,
            norm=norm,
            num_active=self.moe.num_active,
            renormalize=self.moe.renormalize,
        )
        return moe_mlp(
            x_TD, norm, weights_TA, experts_TA, self.gate_up_proj, self.down_proj, residual=x_TD
        )
