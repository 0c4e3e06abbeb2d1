"""The engine's part in the tests of the scheduler, with a cache that remembers what was written to every slot.

A token depends on all tokens before it, as in a model: `digest` stands for keys and values, `sampled` for the model
and the sampler. A sequence that reads one wrong slot gets the wrong tokens, and the test fails before that.
"""

from __future__ import annotations

from random import Random

from hayate.runtime.page_allocator import PageAllocator
from hayate.runtime.scheduler import Scheduler, Step
from hayate.runtime.sequence import Sequence
from hayate.sampling_params import SamplingParams

STOP = 0  # the token that ends a sequence
VOCABULARY = 23


def sequence(prompt: list[int] | int, max_tokens: int = 30, **fields) -> Sequence:
    ids = [1 + i % 7 for i in range(prompt)] if isinstance(prompt, int) else prompt
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    return Sequence(ids, params, max_len=10**6, seed=fields.pop("seed", 0), **fields)


def digest(before: int, token: int) -> int:
    """What a slot holds: it depends on the token and on all before it."""
    return hash((before, token))


def sampled(seed: int, position: int, before: int) -> int:
    """The token at `position` after tokens of digest `before`."""
    return hash((seed, position, before)) % VOCABULARY


def naive(seq: Sequence) -> list[int]:
    """The output of `seq` by a plain loop."""
    state = 0
    for token in seq.prompt_ids:
        state = digest(state, token)
    output: list[int] = []
    while len(seq.prompt_ids) + len(output) < seq.limit:
        output.append(sampled(seq.seed, len(seq.prompt_ids) + len(output), state))
        if output[-1] == STOP:
            break
        state = digest(state, output[-1])
    return output


