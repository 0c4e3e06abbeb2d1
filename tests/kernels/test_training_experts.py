"""The experts with gradients against a loop over tokens in float64, and the grouped products."""

from __future__ import annotations

import pytest
import torch
from tests import training_formulas as formulas
from tests.training_formulas import compare
from torch import Tensor

from hayate.errors import UsageError
from hayate.kernels._dispatch import Implementation, use
from hayate.kernels.training import experts_mlp
from hayate.kernels.training.grouped_gemm import grouped_outer, grouped_rows

IMPLEMENTATIONS: tuple[Implementation, ...] = ("reference", "triton", "auto")
F32, F16 = torch.float32, torch.float16


def draw(T: int, D: int, F: int, E: int, A: int) -> list[Tensor]:
    gate_up, down = torch.randn(E, 2 * F, D) * D**-0.5, torch.randn(E, D, F) * F**-0.5
    return [torch.randn(T, D), torch.rand(T, A) + 0.1, gate_up, down]


def choose(T: int, E: int, A: int) -> Tensor:
    return torch.stack([torch.randperm(E)[:A] for _ in range(T)]).to(torch.int32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("T", "D", "F", "E", "A", "empty", "dtype"),
    [
        (37, 24, 33, 4, 2, 0, F32),  # several tiles an expert, odd width
        (9, 16, 40, 8, 3, 3, F32),  # experts without rows
        (1, 8, 8, 4, 1, 3, F32),
        (50, 32, 64, 3, 1, 1, F16),
    ],
)
def test_experts_mlp(
    implementation: Implementation,
    T: int,
    D: int,
    F: int,
    E: int,
    A: int,
    empty: int,
    dtype: torch.dtype,
) -> None:
    experts = choose(T, E - empty, A) + min(empty, 1)  # the first and the last ones have no rows
    inputs = [x.to(dtype) for x in draw(T, D, F, E, A)]
    with use(implementation):
        compare(
            lambda x, w, gate_up, down: experts_mlp(x, w.float(), experts, gate_up, down),
            lambda x, w, gate_up, down: formulas.experts_mlp(x, w, experts, gate_up, down),
            inputs,
            # h (twice: silu is not linear), the activation, y or dh, the result; by autograd in fp16 also
            # every sum over A.
            roundings=64 if dtype == F32 else 8,
            dtype=dtype,
        )


@pytest.mark.parametrize("implementation", ["triton", "auto"])
def test_recomputed_and_added_to_gradients_that_exist(implementation: Implementation) -> None:
    T, E, A = 20, 4, 2
    experts = choose(T, E, A)
    inputs = draw(T, 16, 24, E, A)
    results = []
    for existing in (False, True):
        leaves = [x.clone().requires_grad_() for x in inputs]
        buffers = []
        for w in leaves[2:] if existing else ():
            w.grad = torch.ones_like(w)
            buffers.append(w.grad)
        with use(implementation):
            y = experts_mlp(*leaves[:2], experts, *leaves[2:], recompute=existing)
            y.square().sum().backward()
        assert all(w.grad is b for w, b in zip(leaves[2:], buffers, strict=False))
        results.append([x.grad for x in leaves])
    for i, (a, b) in enumerate(zip(*results, strict=True)):
        # The same sums in the same order; the one that exists comes last.
        torch.testing.assert_close(b, a + (1 if i >= 2 else 0), rtol=1e-5, atol=1e-5)


def test_gradient_of_a_weight_that_is_not_a_leaf() -> None:
    experts, inputs = choose(6, 2, 1), draw(6, 8, 8, 2, 1)
    master = inputs[2].clone().requires_grad_()
    for implementation in IMPLEMENTATIONS:
        master.grad = None
        with use(implementation):
            experts_mlp(*inputs[:2], experts, 2 * master, inputs[3]).sum().backward()
        wanted = inputs[2].clone().requires_grad_()
        formulas.experts_mlp(*inputs[:2], experts, 2 * wanted, inputs[3]).sum().backward()
        torch.testing.assert_close(master.grad, wanted.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.usefixtures("triton_kernels")
def test_grouped_products(dtype: torch.dtype) -> None:
    R, N, K = 75, 50, 36
    ends = torch.tensor([0, 40, 41, 41, R], dtype=torch.int32)
    expert = torch.searchsorted(ends, torch.arange(R), right=True)
    x, y, w = (
        torch.randn(R, K).to(dtype),
        torch.randn(R, N).to(dtype),
        torch.randn(5, N, K).to(dtype),
    )
    # Sums of up to 50 products in fp32, one rounding to dtype, of values below 64.
    tolerance = {"rtol": 0, "atol": 64 * (2.0**-11 if dtype == F16 else 64 * 2.0**-24)}
    rows = torch.stack([w[e].double() @ x_r.double() for e, x_r in zip(expert, x, strict=True)])
    torch.testing.assert_close(grouped_rows(x, w, ends).double(), rows, **tolerance)
    transposed = w.transpose(1, 2).contiguous()
    torch.testing.assert_close(
        grouped_rows(x, transposed, ends, k_by_n=True).double(), rows, **tolerance
    )
    outer = torch.stack([y[expert == e].double().T @ x[expert == e].double() for e in range(5)])
    new = grouped_outer(y, x, ends, None)
    torch.testing.assert_close(new.double(), outer, **tolerance)
    assert (new[0] == 0).all()
    assert (new[3] == 0).all()
    into = torch.ones(5, N, K)
    assert grouped_outer(y, x, ends, into) is None
    torch.testing.assert_close(into.double(), outer + 1, **tolerance)


def test_wrong_shapes_are_refused() -> None:
    x, w, gate_up, down = draw(4, 8, 12, 3, 2)
    experts = choose(4, 3, 2)
    with pytest.raises(UsageError, match=r"gate_up must be \(E, 2F, D\)"):
        experts_mlp(x, w, experts, down, gate_up)
    with pytest.raises(UsageError, match=r"weights and experts \(T, A\)"):
        experts_mlp(x, w[:, :1], experts, gate_up, down)
    with pytest.raises(UsageError, match="of one dtype"):
        experts_mlp(x.half(), w, experts, gate_up, down)
