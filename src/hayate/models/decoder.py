"""The decoder: pre-norm blocks of attention and MLP (dense or mixture of experts), configured by ModelConfig.

One wiring serves Llama, Mistral, Nemotron, Qwen2, Qwen3, Mixtral, OLMoE and Qwen3-MoE:

    x = x + o_proj(attention(rope(qkv_proj(norm(x)))))
    x = x + mlp(norm(x))
    logits = lm_head(norm(x))
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from hayate.kernels import cpu
from hayate.kernels.embedding import embedding
from hayate.kernels.linear import linear
from hayate.kernels.nf4 import nf4_pack
from hayate.models.batch import Batch
from hayate.models.config import ModelConfig
from hayate.models.layers import MLP, Attention, Linear, NormParameters, SparseMLP
from hayate.models.quantization import dense_parameters, nf4_linears, replace_linears

_NF4_STD = 0.517  # root mean square of NF4's 16 values


class Embedding(nn.Module):
    def __init__(self, num_rows: int, size: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, size, dtype=dtype))

    def forward(self, token_ids: Tensor) -> Tensor:
        return embedding(token_ids, self.weight)


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        D, kind, eps = config.hidden_size, config.norm, config.norm_eps
        self.input_layernorm = NormParameters(D, kind, eps, dtype=dtype)
        self.self_attn = Attention(config, layer, dtype=dtype)
        self.post_attention_layernorm = NormParameters(D, kind, eps, dtype=dtype)
        self.mlp: MLP | SparseMLP
        if config.moe is not None and config.is_sparse(layer):
            self.mlp = SparseMLP(config, config.moe, dtype=dtype)
        else:
            self.mlp = MLP(config, dtype=dtype)

    def forward(self, x_TD: Tensor, batch: Batch) -> Tensor:
        x_TD = self.self_attn(x_TD, self.input_layernorm(), batch)
        return self.mlp(x_TD, self.post_attention_layernorm())


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype=dtype)
        self.layers = nn.ModuleList(
            DecoderLayer(config, i, dtype=dtype) for i in range(config.num_layers)
        )
        self.norm = NormParameters(config.hidden_size, config.norm, config.norm_eps, dtype=dtype)

    def forward(self, batch: Batch) -> Tensor:
        x_TD = self.embed_tokens(batch.token_ids)
        if batch.embedding_rows is not None:
            assert batch.embedding_values is not None
            x_TD.index_copy_(0, batch.embedding_rows, batch.embedding_values)
        for layer in self.layers:
            x_TD = layer(x_TD, batch)
        return x_TD


class CausalLM(nn.Module):
    """Decoder and LM head. With tied embeddings the head reads the embedding table."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config, dtype=dtype)
        self.lm_head = (
            None
            if config.tie_embeddings
            else Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype)
        )

    def forward(self, batch: Batch) -> Tensor:
        """Logits (R, V) of `batch.output_rows`, in the model's dtype. Writes this step's keys and values."""
        x_TD = self.model(batch)
        if batch.output_rows is not None:
            x_TD = x_TD.index_select(0, batch.output_rows)
        if self.lm_head is None:
            return linear(x_TD, self.model.embed_tokens.weight, norm=self.model.norm())
        logits: Tensor = self.lm_head(x_TD, norm=self.model.norm())
        return logits


def meta_model(config: ModelConfig, *, dtype: torch.dtype) -> CausalLM:
    """The model of `config` on the meta device: names, shapes and dtypes, no memory."""
    with torch.device("meta"):
        if config.vision is None:
            model = CausalLM(config, dtype=dtype)
        else:
            from hayate.models.minicpmv import MiniCPMV  # it is made of the decoder

            # The engine calls it with batches and reads its config, as those of any causal LM.
            model = cast(CausalLM, MiniCPMV(config, dtype=dtype))
        replace_linears(model, config.nf4_modules or ())
    return model


def build_model(config: ModelConfig, *, device: torch.device, dtype: torch.dtype) -> CausalLM:
    """The model with uninitialised parameters on `device` (load or `init_random` fills them)."""
    model = meta_model(config, dtype=dtype)
    materialize(model, device)
    return model


def materialize(model: nn.Module, device: torch.device) -> None:
    """Give the parameters of a model on the meta device memory on `device`; it is ready for inference then."""
    model.requires_grad_(False)
    if device.type == "cpu":
        _place_in_block(model)
    else:
        model.to_empty(device=device)
    model.eval()


def _place_in_block(model: nn.Module) -> None:
    """Give all parameters memory in one block of huge pages: decoding reads it a quarter faster."""
    owners = [
        (m, name)
        for m in model.modules()
        for name in m._parameters
        if m._parameters[name] is not None
    ]
    shapes = [(p.shape, p.dtype) for m, name in owners if (p := m._parameters[name]) is not None]
    for (module, name), tensor in zip(owners, cpu.empty_block(shapes), strict=True):
        module._parameters[name] = nn.Parameter(tensor, requires_grad=False)


@torch.no_grad()
def init_random(model: CausalLM, seed: int = 0, std: float = 0.02) -> None:
    """Fill parameters for benchmarks and tests: matrices from a normal distribution, norms near identity."""
    device = next(model.parameters()).device
    generator = torch.Generator(device=device).manual_seed(seed)
    centre = 0.0 if model.config.norm == "layernorm1p" else 1.0
    for name, parameter in dense_parameters(model).items():
        if parameter.dim() > 1 or name.endswith("proj.bias"):
            parameter.normal_(0.0, std, generator=generator)
        else:
            parameter.normal_(0.0 if name.endswith("bias") else centre, 0.05, generator=generator)
    for layer in nf4_linears(model).values():
        n, k = layer.packed.shape
        codes = torch.empty(n * k // 2, dtype=torch.uint8, device=device)
        absmax = torch.full((-(-n * k // 64),), std / _NF4_STD, device=device)
        layer.fill(nf4_pack(codes.random_(generator=generator), absmax, n, k))
