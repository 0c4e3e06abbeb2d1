"""The vision encoder's attention in bf16 on the GPU against float64, and the vision half against the CPU's."""

from __future__ import annotations

import pytest
import torch

from hayate.kernels.encoder_attention import encoder_attention
from hayate.models import preset_config
from hayate.models.decoder import build_model, init_random
from tests.vision.checkpoints import write_minicpmv

BF16 = torch.bfloat16
ULP = 2.0**-8


def attention_64(q, k, v, q_ends, k_ends, scale):
    parts = []
    for s in range(len(q_ends) - 1):
        rows, keys = slice(q_ends[s], q_ends[s + 1]), slice(k_ends[s], k_ends[s + 1])
        scores = torch.einsum("qhk,nhk->hqn", q[rows].double(), k[keys].double()) * scale
        parts.append(torch.einsum("hqn,nhk->qhk", scores.softmax(-1), v[keys].double()))
    return torch.cat(parts)


@pytest.mark.parametrize(
    ("head_dim", "num_heads", "queries", "keys"),
    [
        (72, 16, [1024, 1014, 37, 1], None),  # SigLIP: tiles of a large picture
        (128, 28, [64] * 4, [1024, 1014, 37, 1]),  # the resampler
        (80, 4, [300, 64], None),
        (96, 4, [300, 64], None),
    ],
)
def test_encoder_attention(head_dim, num_heads, queries, keys):
    keys = keys or queries
    q_ends, k_ends = ([0, *torch.tensor(n).cumsum(0).tolist()] for n in (queries, keys))
    most = max(q_ends[-1], k_ends[-1])
    fused = torch.randn(most, 3, num_heads, head_dim, device="cuda").to(BF16)
    q, k, v = fused.unbind(1)
    q = q[: q_ends[-1]]
    ends = [torch.tensor(e, dtype=torch.int32, device="cuda") for e in (q_ends, k_ends)]
    scale = head_dim**-0.5
    found = encoder_attention(q, k, v, *ends, max_seqlen_q=max(queries), scale=scale)
    wanted = attention_64(q, k, v, q_ends, k_ends, scale)
    # The weights are rounded before they meet the values, and the output once more.
    assert ((found.double() - wanted).norm() / wanted.norm()).item() < 1.5 * ULP


@pytest.mark.parametrize("nf4", [False, True])
def test_vision_half(tmp_path, nf4):
    """A tiny model's pictures: bf16 on the GPU, fp32 on the CPU."""
    from hayate.config import EngineOptions
    from hayate.runtime.loading import load_network, make_plan, open_checkpoint

    write_minicpmv(tmp_path, nf4=nf4)
    config, checkpoint = open_checkpoint(tmp_path)
    sizes = [(8, 8), (32, 32), (5, 6)]
    patches = torch.rand(64 + 1024 + 30, 588) * 2 - 1
    found = {}
    for name, dtype in (("cuda", "bfloat16"), ("cpu", "float32")):
        device = torch.device(name)
        options = EngineOptions(device=name, dtype=dtype, kv_memory="16M")
        network, _ = load_network(config, checkpoint, make_plan(config, options, device))
        found[name] = network.encode(patches.to(device, getattr(torch, dtype)), sizes)
    wanted = found["cpu"]
    # As on the CPU in bf16 (tests/vision/test_minicpmv_model.py): some thirty roundings on the way.
    error = (found["cuda"].float().cpu() - wanted).norm() / wanted.norm()
    assert error.item() < 0.03


def test_full_size():
    """The published sizes on random weights: a picture of ten tiles."""
    model = build_model(preset_config("minicpm-v-2.6"), device=torch.device("cuda"), dtype=BF16)
    init_random(model)
    patches = torch.rand(10 * 1024, 588, device="cuda").to(BF16) * 2 - 1
    y = model.encode(patches, [(32, 32)] * 10)
    assert y.shape == (10, 64, 3584)
    assert bool(y.isfinite().all())
    alone = model.encode(patches[1024:2048], [(32, 32)])
    # The library may cut the products of 1,024 rows and of 10,240 differently; random weights amplify nothing.
    assert ((alone[0].float() - y[1].float()).norm() / y[1].float().norm()).item() < 0.05
