"""`hayate bench throughput`, `ttft` and `equality`: counted work by hand, gates that refuse, rows that can fail."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hayate.bench import equality, throughput
from hayate.bench.burst import percentiles, run_burst
from hayate.models.batch import Batch
from hayate.models.decoder import CausalLM
from hayate.sampling_params import SamplingParams
from tests.cpu.test_cli import HEAD_DIM, HEADS, KV_HEADS, LAYERS, VOCAB, D, F, assert_fails, run
from tests.cpu.test_cli import tiny as tiny  # the fixture: a checkpoint folder
from tests.engine import tiny as engine_tiny

LAYER = (HEADS + 2 * KV_HEADS) * HEAD_DIM * D + HEADS * HEAD_DIM * D + 3 * F * D


def report_of(*arguments: object) -> dict[str, Any]:
    result = run("bench", *arguments, "--device", "cpu", "--json")
    assert result.returncode == 0, result.stderr
    report: dict[str, Any] = json.loads(result.stdout)  # one object and nothing else
    assert report["bench"] == arguments[0]
    assert report["torch"] == torch.__version__
    return report


def spoil_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of several sequences at once are wrong from now on."""
    forward = CausalLM.forward

    def wrong(self: CausalLM, batch: Batch) -> torch.Tensor:
        logits = forward(self, batch)
        return logits.flip(-1) if len(batch.seq_lens) > 1 else logits

    monkeypatch.setattr(CausalLM, "forward", wrong)


# -- throughput ------------------------------------------------------------------------------------


def test_throughput(tiny: Path) -> None:
    workload = ("--requests", 6, "--input", 20, "--output", 9, "--max-num-seqs", 3)
    report = report_of("throughput", "--model", tiny, *workload)
    rate = report["output_tokens_per_second"]
    # Seconds are reported to 0.1 ms, rates to 0.01.
    seconds = report["seconds"]
    assert rate == pytest.approx(6 * 9 / seconds, rel=0.6e-4 / seconds + 1e-4)
    assert report["total_tokens_per_second"] == pytest.approx(rate * 29 / 9, rel=1e-3)
    assert report["ratio_to_alone"] == pytest.approx(
        rate / report["alone_output_tokens_per_second"], rel=1e-2
    )
    # Two waves of three: a prompt gives the first token, eight steps the others; some steps may hold both.
    assert 2 * 9 - 1 <= report["steps"] <= 2 * 9 + 6
    assert report["preemptions"] == 0
    assert 0 < report["kv_peak_use"] <= 1
    for times in (report["time_to_first_token_ms"], report["inter_token_ms"]):
        assert 0 < times["p50"] <= times["p90"] <= times["p99"] <= 1e3 * report["seconds"]


