"""`hayate quantize`: the folder it writes, who can read it, what it refuses, and that it leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import save_file

from hayate.checkpoint.header import TensorInfo
from hayate.checkpoint.index import Checkpoint
from hayate.checkpoint.placements import complete
from hayate.errors import ModelError, UsageError
from hayate.kernels.nf4 import nf4_quantize
from hayate.models import preset_config
from hayate.models.decoder import meta_model
from hayate.models.quantize import _chosen, _kept, quantize_checkpoint
from hayate.models.weights import placements
from tests import nf4_formula
from tests.cpu.test_cli import assert_fails, run
from tests.engine.test_llm import write_tokenizer
from tests.parity import models

LAYERS, MATRICES = 3, 7


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in bfloat16, in shards, with a tokenizer and other files."""
    folder = tmp_path_factory.mktemp("dense") / "model"
    models.make("llama", folder, dtype=torch.bfloat16, max_shard_size="60KB")
    write_tokenizer(folder)
    (folder / "pytorch_model.bin").write_bytes(b"old weights")
    (folder / "LICENSE").write_text("free")
    return folder


@pytest.mark.parametrize("double", [True, False])
def test_the_command(dense: Path, tmp_path: Path, double: bool) -> None:
    out = tmp_path / "out"
    result = run("quantize", dense, out, *([] if double else ["--no-double-quant"]))
    assert (result.returncode, result.stdout) == (0, f"{out}\n"), result.stderr
    assert os.listdir(tmp_path) == ["out"]
    assert {p.name for p in out.iterdir()} - {"generation_config.json"} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "LICENSE",
    }
    config = json.loads((out / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == json.loads((dense / "config.json").read_text())
    assert quantization["bnb_4bit_use_double_quant"] is double
    assert quantization["llm_int8_skip_modules"] == ["lm_head"]

    shown = run("inspect", out)
    assert f"NF4: {LAYERS * MATRICES} matrices" in shown.stdout
    report = json.loads(run("inspect", out, "--json").stdout)
    assert report["nf4"] == {
        "matrices": LAYERS * MATRICES,
        "block_size": 64,
        "double_quantised": double,
    }
    assert json.loads(run("inspect", dense, "--json").stdout)["nf4"] is None
    text = run("generate", "-m", out, "-p", "Hi", "--device", "cpu", "--max-tokens", 4)
    assert text.returncode == 0, text.stderr


def test_bitsandbytes_reads_what_was_written(dense: Path, tmp_path: Path) -> None:
    """Each matrix as a layer of its own, and the values are the nearest to the original's."""
    quantize_checkpoint(dense, tmp_path / "out")
    tensors, before = nf4_formula.read(tmp_path / "out"), nf4_formula.read(dense)
    names = [n.removesuffix(nf4_formula.STATE) for n in tensors if n.endswith(nf4_formula.STATE)]
    assert len(names) == LAYERS * MATRICES
    assert before.keys() <= tensors.keys()
    for name, tensor in before.items():
        if name not in names:
            assert torch.equal(tensors[name], tensor), name
            continue
        stats = {n: t for n, t in tensors.items() if n.startswith(f"{name}.")}
        theirs = bnb.nn.Params4bit.from_prequantized(tensors[name], stats, device="cpu")
        codes, state = bnb.functional.quantize_4bit(
            tensor, compress_statistics=True, quant_type="nf4"
        )
        assert torch.equal(theirs.data, codes)
        assert theirs.quant_state == state


def test_transformers_reads_what_was_written(dense: Path, tmp_path: Path) -> None:
    """Its own quantised model, saved, has the same tensors."""
    pytest.importorskip("accelerate", reason="transformers loads no quantised model without it")
    import transformers

    quantize_checkpoint(dense, tmp_path / "ours")
    how = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs = load(dense, quantization_config=how, device_map="cpu", dtype=torch.bfloat16)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, wanted = nf4_formula.read(tmp_path / "ours"), nf4_formula.read(tmp_path / "theirs")
    assert ours.keys() == wanted.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in wanted.items())
    again = load(tmp_path / "ours", device_map="cpu")
    layers = [m for m in again.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(layers) == LAYERS * MATRICES


@pytest.mark.parametrize(
    ("skip", "count"),
    [
        (["down_proj"], LAYERS * (MATRICES - 1)),
        (["model.layers.1"], (LAYERS - 1) * MATRICES),
        (["model.layers.1.mlp", "o_proj"], LAYERS * MATRICES - 3 - 3),
    ],
)
def test_skip(dense: Path, tmp_path: Path, skip: list[str], count: int) -> None:
    quantize_checkpoint(dense, tmp_path / "out", skip=skip)
    tensors = nf4_formula.read(tmp_path / "out")
    assert sum(name.endswith(nf4_formula.STATE) for name in tensors) == count
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["llm_int8_skip_modules"] == ["lm_head", *skip]


def test_minicpm_v_has_331_matrices() -> None:
    """Those that its published NF4 checkpoint has; no out_proj, kv_proj or head."""
    config = preset_config("minicpm-v-2.6")
    shapes = dict(meta_model(config, dtype=torch.bfloat16).named_parameters())
    file = Path("model.safetensors")
    tensors = {}
    for source, target, index, _ in complete(shapes, placements(config)):
        shape = tuple(shapes[target][index].shape)
        tensors[source] = TensorInfo(source, "BF16", shape, file, 0, 0)
    chosen = _chosen(config, Checkpoint(Path(), [file], tensors), _kept(config), ())
    assert (len(tensors), len(chosen)) == (789, 331)
    assert sum(name.startswith("llm.") for name in chosen) == 28 * 7
    assert not [n for n in chosen if "out_proj" in n or "kv_proj" in n or "lm_head" in n]


def refused(
    folder: Path, out: Path, error: type[Exception], *parts: str, **options: object
) -> None:
    before = sorted(os.listdir(out.parent))
    with pytest.raises(error) as raised:
        quantize_checkpoint(folder, out, **options)
    for part in parts:
        assert part in str(raised.value), raised.value
    assert sorted(os.listdir(out.parent)) == before


def test_refused(dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused(dense, out, UsageError, "--skip nothing", skip=["nothing"])
    refused(dense, out, UsageError, "q_proj", "both or none", skip=["q_proj"])
    out.mkdir()
    refused(dense, out, UsageError, "exists")
    out.rmdir()
    quantize_checkpoint(dense, out)
    refused(out, tmp_path / "again", ModelError, "quantised already")
    models.make("mixtral", tmp_path / "moe", dtype=torch.bfloat16)
    refused(tmp_path / "moe", tmp_path / "again", ModelError, "mixture of experts")


def test_odd_widths_are_refused_unless_skipped(dense: Path, tmp_path: Path) -> None:
    narrow = shutil.copytree(dense, tmp_path / "narrow")
    config = json.loads((narrow / "config.json").read_text())
    (narrow / "config.json").write_text(json.dumps({**config, "intermediate_size": 72}))
    tensors = nf4_formula.read(dense)
    for name in tensors:
        if "mlp" in name:
            tensors[name] = tensors[name].narrow(1 if "down" in name else 0, 0, 72).contiguous()
    for file in [*narrow.glob("*.safetensors"), narrow / "model.safetensors.index.json"]:
        file.unlink()
    save_file(tensors, narrow / "model.safetensors")
    refused(narrow, tmp_path / "out", ModelError, "rows of 72", "--skip down_proj")
    quantize_checkpoint(narrow, tmp_path / "out", skip=["down_proj"])


def test_wrong_usage(dense: Path, tmp_path: Path) -> None:
    assert_fails(run("quantize", dense, tmp_path / "o", "--format", "int8"), 2, "--format", "int8")
    assert_fails(run("quantize", dense, tmp_path), 2, "exists")
    assert_fails(run("quantize", dense, tmp_path / "a" / "b"), 2, "does not exist")
    assert_fails(run("quantize", tmp_path / "none", tmp_path / "o"), 3, "none")


def test_interrupt_leaves_nothing(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while the third matrix is quantised."""
    calls: list[bool] = []

    def slow(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append([p.name.endswith(".incomplete") for p in tmp_path.iterdir()] == [True])
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return nf4_quantize(w)

    monkeypatch.setattr("hayate.models.quantize.nf4_quantize", slow)
    result = run("quantize", dense, tmp_path / "out")
    assert (result.returncode, result.stderr) == (130, "hayate: interrupted\n")
    assert calls == [True] * 3
    assert list(tmp_path.iterdir()) == []
