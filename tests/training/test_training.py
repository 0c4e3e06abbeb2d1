"""The loop against transformers, torch's optimizer, and itself cut in other ways."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hayate.errors import ModelError, UsageError
from hayate.training.forward import TrainingBatch
from hayate.training.loss import LossParts, StepSize
from hayate.training.metrics import read_metrics
from hayate.training.state import find_checkpoints
from tests.training.parity import compare_step
from tests.training.runs import make_data, tiny_config, trainer, weights


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def step_gradients(run, micro: int) -> tuple[dict[str, torch.Tensor], LossParts]:
    whole = run.stream.batch(0, run.config.sequences_per_step)
    size = StepSize(whole.num_targets, run.config.batch.tokens_per_step)
    parts = LossParts.zeros(run.loss.num_sparse, run.loss.num_experts, run.device)
    run.model.zero_grad()
    for begin in range(0, run.config.sequences_per_step, micro):
        rows = whole[begin : begin + micro]
        run.loss.backward(TrainingBatch.of(rows, run.device), size, parts)
    return {n: p.grad.clone() for n, p in run.model.named_parameters()}, parts


@pytest.mark.parametrize("balance", ["sequence", "global", "bias", "none"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_gradients_do_not_depend_on_how_a_step_is_cut(
    data: Path, tmp_path: Path, balance: str, recompute: str
) -> None:
    runs = [
        trainer(
            tiny_config(
                data,
                tmp_path / str(i),
                loss__balance=balance,
                loss__aux="1.0",
                precision__recompute=how,
            )
        )
        for i, how in enumerate(("none", recompute))
    ]
    shares = torch.rand_like(runs[0].loss.load_shares)
    for run in runs:
        run.loss.load_shares.copy_(shares / shares.sum(-1, keepdim=True))
    expected, parts = step_gradients(runs[0], 8)
    for micro in (1, 2, 8):
        found, found_parts = step_gradients(runs[1], micro)
        for name, gradient in expected.items():
            # fp32 sums of some hundred terms in another order: 2^-24 each, relative to the largest.
            error = (found[name] - gradient).abs().max() / gradient.abs().max()
            assert error < 300 * 2**-24, (name, micro, error)
        torch.testing.assert_close(found_parts.expert_counts, parts.expert_counts, rtol=0, atol=0)
        torch.testing.assert_close(found_parts.aux, parts.aux, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "llama", "qwen3", "nemotron"])
def test_a_step_equals_transformers_and_torch_s_adamw(kind: str, tmp_path: Path) -> None:
    step = compare_step(kind, tmp_path)
    # fp32 sums of some thousand terms in another order; the seen errors are a tenth of these.
    assert step.loss_error < 1e-6
    assert step.gradient_error < 5e-5
    # Adam's first step is lr * g / (|g| + eps): where g is about eps, rounding of g shows; so nearly all
    # elements must agree to rounding, and none may be off by more than the whole step.
    assert step.weight_error < 2.1
    assert step.weights_off < 1e-3


def test_exported_weights_give_transformers_the_same_logits(data: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from hayate import LLM

    run = trainer(tiny_config(data, tmp_path / "run"))
    run.train()
    folder = find_checkpoints(tmp_path / "run")[-1].folder
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.from_numpy(run.stream.batch(0, 1).token_ids)
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits[0]
    ours = LLM(folder, device="cpu", dtype="float32").logits(ids[0].tolist())
    # fp32 on both sides; the parity suite derives 1e-4 of the scale for such models.
    assert (ours - expected).abs().max() < 1e-4 * expected.abs().max()


def test_overfits_one_batch(data: Path, tmp_path: Path) -> None:
    config = tiny_config(
        data,
        tmp_path / "run",
        batch__tokens_per_step="64",
        batch__tokens_per_micro_batch="64",
        schedule__num_steps="60",
        schedule__kind="constant",
        optimizer__lr="3e-3",
        optimizer__weight_decay="0",
        checkpoint__every="0",
        log__every="50",
    )
    run = trainer(config)
    first = run.stream.batch(0, config.sequences_per_step)
    run.stream.batch = lambda step, size, **share: first  # type: ignore[method-assign]
    run.train()
    assert run.progress.losses[0] > 5
    assert run.progress.losses[-1] < 0.1


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"precision__dtype": "bfloat16", "precision__moments": "int8", "loss__balance": "bias"},
        {
            "precision__dtype": "bfloat16",
            "precision__master": "stochastic_rounding",
            "precision__moments": "bfloat16",
            "loss__balance": "global",
        },
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    data: Path, tmp_path: Path, extra: dict[str, str]
) -> None:
    extra = extra | {"schedule__num_steps": "4", "checkpoint__every": "2"}
    whole = trainer(tiny_config(data, tmp_path / "whole", **extra))
    assert whole.train() == "finished"
    half = trainer(tiny_config(data, tmp_path / "half", **extra))
    while half.progress.step < 2:
        half._step(_NoLog())
    half.checkpointer.wait()
    rest = trainer(tiny_config(data, tmp_path / "half", **extra), resume=True)
    assert rest.progress.step == 2
    rest.train()
    assert half.progress.losses + rest.progress.losses == whole.progress.losses
    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(rest)[name]), name
    names = [
        r["step"] for r in read_metrics(tmp_path / "half" / "metrics.jsonl") if r["kind"] == "train"
    ]
    assert names == [3, 4]


class _NoLog:
    def write(self, row: dict) -> None:
        pass


def test_ctrl_c_ends_with_a_checkpoint_and_resume_goes_on(data: Path, tmp_path: Path) -> None:
    config = tiny_config(data, tmp_path / "run", checkpoint__every="0", schedule__num_steps="6")
    run = trainer(
        config,
        report=lambda row: os.kill(os.getpid(), signal.SIGTERM) if row["step"] == 3 else None,
    )
    assert run.train() == "SIGTERM"
    assert [c.step for c in find_checkpoints(tmp_path / "run")] == [3]
    with pytest.raises(UsageError, match="holds checkpoints of a run already"):
        trainer(config)
    rest = trainer(config, resume=True)
    assert rest.train() == "finished"
    assert [c.step for c in find_checkpoints(tmp_path / "run")] == [3, 6]


KILLED = """
import os, sys
from pathlib import Path
import hayate.training.state as state
from tests.training.runs import tiny_config, trainer
real = state.save
calls = []
def dying(*arguments, **options):
    calls.append(1)
    if len(calls) == 2:  # the weights of the second checkpoint: half of it, the optimizer, is on disk
        os.kill(os.getpid(), 9)
    return real(*arguments, **options)
