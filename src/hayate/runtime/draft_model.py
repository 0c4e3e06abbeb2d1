"""A second, small model that guesses what the first will say.

It has a KV cache with as many pages as that of the model it drafts for (the target), and keeps a *mirror* of every
sequence: the same tokens, pages of its own. The mirror follows the target: what was guessed wrong is cut off, and
its place in the cache written again.

A guess is drawn as the target draws: with the sequence's own temperature and filters, and with the same random
number u for the same place of the output. Both invert their cumulative distribution at the same u, so they agree
more often than two independent draws would, and more often than the draft model's favourite would be drawn.
Penalties, biases and grammars are left to the target. It sees no pictures: sequences that show some get no guesses.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch

from hayate.checkpoint.hub import resolve_model
from hayate.checkpoint.index import Checkpoint
from hayate.config import EnginePlan
from hayate.errors import ModelError
from hayate.models.config import ModelConfig
from hayate.models.decoder import CausalLM
from hayate.runtime.launched import Download, Launched
from hayate.runtime.loading import open_checkpoint
from hayate.runtime.page_allocator import PageAllocator
from hayate.runtime.runner import Runner
from hayate.runtime.sampler import Sampler
from hayate.runtime.sampling_row import SamplingRow
from hayate.runtime.scheduler import Step
from hayate.runtime.sequence import Sequence
from hayate.runtime.upload import upload
from hayate.sampling_params import SamplingParams
from hayate.text.tokenizer import Tokenizer

_PRIOR, _PRIOR_WEIGHT = (
    0.7,
    4.0,
)  # acceptance of a draft before any was verified, and as how many it counts
_MEMORY = 64.0  # drafts that the count of a sequence remembers
_FADING = 0.99  # of that memory with every token: one who was turned off is asked again
_MOST_BEHIND = 4  # tokens that the first step of a proposal may compute; more are a prompt
_TRIAL_TOKENS = 64  # of the prompt by which the speed is measured


def open_draft(
    name: str, config: ModelConfig, tokenizer: Tokenizer | None
) -> tuple[ModelConfig, Checkpoint]:
    """The draft model `name` (folder, built-in name or hub id) for the target of `config` and `tokenizer`.

    Raises:
        ModelError: it is not there or not valid, or its vocabulary is not the target's; the message says where they
            differ.
    """
    folder = resolve_model(name)
    draft, checkpoint = open_checkpoint(folder)
    if tokenizer is None:
        if draft.vocab_size != config.vocab_size:
            raise ModelError(
                f"--speculative {name}: the draft model has {draft.vocab_size} tokens and the model "
                f"{config.vocab_size}; it must have the same vocabulary"
            )
        return draft, checkpoint
    ours, theirs = tokenizer.backend.get_vocab(), Tokenizer(folder).backend.get_vocab()
    if ours != theirs:
        differing = sorted(t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t))
        token = differing[0]
        raise ModelError(
            f"--speculative {name}: the draft model must have the same vocabulary, but {len(differing)} tokens differ; "
            f"{token!r} is {theirs.get(token, 'missing')} there and {ours.get(token, 'missing')} in the model"
        )
    return draft, checkpoint


@dataclass(eq=False)
class _Mirror:
    """A sequence as the draft model sees it."""

    sequence: Sequence
    row: SamplingRow
    num_agreed: int = 0  # output tokens known to be the target's
    hits: float = _PRIOR * _PRIOR_WEIGHT
    trials: float = _PRIOR_WEIGHT
    ready: bool = False  # it takes part in the proposal being made

    @classmethod
    def of(cls, target: Sequence, max_len: int) -> _Mirror:
        given = target.params
        params = SamplingParams(
            temperature=given.temperature,
            top_k=given.top_k,
            top_p=given.top_p,
            min_p=given.min_p,
            repetition_penalty=1.0,
        )
        sequence = Sequence(target.prompt_ids, params, max_len, target.seed, target.sample_index)
        return cls(sequence, SamplingRow(params, target.seed, (), sequence.output_ids))

    def follow(self, target: Sequence) -> None:
        """Take over the target's tokens; what was computed for others counts as not computed."""
        mine, theirs = self.sequence.output_ids, target.output_ids
        same, most = self.num_agreed, min(len(mine), len(theirs))
        while same < most and mine[same] == theirs[same]:
            same += 1
        mine[same:] = theirs[same:]
        self.num_agreed = len(mine)
        # The last token is always computed anew: the guess comes from it.
        valid = min(len(self.sequence.prompt_ids) + same, self.sequence.num_tokens - 1)
        self.sequence.num_computed = min(self.sequence.num_computed, valid)


