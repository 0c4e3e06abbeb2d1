"""From logits to tokens: the reference sampler, on whatever device the logits are.

The options act in this order, all in float32:

1. logits as float32;
2. `logit_bias` is added;
3. tokens that would end the sequence before `min_tokens` get -inf;
4. `repetition_penalty` r, for tokens of prompt or output: l / r where l > 0, else l * r;
   then l - `frequency_penalty` * count - `presence_penalty` * (count > 0), count in the output;
5. temperature 0: the token with the largest logit, the lowest id of equals. Otherwise
   p = exp((l - max l) / temperature), so that the largest p is 1;
6. `top_k`: the tokens whose p is at least the k-th largest are kept;
7. `top_p`: of these, the tokens with p >= v are kept, for the largest v for which they hold at
   least the share `top_p` of the sum of p over what 6 kept;
8. `min_p`: the tokens with p >= `min_p` are kept;
9. one token of the kept is drawn, with probability p / sum p.

6 to 8 are thresholds: a token equal to one that is kept is kept too, so no order of equals matters.

The draw inverts the cumulative distribution in the order of the vocabulary: with u from
`philox_uniform` and sums in float64, the token is the first i with p_0 + ... + p_i > u * (p_0 + ...
+ p_(V-1)). It depends on the sequence's own logits, seed, step and sample index only: a sequence
gets the same tokens alone and in a batch.

`philox_uniform` is Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy
as 1, 2, 3", 2011) with key = (low, high 32 bits of the seed) and counter = (step, sample index, 0,
0). With w the first of its four outputs, u = (w >> 8) * 2**-24: 0 <= u < 1, exact in float32.
`kernels/sampling.py` draws with the same numbers on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hayate.errors import ModelError
from hayate.sampling_params import SamplingParams

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


class _TokenCounts:
    """The distinct tokens of prompt and output, and how often each occurs in the output."""

    def __init__(self, prompt_ids: Sequence[int]) -> None:
        distinct = dict.fromkeys(prompt_ids)
        self._slot = {token_id: i for i, token_id in enumerate(distinct)}
        self._ids = np.fromiter(distinct, dtype=np.int64, count=len(distinct))
        self._counts = np.zeros(len(distinct), dtype=np.int64)
        self._num_counted = 0

    def update(self, output_ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Count the tokens new in `output_ids`; returns all distinct ids, and their counts."""
        for token_id in output_ids[self._num_counted :]:
            slot = self._slot.setdefault(token_id, len(self._slot))
            if slot == len(self._ids):
                grow = max(64, slot)  # doubling, so that appending is O(1) amortised
                self._ids = np.pad(self._ids, (0, grow))
                self._counts = np.pad(self._counts, (0, grow))
            self._ids[slot] = token_id
            self._counts[slot] += 1
        self._num_counted = len(output_ids)
        return self._ids[: len(self._slot)], self._counts[: len(self._slot)]


@dataclass(eq=False)
class SamplingRow:
    """One sequence as the sampler sees it; keep the same object for the life of the sequence.

    params: resolved (`SamplingParams.resolved`). seed: of the request, also when the user gave
    none. output_ids: the tokens generated so far; the owner appends to this list. stop_ids: the
    tokens that would end the sequence (`stop_token_ids`, and the end tokens unless `ignore_eos`).
    sample_index: which of the request's n samples this is.
    """

    params: SamplingParams
    seed: int
    prompt_ids: Sequence[int] = ()
    output_ids: list[int] = field(default_factory=list)
    stop_ids: frozenset[int] = frozenset()
    sample_index: int = 0

    def __post_init__(self) -> None:
        params = self.params
        assert params.temperature is not None, "params must be resolved"
        assert params.top_k is not None
        assert params.top_p is not None
        assert params.min_p is not None
        assert params.repetition_penalty is not None
        self.temperature = params.temperature
        self.top_k = params.top_k
        self.top_p = params.top_p
        self.min_p = params.min_p
        self.penalties = (
            params.repetition_penalty,
            params.presence_penalty,
            params.frequency_penalty,
        )
        self.has_penalties = self.penalties != (1.0, 0.0, 0.0)
        repeats = self.has_penalties and params.repetition_penalty != 1.0
        self.counts = _TokenCounts(self.prompt_ids if repeats else ())

    @property
    def step(self) -> int:
        """Number of the token that is drawn next, from 0."""
        return len(self.output_ids)

    @property
    def banned_ids(self) -> frozenset[int]:
        return self.stop_ids if self.step < self.params.min_tokens else frozenset()


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


