"""NF4 kernels in Triton's interpreter against float64; their PTX, which that does not run, by hand."""

from __future__ import annotations

import pytest
import torch

from hayate.kernels import nf4_lookup
from hayate.kernels._dispatch import batch_invariant, use
from hayate.kernels.nf4 import nf4_dequantize, nf4_linear, nf4_pack, nf4_quantize
from hayate.kernels.nf4_gemm import NF4GemmConfig, launch_nf4_gemm
from hayate.kernels.nf4_weight import NF4_CODEBOOK, nf4_dequantize_reference
from hayate.kernels.norm import Norm

UNIT = {torch.float16: 2.0**-11, torch.float32: 2.0**-24}
dtypes = pytest.mark.parametrize("dtype", list(UNIT))


def operands(rows, n, k, dtype, *, norm=False, activation=None, bias=False, residual=False):
    """x (its rows lie among NaN), weight, bias, norm, activation, residual."""
    n_out = n // 2 if activation == "silu_and_mul" else n
    x = torch.full((rows, k + 40), float("nan"), dtype=dtype)
    x[:, :k] = (torch.randn(rows, k) + 0.3).to(dtype)
    return (
        x[:, :k],
        nf4_pack(*nf4_quantize(torch.randn(n, k) / k**0.5), n, k),
        torch.randn(n).to(dtype) if bias else None,
        Norm("rmsnorm", (torch.randn(k)).to(dtype), None, 1e-6) if norm else None,
        activation,
        torch.randn(rows, n_out).to(dtype) if residual else None,
    )


def exact_weight(weight):
    """The matrix in float64: codebook times scale is exact there (24 and 24 bits of 53)."""
    unit = weight._replace(scales=torch.ones_like(weight.scales))
    scales = weight.scales.double().repeat_interleave(weight.block, dim=1)[:, : weight.in_features]
    return nf4_dequantize_reference(unit, torch.float64) * scales


def check(actual, x, weight, bias, norm, activation, residual):
    """Against float64, with a bound of the error that grows step by step."""
    dtype, k = x.dtype, x.shape[1]
    w, x = exact_weight(weight), x.double()
    if norm is not None:
        x = x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight.double()
    y = x @ w.T
    # fp32 sums of K values of random sign, 4 sqrt(K) units, and 8 for the norm; the codebook and
    # the normalised x are rounded to the dtype.
    unit = 2.0**-24 * (4 * k**0.5 + 8) + (2 * UNIT[dtype] if dtype == torch.float16 else 0)
    error = unit * (x.abs() @ w.abs().T)
    if bias is not None:
        y = y + bias.double()
    # Gate and up may be rounded between kernels, for many rows.
    error = error + UNIT[dtype] * y.abs()
    if activation == "relu2":
        error, y = 2 * y.abs() * error + error**2, y.clamp(min=0) ** 2
    elif activation == "silu_and_mul":
        gate, up = y.chunk(2, -1)
        gate_error, up_error = error.chunk(2, -1)
        silu = gate * torch.sigmoid(gate)  # its slope is below 1.1
        error = 1.1 * gate_error * (up.abs() + up_error) + silu.abs() * up_error
        y = silu * up
    error = error + UNIT[dtype] * y.abs()
    if residual is not None:
        y = y + residual.double()
    assert actual.dtype == dtype
    assert actual.shape == y.shape
    excess = (actual.double() - y).abs() - error - UNIT[dtype] * y.abs() - 1e-7
    assert excess.max() <= 0, f"off by {excess.max().item():.3e} more than the bound"


@dtypes
@pytest.mark.parametrize("rows", [1, 3, 12, 40, 130])
@pytest.mark.parametrize(
    "fusions",
    [
        {"norm": True, "bias": True},
        {"norm": True, "activation": "silu_and_mul"},
        {"activation": "relu2", "bias": True, "residual": True},
    ],
)
def test_linear(rows, fusions, dtype, triton_kernels):
    """Every path (few rows, several tiles of rows, dequantised), each fusion, odd sizes."""
    arguments = operands(rows, 74, 320, dtype, **fusions)
    x, weight, bias, norm, activation, residual = arguments
    kept = None if residual is None else residual.clone()
    y = nf4_linear(x, weight, bias, norm=norm, activation=activation, residual=residual)
    check(y, *arguments)
    assert kept is None or torch.equal(kept, residual)


@dtypes
@pytest.mark.parametrize(
    ("rows", "n", "k", "activation", "config"),
    [
        (1, 64, 640, None, NF4GemmConfig(64, 2)),  # parts of 3 and 2 groups
        (5, 200, 512, None, NF4GemmConfig(128, 3)),  # a part without a group
        (2, 260, 384, "silu_and_mul", NF4GemmConfig(128, 3)),
        (1, 300, 256, None, NF4GemmConfig(256, 1, 8)),  # 16 rows a warp, twice
        (7, 40, 128, None, NF4GemmConfig(32, 1, 2)),
        (20, 130, 384, None, NF4GemmConfig(128, 2, 4)),
        (70, 70, 256, None, NF4GemmConfig(64, 2)),  # two tiles of rows
    ],
)
def test_cuts(rows, n, k, activation, config, dtype, triton_kernels):
    """Parts of K, whose workspace and counters serve the next launch; warps and tiles."""
    norm = rows <= 8 and dtype == torch.float32
    arguments = operands(rows, n, k, dtype, norm=norm, activation=activation, residual=True)
    first = launch_nf4_gemm(*arguments, config=config)
    check(first, *arguments)
    assert torch.equal(launch_nf4_gemm(*arguments, config=config), first)


