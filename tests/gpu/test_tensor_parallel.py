"""A model on two GPUs: the logits of one GPU, graphs that follow prefill, and an end when one of them is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hayate import LLM, SamplingParams
from hayate.bench.gates import check_decode
from tests.server.checkpoint import write_checkpoint

needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
D, LAYERS, H, G, K, F, V = 512, 3, 8, 2, 64, 1400, 2050
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": H,
    "num_key_value_heads": G,
    "head_dim": K,
    "vocab_size": V,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "eos_token_id": 257,
}
IDS = [(7 * i * i + 3) % V for i in range(300)]
GREEDY = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_checkpoint(tmp_path_factory.mktemp("model") / "llama")
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.05).bfloat16()

    tensors = {"model.embed_tokens.weight": draw(V, D), "lm_head.weight": draw(V, D)}
    tensors["model.norm.weight"] = draw(D) + 1
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        tensors |= {
            f"{name}.input_layernorm.weight": draw(D) + 1,
            f"{name}.post_attention_layernorm.weight": draw(D) + 1,
            f"{name}.self_attn.q_proj.weight": draw(H * K, D),
            f"{name}.self_attn.k_proj.weight": draw(G * K, D),
            f"{name}.self_attn.v_proj.weight": draw(G * K, D),
            f"{name}.self_attn.o_proj.weight": draw(D, H * K),
            f"{name}.mlp.gate_proj.weight": draw(F, D),
            f"{name}.mlp.up_proj.weight": draw(F, D),
            f"{name}.mlp.down_proj.weight": draw(D, F),
        }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@needs_two
def test_two_gpus_compute_what_one_computes(folder: Path) -> None:
    one = LLM(folder, device="cuda", kv_memory="64M")
    two = LLM(folder, device="cuda", kv_memory="64M", tensor_parallel=2)
    try:
        expected, got = one.logits(IDS), two.logits(IDS)
        # Some 10 roundings to bf16 a layer and 2 more for the sums, of 2^-9 each and independent, in both.
        limit = 2 * 2**-9 * (12 * LAYERS) ** 0.5
        assert float((got - expected).norm() / expected.norm()) < limit
        check_decode(two, IDS[:100], new_tokens=100)  # sums in a graph, of one row
        many = [IDS[: 20 + 30 * i] for i in range(9)]
        together = two.generate(many, GREEDY)
        for prompt, output in zip(many, together, strict=True):  # of several rows
            assert len(output.outputs[0].token_ids) == 64, prompt
        seeded = SamplingParams(temperature=1, top_p=0.9, seed=3, max_tokens=64, ignore_eos=True)
        drawn = [two.generate(IDS[:50], seeded)[0].outputs[0].token_ids for _ in range(2)]
        assert drawn[0] == drawn[1]
        assert np.isfinite(two.logits(IDS).numpy()).all()
        stream = two.stream(IDS[:50], SamplingParams(max_tokens=2000, ignore_eos=True))
        next(stream)
        stream.close()  # type: ignore[attr-defined]
        assert two.generate(many, GREEDY)[3].outputs[0].token_ids == (
            two.generate(many, GREEDY)[3].outputs[0].token_ids
        )
    finally:
        two.close()
    again = LLM(folder, device="cuda", kv_memory="64M", tensor_parallel=2)  # after a clean end
    assert again.generate(IDS, GREEDY)[0].outputs[0].finish_reason == "length"
    again.close()


@needs_two
def test_a_killed_worker_ends_the_run(folder: Path) -> None:
    """NCCL alone would wait for it for ever."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "hayate", "generate", "--model", str(folder), "--prompt", "a"),
            *("--device", "cuda", "--temperature", "0", "--ignore-eos", "--max-tokens", "4000"),
            *("--tensor-parallel", "2"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.read(1), "the first text"
        (worker,) = (
            int(child)
            for task in Path(f"/proc/{process.pid}/task").iterdir()
            for child in (task / "children").read_text().split()
        )
        os.kill(worker, signal.SIGKILL)
        _, message = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 6, message.decode()
    assert "killed by SIGKILL" in message.decode()
