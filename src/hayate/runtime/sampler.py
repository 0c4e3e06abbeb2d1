"""From logits to tokens, for rows whose options the host takes part in.

The options act in this order, all in float32 (1 to 5 are `runtime/logits_processing.py`):

1. logits as float32;
2. `logit_bias` is added;
3. tokens that would end the sequence before `min_tokens` get -inf;
4. `repetition_penalty` r, for tokens of prompt or output: l / r where l > 0, else l * r;
   then l - `frequency_penalty` * count - `presence_penalty` * (count > 0), count in the output;
5. tokens that the grammar of a structured output does not allow get -inf;
6. temperature 0: the token with the largest logit, the lowest id of equals. Otherwise
   p = exp((l - max l) / temperature), so that the largest p is 1;
7. `top_k`: the tokens whose p is at least the k-th largest are kept;
8. `top_p`: of these, the tokens with p >= v are kept, for the largest v for which they hold at
   least the share `top_p` of the sum of p over what 7 kept;
9. `min_p`: the tokens with p >= `min_p` are kept;
10. one token of the kept is drawn, with probability p / sum p.

7 to 9 are thresholds: a token equal to one that is kept is kept too, so no order of equals matters.
They come after the grammar: `top_k` counts allowed tokens only. Log-probabilities are of the
model's own distribution, before all of this.

The draw inverts the cumulative distribution in the order of the vocabulary: with u from
`philox_uniform` and sums in float64, the token is the first i with p_0 + ... + p_i > u * (p_0 + ...
+ p_(V-1)). It depends on the sequence's own logits, seed, step and sample index only: a sequence
gets the same tokens alone and in a options.

`philox_uniform` is Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy
as 1, 2, 3", 2011) with key = (low, high 32 bits of the seed) and counter = (step, sample index, 0,
0). With w the first of its four outputs, u = (w >> 8) * 2**-24: 0 <= u < 1, exact in float32.

On a GPU 6 to 10 are `kernels/sampling.py`, with the same numbers u; here is the form for the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hayate.errors import ModelError
from hayate.kernels import sampling
from hayate.kernels._dispatch import implementation_for
from hayate.runtime.logits_processing import LogitsChanges
from hayate.runtime.sampling_row import Position, SamplingRow, positions_of
from hayate.runtime.upload import upload

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF

_TINY = float(np.finfo(np.float32).tiny)
_TOP_P_CANDIDATES = (128, 2048, 16384)  # tried in turn on the CPU before the vocabulary is sorted


def philox4x32(
    counter: tuple[int, int, int, int], key: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Philox4x32-10: four 32-bit words from a counter of four and a key of two."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (product1 >> 32) ^ c1 ^ k0,
            product1 & _MASK,
            (product0 >> 32) ^ c3 ^ k1,
            product0 & _MASK,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def philox_uniform(seed: int, step: int, sample_index: int) -> float:
    """The number u in [0, 1) for one draw; see the module's text for the definition."""
    word = philox4x32((step, sample_index, 0, 0), (seed & _MASK, seed >> 32))[0]
    return (word >> 8) * 2.0**-24


class SampledTokens(NamedTuple):
    """Tokens of one step, still on the device: one transfer brings all there is to know."""

    packed: Tensor  # (2, S) int64: the tokens, and 1 where the row's logits were finite

    @property
    def tokens(self) -> Tensor:
        """(S,) int64, always valid ids; meaningless where `finite` is 0."""
        return self.packed[0]

    @property
    def finite(self) -> Tensor:
        """(S,) int64: 0 where a logit was NaN or +inf, or all were -inf."""
        return self.packed[1]

    def to_list(self) -> list[int]:
        """The tokens on the host; waits for the device.

        Raises:
            ModelError: the logits of a row were not finite.
        """
        tokens, finite = self.packed.tolist()
        if not all(finite):
            raise ModelError(
                "the model's logits are not finite (NaN or infinity) in row "
                f"{finite.index(0)} of the batch: its dtype overflows, or the weights are damaged; "
                "try dtype float32, else download the weights again"
            )
        return tokens


class Logprobs(NamedTuple):
    """Natural log-probabilities under the model's own distribution, before any option."""

    token: Tensor  # (S,) float32, of the given tokens
    top_ids: Tensor  # (S, k) int64, the most likely first
    top: Tensor  # (S, k) float32


