"""`linear` and the kernels under it against the formula in float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from hayate.errors import UsageError
from hayate.kernels import small_gemm as small_gemm_module
from hayate.kernels._dispatch import use
from hayate.kernels.gemv import GemvConfig, gemv_config, launch_gemv
from hayate.kernels.invariant_linear import InvariantCut, launch_invariant_linear
from hayate.kernels.linear import gemm, gemm_batched, gemv, linear
from hayate.kernels.norm import Norm
from hayate.kernels.small_gemm import SmallGemmConfig, launch_small_gemm, small_gemm_config

EPS = 1e-5
UNIT = {torch.float16: 2.0**-11, torch.float32: 2.0**-24}
both = pytest.mark.parametrize("implementation", ["reference", "triton"])
dtypes = pytest.mark.parametrize("dtype", list(UNIT))


def norm_64(x, norm):
    x, weight = x.double(), norm.weight.double()
    if norm.kind == "rmsnorm":
        return x / (x.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt() * weight
    y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + norm.eps).sqrt()
    weight = weight if norm.kind == "layernorm" else 1 + weight
    return y * weight + (0 if norm.bias is None else norm.bias.double())


def linear_64(x, weight, bias, norm, activation, residual, unit):
    """The exact result, and a bound of its error when every operand and sum errs by `unit`."""
    xn = x.double() if norm is None else norm_64(x, norm)
    y = xn @ weight.double().T
    error = unit * (xn.abs() @ weight.double().abs().T + y.abs())
    if norm is not None and norm.kind == "layernorm1p":
        # mean(x) sum(W g) is taken from sum(W g x): what cancels leaves its rounding behind.
        mean, std = (
            x.double().mean(-1, keepdim=True),
            (x.double().var(-1, correction=0, keepdim=True) + EPS).sqrt(),
        )
        error = error + 2.0**-22 * (mean.abs() / std) * (
            weight.double().abs() @ (1 + norm.weight.double()).abs()
        )
    if bias is not None:
        y = y + bias.double()
        error = error + unit * y.abs()
    if activation == "relu2":
        error = 2 * y.abs() * error + error**2
        y = y.clamp(min=0) ** 2
    elif activation == "gelu_tanh":  # its slope is below 1.13
        error, y = 1.13 * error, torch.nn.functional.gelu(y, approximate="tanh")
    elif activation == "silu":
        error, y = 1.1 * error, y * torch.sigmoid(y)  # the slope of silu is below 1.1
    elif activation == "silu_and_mul":
        gate, up = y.chunk(2, -1)
        gate_error, up_error = error.chunk(2, -1)
        silu = gate * torch.sigmoid(gate)
        error = 1.1 * gate_error * (up.abs() + up_error) + silu.abs() * up_error
        y = silu * up
    if residual is not None:
        error = error + unit * y.abs()
        y = y + residual.double()
    return y, error


def check(actual, x, weight, bias, norm, activation, residual, *, fused):
    """`fused`: all in fp32, one rounding at the end; else norm and product are rounded between."""
    # fp32 sums of K values, of random sign: 4 sqrt(K) units, and 8 for the norm's few operations.
    unit = 2.0**-24 * (4 * x.shape[1] ** 0.5 + 8)
    if not fused:
        unit += UNIT[x.dtype]
    exact, error = linear_64(x, weight, bias, norm, activation, residual, unit)
    assert actual.dtype == x.dtype
    assert actual.shape == exact.shape
    excess = (actual.double() - exact).abs() - error - UNIT[x.dtype] * exact.abs() - 1e-7
    assert excess.max() <= 0, f"off by {excess.max().item():.3e} more than the bound"


def operands(rows, n, k, dtype, *, norm=None, activation=None, bias=False, residual=False):
    n_out = n // 2 if activation == "silu_and_mul" else n
    vector = torch.randn(k).to(dtype)
    norms = {
        None: None,
        "rmsnorm": Norm("rmsnorm", vector, None, EPS),
        "layernorm": Norm("layernorm", vector, vector.flip(0), EPS),
        "layernorm1p": Norm("layernorm1p", vector * 0.1, vector.flip(0), EPS),
    }
    return (
        (torch.randn(rows, k) + 0.5).to(dtype),
        (torch.randn(n, k) / k**0.5).to(dtype),
        torch.randn(n).to(dtype) if bias else None,
        norms[norm],
        activation,
        torch.randn(rows, n_out).to(dtype) if residual else None,
    )


@both
@dtypes
@pytest.mark.parametrize(
    ("norm", "activation", "bias", "residual"),
    [
        (None, None, False, False),
        ("rmsnorm", None, True, False),
        ("rmsnorm", "silu_and_mul", False, False),
        ("layernorm1p", "relu2", False, False),
        ("layernorm", "gelu_tanh", True, False),
        ("layernorm1p", "silu_and_mul", True, True),
        (None, None, True, True),
        (None, "silu", False, True),
    ],
)
@pytest.mark.parametrize("rows", [1, 3, 18, 40, 70])
def test_linear(rows, norm, activation, bias, residual, dtype, implementation):
    """Every path (one row, tiles, their transposes, library), each fusion, odd sizes."""
    arguments = operands(
        rows, 26, 300, dtype, norm=norm, activation=activation, bias=bias, residual=residual
    )
    x, weight, bias_, norm_, _, residual_ = arguments
    kept = None if residual_ is None else residual_.clone()
    with use(implementation):
        y = linear(x, weight, bias_, norm=norm_, activation=activation, residual=residual_)
    # A layernorm, and a gated layernorm1p, is a kernel of its own.
    own = norm == "layernorm" or (norm == "layernorm1p" and activation == "silu_and_mul")
    one_kernel = rows == 1 and not own
    check(y, *arguments, fused=implementation == "triton" and one_kernel)
    assert kept is None or torch.equal(kept, residual_)


@dtypes
@pytest.mark.parametrize("norm", [None, "rmsnorm", "layernorm1p"])
@pytest.mark.parametrize(
    ("n", "k"),
    [
        (9, 1100),  # one chunk, masked
        (6, 2200),  # three chunks, the last masked
        (5, 4096),  # two even chunks
        (3, 6200),  # two wide chunks, the last masked
        (2, 1),
    ],
)
def test_gemv_chunks(n, k, norm, dtype):
    arguments = operands(1, n, k, dtype, norm=norm)
    check(launch_gemv(*arguments), *arguments, fused=True)


@pytest.mark.parametrize("activation", [None, "silu_and_mul"])
@pytest.mark.parametrize(
    ("block_n", "block_k", "ahead"),
    [(2, 512, 1), (2, 256, 2), (8, 1024, 1), (16, 256, 3), (4, 512, 5)],  # 5: more than there are
)
def test_gemv_cut_does_not_change_the_result(block_n, block_k, ahead, activation):
    norm = "rmsnorm"
    arguments = operands(1, 20, 700, torch.float16, norm=norm, activation=activation, bias=True)
    config = GemvConfig(block_n, block_k, 1, ahead)
    check(launch_gemv(*arguments, config=config), *arguments, fused=True)


@dtypes
@pytest.mark.parametrize("activation", [None, "silu_and_mul"])
@pytest.mark.parametrize("rows", [6, 32])
@pytest.mark.parametrize(
    ("n", "k", "split"),
    [(70, 100, 1), (40, 400, 4), (26, 256, 2), (24, 640, 8)],
)
def test_small_gemm(n, k, split, rows, activation, dtype):
    config = SmallGemmConfig(32, 64, split, 4, 3)
    for bias in (True, False):  # without one, the residual is the first term of the sum
        arguments = operands(rows, n, k, dtype, activation=activation, bias=bias, residual=True)
        x, weight, bias_, _, _, residual = arguments
        first = launch_small_gemm(x, weight, bias_, activation, residual, config=config)
        check(first, *arguments, fused=True)
        # The counters are back at zero, and the parts are summed in a fixed order.
        second = launch_small_gemm(x, weight, bias_, activation, residual, config=config)
        assert torch.equal(first, second)
        assert not small_gemm_module._counters(first.device).any()


@pytest.mark.parametrize("n", [576, 960, 3072, 4096, 23040, 131072, 256000])
@pytest.mark.parametrize("k", [576, 768, 1536, 3072, 4096, 9216, 11520])
def test_configs_keep_their_promises(n, k):
    for gated in (False, True):
        config = gemv_config(n, k, gated)
        lanes = 32 * config.num_warps
        assert config.block_n * config.block_k <= 128 * lanes  # sums a lane
        assert config.block_k >= 8 * lanes
        assert config.block_n >= (2 if gated else 1)
        for block_m, large in itertools.product((16, 32, 64), (False, True)):
            small = small_gemm_config(n, k, block_m, 132, gated=gated, large_shared=large)
            # wgmma's tiles keep all stages, others one less
            buffers = small.num_stages - (block_m == 16)
            shared = buffers * (block_m + small.block_n) * small.block_k * 2
            assert shared <= (200 if large else 99) * 1024
            # no part of K is empty
            steps = -(-k // small.block_k)
            assert -(-steps // small.split) * (small.split - 1) < steps


@dtypes
@pytest.mark.parametrize(
    ("cut", "k"),
    [
        (InvariantCut(32, 32, 32, 4, 2), 70),  # pointers, masked along K
        (InvariantCut(16, 32, 64, 4, 2, True), 136),  # the weights' tiles are copied
        (InvariantCut(32, 64, 64, 4, 2, True), 128),  # those of x too
    ],
)
@pytest.mark.parametrize("activation", [None, "silu_and_mul"])
def test_invariant_linear(cut, k, activation, dtype):
    """Rows and columns that do not fill their tiles, bias and residual."""
    x, weight, bias, norm, _, residual = operands(
        45, 76, k, dtype, activation=activation, bias=True, residual=True
    )
    y = launch_invariant_linear(x, weight, bias, activation, residual, cut)
    check(y, x, weight, bias, norm, activation, residual, fused=True)


def test_strided_x_and_residual():
    """Slices of wider tensors, as they come out of a packed projection."""
    wide_x, wide_residual = torch.randn(3, 96), torch.randn(3, 64)
    x, residual, weight = wide_x[:, 32:64], wide_residual[:, :10], torch.randn(10, 32)
    with use("triton"):
        y = linear(x, weight, residual=residual)
    check(y, x, weight, None, None, None, residual, fused=True)


def test_weight_that_is_a_transposed_view():
    x, weight = torch.randn(2, 16), torch.randn(16, 12).t()
    with use("triton"):
        y = linear(x, weight)
    check(y, x, weight, None, None, None, None, fused=True)


def test_gradients_flow_through_the_reference():
    x, weight = torch.randn(2, 8), torch.randn(4, 8, requires_grad=True)
    with use("triton"):
        linear(x, weight).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(4, 8))


@both
def test_gemv_gemm_and_gemm_batched(implementation):
    a, b = torch.randn(5, 7, 32), torch.randn(5, 32, 9)
    weight = torch.randn(12, 32)
    with use(implementation):
        one, few = gemv(a[0, 0], weight), gemv(a[0], weight)
        assert one.shape == (12,)
        check(one[None], a[0, :1], weight, None, None, None, None, fused=True)
        check(few, a[0], weight, None, None, None, None, fused=True)
        check(gemm(a[0], b[0]), a[0], b[0].t(), None, None, None, None, fused=True)
        for i, product in enumerate(gemm_batched(a, b)):
            check(product, a[i], b[i].t(), None, None, None, None, fused=True)


@both
@pytest.mark.parametrize("activation", [None, "silu_and_mul"])
def test_no_rows(activation, implementation):
    with use(implementation):
        y = linear(torch.randn(0, 8), torch.randn(6, 8), activation=activation)
    assert y.shape == (0, 3 if activation else 6)


def test_wrong_arguments_are_named():
    with pytest.raises(UsageError, match=r"got \(2, 8\) and \(4, 9\)"):
        linear(torch.randn(2, 8), torch.randn(4, 9))
    with pytest.raises(UsageError, match="one dtype"):
        linear(torch.randn(2, 8), torch.randn(4, 8).half())
    with pytest.raises(UsageError, match="at most 16 rows, got 17"):
        gemv(torch.randn(17, 8), torch.randn(4, 8))
