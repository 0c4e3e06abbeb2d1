"""Mixture of experts: routing and the experts' sum against a loop over tokens in float64."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from hayate.errors import UsageError
from hayate.kernels import moe_decode, moe_grouped
from hayate.kernels._dispatch import Implementation, use
from hayate.kernels.moe import moe_mlp, moe_route
from hayate.kernels.norm import Norm

IMPLEMENTATIONS: tuple[Implementation, ...] = ("reference", "triton")
DTYPES = (torch.float32, torch.float16)
EPS = 1e-5
# Rounding to nearest: half a unit in the last place, relative.
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


class Layer(NamedTuple):
    """The operands of one MoE layer, and how its tokens are routed."""

    x: Tensor
    norm: Norm | None
    weights: Tensor
    experts: Tensor
    gate_up: Tensor
    down: Tensor
    residual: Tensor


def make_norm(kind: str | None, D: int, dtype: torch.dtype) -> Norm | None:
    if kind is None:
        return None
    weight = torch.randn(D).to(dtype)
    if kind == "rmsnorm":
        return Norm("rmsnorm", weight, None, EPS)
    return Norm("layernorm1p", weight * 0.1, torch.randn(D).to(dtype), EPS)


def make_layer(
    T: int,
    D: int,
    F: int,
    E: int,
    A: int,
    dtype: torch.dtype = torch.float32,
    norm: str | None = "rmsnorm",
) -> Layer:
    weights = torch.rand(T, A) + 0.1
    experts = torch.stack([torch.randperm(E)[:A] for _ in range(T)]).to(torch.int32)
    return Layer(
        torch.randn(T, D).to(dtype),
        make_norm(norm, D, dtype),
        weights / weights.sum(-1, keepdim=True),
        experts,
        (torch.randn(E, 2 * F, D) / D**0.5).to(dtype),
        (torch.randn(E, D, F) / F**0.5).to(dtype),
        torch.randn(T, D).to(dtype),
    )


def norm_64(x: np.ndarray, norm: Norm | None) -> np.ndarray:
    if norm is None:
        return x
    weight = norm.weight.double().numpy()
    if norm.kind == "rmsnorm":
        return x / np.sqrt((x * x).mean() + norm.eps) * weight
    assert norm.bias is not None
    y = (x - x.mean()) / np.sqrt(x.var() + norm.eps) * (1 + weight)
    return y + norm.bias.double().numpy()


def mlp_64(layer: Layer) -> tuple[np.ndarray, np.ndarray]:
    """The result, token by token and expert by expert, and how far a kernel's may be from it.

    A kernel may round norm(x), h and the output of an expert to the dtype; a sum of n products in
    fp32 adds n roundings of fp32, each of the sum of magnitudes. |silu'| < 1.1.
    """
    unit, fp32 = ROUNDING[layer.x.dtype], 2.0**-24
    out = layer.residual.double().numpy().copy()
    error = np.abs(out) * unit
    for t, x_t in enumerate(layer.x.double().numpy()):
        x = norm_64(x_t, layer.norm)
        for weight, expert in zip(layer.weights[t].tolist(), layer.experts[t], strict=True):
            gate_up = layer.gate_up[expert].double().numpy()
            gate, up = np.split(gate_up @ x, 2)
            gate_error, up_error = np.split(
                np.abs(gate_up) @ np.abs(x) * (2 * unit + (len(x) + 8) * fp32), 2
            )
            silu = gate / (1 + np.exp(-gate))
            h = silu * up
            h_error = 1.1 * gate_error * np.abs(up) + np.abs(silu) * up_error + unit * np.abs(h)
            down = layer.down[expert].double().numpy()
            y = down @ h
            y_error = np.abs(down) @ (h_error + (len(h) + 8) * fp32 * np.abs(h)) + unit * np.abs(y)
            out[t] += weight * y
            error[t] += weight * y_error
    # Second-order terms, and the last rounding.
    return out, 1.1 * error + unit * np.abs(out) + 1e-7


def check(layer: Layer, run, implementation: Implementation = "triton") -> None:
    before = layer.residual.clone()
    with use(implementation):
        actual = run(*layer[:-1], residual=layer.residual)
    exact, error = mlp_64(layer)
    assert actual.dtype == layer.x.dtype
    assert torch.equal(before, layer.residual)
    excess = np.abs(actual.double().numpy() - exact) - error
    assert excess.max() <= 0, f"off by {excess.max():.3e} more than the bound"


def route_64(
    x: Tensor, router: Tensor, norm: Norm | None, A: int, renormalize: bool
) -> tuple[np.ndarray, np.ndarray]:
    weights, experts = [], []
    for row in x.double().numpy():
        logits = router.double().numpy() @ norm_64(row, norm)
        p = np.exp(logits - logits.max())
        p /= p.sum()
        order = sorted(range(len(p)), key=lambda e: (-logits[e], e))[:A]
        weights.append(p[order] / (p[order].sum() if renormalize else 1))
        experts.append(order)
    return np.array(weights), np.array(experts)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("T", "D", "E", "A", "norm", "renormalize"),
    [
        (1, 48, 16, 4, "rmsnorm", True),
        (3, 1300, 5, 2, "rmsnorm", False),  # two chunks, the second masked
        (2, 100, 130, 8, "layernorm1p", True),  # chunks of 64
        (2, 20, 3, 3, None, True),
        (1, 7, 1, 1, "rmsnorm", True),
        (261, 40, 5, 2, "rmsnorm", True),  # the kernel for many tokens
    ],
)
def test_route(
    T: int,
    D: int,
    E: int,
    A: int,
    norm: str | None,
    renormalize: bool,
    dtype: torch.dtype,
    implementation: Implementation,
) -> None:
    x, router = torch.randn(T, D).to(dtype), (torch.randn(E, D) / D**0.5).to(dtype)
    operand = make_norm(norm, D, dtype)
    with use(implementation):
        weights, experts = moe_route(x, router, norm=operand, num_active=A, renormalize=renormalize)
    assert weights.dtype == torch.float32
    assert experts.dtype == torch.int32
    exact, order = route_64(x, router, operand, A, renormalize)
    # Logits of size about 1 in fp32, but layernorm1p rounds to the dtype in the kernels.
    tolerance = 4 * ROUNDING[dtype] if norm == "layernorm1p" else 2.0**-20
    np.testing.assert_allclose(weights.numpy(), exact, atol=tolerance)
    assert np.array_equal(experts.numpy(), order)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("T", [2, 258])
def test_route_ties(T: int, implementation: Implementation) -> None:
    """Experts with one and the same row of the router: the lower index first."""
    router = torch.randn(2, 24)[torch.tensor([0, 1, 0, 1, 1, 0, 0])]
    x = torch.randn(T, 24)
    with use(implementation):
        weights, experts = moe_route(x, router, norm=None, num_active=4, renormalize=True)
    first_wins = (x @ router[0] > x @ router[1])[:, None]
    expected = torch.where(first_wins, torch.tensor([0, 2, 5, 6]), torch.tensor([1, 3, 4, 0]))
    assert torch.equal(experts.long(), expected)
    assert torch.all(weights[:, :-1] >= weights[:, 1:])


@pytest.mark.filterwarnings("ignore:invalid value")  # NumPy, inside the interpreter
@pytest.mark.parametrize("T", [3, 259])
def test_nan_stays_in_its_row(T: int) -> None:
    """A token of NaN gets valid experts, and poisons no other token."""
    D, E, A = 24, 6, 2
    x, router = torch.randn(T, D), torch.randn(E, D)
    x[1] = torch.nan
    layer = make_layer(T, D, 8, E, A, norm=None)
    with use("triton"):
        weights, experts = moe_route(x, router, norm=None, num_active=A, renormalize=True)
        y = moe_mlp(x, None, weights, experts, layer.gate_up, layer.down, residual=layer.residual)
    assert weights[1].isnan().all()
    assert y[1].isnan().all()
    others = torch.arange(T) != 1
    assert y[others].isfinite().all()
    if T < 256:
        assert ((experts >= 0) & (experts < E)).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [None, "rmsnorm", "layernorm1p"])
@pytest.mark.parametrize(
    ("T", "D", "F", "E", "A"),
    [
        (1, 40, 24, 16, 4),  # decode
        (3, 37, 21, 7, 2),  # decode, odd sizes
        (5, 40, 24, 4, 2),  # grouped
        (6, 37, 21, 3, 3),  # grouped, odd sizes, every token to every expert
    ],
)
def test_mlp(
    T: int,
    D: int,
    F: int,
    E: int,
    A: int,
    norm: str | None,
    dtype: torch.dtype,
    implementation: Implementation,
) -> None:
    check(make_layer(T, D, F, E, A, dtype, norm), moe_mlp, implementation)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [None, "rmsnorm"])
@pytest.mark.parametrize(("D", "F"), [(70, 72), (64, 96), (30, 33)])
def test_decode_chunks(
    D: int, F: int, norm: str | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One chunk, several, the last of them whole or masked."""
    monkeypatch.setattr(moe_decode, "up_cut", lambda *_: moe_decode.Cut(16, 32, 1))
    monkeypatch.setattr(moe_decode, "down_cut", lambda *_: moe_decode.Cut(16, 32, 1))
    check(make_layer(2, D, F, 3, 2, dtype, norm), moe_decode.moe_mlp_decode)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("T", "E", "A"),
    [
        (10, 4, 2),  # row tiles of 16
        (24, 2, 1),  # of 32
        (56, 4, 2),  # of 64
        (100, 4, 2),  # of 64, wide
        (150, 2, 1),  # of 128
    ],
)
def test_grouped_tiles(T: int, E: int, A: int, dtype: torch.dtype) -> None:
    check(make_layer(T, 70, 72, E, A, dtype), moe_grouped.moe_mlp_grouped)