@dtypes
@pytest.mark.parametrize(("n", "k", "block"), [(33, 208, 16), (40, 160, 32), (65, 320, 64)])
def test_blocks(n, k, block, dtype, triton_kernels):
    """All sizes of blocks; dequantised weights have the reference's bits."""
    arguments = operands(3, n, k, dtype, bias=True)
    x, weight, bias = arguments[:3]
    assert weight.block == block
    assert torch.equal(nf4_dequantize(weight, dtype), nf4_dequantize_reference(weight, dtype))
    check(nf4_linear(x, weight, bias), *arguments)


def test_batch_invariant(triton_kernels):
    """A row's bits do not depend on the rows beside it."""
    x, weight, *_ = operands(6, 70, 256, torch.float16)
    with batch_invariant():
        assert torch.equal(nf4_linear(x, weight)[2:3], nf4_linear(x[2:3], weight))


def test_no_rows(triton_kernels):
    x, weight, *_ = operands(0, 70, 256, torch.float32)
    assert nf4_linear(x, weight).shape == (0, 70)


def permuted(a: int, b: int, selector: int) -> int:
    """PRMT: bytes of b:a by the half bytes of the selector, whose bit 3 would repeat a sign."""
    pool = (a | b << 32).to_bytes(8, "little")
    out = 0
    for i in range(4):
        choice = selector >> 4 * i & 15
        assert choice < 8, "the byte's sign would be repeated"
        out |= pool[choice] << 8 * i
    return out


def and_or(a: int, b: int, c: int, truth_table: int) -> int:
    assert truth_table == 0xEA
    return a & b | c


OPERATIONS = {
    "mov.u32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "shr.u32": lambda a, b: a >> b,
    "shl.b32": lambda a, b: a << b,
    "add.u32": lambda a, b: a + b,
    "mad.lo.u32": lambda a, b, c: a * b + c,
    "lop3.b32": and_or,
    "prmt.b32": permuted,
}


def run_ptx(assembly: str, operands: dict[str, int], memory: dict[int, int], lane: int = 0):
    """The values of all registers after the few instructions that the lookups are made of."""
    values = dict(operands) | {"%laneid": lane}

    def value(name: str) -> int:
        return values[name] if name in values else int(name, 0)

    for line in assembly.strip("{}\n").split("\n"):
        name, _, rest = line.rstrip(";").partition(" ")
        if name == ".reg":
            continue
        target, *sources = (part.strip() for part in rest.replace("{", "").split(","))
        if name == "st.shared.v4.b32":
            assert value(target.strip("[]")) % 16 == 0
            for i, source in enumerate(sources):
                memory[value(target.strip("[]")) + 4 * i] = value(source.strip("{}"))
            continue
        if name == "mov.b32":  # {low, high}, pair
            pair = value(sources[1])
            values[target], values[sources[0].strip("}")] = pair & 0xFFFF, pair >> 16
            continue
        if name == "ld.shared.b32":
            values[target] = memory[value(sources[0].strip("[]"))]
            continue
        values[target] = OPERATIONS[name](*map(value, sources)) & 0xFFFFFFFF
    return values


def words_and_values(dtype):
    """Words of eight codes, and the bits of their values in 16 bits."""
    words = [0x76543210, 0xFEDCBA98, 0x89ABCDEF, *torch.randint(0, 2**32, (50,)).tolist()]
    factor = 1.4367 if dtype == torch.bfloat16 else 1
    table = (torch.tensor(NF4_CODEBOOK).double() * factor).to(dtype)
    bits = [b & 0xFFFF for b in table.view(torch.int16).tolist()]
    return words, [[bits[word >> 4 * i & 15] for i in range(8)] for word in words]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_permute_lookup(dtype):
    assembly = nf4_lookup._permute_assembly(dtype)
    for word, wanted in zip(*words_and_values(dtype), strict=True):
        values = run_ptx(assembly, {f"${i}": 0 for i in range(8)} | {"$8": word}, {})
        assert [values[f"${i}"] for i in range(8)] == wanted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shared_lookup(dtype):
    """Filled by 64 lanes, read by 32: right, and each lane in a bank of its own."""
    base = 1024
    memory: dict[int, int] = {}
    table = nf4_lookup.lookup_table("shared", dtype, torch.device("cpu"))
    fill = nf4_lookup._fill_assembly()
    for e, pair in enumerate(table.tolist()):
        at = {"$1": e, "$2": pair & 0xFFFFFFFF, "$3": base, "$0": 0}
        run_ptx(fill, at, memory, lane=e // 2 % 32)
    assert len(memory) == 8192
    assert (min(memory), max(memory)) == (base, base + 32764)
    assembly = nf4_lookup._shared_assembly()
    for number, (word, wanted) in enumerate(zip(*words_and_values(dtype), strict=True)):
        lane = number % 32
        copy = {a: v for a, v in memory.items() if a // 4 % 32 == lane}  # of one bank
        values = run_ptx(assembly, {"$8": word, "$9": base + 4 * lane}, copy)
        assert [values[f"${i}"] for i in range(8)] == wanted


def test_stretch_is_worth_it():
    """The codebook's distance from bf16 numbers, rms: half of that without the factor."""

    def distance(factor):
        exact = torch.tensor([v for v in NF4_CODEBOOK if v], dtype=torch.float64) * factor
        return (exact.bfloat16().double() / exact - 1).square().mean().sqrt().item()

    assert distance(nf4_lookup.stretch(torch.bfloat16)) < 0.0009
    assert distance(1.0) > 0.0013


def test_forced_reference():
    x, weight, *_ = operands(3, 20, 64, torch.float32)
    with use("reference"):
        y = nf4_linear(x, weight)
    assert torch.equal(y, torch.nn.functional.linear(x, nf4_dequantize_reference(weight, x.dtype)))
