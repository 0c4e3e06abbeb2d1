"""Norm, activations, heads, router and loss of training: outputs and gradients against float64."""

from __future__ import annotations

import pytest
import torch
from tests import training_formulas as formulas
from tests.training_formulas import compare, relative_error

from hayate.errors import UsageError
from hayate.kernels import training
from hayate.kernels._dispatch import Implementation, use
from hayate.kernels.norm import Norm
from hayate.kernels.training import cross_entropy

EPS = 1e-5
IMPLEMENTATIONS: tuple[Implementation, ...] = ("reference", "triton", "auto")
F32 = torch.float32


@pytest.fixture(params=IMPLEMENTATIONS, autouse=True)
def _implementation(request: pytest.FixtureRequest):
    with use(request.param):
        yield


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm1p", "layernorm1p without bias"])
@pytest.mark.parametrize(("T", "D", "dtype"), [(5, 40, F32), (1, 7, F32), (3, 130, torch.float16)])
def test_norm(kind: str, T: int, D: int, dtype: torch.dtype) -> None:
    kind, _, without = kind.partition(" ")
    count = 1 if kind == "rmsnorm" or without else 2
    compare(
        lambda x, w, b=None: training.norm(x, Norm(kind, w, b, EPS)),
        lambda x, w, b=None: formulas.norm(x, w, b, kind, EPS),
        [torch.randn(T, D).to(dtype), *(torch.randn(D).to(dtype) for _ in range(count))],
        # One of the result; the reference and the kernels take the rest in fp32. For fp32 that is not free.
        roundings=8 if dtype == F32 else 1.5,
        dtype=dtype,
    )


def test_norm_sums_rows_of_many_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hayate.kernels.training.norms.num_sms", lambda device: 1)
    compare(
        lambda x, w: training.norm(x, Norm("rmsnorm", w, None, EPS)),
        lambda x, w: formulas.norm(x, w, None, "rmsnorm", EPS),
        [torch.randn(9, 20), torch.randn(20)],  # 4 programs, 3 rows each, the last none
        roundings=8,
        dtype=F32,
    )


@pytest.mark.parametrize("name", ["silu_and_mul", "relu2"])
@pytest.mark.parametrize("dtype", [F32, torch.float16])
def test_activation(name: str, dtype: torch.dtype) -> None:
    h = (torch.randn(5, 66) * 2).to(dtype)
    roundings = 8 if dtype == F32 else 3  # the reference rounds parts of the gradient
    compare(getattr(training, name), getattr(formulas, name), [h], roundings=roundings, dtype=dtype)


@pytest.mark.parametrize("norm", [None, "head", "full"])
@pytest.mark.parametrize(("heads", "rotary"), [((3, 1, 16), 16), ((5, 2, 24), 8)])
@pytest.mark.parametrize("clip", [None, 0.8])
def test_split_heads(
    norm: str | None, heads: tuple[int, int, int], rotary: int, clip: float | None
) -> None:
    (H, G, K), T = heads, 5
    angles = torch.rand(30, rotary // 2) * 6
    positions = torch.randint(0, 30, (T,))
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1)
    sizes = {None: (), "head": (K, K), "full": (H * K, G * K)}[norm]

    def ours(qkv, *w):
        q_norm, k_norm = [Norm("rmsnorm", x, None, EPS) for x in w] or (None, None)
        return training.split_heads(
            qkv, cos_sin, positions, num_heads=H, num_kv_heads=G, head_dim=K,
            q_norm=q_norm, k_norm=k_norm, clip=clip,
        )  # fmt: skip

    compare(
        ours,
        lambda qkv, *w: formulas.split_heads(
            qkv, angles.double(), positions, heads, w or None, EPS, clip
        ),
        [torch.randn(T, (H + 2 * G) * K), *(torch.rand(n) + 0.5 for n in sizes)],
        roundings=8,
        dtype=F32,
    )


def test_split_heads_sums_tokens_of_many_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hayate.kernels.training.heads._PROGRAMS_PER_SM", 2)
    monkeypatch.setattr("hayate.kernels.training.heads.num_sms", lambda device: 1)
    test_split_heads("head", (3, 1, 16), 16, None)


@pytest.mark.parametrize(("E", "A"), [(5, 2), (8, 8), (20, 3)])
@pytest.mark.parametrize(("renormalize", "biased"), [(True, False), (False, True), (True, True)])
def test_route(E: int, A: int, renormalize: bool, biased: bool) -> None:
    bias = torch.randn(E) * 0.1 if biased else None
    x, weight = torch.randn(70, 33), torch.randn(E, 33) * 0.3
    experts = []

    def ours(x, w):
        result = training.route(x, w, num_active=A, renormalize=renormalize, selection_bias=bias)
        experts.append(result[2])
        return result

    def truth(x, w):
        *result, chosen = formulas.route(
            x, w, A, renormalize, None if bias is None else bias.double()
        )
        experts.append(chosen)
        return tuple(result)

    # Sums of 33 products and of 20 probabilities.
    compare(ours, truth, [x, weight], roundings=16, dtype=F32)
    assert experts[-1].dtype == torch.int32
    assert torch.equal(experts[-1].long(), experts[0])