@pytest.mark.parametrize("run", [moe_decode.moe_mlp_decode, moe_grouped.moe_mlp_grouped])
@pytest.mark.parametrize("chosen", [[0, 1], [8, 7], [4, 0]])
def test_uneven_experts(chosen: list[int], run) -> None:
    """All tokens on two of nine experts; the others are not even read (they are NaN)."""
    layer = make_layer(7, 20, 12, 9, 2)
    layer.experts.copy_(torch.tensor(chosen, dtype=torch.int32))
    idle = [e for e in range(9) if e not in chosen]
    layer.gate_up[idle] = torch.nan
    layer.down[idle] = torch.nan
    check(layer, run)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("T", [2, 9])
def test_rows_apart_and_x_as_residual(T: int, implementation: Implementation) -> None:
    layer = make_layer(T, 24, 16, 4, 2)
    wide = torch.full((T, 31), torch.nan)
    wide[:, :24] = layer.x
    check(
        layer._replace(x=wide[:, :24], residual=wide[:, :24]), _with_nan_equal(wide), implementation
    )


def _with_nan_equal(wide: Tensor):
    """`moe_mlp`, after which the columns beside x are still what they were."""

    def run(*args, **kwargs) -> Tensor:
        y = moe_mlp(*args, **kwargs)
        assert wide[:, 24:].isnan().all()
        return y

    return run


