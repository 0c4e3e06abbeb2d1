"""The operations of training in bf16 on the GPU, outputs and gradients, against float64; graphs, determinism."""

from __future__ import annotations

import pytest
import torch

from hayate.kernels import training
from hayate.kernels.norm import Norm
from hayate.kernels.training import grouped_gemm
from tests import training_formulas as formulas
from tests.training_formulas import ROUNDING, compare, relative_error

BF16 = torch.bfloat16
EPS = 1e-5


def draw(*shape: int, scale: float = 1.0, dtype: torch.dtype = BF16) -> torch.Tensor:
    return (torch.randn(*shape, device="cuda") * scale).to(dtype)


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm1p"])
@pytest.mark.parametrize(("T", "D"), [(1, 64), (333, 768), (50, 5000)])
def test_norm(kind: str, T: int, D: int) -> None:
    parameters = [draw(D)] + [draw(D)] * (kind == "layernorm1p")
    compare(
        lambda x, w, b=None: training.norm(x, Norm(kind, w, b, EPS)),
        lambda x, w, b=None: formulas.norm(x, w, b, kind, EPS),
        [draw(T, D), *parameters],
        roundings=1.5,  # one, and the square root of the rest's fp32
        dtype=BF16,
    )


@pytest.mark.parametrize("name", ["silu_and_mul", "relu2"])
def test_activation(name: str) -> None:
    compare(
        getattr(training, name),
        getattr(formulas, name),
        [draw(77, 2000)],
        roundings=1.5,
        dtype=BF16,
    )


@pytest.mark.parametrize("norm", [None, "head", "full"])
@pytest.mark.parametrize(("heads", "rotary"), [((12, 1, 64), 64), ((6, 2, 80), 32)])
def test_split_heads(norm: str | None, heads: tuple[int, int, int], rotary: int) -> None:
    H, G, K = heads
    T, clip = 99, 1.5 if norm == "full" else None
    angles = torch.rand(300, rotary // 2, device="cuda") * 6
    positions = torch.randint(0, 300, (T,), device="cuda")
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
        [draw(T, (H + 2 * G) * K), *[1 + draw(n, scale=0.1) for n in sizes]],
        roundings=1.5,
        dtype=BF16,
    )


def document_starts(windows: int, length: int, documents: int) -> torch.Tensor:
    starts = torch.zeros(windows, length, dtype=torch.int32)
    for row in starts:
        for cut in sorted(torch.randint(1, length, (documents - 1,)).tolist()):
            row[cut:] = cut
    starts += torch.arange(windows, dtype=torch.int32)[:, None] * length
    return starts.flatten().cuda()


@pytest.mark.parametrize("heads", [(12, 1, 64), (4, 4, 96), (8, 2, 128)])
@pytest.mark.parametrize(
    ("length", "documents", "window"),
    [(256, 1, None), (333, 4, None), (300, 2, 70), (130, 100, None)],
)
def test_document_attention(
    heads: tuple[int, int, int], length: int, documents: int, window: int | None
) -> None:
    (H, G, K), windows = heads, 2
    T, starts = windows * length, document_starts(windows, length, documents)
    compare(
        lambda q, k, v: training.document_attention(
            q, k, v, starts, sequence_length=length, scale=K**-0.5, window=window,
            whole_windows=documents == 1,
        ),
        lambda q, k, v: formulas.attention(q, k, v, starts.tolist(), K**-0.5, window),
        [draw(T, H, K), draw(T, G, K), draw(T, G, K)],
        # p, ds, out (in delta) and the result are rounded; dp - delta cancels to about half.
        roundings=8,
        dtype=BF16,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("E", "A", "renormalize", "biased"), [(16, 4, True, False), (128, 8, False, True)]
)
def test_route(E: int, A: int, renormalize: bool, biased: bool) -> None:
    bias = torch.randn(E, device="cuda") * 0.01 if biased else None
    x, weight = draw(500, 768), draw(E, 768, scale=0.05)
    chosen = []

    def ours(x, w):
        result = training.route(x, w, num_active=A, renormalize=renormalize, selection_bias=bias)
        chosen.append(result[2].long())
        return result

    def truth(x, w):
        logits = x @ w.T
        p = torch.softmax(logits, -1)
        weights = p.gather(1, chosen[0])
        return logits, weights / weights.sum(-1, keepdim=True) if renormalize else weights

    ours(x, weight)
    # Selection: nothing that was left out has a larger score than what was taken, but for fp32 rounding.
    score = torch.softmax(x.double() @ weight.double().T, -1) + (0 if bias is None else bias)
    left_out = score.scatter(1, chosen[0], -1.0).amax(1)
    assert (score.gather(1, chosen[0]).amin(1) >= left_out - 1e-6).all()
    # The gradient of the logits is rounded once, dx or dweight once more.
    compare(ours, truth, [x, weight], roundings=3, dtype=BF16)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("T", "D", "F", "E", "A"), [(200, 768, 512, 16, 4), (64, 256, 128, 8, 2)])
