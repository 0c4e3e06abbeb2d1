"""Models with NF4 layers: logits, text, memory plan, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import save_file

from hayate import LLM, SamplingParams
from hayate.checkpoint.nf4 import nf4_tensors, serialise
from hayate.config import EngineOptions
from hayate.errors import ModelError, OutOfMemory
from hayate.kernels import use
from hayate.kernels.nf4 import NF4_CODEBOOK, nf4_dequantize_reference, nf4_quantize
from hayate.models.decoder import CausalLM, build_model
from hayate.models.quantization import load_nf4, nf4_linears
from hayate.models.quantize import in_nf4, quantize_checkpoint
from hayate.runtime.loading import load_network, make_plan, open_checkpoint
from tests import nf4_formula
from tests.engine.test_llm import write_tokenizer
from tests.engine.tiny import TINY
from tests.parity import compare, models

CPU = torch.device("cpu")


def load(folder: Path, dtype: str = "auto") -> CausalLM:
    config, checkpoint = open_checkpoint(folder)
    plan = make_plan(config, EngineOptions(dtype=dtype, kv_memory="64M"), CPU)
    return load_network(config, checkpoint, plan)[0]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder `dense` and one `nf4`."""
    folder = tmp_path_factory.mktemp("llama")
    models.make("llama", folder / "dense", dtype=torch.float32)
    write_tokenizer(folder / "dense")
    quantize_checkpoint(folder / "dense", folder / "nf4")
    return folder


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral-window", "nemotron-bias", "qwen3"])
def test_fp32_logits_against_transformers(name, tmp_path):
    """Transformers has the dequantised weights. The tolerance is that of the dense parity tests."""
    theirs = models.make(name, tmp_path / "dense", dtype=torch.float32)
    quantize_checkpoint(tmp_path / "dense", tmp_path / "nf4", double=name != "qwen2")
    weights = nf4_formula.dequantized(nf4_formula.read(tmp_path / "nf4"))
    theirs.load_state_dict(weights, strict=not theirs.config.tie_word_embeddings)
    ours, ids = load(tmp_path / "nf4"), compare.token_ids()
    assert len(nf4_linears(ours)) == 4 * theirs.config.num_hidden_layers
    wanted = compare.their_logits(theirs, ids, prompt_len=compare.PROMPT_LEN)
    logits = compare.our_logits(ours, ids, prompt_len=compare.PROMPT_LEN)
    assert (logits - wanted).abs().max() < 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_logits_are_those_of_the_dequantised_weights(llama, tmp_path, dtype):
    """fp32 products of code and scale, rounded once to the dtype of the run: to the last bit."""
    weights = nf4_formula.dequantized(nf4_formula.read(llama / "nf4"))
    save_file(
        {name: w.to(getattr(torch, dtype)) for name, w in weights.items()},
        tmp_path / "model.safetensors",
    )
    shutil.copy(llama / "dense" / "config.json", tmp_path)
    packed, dense, ids = load(llama / "nf4", dtype), load(tmp_path, dtype), compare.token_ids()
    with use("reference"):
        wanted = compare.our_logits(dense, ids, prompt_len=compare.PROMPT_LEN)
        assert torch.equal(compare.our_logits(packed, ids, prompt_len=compare.PROMPT_LEN), wanted)


