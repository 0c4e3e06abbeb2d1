"""Beyond the trained length: loss by position against transformers, and a needle found with NTK and lost without."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from hayate import LLM
from hayate.errors import UsageError
from hayate.training.context import loss_by_position, ntk_rope
from hayate.training.model_source import open_model
from hayate.training.state import find_checkpoints
from hayate.training.token_file import TokenFile, TokenFileWriter
from tests.cpu.test_cli import assert_fails, run
from tests.training.models import write_model
from tests.training.runs import TEXTS, VOCAB, tiny_config, train_tokenizer, trainer

TRAINED, LONG = 32, 256
QUERY, FIRST_KEY, FILLERS, KINDS = 3, 4, (20, 24), 16


def needle(length: int, generator: np.random.Generator) -> list[int]:
    """A key, then filler, then the query, whose answer is the key."""
    key = FIRST_KEY + int(generator.integers(KINDS))
    filler = generator.integers(*FILLERS, size=length - 3).tolist()
    return [key, *filler, QUERY, key]


def lesson(generator: np.random.Generator) -> list[int]:
    """Needles of one key one after the other: filler of any length, query, answer, to TRAINED tokens."""
    document = needle(int(generator.integers(4, TRAINED)), generator)
    while (room := TRAINED - len(document)) >= 3:
        filler = generator.integers(*FILLERS, size=int(generator.integers(1, room - 1)))
        document += [*filler.tolist(), QUERY, document[0]]
    return document


def write_documents(folder: Path, documents: list[list[int]]) -> TokenFile:
    train_tokenizer(TEXTS, folder, vocab_size=VOCAB)
    with TokenFileWriter(
        folder / "train.safetensors", vocab_size=VOCAB, eos_token_id=2, tokenizer="t"
    ) as writer:
        for document in documents:
            writer.add(document)
    return TokenFile.open(folder / "train.safetensors")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one layer that has learned to find the key in documents of up to 32 tokens."""
    folder = tmp_path_factory.mktemp("needle")
    generator = np.random.default_rng(0)
    write_documents(folder / "data", [lesson(generator) for _ in range(4000)])
    # With theta = 100 the slowest of 8 channel pairs turns by half a radian in 32 tokens, by 4.5 in 256.
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    start = write_model(
        folder / "start",
        "llama",
        **sizes,
        num_key_value_heads=2,
        num_hidden_layers=1,
        rope_theta=100.0,
        max_position_embeddings=TRAINED,
    )
    config = tiny_config(
        folder / "data",
        folder / "run",
        model__preset=None,
        model__init_from=str(start),
        batch__tokens_per_step="1024",
        batch__tokens_per_micro_batch="1024",
        schedule__num_steps="400",
        schedule__warmup_steps="10",
        optimizer__lr="5e-3",
        optimizer__weight_decay="0",
        checkpoint__every="0",
        log__every="100",
    )
    trainer(config).train()
    return find_checkpoints(folder / "run")[-1].folder


def answer_loss(folder: Path, length: int, num_needles: int = 24) -> float:
    """Mean loss of the answer in documents of `length` tokens, from the logits of the inference engine."""
    llm = LLM(folder, device="cpu", dtype="float32", kv_memory=2**22, max_model_len=2 * LONG)
    generator = np.random.default_rng(1)
    losses = []
    for _ in range(num_needles):
        *prompt, answer = needle(length, generator)
        losses.append(-float(llm.logits(prompt)[-1].log_softmax(-1)[answer]))
    return float(np.mean(losses))


def with_ntk(folder: Path, target: Path, factor: float) -> Path:
    shutil.copytree(folder, target)
    fields = json.loads((target / "config.json").read_text())
    fields.pop("rope_parameters", None)
    scaling = {"rope_type": "dynamic", "factor": factor}
    fields |= {"rope_theta": 100.0, "rope_scaling": scaling}
    (target / "config.json").write_text(json.dumps(fields))
    return target


def test_a_needle_at_eight_times_the_trained_length(trained: Path, tmp_path: Path) -> None:
    """Guessing costs ln 16 = 2.77 nats. Seen: 0.13 within 32 tokens; at 256 tokens 10.4, with NTK 1.3."""
    scaled = with_ntk(trained, tmp_path / "ntk", 1.0)
    within, beyond, beyond_scaled = (
        answer_loss(trained, TRAINED),
        answer_loss(trained, LONG),
        answer_loss(scaled, LONG),
    )
    guess = math.log(KINDS)
    assert within < guess / 4
    assert beyond > 2 * guess, "sure of wrong answers"
    assert beyond_scaled < guess
    assert answer_loss(scaled, TRAINED) == within, "up to the trained length nothing changes"


@pytest.mark.parametrize("factor", [None, 1.0, 4.0])
def test_loss_by_position_is_that_of_transformers(
    trained: Path, tmp_path: Path, factor: float | None
) -> None:
    from transformers import AutoModelForCausalLM

    generator = np.random.default_rng(2)
    documents = [needle(LONG + 1, generator) for _ in range(3)]
    file = write_documents(tmp_path / "data", documents)
    folder = trained if factor is None else with_ntk(trained, tmp_path / "ntk", factor)
    model = open_model(trained, device=torch.device("cpu"), dtype=torch.float32)
    rope = model.config.rope if factor is None else ntk_rope(model.config.rope, factor)
    found = loss_by_position(model, rope, file, length=LONG, num_windows=3)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor(documents)
    losses = torch.zeros(LONG)
    for row in ids:  # one at a time: their frequencies stay those of the longest text seen
        with torch.no_grad():
            logits = theirs(input_ids=row[None, :-1]).logits[0]
        losses += torch.nn.functional.cross_entropy(logits, row[1:], reduction="none") / len(ids)
    assert (found[0].begin, found[-1].end) == (0, LONG)
    assert all(a.end == b.begin for a, b in itertools.pairwise(found))
    for point in found:
        expected = float(losses[point.begin : point.end].mean())
        assert point.loss == pytest.approx(expected, rel=1e-4), point  # fp32, some nats


def test_the_perplexity_verb(trained: Path, tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    write_documents(tmp_path / "data", [needle(LONG + 1, generator) for _ in range(2)])
    command = ("perplexity", trained, tmp_path / "data", "--device", "cpu", "--windows", 2)
    picture = tmp_path / "context.png"
    result = run(*command, "--length", LONG, "--ntk", 1, "--plot", picture, "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["max_position_embeddings"] == TRAINED
    assert list(report["loss"]) == ["as config.json says", "dynamic NTK, factor 1"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    table = run(*command)
    assert table.returncode == 0, table.stderr
    assert table.stdout.splitlines()[-1].split()[:3] == ["28", "to", "32"]
    assert_fails(run(*command, "--length", 9999), 2, "no document of 10000 tokens", "--length")
    assert_fails(run(*command, "--ntk", 0.5), 2, "--ntk 0.5 must be at least 1")


def test_factors_below_one_are_refused(trained: Path) -> None:
    model = open_model(trained, device=torch.device("cpu"), dtype=torch.float32)
    with pytest.raises(UsageError, match=r"--ntk nan must be at least 1"):
        ntk_rope(model.config.rope, float("nan"))
