"""Our logits against transformers' for one case, through the real reader, the paged cache and the engine's runner.

`python -m tests.parity.compare` prints the table of all cases.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from hayate.checkpoint.index import Checkpoint
from hayate.checkpoint.reader import load
from hayate.config import EngineOptions
from hayate.models.decoder import CausalLM, build_model
from hayate.models.families import load_config
from hayate.models.weights import IGNORED_TENSORS, placements
from hayate.runtime.loading import make_plan
from hayate.runtime.page_allocator import PageAllocator
from hayate.runtime.runner import Runner
from hayate.runtime.scheduler import Step
from hayate.runtime.sequence import Sequence
from hayate.sampling_params import SamplingParams
from tests.parity import models

PROMPT_LEN, TOTAL_LEN = 37, 61  # crosses every window and original length of models.CASES


@dataclass(frozen=True)
class Errors:
    """Largest difference to transformers in units of the logits' scale (their largest magnitude)."""

    scale: float
    prefill: float
    decode: float

    @property
    def worst(self) -> float:
        return max(self.prefill, self.decode)


def load_ours(folder: Path, dtype: torch.dtype) -> CausalLM:
    config = load_config(folder)
    model = build_model(config, device=torch.device("cpu"), dtype=dtype)
    load(
        Checkpoint.open(folder),
        dict(model.named_parameters()),
        placements(config),
        ignore=IGNORED_TENSORS,
    )
    return model


def our_logits(model: CausalLM, ids: list[int], *, prompt_len: int) -> torch.Tensor:
    """Logits (T, V) fp32: the prompt in one step, then token by token from the cache."""
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    options = EngineOptions(dtype=dtype, kv_memory="64M", max_model_len=256)
    plan = make_plan(model.config, options, torch.device("cpu"))
    runner, pages = Runner(model, plan), PageAllocator(plan.num_pages, plan.page_size)
    sequence = Sequence(ids[:prompt_len], SamplingParams(temperature=0), 256, 0)
    assert pages.extend(sequence, len(ids))
    rows = [runner.all_logits(sequence)]
    decode = Step((sequence,), num_tokens=(1,), num_drafts=(0,), samples=(True,), num_decode=1)
    for token in ids[prompt_len:]:
        sequence.output_ids.append(token)
        logits = runner.launch(decode, on_device=False).logits
        assert logits is not None
        sequence.num_in_flight = 0
        rows.append(logits[:1].clone())
    return torch.cat(rows).float()


@torch.no_grad()
def their_logits(model: torch.nn.Module, ids: list[int], *, prompt_len: int) -> torch.Tensor:
    """The same by transformers, with its own cache."""
    tokens = torch.tensor([ids])
    out = model(tokens[:, :prompt_len], use_cache=True)
    rows, cache = [out.logits[0]], out.past_key_values
    for t in range(prompt_len, len(ids)):
        out = model(tokens[:, t : t + 1], past_key_values=cache, use_cache=True)
        rows.append(out.logits[0])
    return torch.cat(rows).float()


def token_ids(vocab_size: int = 211) -> list[int]:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(3, vocab_size, (TOTAL_LEN,), generator=generator).tolist()


def compare(
    name: str, folder: Path, *, dtype: torch.dtype = torch.float32, max_shard_size: str = "10GB"
) -> Errors:
    """Errors of our `dtype` model against transformers' fp32 model of the same weights (rounded to `dtype`).

    Below fp32 all experts are active (see `models.make`).
    """
    theirs = models.make(
        name,
        folder,
        dtype=dtype,
        max_shard_size=max_shard_size,
        all_experts=dtype is not torch.float32,
    ).float()
    ids = token_ids()
    ours = our_logits(load_ours(folder, dtype), ids, prompt_len=PROMPT_LEN)
    wanted = their_logits(theirs, ids, prompt_len=PROMPT_LEN)
    scale = wanted.abs().max().item()
    error = (ours - wanted).abs().amax(-1) / scale
    return Errors(scale, error[:PROMPT_LEN].max().item(), error[PROMPT_LEN:].max().item())


def bf16_bound(num_layers: int) -> float:
    """Bound on the error of a bf16 run, in units of the logits' scale.

    A rounding adds an independent relative error of at most 2^-9. Each layer has about 8 of them in its stream (qkv, o,
    up, down, attention output, residuals), 3 are outside, and q and k shift attention scores of magnitude up to 4 by
    4 sqrt(2) units, which the softmax passes on: 32 units of variance. The worst of some 10^4 logits lies within 5
    standard deviations.
    """
    return 5 * 2**-9 * math.sqrt((8 + 32) * num_layers + 3)


def main() -> None:
    torch.set_num_threads(2)
    print(f"{'case':18} {'logit scale':>11} {'prefill fp32':>13} {'decode fp32':>12} {'bf16':>9}")
    worst = 0.0
    for name in models.CASES:
        with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
            fp32 = compare(name, Path(one))
            bf16 = compare(name, Path(two), dtype=torch.bfloat16)
        worst = max(worst, fp32.worst)
        print(
            f"{name:18} {fp32.scale:11.3f} {fp32.prefill:13.2e} {fp32.decode:12.2e} {bf16.worst:9.2e}"
        )
    print(
        f"worst fp32 error {worst:.2e} of the logit scale (limit 1e-4); bf16 limit {bf16_bound(3):.2e}"
    )


if __name__ == "__main__":
    main()
