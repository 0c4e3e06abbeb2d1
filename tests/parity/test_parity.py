"""Every architecture against transformers on small random models: prefill and cached decode, fp32 and bf16."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch

from hayate.checkpoint.writer import save
from hayate.models.weights import placements
from tests.parity import compare, models


@pytest.mark.parametrize("name", models.CASES)
def test_fp32_logits(name, tmp_path):
    assert compare.compare(name, tmp_path).worst < 1e-4


@pytest.mark.parametrize("name", ["llama", "nemotron", "qwen3", "mixtral", "olmoe", "qwen3-moe"])
def test_bf16_logits(name, tmp_path):
    errors = compare.compare(name, tmp_path, dtype=torch.bfloat16)
    assert errors.worst < compare.bf16_bound(models.COMMON["num_hidden_layers"])


@pytest.mark.parametrize(
    "name", ["llama-bias-tied", "nemotron-bias", "qwen2", "olmoe", "qwen3-moe"]
)
def test_sharded_and_saved_back(name, tmp_path):
    """A sharded checkpoint reads like a single file, and saving gives every tensor back bit for bit."""
    source, again = tmp_path / "source", tmp_path / "again"
    assert compare.compare(name, source, max_shard_size="60KB").worst < 1e-4
    assert len(list(source.glob("*.safetensors"))) > 1

    model = compare.load_ours(source, torch.float32)
    save(dict(model.named_parameters()), placements(model.config), again, max_shard_bytes=60_000)
    tensors = [
        {
            k: v
            for f in folder.glob("*.safetensors")
            for k, v in safetensors.torch.load_file(f).items()
        }
        for folder in (source, again)
    ]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][k], tensors[1][k]) for k in tensors[0])
