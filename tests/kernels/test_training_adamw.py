"""AdamW against torch.optim.AdamW, its narrow states against their bounds, kernel against reference."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hayate.errors import UsageError
from hayate.kernels._dispatch import use
from hayate.kernels.training import adamw_state, adamw_step, grad_norm
from hayate.kernels.training.quantization import (
    dequantize,
    quantize,
    random_bits,
    round_to_bfloat16,
)

SHAPES = [
    (40, 33),
    (5,),
    (3, 1100),
]  # below, at and beyond a tile of 1024; a last block that is not full
DECAY = [0.1, 0.0, 0.2]
HYPER = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": DECAY}
CPU = torch.device("cpu")


def gradients(step: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


@pytest.mark.parametrize("implementation", ["triton", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_is_torchs(implementation: str, dtype: torch.dtype) -> None:
    start = [torch.randn(shape).to(dtype) for shape in SHAPES]
    params = [p.clone() for p in start]
    states = [adamw_state(p) for p in params]
    masters = [p.float().requires_grad_() for p in start]
    groups = [{"params": [p], "weight_decay": d} for p, d in zip(masters, DECAY, strict=True)]
    optimizer = torch.optim.AdamW(groups, lr=HYPER["lr"], betas=(0.9, 0.95), eps=1e-8)
    for step in range(1, 4):
        grads = gradients(step, dtype)
        with use(implementation):
            adamw_step(params, grads, states, step=step, grad_scale=torch.tensor(0.5), **HYPER)
        for p, g in zip(masters, grads, strict=True):
            p.grad = 0.5 * g.float()
        optimizer.step()
    for p, state, master in zip(params, states, masters, strict=True):
        ours = p if dtype == torch.float32 else state.master.view_as(p)
        # In each of three steps two roundings of the weight, here and in torch (a fused multiply-add is one), and a
        # few of the update of 0.01.
        torch.testing.assert_close(ours, master.detach(), rtol=12 * 2.0**-24, atol=2e-8)
        if dtype == torch.bfloat16:
            # Rounded to nearest; Triton's interpreter cuts off.
            limit = 2.0**-7 if implementation == "triton" else 2.0**-8
            assert ((p.float() - ours).abs() <= limit * ours.abs() * 1.01).all()


@pytest.mark.parametrize("moments", ["bfloat16", "int8"])
@pytest.mark.parametrize("master", [True, False])
def test_kernel_is_the_reference(moments: str, master: bool) -> None:
    start = [torch.randn(shape).bfloat16() for shape in SHAPES]
    runs = []
    for implementation in ("reference", "triton"):
        params = [p.clone() for p in start]
        states = [adamw_state(p, moments=moments, master=master) for p in params]
        with use(implementation):
            for step in (1, 2):
                grads = gradients(step, torch.bfloat16)
                adamw_step(params, grads, states, step=step, seed=2**40 + 3, **HYPER)
        runs.append((params, states))
    (params_a, states_a), (params_b, states_b) = runs
    for a, b in zip(states_a, states_b, strict=True):
        for x, y in zip(a, b, strict=True):
            if x is not None:
                # The same random bits. Logarithms of the two libraries may differ in the last place, and
                # with it a rounding, but not more than one in a thousand.
                differs = ~torch.isclose(x.double(), y.double(), rtol=1e-5)
                assert differs.double().mean() <= 1e-3
    for a, b in zip(params_a, params_b, strict=True):
        # With a master copy the interpreter cuts off where the reference rounds.
        limit = 2.0**-7 if master else 0
        close = torch.isclose(a.float(), b.float(), rtol=limit, atol=0)
        assert (~close).double().mean() <= 1e-3


def test_philox_is_the_published_one() -> None:
    # Random123's known answers for philox4x32, 7 rounds: counter and key zero, and all ones.
    assert random_bits(0, 0, 0, 4, CPU).tolist() == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    # A part of the elements has the bits that it has in the whole.
    assert torch.equal(random_bits(7, 3, 256, 100, CPU), random_bits(7, 3, 0, 356, CPU)[256:])
    assert not torch.equal(random_bits(7, 3, 0, 100, CPU), random_bits(7, 4, 0, 100, CPU))
    assert not torch.equal(random_bits(7, 3, 0, 100, CPU), random_bits(8, 3, 0, 100, CPU))


def test_stochastic_rounding_to_bfloat16_keeps_the_mean() -> None:
    n = 200_000
    for value in (1.0 + 2.0**-10, -3.3e-5, 1.9990234375):
        x = torch.full((n,), value)
        rounded = round_to_bfloat16(x, random_bits(1, 1, 0, n, CPU) & 0xFFFF).double()
        down, up = rounded.min().item(), rounded.max().item()
        assert down <= value <= up
        assert up - down <= 2.0**-7 * abs(value)
        # Each is one of two neighbours: the mean of n has a deviation of at most half their distance over
        # sqrt(n); five of them.
        assert abs(rounded.mean().item() - value) <= 5 * (up - down) / 2 / math.sqrt(n) + 1e-12


def test_updates_below_the_spacing_of_bfloat16_arrive() -> None:
    """Ten steps of a thirtieth of a unit in the last place each: lost to nearest rounding, here on average."""
    n, lr = 50_000, 2.0**-12
    param = torch.full((n,), 1.5, dtype=torch.bfloat16)
    state = [adamw_state(param, master=False)]
    for step in range(1, 11):
        adamw_step(
            [param], [torch.ones_like(param)], state, lr=lr, beta1=0.9, beta2=0.95, eps=1e-8,
            weight_decay=[0.0], step=step, seed=11,
        )  # fmt: skip
    # A constant gradient moves by lr each step; every step adds at most half a spacing (2^-8) of deviation.
    deviation = math.sqrt(10) * 2.0**-8
    assert abs(param.double().mean().item() - (1.5 - 10 * lr)) <= 5 * deviation / math.sqrt(n)


@pytest.mark.parametrize("signed", [True, False])
def test_codes_of_8_bits_are_near_and_never_zero(signed: bool) -> None:
    n = 5000
    x = torch.randn(n) * torch.exp(2 * torch.randn(n))
    x = x if signed else x.square()
    x[:256] = 0
    codes, scales = quantize(x, random_bits(1, 2, 0, n, CPU) & 0xFF, signed=signed)
    assert codes.dtype == (torch.int8 if signed else torch.uint8)
    y = dequantize(codes, scales)
    blocks = torch.nn.functional.pad(x, (0, -n % 256)).view(-1, 256)
    floor = blocks.abs().amax(1).repeat_interleave(256)[:n]
    floor = floor * 2.0 ** (-(126 if signed else 254) * 2 / 21)
    # One of the two neighbours, which differ by a factor of 2^(2/21); logarithms err in the last places.
    inside = (x.abs() >= floor) & (x != 0)
    ratio = y[inside].abs() / x[inside].abs()
    assert ratio.max() <= 2.0 ** (2 / 21) * 1.0001
    assert ratio.min() >= 2.0 ** (-2 / 21) * 0.9999
    assert (y * x >= 0).all()
    assert (y[~inside].abs() <= floor[~inside] * 1.0001).all()
    assert (y[:256] == 0).all()
    if not signed:
        assert (y[x > 0] > 0).all()


@pytest.mark.parametrize("signed", [True, False])
def test_codes_of_8_bits_keep_the_mean(signed: bool) -> None:
    n = 256 * 400
    x = torch.full((n,), 0.37)
    x[::256] = 1.0  # the scale of each block
    codes, scales = quantize(x, random_bits(3, 9, 0, n, CPU) & 0xFF, signed=signed)
    y = dequantize(codes, scales).view(-1, 256)
    assert (y[:, 0] == 1.0).all()
    rest = y[:, 1:].double()
    distance = (rest.max() - rest.min()).item()
    assert 0 < distance <= 0.37 * (2 ** (2 / 21) - 2 ** (-2 / 21))
    # Half the distance over sqrt(n), five times; and 8 bits of probability, half a step of them at most.
    limit = distance * (2.5 / math.sqrt(rest.numel()) + 2.0**-9)
    assert abs(rest.mean().item() - x[1].item()) <= limit


@pytest.mark.parametrize("moments", ["float32", "bfloat16", "int8"])
def test_every_state_reaches_the_minimum(moments: str) -> None:
    """A quadratic of badly scaled coordinates: what the narrow states are for."""
    target, curvature = torch.randn(2000), torch.exp(3 * torch.randn(2000))
    param = torch.zeros(2000)
    state = [adamw_state(param, moments=moments)]
    for step in range(1, 301):
        grad = curvature * (param - target)
        adamw_step(
            [param], [grad], state, lr=0.05 * (1 - step / 301), beta1=0.9, beta2=0.95, eps=1e-12,
            weight_decay=[0.0], step=step,
        )  # fmt: skip
    assert (param - target).abs().mean() < 0.02


@pytest.mark.parametrize("implementation", ["triton", "auto"])
def test_grad_norm(implementation: str) -> None:
    grads = [*gradients(1), torch.randn(2500).half()]
    with use(implementation):
        norm = grad_norm(grads)
        assert torch.equal(norm, grad_norm(grads))
        grads[1][2] = float("inf")
        assert not grad_norm(grads).isfinite()
        assert grad_norm([]).item() == 0.0
    truth = torch.cat([g.double().flatten() for g in gradients(1)] + [grads[3].double()]).norm()
    torch.testing.assert_close(norm.double(), truth, rtol=1e-6, atol=0)
    assert norm.dtype == torch.float32


def test_what_it_cannot_take_is_refused() -> None:
    param = torch.zeros(8)
    with pytest.raises(UsageError, match=r"gradient \(4,\)"):
        adamw_step(
            [param], [param[:4]], [adamw_state(param)], step=1, **HYPER | {"weight_decay": [0]}
        )
    half = param.half()
    with pytest.raises(UsageError, match="float32 and bfloat16"):
        adamw_step([half], [half], [adamw_state(half)], step=1, **HYPER | {"weight_decay": [0]})
    with use("triton"), pytest.raises(UsageError, match="multiple of 16 bytes"):
        grad_norm([param[1:]])
