"""`hayate bench equality`: a request's greedy tokens, alone and in every situation that must not change them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hayate.bench.gates import greedy_gap, tie_limit
from hayate.bench.subject import environment, open_llm, random_prompts
from hayate.config import PAGE_SIZE
from hayate.errors import HayateError
from hayate.runtime.async_llm import AsyncLLM
from hayate.runtime.device import resolve_device
from hayate.runtime.llm import LLM
from hayate.runtime.outputs import RequestOutput
from hayate.runtime.step_costs import StepCosts
from hayate.sampling_params import SamplingParams, StructuredOutput

Tokens = list[list[int]]

_NEW_TOKENS = 24
_LENGTHS = (3, 17, 64, 65, 100, 130, 200, 310)  # of random prompts: below, at and above whole pages
_GREEDY = SamplingParams(temperature=0, max_tokens=_NEW_TOKENS, ignore_eos=True)
_SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}
_STORY = (
    "The gale came over the hills in the night and took the roof of the old mill with it. In the morning the miller "
    "stood in the wet grass and counted the tiles. There were four hundred of them, and not one was whole. "
)
_TEXTS = (
    "Once upon a time",
    "The capital of France is",
    "Count: one, two, three, one, two, three, one, two, three, one, two,",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    _STORY,
    _STORY + "His daughter asked him:",
    _STORY * 3 + "In the end,",
    _STORY * 5 + "What happened to the mill? It",
)


@dataclass
class Row:
    """One situation: what requests gave in it, and what they give alone."""

    name: str
    got: Tokens
    wanted: Tokens
    prompts: Tokens | None  # None where the greedy token is not the most likely one of all
    happened: bool = True  # the situation did occur (a preemption, a cache hit, a verified draft)


class AlwaysCheap(StepCosts):
    """Makes every step look as if it paid to verify drafts in it."""

    refill = (0.0, 0.0)

    def decode(self, num_sequences: int) -> float | None:
        return 1.0

    def verify(self, num_sequences: int, num_drafts: int) -> tuple[float, float]:
        return 0.5, 0.5


class _Subject:
    """The model, the prompts, and what each gives alone."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        if llm.tokenizer is None:
            self.prompts = [random_prompts(llm, batch=1, length=n, seed=n)[0] for n in _LENGTHS]
        else:
            self.prompts = [llm.tokenizer.encode(text)[: _LENGTHS[-1]] for text in _TEXTS]
        self.alone = [_tokens(llm.generate(p, _GREEDY))[0] for p in self.prompts]

    def row(self, name: str, llm: LLM, *, happened: bool = True) -> Row:
        """All prompts together on `llm`."""
        return self.row_of(name, llm.generate(list(self.prompts), _GREEDY), happened=happened)

    def row_of(self, name: str, outputs: Sequence[RequestOutput], *, happened: bool = True) -> Row:
        return Row(name, _tokens(outputs), self.alone, self.prompts, happened)


def run(
    *,
    model: str | None,
    preset: str | None,
    device: str,
    dtype: str,
    report: Callable[[str], None],
    **_: Any,
) -> dict[str, Any]:
    """Print a row for each situation; `holds` in the result says whether all that must be equal are.

    Equal means the same tokens in float32 on the CPU (the dtype there unless another is named), and on a GPU with
    `batch_invariant`, which has rows of its own. Otherwise rounding may break ties between tokens differently:
    then every token must be the most likely one within the rounding of the dtype.
    """
    target = resolve_device(device)
    if target.type == "cpu" and dtype == "auto":
        dtype = "float32"
    llm = open_llm(
        model=model,
        preset=preset,
        device=device,
        dtype=dtype,
        batch=len(_TEXTS),
        length=_LENGTHS[-1] + _NEW_TOKENS,
        prefix_cache=False,
    )
    rows: list[dict[str, Any]] = []
    for invariant in (False, True) if target.type == "cuda" else (False,):
        subject = _Subject(LLM.sharing(llm, batch_invariant=True) if invariant else llm)
        exact = invariant or (llm.plan.dtype == "float32" and target.type == "cpu")
        mode = "batch-invariant" if invariant else llm.plan.dtype
        report(f"{mode}: {len(subject.prompts)} prompts, {_NEW_TOKENS} tokens each, against alone")
        for situation in _SITUATIONS:
            if situation is _structured and llm.tokenizer is None:
                continue
            found = _judge(subject.llm, situation(subject), exact)
            rows.append({"mode": mode, **found})
            report(f"{found['name']:<17}{found['equal']:<17}{found['remark']}".rstrip())
    return {
        "bench": "equality",
        "model": preset or model,
        "dtype": llm.plan.dtype,
        "holds": all(row["holds"] for row in rows),
        "rows": rows,
        **environment(llm.device),
    }


