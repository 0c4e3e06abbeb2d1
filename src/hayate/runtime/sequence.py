"""Sequence: the tokens of one sample, and where its keys and values lie. No torch here."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from hayate.sampling_params import SamplingParams

if TYPE_CHECKING:
    import torch

Status = Literal["new", "waiting", "running", "finished"]  # new: not given to the scheduler yet


@dataclass(eq=False)
class ImageSpan:
    """Positions `start` .. `end - 1` of a prompt, which show one picture: part `index` of the image `digest`."""

    start: int
    end: int
    digest: bytes  # SHA-256 of everything that the image's embeddings come from
    index: int
    embeddings: torch.Tensor | None = None  # (end - start, D) on the model's device, once encoded


@dataclass(eq=False)
class Sequence:
    """One sample of a request: prompt, then output.

    The keys and values of the first `num_computed` tokens are in the cache, or will be once the launched steps have
    run; `page_ids` has room for at least that many. The host learns sampled tokens late: `num_in_flight` counts
    the launched steps whose token for this sequence is not in `output_ids` yet.
    """

    prompt_ids: list[int]
    params: SamplingParams  # resolved: nothing is None that sampling needs
    max_len: int  # prompt and output together never exceed this
    seed: int
    sample_index: int = 0
    output_ids: list[int] = field(default_factory=list)
    page_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_in_flight: int = 0
    status: Status = "new"
    priority: int = 0  # lower runs earlier
    shareable: bool = True  # False: its keys depend on more than its tokens, such as its length
    order: int = -1  # number of its arrival, set by the scheduler
    draft_ids: list[int] = field(default_factory=list)  # guessed next tokens, to be verified
    num_cached: int = 0  # tokens of the prompt that were in the prefix cache when it was admitted
    num_preemptions: int = 0
    page_keys: list[bytes] = field(default_factory=list, repr=False)  # kept by PageAllocator
    num_published: int = 0  # pages that others may share, kept by PageAllocator
    wake: int = 0  # the scheduler looks at a decoding sequence again when this much is computed
    spans: Seq[ImageSpan] = ()  # in order; the last token of the prompt is in none

    def __post_init__(self) -> None:
        # A token computed alone is a decode step, which looks every token up by its id.
        assert not self.spans or self.spans[-1].end < len(self.prompt_ids)
        longest = len(self.prompt_ids) + (self.params.max_tokens or self.max_len)
        # Tokens it can come to have; the last is never computed.
        self.limit = min(self.max_len, longest)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def num_uncomputed(self) -> int:
        """Tokens yet to be computed: the whole prompt at first, then one; none while drafts are being verified."""
        return self.num_tokens + self.num_in_flight - self.num_computed

    def tokens(self, begin: int, end: int) -> list[int]:
        """Token ids at positions begin .. end - 1."""
        P = len(self.prompt_ids)
        if begin >= P:
            return self.output_ids[begin - P : end - P]
        return self.prompt_ids[begin:end] + self.output_ids[: max(end - P, 0)]

    def spans_in(self, begin: int, end: int) -> list[ImageSpan]:
        """The pictures that any of the positions begin .. end - 1 shows."""
        if not self.spans or begin >= self.spans[-1].end:
            return []  # while decoding
        return [s for s in self.spans if s.start < end and begin < s.end]
