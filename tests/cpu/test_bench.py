"""`hayate bench`: the counted work against numbers from elsewhere, gates that refuse, reports that parse."""

from __future__ import annotations

import dataclasses
import json
import time
import types
from typing import Any

import pytest
import torch

from hayate.bench import kernels as bench_kernels
from hayate.bench import load as bench_load
from hayate.bench import roofline, timing
from hayate.bench.kernels import FAMILIES, products, rowwise
from hayate.bench.kernels.case import Case, Setting, tensors
from hayate.kernels.self_attention import self_attention
from hayate.models import layers, preset_config
from tests.cpu.test_cli import assert_fails, run

CPU = torch.device("cpu")
ON = Setting(CPU, torch.bfloat16)

# A ceiling and a result are measured a moment apart on a machine whose speed wanders by a factor; what this
# catches is a wrong unit or a wrong count of bytes.
SHARE_LIMIT = 5.0


# -- what is counted -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "parameters", "kv_kib_per_token"),
    [  # parameters as published, or counted from the models of transformers; KV in bf16
        ("nemotron-mini-4b", 4_190_509_056, 128),
        ("minitron-8b", 8_414_105_600, 160),
        ("llama-3.1-8b", 8_030_261_248, 128),
        ("qwen2.5-7b", 7_615_616_512, 56),
        ("smollm2-135m", 134_515_008, 22.5),
        ("moe-6.9b", 6_882_678_528, 7.5),
    ],
)
def test_presets_have_the_size_of_what_they_are_named_after(
    preset: str, parameters: int, kv_kib_per_token: float
) -> None:
    config = preset_config(preset)
    assert config.num_parameters == parameters
    assert config.kv_bytes_per_token() == kv_kib_per_token * 1024


def test_active_parameters_of_the_experts() -> None:
    config = preset_config("moe-6.9b")
    attention_and_norms = 768 * 14 * 64 + 768 * 768 + 2 * 768
    layer = attention_and_norms + 16 * 768 + 4 * 3 * 768 * 6144
    assert config.num_active_parameters == 30 * layer + 768 + 2 * 32_000 * 768
    assert config.num_active_parameters == pytest.approx(1.787e9, rel=5e-4)


@pytest.mark.parametrize(
    ("preset", "gigabytes"),  # of weights a token, measured against by hand for the design
    [("minitron-8b", 15.75), ("nemotron-mini-4b", 6.81), ("moe-6.9b", 3.52)],
)
def test_weights_read_by_a_decode_step(preset: str, gigabytes: float) -> None:
    cost = roofline.decode_cost(preset_config(preset), batch=1, context=0, dtype_bytes=2)
    assert cost.num_bytes / 1e9 == pytest.approx(gigabytes, abs=0.005)


def test_a_decode_step_of_a_dense_model_by_hand() -> None:
    layer = 6144 * 4096 + 4096 * 4096 + 3 * 11_520 * 4096
    linear = 40 * layer + 131_072 * 4096
    norms = (2 * 40 + 1) * 4096
    cost = roofline.decode_cost(preset_config("minitron-8b"), batch=8, context=1000, dtype_bytes=2)
    embedding_row = 4096
    keys_and_values = 8 * 1000 * 40 * 2 * 8 * 128
    assert cost.num_bytes == 2 * (linear + norms + embedding_row + keys_and_values)
    attention_flops = 4 * 32 * 128 * 1000 * 40
    # Norm weights are multiplied with too: they are the few millionths of slack.
    assert cost.flops == pytest.approx(8 * (2 * linear + attention_flops), rel=1e-4)