def _judge(llm: LLM, row: Row, exact: bool) -> dict[str, Any]:
    pairs = enumerate(zip(row.got, row.wanted, strict=True))
    different = [i for i, (got, wanted) in pairs if got != wanted]
    result: dict[str, Any] = {
        "name": row.name,
        "equal": "no" if different else "yes",
        "holds": row.happened and not different,
        "different": len(different),
        "remark": "" if row.happened else "it did not occur: nothing was tested",
    }
    if different and row.prompts is not None:
        limit = tie_limit(llm)
        gap = max(greedy_gap(llm, row.prompts[i], row.got[i]) for i in different)
        result |= {"gap": gap, "limit": limit}
        result["remark"] = (
            f"{len(different)} differ; worst gap {gap:.2g}, rounding allows {limit:.2g}"
        )
        if gap <= limit and not exact:
            result |= {"equal": "yes, up to ties", "holds": row.happened}
    return result


def _batched(subject: _Subject) -> Row:
    return subject.row("batched", subject.llm)


def _chunked(subject: _Subject) -> Row:
    llm = LLM.sharing(subject.llm, max_num_batched_tokens=PAGE_SIZE, max_chunk_tokens=PAGE_SIZE)
    longest = max(map(len, subject.prompts))
    return subject.row("chunked prefill", llm, happened=longest > 2 * PAGE_SIZE)


def _prefix_cached(subject: _Subject) -> Row:
    llm = LLM.sharing(subject.llm, prefix_cache=True)
    llm.generate(list(subject.prompts), _GREEDY)
    outputs = llm.generate(list(subject.prompts), _GREEDY)
    hits = sum(o.metrics.num_cached_tokens for o in outputs)
    return subject.row_of("prefix-cached", outputs, happened=hits > 0)


def _preempted(subject: _Subject) -> Row:
    """Prompts that fill their page, in a cache with a page for each and two to spare: they outgrow it together."""
    longest = max(subject.prompts, key=len)
    prompts = [longest[4 * i : 4 * i + PAGE_SIZE - 4] for i in range(len(subject.prompts))]
    wanted = [_tokens(subject.llm.generate(p, _GREEDY))[0] for p in prompts]
    page_bytes = subject.llm.plan.kv_bytes // subject.llm.plan.num_pages
    llm = LLM.sharing(
        subject.llm, kv_memory=(len(prompts) + 2) * page_bytes, max_model_len=2 * PAGE_SIZE
    )
    got = _tokens(llm.generate(list(prompts), _GREEDY))
    return Row("preempted", got, wanted, prompts, llm.stats().num_preemptions > 0)


def _speculated(subject: _Subject) -> Row:
    llm = LLM.sharing(subject.llm, speculative="ngram")
    assert llm.engine.speculation is not None
    llm.engine.speculation.speculator.costs = AlwaysCheap()
    row = subject.row("speculated", llm)
    row.happened = llm.stats().num_draft_tokens > 0
    return row


def _structured(subject: _Subject) -> Row:
    """Every other request bound to a JSON schema, beside free ones."""
    llm, prompts = subject.llm, subject.prompts
    schema = StructuredOutput.json_schema(_SCHEMA)
    bound = SamplingParams(temperature=0, max_tokens=_NEW_TOKENS, structured=schema)
    params = [bound if i % 2 else _GREEDY for i in range(len(prompts))]
    wanted = [_tokens(llm.generate(*pair))[0] for pair in zip(prompts, params, strict=True)]
    return Row("structured", _tokens(llm.generate(list(prompts), params)), wanted, None)


def _async(subject: _Subject) -> Row:
    async def main() -> list[RequestOutput]:
        async with AsyncLLM.sharing(subject.llm) as llm:
            calls = (llm.generate(p, _GREEDY) for p in subject.prompts)
            return [output for (output,) in await asyncio.gather(*calls)]

    return subject.row_of("AsyncLLM", asyncio.run(main()))


_SITUATIONS = (
    _batched,
    _chunked,
    _prefix_cached,
    _preempted,
    _speculated,
    _structured,
    _async,
)


def _tokens(outputs: Sequence[RequestOutput]) -> Tokens:
    if any(len(o.outputs[0].token_ids) == 0 for o in outputs):
        raise HayateError("a request gave no token; no equality is reported")
    return [o.outputs[0].token_ids for o in outputs]
