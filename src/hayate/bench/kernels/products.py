"""Cases of the matrix products: the linear layers of the presets with their fusions, and the experts."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hayate.bench.kernels.case import Case, Setting, norm_64, relative
from hayate.kernels.linear import linear
from hayate.kernels.moe import moe_mlp, moe_route
from hayate.models import preset_config
from hayate.models.config import ModelConfig
from hayate.models.presets import PRESETS

_ROWS = (1, 2, 8, 16, 32, 64)


class Layer(NamedTuple):
    """A linear layer of a decoder, weight (N, D), and what is fused with it."""

    name: str
    N: int
    D: int
    norm: str | None = None
    activation: Any = None
    residual: bool = False
    bias: bool = False


def layers(config: ModelConfig) -> list[Layer]:
    """The distinct linear layers of a decoder, as `models.layers` calls them."""
    c, D, HK = config, config.hidden_size, config.num_heads * config.head_dim
    result = [
        Layer("qkv", c.qkv_size, D, c.norm, bias=c.qkv_bias),
        Layer("o", D, HK, residual=True, bias=c.o_bias),
    ]
    if c.moe is None:
        wide = c.ffn_size * (2 if c.activation == "silu_and_mul" else 1)
        result += [
            Layer("up", wide, D, c.norm, c.activation, bias=c.mlp_bias),
            Layer("down", D, c.ffn_size, residual=True, bias=c.mlp_bias),
        ]
    return [*result, Layer("head", c.vocab_size, D, c.norm)]


def linear_cases(on: Setting) -> list[Case]:
    presets = PRESETS if on.gpu else ("smollm2-135m",)
    found = {layer: None for name in presets for layer in layers(preset_config(name))}
    return [_linear_case(on, T, layer) for layer in found for T in (_ROWS if on.gpu else (1, 8))]


def _linear_case(on: Setting, T: int, layer: Layer) -> Case:
    name, N, D, kind, activation, has_residual, has_bias = layer
    columns = N // 2 if activation == "silu_and_mul" else N
    norm = on.norm(kind, D) if kind else None

    def make() -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        residual = on.draw(T, columns) if has_residual else None
        bias = on.draw(N) if has_bias else None
        return on.draw(T, D), on.draw(N, D, scale=D**-0.5), bias, residual

    def run(o: Any) -> Tensor:
        x, weight, bias, residual = o
        return linear(x, weight, bias, norm=norm, activation=activation, residual=residual)

    def error(o: Any, y: Tensor) -> float:
        x, weight, bias, residual = o
        x = x.double() if norm is None else norm_64(x, norm)
        # In pieces: the head's weight in float64 would take gigabytes.
        exact = torch.cat([x @ w.double().T for w in weight.split(8192)], 1)
        exact = exact if bias is None else exact + bias.double()
        exact = _activate_64(exact, activation)
        exact = exact if residual is None else exact + residual.double()
        # The result; where they are not fused, the normalised x, and the product before the
        # activation, which then multiplies two of them and so doubles what they are off by.
        roundings = 1 + 4 + 4 * (norm is not None) if activation else 1 + (norm is not None)
        return relative(y, exact) / on.limit(roundings, depth=D)

    fused = [f"+{part}" for part in (kind, activation) if part] + ["+residual"] * has_residual
    values = N * D + T * (D + columns * (1 + has_residual))
    return Case(
        f"{T} x {D} -> {N} {name}",
        make=make,
        run=run,
        error=error,
        num_bytes=values * on.width,
        flops=2 * T * N * D,
        rivals={"cuBLAS" if on.gpu else "torch": lambda o: F.linear(o[0], o[1], o[2])},
        note=" ".join(fused),
    )


def _activate_64(y: Tensor, activation: str | None) -> Tensor:
    if activation == "relu2":
        return y.relu() ** 2
    if activation == "silu_and_mul":
        gate, up = y.chunk(2, -1)
        return F.silu(gate) * up
    assert activation is None
    return y


class Experts(NamedTuple):
    """Sizes of a mixture of experts, in the letters of docs/notation.md."""

    D: int
    F: int
    E: int
    A: int


def _experts(on: Setting) -> tuple[Experts, tuple[int, ...]]:
    """Our MoE, or on the CPU a smaller one; and the numbers of tokens."""
    if not on.gpu:
        return Experts(D=256, F=512, E=8, A=2), (1, 64)
    config = preset_config("moe-6.9b")
    assert config.moe is not None
    m = config.moe
    sizes = Experts(config.hidden_size, m.ffn_size, m.num_experts, m.num_active)
    return sizes, (1, 4, 8, 16, 64, 2048)


def moe_route_cases(on: Setting) -> list[Case]:
    sizes, tokens = _experts(on)
    D, E, A = sizes.D, sizes.E, sizes.A

    def case(T: int) -> Case:
        norm = on.norm("rmsnorm", D)

        def error(o: tuple[Tensor, Tensor], result: tuple[Tensor, Tensor]) -> float:
            weights, experts = result
            order = experts.sort(-1).values
            if not bool((order.diff(dim=-1) > 0).all() & (order >= 0).all() & (order < E).all()):
                return float("inf")
            probs = (norm_64(o[0], norm) @ o[1].double().T).softmax(-1)
            chosen = probs.gather(1, experts.long())
            # A rounding of the normalised x moves a logit, and so the logarithm of a probability,
            # by about as much: experts that are closer than that may change places.
            limit = 4 * on.limit(1, depth=D)
            ratio = (probs.topk(A).values / chosen).amax()
            wanted = chosen / chosen.sum(-1, keepdim=True)
            return (float(ratio - 1) + relative(weights, wanted)) / limit

        return Case(
            f"{T} x {D}, {A} of {E}",
            make=lambda: (on.draw(T, D), on.draw(E, D, scale=D**-0.5)),
            run=lambda o: moe_route(*o, norm=norm, num_active=A, renormalize=True),
            error=error,
            num_bytes=(T + E) * D * on.width + T * A * 8,
            flops=2 * T * E * D,
            note="+rmsnorm",
        )

    return [case(T) for T in tokens]


def moe_mlp_cases(on: Setting) -> list[Case]:
    sizes, tokens = _experts(on)
    return [_moe_mlp_case(on, T, sizes) for T in tokens]


def _moe_mlp_case(on: Setting, T: int, sizes: Experts) -> Case:
    D, width, E, A = sizes
    norm = on.norm("rmsnorm", D)

    def make() -> tuple[Tensor, ...]:
        weights, experts = torch.rand(T, E, device=on.device).topk(A)
        gate_up = on.draw(E, 2 * width, D, scale=D**-0.5)
        down = on.draw(E, D, width, scale=width**-0.5)
        return on.draw(T, D), weights / weights.sum(-1, keepdim=True), experts.int(), gate_up, down

    def error(o: tuple[Tensor, ...], y: Tensor) -> float:
        x, weights, experts, gate_up, down = o
        h = norm_64(x, norm)
        exact = x.double()
        for e in range(E):
            out = _activate_64(h @ gate_up[e].double().T, "silu_and_mul") @ down[e].double().T
            exact += out * ((experts == e) * weights.double()).sum(-1, keepdim=True)
        # The result, each expert's output, the activation; and doubled by it, as above, the
        # normalised x and the gate and up.
        return relative(y, exact) / on.limit(3 + 4 + 4, depth=width)

    touched = E * (1 - (1 - A / E) ** T)  # the expected number, each token choosing on its own
    return Case(
        f"{T} x {D}, {A} of {E} x {width}",
        make=make,
        run=lambda o: moe_mlp(o[0], norm, *o[1:], residual=o[0]),
        error=error,
        num_bytes=(touched * 3 * D * width + 2 * T * D) * on.width + T * A * 8,
        flops=6 * T * A * D * width,
        note="+rmsnorm +residual",
    )