class DraftModelProposer:
    """Guesses with a draft model. Its statistics come from verified drafts alone."""

    shadows = False
    first_run = False

    def __init__(self, model: CausalLM, plan: EnginePlan, vocab_size: int) -> None:
        """plan: the target's; both models' weights and caches are in it. vocab_size: the target's."""
        self.vocab_size = vocab_size
        self.max_len = min(plan.max_model_len, model.config.max_position_embeddings)
        self.plan = dataclasses.replace(
            plan, max_model_len=self.max_len, prefix_cache=False, speculative=None
        )
        self.runner = Runner(model, self.plan)
        self.pages = PageAllocator(plan.num_pages, plan.page_size, prefix_cache=False)
        self.sampler = Sampler()
        self._mirrors: dict[Sequence, _Mirror] = {}
        self._seconds_per_token = self._measure()

    # -- what is expected -----------------------------------------------------------------------------

    def observe(self, sequence: Sequence, token: int) -> None:
        """A token was appended to the sequence: its past acceptance counts a little less."""
        if sequence.spans:
            return  # it would guess blindfold
        mirror = self._mirrors.get(sequence)
        if mirror is None:
            mirror = self._mirrors[sequence] = _Mirror.of(sequence, self.max_len)
        mirror.hits = _PRIOR * _PRIOR_WEIGHT + _FADING * (mirror.hits - _PRIOR * _PRIOR_WEIGHT)
        mirror.trials = _PRIOR_WEIGHT + _FADING * (mirror.trials - _PRIOR_WEIGHT)

    def record(self, sequence: Sequence, num_drafts: int, num_accepted: int) -> None:
        """Of `num_drafts` verified drafts the first `num_accepted` were accepted."""
        mirror = self._mirrors.get(sequence)
        if mirror is None:
            return
        mirror.hits += num_accepted
        mirror.trials += num_accepted + (num_accepted < num_drafts)
        if mirror.trials > _MEMORY:
            mirror.hits *= _MEMORY / mirror.trials
            mirror.trials = _MEMORY

    def expected(self, sequence: Sequence, count: int) -> float:
        """How many of `count` drafts would be accepted, on average, each being as likely as the next."""
        mirror = self._mirrors.get(sequence)
        if mirror is None or sequence.num_tokens + count > self.max_len:
            return 0.0
        rate = mirror.hits / mirror.trials
        return rate * (1 - rate**count) / (1 - rate) if rate < 1 else float(count)

    def preparation_seconds(self, sequences: Seq[Sequence]) -> float:
        """The time to compute what the draft model has not seen of the sequences: their prompts, at first."""
        behind = 0
        for sequence in sequences:
            mirror = self._mirrors.get(sequence)
            if mirror is not None and sequence.num_tokens < self.max_len:
                behind += max(sequence.num_tokens - mirror.sequence.num_computed - _MOST_BEHIND, 0)
        return behind * self._seconds_per_token

    def forget(self, sequence: Sequence) -> None:
        mirror = self._mirrors.pop(sequence, None)
        if mirror is not None:
            self._release(mirror)

    # -- guessing ---------------------------------------------------------------------------------------

    @torch.inference_mode()
    def propose(self, sequences: Seq[Sequence], counts: Seq[int]) -> list[list[int]]:
        """Up to `counts[i]` tokens to follow sequence i; none where its context or the cache is full."""
        self.first_run = False
        size = max(counts, default=0)
        ready = self._ready(sequences, counts, size)
        guesses: dict[Sequence, list[int]] = {}
        if ready:
            mirrors = [self._mirrors[s] for s in ready]
            try:
                self._catch_up([m.sequence for m in mirrors])
                guesses = dict(zip(ready, self._guess(mirrors, size), strict=True))
            finally:
                for mirror in mirrors:
                    mirror.ready = False
                    mirror.sequence.status = "waiting"  # its row on the device may go to another
                    mirror.sequence.num_in_flight = 0
        return [self._valid(guesses.get(s, []))[:n] for s, n in zip(sequences, counts, strict=True)]

    def _ready(self, sequences: Seq[Sequence], counts: Seq[int], size: int) -> list[Sequence]:
        """Those that can be guessed, their mirrors up to date and with room for `size` tokens more."""
        ready = []
        for sequence, count in zip(sequences, counts, strict=True):
            mirror = self._mirrors.get(sequence)
            if not count or mirror is None or sequence.num_tokens + size > self.max_len:
                continue
            mirror.follow(sequence)
            mirror.ready = True
            if self._make_room(mirror, sequence.num_tokens + size):
                mirror.sequence.status = "running"
                ready.append(sequence)
            else:
                mirror.ready = False
        return ready

    def _make_room(self, mirror: _Mirror, num_tokens: int) -> bool:
        """Pages for `num_tokens` tokens, if need be those of sequences that take no part just now."""
        if self.pages.extend(mirror.sequence, num_tokens):
            return True
        for other in self._mirrors.values():
            if not other.ready and other.sequence.page_ids:
                self._release(other)
                if self.pages.extend(mirror.sequence, num_tokens):
                    return True
        return False

    def _release(self, mirror: _Mirror) -> None:
        """Give up what the device holds of a mirror; it starts over if it is needed again."""
        self.pages.release(mirror.sequence)
        self.runner.release(mirror.sequence)
        mirror.sequence.num_computed = 0

    def _catch_up(self, sequences: Seq[Sequence]) -> None:
        """Compute prompts, and what was generated without drafts, up to the last few tokens."""
        most = self.plan.max_num_batched_tokens
        for sequence in sequences:
            few = min(_MOST_BEHIND, len(sequence.output_ids) + 1)
            while (behind := sequence.num_uncomputed) > few:
                count = min(behind - 1, most)
                self.runner.launch(
                    Step((sequence,), (count,), (0,), (False,), num_decode=0), on_device=True
                )

    def _guess(self, mirrors: Seq[_Mirror], size: int) -> list[list[int]]:
        """`size` tokens for each; the tokens stay on a GPU until all are there."""
        sequences = tuple(m.sequence for m in mirrors)
        decode = _decode_step(sequences)
        drawn = [self._first(mirrors, decode)]
        for _ in range(size - 1):
            launched = self.runner.launch(decode, on_device=True)
            drawn.append(self._draw(launched, mirrors))
        (columns,) = Download(torch.stack(drawn)).wait()
        guesses = [list(ids) for ids in zip(*columns, strict=True)]
        for mirror, ids in zip(mirrors, guesses, strict=True):
            del mirror.sequence.output_ids[mirror.num_agreed :]
            mirror.sequence.output_ids += ids
        return guesses

    def _first(self, mirrors: Seq[_Mirror], decode: Step) -> torch.Tensor:
        """The first guess of each, from the tokens not computed yet: two where all of the last drafts were accepted.

        Computed as a verify step of equally many tokens each, which a GPU has a graph for: all tokens but
        the first count as drafts.
        """
        sequences = decode.sequences
        behind = max(s.num_uncomputed for s in sequences)
        behind = min([behind, *(len(s.output_ids) + 1 for s in sequences)])
        if behind == 1 and all(s.num_uncomputed == 1 for s in sequences):
            return self._draw(self.runner.launch(decode, on_device=True), mirrors)
        counts = [max(behind, s.num_uncomputed) for s in sequences]
        for sequence, count in zip(sequences, counts, strict=True):
            split = len(sequence.output_ids) - (count - 1)
            sequence.draft_ids = sequence.output_ids[split:]
            del sequence.output_ids[split:]
            sequence.num_computed = sequence.num_tokens - 1
        step = Step(
            sequences,
            tuple(counts),
            tuple(n - 1 for n in counts),
            (True,) * len(counts),
            num_decode=0,
        )
        launched = self.runner.launch(step, on_device=True)
        for sequence in sequences:
            sequence.output_ids += sequence.draft_ids
            sequence.draft_ids = []
        tokens = self._draw(launched, mirrors)
        self.runner.keep_tokens(sequences, tokens)
        return tokens

    def _draw(self, launched: Launched, mirrors: Seq[_Mirror]) -> torch.Tensor:
        """The token (S,) after the last output of each sequence, -1 where the logits are not finite."""
        self.first_run = self.first_run or launched.first_run
        rows = [launched.index[end - 1] for end in np.cumsum(launched.num_outputs)]
        (index,) = upload([np.array(rows)], self.runner.device)
        if launched.tokens is not None:
            return launched.tokens.index_select(0, index)
        assert launched.logits is not None
        logits = launched.logits.index_select(0, index)
        sampled = self.sampler.sample(logits, [m.row for m in mirrors])
        for mirror, token in zip(mirrors, sampled.tokens.tolist(), strict=True):
            mirror.sequence.output_ids.append(token)
            mirror.sequence.num_in_flight = 0
        return torch.where(sampled.finite > 0, sampled.tokens, -1)

    def _valid(self, ids: list[int]) -> list[int]:
        """Up to the first that is no token of the target."""
        return ids[: next((i for i, t in enumerate(ids) if not 0 <= t < self.vocab_size), len(ids))]

    def _measure(self) -> float:
        """Seconds a token of a prompt takes, from a trial run; compiles what the first proposal will need."""
        count = min(_TRIAL_TOKENS, self.max_len - 1, self.plan.max_num_batched_tokens)
        params = SamplingParams(
            temperature=0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0
        )
        best = float("inf")
        for _ in range(2):
            sequence = Sequence([0] * (count + 1), params, self.max_len, 0)
            if not self.pages.extend(sequence, count):
                return 0.0
            start = time.perf_counter()
            step = Step((sequence,), (count,), (0,), (False,), num_decode=0)
            sequence.status = "running"
            self.runner.launch(step, on_device=True)
            if self.runner.device.type == "cuda":
                torch.cuda.synchronize(self.runner.device)
            best = min(best, time.perf_counter() - start)
            self.pages.release(sequence)
            self.runner.release(sequence)
        return best / count


def _decode_step(sequences: tuple[Sequence, ...]) -> Step:
    count = len(sequences)
    return Step(sequences, (1,) * count, (0,) * count, (True,) * count, num_decode=count)
