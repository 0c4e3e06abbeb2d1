"""The frequencies of rotary position embedding: what config.json says, and the variants' formulas.

f_j = theta^(-2j / rotary_dim), j < rotary_dim / 2, are the angles by which a channel pair turns per
position (Su et al., arXiv 2104.09864). The variants stretch them over a longer context, and some
scale cos and sin by an attention factor: linear interpolation (arXiv 2306.15595), dynamic NTK, YaRN
(arXiv 2309.00071), LongRoPE (arXiv 2402.13753) and Llama 3's ramp over the wavelengths.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RopeParameters:
    """What config.json says about RoPE; `rotary_dim` leading channels of a head turn.

    A `factor` of None means max_position_embeddings / original_max_position_embeddings.
    """

    rope_type: str = "default"  # default, linear, dynamic, yarn, llama3, longrope
    theta: float = 10_000.0
    rotary_dim: int = 128
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    max_position_embeddings: int = 4096
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None

    @property
    def original_length(self) -> int:
        """The context length of pretraining, before it was extended."""
        return self.original_max_position_embeddings or self.max_position_embeddings

    @property
    def extension(self) -> float:
        """`factor`, or the ratio of the two context lengths where it is not given."""
        if self.factor is not None:
            return self.factor
        return self.max_position_embeddings / self.original_length


def rope_frequencies(params: RopeParameters, seq_len: int | None = None) -> tuple[Tensor, float]:
    """Inverse frequencies (rotary_dim / 2,) in fp32, and the factor that scales cos and sin.

    `seq_len` is the current length of the sequence, which only dynamic and longrope look at; None
    stands for a length within the original context. Raises ValueError for an unknown rope_type.
    """
    exponents = torch.arange(0, params.rotary_dim, 2, dtype=torch.float32) / params.rotary_dim
    if params.rope_type == "yarn":
        return _yarn_frequencies(params, exponents)
    if params.rope_type == "longrope":
        return _longrope_frequencies(params, exponents, seq_len)
    if params.rope_type == "dynamic":
        return dynamic_frequencies(params, torch.tensor([seq_len or 0]))[0], 1.0
    inv_freq = 1.0 / params.theta**exponents
    if params.rope_type == "default":
        return inv_freq, 1.0
    if params.rope_type == "linear":
        return inv_freq / params.extension, 1.0
    if params.rope_type == "llama3":
        return _llama3_frequencies(params, inv_freq), 1.0
    raise ValueError(f"rope_type {params.rope_type!r} is not implemented")


rope_freqs = rope_frequencies


def dynamic_frequencies(params: RopeParameters, seq_lens: Tensor) -> Tensor:
    """Inverse frequencies of dynamic NTK at each length: seq_lens (R,) -> (R, rotary_dim / 2) fp32."""
    exponents = torch.arange(0, params.rotary_dim, 2, dtype=torch.float32) / params.rotary_dim
    limit = params.max_position_embeddings
    stretch = params.extension * seq_lens.clamp(min=limit).double() / limit
    growth = stretch - (params.extension - 1)
    theta = params.theta * growth ** (params.rotary_dim / (params.rotary_dim - 2))
    return 1.0 / theta.float()[:, None] ** exponents


def _llama3_frequencies(params: RopeParameters, inv_freq: Tensor) -> Tensor:
    """Long wavelengths are divided by the factor, short ones kept, those between blended."""
    turns = (
        params.original_length * inv_freq / (2 * math.pi)
    )  # full turns within the original context
    low, high = params.low_freq_factor, params.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * inv_freq / params.extension + kept * inv_freq


def _yarn_frequencies(params: RopeParameters, exponents: Tensor) -> tuple[Tensor, float]:
    """Channels that turn often keep their frequency, those that turn seldom are interpolated."""
    dim = params.rotary_dim

    def channel_of(turns: float) -> float:
        wavelength = params.original_length / (2 * math.pi * turns)
        return dim * math.log(wavelength) / (2 * math.log(params.theta))

    low, high = channel_of(params.beta_fast), channel_of(params.beta_slow)
    if params.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    kept = 1 - ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    inv_freq = 1.0 / params.theta**exponents
    return inv_freq / params.extension * (1 - kept) + inv_freq * kept, _yarn_factor(params)


def _yarn_factor(params: RopeParameters) -> float:
    def magnitude(mscale: float) -> float:
        scale = params.extension
        return 1.0 if scale <= 1 else 0.1 * mscale * math.log(scale) + 1.0

    if params.attention_factor is not None:
        return params.attention_factor
    if params.mscale and params.mscale_all_dim:
        return magnitude(params.mscale) / magnitude(params.mscale_all_dim)
    return magnitude(1.0)


def _longrope_frequencies(
    params: RopeParameters, exponents: Tensor, seq_len: int | None
) -> tuple[Tensor, float]:
    """Each channel has its own divisor: one list up to the original length, another beyond it."""
    original = params.original_length
    factors = params.long_factor if (seq_len or 0) > original else params.short_factor
    assert factors is not None
    assert len(factors) == params.rotary_dim // 2
    inv_freq = 1.0 / (torch.tensor(factors, dtype=torch.float32) * params.theta**exponents)
    if params.attention_factor is not None:
        return inv_freq, params.attention_factor
    if params.extension <= 1:
        return inv_freq, 1.0
    return inv_freq, math.sqrt(1 + math.log(params.extension) / math.log(original))


def rope_table(inv_freq: Tensor, attention_factor: float, max_position: int) -> Tensor:
    """cos and sin of every position: (max_position, rotary_dim) fp32, first half cos, second sin.

    Both halves are multiplied by `attention_factor`. Angles are rounded to fp32, as in training.
    """
    positions = torch.arange(max_position, dtype=torch.float32, device=inv_freq.device)
    angles = positions[:, None] * inv_freq.float()
    return torch.cat([angles.cos(), angles.sin()], dim=-1) * attention_factor
