"""The optimizer of a run: AdamW over all parameters, clipping, and the guard against steps that are not finite."""

from __future__ import annotations

import torch
from torch import Tensor

from hayate.kernels.training import AdamWState, adamw_state, adamw_step, grad_norm
from hayate.models.decoder import CausalLM
from hayate.training.config import OptimizerSection, PrecisionSection


class Optimizer:
    """AdamW as kernels/training/adamw.py has it, over the parameters of one model.

    Matrices decay; norms and biases do not, the embedding and the head only if asked.
    """

    def __init__(
        self,
        model: CausalLM,
        config: OptimizerSection,
        precision: PrecisionSection,
        *,
        seed: int,
    ) -> None:
        self.config, self.seed = config, seed
        self.names = [name for name, _ in model.named_parameters()]
        self.parameters = [p for _, p in model.named_parameters()]
        self.weight_decay = [
            config.weight_decay if self._decays(name, p) else 0.0
            for name, p in zip(self.names, self.parameters, strict=True)
        ]
        master = precision.master == "float32"
        self.states: list[AdamWState] = [
            adamw_state(p, moments=precision.moments, master=master) for p in self.parameters
        ]
        self.num_steps = 0

    def _decays(self, name: str, parameter: Tensor) -> bool:
        if parameter.dim() < 2:
            return False
        return self.config.decay_embeddings or not ("embed_tokens" in name or "lm_head" in name)

    def step(self, lr: float) -> tuple[float, bool]:
        """Apply the gradients with learning rate `lr` unless one is not finite, and clear them.

        Returns the norm of the gradient before clipping, and whether the step was made. Waits for the device: the
        norm decides before anything is changed.
        """
        grads = [p.grad for p in self.parameters if p.grad is not None]
        assert len(grads) == len(self.parameters), "every parameter takes part in the loss"
        norm = grad_norm(grads)
        value = float(norm)
        finite = value < float("inf")  # also false for NaN
        if finite:
            clip = self.config.clip
            scale = (clip / (norm + 1e-6)).clamp(max=1.0) if clip else None
            self.num_steps += 1
            adamw_step(
                self.parameters,
                grads,
                self.states,
                lr=lr,
                beta1=self.config.beta1,
                beta2=self.config.beta2,
                eps=self.config.eps,
                weight_decay=self.weight_decay,
                step=self.num_steps,
                grad_scale=scale,
                seed=self.seed,
            )
        for parameter in self.parameters:
            parameter.grad = None
        return value, finite

    def tensors(self) -> dict[str, Tensor]:
        """The state under the names it has in a checkpoint, such as `first.model.norm.weight`."""
        found: dict[str, Tensor] = {}
        for name, state in zip(self.names, self.states, strict=True):
            for field, tensor in state._asdict().items():
                if tensor is not None:
                    found[f"{field}.{name}"] = tensor
        return found

    @torch.no_grad()
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors().values())
