"""Recorded native calls, replayed with other inputs, against the same calls made one by one."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hayate.kernels import cpu
from hayate.kernels.norm import Norm

needs_compiler = pytest.mark.skipif(
    not cpu.native_status().startswith("ready"), reason="no C compiler on this machine"
)


def _randn(
    *shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0, scale: float = 1.0
) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


class TinyStep:
    """A decode step of one layer, made of every operation, over tensors that are written in place."""

    H, G, K, D, B = 4, 2, 16, 64, 4

    def __init__(self) -> None:
        H, G, K, D = self.H, self.G, self.K, self.D
        width = (H + 2 * G) * K
        self.embeddings = _randn(50, D)
        self.qkv = _randn(width, D, scale=0.1)
        self.o = _randn(D, H * K, scale=0.1)
        self.norm = Norm("rmsnorm", _randn(D), None, 1e-5)
        caches = torch.full((2, 4, self.B, G, K), math.nan, dtype=torch.bfloat16)
        self.k_cache, self.v_cache = caches
        self.cos_sin = _randn(16, K, dtype=torch.float32)
        self.token, self.position = torch.tensor([0]), torch.tensor([0])
        self.page_table = torch.tensor([[2, 0, 3, 1]], dtype=torch.int32)
        self.slot, self.starts = torch.tensor([0]), torch.tensor([0, 1], dtype=torch.int32)
        self.length = torch.tensor([1], dtype=torch.int32)

    def write(self, token: int, position: int) -> None:
        page = int(self.page_table[0, position // self.B])
        self.token.fill_(token)
        self.position.fill_(position)
        self.slot.fill_(page * self.B + position % self.B)
        self.length.fill_(position + 1)

    def run(self) -> tuple[Tensor, Tensor]:
        x = cpu.embedding(self.token, self.embeddings)
        qkv = cpu.linear(x, self.qkv, norm=self.norm)
        q = cpu.rope_and_cache(
            qkv,
            self.k_cache,
            self.v_cache,
            self.slot,
            self.position,
            self.cos_sin,
            num_heads=self.H,
            num_kv_heads=self.G,
            head_dim=self.K,
        )
        a = cpu.attention(
            q,
            self.k_cache,
            self.v_cache,
            self.page_table,
            self.starts,
            self.length,
            max_seqlen_q=1,
            max_seqlen_k=16,
            scale=0.25,
        )
        x = cpu.linear(a.flatten(1), self.o, residual=x)
        logits = cpu.linear(x, self.embeddings, norm=self.norm)
        return logits, cpu.argmax(logits)


@needs_compiler
def test_a_recording_replays_the_step_with_new_inputs() -> None:
    plain, recorded = TinyStep(), TinyStep()
    recorded.write(7, 0)
    with cpu.Recording() as recording:
        logits, token = recorded.run()
    assert recording.reason is None
    for position, token_id in enumerate([7, 3, 49, 0, 12, 31]):
        plain.write(token_id, position)
        recorded.write(token_id, position)
        logits.fill_(math.nan)
        recording.replay()
        expected_logits, expected_token = plain.run()
        assert torch.equal(logits, expected_logits)
        assert torch.equal(token, expected_token)
    recorded.token.fill_(50)
    with pytest.raises(IndexError):
        recording.replay()


@needs_compiler
def test_a_recording_keeps_its_tensors() -> None:
    x, weight = _randn(2, 64), _randn(64, 64, seed=1)
    expected = cpu.linear(cpu.linear(x, weight), weight)
    kept = weight.clone()
    with cpu.Recording() as recording:
        out = cpu.linear(cpu.linear(x, kept), kept)
    del kept
    for _ in range(50):  # what was freed would be handed out again
        torch.full((64, 64), math.nan, dtype=torch.bfloat16)
        torch.full((2, 64), math.nan, dtype=torch.bfloat16)
    recording.replay()
    assert torch.equal(out, expected)


@needs_compiler
@pytest.mark.parametrize(
    "operation",
    [lambda x: x + 1, lambda x: x.index_select(0, torch.tensor([1])), lambda x: x.fill_(0)],
)
def test_a_recording_refuses_other_work(operation: Callable[[Tensor], Tensor]) -> None:
    x, weight = _randn(2, 64, dtype=torch.float32), _randn(8, 64, dtype=torch.float32, seed=1)
    with torch.inference_mode(), cpu.Recording() as recording:
        cpu.linear(operation(x), weight)
    assert "is not a native call" in str(recording.reason)
    with pytest.raises(AssertionError, match="not a native call"):
        recording.replay()
    cpu.linear(x, weight)  # recording has ended
    assert len(recording._calls) == 1


def test_a_recording_of_nothing_cannot_be_replayed() -> None:
    with cpu.Recording() as recording:
        pass
    assert recording.reason == "no native call was made"
