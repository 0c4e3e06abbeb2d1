"""RoPE: frequencies against transformers and known values, rotation and caching against float64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hayate.kernels._dispatch import use
from hayate.kernels.norm import Norm
from hayate.kernels.rope import (
    RopeParameters,
    rope,
    rope_and_cache,
    rope_and_cache_reference,
    rope_frequencies,
    rope_table,
)

# rope_parameters of config.json, beyond rope_type and rope_theta, for a context of 2048.
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "yarn": {
        "factor": 4.0,
        "original_max_position_embeddings": 512,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
    },
    "yarn untruncated": {
        "factor": 4.0,
        "original_max_position_embeddings": 512,
        "truncate": False,
    },
    "yarn mscale": {
        "factor": 40.0,
        "original_max_position_embeddings": 512,
        "mscale": 0.7,
        "mscale_all_dim": 1.2,
    },
    "yarn attention_factor": {
        "factor": 4.0,
        "original_max_position_embeddings": 512,
        "attention_factor": 1.5,
    },
    "longrope": {
        "short_factor": [1.0 + 0.01 * j for j in range(32)],
        "long_factor": [1.0 + 0.5 * j for j in range(32)],
        "original_max_position_embeddings": 512,
        "factor": 4.0,
    },
}


@pytest.mark.parametrize("partial", [1.0, 0.5])
@pytest.mark.parametrize("seq_len", [None, 100, 2048, 5000])
@pytest.mark.parametrize("variant", VARIANTS)
def test_frequencies_agree_with_transformers(
    variant: str, seq_len: int | None, partial: float
) -> None:
    rope_type = variant.split()[0]
    fields = VARIANTS[variant]
    head_dim = int(64 / partial)  # rotary_dim 64 either way, for the lists of longrope
    config = LlamaConfig(
        hidden_size=head_dim * 2,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=2048,
        rope_parameters={
            "rope_type": rope_type,
            "rope_theta": 50_000.0,
            "partial_rotary_factor": partial,
            **fields,
        },
    )
    tuples: dict[str, Any] = {k: tuple(f) if isinstance(f, list) else f for k, f in fields.items()}
    parameters = RopeParameters(
        rope_type=rope_type,
        theta=50_000.0,
        rotary_dim=64,
        max_position_embeddings=2048,
        **tuples,
    )
    if rope_type == "default":
        expected = 50_000.0 ** (-torch.arange(32, dtype=torch.float64) / 32)
        expected_factor = 1.0
    else:
        expected, expected_factor = ROPE_INIT_FUNCTIONS[rope_type](config, "cpu", seq_len=seq_len)
    inv_freq, factor = rope_frequencies(parameters, seq_len)
    assert inv_freq.dtype == torch.float32
    # Both compute in fp32 with a different order of operations: a few roundings of 6e-8 each.
    torch.testing.assert_close(inv_freq.double(), expected.double(), rtol=1e-6, atol=0)
    assert factor == pytest.approx(expected_factor, rel=1e-12)


def test_missing_factor_is_the_ratio_of_the_lengths() -> None:
    ratio = RopeParameters("yarn", original_max_position_embeddings=1024)
    given = RopeParameters("yarn", original_max_position_embeddings=1024, factor=4.0)
    assert torch.equal(rope_frequencies(ratio)[0], rope_frequencies(given)[0])


# Published configurations: values at j = 0, 1, d/8, d/4, 3d/8, d/2 - 1, and the attention factor.
GOLDEN = [
    (
        RopeParameters("linear", 1e4, 128, factor=4.0),
        None,
        [0.25, 0.2164911, 0.025, 0.0025, 0.00025, 2.886955e-05],
        1.0,
    ),
    (
        RopeParameters("dynamic", 1e4, 128, factor=4.0, max_position_embeddings=4096),
        10_000,
        [1, 0.8400798, 0.06153584, 0.00378666, 0.0002330153, 1.706837e-05],
        1.0,
    ),
    (
        RopeParameters("llama3", 5e5, 128, factor=8.0, original_max_position_embeddings=8192),
        None,
        [1, 0.8146172, 0.03760603, 0.000524846, 6.64787e-06, 3.068926e-07],
        1.0,
    ),
    (
        RopeParameters("llama3", 5e5, 64, factor=32.0, original_max_position_embeddings=8192),
        None,
        [1, 0.6636013, 0.03760603, 0.0004295567, 1.661967e-06, 9.418306e-08],
        1.0,
    ),
    (
        RopeParameters("yarn", 1e6, 128, factor=4.0, original_max_position_embeddings=32768),
        None,
        [1, 0.8058422, 0.03162278, 0.0006029411, 7.905694e-06, 3.102344e-07],
        1.13862944,
    ),
    (
        RopeParameters(
            "yarn", 1e6, 128, factor=4.0, original_max_position_embeddings=32768, truncate=False
        ),
        None,
        [1, 0.8058422, 0.03162278, 0.000607408, 7.905694e-06, 3.102344e-07],
        1.13862944,
    ),
]


@pytest.mark.parametrize(("parameters", "seq_len", "values", "factor"), GOLDEN)
def test_golden_frequencies(
    parameters: RopeParameters, seq_len: int | None, values: list[float], factor: float
) -> None:
    d = parameters.rotary_dim
    inv_freq, attention_factor = rope_frequencies(parameters, seq_len)
    found = inv_freq[[0, 1, d // 8, d // 4, 3 * d // 8, d // 2 - 1]]
    # The values are printed with seven digits.
    torch.testing.assert_close(found, torch.tensor(values), rtol=2e-6, atol=0)
    assert attention_factor == pytest.approx(factor, rel=1e-8)


def test_unknown_type_is_refused() -> None:
    with pytest.raises(ValueError, match="ntk-by-parts"):
        rope_frequencies(RopeParameters("ntk-by-parts"))


@dataclass
class Case:
    """One call of `rope_and_cache`; sizes are odd on purpose."""

    num_tokens: int = 5
    num_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 32
    rotary_dim: int = 32
    norm: str | None = None
    clip: float | None = None
    page_size: int = 16
    num_pages: int = 4


CASES = {
    "plain": Case(),
    "one token": Case(num_tokens=1),
    "mha": Case(num_heads=5, num_kv_heads=5),
    "wide blocks": Case(num_tokens=65, num_heads=3, num_kv_heads=1, num_pages=5),
    "partial": Case(rotary_dim=16),
    "odd width": Case(head_dim=80, rotary_dim=80),
    "odd partial": Case(head_dim=96, rotary_dim=48),
    "head norm": Case(norm="head", rotary_dim=16),
    "full norm": Case(norm="full", num_heads=6, num_kv_heads=2, clip=1.25),
    "clip": Case(clip=0.75),
}

# fp32: sums of at most 200 squares and four roundings, each 6e-8 relative to values below 8.
# fp16, bf16: one rounding at the end, half a unit of 2^-10 and 2^-7 relative.
RELATIVE = {
    torch.float32: 2e-6,
    torch.float16: 2**-11 * 1.02,
    torch.bfloat16: 2**-8 * 1.02,
}


def expected_heads(x: Tensor, positions: Tensor, inv_freq: Tensor, factor: float) -> Tensor:
    """The rotation in float64: the pair (j, j + half) as one complex number."""
    half = inv_freq.numel()
    angles = positions.double()[:, None] * inv_freq.double()
    turn = torch.polar(torch.full_like(angles, factor), angles)[:, None]
    turned = torch.complex(x[..., :half], x[..., half : 2 * half]) * turn
    return torch.cat([turned.real, turned.imag, x[..., 2 * half :]], dim=-1)


def normalised(x: Tensor, weight: Tensor, eps: float, whole: bool) -> Tensor:
    out = torch.empty_like(x)
    for t in range(x.shape[0]):
        for h in range(x.shape[1]):
            over = x[t].flatten() if whole else x[t, h]
            w = weight.view(x.shape[1], -1)[h] if whole else weight
            out[t, h] = x[t, h] / math.sqrt(float(over @ over) / over.numel() + eps) * w.double()
    return out


def run_case(case: Case, dtype: torch.dtype, implementation: str) -> None:
    torch.manual_seed(0)
    T, H, G, K = case.num_tokens, case.num_heads, case.num_kv_heads, case.head_dim
    inv_freq = 100.0 ** (-torch.arange(0, case.rotary_dim, 2) / case.rotary_dim)
    cos_sin = rope_table(inv_freq, 1.25, 50)
    positions = torch.randint(0, 50, (T,))
    num_slots = case.num_pages * case.page_size
    slots = torch.randperm(num_slots)[:T]
    if T > 1:
        slots[1] = -1
    qkv = torch.randn(T, (H + 2 * G) * K).to(dtype)
    norms: list[Norm | None] = [None, None]
    if case.norm is not None:
        widths = (K, K) if case.norm == "head" else (H * K, G * K)
        norms = [Norm("rmsnorm", (torch.rand(w) + 0.5).to(dtype), None, 1e-3) for w in widths]
    # The two caches are interleaved by page, so each is contiguous in all axes but the first.
    caches = torch.full((case.num_pages, 2, case.page_size, G, K), float("nan"), dtype=dtype)
    k_cache, v_cache = caches[:, 0], caches[:, 1]
    with use(implementation):  # type: ignore[arg-type]
        q = rope_and_cache(
            qkv,
            k_cache,
            v_cache,
            slots,
            positions,
            cos_sin,
            num_heads=H,
            num_kv_heads=G,
            head_dim=K,
            q_norm=norms[0],
            k_norm=norms[1],
            clip=case.clip,
        )

    parts = list(qkv.double().view(T, H + 2 * G, K).split([H, G, G], dim=1))
    for i, norm in enumerate(norms):
        if norm is not None:
            parts[i] = normalised(parts[i], norm.weight, norm.eps, case.norm == "full")
    if case.clip is not None:
        parts = [part.clamp(-case.clip, case.clip) for part in parts]
    q64, k64 = (expected_heads(part, positions, inv_freq, 1.25) for part in parts[:2])
    # cos and sin are of angles rounded to fp32: at position 50 that is 2e-6 of a radian.
    tolerance: dict[str, Any] = {"rtol": RELATIVE[dtype], "atol": 4e-6 + 50 * 2**-24 * 8}
    assert q.is_contiguous()
    assert q.dtype == dtype
    torch.testing.assert_close(q.double(), q64, **tolerance)
    k_flat, v_flat = k_cache.reshape(num_slots, G, K), v_cache.reshape(num_slots, G, K)
    written = slots[slots >= 0]
    torch.testing.assert_close(k_flat[written].double(), k64[slots >= 0], **tolerance)
    assert torch.equal(v_flat[written], parts[2][slots >= 0].to(dtype))
    untouched = torch.ones(num_slots, dtype=torch.bool)
    untouched[written] = False
    assert k_flat[untouched].isnan().all()
    assert v_flat[untouched].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_reference(name: str, dtype: torch.dtype) -> None:
    run_case(CASES[name], dtype, "reference")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_kernel(name: str, dtype: torch.dtype) -> None:
    run_case(CASES[name], dtype, "triton")


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_plain_rope(implementation: str) -> None:
    torch.manual_seed(1)
    x = torch.randn(3, 5, 24)
    positions = torch.tensor([7, 0, 49], dtype=torch.int32)
    inv_freq = 100.0 ** (-torch.arange(0, 16, 2) / 16)
    with use(implementation):  # type: ignore[arg-type]
        found = rope(x, rope_table(inv_freq, 1.0, 50), positions)
    expected = expected_heads(x.double(), positions, inv_freq, 1.0)
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=3e-5)
    assert torch.equal(found[1], x[1])  # position 0 turns nothing


def test_no_tokens() -> None:
    cache = torch.zeros(1, 16, 1, 8)
    for implementation in ("reference", "triton"):
        with use(implementation):
            q = rope_and_cache(
                torch.zeros(0, 32),
                cache,
                cache.clone(),
                torch.zeros(0, dtype=torch.int64),
                torch.zeros(0, dtype=torch.int64),
                torch.zeros(4, 8),
                num_heads=2,
                num_kv_heads=1,
                head_dim=8,
            )
        assert q.shape == (0, 2, 8)


def test_reference_is_differentiable() -> None:
    """Training runs the same forward; gradients reach the fused projection."""
    x = torch.randn(2, 4 * 8, dtype=torch.float64, requires_grad=True)
    table = rope_table(torch.rand(4), 1.0, 9).double()
    positions = torch.tensor([3, 8])
    cache = torch.zeros(1, 16, 1, 8, dtype=torch.float64)

    def rotated(qkv: Tensor) -> Tensor:
        return rope_and_cache_reference(
            qkv,
            cache,
            cache.clone(),
            positions,
            positions,
            table,
            num_heads=2,
            num_kv_heads=1,
            head_dim=8,
        )

    assert torch.autograd.gradcheck(rotated, (x,))