class SimulatedEngine:
    """Launches steps, receives their tokens late or at once, ends sequences, checks every rule on the way."""

    def __init__(
        self, num_pages: int, page_size: int, *, prefix_cache: bool = True, **options
    ) -> None:
        self.pages = PageAllocator(num_pages, page_size, prefix_cache=prefix_cache)
        self.scheduler = Scheduler(self.pages, **options)
        self.slots: dict[int, tuple[int, int]] = {}  # slot -> position, digest
        self.pending: list[tuple[Step, list[list[int]]]] = []
        self.unknown: dict[Sequence, int] = {}  # the token in flight, which only the device knows
        self.done: list[Sequence] = []

    def launch(self) -> Step | None:
        """Plan and run one step; its tokens stay on the device until `receive`."""
        scheduler = self.scheduler
        waiting = set(scheduler.waiting)
        decoding = {s: s.num_preemptions for s in scheduler.decoding}
        step = scheduler.next_batch()
        scheduler.check()
        if step is None:
            return None
        self._check_limits(step, decoding)
        admitted = [s for s in step.sequences if s in waiting]
        assert (
            not admitted
            or not scheduler.waiting
            or (max(map(_urgency, admitted)) < min(map(_urgency, scheduler.waiting)))
        ), "somebody was overtaken"
        inputs = [
            self._inputs(s, count) for s, count in zip(step.sequences, step.num_tokens, strict=True)
        ]
        for seq, tokens in zip(step.sequences, inputs, strict=True):
            self._write(seq, tokens)
        results = [
            self._sample(*row)
            for row in zip(step.sequences, inputs, step.num_drafts, step.samples, strict=True)
        ]
        for seq, tokens, result in zip(step.sequences, inputs, results, strict=True):
            seq.num_computed += len(tokens)
            if result:
                seq.num_in_flight += 1
                self.unknown[seq] = result[-1]
        self.pending.append((step, results))
        return step

    def receive(self) -> None:
        """The tokens of the oldest launched step reach the host."""
        step, results = self.pending.pop(0)
        for seq, tokens, num_drafts in zip(step.sequences, results, step.num_drafts, strict=True):
            if not tokens:
                continue
            seq.num_in_flight -= 1
            if seq.status == "finished":
                continue
            for token in tokens:
                seq.output_ids.append(token)
                if token == STOP or seq.num_tokens == seq.limit:
                    self.finish(seq)
                    break
            if seq.draft_ids:
                seq.draft_ids = []
            if num_drafts and seq.status == "running":
                seq.num_computed = seq.num_tokens - 1
        self.scheduler.check()

    def finish(self, seq: Sequence) -> None:
        self.scheduler.finish(seq)
        self.done.append(seq)

    def fail(self) -> None:
        """A step is planned and half run, and everything launched is lost."""
        step = self.scheduler.next_batch()
        rows = zip(step.sequences, step.num_tokens, strict=True) if step else ()
        for seq, count in rows:
            for position in range(seq.num_computed, seq.num_computed + count):
                self.slots[self._slot(seq, position)] = (-1, -1)
        self.pending.clear()
        self.scheduler.restart_running()
        self.scheduler.check()

    def guess(self, seq: Sequence, count: int, random: Random) -> None:
        """Give `seq`, of which everything is known, drafts of which some are right."""
        right = naive(seq)[len(seq.output_ids) :]
        num_right = random.randint(0, count)
        seq.draft_ids = right[:num_right]
        seq.draft_ids += [random.randrange(VOCABULARY) for _ in range(count - len(seq.draft_ids))]

    def run(self) -> None:
        """Until nothing is left to do."""
        while self.scheduler.has_work:
            assert self.launch() is not None
            self.receive()

    # -- the device -------------------------------------------------------------------------------

    def _slot(self, seq: Sequence, position: int) -> int:
        size = self.pages.page_size
        return seq.page_ids[position // size] * size + position % size

    def _inputs(self, seq: Sequence, count: int) -> list[int]:
        """The next `count` tokens: known ones, then the one in flight, or drafts."""
        known = seq.tokens(seq.num_computed, seq.num_tokens)
        later = [self.unknown[seq]] if seq.num_in_flight else seq.draft_ids
        tokens = [*known, *later][:count]
        assert len(tokens) == count
        return tokens

    def _write(self, seq: Sequence, tokens: list[int]) -> None:
        begin, state = seq.num_computed, 0
        for position, token in enumerate(seq.tokens(0, begin) + tokens):
            state = digest(state, token)
            if position >= begin:
                self.slots[self._slot(seq, position)] = (position, state)

    def _sample(
        self, seq: Sequence, inputs: list[int], num_drafts: int, samples: bool
    ) -> list[int]:
        """Read all that came before, as attention does; the tokens accepted and the next one."""
        begin, end = seq.num_computed, seq.num_computed + len(inputs)
        state = 0
        assert begin <= seq.num_tokens, "scheduled while drafts are being verified"
        states = []
        for position, token in enumerate(seq.tokens(0, begin) + inputs):
            state = digest(state, token)
            states.append(state)
            assert self.slots[self._slot(seq, position)] == (position, state), (
                "a wrong slot was read"
            )
        if not samples:
            assert end < seq.num_tokens
            return []
        assert end == seq.num_tokens + seq.num_in_flight + num_drafts
        drafts, result = inputs[len(inputs) - num_drafts :], []
        for i in range(num_drafts + 1):
            at = end - num_drafts - 1 + i
            result.append(sampled(seq.seed, at + 1, states[at]))
            if i == num_drafts or drafts[i] != result[-1]:
                return result
        raise AssertionError

    # -- rules ------------------------------------------------------------------------------------

    def _check_limits(self, step: Step, decoding: dict[Sequence, int]) -> None:
        """`decoding`: those that did so before the step was planned, and how often each had been preempted."""
        scheduler = self.scheduler
        rows = list(
            zip(step.sequences, step.num_tokens, step.num_drafts, step.samples, strict=True)
        )
        assert len({id(s) for s in step.sequences}) == len(rows) <= scheduler.max_num_seqs
        kinds = [0 if n == 1 and ok else 1 if d else 2 for _, n, d, ok in rows]
        assert kinds == sorted(kinds) and kinds.count(0) == step.num_decode
        for seq, count, drafts, samples in rows:
            last = count == seq.num_uncomputed + drafts
            assert samples == last and count >= 1
            room = seq.num_computed + count + (1 if last else 0)
            assert len(seq.page_ids) * self.pages.page_size >= min(room, seq.limit - 1)
            assert seq.num_computed + count <= seq.limit - 1 and drafts <= len(seq.draft_ids)
        begun = {s for s in step.sequences if decoding.get(s) != s.num_preemptions}
        prompts = [n for s, n, _, _ in rows if s in begun]
        others = sum(step.num_tokens) - sum(prompts)
        assert sum(step.num_tokens) <= scheduler.max_num_batched_tokens
        assert not others or sum(prompts) <= scheduler.max_chunk_tokens


def _urgency(seq: Sequence) -> tuple[int, int]:
    return seq.priority, seq.order
