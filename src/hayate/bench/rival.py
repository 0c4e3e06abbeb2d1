"""What hayate is compared with: transformers on the same folder, dtype and device, in the same run."""

from __future__ import annotations

import time

import torch

from hayate.errors import UsageError
from hayate.runtime.llm import LLM


def short_run(new_tokens: int) -> int:
    """New tokens of the short run whose time is subtracted from that of a run of `new_tokens`."""
    return 8 if new_tokens > 16 else 1


class Transformers:
    """transformers' `generate` on the same folder, dtype and device."""

    def __init__(self, model: str | None, llm: LLM) -> None:
        if model is None or llm.folder is None:
            raise UsageError(
                "--compare transformers needs --model: it has to load the same weights"
            )
        try:
            import transformers
        except ImportError:
            raise UsageError("--compare transformers: transformers is not installed") from None
        self.version = transformers.__version__
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            llm.folder, dtype=getattr(torch, llm.plan.dtype)
        ).to(llm.device)

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], new_tokens: int) -> float:
        """Seconds to generate exactly `new_tokens` for each prompt."""
        ids = torch.tensor(prompts, device=self.model.device)
        start = time.perf_counter()
        self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            pad_token_id=0,
        )
        return time.perf_counter() - start

    def decode_rate(self, prompts: list[list[int]], new_tokens: int) -> float:
        """As ours."""
        short = short_run(new_tokens)
        seconds = self.generate(prompts, new_tokens) - self.generate(prompts, short)
        return len(prompts) * (new_tokens - short) / seconds

    def prefill_rate(self, prompts: list[list[int]]) -> float:
        return sum(map(len, prompts)) / self.generate(prompts, 1)
