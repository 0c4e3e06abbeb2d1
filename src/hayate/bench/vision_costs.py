"""The least work of each stage of describing an image, and the limits of cards that are not here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from hayate.bench.roofline import StepCost, decode_cost, prefill_cost
from hayate.config import DTYPE_BYTES
from hayate.models.vision_config import VisionConfig
from hayate.runtime.llm import LLM
from hayate.vision.slicing import SlicePlan


@dataclass(frozen=True)
class Card:
    """Limits from the vendor's data sheets."""

    name: str
    read_bandwidth: float  # bytes a second
    matmul_flops: float  # a second, dense, 16-bit operands, sums in 32 bits

    def floor(self, cost: StepCost) -> float:
        """Seconds that `cost` takes at least."""
        return max(cost.num_bytes / self.read_bandwidth, cost.flops / self.matmul_flops)


CARDS = {
    # 128 bits of GDDR6 at 17 Gbit/s. 24 SMs at 2.46 GHz, each 512 operations a clock: GeForce cards of the Ada
    # generation sum in 32 bits at half the rate of 16 (the RTX 4090, with 128 SMs at 2.52 GHz: 165 TFLOP/s).
    "rtx4060": Card("GeForce RTX 4060", 272e9, 24 * 2.46e9 * 512),
}


def stage_costs(
    llm: LLM, plan: SlicePlan, *, prompt_tokens: int, new_tokens: int
) -> dict[str, StepCost]:
    """Of preprocessing, encoding, prefill, and of one token in the middle of `new_tokens`.

    Weights count with the bytes they take in memory, codes and scales of NF4; activations between layers do not.
    """
    config, vision, width = llm.config, llm.config.vision, DTYPE_BYTES[llm.plan.dtype]
    assert vision is not None
    network = llm.engine.runner.model
    language = _bytes(network.get_submodule("llm")) - _bytes(
        network.get_submodule("llm.model.embed_tokens")
    )
    seeing = _bytes(network.get_submodule("vpm")) + _bytes(network.get_submodule("resampler"))
    kv = config.kv_bytes_per_token(width)
    context = prompt_tokens + new_tokens // 2
    patches = plan.num_patches * vision.patch_values * width
    queries = plan.num_pictures * vision.num_queries * vision.output_size * width
    prefill = prefill_cost(config, tokens=prompt_tokens, dtype_bytes=width)
    decode = decode_cost(config, batch=1, context=context, dtype_bytes=width)
    return {
        "preprocess": StepCost(3 * plan.size[0] * plan.size[1] + patches, 0.0),
        "encode": StepCost(seeing + patches + queries, encode_flops(vision, plan.sizes)),
        "prefill": StepCost(language + kv * prompt_tokens, prefill.flops),
        "decode": StepCost(language + kv * context, decode.flops),
    }


def encode_flops(vision: VisionConfig, sizes: Sequence[tuple[int, int]]) -> float:
    """Of encoder and resampler for pictures of `sizes` (h, w) in patches."""
    E, F, D, Q = vision.hidden_size, vision.ffn_size, vision.output_size, vision.num_queries
    lengths = [h * w for h, w in sizes]
    N, S = sum(lengths), len(sizes)
    encoder = N * (vision.patch_values * E + vision.num_layers * (4 * E * E + 2 * E * F))
    resampler = N * (E * D + 2 * D * D) + Q * D * D + 2 * S * Q * D * D
    attention = vision.num_layers * E * sum(n * n for n in lengths) + D * Q * N
    return 2.0 * (encoder + resampler) + 4.0 * attention


def _bytes(module: nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters())
