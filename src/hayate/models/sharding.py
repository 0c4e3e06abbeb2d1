"""Tensor parallelism: which part of the model each of N processes owns, and the model made of these parts.

| weight                    | split by        | a process has                                                       |
|---------------------------|-----------------|---------------------------------------------------------------------|
| q, k, v                   | rows: heads     | H / N heads and G / N key-value heads; where N is a multiple of G,  |
|                           |                 | one key-value head, the same on N / G processes                     |
| gate, up; also of experts | rows: F         | a part of the hidden units                                          |
| o_proj, down_proj         | columns         | a summand of the output, which `all_reduce` completes               |
| embedding, LM head        | rows: V         | a part of the vocabulary                                            |
| norms, router             | not             | all of it                                                           |

The residual stream is the same on all processes. Of every layer, attention and MLP each end with a sum over the
processes (Shoeybi et al., "Megatron-LM", 2019), to which rank 0 adds the residual and the bias; so do the embedding,
and the logits are gathered: 2 L + 1 sums and a concatenation a step.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hayate.checkpoint.placements import Placement, box_of, complete
from hayate.errors import UsageError
from hayate.kernels.all_reduce import Communicator
from hayate.kernels.moe import moe_mlp, moe_route
from hayate.kernels.norm import Norm
from hayate.models.batch import Batch
from hayate.models.config import ModelConfig, MoEConfig
from hayate.models.decoder import CausalLM, DecoderLayer, Embedding, materialize
from hayate.models.layers import MLP, Linear, NormParameters, SparseMLP

_BLOCKS = (32, 16, 8, 4, 2, 1)  # rows or columns that stay together; kernels read 16 bytes at once

Range = tuple[int, int]  # [start, stop)


class Shard(NamedTuple):
    """Process `rank` of `size`."""

    rank: int
    size: int

    def part(self, count: int) -> Range:
        """Its part of `count` units, in whole blocks; the first processes may have a block more than the last."""
        return split(count, self.size)[self.rank]


class Split(NamedTuple):
    """A process's part of a parameter: `ranges` of dimension `dim`, one after the other."""

    dim: int
    ranges: tuple[Range, ...]