class _Entries(NamedTuple):
    """Single elements of the logits: `values` belong to `logits[rows, ids]`."""

    rows: Tensor
    ids: Tensor
    values: tuple[Tensor, ...]


@dataclass(frozen=True)
class SamplingBatch:
    """The options of all rows of a step as tensors on the device, and what the host knows."""

    bias: _Entries | None  # values: (bias,)
    bans: _Entries | None
    penalties: _Entries | None  # values: (count, repetition, presence, frequency)
    options: (
        Tensor  # (5, S) float64: temperature (1 in greedy rows), top_k (V = off), top_p, min_p, u
    )
    greedy: Tensor | None  # (S,) bool; None when no row is greedy
    any_drawn: bool
    max_top_k: int  # 0 when no row has top_k
    all_top_k: bool  # every row that is drawn has top_k
    any_top_p: bool
    any_min_p: bool

    @property
    def changes_logits(self) -> bool:
        return any(entries is not None for entries in (self.bias, self.bans, self.penalties))

    @classmethod
    def build(
        cls, rows: Sequence[SamplingRow], vocab_size: int, device: torch.device
    ) -> SamplingBatch:
        """Gather the rows' options. Does not wait for the device."""
        drawn = [row for row in rows if row.temperature > 0]
        greedy = np.array([row.temperature == 0 for row in rows])
        top_ks = [min(row.top_k, vocab_size - 1) for row in drawn if 0 < row.top_k < vocab_size]
        options = np.zeros((5, len(rows)))
        for i, row in enumerate(rows):
            if row.temperature == 0:
                options[:, i] = (1.0, vocab_size, 1.0, 0.0, 0.0)
            else:
                options[:, i] = (
                    max(row.temperature, _TINY),
                    row.top_k if 0 < row.top_k < vocab_size else vocab_size,
                    row.top_p,
                    row.min_p,
                    philox_uniform(row.seed, row.step, row.sample_index),
                )
        return cls(
            bias=_bias_entries(rows, device),
            bans=_ban_entries(rows, vocab_size, device),
            penalties=_penalty_entries(rows, device),
            options=_upload(options, device),
            greedy=_upload(greedy, device) if greedy.any() else None,
            any_drawn=bool(drawn),
            max_top_k=max(top_ks, default=0),
            all_top_k=len(top_ks) == len(drawn),
            any_top_p=any(row.top_p < 1 for row in drawn),
            any_min_p=any(row.min_p > 0 for row in drawn),
        )


class Sampler:
    """Chooses the next token of every sequence. Has no state; never mutates its logits."""

    def sample(self, logits: Tensor, rows: Sequence[SamplingRow]) -> SampledTokens:
        """One token a row; logits: (S, V), any float dtype; rows: S. Does not wait for a GPU."""
        assert logits.dim() == 2
        assert len(rows) == logits.shape[0]
        if not any(map(_needs_options, rows)):
            # On the CPU `max` is several times faster than `argmax`; it returns a NaN if any is.
            best, tokens = logits.max(dim=-1)
            return _pack(tokens, best)
        batch = SamplingBatch.build(rows, logits.shape[1], logits.device)
        adjusted = logits.to(torch.float32, copy=batch.changes_logits)
        _change_logits(adjusted, batch)
        best, tokens = adjusted.max(dim=-1)
        if batch.any_drawn:
            drawn = _draw(_kept(adjusted - best[:, None], batch), batch.options[4])
            tokens = drawn if batch.greedy is None else torch.where(batch.greedy, tokens, drawn)
        return _pack(tokens, best)

    def logprobs(self, logits: Tensor, tokens: Tensor, k: int) -> Logprobs:
        """Log-probabilities of tokens (S,) and of the k most likely, from logits (S, V)."""
        logits = logits.to(torch.float32)
        normaliser = logits.logsumexp(dim=-1, keepdim=True)
        top = logits.topk(min(k, logits.shape[-1]), dim=-1)
        token = logits.gather(1, tokens[:, None]) - normaliser
        return Logprobs(token[:, 0], top.indices, top.values - normaliser)


