"""The native NF4 linear layer against the formula in float64, the weight taken from `nf4_dequantize_reference`.

Weights are not rounded: code times scale is one fp32 product more in each term than in a dense layer, and the
bounds of `test_cpu_kernels` have 16 u to spare for it (a lane's eight columns are added before the scale).
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hayate import LLM, SamplingParams
from hayate.kernels import batch_invariant, cpu, cpu_library, use
from hayate.kernels.linear import Activation
from hayate.kernels.nf4 import (
    NF4Weight,
    nf4_dequantize,
    nf4_dequantize_reference,
    nf4_linear,
    nf4_pack,
)
from hayate.kernels.norm import Norm
from hayate.models.quantize import in_nf4
from tests.cpu.test_cpu_kernels import (
    DTYPES,
    FUSIONS,
    assert_within,
    exact_linear,
    make_norm,
    needs_compiler,
    randn,
)
from tests.engine.tiny import TINY

# K: blocks of 64 (one and several groups of 128, one not full), of 32 and of 16.
WIDTHS = [64, 256, 320, 32, 160, 16, 144, 304]


def packed(n: int, k: int, seed: int = 0) -> tuple[NF4Weight, Tensor]:
    """A weight with scales of all sizes, and its values."""
    generator = torch.Generator().manual_seed(seed + n + k)
    codes = torch.randint(0, 256, (n * k // 2,), dtype=torch.uint8, generator=generator)
    absmax = torch.rand(-(-n * k // 64), generator=generator) * k**-0.5
    weight = nf4_pack(codes, absmax, n, k)
    return weight, nf4_dequantize_reference(weight, torch.float32)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fusion", FUSIONS, ids=str)
def test_linear_equals_the_formula(fusion: tuple, dtype: torch.dtype) -> None:
    kind, activation, with_bias, with_residual = fusion
    for N, K, T in itertools.product([1, 17, 130], WIDTHS, [1, 2, 3, 4, 7, 8, 11]):
        rows = 2 * N if activation == "silu_and_mul" else N
        weight, w = packed(rows, K)
        x = randn(T, K, dtype=dtype)
        bias = randn(rows, dtype=dtype, seed=2) if with_bias else None
        residual = randn(T, N, dtype=dtype, seed=5) if with_residual else None
        norm = make_norm(kind, K, dtype)
        assert cpu.linear_fits(x, weight, norm, activation)
        kept = None if residual is None else residual.clone()
        out = nf4_linear(x, weight, bias, norm=norm, activation=activation, residual=residual)
        assert out.dtype == dtype
        assert out.shape == (T, N)
        assert_within(out, *exact_linear(x, w, bias, norm, activation, residual))
        if residual is not None and kept is not None:
            assert torch.equal(residual, kept)


@needs_compiler
def test_every_code_of_every_column() -> None:
    """A single one in x picks one weight: exact, since all other products are zeros."""
    weight, _ = packed(16, 256)
    codes = torch.arange(16, dtype=torch.uint8)[:, None] * 17
    weight = weight._replace(codes=codes.expand(-1, 128).contiguous())
    wanted = nf4_dequantize_reference(weight, torch.float32)
    assert torch.equal(
        torch.cat([cpu.linear(x, weight) for x in torch.eye(256).split(8)]), wanted.T
    )


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize_has_the_bits_of_the_reference(dtype: torch.dtype) -> None:
    for N, K in itertools.product([1, 33], [*WIDTHS, 4304]):
        weight, _ = packed(N, K)
        assert cpu.nf4_dequantize_fits(weight, dtype)
        assert torch.equal(nf4_dequantize(weight, dtype), nf4_dequantize_reference(weight, dtype))


@needs_compiler
@pytest.mark.parametrize("K", [320, 160, 144])
def test_a_token_does_not_depend_on_the_others_nor_on_threads(K: int) -> None:
    weight, _ = packed(270, K)
    x = randn(70, K, dtype=torch.bfloat16)
    before = torch.get_num_threads()
    with batch_invariant():
        whole = nf4_linear(x, weight, activation="silu_and_mul")
        try:
            for rows, threads in ((1, 1), (2, 3), (3, 2), (64, 1)):
                torch.set_num_threads(threads)
                parts = [nf4_linear(p, weight, activation="silu_and_mul") for p in x.split(rows)]
                assert torch.equal(torch.cat(parts), whole)
        finally:
            torch.set_num_threads(before)


@needs_compiler
def test_what_lies_after_a_row_is_not_read_into_it() -> None:
    """Rows that end inside a group, beside rows of NaN."""
    weight, w = packed(5, 160)
    weight.scales[1::2, :5] = math.nan
    x = randn(3, 160, dtype=torch.float32)
    out = nf4_linear(x, weight)
    assert out[:, 1::2].isnan().all()
    assert_within(out[:, ::2], *exact_linear(x, w[::2], None, None, None, None))


@needs_compiler
def test_what_does_not_fit_runs_all_the_same() -> None:
    """Many tokens, fp16, an activation without a native form: the dequantised weight and `linear`."""
    weight, w = packed(40, 192)
    cases: list[tuple[int, torch.dtype, Activation | None]] = [
        (65, torch.float32, None),
        (2, torch.float16, None),
        (2, torch.float32, "gelu_tanh"),
    ]
    for T, dtype, activation in cases:
        x = randn(T, 192, dtype=dtype)
        assert not cpu.linear_fits(x, weight, None, activation)
        out = nf4_linear(x, weight, activation=activation)
        y = x.double() @ w.double().T
        if activation:
            y = torch.nn.functional.gelu(y, approximate="tanh")
        # Rounding each weight and the result, 2^-11 in fp16 and 2^-24 in fp32, of 192 terms of random sign.
        tolerance = 3e-3 if dtype == torch.float16 else 1e-5
        torch.testing.assert_close(out.double(), y, rtol=tolerance, atol=tolerance)
    assert not cpu.linear_fits(torch.zeros(1, 192), weight._replace(codes=weight.codes.T))
    assert not cpu.linear_fits(torch.zeros(1, 192), weight.to("meta"))


@needs_compiler
def test_forced_reference_rounds_the_weights() -> None:
    weight, w = packed(24, 128)
    x = randn(1, 128, dtype=torch.bfloat16)
    with use("reference"):
        out = nf4_linear(x, weight)
    assert torch.equal(out, torch.nn.functional.linear(x, w.bfloat16()))


@needs_compiler
def test_a_recording_replays_it() -> None:
    weight, w = packed(48, 192)
    norm = make_norm("rmsnorm", 192, torch.bfloat16)
    x = randn(2, 192, dtype=torch.bfloat16)
    with cpu.Recording() as recording:
        out = nf4_linear(x, weight, norm=norm, activation="silu_and_mul")
    assert recording.reason is None
    x.copy_(randn(2, 192, dtype=torch.bfloat16, seed=9))
    recording.replay()
    assert_within(out, *exact_linear(x, w, None, norm, "silu_and_mul", None))


@needs_compiler
def test_a_model_decodes_by_replay() -> None:
    """In fp32 the reference's weights are the same numbers: so are the greedy tokens."""
    llm = LLM.from_random(in_nf4(TINY), device="cpu", kv_memory="16M")
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    prompts = [[1, 2, 3], [9] * 20]
    tokens = [o.outputs[0].token_ids for o in llm.generate(prompts, params)]
    recordings = llm.engine.runner.recordings
    assert recordings is not None
    assert recordings._recorded[2, 1] is not None
    with use("reference"):
        for prompt, found in zip(prompts, tokens, strict=True):
            wanted = llm.logits(prompt + found[:-1])[len(prompt) - 1 :].argmax(-1)
            assert found == wanted.tolist()


