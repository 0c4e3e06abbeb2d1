"""Cases of what happens around the vocabulary and the heads: rope with the cache write, argmax, sampling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hayate.bench.kernels.case import Case, Setting, relative, wrong_unless
from hayate.config import PAGE_SIZE
from hayate.kernels.rope import RopeParameters, rope_and_cache, rope_frequencies, rope_table
from hayate.kernels.sampling import argmax, sample, sample_reference

_MAX_POSITION = 8192


def rope_cases(on: Setting) -> list[Case]:
    if not on.gpu:
        return [_rope_case(on, T, 9, 3, 64) for T in (1, 512)]
    heads = [(32, 8, 128), (12, 1, 64)]
    return [_rope_case(on, T, H, G, K) for H, G, K in heads for T in (1, 64, 8192)]


def _rope_case(on: Setting, T: int, H: int, G: int, K: int) -> Case:
    inv_freq, factor = rope_frequencies(RopeParameters(rotary_dim=K))
    cos_sin = rope_table(inv_freq, factor, _MAX_POSITION).to(on.device)
    pages = -(-T // PAGE_SIZE) + 1

    def make() -> tuple[Tensor, ...]:
        caches = torch.zeros(2, pages, PAGE_SIZE, G, K, dtype=on.dtype, device=on.device)
        slots = torch.randperm(pages * PAGE_SIZE, device=on.device)[:T]
        positions = on.integers(T, below=_MAX_POSITION)
        return on.draw(T, (H + 2 * G) * K), caches[0], caches[1], slots, positions

    def rotated(x: Tensor, positions: Tensor) -> Tensor:
        a, b = x.double().unflatten(1, (-1, K)).chunk(2, -1)
        angle = positions.double()[:, None, None] * inv_freq.to(on.device).double()
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)

    def error(o: tuple[Tensor, ...], q: Tensor) -> float:
        qkv, k_cache, v_cache, slots, positions = o
        q_in, k_in, v_in = qkv.split([H * K, G * K, G * K], 1)
        k, v = (cache.flatten(0, 1)[slots] for cache in (k_cache, v_cache))
        if not torch.equal(v, v_in.unflatten(1, (-1, K))):
            return float("inf")
        errors = relative(q, rotated(q_in, positions)) + relative(k, rotated(k_in, positions))
        # The table's angles may be fp32 numbers, off by 2^-24 of up to 8192.
        return errors / (2 * on.limit(1) + 2 * _MAX_POSITION * 2.0**-24)

    def run(o: Any) -> Tensor:
        qkv, k_cache, v_cache, slots, positions = o
        caches = (k_cache, v_cache, slots, positions, cos_sin)
        return rope_and_cache(qkv, *caches, num_heads=H, num_kv_heads=G, head_dim=K)

    return Case(
        f"{T} x {H}:{G} x {K}",
        make=make,
        run=run,
        error=error,
        # Each value is read and written once; slot, position and a row of the table come with it.
        num_bytes=T * (2 * (H + 2 * G) * K * on.width + 16 + 4 * K),
    )


def _vocabulary(on: Setting) -> int:
    return 131_072 if on.gpu else 49_152


def argmax_cases(on: Setting) -> list[Case]:
    V = _vocabulary(on)

    def error(x: Tensor, y: Tensor) -> float:
        first = (x == x.amax(-1, keepdim=True)).int().argmax(-1)
        return wrong_unless(torch.equal(y, first))

    def case(S: int) -> Case:
        return Case(
            f"{S} x {V}",
            make=lambda: on.draw(S, V),
            run=lambda x: argmax(x),
            error=error,
            num_bytes=S * (V * on.width + 8),
            rivals={"torch": lambda x: x.argmax(-1)},
        )

    return [case(S) for S in ((1, 64, 256) if on.gpu else (1, 16))]


def sample_cases(on: Setting) -> list[Case]:
    V = _vocabulary(on)
    sizes = (1, 64, 256) if on.gpu else (4,)
    plain = [_sample_case(on, S, V, "temperature", 0, 1.0) for S in sizes]
    return plain + [_sample_case(on, S, V, "top-k 50, top-p 0.9", 50, 0.9) for S in sizes]


def _sample_case(on: Setting, S: int, V: int, name: str, top_k: int, top_p: float) -> Case:
    filters = top_k > 0

    def make() -> tuple[Tensor, ...]:
        options = (
            torch.full((S,), value, dtype=dtype, device=on.device)
            for value, dtype in (
                (0.8, torch.float32),
                (top_k, torch.int32),
                (top_p, torch.float32),
                (0.0, torch.float32),
            )
        )
        seeds, steps = on.integers(S, below=2**31), on.integers(S, below=1000)
        return on.draw(S, V, scale=3.0), *options, seeds, steps

    def error(o: tuple[Tensor, ...], tokens: Tensor) -> float:
        # The reference is float64. Among all of V tokens the fp32 weights may move a boundary past u,
        # to the next tokens in the vocabulary's order; fifty tokens are too far apart for that.
        off = int((tokens - sample_reference(*o)).abs().amax())
        return wrong_unless(off == 0 if filters else off <= 3)

    return Case(
        f"{S} x {V}, {name}",
        make=make,
        run=lambda o: sample(*o, filters=filters),
        error=error,
        num_bytes=S * (V * on.width + 8),
    )
