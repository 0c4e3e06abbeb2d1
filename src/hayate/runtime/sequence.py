"""Sequence: the tokens of one sample, and where its keys and values lie. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from hayate.sampling_params import SamplingParams

Status = Literal["waiting", "running", "finished"]


@dataclass(eq=False)
class Sequence:
    """One sample of a request: prompt, then output.

    Lengths: `num_computed <= num_tokens <= max_len`. The keys and values of the first `num_computed` tokens are in
    the cache; `page_ids` has room for at least that many. On a GPU the host learns sampled tokens a step late:
    `num_in_flight` tokens are computed or being computed whose ids are not in `token_ids` yet.
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
    status: Status = "waiting"

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def num_uncomputed(self) -> int:
        """Tokens whose keys and values are not in the cache: the whole prompt at first, then one."""
        return self.num_tokens + self.num_in_flight - self.num_computed

    def tokens(self, begin: int, end: int) -> list[int]:
        """Token ids at positions begin .. end - 1."""
        P = len(self.prompt_ids)
        if begin >= P:
            return self.output_ids[begin - P : end - P]
        return self.prompt_ids[begin:end] + self.output_ids[: max(end - P, 0)]