def split(count: int, size: int) -> list[Range]:
    """`count` units over `size` processes, as equal as whole blocks of them allow; the larger parts first.

    A block is the largest of 32, 16, ..., 1 units that makes all parts equal; where none does, the largest that divides
    `count` and gives everybody one.
    """
    even = (b for b in _BLOCKS if count % (b * size) == 0)
    uneven = (b for b in _BLOCKS if count % b == 0 and count // b >= size)
    block = next(even, None) or next(uneven, 1)
    blocks, extra = divmod(count // block, size)
    ends = [(blocks * (rank + 1) + min(rank + 1, extra)) * block for rank in range(size)]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def check_shardable(config: ModelConfig, size: int) -> None:
    """UsageError, naming what stands in the way, unless `size` processes can share the model."""

    def refuse(why: str) -> UsageError:
        return UsageError(f"--tensor-parallel {size}: {why}")

    H, G = config.num_heads, config.num_kv_heads
    if size < 1:
        raise refuse("it must be at least 1")
    if size == 1:
        return
    if config.vision is not None:
        raise refuse("a model that takes images runs on one GPU only")
    if config.nf4_modules:
        raise refuse("an NF4 checkpoint runs on one GPU only; use the checkpoint it was made from")
    if config.qk_norm == "full":
        raise refuse(
            f"{config.architecture} normalises the queries and the keys of all heads together, which cannot be split"
        )
    if H % size:
        raise refuse(f"the {H} attention heads cannot be split equally; use a divisor of {H}")
    if G % size and size % G:
        raise refuse(
            f"the {G} key-value heads cannot be split over the processes, nor these over the heads; use a divisor or "
            f"a multiple of {G} that divides {H}"
        )
    widths = [("vocabulary", config.vocab_size)]
    if any(not config.is_sparse(layer) for layer in range(config.num_layers)):
        widths.append(("hidden units of the MLP", config.ffn_size))
    if config.moe is not None:
        widths.append(("hidden units of an expert", config.moe.ffn_size))
    for what, width in widths:
        if any(start == stop for start, stop in split(width, size)):
            raise refuse(f"the {what} ({width}) cannot be split over so many processes")


def local_config(config: ModelConfig, shard: Shard) -> ModelConfig:
    """What `shard` computes, as a model of its own: fewer heads, narrower MLPs, a part of the vocabulary."""
    if shard.size == 1:
        return config
    moe, first, last = config.moe, *shard.part(config.vocab_size)
    return dataclasses.replace(
        config,
        num_heads=config.num_heads // shard.size,
        num_kv_heads=max(config.num_kv_heads // shard.size, 1),
        ffn_size=_length(shard.part(config.ffn_size)),
        vocab_size=last - first,
        moe=moe and dataclasses.replace(moe, ffn_size=_length(shard.part(moe.ffn_size))),
    )


def shard_placements(
    config: ModelConfig,
    shard: Shard,
    parameters: Mapping[str, Tensor],
    placements: Sequence[Placement],
) -> list[Placement]:
    """Where each tensor of the checkpoint goes in the model of `shard`, and which part of it.

    parameters, placements: those of the whole model; of the parameters only the shapes count.
    """
    splits = [(re.compile(pattern), part) for pattern, part in _splits(config, shard).items()]
    found = []
    for placement in complete(parameters, placements):
        part = next((s for p, s in splits if p.fullmatch(placement.target)), _WHOLE)
        if part is _WHOLE:
            found.append(placement)
        elif part is not None:
            found += _intersect(placement, parameters[placement.target].shape, part)
    return found


_WHOLE = Split(0, ())


def _splits(config: ModelConfig, shard: Shard) -> dict[str, Split | None]:
    """Regular expressions of parameter names; None: this process has no such parameter. Others it has as a whole."""
    (v0, v1), (f0, f1) = shard.part(config.vocab_size), shard.part(config.ffn_size)
    K = config.head_dim
    F, HK, GK = config.ffn_size, config.num_heads * K, config.num_kv_heads * K
    h = HK // shard.size
    heads = (shard.rank * h, (shard.rank + 1) * h)
    g = max(config.num_kv_heads // shard.size, 1) * K
    g0 = shard.rank * config.num_kv_heads // shard.size * K
    qkv = (heads, (HK + g0, HK + g0 + g), (HK + GK + g0, HK + GK + g0 + g))
    splits: dict[str, Split | None] = {
        r"model\.embed_tokens\.weight|lm_head\.weight": Split(0, ((v0, v1),)),
        r".*\.self_attn\.qkv_proj\.(weight|bias)": Split(0, qkv),
        r".*\.self_attn\.o_proj\.weight": Split(1, (heads,)),
        r".*\.mlp\.gate_up_proj\.(weight|bias)": Split(0, ((f0, f1), (F + f0, F + f1))),
        r".*\.mlp\.up_proj\.(weight|bias)": Split(0, ((f0, f1),)),
        r".*\.mlp\.down_proj\.weight": Split(1, ((f0, f1),)),
    }
    if config.moe is not None:
        F, (f0, f1) = config.moe.ffn_size, shard.part(config.moe.ffn_size)
        splits[r".*\.mlp\.gate_up_proj"] = Split(1, ((f0, f1), (F + f0, F + f1)))
        splits[r".*\.mlp\.down_proj"] = Split(2, ((f0, f1),))
    if shard.rank:  # rank 0 adds the bias
        splits[r".*\.(self_attn\.o_proj|mlp\.down_proj)\.bias"] = None
    return splits


def _intersect(placement: Placement, shape: Sequence[int], part: Split) -> list[Placement]:
    """What of `placement` lies in `part` of a parameter of `shape`."""
    dim, index = part.dim, placement.index
    first, last = box_of(index, shape)[dim]
    index = (*index, *(slice(0, size) for size in shape[len(index) : dim + 1]))
    source_dim = sum(isinstance(i, slice) for i in index[:dim])
    found, offset = [], 0
    for start, stop in part.ranges:
        low, high = max(start, first), min(stop, last)
        if low < high:
            here = slice(offset + low - start, offset + high - start)
            there = (*[slice(None)] * source_dim, slice(low - first, high - first))
            new = (*index[:dim], here, *index[dim + 1 :])
            found.append(Placement(placement.source, placement.target, new, there))
        offset += stop - start
    return found


class RowParallelLinear(Linear):
    """`Linear` of some of the input's columns; residual and bias, which rank 0 adds, are those of the whole."""

    def __init__(
        self, in_size: int, out_size: int, *, bias: bool, dtype: torch.dtype, group: Communicator
    ) -> None:
        super().__init__(in_size, out_size, bias=bias and group.rank == 0, dtype=dtype)
        self.group = group

    @classmethod
    def like(cls, linear: Linear, group: Communicator) -> RowParallelLinear:
        """In place of `linear`, which is on the meta device."""
        (out_size, in_size), dtype = linear.weight.shape, linear.weight.dtype
        return cls(in_size, out_size, bias=linear.bias is not None, dtype=dtype, group=group)

    def forward(self, x: Tensor, *, residual: Tensor | None = None, **options: object) -> Tensor:
        assert not options, "a sum's summand has no norm and no activation"
        return self.group.all_reduce(
            super().forward(x, residual=residual if self.group.rank == 0 else None)
        )


class ShardedSparseMLP(SparseMLP):
    """`SparseMLP` with a part of every expert's hidden units."""

    def __init__(
        self, config: ModelConfig, moe: MoEConfig, *, dtype: torch.dtype, group: Communicator
    ) -> None:
        super().__init__(config, moe, dtype=dtype)
        self.group = group

    def forward(self, x_TD: Tensor, norm: Norm) -> Tensor:
        weights_TA, experts_TA = moe_route(
            x_TD,
            self.router.weight,
            norm=norm,
            num_active=self.moe.num_active,
            renormalize=self.moe.renormalize,
        )
        residual = x_TD if self.group.rank == 0 else torch.zeros_like(x_TD)
        return self.group.all_reduce(
            moe_mlp(
                x_TD,
                norm,
                weights_TA,
                experts_TA,
                self.gate_up_proj,
                self.down_proj,
                residual=residual,
            )
        )


class ShardedEmbedding(Embedding):
    """The rows [first, first + num_rows) of the table."""

    def __init__(
        self, num_rows: int, size: int, *, dtype: torch.dtype, first: int, group: Communicator
    ) -> None:
        super().__init__(num_rows, size, dtype=dtype)
        self.first, self.group = first, group

    def forward(self, token_ids: Tensor) -> Tensor:
        row = token_ids - self.first
        elsewhere = (row < 0) | (row >= len(self.weight))
        x_TD = super().forward(row.masked_fill(elsewhere, 0))
        return self.group.all_reduce(x_TD.masked_fill_(elsewhere[:, None], 0))


class ShardedCausalLM(CausalLM):
    """The part of a decoder that one process owns. Its logits are those of the whole vocabulary, on every process.

    config: of the whole model; the attribute `config` is that of the part, by which its KV cache is made.
    """

    def __init__(self, config: ModelConfig, group: Communicator, *, dtype: torch.dtype) -> None:
        shard = Shard(group.rank, group.size)
        local = local_config(config, shard)
        super().__init__(local, dtype=dtype)
        self.group = group
        self.vocabulary = [stop - start for start, stop in split(config.vocab_size, group.size)]
        first, _ = shard.part(config.vocab_size)
        self.model.embed_tokens = ShardedEmbedding(
            local.vocab_size, local.hidden_size, dtype=dtype, first=first, group=group
        )
        for layer in self.model.layers:
            assert isinstance(layer, DecoderLayer)
            layer.self_attn.o_proj = RowParallelLinear.like(layer.self_attn.o_proj, group)
            if isinstance(layer.mlp, MLP):
                layer.mlp.down_proj = RowParallelLinear.like(layer.mlp.down_proj, group)
            else:
                layer.mlp = ShardedSparseMLP(local, layer.mlp.moe, dtype=dtype, group=group)

    def forward(self, batch: Batch) -> Tensor:
        """Logits (R, V), as `CausalLM.forward`."""
        return self.group.all_gather(super().forward(batch), self.vocabulary)

    @torch.no_grad()
    def synchronize(self) -> None:
        """Give every process rank 0's values of what is not split: after random initialisation."""
        for module in self.modules():
            if isinstance(module, NormParameters):
                for parameter in module.parameters(recurse=False):
                    self.group.broadcast(parameter)
            elif isinstance(module, SparseMLP):
                self.group.broadcast(module.router.weight)


def build_sharded(
    config: ModelConfig, group: Communicator, *, device: torch.device, dtype: torch.dtype
) -> ShardedCausalLM:
    """This process's part of the model of `config`, with uninitialised parameters on `device`."""
    with torch.device("meta"):
        model = ShardedCausalLM(config, group, dtype=dtype)
    materialize(model, device)
    return model


def _length(part: Range) -> int:
    return part[1] - part[0]