def _instructions() -> list[str]:
    """-march of narrower vectors that this processor runs too."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return []
    return ["x86-64", "haswell"] if "avx2" in flags and "fma" in flags else []


@needs_compiler
@pytest.mark.parametrize("march", _instructions())
def test_narrower_vectors(march: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The form of AVX2, and that of plain C."""
    flags = [f"-march={march}" if flag == "-march=native" else flag for flag in cpu_library._FLAGS]
    monkeypatch.setattr(cpu_library, "_FLAGS", ["-O1" if flag == "-O2" else flag for flag in flags])
    compiler = cpu_library.shutil.which("cc")
    assert compiler is not None
    cpu_library._compile(compiler, tmp_path / "narrow.so")
    library = cpu_library._open(tmp_path / "narrow.so")
    monkeypatch.setattr(cpu, "library", lambda: library)
    for K, T in itertools.product([320, 160, 144], [1, 2, 3, 8]):
        weight, w = packed(19, K)
        x = randn(T, K, dtype=torch.bfloat16)
        assert_within(cpu.linear(x, weight), *exact_linear(x, w, None, None, None, None))
        assert torch.equal(cpu.nf4_dequantize(weight, torch.float32), w)


@needs_compiler
def test_norm_parameters_of_another_dtype() -> None:
    weight, w = packed(20, 48)
    x = randn(2, 48, dtype=torch.bfloat16)
    norm = Norm("layernorm1p", randn(48, dtype=torch.float16), randn(48, dtype=torch.float32), 1e-5)
    out = nf4_linear(x, weight, norm=norm)
    assert_within(out, *exact_linear(x, w, None, norm, None, None))