def test_four_bit_weights_by_hand() -> None:
    """Per weight half a byte, and an fp32 scale for 64; pictures are no part of a step of text."""
    D, F, V = 3584, 18_944, 151_666
    matrices = 28 * ((D + 2 * 512) * D + D * D + 3 * F * D)
    rest = 28 * (D + 2 * 512 + 2 * D) + D + D + V * D  # biases, norms, an embedding row, the head
    for name, width in (("minicpm-v-2.6-int4", 0.5 + 4 / 64), ("minicpm-v-2.6", 2)):
        cost = roofline.decode_cost(preset_config(name), batch=1, context=0, dtype_bytes=2)
        assert cost.num_bytes == matrices * width + rest * 2


def test_a_prompt_by_hand() -> None:
    T, D, F, L = 2048, 576, 1536, 30
    linear = L * (960 * D + 576 * D + 3 * F * D)
    # Query i sees i + 1 keys; scores and values take two operations each a channel.
    attention_flops = L * sum(4 * 9 * 64 * (i + 1) for i in range(T))
    head = 2 * 49_152 * D
    cost = roofline.prefill_cost(preset_config("smollm2-135m"), tokens=T, dtype_bytes=2)
    assert cost.flops == pytest.approx(2 * linear * T + attention_flops + head, rel=1e-3)
    assert cost.num_bytes == 2 * 134_515_008 + T * 23_040


def test_two_tokens_touch_seven_of_sixteen_experts() -> None:
    """Each takes 4; the second shares each of its own with the first with probability 1/4."""
    config = preset_config("moe-6.9b")
    one, two = (
        roofline.decode_cost(config, batch=batch, context=0, dtype_bytes=2) for batch in (1, 2)
    )
    assert two.num_bytes - one.num_bytes == pytest.approx(2 * 30 * 3 * (3 * 768 * 6144), rel=1e-6)


def test_the_linear_shapes_are_the_models() -> None:
    """Their weights, over all layers, are the parameters that `num_parameters` counts."""
    for preset in ("minitron-8b", "nemotron-mini-4b", "qwen2.5-7b"):
        config = preset_config(preset)
        sizes = {x.name: x.N * x.D + x.N * x.bias for x in products.layers(config)}
        norm = config.hidden_size * (2 if config.norm == "layernorm1p" else 1)
        total = config.num_layers * (sum(sizes.values()) - sizes["head"] + 2 * norm)
        assert total + norm + 2 * sizes["head"] == config.num_parameters


@pytest.mark.parametrize(
    "family",
    ["elementwise", "softmax", "rmsnorm_residual", "argmax", "decode attention", "linear"],
)
def test_bytes_are_those_of_operands_and_result(family: str) -> None:
    for case in FAMILIES[family](ON):
        operands = case.make()
        size = sum(t.nbytes for t in tensors(operands) + tensors(case.run(operands)))
        # Small vectors (norm weights, page tables) are left out on one side or the other.
        assert case.num_bytes == pytest.approx(size, rel=0.02), case.shape


# -- the clock -------------------------------------------------------------------------------------


def test_a_pass_goes_round_the_copies_and_times_a_call() -> None:
    seen: list[int] = []

    def call(x: int) -> int:
        seen.append(x)
        time.sleep(0.002)
        return x

    timed = timing.Pass(call, [1, 2, 3], CPU, least_seconds=0.0)
    assert 0.002 <= timed.seconds() < 0.02
    assert seen == [1, 2, 3]
    assert timed.first == 1


def test_copies_are_enough_to_leave_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    assert timing.num_copies(CPU, touched=1e12, size=1e12) == 1
    assert timing.num_copies(CPU, touched=10e6, size=10e6) * 10e6 >= 256e6
    assert timing.num_copies(CPU, touched=1, size=1) <= 1024

    h200 = types.SimpleNamespace(L2_cache_size=60 * 2**20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: h200)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (90e9, 140e9))
    cuda = torch.device("cuda")
    # What stays in the L2 from the last round is then under two hundredths of what is read.
    assert timing.num_copies(cuda, touched=100e6, size=100e6) * 100e6 >= 50 * 60 * 2**20
    # An expert layer has more weights than one token touches: the copies must fit all the same.
    assert timing.num_copies(cuda, touched=100e6, size=2e9) * 2e9 <= 30e9


