"""Attention of packed sequences without a mask against a plain float64 loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hayate.checkpoint.config_json import ConfigReader
from hayate.errors import UsageError
from hayate.kernels._dispatch import use
from hayate.kernels.encoder_attention import encoder_attention, launch_encoder_attention
from hayate.kernels.flash_attention import Tiles
from hayate.models import PRESETS, parse_config
from hayate.models.decoder import build_model, init_random
from hayate.models.minicpmv import MiniCPMV

TINY = parse_config(
    ConfigReader(
        {
            **PRESETS["minicpm-v-2.6"],
            "vocab_size": 64,
            "hidden_size": 128,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "query_num": 5,
            "vision_config": {
                **PRESETS["minicpm-v-2.6"]["vision_config"],
                "hidden_size": 144,
                "intermediate_size": 80,
                "num_attention_heads": 2,
                "num_hidden_layers": 1,
            },
        },
        "tiny",
    )
)

# Queries and keys of each sequence.
SELF = ((37, 37), (1, 1), (33, 33))
CROSS = ((16, 50), (16, 7), (16, 64))
SOME_WITHOUT = ((5, 40), (0, 0), (0, 9), (20, 20))


def draw(lengths, num_heads: int, head_dim: int, dtype: torch.dtype):
    """Parts of a fused projection, whose rows beyond the sequences hold NaN."""
    q_ends, k_ends = (
        torch.tensor([0, *column]).cumsum(0).to(torch.int32)
        for column in zip(*lengths, strict=True)
    )
    fused = torch.full(
        (int(max(q_ends[-1], k_ends[-1])) + 70, 3, num_heads, head_dim), float("nan"), dtype=dtype
    )
    fused[: q_ends[-1], 0] = torch.randn(int(q_ends[-1]), num_heads, head_dim)
    fused[: k_ends[-1], 1:] = torch.randn(int(k_ends[-1]), 2, num_heads, head_dim)
    q, k, v = fused.unbind(1)
    return q[: q_ends[-1]], k, v, q_ends, k_ends


def expected_64(q, k, v, q_ends, k_ends, scale: float) -> Tensor:
    out = torch.zeros(q.shape, dtype=torch.float64)
    for s in range(len(q_ends) - 1):
        keys, values = (x[k_ends[s] : k_ends[s + 1]].double() for x in (k, v))
        for i in range(int(q_ends[s]), int(q_ends[s + 1])):
            for h in range(q.shape[1]):
                weights = (keys[:, h] @ q[i, h].double() * scale).softmax(0)
                out[i, h] = weights @ values[:, h]
    return out


def check(found: Tensor, q, k, v, q_ends, k_ends, scale: float) -> None:
    wanted = expected_64(q, k, v, q_ends, k_ends, scale)
    assert found.dtype == q.dtype
    assert found.is_contiguous()
    largest = float(v[: k_ends[-1]].abs().max())
    # fp32: scores of up to 256 products below 40, each rounded to 6e-8 of the running sum: 1e-5 absolute, so
    # relative in a weight, and as much again for the sum over the keys. Else weights and output are each
    # rounded by half a unit, of the largest value at most, as the weights sum to one; and one for scores kept
    # in 16 bits, as PyTorch's reference may do.
    unit = 2e-5 if found.dtype == torch.float32 else 1.5 * torch.finfo(found.dtype).eps
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=unit * largest)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("lengths", [SELF, CROSS, SOME_WITHOUT], ids=["self", "cross", "some"])
@pytest.mark.parametrize("head_dim", [72, 128])
def test_public_function(head_dim, lengths, dtype, implementation) -> None:
    """The tiles of the card, on SigLIP's and the resampler's heads."""
    operands = draw(lengths, 2, head_dim, dtype)
    scale = 1.3 * head_dim**-0.5
    most = max(new for new, _ in lengths)
    with use(implementation):
        found = encoder_attention(*operands, max_seqlen_q=most, scale=scale)
    check(found, *operands, scale)


@pytest.mark.parametrize("tiles", [Tiles(32, 16, 4, 1), Tiles(16, 32, 4, 1)])
@pytest.mark.parametrize("head_dim", [8, 16, 20, 40, 96])
def test_small_tiles(head_dim, tiles) -> None:
    """Several tiles of each sequence, the last partly filled; heads in one part and in two, padded and not."""
    operands = draw(((37, 37), (3, 48), (32, 5)), 1, head_dim, torch.float32)
    found = launch_encoder_attention(*operands, max_seqlen_q=37, scale=0.15, tiles=tiles)
    check(found, *operands, 0.15)


def test_large_scores_do_not_overflow() -> None:
    q, k, v, q_ends, k_ends = draw(SELF, 1, 72, torch.float32)
    operands = (q * 30, k, v, q_ends, k_ends)
    found = launch_encoder_attention(*operands, max_seqlen_q=37, scale=30.0)
    # Scores of some thousands, rounded to 6e-8 of it: 1e-3, relative in a weight.
    atol = 2e-3 * float(v[: k_ends[-1]].abs().max())
    wanted = expected_64(*operands, 30.0)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=atol)


def test_no_sequences() -> None:
    empty = torch.zeros(0, 2, 72)
    ends = torch.zeros(1, dtype=torch.int32)
    for implementation in ("reference", "triton"):
        with use(implementation):
            found = encoder_attention(empty, empty, empty, ends, ends, max_seqlen_q=0, scale=1.0)
        assert found.shape == (0, 2, 72)


def test_what_does_not_fit_is_refused() -> None:
    ends = torch.tensor([0, 4], dtype=torch.int32)
    x = torch.zeros(4, 2, 8)
    refused = {
        r"q \(4, 2, 8\), k \(4, 1, 8\)": (x, x[:, :1], x[:, :1]),
        "at most 256": (torch.zeros(4, 1, 512),) * 3,
        "contiguous heads": (x.transpose(1, 2).contiguous().transpose(1, 2), x, x),
        "same strides": (x, x, torch.zeros(4, 3, 2, 8)[:, 0]),
    }
    for named, (q, k, v) in refused.items():
        with pytest.raises(UsageError, match=named):
            encoder_attention(q, k, v, ends, ends, max_seqlen_q=4, scale=1.0)


def test_encoder_and_resampler(triton_kernels) -> None:
    """The vision half of a model, every operation in its Triton kernel, against the references."""
    model = build_model(TINY, device=torch.device("cpu"), dtype=torch.float32)
    init_random(model, std=0.1)
    assert isinstance(model, MiniCPMV)
    sizes = [(5, 6), (1, 7)]
    patches = torch.rand(37, 588) * 2 - 1
    found = model.encode(patches, sizes)
    with use("reference"):
        wanted = model.encode(patches, sizes)
    # fp32 sums in another order, a few dozen of them one after the other.
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