def test_experts_mlp(T: int, D: int, F: int, E: int, A: int, recompute: bool) -> None:
    experts = torch.stack([torch.randperm(E - 2)[:A] for _ in range(T)])  # two experts stay empty
    experts = experts.to(torch.int32).cuda()
    compare(
        lambda x, w, gate_up, down: training.experts_mlp(
            x, w.float(), experts, gate_up, down, recompute=recompute
        ),
        lambda x, w, gate_up, down: formulas.experts_mlp(x, w, experts, gate_up, down),
        [
            draw(T, D),
            torch.rand(T, A, device="cuda").to(BF16),
            draw(E, 2 * F, D, scale=D**-0.5),
            draw(E, D, F, scale=F**-0.5),
        ],
        # h (twice: silu is not linear), the activation, y or dh, and the result.
        roundings=6,
        dtype=BF16,
    )


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_experts_add_to_gradients_that_exist(dtype: torch.dtype) -> None:
    T, D, F, E, A = 300, 256, 128, 4, 2
    experts = torch.stack([torch.randperm(E)[:A] for _ in range(T)]).to(torch.int32).cuda()
    x, weights = draw(T, D), torch.rand(T, A, device="cuda")
    gate_up, down = draw(E, 2 * F, D, scale=0.06), draw(E, D, F, scale=0.09)
    first = [w.clone().requires_grad_() for w in (gate_up, down)]
    training.experts_mlp(x, weights, experts, *first).sum().backward()
    second = [w.clone().requires_grad_() for w in (gate_up, down)]
    for w in second:
        w.grad_dtype = dtype
        w.grad = torch.ones_like(w, dtype=dtype)
    buffers = [w.grad for w in second]
    training.experts_mlp(x, weights, experts, *second).sum().backward()
    for a, b, buffer in zip(first, second, buffers, strict=True):
        assert b.grad is buffer
        # The gradient itself is rounded to bf16 on both sides, the sum to `dtype`.
        assert relative_error(b.grad, a.grad.double() + 1) <= 3 * ROUNDING[BF16]


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_own_grouped_products(dtype: torch.dtype) -> None:
    E, N, K = 5, 200, 96
    ends = torch.tensor([0, 300, 301, 301, 430], dtype=torch.int32, device="cuda")
    x, y = draw(430, K, dtype=dtype), draw(430, N, dtype=dtype)
    w = draw(E, N, K, dtype=dtype)
    expert = torch.searchsorted(ends, torch.arange(430, device="cuda"), right=True)
    limit = 1.5 * ROUNDING[dtype] + 1e-5
    rows = torch.einsum("rk,rnk->rn", x.double(), w.double()[expert])
    for weight, k_by_n in ((w, False), (w.transpose(1, 2).contiguous(), True)):
        got = grouped_gemm.grouped_rows_triton(x, weight, ends, k_by_n=k_by_n)
        assert relative_error(got, rows) <= limit
    one_hot = torch.nn.functional.one_hot(expert, E).double()
    outer = torch.einsum("re,rn,rk->enk", one_hot, y.double(), x.double())
    out = torch.ones(E, N, K, device="cuda")
    grouped_gemm.grouped_outer_triton(y, x, ends, out, accumulate=True)
    assert relative_error(out, outer + 1) <= limit