# -- the gates -------------------------------------------------------------------------------------


def _spoiled(result: Any, how: str) -> Any:
    if isinstance(result, tuple):
        return tuple(_spoiled(x, how) for x in result)
    if not result.is_floating_point():
        return result + 4
    if how == "nan":  # a single element that was not written
        result.view(-1)[-1] = float("nan")
        return result
    return result * 1.05 if how == "scaled" else torch.zeros_like(result)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("family", [name for name in FAMILIES if FAMILIES[name](ON)])
def test_the_gate_of_each_family(family: str, dtype: torch.dtype) -> None:
    """Right results pass, in both dtypes; results that are off by 5 %, zero, or NaN do not."""
    torch.manual_seed(0)
    cases = FAMILIES[family](Setting(CPU, dtype))
    for case in cases if family != "linear" else cases[:-2]:  # the head takes long
        operands = case.make()
        assert case.error(operands, case.run(operands)) <= 1, case.shape
        for how in ("scaled", "zero", "nan"):
            wrong = _spoiled(case.run(operands), how)
            assert not case.error(operands, wrong) <= 1, f"{case.shape}, {how}"


def _only(monkeypatch: pytest.MonkeyPatch, **families: list[Case]) -> None:
    table = {name: lambda on, cases=cases: cases for name, cases in families.items()}
    monkeypatch.setattr(bench_kernels, "FAMILIES", table)


def test_a_wrong_kernel_gets_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    _only(monkeypatch, rmsnorm=rowwise.rmsnorm_cases(ON), layernorm1p=rowwise.layernorm1p_cases(ON))
    monkeypatch.setattr(rowwise, "rmsnorm", lambda x, weight, eps: x)
    result = run("bench", "kernels", "--device", "cpu", "--runs", 1)
    assert result.returncode == 1
    assert "wrong results" in result.stderr
    assert "rmsnorm (512 x 2048" in result.stderr
    lines = {line.split()[0]: line for line in result.stdout.splitlines()}
    assert "FAILED" in lines["rmsnorm"]
    assert "GB/s" not in lines["rmsnorm"]
    assert "GB/s" in lines["layernorm1p"]


def test_a_kernel_that_raises_gets_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        raise ValueError("no such tile")

    case = dataclasses.replace(rowwise.rmsnorm_cases(ON)[0], run=broken)
    _only(monkeypatch, rmsnorm=[case])
    result = run("bench", "kernels", "--device", "cpu", "--runs", 1, "--json")
    assert_fails(result, 1, "rmsnorm", "ValueError", "no such tile")


TINY_DECODE = ("--model", "smollm2-135m", "--device", "cpu", "--prompt-tokens", 8, "--runs", 1)


@pytest.mark.real_model
@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_wrong_decoding_gets_no_speed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def planted(*args: Any, max_seqlen_q: int, **kwargs: Any) -> torch.Tensor:
        out = self_attention(*args, max_seqlen_q=max_seqlen_q, **kwargs)
        return torch.zeros_like(out) if max_seqlen_q == 1 else out

    monkeypatch.setattr(layers, "self_attention", planted)
    result = run("bench", kind, *TINY_DECODE)
    assert result.returncode == 1
    assert "decoding disagrees with prefill" in result.stderr
    assert "hayate:" not in result.stdout


@pytest.mark.real_model
def test_wrong_loading_gets_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_load, "load", lambda *args, **kwargs: None)  # the weights stay NaN
    result = run("bench", "load", "--model", "smollm2-135m", "--device", "cpu", "--runs", 1)
    assert result.returncode == 1
    assert "not loaded" in result.stderr
    assert "hayate:" not in result.stdout


# -- the reports -----------------------------------------------------------------------------------


