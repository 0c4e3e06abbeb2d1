"""Training that begins with a checkpoint: of every architecture, and of a dense model made into a mixture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hayate import LLM
from hayate.errors import UsageError
from hayate.training.state import find_checkpoints
from hayate.training.upcycle import upcycle
from tests.cpu.test_cli import assert_fails, run
from tests.training.models import ARCHITECTURES, write_model
from tests.training.runs import make_data, tiny_config, trainer

IDS = torch.randint(3, 320, (60,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def transformers_logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(input_ids=IDS[None]).logits[0]


def our_logits(folder: Path) -> torch.Tensor:
    return LLM(folder, device="cpu", dtype="float32", kv_memory=2**22).logits(IDS.tolist())


def assert_same_logits(found: torch.Tensor, expected: torch.Tensor) -> None:
    # fp32 on both sides; the parity suite derives 1e-4 of the scale for models of this depth.
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_architecture_can_be_trained_further(kind: str, data: Path, tmp_path: Path) -> None:
    """The first loss is that of transformers, training lowers it, and transformers reads the result."""
    source = write_model(tmp_path / kind, kind)
    config = tiny_config(
        data,
        tmp_path / "run",
        model__preset=None,
        model__init_from=str(source),
        loss__balance="none",
        loss__z="0",
        schedule__num_steps="12",
        checkpoint__every="0",
    )
    training = trainer(config)
    batch = training.stream.batch(0, config.sequences_per_step)
    assert training.train() == "finished"
    losses = training.progress.losses
    assert losses[-1] < losses[0] - 0.3

    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    total = 0.0
    for ids, targets, starts in zip(
        batch.token_ids, batch.targets, batch.document_starts, strict=True
    ):
        for start in sorted(
            set(starts.tolist())
        ):  # a document at a time: ours do not see each other
            rows = starts == start
            with torch.no_grad():
                logits = theirs(input_ids=torch.from_numpy(ids[rows])[None]).logits[0]
            total += torch.nn.functional.cross_entropy(
                logits, torch.from_numpy(targets[rows]), ignore_index=-100, reduction="sum"
            ).item()
    # fp32 means of 256 losses of about 8 nats.
    assert losses[0] == pytest.approx(total / batch.num_targets, rel=1e-4)

    folder = find_checkpoints(tmp_path / "run")[-1].folder
    assert_same_logits(our_logits(folder), transformers_logits(folder))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_says_the_dtype_it_has(data: Path, tmp_path: Path, dtype: str) -> None:
    """Newer config.json files spell it `dtype`, older ones `torch_dtype`: neither may be left from the source."""
    source = write_model(tmp_path / "llama", "llama")
    config = tiny_config(
        data,
        tmp_path / "run",
        model__preset=None,
        model__init_from=str(source),
        precision__dtype=dtype,
        schedule__num_steps="3",
    )
    trainer(config).train()
    folder = find_checkpoints(tmp_path / "run")[-1].folder
    fields = json.loads((folder / "config.json").read_text())
    assert {fields[key] for key in ("dtype", "torch_dtype") if key in fields} == {dtype}
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        assert str(file.get_tensor("model.norm.weight").dtype) == f"torch.{dtype}"


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3"])
def test_an_upcycled_model_gives_the_dense_logits(kind: str, tmp_path: Path) -> None:
    source = write_model(tmp_path / kind, kind)
    upcycle(source, tmp_path / "mixture", num_experts=4, num_active=3)
    expected = transformers_logits(source)
    assert_same_logits(transformers_logits(tmp_path / "mixture"), expected)
    assert_same_logits(our_logits(tmp_path / "mixture"), expected)


def test_noise_tells_the_experts_apart_by_as_much_as_asked(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    source = write_model(tmp_path / "llama", "llama")
    upcycle(source, tmp_path / "mixture", num_experts=4, num_active=2, noise=0.1)
    dense = load_file(source / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    mixture = load_file(tmp_path / "mixture" / "model.safetensors")
    for expert in range(4):
        found = mixture[f"model.layers.1.block_sparse_moe.experts.{expert}.w2.weight"]
        # The deviation of 6,144 draws is within 1 % of its mean at one standard deviation.
        assert float((found - dense).std() / dense.std()) == pytest.approx(0.1, rel=0.05)
    gates = [mixture[f"model.layers.{i}.block_sparse_moe.gate.weight"] for i in range(2)]
    assert not torch.equal(*gates)


def test_upcycling_and_training_from_the_command_line(data: Path, tmp_path: Path) -> None:
    """hayate upcycle, then train, then the same output again is refused."""
    source = write_model(tmp_path / "llama", "llama", intermediate_size=32)
    mixture = tmp_path / "mixture"
    command = ("upcycle", source, mixture, "--experts", 4, "--active", 2)
    result = run(*command)
    assert result.returncode == 0, result.stderr
    assert "MixtralForCausalLM" in result.stdout
    options = ("--data", data, "-o", tmp_path / "run", "--precision.dtype", "float32")
    sizes = ("--batch.sequence_length", 32, "--batch.tokens_per_step", 256)
    steps = ("--batch.tokens_per_micro_batch", 256, "--schedule.num_steps", 3)
    rest = ("--schedule.warmup_steps", 1, "--eval.tokens", 64, "--device", "cpu")
    result = run("train", "--model.init_from", mixture, *options, *sizes, *steps, *rest)
    assert result.returncode == 0, result.stderr
    assert "finished at step 3" in result.stdout
    assert "router: largest load" in result.stdout
    assert_fails(run(*command), 2, str(mixture), "holds a model already")


@pytest.mark.parametrize(
    ("kind", "fields", "options", "message"),
    [
        ("mixtral", {}, {}, "MixtralForCausalLM has no mixture of experts to become"),
        ("nemotron", {}, {}, "NemotronForCausalLM has no mixture"),
        ("llama", {"attention_bias": True}, {}, "cannot express qkv_bias = True"),
        ("llama", {}, {"num_active": 9}, "--active 9 must be between 1 and the 8 experts"),
        ("llama", {}, {"noise": -1.0}, "--noise -1.0 must be at least 0"),
    ],
)
def test_what_cannot_be_upcycled_is_refused_by_name(
    kind: str, fields: dict, options: dict, message: str, tmp_path: Path
) -> None:
    source = write_model(tmp_path / kind, kind, **fields)
    with pytest.raises(UsageError, match=message):
        upcycle(source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.real_model
def test_smollm2_upcycled_gives_the_dense_logits(tmp_path: Path) -> None:
    """Of a real model, 2 of 2 experts (to keep the test small), read by both."""
    from hayate.checkpoint.hub import resolve_model

    source = resolve_model("smollm2-135m", None)
    upcycle(source, tmp_path / "mixture", num_experts=2, num_active=2)
    # fp32 arithmetic on the bf16 weights of both; the routing weights of equal experts sum to one within 2^-23.
    assert_same_logits(our_logits(tmp_path / "mixture"), transformers_logits(source))


def test_what_cannot_be_trained_is_refused_by_name(data: Path, tmp_path: Path) -> None:
    source = write_model(tmp_path / "llama", "llama")
    fields = json.loads((source / "config.json").read_text())
    fields["quantization_config"] = {"quant_method": "bitsandbytes"}
    (source / "config.json").write_text(json.dumps(fields))
    config = tiny_config(data, tmp_path / "run", model__preset=None, model__init_from=str(source))
    with pytest.raises(UsageError, match="llama: its weights are quantised, and cannot be trained"):
        trainer(config)
    with pytest.raises(UsageError, match="MiniCPMV cannot be trained, only text models can"):
        trainer(tiny_config(data, tmp_path / "run", model__preset="minicpm-v-2.6"))