def test_linear_cross_entropy() -> None:
    T, D, V = 700, 256, 5001
    targets = torch.randint(0, V, (T,), device="cuda")
    targets[10:50] = -100
    compare(
        lambda x, head: training.linear_cross_entropy(x, head, targets, normalizer=50.0),
        lambda x, head: formulas.cross_entropy(x, head, targets).sum() / 50,
        [draw(T, D), draw(V, D, scale=0.1)],
        roundings=3,  # the gradient of the logits, the result, and upstream's product
        dtype=BF16,
    )
    x, head = draw(T, D), draw(V, D, scale=0.1)
    losses = training.linear_cross_entropy_per_token(x, head, targets)
    assert (
        relative_error(losses, formulas.cross_entropy(x.double(), head.double(), targets)) <= 1e-5
    )


@pytest.mark.parametrize("moments", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("master", [True, False])
def test_adamw_is_its_reference(moments: str, master: bool) -> None:
    shapes = [(1000, 300), (7,), (33_000,)]
    start = [draw(*s) for s in shapes]
    runs = []
    for device in ("cuda", "cpu"):
        params = [p.clone().to(device) for p in start]
        states = [training.adamw_state(p, moments=moments, master=master) for p in params]
        generator = torch.Generator().manual_seed(1)
        for step in range(1, 4):
            grads = [torch.randn(s, generator=generator).to(device, BF16) for s in shapes]
            training.adamw_step(
                params, grads, states, lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8,
                weight_decay=[0.1, 0.0, 0.1], step=step, grad_scale=torch.tensor(0.5, device=device),
                seed=5,
            )  # fmt: skip
        runs.append(
            [
                t.cpu().double()
                for p, s in zip(params, states, strict=True)
                for t in (p, *s)
                if t is not None
            ]
        )
    for a, b in zip(*runs, strict=True):
        # The same random bits; where an fp32 rounding differs, a few values go to the other neighbour.
        assert relative_error(a, b) < (1e-3 if moments != "float32" or not master else 1e-4)


def test_grad_norm() -> None:
    grads = [draw(1000, 333), draw(5), draw(70_000, dtype=torch.float32)]
    norm = training.grad_norm(grads)
    truth = torch.cat([g.double().flatten() for g in grads]).norm()
    assert relative_error(norm, truth) < 1e-5
    assert torch.equal(norm, training.grad_norm(grads))
    grads[1][2] = float("inf")
    assert not training.grad_norm(grads).isfinite()


def layer(x, gate_up, down, router, qkv, out, norm_weight, starts, cos_sin, positions, targets):
    """A small model's loss, every operation once."""
    y = training.norm(x, Norm("rmsnorm", norm_weight, None, EPS))
    q, k, v = training.split_heads(
        y @ qkv.T, cos_sin, positions, num_heads=4, num_kv_heads=1, head_dim=64
    )
    y = training.document_attention(q, k, v, starts, sequence_length=128, scale=0.125)
    x = x + y.flatten(1) @ out.T
    logits, weights, experts = training.route(x, router, num_active=2, renormalize=True)
    x = x + training.experts_mlp(x, weights, experts, gate_up, down)
    loss = training.linear_cross_entropy(x, qkv, targets, normalizer=100.0)
    return (
        loss
        + training.load_balance_loss(logits, experts, None, sequence_length=128)
        + training.router_z_loss(logits)
    )


def test_whole_step_in_a_graph_and_twice_the_same() -> None:
    T, D, E, F = 512, 256, 8, 128
    leaves = [
        draw(T, D),
        draw(E, 2 * F, D, scale=0.06),
        draw(E, D, F, scale=0.09),
        draw(E, D, scale=0.1),
    ]
    leaves += [draw(6 * 64, D, scale=0.06), draw(D, 256, scale=0.06), draw(D)]
    angles = torch.rand(128, 32, device="cuda")
    constants = (
        document_starts(4, 128, 3),
        torch.cat([angles.cos(), angles.sin()], 1),
        torch.arange(T, device="cuda") % 128,
        torch.randint(0, 384, (T,), device="cuda"),
    )
    for x in leaves:
        x.requires_grad_()
        x.grad = torch.zeros_like(x)

    def step():
        for x in leaves:
            x.grad.zero_()
        loss = layer(*leaves, *constants)
        loss.backward()
        return loss.detach()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
        loss = step().clone()
        grads = [x.grad.clone() for x in leaves]
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        graph.replay()
        assert torch.equal(captured, loss)
        for x, grad in zip(leaves, grads, strict=True):
            assert torch.equal(x.grad, grad)