def report_of(*arguments: object) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.returncode == 0, result.stderr
    report: dict[str, Any] = json.loads(result.stdout)  # one object and nothing else
    assert report["bench"] == arguments[1]
    assert report["torch"] == torch.__version__
    return report


def test_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = {name: FAMILIES[name](ON) for name in ("softmax", "decode attention", "argmax")}
    _only(monkeypatch, **cases)
    report = report_of("bench", "kernels", "--device", "cpu", "--runs", 2)
    assert [(row["kernel"], row["shape"]) for row in report["kernels"]] == [
        (name, case.shape) for name in cases for case in cases[name]
    ]
    for row in report["kernels"]:
        assert 0 < row["share"] < SHARE_LIMIT
        assert row["us"] == pytest.approx(row["floor_us"] / row["share"], rel=1e-2)
        assert row["floor_us"] == pytest.approx(
            1e6
            * max(
                row["bytes"] / (report["read_bandwidth_gbs"] * 1e9),
                row["flops"] / (report["matmul_tflops"] * 1e12),
            ),
            rel=1e-2,
        )
    assert report["kernels"][0]["rivals_us"]["torch"] > 0


def test_kernels_table(monkeypatch: pytest.MonkeyPatch) -> None:
    _only(monkeypatch, argmax=FAMILIES["argmax"](ON))
    device = "cpu" if torch.cuda.is_available() else "auto"
    result = run("bench", "kernels", "--device", device, "--runs", 1)
    assert result.returncode == 0, result.stderr
    ceiling, gate, header, *rows = result.stdout.splitlines()
    assert ceiling.startswith("ceiling: ")
    assert gate.startswith("gate: ")
    assert header.split()[:3] == ["kernel", "shape", "us"]
    assert [row.split()[0] for row in rows] == ["argmax", "argmax"]
    assert len({row.index("%") for row in rows} | {header.index("share") + 4}) == 1


@pytest.mark.slow
def test_all_kernels() -> None:
    report = report_of("bench", "kernels", "--device", "cpu", "--runs", 1)
    timed = {row["kernel"] for row in report["kernels"]}
    assert timed == {name for name in FAMILIES if FAMILIES[name](ON)}


@pytest.mark.real_model
def test_decode() -> None:
    report = report_of("bench", "decode", *TINY_DECODE, "--new-tokens", 24)
    assert 0 < report["share_of_ceiling"] < SHARE_LIMIT
    assert report["bytes_per_step"] == 2 * 134_515_008 + 20 * 23_040  # in the middle of the answer
    assert report["ceiling_tokens_per_second"] == pytest.approx(
        report["read_bandwidth_gbs"] * 1e9 / report["bytes_per_step"], rel=1e-3
    )
    table = run("bench", "decode", *TINY_DECODE, "--new-tokens", 4).stdout.splitlines()
    assert [line.split(":")[0] for line in table] == ["ceiling", "gate", "hayate"]


@pytest.mark.real_model
def test_prefill() -> None:
    report = report_of("bench", "prefill", *TINY_DECODE)
    assert 0 < report["share_of_ceiling"] < SHARE_LIMIT
    assert report["tokens_per_second"] == pytest.approx(8 / report["milliseconds"] * 1e3, rel=1e-2)
    table = run("bench", "prefill", *TINY_DECODE).stdout.splitlines()
    assert [line.split(":")[0] for line in table] == ["ceiling", "gate", "hayate"]


@pytest.mark.real_model
def test_load() -> None:
    options = ("--model", "smollm2-135m", "--device", "cpu", "--runs", 1)
    report = report_of("bench", "load", *options)
    assert report["bytes"] == 2 * 134_515_008
    assert 0 < report["share_of_ceiling"] < SHARE_LIMIT
    table = run("bench", "load", *options).stdout.splitlines()
    assert [line.split(":")[0] for line in table] == ["ceiling", "gate", "hayate", "hayate"]