@pytest.mark.parametrize("skip", [["down_proj", "model.layers.1"], []])
def test_some_layers_dense(tmp_path, skip):
    """A biased Qwen2 in shards whose matrices are read in several groups."""
    theirs = models.make("qwen2", tmp_path / "dense", dtype=torch.float32, max_shard_size="60KB")
    quantize_checkpoint(tmp_path / "dense", tmp_path / "nf4", skip=skip)
    ours = load(tmp_path / "nf4")
    assert len(nf4_linears(ours)) == (6 if skip else 12)
    theirs.load_state_dict(nf4_formula.dequantized(nf4_formula.read(tmp_path / "nf4")))
    ids = compare.token_ids()
    wanted = compare.their_logits(theirs, ids, prompt_len=9)
    logits = compare.our_logits(ours, ids, prompt_len=9)
    assert (logits - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_groups_and_pieces(llama, monkeypatch):
    """However the loading is cut, the weights are the same; a group holds no more bytes than it may."""
    whole = load(llama / "nf4").state_dict()
    monkeypatch.setattr("hayate.models.quantization._GROUP_BYTES", 6000)
    monkeypatch.setattr("hayate.models.quantization._PIECE_BYTES", 200)
    checkpoint = open_checkpoint(llama / "nf4")[1]
    sizes = []
    monkeypatch.setattr(
        "hayate.runtime.loading.load_nf4",
        lambda *args: sizes.append((len(args[2]), read := load_nf4(*args))) or read,
    )
    cut = load(llama / "nf4").state_dict()
    assert sum(count for count, _ in sizes) == len(nf4_tensors(checkpoint, NF4_CODEBOOK))
    assert all(count == 1 or read <= 6000 for count, read in sizes)
    assert max(count for count, _ in sizes) > 1
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def with_matrix(folder: Path, name: str, w: torch.Tensor, block_size: int) -> dict:
    """Write `w` to the checkpoint in `folder` as bitsandbytes does; returns all tensors."""
    tensors = {n: t for n, t in nf4_formula.read(folder).items() if not n.startswith(name)}
    codes, state = bnb.quantize_4bit(w, blocksize=block_size, quant_type="nf4")
    parts = {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
    tensors |= {name: codes, **parts}
    save_file(tensors, folder / "model.safetensors")
    return tensors


@pytest.mark.parametrize("block_size", [128, 4096])
def test_larger_blocks(llama, tmp_path, block_size):
    """One layer's blocks are larger, and single scales; it lies beside double ones in a fused layer."""
    nf4 = shutil.copytree(llama / "nf4", tmp_path / "nf4")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = with_matrix(nf4, name, nf4_formula.read(llama / "dense")[name], block_size)
    layer = nf4_linears(load(nf4))["model.layers.0.mlp.gate_up_proj"]
    up = nf4_dequantize_reference(layer.packed, torch.float32)[80:]
    assert torch.equal(up, nf4_formula.dequantize(tensors, name))


def test_sizes_that_are_not_run(llama, tmp_path, monkeypatch):
    nf4 = shutil.copytree(llama / "nf4", tmp_path / "nf4")
    name = "model.layers.0.mlp.up_proj.weight"
    with_matrix(nf4, name, torch.randn(80, 48), 32)
    refused(nf4, name, "blocks of 32", "multiple of 64")
    monkeypatch.setitem(models.CASES, "narrow", ("Llama", {"intermediate_size": 72}))
    models.make("narrow", tmp_path / "narrow", dtype=torch.float32)
    edit(tmp_path / "narrow", quantization_config=quantization(llama / "nf4"))
    name = "model.layers.0.mlp.down_proj.weight"
    with_matrix(tmp_path / "narrow", name, torch.randn(48, 72), 64)
    refused(tmp_path / "narrow", name, "rows of 72", "multiple of 16")


def test_codes_stored_as_another_dtype(llama, tmp_path):
    """bnb_4bit_quant_storage: the same bytes."""
    nf4 = shutil.copytree(llama / "nf4", tmp_path / "nf4")
    tensors = nf4_formula.read(nf4)
    for name in list(tensors):
        if name + nf4_formula.STATE in tensors:
            tensors[name] = tensors[name].view(-1, 2).view(torch.bfloat16)
    save_file(tensors, nf4 / "model.safetensors")
    edit(nf4, quantization_config={**quantization(nf4), "bnb_4bit_quant_storage": "bfloat16"})
    wanted, found = load(llama / "nf4").state_dict(), load(nf4).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_quantised_head(llama, tmp_path):
    """transformers leaves the head dense unless told otherwise; then it runs like any layer."""
    tensors, name = nf4_formula.read(llama / "nf4"), "lm_head.weight"
    head = tensors.pop(name)
    codes, absmax = nf4_quantize(head)
    how = {"shape": head.shape, "dtype": head.dtype, "codebook": NF4_CODEBOOK}
    tensors |= serialise(name, codes, absmax, **how)
    shutil.copytree(llama / "nf4", tmp_path / "nf4")
    save_file(tensors, tmp_path / "nf4" / "model.safetensors")
    ours, plain = load(tmp_path / "nf4"), load(llama / "nf4")
    assert "lm_head" in nf4_linears(ours)
    plain.lm_head.weight.copy_(nf4_formula.dequantize(tensors, name))
    ids = compare.token_ids()
    with use("reference"):
        wanted = compare.our_logits(plain, ids, prompt_len=30)
        assert torch.equal(compare.our_logits(ours, ids, prompt_len=30), wanted)


def test_text_end_to_end(llama):
    """Greedy tokens are those of the logits, token ids in and out."""
    seen = []
    llm = LLM(
        llama / "nf4", device="cpu", kv_memory="16M", progress=lambda *done: seen.append(done)
    )
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    prompts = [[3, 5, 8, 13], list(range(40, 90))]
    out = [o.outputs[0].token_ids for o in llm.generate(prompts, params)]
    assert [len(o) for o in out] == [12, 12]
    logits = compare.our_logits(load(llama / "nf4"), prompts[1] + out[1], prompt_len=50)
    assert logits[49:-1].argmax(-1).tolist() == out[1]
    assert llm.load_report is not None
    assert seen[-1] == (llm.load_report.num_bytes,) * 2
    assert seen == sorted(seen)
    assert {total for _, total in seen} == {llm.load_report.num_bytes}


def test_random_weights_in_nf4():
    llm = LLM.from_random(in_nf4(TINY), device="cpu", kv_memory="16M")
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    assert len(llm.generate([[1, 2, 3]], params)[0].outputs[0].token_ids) == 8


def test_memory_plan_counts_packed_sizes(monkeypatch):
    """Bytes in the plan are those of the parameters, and decide what fits."""
    config = dataclasses.replace(TINY, hidden_size=1024, ffn_size=4096, head_dim=64, num_heads=16)
    packed = in_nf4(config)
    options = EngineOptions(dtype="bfloat16", kv_memory="1M")
    plan = make_plan(packed, options, CPU)
    model = build_model(packed, device=CPU, dtype=torch.bfloat16)
    assert plan.weight_bytes == sum(p.nbytes for p in model.parameters())
    # 4 bits and a scale in fp32 for 64 values: 4.5 of 16 bits, beside the dense embedding and head.
    matrices = config.num_parameters - 2 * config.vocab_size * config.hidden_size
    saved = make_plan(config, options, CPU).weight_bytes - plan.weight_bytes
    assert saved == pytest.approx(matrices * 11.5 / 8, rel=1e-3)
    monkeypatch.setattr(
        "hayate.runtime.device.free_bytes", lambda _: plan.weight_bytes + 2**28 + 2**21
    )
    make_plan(packed, options, CPU)
    with pytest.raises(OutOfMemory, match="needs"):
        make_plan(config, options, CPU)


def quantization(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def edit(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def refused(folder: Path, *parts: str) -> None:
    with pytest.raises(ModelError) as error:
        load(folder)
    for part in parts:
        assert part in str(error.value), error.value


def test_config_and_tensors_must_agree(llama, tmp_path):
    nf4 = shutil.copytree(llama / "nf4", tmp_path / "nf4")
    edit(nf4, quantization_config=None)
    refused(nf4, "model.safetensors", "is NF4", "quantization_config")
    dense = shutil.copytree(llama / "dense", tmp_path / "dense")
    edit(dense, quantization_config=quantization(llama / "nf4"))
    refused(dense, "quantization_config", "hayate quantize")


def test_fused_layers_are_nf4_as_a_whole(llama, tmp_path):
    nf4 = shutil.copytree(llama / "nf4", tmp_path / "nf4")
    tensors, name = nf4_formula.read(nf4), "model.layers.1.self_attn.v_proj.weight"
    kept = {n: t for n, t in tensors.items() if not n.startswith(name)}
    dense = nf4_formula.dequantize(tensors, name)
    save_file(kept | {name: dense}, nf4 / "model.safetensors")
    refused(nf4, "layers.1.self_attn", "is NF4", "v_proj", "both or none")


def test_tensors_of_another_model(llama, tmp_path):
    nf4 = shutil.copytree(llama / "nf4", tmp_path / "nf4")
    edit(nf4, intermediate_size=64)
    refused(nf4, "mlp", "has shape", "80", "64")
    edit(nf4, intermediate_size=80, num_hidden_layers=2)
    refused(nf4, "layers.2", "no linear layer of this model")


def test_experts_are_refused(llama, tmp_path):
    models.make("mixtral", tmp_path / "dense", dtype=torch.float32)
    tensors = nf4_formula.read(tmp_path / "dense")
    expert = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    assert expert in tensors
    up = "model.layers.0.mlp.up_proj.weight"
    nf4 = {n: t for n, t in nf4_formula.read(llama / "nf4").items() if n.startswith(up)}
    tensors |= {name.replace(up, expert): t for name, t in nf4.items()}
    save_file(tensors, tmp_path / "dense" / "model.safetensors")
    edit(tmp_path / "dense", quantization_config=quantization(llama / "nf4"))
    refused(tmp_path / "dense", "experts.0.w1", "no experts")