def test_route_ties_and_partial_gradients() -> None:
    weight = torch.zeros(
        6, 4, requires_grad=True
    )  # all experts are equally good: the lowest indices win
    x = torch.randn(3, 4, requires_grad=True)
    _, weights, experts = training.route(x, weight, num_active=2, renormalize=False)
    assert experts.tolist() == [[0, 1]] * 3
    # Only the logits, only the weights, and neither may take part in the loss.
    weights[:, 0].sum().backward()
    # d p_0 / d logit_e = p_0 (delta_0e - p_e), p = 1/6
    slope = torch.full((6,), -1 / 36)
    slope[0] += 1 / 6
    torch.testing.assert_close(weight.grad, slope[:, None] * x.detach().sum(0))
    weight.grad = None
    logits = training.route(x, weight, num_active=2, renormalize=False)[0]
    logits.sum().backward()
    torch.testing.assert_close(weight.grad, x.detach().sum(0).expand(6, 4))


def test_load_balance_loss() -> None:
    L, E, A = 8, 4, 2
    logits = torch.randn(3 * L, E)
    experts = torch.stack([torch.randperm(E)[:A] for _ in range(3 * L)]).to(torch.int32)

    def truth(logits):
        losses = []
        for part, chosen in zip(logits.split(L), experts.split(L), strict=True):
            share = [(chosen == e).sum() / (L * A) for e in range(E)]
            mean = part.softmax(-1).mean(0)
            losses.append(E * sum(f * p for f, p in zip(share, mean, strict=True)))
        return sum(losses) / 3

    def ours(logits):
        return training.load_balance_loss(logits, experts, None, sequence_length=L)

    compare(ours, truth, [logits], roundings=8, dtype=F32)

    # Micro-batches weighted by their sequences give the gradient of the batch.
    whole, parts = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    ours(whole).backward()
    for rows, share in ((slice(0, L), 1 / 3), (slice(L, None), 2 / 3)):
        loss = training.load_balance_loss(parts[rows], experts[rows], None, sequence_length=L)
        (share * loss).backward()
    torch.testing.assert_close(parts.grad, whole.grad)

    # The global form, with shares from elsewhere, is linear in the mean probabilities.
    share = torch.tensor([0.7, 0.1, 0.1, 0.1])
    compare(
        lambda z: training.load_balance_loss(z, experts, share, sequence_length=L),
        lambda z: E * (share.double() * z.softmax(-1).mean(0)).sum(),
        [logits],
        roundings=8,
        dtype=F32,
    )


def test_load_balance_loss_is_one_when_balanced_and_z_loss() -> None:
    logits = torch.zeros(8, 4)
    experts = torch.arange(8, dtype=torch.int32)[:, None] % 4
    assert training.load_balance_loss(logits, experts, None, sequence_length=4).item() == 1.0
    one = torch.zeros(8, 1, dtype=torch.int32)
    logits = torch.tensor([50.0, 0, 0, 0]).expand(8, 4)
    assert training.load_balance_loss(logits, one, None, sequence_length=8).item() == 4.0
    compare(
        training.router_z_loss,
        lambda z: (torch.log(torch.exp(z).sum(-1)) ** 2).mean(),
        [torch.randn(6, 5)],
        roundings=8,
        dtype=F32,
    )


@pytest.mark.parametrize("dtype", [F32, torch.float16])
def test_linear_cross_entropy(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    T, D, V = 130, 24, 300
    monkeypatch.setattr(cross_entropy, "_CPU_BYTES", 1)
    monkeypatch.setattr(cross_entropy, "_LEAST_ROWS", 64)  # three parts
    targets = torch.randint(0, V, (T,))
    targets[[0, 5, 129]] = -100
    inputs = [torch.randn(T, D).to(dtype), torch.randn(V, D).to(dtype)]
    compare(
        lambda x, head: training.linear_cross_entropy(x, head, targets, normalizer=7.0),
        lambda x, head: formulas.cross_entropy(x, head, targets).sum() / 7,
        inputs,
        roundings=16 if dtype == F32 else 3,  # the gradient of the logits and the result
        dtype=dtype,
    )
    losses = training.linear_cross_entropy_per_token(*inputs, targets)
    truth = formulas.cross_entropy(*(x.double() for x in inputs), targets)
    assert losses.dtype == F32
    assert relative_error(losses, truth) < 1e-6
    assert losses[[0, 5, 129]].tolist() == [0.0] * 3


def test_cross_entropy_of_large_logits_and_upstream() -> None:
    x = torch.tensor([[1e4, -1e4]], requires_grad=True)
    loss = training.linear_cross_entropy(x, torch.eye(2), torch.tensor([1]), normalizer=1.0)
    assert loss.item() == 2e4
    (loss * 0.5).backward()
    assert x.grad.tolist() == [[0.5, -0.5]]


def test_wrong_shapes_are_refused() -> None:
    x = torch.zeros(4, 8)
    with pytest.raises(UsageError, match=r"weight \(D,\)"):
        training.norm(x, Norm("rmsnorm", torch.zeros(7), None, EPS))
    with pytest.raises(UsageError, match=r"\(T, 2F\)"):
        training.silu_and_mul(torch.zeros(4, 7))
    with pytest.raises(UsageError, match=r"num_active must be in 1\.\.3, got 4"):
        training.route(x, torch.zeros(3, 8), num_active=4, renormalize=True)
    with pytest.raises(UsageError, match="4 tokens are not whole sequences of 3"):
        training.load_balance_loss(x, x.int(), None, sequence_length=3)
    with pytest.raises(UsageError, match=r"qkv \(T, 48\)"):
        training.split_heads(x, x, x, num_heads=1, num_kv_heads=1, head_dim=16)
    with pytest.raises(UsageError, match=r"targets \(T,\)"):
        training.linear_cross_entropy(x, x, torch.zeros(3, dtype=torch.int64), normalizer=1.0)
