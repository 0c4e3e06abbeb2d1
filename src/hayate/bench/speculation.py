"""`hayate bench speculation`: one request at a time, with drafts and without, on texts that repeat their prompt."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from hayate.bench.subject import environment, open_llm
from hayate.runtime.llm import LLM
from hayate.sampling_params import SamplingParams

_CODE = '''\
class Inventory:
    """Counts of items by name."""

    def __init__(self):
        self.counts = {}

    def add(self, name, amount):
        if amount < 0:
            raise ValueError("amount must not be negative")
        self.counts[name] = self.counts.get(name, 0) + amount

    def remove(self, name, amount):
        if self.counts.get(name, 0) < amount:
            raise ValueError("there are not so many of " + name)
        self.counts[name] = self.counts[name] - amount

    def total(self):
        result = 0
        for amount in self.counts.values():
            result = result + amount
        return result
'''
_LETTER = """\
The harbour office opens at six in the morning. Boats longer than twelve metres must register before they enter the
inner basin. The fee is due on arrival and covers water, electricity and the removal of waste. Skippers who stay for
more than a week pay half of the daily fee from the eighth day on. During storms the outer gate is closed, and boats
wait behind the northern pier until the signal on the tower turns green. Swimming in the basin is not allowed."""
_TABLE = """\
{"city": "Sendai", "river": "Hirose", "inhabitants": 1096704, "founded": 1600}
{"city": "Okayama", "river": "Asahi", "inhabitants": 720841, "founded": 1573}
{"city": "Kochi", "river": "Kagami", "inhabitants": 322526, "founded": 1601}
{"city": "Akita", "river": "Omono", "inhabitants": 301984, "founded": 1604}"""

# What is asked for, and whether the answer repeats the prompt.
TASKS = {
    "code edit": (
        f"Add a method `clear` to this class and print the whole class.\n\n{_CODE}",
        True,
    ),
    "quotes": (f"Quote each sentence of this notice on a line of its own.\n\n{_LETTER}", True),
    "table": (f"Write these lines again, sorted by city.\n\n{_TABLE}", True),
    "story": ("Tell a story about a lighthouse keeper who has never seen the sea.", False),
}


def run(
    *,
    model: str,
    device: str,
    dtype: str,
    new_tokens: int,
    runs: int,
    engine: dict[str, Any],
    report: Callable[[str], None],
    **_: Any,
) -> dict[str, Any]:
    """Greedy answers at batch 1; each task's rate with and without, in turns."""
    engine = {"speculative": "ngram", **engine}
    drafting = open_llm(
        model=model,
        preset=None,
        device=device,
        dtype=dtype,
        batch=1,
        length=1024 + new_tokens,
        **engine,
    )
    plain = LLM.sharing(drafting, speculative=None)
    tasks = {name: _measure(plain, drafting, name, new_tokens, runs, report) for name in TASKS}
    copies = [t["speed_up"] for name, t in tasks.items() if TASKS[name][1]]
    others = [t["speed_up"] for name, t in tasks.items() if not TASKS[name][1]]
    report(f"answers that repeat the prompt: {statistics.geometric_mean(copies):.2f}x")
    return {
        "bench": "speculation",
        "model": model,
        "dtype": drafting.plan.dtype,
        "speculative": engine["speculative"],
        "num_draft_tokens": drafting.plan.num_draft_tokens,
        "new_tokens": new_tokens,
        "tasks": tasks,
        "speed_up_copies": round(statistics.geometric_mean(copies), 3),
        "speed_up_others": round(statistics.geometric_mean(others), 3),
        **environment(drafting.device),
    }


def _measure(
    plain: LLM,
    drafting: LLM,
    name: str,
    new_tokens: int,
    runs: int,
    report: Callable[[str], None],
) -> dict[str, Any]:
    params = SamplingParams(temperature=0, max_tokens=new_tokens)
    messages = [{"role": "user", "content": TASKS[name][0]}]
    rates: dict[LLM, list[float]] = {plain: [], drafting: []}
    texts: dict[LLM, list[int]] = {}
    for _run in range(runs + 1):  # the first warms up
        before = drafting.stats()
        for llm in rates:
            output = llm.chat(messages, params)[0]
            rates[llm].append(output.metrics.decode_tokens_per_second)
            texts[llm] = output.outputs[0].token_ids
    after = drafting.stats()
    drafted = after.num_draft_tokens - before.num_draft_tokens
    accepted = after.num_accepted_tokens - before.num_accepted_tokens
    steps = after.num_verify_steps - before.num_verify_steps
    without, with_drafts = (statistics.median(rates[llm][1:]) for llm in (plain, drafting))
    # Verifying rounds differently from decoding: in 16 bits, near ties may go the other way.
    same = texts[plain] == texts[drafting]
    agreed = next(
        (i for i, (a, b) in enumerate(zip(*texts.values(), strict=False)) if a != b),
        min(map(len, texts.values())),
    )
    report(
        f"{name}: {without:,.1f} -> {with_drafts:,.1f} tok/s, {with_drafts / without:.2f}x; "
        f"{accepted} of {drafted} drafts accepted in {steps} verify steps, {len(texts[drafting])} tokens, "
        + ("identical" if same else f"the first {agreed} identical")
    )
    return {
        "tokens_per_second": round(with_drafts, 2),
        "tokens_per_second_without": round(without, 2),
        "speed_up": round(with_drafts / without, 3),
        "runs": [round(r, 2) for r in rates[drafting][1:]],
        "runs_without": [round(r, 2) for r in rates[plain][1:]],
        "new_tokens": len(texts[drafting]),
        "num_drafted": drafted,
        "num_accepted": accepted,
        "num_verify_steps": steps,
        "acceptance_rate": round(accepted / drafted, 3) if drafted else None,
        "identical": same,
        "num_identical_tokens": agreed,
    }
