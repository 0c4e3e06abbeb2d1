"""`hayate bench vision`: counted work against numbers from elsewhere, and a report that holds together."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hayate.bench import vision
from hayate.bench.vision_costs import CARDS, encode_flops, stage_costs
from hayate.models import preset_config, presets
from hayate.models.minicpmv import MiniCPMV
from hayate.runtime.llm import LLM
from hayate.vision.slicing import plan_slices
from tests.cpu.test_bench import SHARE_LIMIT
from tests.cpu.test_cli import assert_fails, run
from tests.vision.checkpoints import QUANTIZATION_CONFIG, tiny_config

TINY = ("--preset", "minicpm-v-tiny", "--random-weights", "--device", "cpu", "--image-size", 160)


@pytest.fixture(autouse=True)
def tiny_presets(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = tiny_config()
    int4 = {**dense, "quantization_config": QUANTIZATION_CONFIG}
    for name, fields in {"minicpm-v-tiny": dense, "minicpm-v-tiny-int4": int4}.items():
        monkeypatch.setitem(presets.PRESETS, name, fields)


def test_the_published_card() -> None:
    card = CARDS["rtx4060"]
    assert card.read_bandwidth == 128 / 8 * 17e9
    # The same rate for each SM and clock as the sheet of the RTX 4090: 165.2 TFLOP/s, 128 SMs, 2.52 GHz.
    assert card.matmul_flops == pytest.approx(165.2e12 / (128 * 2.52e9) * 24 * 2.46e9, rel=2e-3)


def test_operations_of_the_encoder_are_those_it_runs() -> None:
    """Against PyTorch's counter over a forward pass. It does not see attention on the CPU, which is counted here: of
    each pair of query and key two operations a channel for the score, and two for the value."""
    config = preset_config("minicpm-v-tiny")
    assert config.vision is not None
    model = MiniCPMV(config, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.requires_grad_(False).zero_()
    sizes = [(8, 8), (5, 11), (7, 9)]
    patches = torch.zeros(sum(h * w for h, w in sizes), config.vision.patch_values)
    with FlopCounterMode(display=False) as counter:
        model.encode(patches, sizes)
    lengths = [64, 55, 63]
    pairs = [4 * 144 * n * n for n in lengths * 2] + [4 * 256 * 8 * n for n in lengths]
    assert encode_flops(config.vision, sizes) == counter.get_total_flops() + sum(pairs)


def test_bytes_of_the_published_model() -> None:
    """4-bit weights with a scale for each 64, the head in 16 bits: what a token must read."""
    D, F, layers, head = 3584, 18_944, 28, 151_666 * 3584
    linear = layers * (D * (D + 1024) + D * D + 3 * D * F)
    llm = LLM.from_random("minicpm-v-tiny-int4", device="cpu", kv_memory="16M")
    plan = plan_slices(160, 160, resolution=112)
    costs = stage_costs(llm, plan, prompt_tokens=200, new_tokens=100)
    tiny_linear = 2 * (256 * 512 + 256 * 256 + 3 * 256 * 320)
    small = 2 * (2 * 512 + 256 * 5 + 288 * 256)  # biases, norms and head in 16 bits
    # Columns are padded to 128 in the down projection, whose 320 become 384.
    padded = tiny_linear + 2 * 256 * 64
    kv = 2 * 2 * 2 * 64 * 2
    assert costs["decode"].num_bytes == padded * (0.5 + 4 / 64) + small + 250 * kv
    assert linear * (0.5 + 4 / 64) + 2 * head == pytest.approx(4.76e9, rel=0.01)


@pytest.mark.parametrize("preset", ["minicpm-v-tiny", "minicpm-v-tiny-int4"])
def test_report(preset: str) -> None:
    options = (*TINY, "--runs", 1, "--new-tokens", "4,12", "--project-to", "rtx4060")
    result = run("bench", "vision", *options, "--preset", preset, "--json")
    assert result.returncode == 0, result.stderr
    report: dict[str, Any] = json.loads(result.stdout)
    assert report["bench"] == "vision" and report["num_pictures"] == 5
    assert list(report["stages"]) == list(vision.STAGES)
    bandwidth, flops = report["read_bandwidth_gbs"] * 1e9, report["matmul_tflops"] * 1e12
    for name, stage in report["stages"].items():
        assert stage["ms"] > 0
        if name == "jpeg":
            continue
        assert 0 < stage["share_of_ceiling"] < SHARE_LIMIT
        floor = 1e3 * max(stage["bytes"] / bandwidth, stage["flops"] / flops)
        assert stage["floor_ms"] == pytest.approx(floor, rel=0.02)
    ms = {name: stage["ms"] for name, stage in report["stages"].items()}
    before = ms["jpeg"] + ms["preprocess"] + ms["encode"] + ms["prefill"]
    assert report["first_token_ms"] == pytest.approx(before, rel=0.01, abs=0.01)
    assert report["seconds"]["12"] * 1e3 > before
    assert report["peak_memory_bytes"]["host"] > report["weight_bytes"] > 0
    _check_projection(report, lambda stage: stage["share_of_ceiling"])


def _check_projection(report: dict[str, Any], share: Callable[[Any], float]) -> None:
    projection = report["projection"]
    for name, stage in report["stages"].items():
        expected = stage["ms"]
        if name != "jpeg":
            floor = max(stage["bytes"] / 272e9, stage["flops"] / 30.2e12)
            expected = 1e3 * floor / share(stage)
        assert projection["stages_ms"][name] == pytest.approx(expected, rel=0.02, abs=2e-3)
    stages = projection["stages_ms"]
    for count in (4, 12):
        total = sum(stages.values()) + (count - 2) * stages["decode"]
        assert projection["seconds"][str(count)] * 1e3 == pytest.approx(total, rel=0.02, abs=0.1)


def test_table_and_refusals() -> None:
    result = run("bench", "vision", *TINY, "--runs", 1, "--new-tokens", 3)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith("ceiling: ") and lines[1].startswith("gate: ")
    assert [line.split()[0] for line in lines[4:9]] == list(vision.STAGES)
    few = ("bench", "vision", *TINY)
    assert_fails(run(*few, "--project-to", "abacus"), 2, "--project-to 'abacus'", "rtx4060")
    assert_fails(run(*few, "--new-tokens", "1,5"), 2, "--new-tokens 1")
    assert_fails(run(*few, "--new-tokens", "x"), 2, "--new-tokens 'x'")
    assert_fails(run(*few, "--batch", 2), 2, "--batch means nothing")
    text = ("bench", "vision", "--preset", "moe-tiny", "--random-weights", "--device", "cpu")
    assert_fails(run(*text), 2, "takes no images")
    decode = ("bench", "decode", "--preset", "moe-tiny", "--random-weights")
    assert_fails(run(*decode, "--new-tokens", "8,9"), 2, "--new-tokens", "one length")


def test_a_wrong_encoder_gets_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    encode = MiniCPMV.encode

    def mixed(self: MiniCPMV, patches: torch.Tensor, sizes: Any) -> torch.Tensor:
        return encode(self, patches, sizes) * (1 + 0.1 * len(sizes))

    monkeypatch.setattr(MiniCPMV, "encode", mixed)
    result = run("bench", "vision", *TINY, "--runs", 1, "--new-tokens", 3)
    assert result.returncode == 1
    assert "depend on the pictures beside it" in result.stderr
    assert "first token" not in result.stdout