state.save = dying
trainer(tiny_config(Path(sys.argv[1]), Path(sys.argv[2]), checkpoint__every="2")).train()
"""


def test_kill_during_a_checkpoint_keeps_the_one_before(data: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(data), str(tmp_path / "run")]
    result = subprocess.run(command, cwd=Path(__file__).parents[2])
    assert result.returncode == -signal.SIGKILL
    assert [c.step for c in find_checkpoints(tmp_path / "run")] == [2]
    run = trainer(tiny_config(data, tmp_path / "run", checkpoint__every="2"), resume=True)
    assert run.progress.step == 2
    run.train()
    assert [c.step for c in find_checkpoints(tmp_path / "run")] == [6, 8]
    assert not list((tmp_path / "run").glob(".*"))


def test_a_gradient_that_is_not_finite_changes_nothing(data: Path, tmp_path: Path) -> None:
    config = tiny_config(
        data, tmp_path / "run", optimizer__nonfinite="skip", optimizer__max_skipped="1"
    )
    run = trainer(config)
    before = weights(run)
    bad = dict(run.model.named_parameters())["model.layers.1.mlp.down_proj"]
    bad.data[0, 0, 0] = float("nan")
    run._step(_NoLog())
    after = weights(run)
    assert all(
        torch.equal(before[n], after[n]) for n in before if "layers.1.mlp.down_proj" not in n
    )
    assert run.optimizer.num_steps == 0
    with pytest.raises(ModelError, match="gradient of step 1 is not finite"):
        run._step(_NoLog())


def test_what_does_not_fit_is_refused_by_name(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--optimizer\.lrr is unknown; did you mean lr"):
        tiny_config(data, tmp_path, optimizer__lrr="1")
    with pytest.raises(UsageError, match=r"data\.train names no folder"):
        trainer(tiny_config(Path(""), tmp_path / "run", data__train=""))
    with pytest.raises(UsageError, match="'moe-huge' is unknown"):
        trainer(tiny_config(data, tmp_path / "run", model__preset="moe-huge"))
    with pytest.raises(UsageError, match="the model has 64 tokens, the data's tokenizer 320"):
        trainer(tiny_config(data, tmp_path / "run", model__vocab_size="64"))
    with pytest.raises(UsageError, match="no checkpoint in"):
        trainer(tiny_config(data, tmp_path / "run"), resume=True)
    (tmp_path / "a.toml").write_text("[optimizer]\nlr = 'fast'\n")
    from hayate.training.config import load_train_config

    with pytest.raises(UsageError, match=r"a\.toml: optimizer\.lr must be a number; it is 'fast'"):
        load_train_config(tmp_path / "a.toml", {})
    assert not (tmp_path / "run").exists()


def test_the_configuration_survives_toml(data: Path, tmp_path: Path) -> None:
    from hayate.training.config import load_train_config

    config = tiny_config(data, tmp_path, eval__prompts="one,two")
    lines = []
    for key, value in config.to_dict().items():
        if not isinstance(value, dict):
            lines.insert(0, f"{key} = {json.dumps(value)}")
        else:
            lines += [f"[{key}]", *(f"{k} = {json.dumps(v)}" for k, v in value.items())]
    (tmp_path / "c.toml").write_text("\n".join(lines))
    assert load_train_config(tmp_path / "c.toml", {}) == config
