"""Scheduler: which sequences run in the next step, and how many of their tokens. No torch here.

There is one kind of step. Every sequence that decodes computes one token (and its drafts); what remains of the
budget goes to prompts, a chunk of each, the most urgent first. So a long prompt does not keep others waiting,
and short ones fill the step. Urgency is (priority, order of arrival), the lowest first.

A sequence is admitted when its whole prompt finds room, with some to spare; pages are then taken chunk by chunk.
When they run out all the same the least urgent is preempted: it waits again, with the tokens it has. Its full pages
stay reusable, so it soon catches up if they are not needed meanwhile.

Steps are planned ahead of their tokens. A sequence may be scheduled again, preempted or finished while its last
token is in flight: a decoding sequence has `num_computed + 1` tokens, known or not. One that was preempted waits
until the token has been received.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import chain

from hayate.errors import RequestTooLarge
from hayate.runtime.page_allocator import PageAllocator
from hayate.runtime.sequence import Sequence

_RUNNING_PER_SPARE_PAGE = 4  # with pages of 64 tokens, room for 16 steps of all that run


@dataclass(frozen=True)
class Step:
    """What runs: `num_tokens[i]` tokens of `sequences[i]`, from its `num_computed` on.

    First come the `num_decode` sequences of which one token is computed and one sampled; then those with drafts to
    verify, the last `num_drafts[i]` of their tokens; then chunks of prompts. `samples[i]` is False where
    a prompt goes on after the chunk.
    """

    sequences: tuple[Sequence, ...]
    num_tokens: tuple[int, ...]
    num_drafts: tuple[int, ...]
    samples: tuple[bool, ...]
    num_decode: int

    @property
    def is_decode(self) -> bool:
        return self.num_decode == len(self.sequences)


class Scheduler:
    """Decides what the next step computes, and owns the pages of all sequences.

    A step holds at most `max_num_seqs` sequences and `max_num_batched_tokens` tokens; of prompts, at most
    `max_chunk_tokens` beside sequences that decode.

    A step that `next_batch` has returned must be launched before the next call, or `restart_running` be called:
    the pages of its chunks are shared from then on, even within the step, for in every layer keys and values are
    written before they are read.
    """

    def __init__(
        self,
        pages: PageAllocator,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_chunk_tokens: int | None = None,
    ) -> None:
        self.pages = pages
        self.max_num_seqs = min(max_num_seqs, max_num_batched_tokens)  # each decodes in every step
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_chunk_tokens = max_chunk_tokens or max_num_batched_tokens
        self.waiting: list[Sequence] = []  # the most urgent first
        self.prefilling: list[Sequence] = []  # admitted, the prompt not computed to its end
        self.decoding: list[Sequence] = []  # in the order in which they began
        self.num_preemptions = 0
        self.num_prompt_tokens_queried = 0  # of sequences admitted for the first time
        self.num_prompt_tokens_cached = 0  # of these, found in the prefix cache
        self._num_added = 0
        self._full = False  # nobody can be admitted until somebody leaves or comes
        self._decode_step: Step | None = None  # of all that decode, while these stay the same

    @property
    def running(self) -> list[Sequence]:
        return self.decoding + self.prefilling

    @property
    def num_running(self) -> int:
        return len(self.decoding) + len(self.prefilling)

    @property
    def num_waiting(self) -> int:
        return len(self.waiting)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.decoding or self.prefilling)

    # -- coming and going -------------------------------------------------------------------------

    def check_fits(self, sequence: Sequence) -> None:
        """RequestTooLarge if a new sequence could outgrow the cache even alone."""
        capacity = self.pages.num_pages * self.pages.page_size
        if sequence.limit - 1 > capacity:
            raise RequestTooLarge(
                f"a prompt of {len(sequence.prompt_ids)} tokens and its answer may take {sequence.limit - 1} "
                f"places of the KV cache, which holds {capacity} in all; shorten the prompt, lower max_tokens or "
                "raise --kv-memory"
            )

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence; `check_fits` applies."""
        self.check_fits(sequence)
        sequence.order = self._num_added
        self._num_added += 1
        self._wait(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Remove a sequence, wherever it is, and take back its pages. A launched step may still compute it."""
        if sequence.status == "running":
            self._leave(sequence)
        elif sequence.status == "waiting":
            self.waiting.remove(sequence)
            self._full = False
        sequence.status = "finished"

    def restart_running(self) -> None:
        """After a failed step: whatever is launched is lost, and all that ran wait again with the tokens they have.

        What was computed is not trusted any more: the reusable pages are dropped too.
        """
        for sequence in chain(self.waiting, self.decoding, self.prefilling):
            sequence.num_in_flight = 0
            sequence.draft_ids = []
        for sequence in self.running:
            self._leave(sequence)
            self._wait(sequence)
        self.pages.forget()

    def check(self) -> None:
        """AssertionError unless pages and queues are sound. Slow: for tests."""
        self.pages.check(self.running)
        assert self.waiting == sorted(self.waiting, key=_urgency)
        assert all(s.status == "waiting" and not s.page_ids for s in self.waiting)
        assert all(s.status == "running" for s in self.running)
        assert len({id(s) for s in chain(self.running, self.waiting)}) == (
            self.num_running + self.num_waiting
        )
        assert self.num_running <= self.max_num_seqs
        for sequence in self.running:
            assert len(sequence.page_ids) * self.pages.page_size >= sequence.num_computed

    # -- the next step ----------------------------------------------------------------------------

    def next_batch(self) -> Step | None:
        """The next step, its pages allocated; None when nothing can run before tokens in flight are received.

        A sequence whose last token is computed has room for one more behind it, unless that can never be computed.
        The same sequences decoding again are the same `Step` object.
        """
        blocked, drafts = self._prepare_decoding()
        num_decoding = len(self.decoding) - len(blocked) + sum(drafts.values())
        chunks = self._prepare_prompts(num_decoding)
        if not (blocked or drafts or chunks):
            if self._decode_step is None and self.decoding:
                self._decode_step = _step(self.decoding, {}, [])
            return self._decode_step
        # Of those that still decode: some may have been preempted for a prompt.
        singles = [s for s in self.decoding if s not in blocked and s not in drafts]
        verifying = {s: drafts[s] for s in self.decoding if s in drafts}
        step = _step(singles, verifying, chunks)
        for sequence, count in chunks:
            if count == sequence.num_uncomputed:
                self.prefilling.remove(sequence)
                self.decoding.append(sequence)
                self._decode_step = None
        return step if step.sequences else None

    def _prepare_decoding(self) -> tuple[set[Sequence], dict[Sequence, int]]:
        """Pages for all that decode. Returns those that cannot run now, and the number of drafts of others."""
        blocked: set[Sequence] = set()
        drafts: dict[Sequence, int] = {}
        due = [s for s in self.decoding if s.num_computed >= s.wake or s.draft_ids]
        room = self.max_num_batched_tokens - self.num_running  # for drafts: a token of each is kept
        for sequence in sorted(due, key=_urgency):
            if sequence.status != "running":
                continue  # preempted for one before it
            left = sequence.limit - 1 - sequence.num_computed
            verifying = sequence.draft_ids and sequence.num_in_flight
            if left < 1 or verifying:
                blocked.add(sequence)
                continue
            self.pages.publish(sequence, min(sequence.num_computed, sequence.num_tokens))
            count = min(len(sequence.draft_ids), left - 1, room)
            # Nobody is preempted for drafts.
            if count and self.pages.extend(sequence, _room(sequence, 1 + count)):
                drafts[sequence] = count
                room -= count
            if not self._extend(sequence, 1):
                drafts.pop(sequence, None)
        return blocked, drafts

    def _prepare_prompts(self, num_decoding: int) -> list[tuple[Sequence, int]]:
        """Chunks of prompts, with their pages, beside `num_decoding` other tokens."""
        left = self.max_num_batched_tokens - num_decoding
        if num_decoding:
            left = min(left, self.max_chunk_tokens)
        begun = sorted(self.prefilling, key=_urgency)
        chunks: list[tuple[Sequence, int]] = []
        while left > 0:
            sequence = self._next_prompt(begun)
            if sequence is None:
                break
            if chunks and left < self.pages.page_size:
                break  # not worth another chunk
            if sequence.status == "waiting" and not self._admit(sequence):
                continue
            count = min(sequence.num_uncomputed, left)
            if not self._extend(sequence, count):
                break
            self.pages.publish(sequence, sequence.num_computed + count)
            chunks.append((sequence, count))
            left -= count
            if begun and begun[0] is sequence:
                begun.pop(0)
        return chunks

    def _next_prompt(self, begun: list[Sequence]) -> Sequence | None:
        """The most urgent of those begun and those waiting, if the latter can be admitted."""
        while begun and begun[0].status != "running":
            begun.pop(0)  # preempted in this very step
        head = self.waiting[0] if self.waiting and not self._full else None
        if head is None or head.num_in_flight:
            return begun[0] if begun else None
        return min(begun[0], head, key=_urgency) if begun else head

    def _admit(self, sequence: Sequence) -> bool:
        """Let the most urgent waiting sequence run, for which less important ones may have to leave."""
        sequence.num_computed = self.pages.reuse(sequence)
        while not self._has_room(sequence):
            victim = self._least_urgent()
            if victim is None or victim.priority <= sequence.priority:
                self.pages.release(sequence)
                sequence.num_computed = 0
                self._full = True
                return False
            self._preempt(victim)
        self.waiting.remove(sequence)
        sequence.status = "running"
        self.prefilling.append(sequence)
        if not sequence.num_preemptions:
            sequence.num_cached = sequence.num_computed
            self.num_prompt_tokens_queried += sequence.num_tokens
            self.num_prompt_tokens_cached += sequence.num_computed
        return True

    def _has_room(self, sequence: Sequence) -> bool:
        if self.num_running >= self.max_num_seqs:
            return False
        # Those before it need no more than they have: what is left of the budget says that they are through.
        needed = self.pages.pages_needed(sequence, _room(sequence, sequence.num_uncomputed))
        return needed + self.num_running // _RUNNING_PER_SPARE_PAGE <= self.pages.num_free

    def _extend(self, sequence: Sequence, count: int) -> bool:
        """Pages for `count` more tokens, from the least urgent if need be; False if that was this one."""
        while not self.pages.extend(sequence, _room(sequence, count)):
            victim = self._least_urgent()
            assert victim is not None
            self._preempt(victim)
            if victim is sequence:
                return False
        # Decoding, it needs attention at its limit, or when the room behind the next token is not its own yet.
        held, last = len(sequence.page_ids) * self.pages.page_size, sequence.limit - 1
        sequence.wake = last if held >= last else held - 1
        return True

    def _least_urgent(self) -> Sequence | None:
        return max(chain(self.decoding, self.prefilling), key=_urgency, default=None)

    def _preempt(self, sequence: Sequence) -> None:
        self.num_preemptions += 1
        self._leave(sequence)
        self._wait(sequence)

    def _leave(self, sequence: Sequence) -> None:
        """Take a running sequence out, and its pages; what it computed stays reusable."""
        if sequence in self.prefilling:
            self.prefilling.remove(sequence)
        else:
            self.decoding.remove(sequence)
            self._decode_step = None
        # In flight are one token more than are known, or drafts.
        self.pages.publish(sequence, min(sequence.num_computed, sequence.num_tokens))
        self.pages.release(sequence)
        self._full = False

    def _wait(self, sequence: Sequence) -> None:
        if sequence.status == "running":
            sequence.num_computed = 0
            sequence.num_preemptions += 1
            if not sequence.num_in_flight:  # else they are being verified
                sequence.draft_ids = []
        sequence.status = "waiting"
        insort(self.waiting, sequence, key=_urgency)
        if self.waiting[0] is sequence:
            self._full = False


def _urgency(sequence: Sequence) -> tuple[int, int]:
    return sequence.priority, sequence.order


def _room(sequence: Sequence, count: int) -> int:
    """Tokens to have room for when `count` more are computed: these, and one behind unless none can follow."""
    return min(sequence.num_computed + count + 1, sequence.limit - 1)


def _step(
    decoding: Seq[Sequence], drafts: dict[Sequence, int], chunks: Seq[tuple[Sequence, int]]
) -> Step:
    singles = [s for s, count in chunks if count == s.num_uncomputed == 1]
    longer = [(s, count) for s, count in chunks if not count == s.num_uncomputed == 1]
    num_decode = len(decoding) + len(singles)
    return Step(
        sequences=(*decoding, *singles, *drafts, *(s for s, _ in longer)),
        num_tokens=(1,) * num_decode
        + tuple(1 + count for count in drafts.values())
        + tuple(count for _, count in longer),
        num_drafts=(0,) * num_decode + tuple(drafts.values()) + (0,) * len(longer),
        samples=(True,) * (num_decode + len(drafts))
        + tuple(count == s.num_uncomputed for s, count in longer),
        num_decode=num_decode,
    )
