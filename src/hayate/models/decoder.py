"""The decoder: pre-norm blocks of attention and MLP (dense or mixture of experts), configured by ModelConfig.

One wiring serves Llama, Mistral, Nemotron, Qwen2, Qwen3, Mixtral, OLMoE and Qwen3-MoE:

    x = x + o_proj(attention(rope(qkv_proj(norm(x)))))
    x = x + mlp(norm(x))
    logits = lm_head(norm(x))
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hayate.kernels import cpu
from hayate.kernels.embedding import embedding
from hayate.kernels.linear import linear
from hayate.models.batch import Batch
from hayate.models.config import ModelConfig
from hayate.models.layers import MLP, Attention, Linear, NormParameters, SparseMLP


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
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        return linear(x_TD, head.weight, norm=self.model.norm())


def build_model(config: ModelConfig, *, device: torch.device, dtype: torch.dtype) -> CausalLM:
    """The model with uninitialised parameters on `device` (load or `init_random` fills them)."""
    with torch.device("meta"):
        model = CausalLM(config, dtype=dtype)
    model.requires_grad_(False)
    if device.type == "cpu":
        _place_in_block(model)
    else:
        model.to_empty(device=device)
    return model.eval()


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
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 or name.endswith("proj.bias"):
            parameter.normal_(0.0, std, generator=generator)
        else:
            parameter.normal_(0.0 if name.endswith("bias") else centre, 0.05, generator=generator)
