"""The native CPU forms of training, against PyTorch's autograd in float64; any number of threads, the same bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hayate.kernels.cpu import native_status
from hayate.kernels.training import cpu, experts_mlp, linear_cross_entropy
from hayate.kernels.training.adamw import adamw_state, adamw_step

pytestmark = pytest.mark.skipif(
    not native_status().startswith("ready"), reason="no C compiler on this machine"
)

# Sums of up to 300 products and a dozen elementwise roundings of 2^-24 each, relative to the largest element.
TOLERANCE = 32 * 2**-24
WIDTHS = (1, 7, 16, 37, 300)  # below, at and between whole vectors


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def assert_close(ours: Tensor, truth: Tensor) -> None:
    assert ours.shape == truth.shape
    error = (ours.double() - truth).abs().max() if truth.numel() else torch.zeros(())
    assert error <= TOLERANCE * truth.abs().max().clamp(min=1e-30), float(error)


def wide(*tensors: Tensor) -> list[Tensor]:
    return [x.detach().double().requires_grad_() for x in tensors]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    "rows", [1, 130, 257]
)  # one, two and three partial sums of the weight's gradient
def test_rmsnorm(rows: int, width: int) -> None:
    x, w, dy = torch.randn(rows, width), torch.randn(width), torch.randn(rows, width)
    x64, w64 = wide(x, w)
    truth = x64 * torch.rsqrt(x64.square().mean(-1, keepdim=True) + 1e-5) * w64
    truth.backward(dy.double())
    assert_close(cpu.rmsnorm(x, w, 1e-5), truth.detach())
    dx, dw = cpu.rmsnorm_backward(x, dy, w, 1e-5)
    # One element alone nearly cancels: dx is eps / (x^2 + eps) of the two terms whose difference it is.
    if width > 1:
        assert_close(dx, x64.grad)
    assert_close(dw, w64.grad)


@pytest.mark.parametrize("width", WIDTHS)
def test_swiglu(width: int) -> None:
    h, g = torch.randn(9, 2 * width) * 4, torch.randn(9, width)
    weights, order = torch.rand(3, 3), torch.randperm(9)
    h64, w64 = wide(h, weights)
    gate, up = h64.chunk(2, dim=1)
    act = F.silu(gate) * up
    assert_close(cpu.swiglu(h), act.detach())
    act.backward(g.double(), retain_graph=True)
    dh, none = cpu.swiglu_backward(h, g.clone())
    assert none is None
    assert_close(dh, h64.grad)
    h64.grad = None
    weighted = act * w64.flatten()[order, None]
    weighted.backward(g.double())
    in_place = g.clone()
    dh, dweights = cpu.swiglu_backward(h, in_place, order, weights)
    assert dweights is not None
    assert_close(dh, h64.grad)
    assert_close(dweights, w64.grad)
    assert_close(in_place, weighted.detach())


@pytest.mark.parametrize("width", WIDTHS)
def test_combine_rows(width: int) -> None:
    y, place, weights = torch.randn(12, width), torch.randperm(12), torch.rand(4, 3)
    rows = y.double()[place].view(4, 3, width)
    assert_close(cpu.combine_rows(y, place, 3, None), rows.sum(1))
    truth = (rows * weights.double()[..., None]).sum(1)
    assert_close(cpu.combine_rows(y, place, 3, weights), truth)


@pytest.mark.parametrize(("dim", "rotary"), [(16, 16), (24, 8), (64, 64), (40, 40)])
def test_heads(dim: int, rotary: int) -> None:
    H, G, T = 3, 2, 5
    qkv, angles = torch.randn(T, (H + 2 * G) * dim), torch.rand(11, rotary // 2) * 6
    cos_sin, positions = torch.cat([angles.cos(), angles.sin()], 1), torch.randint(0, 11, (T,))
    (x,) = wide(qkv)
    turned = torch.polar(torch.ones_like(angles).double(), cos_sin_angle(cos_sin))[positions]
    parts = x.view(T, -1, dim).split([H, G, G], dim=1)
    truth = (*(rotate(part, turned) for part in parts[:2]), parts[2])
    ours = cpu.split_heads(qkv, cos_sin, positions, H, G)
    grads = [torch.randn_like(part) for part in ours]
    for part, expected in zip(ours, truth, strict=True):
        assert_close(part, expected.detach())
    torch.autograd.backward(truth, [g.double() for g in grads])
    assert_close(cpu.join_heads(*grads, cos_sin, positions), x.grad)


def cos_sin_angle(cos_sin: Tensor) -> Tensor:
    cos, sin = cos_sin.double().chunk(2, dim=1)
    return torch.atan2(sin, cos)


def rotate(x: Tensor, turned: Tensor) -> Tensor:
    """Pairs (i, i + half) as complex numbers."""
    half = turned.shape[1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    z = torch.complex(first, second) * turned[:, None]
    return torch.cat([z.real, z.imag, rest], dim=-1)


def test_a_position_beyond_the_table_is_refused() -> None:
    with pytest.raises(IndexError, match=r"outside 0\.\.3"):
        cpu.split_heads(torch.zeros(1, 24), torch.zeros(4, 8), torch.tensor([4]), 1, 1)


@pytest.mark.parametrize("width", WIDTHS)
def test_cross_entropy(width: int) -> None:
    logits = torch.randn(6, width) * 5
    logits[1] += 80.0  # beyond what e^x holds
    targets = torch.randint(0, width, (6,))
    targets[2] = -100
    if width > 1:
        logits[3, targets[3]] = -200.0  # its probability underflows, its loss does not
    (z,) = wide(logits)
    truth = F.cross_entropy(z, targets, reduction="none")
    truth.sum().backward()
    loss, alone = torch.empty(6), torch.empty(6)
    cpu.cross_entropy(logits, targets, alone, with_grad=False)
    cpu.cross_entropy(logits, targets, loss, with_grad=True)
    assert torch.equal(loss, alone)
    # What is lost is relative to the logits, up to 100, not to a loss near zero.
    assert (loss.double() - truth).abs().max() <= 100 * TOLERANCE
    # e^x to 2 units; the exponent itself, up to 30, is rounded by 2^-24 of it.
    assert (logits.double() - z.grad).abs().max() <= 30 * 2**-23


def test_cross_entropy_of_nan_infinity_and_bad_targets() -> None:
    logits, loss = torch.randn(2, 40), torch.empty(2)
    logits[0, 3], logits[1, 39] = float("nan"), float("inf")
    cpu.cross_entropy(logits.clone(), torch.tensor([0, 0]), loss, with_grad=True)
    assert not torch.isfinite(loss).any()
    for bad in (40, -1):
        with pytest.raises(IndexError, match=r"outside 0\.\.39"):
            cpu.cross_entropy(logits, torch.tensor([0, bad]), loss, with_grad=False)


@pytest.mark.parametrize("native", [True, False], ids=["native", "no compiler"])
@pytest.mark.parametrize("upstream", [1.0, 0.25])
def test_linear_cross_entropy_in_chunks(
    native: bool, upstream: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native:
        monkeypatch.setattr(cpu, "fits", lambda *tensors: False)
    monkeypatch.setattr("hayate.kernels.training.cross_entropy._chunks", lambda x, vocab_size: 8)
    x, head, targets = torch.randn(21, 12), torch.randn(50, 12), torch.randint(0, 50, (21,))
    x64, head64 = wide(x, head)
    truth = F.cross_entropy(x64 @ head64.T, targets) * upstream
    truth.backward()
    x.requires_grad_(), head.requires_grad_()
    (linear_cross_entropy(x, head, targets, normalizer=21.0) * upstream).backward()
    assert_close(x.grad, x64.grad)
    assert_close(head.grad, head64.grad)


def test_adamw_is_that_of_pytorch_in_float64() -> None:
    param = torch.randn(1003)
    truth = param.double().requires_grad_()
    options = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    optimizer = torch.optim.AdamW([truth], **options)
    state = adamw_state(param)
    for step in range(1, 6):
        grad = torch.randn(1003)
        truth.grad = grad.double() * 0.5
        optimizer.step()
        adamw_step(
            [param], [grad], [state], lr=3e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=[0.1],
            step=step, grad_scale=torch.tensor(0.5),
        )  # fmt: skip
    # A step rounds a weight, up to 4, once, and an update of at most about lr a few times.
    assert (param.double() - truth.detach()).abs().max() <= 5 * 4 * 2**-24
    moments = optimizer.state[truth]
    assert_close(state.first, moments["exp_avg"])
    assert_close(state.second, moments["exp_avg_sq"])


def test_adamw_of_a_part_is_that_part() -> None:
    """Processes that share out a parameter get the bits of one that has it all."""
    param, grad = torch.randn(5000), torch.randn(5000)
    pieces = [param[:1237].clone(), param[1237:].clone()]
    options = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "step": 1}
    adamw_step([param], [grad], [adamw_state(param)], weight_decay=[0.1], **options)
    states = [adamw_state(piece) for piece in pieces]
    parts = [grad[:1237], grad[1237:]]
    adamw_step(pieces, parts, states, weight_decay=[0.1, 0.1], **options)
    assert torch.equal(torch.cat(pieces), param)


def test_threads_change_no_bit(threads: Callable[[int], None]) -> None:
    x, dy, w = torch.randn(700, 96), torch.randn(700, 96), torch.randn(96)
    targets, order = torch.randint(0, 96, (700,)), torch.randperm(700)

    def results(count: int) -> list[Tensor]:
        threads(count)
        logits, loss, g, param = x.clone(), torch.empty(700), dy[:, :48].clone(), x.flatten()
        cpu.cross_entropy(logits, targets, loss, with_grad=True)
        heads = cpu.swiglu_backward(x, g, order, w.repeat(8)[:700])
        param = param.clone()
        adamw_step(
            [param], [dy.flatten()], [adamw_state(param)], lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8,
            weight_decay=[0.1], step=1,
        )  # fmt: skip
        norm = cpu.rmsnorm_backward(x, dy, w, 1e-5)
        return [logits, loss, g, param, *(t for t in heads if t is not None), *norm]

    for one, three in zip(results(1), results(3), strict=True):
        assert torch.equal(one, three)


@pytest.mark.parametrize("native", [True, False], ids=["native", "no compiler"])
@pytest.mark.parametrize("recompute", [False, True])
def test_experts(native: bool, recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setattr(cpu, "fits", lambda *tensors: False)
    T, D, width, E, A = 23, 20, 13, 4, 2
    x, weights = torch.randn(T, D), torch.rand(T, A)
    gate_up, down = torch.randn(E, 2 * width, D) / 4, torch.randn(E, D, width) / 4
    experts = torch.stack([torch.randperm(E)[:A] for _ in range(T)]).int()
    truth = wide(x, weights, gate_up, down)
    leaves = [t.requires_grad_() for t in (x, weights, gate_up, down)]
    dout = torch.randn(T, D)
    expected = sum(
        truth[1][:, a, None]
        * torch.stack([_expert(truth, t, int(experts[t, a])) for t in range(T)])
        for a in range(A)
    )
    expected.backward(dout.double())
    out = experts_mlp(x, weights, experts, gate_up, down, recompute=recompute)
    out.backward(dout)
    assert_close(out.detach(), expected.detach())
    for leaf, wide_leaf in zip(leaves, truth, strict=True):
        assert_close(leaf.grad, wide_leaf.grad)


def _expert(truth: list[Tensor], token: int, expert: int) -> Tensor:
    x, _, gate_up, down = truth
    gate, up = (gate_up[expert] @ x[token]).chunk(2)
    return down[expert] @ (F.silu(gate) * up)
