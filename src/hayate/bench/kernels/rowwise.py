"""Cases of the operations on rows: elementwise, softmax, norms, embedding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hayate.bench.kernels.case import Case, Setting, norm_64, relative, wrong_unless
from hayate.kernels.elementwise import add, mul, relu2, scale, silu, silu_and_mul
from hayate.kernels.embedding import embedding
from hayate.kernels.norm import layernorm1p, rmsnorm, rmsnorm_residual
from hayate.kernels.softmax import softmax, softmax_topk


def elementwise_cases(on: Setting) -> list[Case]:
    T, N = (2048, 11_520) if on.gpu else (512, 2048)

    def case(
        name: str, columns: int, run: Callable[..., Tensor], formula: Callable[..., Tensor]
    ) -> Case:
        """`columns` holds those of all operands; `formula` is the truth and, in x's dtype, the rival."""
        operands = 2 if name in ("add", "mul") else 1

        def error(o: tuple[Tensor, ...], y: Tensor) -> float:
            return relative(y, formula(*(x.double() for x in o))) / on.limit(1, depth=4)

        return Case(
            f"{name} {T} x {N}",
            make=lambda: tuple(on.draw(T, columns // operands) for _ in range(operands)),
            run=lambda o: run(*o),
            error=error,
            num_bytes=T * (columns + N) * on.width,
            rivals={"torch": lambda o: formula(*o)},
        )

    # Looked up when called, not here: the names are this module's.
    return [
        case("silu", N, lambda x: silu(x), F.silu),
        case("relu2", N, lambda x: relu2(x), lambda x: x.relu().square()),
        case("scale", N, lambda x: scale(x, 0.3), lambda x: x * 0.3),
        case("add", 2 * N, lambda x, y: add(x, y), torch.add),
        case("mul", 2 * N, lambda x, y: mul(x, y), torch.mul),
        case("silu_and_mul", 2 * N, lambda x: silu_and_mul(x), _swiglu),
    ]


def _swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def softmax_cases(on: Setting) -> list[Case]:
    def case(T: int, N: int) -> Case:
        return Case(
            f"{T} x {N}",
            make=lambda: on.draw(T, N, scale=3.0),
            run=lambda x: softmax(x),
            error=lambda x, y: relative(y, x.double().softmax(-1)) / on.limit(1, depth=N),
            num_bytes=2 * T * N * on.width,
            rivals={"torch": lambda x: x.softmax(-1)},
        )

    if on.gpu:
        return [case(1, 131_072), case(64, 131_072), case(8192, 4096)]
    return [case(16, 49_152)]


def softmax_topk_cases(on: Setting) -> list[Case]:
    def case(T: int, E: int, A: int) -> Case:
        def error(x: Tensor, result: tuple[Tensor, Tensor]) -> float:
            weights, indices = result
            # The order of equal logits is fixed (the lower index first), so the choice is exact.
            order = x.double().sort(stable=True, dim=-1, descending=True).indices[:, :A]
            if not torch.equal(indices.long(), order):
                return float("inf")
            wanted = x.double().softmax(-1).gather(1, order)
            wanted = wanted / wanted.sum(-1, keepdim=True)
            # fp32 throughout: exponentials, a sum and two divisions, each off by a few 2^-24.
            return relative(weights, wanted) / (32 * 2.0**-24)

        return Case(
            f"{T} x {E}, top {A}",
            make=lambda: on.draw(T, E, scale=2.0),
            run=lambda x: softmax_topk(x, A, renormalize=True),
            error=error,
            num_bytes=T * (E * on.width + A * 8),
            rivals={"torch": lambda x: x.softmax(-1, dtype=torch.float32).topk(A)},
        )

    if on.gpu:
        return [case(1, 16, 4), case(2048, 16, 4), case(65_536, 64, 8)]
    return [case(4096, 64, 8)]


def _norm_cases(on: Setting, case: Callable[[int, int], Case]) -> list[Case]:
    sizes = [(1, 4096), (64, 4096), (8192, 4096)] if on.gpu else [(512, 2048)]
    return [case(T, D) for T, D in sizes]


def rmsnorm_cases(on: Setting) -> list[Case]:
    def case(T: int, D: int) -> Case:
        norm = on.norm("rmsnorm", D)
        return Case(
            f"{T} x {D}",
            make=lambda: on.draw(T, D),
            run=lambda x: rmsnorm(x, norm.weight, norm.eps),
            error=lambda x, y: relative(y, norm_64(x, norm)) / on.limit(1, depth=D),
            num_bytes=(2 * T + 1) * D * on.width,
            rivals={"torch": lambda x: F.rms_norm(x, (D,), norm.weight, norm.eps)},
        )

    return _norm_cases(on, case)


def rmsnorm_residual_cases(on: Setting) -> list[Case]:
    def case(T: int, D: int) -> Case:
        norm = on.norm("rmsnorm", D)

        def error(o: tuple[Tensor, Tensor], result: tuple[Tensor, Tensor]) -> float:
            total = o[0].double() + o[1].double()
            errors = relative(result[0], norm_64(total, norm)) + relative(result[1], total)
            return errors / (2 * on.limit(1, depth=D))

        def torch_form(o: Any) -> Any:
            total = o[0] + o[1]
            return F.rms_norm(total, (D,), norm.weight, norm.eps), total

        return Case(
            f"{T} x {D}",
            make=lambda: (on.draw(T, D), on.draw(T, D)),
            run=lambda o: rmsnorm_residual(o[0], o[1], norm.weight, norm.eps),
            error=error,
            num_bytes=(4 * T + 1) * D * on.width,
            rivals={"torch": torch_form},
        )

    return _norm_cases(on, case)


def layernorm1p_cases(on: Setting) -> list[Case]:
    def case(T: int, D: int) -> Case:
        norm = on.norm("layernorm1p", D)
        weight = 1 + norm.weight
        return Case(
            f"{T} x {D}",
            make=lambda: on.draw(T, D),
            run=lambda x: layernorm1p(x, norm.weight, norm.bias, norm.eps),
            error=lambda x, y: relative(y, norm_64(x, norm)) / on.limit(1, depth=D),
            num_bytes=(2 * T + 2) * D * on.width,
            rivals={"torch": lambda x: F.layer_norm(x, (D,), weight, norm.bias, norm.eps)},
        )

    return _norm_cases(on, case)


def embedding_cases(on: Setting) -> list[Case]:
    V, D = (131_072, 4096) if on.gpu else (49_152, 576)
    table = on.draw(V, D)

    def case(T: int) -> Case:
        return Case(
            f"{T} of {V} x {D}",
            make=lambda: on.integers(T, below=V),
            run=lambda ids: embedding(ids, table),
            error=lambda ids, y: wrong_unless(torch.equal(y, table[ids])),
            num_bytes=T * (8 + 2 * D * on.width),
            rivals={"torch": lambda ids: F.embedding(ids, table)},
        )

    return [case(T) for T in ((1, 256, 8192) if on.gpu else (8192,))]