@pytest.mark.parametrize("T", [0, 1, 13, 50])
def test_sort_by_expert(T: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe_grouped, "_SORT_BLOCK", 32)  # several blocks
    E, A = 5, 3
    experts = torch.randint(0, E - 1, (T, A), dtype=torch.int32)  # the last expert has no rows
    with use("triton"):
        order, place, ends = moe_grouped.sort_by_expert(experts, E)
    flat = experts.flatten().long()
    assert torch.equal(order.long(), flat.argsort(stable=True))
    assert torch.equal(order[place.long()], torch.arange(T * A, dtype=torch.int32))
    assert torch.equal(ends.long(), flat.bincount(minlength=E).cumsum(0))


def test_library_product() -> None:
    """grouped_mm is called with the layout and the offsets it means; bf16 as on the GPU."""
    x, weight = torch.randn(20, 16), torch.randn(3, 24, 16)
    x, weight = x.bfloat16(), weight.bfloat16()
    y = moe_grouped._library_product(x, weight, torch.tensor([4, 4, 20], dtype=torch.int32))
    expected = torch.cat(
        [x[:4].double() @ weight[0].T.double(), x[4:].double() @ weight[2].T.double()]
    )
    magnitude = x.double().abs().amax() * weight.double().abs().amax() * 16
    assert (y.double() - expected).abs().max() <= ROUNDING[torch.bfloat16] * magnitude


def test_gradients_on_the_cpu() -> None:
    """Where a gradient is needed PyTorch's operations run, and give that of the plain formula."""
    layer = make_layer(4, 6, 5, 3, 2)
    leaves = [layer.x, layer.weights, layer.gate_up, layer.down]

    def plain(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        gate, up = torch.einsum("td,tafd->taf", x, gate_up[layer.experts.long()]).chunk(2, -1)
        h = torch.nn.functional.silu(gate) * up
        return x + torch.einsum("taf,tadf,ta->td", h, down[layer.experts.long()], weights)

    def ours(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return moe_mlp(x, None, weights, layer.experts, gate_up, down, residual=x)

    grads = []
    for run, dtype in ((plain, torch.float64), (ours, torch.float32)):
        copies = [leaf.to(dtype, copy=True).requires_grad_() for leaf in leaves]
        grads.append(torch.autograd.grad(run(*copies).square().sum(), copies))
    for exact, actual in zip(*grads, strict=True):
        # Sums of tens of fp32 products of size about 1.
        torch.testing.assert_close(actual.double(), exact, atol=1e-4, rtol=1e-4)


def test_refused() -> None:
    layer = make_layer(2, 8, 4, 3, 2)
    with pytest.raises(UsageError, match="num_active"):
        moe_route(layer.x, torch.zeros(3, 8), norm=None, num_active=4, renormalize=True)
    with pytest.raises(UsageError, match="router_weight"):
        moe_route(layer.x, torch.zeros(3, 9), norm=None, num_active=2, renormalize=True)
    with pytest.raises(UsageError, match="gate_up"):
        moe_mlp(*layer[:4], layer.gate_up[:, 1:], layer.down, residual=layer.residual)
    with pytest.raises(UsageError, match="dtype"):
        moe_mlp(*layer[:4], layer.gate_up.half(), layer.down, residual=layer.residual)
    with pytest.raises(UsageError, match="residual"):
        moe_mlp(*layer[:6], residual=layer.residual[:1])
