"""Every kernel in bf16 on the GPU against its formula in float64; eager, and replayed from a CUDA graph."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hayate.kernels import elementwise, sampling
from hayate.kernels.attention import attention
from hayate.kernels.decode_attention import Projection
from hayate.kernels.embedding import embedding
from hayate.kernels.flash_attention import flash_attention
from hayate.kernels.linear import gemm, gemm_batched, linear
from hayate.kernels.moe import moe_mlp, moe_route
from hayate.kernels.norm import Norm, layernorm1p, rmsnorm, rmsnorm_residual
from hayate.kernels.rope import rope_and_cache, rope_frequencies, rope_table
from hayate.kernels.rope_frequencies import RopeParameters
from hayate.kernels.self_attention import self_attention
from hayate.kernels.softmax import softmax

BF16 = torch.bfloat16
ULP = 2.0**-8  # spacing of bf16 relative to the value; one rounding errs by half of it


def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, device="cuda") * scale).to(BF16)


def relative(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    """||actual - wanted|| / ||wanted||; NaN if anything is NaN."""
    return ((actual.double() - wanted).norm() / wanted.norm()).item()


def norm_64(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    x, w = x.double(), norm.weight.double()
    if norm.kind == "rmsnorm":
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * w
    x = x - x.mean(-1, keepdim=True)
    assert norm.bias is not None
    return (
        x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * (1 + w) + norm.bias.double()
    )


def make_norm(kind: str, width: int) -> Norm:
    return Norm(
        kind, 1 + draw(width, scale=0.1), draw(width) if kind == "layernorm1p" else None, 1e-5
    )


def replayed(function):
    """The result of `function` captured in a CUDA graph and replayed twice."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function()
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    return out


# (N, D): the shapes of the presets' layers, and odd ones.
SHAPES = [
    (6144, 4096),
    (4096, 11520),
    (5120, 3072),
    (3072, 9216),
    (960, 576),
    (576, 1536),
    (896, 768),
    (32000, 768),
    (77, 200),
]


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 13, 16, 17, 32, 64, 200])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear(rows, shape):
    N, D = shape
    x, weight = draw(rows, D), draw(N, D, scale=D**-0.5)
    residual, bias = draw(rows, N), draw(N)
    # Half an ULP for the result; above a few rows the normalised x is rounded once more.
    limit = ULP
    for norm in (None, make_norm("rmsnorm", D), make_norm("layernorm1p", D)):
        exact = (x.double() if norm is None else norm_64(x, norm)) @ weight.double().T
        assert relative(linear(x, weight, norm=norm), exact) < limit
        added = residual.double() + exact + bias.double()
        assert relative(linear(x, weight, bias, norm=norm, residual=residual), added) < limit
    norm = make_norm("rmsnorm", D)
    exact = norm_64(x, norm) @ weight.double().T
    assert relative(linear(x, weight, norm=norm, activation="relu2"), exact.relu() ** 2) < 2 * limit
    if N % 2 == 0:
        gate, up = exact.chunk(2, -1)
        got = linear(x, weight, norm=norm, activation="silu_and_mul")
        assert relative(got, F.silu(gate) * up) < 2 * limit
    got = replayed(lambda: linear(x, weight, bias, norm=norm, residual=residual))
    assert relative(got, residual.double() + exact + bias.double()) < limit


def test_gemm_is_the_matrix_product():
    a, b = draw(300, 200), draw(200, 130)
    assert relative(gemm(a, b), a.double() @ b.double()) < ULP
    a, b = draw(3, 50, 64), draw(3, 64, 40)
    assert relative(gemm_batched(a, b), a.double() @ b.double()) < ULP