def _needs_options(row: SamplingRow) -> bool:
    return bool(row.temperature > 0 or row.has_penalties or row.params.logit_bias or row.banned_ids)


def _pack(tokens: Tensor, best: Tensor) -> SampledTokens:
    """best: (S,), the largest logit of each row: NaN if any is NaN, -inf if all are."""
    return SampledTokens(torch.stack((tokens, best.isfinite().to(torch.int64))))


def _upload(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy to the device without waiting for it (from pinned memory on a GPU)."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _entries(
    rows: Sequence[int], ids: Sequence[int], values: Sequence[float], device: torch.device
) -> _Entries | None:
    if not rows:
        return None
    index = _upload(np.array([rows, ids], dtype=np.int64), device)
    return _Entries(index[0], index[1], (_upload(np.array(values, np.float32), device),))


def _bias_entries(rows: Sequence[SamplingRow], device: torch.device) -> _Entries | None:
    found = [
        (i, token_id, bias)
        for i, row in enumerate(rows)
        for token_id, bias in (row.params.logit_bias or {}).items()
    ]
    return _entries([f[0] for f in found], [f[1] for f in found], [f[2] for f in found], device)


def _ban_entries(
    rows: Sequence[SamplingRow], vocab_size: int, device: torch.device
) -> _Entries | None:
    """End tokens outside the vocabulary are left out: the model cannot produce them."""
    found = [
        (i, token_id)
        for i, row in enumerate(rows)
        for token_id in row.banned_ids
        if token_id < vocab_size
    ]
    return _entries([f[0] for f in found], [f[1] for f in found], [], device)


def _penalty_entries(rows: Sequence[SamplingRow], device: torch.device) -> _Entries | None:
    row_parts: list[np.ndarray] = []
    id_parts: list[np.ndarray] = []
    value_parts: list[np.ndarray] = []
    for i, row in enumerate(rows):
        if row.has_penalties:
            ids, counts = row.counts.update(row.output_ids)
            values = np.empty((4, len(ids)), np.float32)
            values[0] = counts
            values[1:] = np.array(row.penalties)[:, None]
            row_parts.append(np.full(len(ids), i))
            id_parts.append(ids)
            value_parts.append(values)
    if not row_parts:
        return None
    index = _upload(np.stack((np.concatenate(row_parts), np.concatenate(id_parts))), device)
    columns = _upload(np.concatenate(value_parts, axis=1), device)
    return _Entries(index[0], index[1], columns.unbind(0))


def _change_logits(logits: Tensor, batch: SamplingBatch) -> None:
    """Bias, bans, penalties, in place on logits (S, V) float32. A row has each id at most once."""
    if batch.bias is not None:
        rows, ids, (bias,) = batch.bias
        logits[rows, ids] += bias
    if batch.bans is not None:
        # Assigning the number itself would copy it to the GPU, and wait.
        minus_infinity = logits.new_full((), -torch.inf)
        logits[batch.bans.rows, batch.bans.ids] = minus_infinity
    if batch.penalties is not None:
        rows, ids, (count, repetition, presence, frequency) = batch.penalties
        value = logits[rows, ids]
        value = torch.where(value > 0, value / repetition, value * repetition)
        logits[rows, ids] = value - frequency * count - presence * (count > 0)


def _kept(shifted: Tensor, batch: SamplingBatch) -> Tensor:
    """p (S, V) float32 as in the module's text, with 0 for what the filters remove.

    shifted: (S, V) float32, logits minus their row's maximum.
    """
    temperature, top_k, top_p, min_p, _ = batch.options
    p = (shifted / temperature.to(torch.float32)[:, None]).exp_()
    candidates = None
    if batch.max_top_k:
        largest = p.topk(batch.max_top_k, dim=-1).values
        last = (top_k.to(torch.int64) - 1).clamp(max=batch.max_top_k - 1)
        threshold = largest.gather(1, last[:, None])[:, 0].masked_fill(top_k >= p.shape[1], 0.0)
        p = _keep_from(p, threshold)
        if batch.all_top_k:
            candidates = _keep_from(largest, threshold)
    if batch.any_top_p:
        p = _keep_from(p, _top_p_threshold(p, top_p, candidates))
    if batch.any_min_p:
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