@dataclass(frozen=True)
class DrawOptions:
    """Temperature and filters of all positions of a step, and what the host knows of them."""

    # (5, S) float64: temperature (1 in greedy rows), top_k (V = off), top_p, min_p, u
    values: Tensor
    greedy: Tensor | None  # (S,) bool; None when no row is greedy
    max_top_k: int  # 0 when no row has top_k
    all_top_k: bool  # every row that is drawn has top_k
    any_top_p: bool
    any_min_p: bool

    @classmethod
    def build(
        cls, positions: Sequence[Position], vocab_size: int, device: torch.device
    ) -> DrawOptions:
        """Gather the positions' options."""
        drawn = [p.row for p in positions if p.row.temperature > 0]
        greedy = np.array([p.row.temperature == 0 for p in positions])
        top_ks = [min(row.top_k, vocab_size - 1) for row in drawn if 0 < row.top_k < vocab_size]
        values = np.zeros((5, len(positions)))
        for i, position in enumerate(positions):
            row = position.row
            if row.temperature == 0:
                values[:, i] = (1.0, vocab_size, 1.0, 0.0, 0.0)
            else:
                values[:, i] = (
                    max(row.temperature, _TINY),
                    row.top_k if 0 < row.top_k < vocab_size else vocab_size,
                    row.top_p,
                    row.min_p,
                    philox_uniform(row.seed, position.step, row.sample_index),
                )
        values_there, greedy_there = upload([values, greedy], device)
        return cls(
            values=values_there,
            greedy=greedy_there if greedy.any() else None,
            max_top_k=max(top_ks, default=0),
            all_top_k=len(top_ks) == len(drawn),
            any_top_p=any(row.top_p < 1 for row in drawn),
            any_min_p=any(row.min_p > 0 for row in drawn),
        )


class Sampler:
    """Chooses the next token of every sequence. Has no state; never mutates its logits."""

    def sample(
        self,
        logits: Tensor,
        rows: Sequence[SamplingRow],
        drafts: Sequence[Sequence[int]] | None = None,
    ) -> SampledTokens:
        """One token a row of logits (S, V), any float dtype. Does not wait for a GPU.

        rows: one a row of logits. With drafts, row i has 1 + len(drafts[i]) rows of logits in turn:
        after its last token, and after each of the tokens guessed to follow it. The token of each
        is what it would be if the drafts before it were the output; matchers are left as they were.
        """
        positions = positions_of(rows, drafts)
        assert logits.dim() == 2
        assert len(positions) == logits.shape[0]
        if any(p.changes_logits for p in positions):
            changes = LogitsChanges.build(positions, logits.shape[1], logits.device)
            logits = logits.to(torch.float32, copy=True)
            changes.apply(logits)
        if implementation_for(logits) == "triton":
            tokens = _choose_on_gpu(logits, positions)
            return _pack(tokens.clamp_min(0), tokens >= 0)
        return _choose(logits, positions)

    def logprobs(self, logits: Tensor, tokens: Tensor, k: int) -> Logprobs:
        """Log-probabilities of tokens (S,) and of the k most likely, from logits (S, V)."""
        logits = logits.to(torch.float32)
        normaliser = logits.logsumexp(dim=-1, keepdim=True)
        top = logits.topk(min(k, logits.shape[-1]), dim=-1)
        token = logits.gather(1, tokens[:, None]) - normaliser
        return Logprobs(token[:, 0], top.indices, top.values - normaliser)


def _choose(logits: Tensor, positions: Sequence[Position]) -> SampledTokens:
    """6 to 10 of the module's text in PyTorch."""
    if all(p.row.temperature == 0 for p in positions):
        # On the CPU `max` is several times faster than `argmax`; it returns a NaN if any is.
        best, tokens = logits.max(dim=-1)
        return _pack(tokens, best.isfinite())
    options = DrawOptions.build(positions, logits.shape[1], logits.device)
    logits = logits.to(torch.float32)
    best, tokens = logits.max(dim=-1)
    drawn = _draw(_kept(logits - best[:, None], options), options.values[4])
    tokens = drawn if options.greedy is None else torch.where(options.greedy, tokens, drawn)
    return _pack(tokens, best.isfinite())