@pytest.mark.parametrize("shape", [(1, 576), (7, 768), (33, 4096), (3, 1000)], ids=str)
def test_norms_and_elementwise(shape):
    x, residual = draw(*shape), draw(*shape)
    rms, ln = make_norm("rmsnorm", shape[1]), make_norm("layernorm1p", shape[1])
    assert relative(rmsnorm(x, rms.weight, 1e-5), norm_64(x, rms)) < ULP
    assert relative(layernorm1p(x, ln.weight, ln.bias, 1e-5), norm_64(x, ln)) < ULP
    y, total = rmsnorm_residual(x, residual, rms.weight, 1e-5)
    exact = x.double() + residual.double()
    assert relative(total, exact) < ULP
    assert relative(y, norm_64(exact, rms)) < 2 * ULP
    gate, up = x.double().chunk(2, -1)
    for got, wanted in [
        (elementwise.silu(x), F.silu(x.double())),
        (elementwise.silu_and_mul(x), F.silu(gate) * up),
        (elementwise.relu2(x), x.double().relu() ** 2),
        (elementwise.add(x, residual), exact),
        (elementwise.mul(x, residual), x.double() * residual.double()),
        (elementwise.scale(x, 0.3), x.double() * 0.3),
        (softmax(x), x.double().softmax(-1)),
    ]:
        assert relative(got, wanted) < ULP


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "rotary"), [(9, 3, 64, 64), (24, 8, 128, 64), (12, 1, 64, 64)]
)
@pytest.mark.parametrize("qk_norm", [None, "head", "full"])
@pytest.mark.parametrize("tokens", [1, 37])
def test_rope_and_cache(heads, kv_heads, head_dim, rotary, qk_norm, tokens):
    inv_freq, factor = rope_frequencies(RopeParameters(rotary_dim=rotary))
    cos_sin = rope_table(inv_freq, factor, 500).cuda()
    qkv = draw(tokens, (heads + 2 * kv_heads) * head_dim)
    k_cache, v_cache = torch.zeros(2, 8, 64, kv_heads, head_dim, device="cuda", dtype=BF16)
    slots = torch.randperm(8 * 64, device="cuda")[:tokens]
    positions = torch.randint(0, 500, (tokens,), device="cuda")
    norms = {}
    if qk_norm:
        sizes = (head_dim,) * 2 if qk_norm == "head" else (heads * head_dim, kv_heads * head_dim)
        norms = dict(
            zip(("q_norm", "k_norm"), (make_norm("rmsnorm", n) for n in sizes), strict=True)
        )
    got = rope_and_cache(
        qkv, k_cache, v_cache, slots, positions, cos_sin,
        num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, **norms,
    )  # fmt: skip

    def rotated(x, norm):
        x = x.double()
        if norm is not None:
            x = norm_64(x.unflatten(1, (-1, norm.weight.numel())), norm).flatten(1)
        x = x.unflatten(1, (-1, head_dim))
        angle = positions.double()[:, None, None] * inv_freq.double().cuda()
        a, b = x[..., : rotary // 2], x[..., rotary // 2 : rotary]
        turned = (a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin())
        return torch.cat((*turned, x[..., rotary:]), -1)

    q, k, v = qkv.split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], 1)
    assert relative(got, rotated(q, norms.get("q_norm"))) < ULP
    assert relative(k_cache.flatten(0, 1)[slots], rotated(k, norms.get("k_norm"))) < ULP
    assert torch.equal(v_cache.flatten(0, 1)[slots], v.unflatten(1, (-1, head_dim)))
    assert int((v_cache.flatten(0, 1).abs().sum((1, 2)) > 0).sum()) == tokens