def test_throughput_ceiling_by_hand(tiny: Path) -> None:
    workload = ("--requests", 6, "--input", 20, "--output", 9, "--max-num-seqs", 3)
    report = report_of("throughput", "--model", tiny, *workload)
    linear, head = LAYERS * LAYER, VOCAB * D
    seen = LAYERS * sum(4 * HEADS * HEAD_DIM * (i + 1) for i in range(20))
    prompt = 2 * linear * 20 + 2 * head + seen
    # Norm weights are multiplied with too: of so small a model they are some hundredths.
    assert report["prompt_flops"] == pytest.approx(6 * prompt, rel=0.02)
    keys_and_values = 3 * (20 + 9 // 2) * LAYERS * 2 * KV_HEADS * HEAD_DIM
    norms = (2 * LAYERS + 1) * D
    step = 4 * (linear + head + norms + keys_and_values)
    assert report["decode_bytes"] == pytest.approx(2 * 8 * step, rel=1e-6)
    floor = report["floor_prompt_s"] + report["floor_decode_s"]
    assert report["ceiling_output_tokens_per_second"] == pytest.approx(6 * 9 / floor, rel=0.2)
    assert report["floor_overlapped_s"] <= floor + 1e-4


def test_throughput_text(tiny: Path) -> None:
    workload = ("--requests", 2, "--input", 8, "--output", 3)
    result = run("bench", "throughput", "--model", tiny, "--device", "cpu", *workload)
    assert result.returncode == 0, result.stderr
    assert [line.split(":")[0] for line in result.stdout.splitlines()] == [
        "ceiling",
        "gate",
        "hayate",
        "first token",
        "between tokens",
        "engine",
    ]


def test_wrong_batches_get_no_speed(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_batches(monkeypatch)
    result = run("bench", "throughput", "--model", tiny, "--device", "cpu", "--requests", 3)
    assert result.returncode == 1
    assert "no speed is reported" in result.stderr
    assert "hayate:" not in result.stdout


def test_interrupted_throughput_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = engine_tiny.tiny(throughput.LLM)
    params = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)
    requests = llm.requests.of_prompts([[5, 6, 7]] * 4, params)

    def interrupt(done: int, total: int) -> None:
        assert total == 200
        if done > 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_burst(llm, requests, interrupt)
    assert not llm.engine.has_work
    assert llm.engine.pages.num_free == llm.plan.num_pages


def test_percentiles() -> None:
    values = [i / 1e3 for i in range(100)]
    assert percentiles(values[::-1]) == {"p50": 50.0, "p90": 90.0, "p99": 99.0}
    assert percentiles([0.002]) == {"p50": 2.0, "p90": 2.0, "p99": 2.0}


# -- first token -----------------------------------------------------------------------------------


def test_ttft(tiny: Path) -> None:
    lengths = ("--prompt-tokens", "70,700", "--new-tokens", 4, "--runs", 1, "--cached")
    report = report_of("ttft", "--model", tiny, *lengths)
    assert [row["prompt_tokens"] for row in report["rows"]] == [70, 700]
    for row in report["rows"]:
        assert row["first_token_ms"] == pytest.approx(
            row["floor_ms"] / row["share_of_ceiling"], rel=0.1
        )
        assert row["decode_tokens_per_second"] > 0
    # 10 of 700 tokens are computed again: several times as fast even where other programs disturb.
    assert report["rows"][1]["cached_first_token_ms"] < report["rows"][1]["first_token_ms"]


# -- equality --------------------------------------------------------------------------------------

ROWS = ("batched", "chunked prefill", "prefix-cached", "preempted", "speculated", "structured")


@pytest.mark.slow
def test_equality(tiny: Path) -> None:
    report = report_of("equality", "--model", tiny)
    assert report["holds"]
    assert [row["name"] for row in report["rows"]] == [*ROWS, "AsyncLLM"]
    assert {(row["equal"], row["remark"]) for row in report["rows"]} == {("yes", "")}


def test_equality_that_does_not_hold(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_batches(monkeypatch)
    monkeypatch.setattr(equality, "_SITUATIONS", (equality._batched,))
    result = run("bench", "equality", "--model", tiny, "--device", "cpu")
    assert result.returncode == 1
    (row,) = result.stdout.splitlines()[1:]
    assert row.split()[:2] == ["batched", "no"]


def test_a_situation_that_did_not_occur_does_not_hold(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def idle(subject: Any) -> equality.Row:
        return equality.Row("idle", subject.alone, subject.alone, None, happened=False)

    monkeypatch.setattr(equality, "_SITUATIONS", (idle,))
    result = run("bench", "equality", "--model", tiny, "--device", "cpu")
    assert result.returncode == 1
    assert "did not occur" in result.stdout


# -- options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("throughput", "--batch", 2), ("--batch", "bench throughput")),
        (("equality", "--requests", 2), ("--requests", "bench equality")),
        (("load", "--no-prefix-cache"), ("--no-prefix-cache", "bench load")),
        (("decode", "--prompt-tokens", "8,9"), ("--prompt-tokens 8,9", "one length")),
        (("ttft", "--prompt-tokens", "8,x"), ("--prompt-tokens '8,x'",)),
        (("throughput", "--output", 1), ("--output 1",)),
        (("throughput", "--num-draft-tokens", 3), ("--num-draft-tokens", "--speculative")),
        (("ttft", "--cached", "--no-prefix-cache"), ("--cached", "--no-prefix-cache")),
        (("throughput", "--max-chunk-tokens", 3), ("--max-chunk-tokens 3", "64")),
    ],
)
def test_wrong_options(tiny: Path, arguments: tuple[object, ...], parts: tuple[str, ...]) -> None:
    assert_fails(run("bench", *arguments, "--model", tiny, "--device", "cpu"), 2, *parts)


@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_engine_options_of_the_verbs_reach_the_engine(
    verb: str, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = []
    monkeypatch.setattr(throughput.LLM, "__init__", _recording(throughput.LLM.__init__, plans))
    flags = ("--max-num-batched-tokens", 128, "--no-prefix-cache", "--batch-invariant")
    drafts = ("--speculative", "ngram", "--num-draft-tokens", 3)
    prompt = ("--prompt", "Hi") if verb == "generate" else ()
    model = ("--model", tiny, "--device", "cpu", "--max-tokens", 3)
    result = run(verb, *prompt, *model, *flags, *drafts)
    assert result.returncode == 0, result.stderr
    (plan,) = plans
    assert (plan.max_num_batched_tokens, plan.prefix_cache) == (128, False)
    assert (plan.batch_invariant, plan.speculative, plan.num_draft_tokens) == (True, "ngram", 3)


def _recording(init: Callable[..., None], plans: list[Any]) -> Callable[..., None]:
    def recording(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        plans.append(self.plan)

    return recording
