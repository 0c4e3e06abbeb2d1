"""Cases of attention: decoding over pages, prompts over pages, and prompts with dense keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hayate.bench.kernels.case import Case, Setting, relative
from hayate.config import PAGE_SIZE
from hayate.kernels.attention import attention
from hayate.kernels.flash_attention import flash_attention

_SAMPLED_QUERIES = 128  # of a prompt; the scores of all in float64 would fill the memory


class Heads(NamedTuple):
    """H query heads and G key/value heads of width K."""

    H: int
    G: int
    K: int

    def __str__(self) -> str:
        return f"{self.H}:{self.G} x {self.K}"


def _attention_64(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    """Causal attention in float64: q (S, Q, H, K) at `positions` (Q,), k and v (S, N, G, K)."""
    S, Q, H, K = q.shape
    N, G = k.shape[1:3]
    q = q.double().view(S, Q, G, H // G, K)
    scores = torch.einsum("sqghk,sngk->sghqn", q, k.double()) * K**-0.5
    hidden = torch.arange(N, device=q.device) > positions[:, None]
    weights = scores.masked_fill_(hidden, float("-inf")).softmax(-1)
    return torch.einsum("sghqn,sngk->sqghk", weights, v.double()).reshape(S, Q, H, K)


def _limit(on: Setting, length: int) -> float:
    # The result, and the weights before they meet the values.
    return on.limit(2, depth=length)


def decode_cases(on: Setting) -> list[Case]:
    if not on.gpu:
        return [_decode_case(on, S, N, Heads(9, 3, 64)) for S, N in ((1, 4096), (8, 512))]
    sizes = [(1, 1024), (1, 8192), (1, 32_768), (8, 4096), (64, 1024), (256, 256)]
    heads = [Heads(32, 8, 128), Heads(12, 1, 64)]
    return [_decode_case(on, S, N, h) for h in heads for S, N in sizes]


def _decode_case(on: Setting, S: int, N: int, heads: Heads) -> Case:
    """S sequences of N tokens, of which the last asks; their pages lie in random order."""
    H, G, K = heads
    pages = -(-N // PAGE_SIZE)
    ends = torch.arange(S + 1, dtype=torch.int32, device=on.device)
    lengths = torch.full((S,), N, dtype=torch.int32, device=on.device)

    def make() -> tuple[Tensor, ...]:
        table = torch.randperm(S * pages, device=on.device).int().view(S, pages)
        caches = on.draw(2, S * pages, PAGE_SIZE, G, K)
        return on.draw(S, H, K), caches[0], caches[1], table

    def run(o: Any) -> Tensor:
        q, k, v, table = o
        sizes = {"max_seqlen_q": 1, "max_seqlen_k": N}
        return attention(q, k, v, table, ends, lengths, **sizes, scale=K**-0.5)

    def error(o: tuple[Tensor, ...], out: Tensor) -> float:
        q, k_cache, v_cache, table = o
        last = torch.tensor([N - 1], device=on.device)
        parts = []
        for rows in torch.arange(S, device=on.device).split(max(65_536 // N, 1)):
            k, v = (c[table[rows]].flatten(1, 2)[:, :N] for c in (k_cache, v_cache))
            parts.append(_attention_64(q[rows, None], k, v, last)[:, 0])
        return relative(out, torch.cat(parts)) / _limit(on, N)

    return Case(
        f"{S} x {N}, {heads}",
        make=make,
        run=run,
        error=error,
        num_bytes=(2 * S * N * G * K + 2 * S * H * K) * on.width,
        flops=4 * S * N * H * K,
    )


def prompt_cases(on: Setting) -> list[Case]:
    """`attention` as a model calls it, over pages."""
    if not on.gpu:
        return [_prompt_case(on, 512, Heads(9, 3, 64))]
    heads = [Heads(32, 8, 128), Heads(32, 8, 64)]
    return [_prompt_case(on, T, h) for h in heads for T in (2048, 8192, 16_384)]


def _prompt_case(on: Setting, T: int, heads: Heads) -> Case:
    K = heads.K
    pages = -(-T // PAGE_SIZE)
    table = torch.randperm(pages, device=on.device).int()[None]
    ends, lengths = (torch.tensor(x, dtype=torch.int32, device=on.device) for x in ([0, T], [T]))

    def make() -> tuple[Tensor, ...]:
        caches = on.draw(2, pages, PAGE_SIZE, heads.G, K)
        return on.draw(T, heads.H, K), caches[0], caches[1]

    def run(o: Any) -> Tensor:
        q, k, v = o
        sizes = {"max_seqlen_q": T, "max_seqlen_k": T}
        return attention(q, k, v, table, ends, lengths, **sizes, scale=K**-0.5)

    def error(o: tuple[Tensor, ...], out: Tensor) -> float:
        k, v = (cache[table[0]].flatten(0, 1)[:T] for cache in o[1:])
        return _prompt_error(on, o[0], k, v, out)

    def rival(o: Any) -> Tensor:
        """cuDNN on keys as if the pages lay in order, which it could not read otherwise."""
        k, v = (cache.flatten(0, 1)[:T] for cache in o[1:])
        return _sdpa(SDPBackend.CUDNN_ATTENTION, K)((o[0], k, v))

    return Case(
        f"{T}, {heads}",
        make,
        run,
        error,
        *_prompt_cost(on, T, heads),
        rivals={"cuDNN": rival} if on.gpu else {},
    )


def flash_cases(on: Setting) -> list[Case]:
    """The same kernel over dense keys, beside PyTorch's SDPA with each of its backends."""
    if not on.gpu:
        return []
    heads = [Heads(32, 8, 128), Heads(32, 8, 64)]
    return [_flash_case(on, T, h) for h in heads for T in (2048, 8192, 16_384)]


def _flash_case(on: Setting, T: int, heads: Heads) -> Case:
    H, G, K = heads
    num_bytes, flops = _prompt_cost(on, T, heads)
    ends = torch.tensor([0, T], dtype=torch.int32, device=on.device)

    def run(o: Any) -> Tensor:
        q, k, v = o
        return flash_attention(q, k, v, ends, ends, max_seqlen_q=T, scale=K**-0.5)

    return Case(
        f"{T}, {heads}",
        make=lambda: (on.draw(T, H, K), on.draw(T, G, K), on.draw(T, G, K)),
        run=run,
        error=lambda o, out: _prompt_error(on, o[0], o[1], o[2], out),
        num_bytes=num_bytes,
        flops=flops,
        rivals={
            "cuDNN": _sdpa(SDPBackend.CUDNN_ATTENTION, K),
            "SDPA flash": _sdpa(SDPBackend.FLASH_ATTENTION, K),
        },
    )


def _sdpa(backend: SDPBackend, K: int) -> Callable[[Any], Tensor]:
    def run(o: Any) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in o)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=K**-0.5, enable_gqa=q.shape[1] != k.shape[1]
            )

    return run


def _prompt_error(on: Setting, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> float:
    """The error over some queries, the first and the last among them; the others must be finite."""
    T = q.shape[0]
    at = torch.linspace(0, T - 1, min(T, _SAMPLED_QUERIES), device=on.device).long()
    if not bool(out.isfinite().all()):
        return float("inf")
    exact = _attention_64(q[at][None], k[None], v[None], at)[0]
    return relative(out[at], exact) / _limit(on, T)


def _prompt_cost(on: Setting, T: int, heads: Heads) -> tuple[float, float]:
    """Bytes of q, k, v and the output; operations on the visible half of the scores."""
    H, G, K = heads
    return 2 * T * (H + G) * K * on.width, 4 * H * K * T * (T + 1) / 2