def paged(lengths, kv_heads, head_dim, page_size=64):
    """Random keys and values in shuffled pages, NaN in every slot nobody owns."""
    counts = [-(-n // page_size) for n in lengths]
    order = torch.randperm(sum(counts) + 3)
    caches = torch.full(
        (2, len(order), page_size, kv_heads, head_dim), float("nan"), device="cuda", dtype=BF16
    )
    table = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    dense, start = [], 0
    for s, (n, count) in enumerate(zip(lengths, counts, strict=True)):
        table[s, :count] = order[start : start + count]
        start += count
        kv = draw(2, n, kv_heads, head_dim)
        for j in range(0, n, page_size):
            page = table[s, j // page_size]
            caches[:, page, : min(page_size, n - j)] = kv[:, j : j + page_size]
        dense.append(kv)
    return caches[0], caches[1], table.cuda(), dense


def attention_64(q, k, v, scale, window):
    """q (Q, H, K): the last Q of N positions."""
    q_len, n, group = q.shape[0], k.shape[0], q.shape[1] // k.shape[1]
    k, v = (t.double().repeat_interleave(group, 1) for t in (k, v))
    scores = torch.einsum("qhk,nhk->hqn", q.double(), k) * scale
    at = torch.arange(n - q_len, n, device="cuda")[:, None]
    j = torch.arange(n, device="cuda")
    seen = j <= at if window is None else (j <= at) & (j > at - window)
    return torch.einsum("hqn,nhk->qhk", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (9, 3), (32, 8), (12, 1)])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("kind", ["decode", "prefill", "chunk"])
def test_attention(heads, kv_heads, head_dim, window, kind):
    lengths = [1, 130, 700, 64, 2049] if kind == "decode" else [1, 130, 700, 513]
    q_lens = [1] * 5 if kind == "decode" else lengths if kind == "prefill" else [1, 30, 200, 128]
    k_cache, v_cache, table, dense = paged(lengths, kv_heads, head_dim)
    q = draw(sum(q_lens), heads, head_dim)
    ends = torch.tensor([0, *q_lens]).cumsum(0)

    def run():
        return attention(
            q, k_cache, v_cache, table, ends.int().cuda() if kind != "graph" else ends,
            torch.tensor(lengths, dtype=torch.int32, device="cuda"),
            max_seqlen_q=max(q_lens), max_seqlen_k=max(lengths), scale=head_dim**-0.5, window=window,
        )  # fmt: skip

    got = run()
    for s, kv in enumerate(dense):
        rows = slice(int(ends[s]), int(ends[s + 1]))
        wanted = attention_64(q[rows], *kv, head_dim**-0.5, window)
        # The weights are rounded to bf16 before they meet the values: one more rounding.
        assert relative(got[rows], wanted) < 1.5 * ULP


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "rotary"),
    [(9, 3, 64, 64), (24, 8, 128, 64), (32, 8, 128, 128), (12, 1, 64, 64), (48, 1, 128, 128)],
)
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("lengths", [[1], [200], [9000], [1, 130, 0, 700, 64, 2049]], ids=str)
def test_self_attention_of_single_tokens(
    heads, kv_heads, head_dim, rotary, qk_norm, window, lengths
):
    """Rotation, cache write and attention in one kernel; a graph replays it over the same cache."""
    k_cache, v_cache, table, _ = paged([max(n, 1) for n in lengths], kv_heads, head_dim)
    table = F.pad(table, (0, 600))  # room for 38,400 more tokens: many splits stay without work
    inv_freq, factor = rope_frequencies(RopeParameters(rotary_dim=rotary))
    places = torch.tensor(lengths, device="cuda") - 1
    last = table.long().gather(1, places.clamp(min=0)[:, None] // 64)[:, 0]
    norms = [make_norm("rmsnorm", head_dim) if qk_norm else None for _ in range(2)]
    projection = Projection(
        torch.where(places < 0, -1, last * 64 + places % 64),
        places.clamp(min=0),
        rope_table(inv_freq, factor, 10_000).cuda(),
        *norms,
    )
    qkv = draw(len(lengths), (heads + 2 * kv_heads) * head_dim)
    ends = torch.arange(len(lengths) + 1, dtype=torch.int32, device="cuda")
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    sizes = {"max_seqlen_q": 1, "max_seqlen_k": 40_000, "scale": head_dim**-0.5, "window": window}

    def run():
        return self_attention(qkv, k_cache, v_cache, table, ends, seq_lens, projection, **sizes)

    got = replayed(run)
    k_two, v_two = k_cache.clone(), v_cache.clone()
    q = rope_and_cache(
        qkv, k_two, v_two, **projection._asdict(),
        num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim,
    )  # fmt: skip
    assert torch.equal(v_cache.nan_to_num(), v_two.nan_to_num())
    # The new keys alone may differ, by a rounding.
    torch.testing.assert_close(k_cache, k_two, rtol=2 * ULP, atol=1e-6, equal_nan=True)
    for s, n in enumerate(lengths):
        pages = table[s, : -(-n // 64)].long()
        k, v = (cache[pages].flatten(0, 1)[:n] for cache in (k_two, v_two))
        if n == 0:
            assert not got[s].any()
        else:
            wanted = attention_64(q[s : s + 1], k, v, head_dim**-0.5, window)
            # The weights are rounded before they meet the values, and queries may differ by one.
            assert relative(got[s : s + 1], wanted) < 2 * ULP


def test_attention_of_padding_rows():
    k_cache, v_cache, table, dense = paged([300, 64], 2, 64)
    q = draw(2, 4, 64)
    got = attention(
        q, k_cache, v_cache, table, torch.arange(3, dtype=torch.int32, device="cuda"),
        torch.tensor([300, 0], dtype=torch.int32, device="cuda"),
        max_seqlen_q=1, max_seqlen_k=300, scale=0.125,
    )  # fmt: skip
    assert relative(got[:1], attention_64(q[:1], *dense[0], 0.125, None)) < 1.5 * ULP
    assert not got[1].isnan().any()


def test_dense_flash_attention():
    q, k, v = draw(700, 8, 128), draw(700, 2, 128), draw(700, 2, 128)
    ends = torch.tensor([0, 257, 700], dtype=torch.int32, device="cuda")
    for a, b in ((0, 257), (257, 700)):
        got = flash_attention(q, k, v, ends, ends, max_seqlen_q=443, scale=128**-0.5)
        assert relative(got[a:b], attention_64(q[a:b], k[a:b], v[a:b], 128**-0.5, None)) < 1.5 * ULP
        got = flash_attention(q, k, v, ends, ends, max_seqlen_q=443, scale=128**-0.5, causal=False)
        # Of single queries, each the last position, so that the mask hides nothing.
        wanted = torch.cat(
            [attention_64(q[i : i + 1], k[a:b], v[a:b], 128**-0.5, None) for i in (a, a + 5, b - 1)]
        )
        assert relative(got[[a, a + 5, b - 1]], wanted) < 1.5 * ULP


def test_embedding():
    weight, ids = draw(1000, 576), torch.randint(0, 1000, (37,), device="cuda")
    assert torch.equal(embedding(ids, weight), weight[ids])


@pytest.mark.parametrize("tokens", [1, 2, 5, 8, 16, 33, 300])
@pytest.mark.parametrize(
    ("E", "A", "D", "F_"), [(16, 4, 768, 640), (8, 2, 256, 512), (64, 8, 512, 128)]
)
@pytest.mark.parametrize("renormalize", [True, False])
def test_moe(tokens, E, A, D, F_, renormalize):
    x, norm = draw(tokens, D), make_norm("rmsnorm", D)
    router = draw(E, D, scale=D**-0.5)
    gate_up, down = draw(E, 2 * F_, D, scale=D**-0.5), draw(E, D, F_, scale=F_**-0.5)
    weights, experts = moe_route(x, router, norm=norm, num_active=A, renormalize=renormalize)
    h = norm_64(x, norm)
    probs = (h @ router.double().T).softmax(-1)
    chosen = probs.gather(1, experts.long())
    # The chosen experts are the best ones, up to what the rounding of their probabilities allows.
    assert ((probs.topk(A).values - chosen).abs() <= 4 * ULP * probs.amax(-1, keepdim=True)).all()
    expected = chosen / chosen.sum(-1, keepdim=True) if renormalize else chosen
    assert relative(weights, expected) < 2 * ULP
    got = moe_mlp(x, norm, weights, experts, gate_up, down, residual=x)
    exact = torch.zeros(tokens, D, dtype=torch.float64, device="cuda")
    for e in range(E):
        gate, up = (h @ gate_up[e].double().T).chunk(2, -1)
        out = (F.silu(gate) * up) @ down[e].double().T
        exact += out * ((experts == e) * weights.double()).sum(-1, keepdim=True)
    # Roundings: normalised x, the activation, the product, and the sum with the residual.
    assert relative(got, x.double() + exact) < 2 * ULP
    again = replayed(lambda: moe_mlp(x, norm, weights, experts, gate_up, down, residual=x))
    assert torch.equal(again, got)


@pytest.mark.parametrize("V", [1000, 32000, 49152, 131072])
@pytest.mark.parametrize("S", [1, 3, 64])
def test_argmax(V, S):
    logits = draw(S, V)
    got = sampling.argmax(logits)
    best = logits.amax(-1)
    first = (logits == best[:, None]).int().argmax(-1)
    assert torch.equal(got, first)
    logits[S // 2, V // 3] = float("nan")
    assert int(sampling.argmax(logits)[S // 2]) == -1


@pytest.mark.parametrize("V", [1000, 49152, 131072])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"), [(0, 1, 0), (40, 1, 0), (0, 0.9, 0), (50, 0.8, 0.05)]
)
def test_sample(V, top_k, top_p, min_p):
    """The draws are the reference's, save where u falls within rounding of a boundary."""
    S = 64
    logits = torch.randn(S, V, device="cuda") * 3
    row = {
        "temperature": torch.full((S,), 0.8, device="cuda"),
        "top_k": torch.full((S,), top_k, dtype=torch.int32, device="cuda"),
        "top_p": torch.full((S,), float(top_p), device="cuda"),
        "min_p": torch.full((S,), float(min_p), device="cuda"),
        "seeds": torch.arange(S, device="cuda") * 7919,
        "steps": torch.arange(S, device="cuda") % 5,
    }
    got = sampling.sample(logits, *row.values())
    wanted = sampling.sample_reference(logits, *row.values(), None)
    # A kept set differs by a token with probability about 1e-6, a draw by about V * 2^-24.
    assert int((got != wanted).sum()) <= 2
    again = replayed(lambda: sampling.sample(logits, *row.values()))
    assert torch.equal(again, got)
