"""The loss of a step, as a sum over micro-batches that does not depend on how the step was cut.

    loss = sum of -log p(target) / targets of the whole step
         + aux * mean over layers of the load-balancing loss     (arXiv 2101.03961; 1 when balanced)
         + z * mean over layers of mean(logsumexp(router logits)^2)          (arXiv 2202.08906)

The load-balancing loss multiplies, for each expert, the share f of tokens sent to it with its mean probability P;
gradients flow through P only. Over which tokens f is counted is `balance`:

    sequence    over each sequence by itself, the mean taken over sequences (as DeepSeek-V3's complementary loss)
    global      over the whole step before this one, all processes together: a step's own counts are known only when
                its last micro-batch has been routed. Experts may so specialise within a sequence (arXiv 2501.11873)
    bias        no loss; after each step a bias that takes part in the choice of experts, and in nothing else, moves
                by `bias_rate` against the sign of each expert's excess load (arXiv 2408.15664)
    none

A micro-batch contributes its share of the step's sequences (or tokens), so gradients are the same for any
micro-batches, accumulation, number of processes or recomputation.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from hayate.kernels import training as ops
from hayate.training.config import LossSection
from hayate.training.forward import Routing, TrainingBatch, TrainingModel


@dataclass(frozen=True)
class StepSize:
    """What the whole step has, over all micro-batches and processes."""

    num_targets: int
    num_tokens: int


@dataclass
class LossParts:
    """Sums over the micro-batches of a step so far, on the device; `cross_entropy` and the rest are as in `loss`.

    Summed over processes they are the step's.
    """

    cross_entropy: Tensor  # scalar
    aux: Tensor  # scalar, 1 when balanced, whatever is optimised
    z: Tensor  # scalar
    expert_counts: Tensor  # (sparse layers, E) fp32, tokens sent to each expert
    router_entropy: Tensor  # (sparse layers,) fp32, mean entropy of the probabilities, in nats

    @classmethod
    def zeros(cls, num_layers: int, num_experts: int, device: torch.device) -> LossParts:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=device)

        return cls(zeros(), zeros(), zeros(), zeros(num_layers, num_experts), zeros(num_layers))

    def tensors(self) -> list[Tensor]:
        return [getattr(self, f.name) for f in fields(self)]


class StepLoss:
    """The loss of micro-batches of one configuration.

    load_shares: (sparse layers, E) fp32, the `f` of balance = "global", which the caller updates after each step from
        `LossParts.expert_counts`; rows sum to one.
    """

    def __init__(self, model: TrainingModel, config: LossSection) -> None:
        self.model, self.config = model, config
        layers = model.model.model.layers
        moe = model.model.config.moe
        self.num_sparse = sum(model.model.config.is_sparse(i) for i in range(len(layers)))
        self.num_experts = moe.num_experts if moe else 1
        self.num_active = moe.num_active if moe else 1
        device = model.head.device
        uniform = torch.full((self.num_sparse, self.num_experts), 1 / self.num_experts)
        self.load_shares = uniform.to(device)

    def backward(self, batch: TrainingBatch, step: StepSize, parts: LossParts) -> None:
        """Add the gradients of one micro-batch to the parameters', and its parts to `parts`."""
        hidden, routings = self.model.hidden_states(batch)
        cross_entropy = ops.linear_cross_entropy(
            hidden, self.model.head, batch.targets, normalizer=float(step.num_targets)
        )
        share = batch.token_ids.numel() / step.num_tokens
        loss = cross_entropy
        parts.cross_entropy += cross_entropy.detach()
        for layer, routing in enumerate(routings):
            loss = loss + self._router_loss(layer, routing, batch, share, parts)
        loss.backward()

    def _router_loss(
        self, layer: int, routing: Routing, batch: TrainingBatch, share: float, parts: LossParts
    ) -> Tensor:
        config, scale = self.config, share / self.num_sparse
        counts = self.load_shares[layer] if config.balance == "global" else None
        aux = ops.load_balance_loss(
            routing.logits, routing.experts, counts, sequence_length=batch.sequence_length
        )
        z = ops.router_z_loss(routing.logits)
        with torch.no_grad():
            parts.aux += aux * scale
            parts.z += z * scale
            experts = routing.experts.flatten().long()
            one = torch.ones_like(experts, dtype=torch.float32)
            parts.expert_counts[layer].scatter_add_(
                0, experts, one
            )  # whole numbers: any order is exact
            log_p = routing.logits.log_softmax(-1)
            parts.router_entropy[layer] += -(log_p.exp() * log_p).sum(-1).mean() * share
        weight = config.aux if config.balance in ("sequence", "global") else 0.0
        return scale * (weight * aux + config.z * z)

    @torch.no_grad()
    def after_step(self, parts: LossParts) -> None:
        """Learn the loads of the finished step: the shares of "global", the biases of "bias"."""
        total = parts.expert_counts.sum(-1, keepdim=True).clamp(min=1)
        self.load_shares.copy_(parts.expert_counts / total)
        biases = self.model.selection_biases
        if self.config.balance == "bias" and biases is not None:
            excess = self.load_shares - 1 / self.num_experts
            rows = [i for i in range(len(biases)) if self.model.model.config.is_sparse(i)]
            biases[rows] -= self.config.bias_rate * excess.sign()
