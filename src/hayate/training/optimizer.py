"""The optimizer of a run: AdamW over all parameters, clipping, and the guard against steps that are not finite."""

from __future__ import annotations

from itertools import accumulate

from torch import Tensor

from hayate.kernels.training import AdamWState, adamw_state, adamw_step, grad_norm
from hayate.models.decoder import CausalLM
from hayate.training.config import OptimizerSection, PrecisionSection
from hayate.training.sharded_parameters import (
    BLOCK,
    ParameterSlice,
    ShardedParameters,
    whole_parameters,
)
from hayate.training.sliced_state import StateSlice


class Optimizer:
    """AdamW as kernels/training/adamw.py has it, over the parameters of one model.

    Matrices decay; norms and biases do not, the embedding and the head only if asked. Of several processes each has
    the state of, and updates, its slices only (`shards`).
    """

    def __init__(
        self,
        model: CausalLM,
        config: OptimizerSection,
        precision: PrecisionSection,
        *,
        seed: int,
        shards: ShardedParameters | None = None,
    ) -> None:
        self.config, self.seed, self.shards = config, seed, shards
        self.slices = whole_parameters(model) if shards is None else shards.slices
        self.weight_decay = [
            config.weight_decay if self._decays(s.name, s.parameter) else 0.0 for s in self.slices
        ]
        # Rounding draws by the element's number in the whole model: the same for any number of processes.
        named = list(model.named_parameters())
        sizes = [-(-p.numel() // BLOCK) * BLOCK for _, p in named]
        first = dict(zip((n for n, _ in named), accumulate(sizes, initial=0), strict=False))
        self._numbers = [first[s.name] + s.begin for s in self.slices]
        master = precision.master == "float32"
        self.states: list[AdamWState] = [
            adamw_state(s.weight, moments=precision.moments, master=master) for s in self.slices
        ]
        self.num_steps = 0

    def _decays(self, name: str, parameter: Tensor) -> bool:
        if parameter.dim() < 2:
            return False
        return self.config.decay_embeddings or not ("embed_tokens" in name or "lm_head" in name)

    def step(self, lr: float) -> tuple[float, bool]:
        """Apply the gradients with learning rate `lr` unless one is not finite, and clear them.

        Returns the norm of the gradient before clipping, and whether the step was made. Waits for the device: the
        norm decides before anything is changed. Every process gets the same answer.
        """
        grads = [s.gradient for s in self.slices]
        norm = grad_norm(grads)
        if self.shards is not None:
            norm = self.shards.world.norm(norm)
        value = float(norm)
        finite = value < float("inf")  # also false for NaN
        if finite:
            clip = self.config.clip
            scale = (clip / (norm + 1e-6)).clamp(max=1.0) if clip else None
            self.num_steps += 1
            adamw_step(
                [s.weight for s in self.slices],
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
                numbers=self._numbers,
            )
        if self.shards is None:
            for s in self.slices:
                s.parameter.grad = None
        else:
            if finite:
                self.shards.gather_weights()
            self.shards.clear_gradients()
        return value, finite

    def state(self) -> dict[str, StateSlice]:
        """This process's state under the names it has in a checkpoint, such as `first.model.norm.weight`."""
        found: dict[str, StateSlice] = {}
        for s, state in zip(self.slices, self.states, strict=True):
            for field, tensor in state._asdict().items():
                if tensor is not None:
                    found[f"{field}.{s.name}"] = _placed(s, tensor)
        return found


def _placed(s: ParameterSlice, state: Tensor) -> StateSlice:
    """Where the state of a slice belongs in the state of the whole parameter: (N,), or (2, blocks) for scales."""
    size = s.parameter.numel()
    if state.dim() == 1:
        return StateSlice(state, (s.begin,), (size,))
    return StateSlice(state, (0, s.begin // BLOCK), (len(state), -(-size // BLOCK)))