def _choose_on_gpu(logits: Tensor, positions: Sequence[Position]) -> Tensor:
    """6 to 10 of the module's text by `kernels.sampling`: (S,) int64, -1 where not finite."""
    rows = [p.row for p in positions]
    if all(row.temperature == 0 for row in rows):
        return sampling.argmax(logits)
    arrays = (
        np.array([row.temperature and max(row.temperature, _TINY) for row in rows], np.float32),
        np.array([min(row.top_k, logits.shape[1]) for row in rows], np.int32),
        np.array([row.top_p for row in rows], np.float32),
        np.array([row.min_p for row in rows], np.float32),
        np.array([row.seed for row in rows], np.int64),
        np.array([p.step for p in positions], np.int64),
        np.array([row.sample_index for row in rows], np.int64),
    )
    filters = any(row.top_k > 0 or row.top_p < 1 for row in rows)
    return sampling.sample(logits, *upload(arrays, logits.device), filters=filters)


def _pack(tokens: Tensor, finite: Tensor) -> SampledTokens:
    return SampledTokens(torch.stack((tokens, finite.to(torch.int64))))


def _kept(shifted: Tensor, options: DrawOptions) -> Tensor:
    """p (S, V) float32 as in the module's text, with 0 for what the filters remove.

    shifted: (S, V) float32, logits minus their row's maximum.
    """
    temperature, top_k, top_p, min_p, _ = options.values
    p = (shifted / temperature.to(torch.float32)[:, None]).exp_()
    candidates = None
    if options.max_top_k:
        largest = p.topk(options.max_top_k, dim=-1).values
        last = (top_k.to(torch.int64) - 1).clamp(max=options.max_top_k - 1)
        threshold = largest.gather(1, last[:, None])[:, 0].masked_fill(top_k >= p.shape[1], 0.0)
        p = _keep_from(p, threshold)
        if options.all_top_k:
            candidates = _keep_from(largest, threshold)
    if options.any_top_p:
        p = _keep_from(p, _top_p_threshold(p, top_p, candidates))
    if options.any_min_p:
        p = _keep_from(p, min_p.to(torch.float32))
    return p


def _keep_from(p: Tensor, threshold: Tensor) -> Tensor:
    """p (S, V) where it is at least its row's threshold (S,), else 0."""
    # On the CPU a comparison into floats and a product are several times faster than a mask.
    return torch.ge(p, threshold[:, None], out=torch.empty_like(p)).mul_(p)


def _top_p_threshold(p: Tensor, top_p: Tensor, candidates: Tensor | None) -> Tensor:
    """(S,) float32: the largest v for which the p >= v hold the share top_p; 0 where top_p is 1.

    p: (S, V) float32. top_p: (S,) float64. candidates: (S, n), the largest of p in descending
    order, where all smaller p are 0 or equal to the last that is not; None when not known.
    """
    needed = top_p * p.sum(dim=-1, dtype=torch.float64)
    is_off = top_p >= 1
    if candidates is None:
        candidates = _top_p_candidates(p, needed.masked_fill(is_off, 0.0))
    cumulative = candidates.cumsum(dim=-1, dtype=torch.float64)
    last = (cumulative < needed[:, None]).sum(dim=-1).clamp(max=candidates.shape[1] - 1)
    return candidates.gather(1, last[:, None])[:, 0].masked_fill(is_off, 0.0)


def _top_p_candidates(p: Tensor, needed: Tensor) -> Tensor:
    """(S, n) float32: the n largest of p (S, V), descending; their sums reach `needed` (S,)."""
    if p.device.type == "cpu":  # asking whether a few suffice would wait for a GPU
        for size in _TOP_P_CANDIDATES:
            if size < p.shape[1]:
                largest = p.topk(size, dim=-1).values
                if bool((largest.sum(dim=-1, dtype=torch.float64) >= needed).all()):
                    return largest
    return p.sort(dim=-1, descending=True).values


def _draw(p: Tensor, u: Tensor) -> Tensor:
    """(S,) int64: the first i where the running sum of p (S, V) is above u (S,) times the sum."""
    cumulative = p.cumsum(dim=-1, dtype=torch.float64)
    target = u * cumulative[:, -1]
    tokens = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]
    return tokens.clamp(max=p.shape[1] - 1)  # NaN finds no place
