"""The native CPU kernels against the formulas in float64.

Error bounds use u = 2^-24, the rounding of one fp32 operation. A dot product of D terms adds at
most D / 4 of them in one lane (vectors hold 4 floats or more), so its error is below (D / 4 + 16) u
times the sum of the terms' magnitudes, the 16 covering the joining of the lanes.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from hayate.kernels import cpu
from hayate.kernels.norm import Norm

needs_compiler = pytest.mark.skipif(
    not cpu.native_status().startswith("ready"), reason="no C compiler on this machine"
)
U = 2.0**-24
DTYPES = [torch.bfloat16, torch.float32]


def randn(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


def assert_within(actual: Tensor, exact: Tensor, error: Tensor | float) -> None:
    """|actual - exact| <= error + one rounding to actual's dtype + a few fp32 roundings."""
    rounding = 2.0**-8 if actual.dtype == torch.bfloat16 else U
    bound = (1 + rounding) * error + (rounding + 4 * U) * exact.abs() + 1e-30
    excess = ((actual.double() - exact).abs() / bound).max().item()
    assert excess <= 1, f"{excess:.2f} times the bound"


def exact_norm(x: Tensor, norm: Norm | None) -> Tensor:
    x = x.double()
    if norm is None:
        return x
    weight = norm.weight.double()
    if norm.kind == "rmsnorm":
        return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * weight
    var, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    y = (x - mean) / (var + norm.eps).sqrt() * (1 + weight)
    return y if norm.bias is None else y + norm.bias.double()


def exact_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Norm | None,
    activation: str | None,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The result in float64, and a bound on the error of fp32 before the last rounding."""
    normed = exact_norm(x, norm)
    y = normed @ weight.double().T
    magnitude = normed.abs() @ weight.double().abs().T
    if bias is not None:
        y = y + bias.double()
        magnitude = magnitude + bias.double().abs()
    # Normalising is a dot product too: its relative error is that of one, applied to every term.
    error = (1 + (norm is not None)) * (x.shape[1] / 4 + 16) * U * magnitude
    if norm is not None and norm.kind == "layernorm1p":
        # x - mean cancels: the mean's absolute error is relative to |x|, not to |x - mean|.
        error = error * (1 + x.double().abs().amax() / x.double().std(correction=0))
    silu = torch.nn.functional.silu
    if activation == "relu2":
        error = 2 * y.abs() * error + error**2
        y = y.clamp(min=0).square()
    elif activation == "silu":  # |silu'| < 1.1; the exponential is good to 4 u
        y, error = silu(y), 1.1 * error + 8 * U * silu(y).abs()
    elif activation == "silu_and_mul":
        (gate, up), (gate_error, up_error) = y.chunk(2, -1), error.chunk(2, -1)
        y = silu(gate) * up
        error = 1.1 * gate_error * (up.abs() + up_error) + silu(gate).abs() * up_error
        error = error + 8 * U * y.abs()
    if residual is not None:
        y = y + residual.double()
    return y, error


def make_norm(kind: str | None, width: int, dtype: torch.dtype) -> Norm | None:
    if kind is None:
        return None
    weight = randn(width, dtype=dtype, seed=3, scale=0.3) + (kind == "rmsnorm")
    bias = randn(width, dtype=dtype, seed=4) if kind == "layernorm1p" else None
    return Norm(kind, weight, bias, 1e-5)  # type: ignore[arg-type]


FUSIONS = [  # norm, activation, bias, residual
    (None, None, False, False),
    ("rmsnorm", None, True, False),
    ("layernorm1p", "relu2", False, False),
    ("rmsnorm", "silu_and_mul", True, False),
    ("layernorm1p", "silu", True, True),
    (None, None, False, True),
]


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fusion", FUSIONS, ids=str)
def test_linear_equals_the_formula(fusion: tuple, dtype: torch.dtype) -> None:
    kind, activation, with_bias, with_residual = fusion
    shapes = [(1, 1), (17, 7), (34, 16), (66, 50), (130, 576), (600, 131), (576, 160)]
    for (N, D), T in itertools.product(shapes, [1, 2, 3, 4, 5, 8]):
        rows = 2 * N if activation == "silu_and_mul" else N
        x = randn(T, D, dtype=dtype)
        weight = randn(rows, D, dtype=dtype, seed=1, scale=D**-0.5)
        bias = randn(rows, dtype=dtype, seed=2) if with_bias else None
        residual = randn(T, N, dtype=dtype, seed=5) if with_residual else None
        norm = make_norm(kind, D, dtype)
        if kind == "layernorm1p" and D == 1:
            continue  # the variance of one element is zero
        assert cpu.linear_fits(x, weight)
        kept = None if residual is None else residual.clone()
        out = cpu.linear(x, weight, bias, norm=norm, activation=activation, residual=residual)
        assert out.dtype == dtype
        assert out.shape == (T, N)
        assert_within(out, *exact_linear(x, weight, bias, norm, activation, residual))
        if residual is not None and kept is not None:
            assert torch.equal(residual, kept)


@needs_compiler
def test_linear_takes_small_parameters_of_another_dtype() -> None:
    x, weight = randn(2, 48, dtype=torch.bfloat16), randn(20, 48, dtype=torch.bfloat16, seed=1)
    bias = randn(20, dtype=torch.float16, seed=2)
    residual = randn(2, 20, dtype=torch.float32, seed=5)
    norm = Norm("layernorm1p", randn(48, dtype=torch.float16), randn(48, dtype=torch.float32), 1e-5)
    out = cpu.linear(x, weight, bias, norm=norm, residual=residual)
    assert out.dtype == torch.bfloat16
    assert_within(out, *exact_linear(x, weight, bias, norm, None, residual))


@needs_compiler
@pytest.mark.parametrize("T", [1, 6])
def test_linear_does_not_depend_on_the_number_of_threads(T: int) -> None:
    x, weight = randn(T, 300, dtype=torch.bfloat16), randn(1111, 300, dtype=torch.bfloat16, seed=1)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(cpu.linear(x, weight))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@needs_compiler
def test_bf16_rounds_to_nearest_even_as_torch_does() -> None:
    x = randn(8, 512, dtype=torch.float32) * 10.0 ** torch.arange(-40, 40).repeat(52)[:4096].view(
        8, 512
    )
    x[0, :6] = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, 3.3961775e38, math.inf, -math.inf, 0.0])
    zero, one = torch.zeros(8, 1).bfloat16(), torch.zeros(512, 1).bfloat16()
    out = cpu.linear(zero, one, residual=x)  # 0 + x, rounded once
    assert torch.equal(out, x.bfloat16())


@needs_compiler
def test_a_nan_stays_in_its_row() -> None:
    x, weight = randn(4, 64, dtype=torch.bfloat16), randn(40, 64, dtype=torch.bfloat16, seed=1)
    clean = cpu.linear(x, weight, activation="silu")
    x[2, 5] = math.nan
    out = cpu.linear(x, weight, activation="silu")
    assert out[2].isnan().all()
    rest = [0, 1, 3]
    assert torch.equal(out[rest], clean[rest])


@needs_compiler
def test_silu_is_precise_everywhere() -> None:
    # One exponential within 2 units in the last place (4 u), one addition, one division.
    gates = torch.linspace(-80, 80, 8192)[:, None]
    out = cpu.linear(torch.ones(1, 1), gates, activation="silu")
    exact = torch.nn.functional.silu(gates.double()).T
    assert_within(out, exact, 6 * U * exact.abs())


@needs_compiler
def test_silu_saturates() -> None:
    gates = torch.tensor([[-1e30], [-200.0], [-90.0], [90.0], [1e30]])
    out = cpu.linear(torch.ones(1, 1), gates, activation="silu")[0]
    # The exponential is held at e^88: beyond, the result is e^-88 of the argument, not quite 0.
    assert (out[:3].abs() <= gates[:3, 0].abs() * math.exp(-88) * 1.01).all()
    assert torch.equal(out[3:], gates[3:, 0])


def test_linear_fits_only_what_it_covers() -> None:
    weight = torch.zeros(8, 16)
    x = torch.zeros(1, 16)
    parameter = torch.nn.Parameter(weight.clone())
    assert not cpu.linear_fits(torch.zeros(9, 16), weight)
    assert not cpu.linear_fits(torch.zeros(0, 16), weight)
    assert not cpu.linear_fits(torch.zeros(16), weight)
    assert not cpu.linear_fits(torch.zeros(5, 4096), torch.zeros(8, 4096))
    assert not cpu.linear_fits(x.bfloat16(), weight)
    assert not cpu.linear_fits(x.half(), weight.half())
    assert not cpu.linear_fits(x, torch.zeros(16, 8).T)
    assert not cpu.linear_fits(torch.zeros(1, 32)[:, ::2], weight)
    assert not cpu.linear_fits(x.to("meta"), weight.to("meta"))
    assert not cpu.linear_fits(x, parameter)
    if cpu.native_status().startswith("ready"):
        assert cpu.linear_fits(x, weight)
        with torch.no_grad():
            assert cpu.linear_fits(x, parameter)


# ---- rope and cache -----------------------------------------------------------------------------


def paged_cache(P: int, B: int, G: int, K: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values side by side in one tensor, so that neither is contiguous over pages."""
    both = torch.full((P, 2, B, G, K), math.nan, dtype=dtype)
    return both[:, 0], both[:, 1]


def exact_rope(x: Tensor, cos_sin: Tensor, positions: Tensor) -> Tensor:
    """x (T, n, K) in float64."""
    half = cos_sin.shape[1] // 2
    cos, sin = cos_sin[positions.long()].double()[:, None].split(half, -1)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


ROPE_CASES = [  # H, G, K, rotary_dim, norm over, clip, integers
    (9, 3, 64, 64, None, None, torch.int64),
    (4, 2, 24, 10, "head", None, torch.int32),
    (3, 3, 20, 20, "all", 0.75, torch.int64),
    (4, 1, 128, 64, None, 0.5, torch.int32),
]


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ROPE_CASES, ids=str)
@pytest.mark.parametrize("T", [1, 5, 40])
def test_rope_and_cache_equals_the_formula(T: int, case: tuple, dtype: torch.dtype) -> None:
    H, G, K, rotary_dim, over, clip, integers = case
    P, B = 7, 16
    k_cache, v_cache = paged_cache(P, B, G, K, dtype)
    generator = torch.Generator().manual_seed(T)
    slots = torch.randperm(P * B, generator=generator)[:T].to(integers)
    slots[T // 2] = -1 if T > 1 else slots[0]
    positions = torch.randint(0, 100, (T,), generator=generator).to(integers)
    cos_sin = randn(100, rotary_dim, dtype=torch.float32)
    qkv = randn(T, (H + 2 * G) * K, dtype=dtype, seed=1)
    norms: list[Norm | None] = [None, None]
    if over:
        spans = [K, K] if over == "head" else [H * K, G * K]
        norms = [make_norm("rmsnorm", span, dtype) for span in spans]
    q, k, v = qkv.double().split([H * K, G * K, G * K], -1)
    parts = []
    for part, norm in ((q, norms[0]), (k, norms[1]), (v, None)):
        span = part.shape[1] if norm is None else norm.weight.numel()
        part = exact_norm(part.view(T, -1, span), norm).view(T, -1, K)
        parts.append(part if clip is None else part.clamp(-clip, clip))
    exact_q, exact_k = (exact_rope(part, cos_sin, positions) for part in parts[:2])

    assert cpu.rope_and_cache_fits(qkv, k_cache, v_cache)
    out = cpu.rope_and_cache(
        qkv,
        k_cache,
        v_cache,
        slots,
        positions,
        cos_sin,
        num_heads=H,
        num_kv_heads=G,
        head_dim=K,
        q_norm=norms[0],
        k_norm=norms[1],
        clip=clip,
    )
    # Two products, each of a normalised value (relative error below (H K / 4 + 16) u) and a cosine.
    relative = (H * K / 4 + 20) * U if over else 4 * U
    error = relative * 2 * max(p.abs().max().item() for p in parts) * cos_sin.abs().max().item()
    assert out.shape == (T, H, K)
    assert_within(out, exact_q, error)
    written = torch.zeros(P * B, dtype=torch.bool)
    for t, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        written[slot] = True
        assert_within(k_cache[slot // B, slot % B], exact_k[t], error)
        assert_within(v_cache[slot // B, slot % B], parts[2][t], 0.0)
    untouched = ~written.view(P, B)
    assert k_cache[untouched].isnan().all()
    assert v_cache[untouched].isnan().all()
    assert not k_cache[written.view(P, B)].isnan().any()


@needs_compiler
@pytest.mark.parametrize(("slot", "position"), [(32, 0), (0, 10), (0, -1)])
def test_rope_and_cache_refuses_indices_out_of_range(slot: int, position: int) -> None:
    k_cache, v_cache = torch.zeros(2, 16, 1, 8), torch.zeros(2, 16, 1, 8)
    with pytest.raises(IndexError):
        cpu.rope_and_cache(
            torch.ones(1, 24),
            k_cache,
            v_cache,
            torch.tensor([slot]),
            torch.tensor([position]),
            torch.ones(10, 8),
            num_heads=1,
            num_kv_heads=1,
            head_dim=8,
        )
    assert not k_cache.any()


# ---- attention ----------------------------------------------------------------------------------


def exact_attention(
    q: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    q_lens: list[int],
    scale: float,
    window: int | None,
) -> Tensor:
    """q (T, H, K); keys and values a list of (len, G, K) by sequence; float64."""
    rows = []
    for s, q_len in enumerate(q_lens):
        first = sum(q_lens[:s])
        length, G, K = keys[s].shape
        for i in range(q_len):
            position = length - q_len + i
            start = 0 if window is None else max(0, position - window + 1)
            k, v = keys[s][start : position + 1].double(), values[s][start : position + 1].double()
            query = q[first + i].double().view(G, -1, K)
            p = torch.einsum("gnk,jgk->gnj", query, k).mul(scale).softmax(-1)
            rows.append(torch.einsum("gnj,jgk->gnk", p, v).reshape(-1, K))
    return torch.stack(rows)


ATTENTION_CASES = [  # H, G, K, window, lengths, queries of each
    (9, 3, 64, None, [1, 130, 64], [1, 1, 1]),
    (9, 3, 64, None, [1500], [1]),
    (4, 4, 20, 50, [33, 200], [1, 1]),
    (7, 1, 80, None, [90, 5, 77], [1, 5, 3]),
    (28, 4, 128, 17, [300, 12], [8, 1]),
    (2, 1, 256, None, [70], [2]),
]


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ATTENTION_CASES, ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_attention_equals_the_formula(case: tuple, dtype: torch.dtype, threads: int) -> None:
    H, G, K, window, lengths, q_lens = case
    B, scale = 16, K**-0.5
    pages = [-(-length // B) for length in lengths]
    k_cache, v_cache = paged_cache(sum(pages) + 3, B, G, K, dtype)
    order = torch.randperm(sum(pages) + 3, generator=torch.Generator().manual_seed(1)).tolist()
    table = torch.full((len(lengths), max(pages) + 2), -1, dtype=torch.int32)
    keys, values = [], []
    for s, length in enumerate(lengths):
        own = [order.pop() for _ in range(pages[s])]
        table[s, : len(own)] = torch.tensor(own)
        keys.append(randn(length, G, K, dtype=dtype, seed=s))
        values.append(randn(length, G, K, dtype=dtype, seed=s + 50))
        for j in range(length):
            k_cache[own[j // B], j % B] = keys[s][j]
            v_cache[own[j // B], j % B] = values[s][j]
    q = randn(sum(q_lens), H, K, dtype=dtype, seed=9)
    exact = exact_attention(q, keys, values, q_lens, scale, window)
    assert cpu.attention_fits(q, k_cache, v_cache, max(q_lens))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        out = cpu.attention(
            q,
            k_cache,
            v_cache,
            table,
            torch.tensor([0, *itertools.accumulate(q_lens)], dtype=torch.int32),
            torch.tensor(lengths, dtype=torch.int32),
            max_seqlen_q=max(q_lens),
            max_seqlen_k=max(lengths),
            scale=scale,
            window=window,
        )
    finally:
        torch.set_num_threads(before)
    # A score's absolute error is the relative error of e^score, in the numerator and in the sum.
    score = q.double().abs().amax() ** 2 * K * scale * 2
    relative = (K / 4 + 16) * U * score + (max(lengths) + 64) * U
    assert_within(out, exact, (2 * relative * max(v.double().abs().max() for v in values)).item())


@needs_compiler
def test_attention_ignores_padding_rows() -> None:
    k_cache, v_cache = randn(2, 2, 4, 1, 8, dtype=torch.float32)
    q = randn(4, 2, 8, dtype=torch.float32, seed=1)
    arguments = {"max_seqlen_q": 1, "max_seqlen_k": 3, "scale": 0.5}
    table = torch.tensor([[1], [-1], [-1], [-1]], dtype=torch.int32)
    # Sequence 1 has a row and no key, sequences 2 and 3 neither; rows 2 and 3 have no sequence.
    starts = torch.tensor([0, 1, 2, 2, 2], dtype=torch.int32)
    lengths = torch.tensor([3, 0, 0, 0], dtype=torch.int32)
    out = cpu.attention(q, k_cache, v_cache, table, starts, lengths, **arguments)  # type: ignore[arg-type]
    alone = exact_attention(q[:1], [k_cache[1, :3]], [v_cache[1, :3]], [1], 0.5, None)
    # The exponential's 4 u, the sums' few, and scores of at most 10 with a relative error of 2 u.
    assert_within(out[:1], alone, 64 * U * v_cache.abs().max().item())
    assert not out[1:].any()


@needs_compiler
def test_attention_refuses_a_missing_page() -> None:
    cache = torch.zeros(2, 4, 1, 8)
    table = torch.tensor([[0, -1]], dtype=torch.int32)
    starts, lengths = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([6], dtype=torch.int32)
    with pytest.raises(IndexError):
        cpu.attention(
            torch.zeros(1, 2, 8),
            cache,
            cache,
            table,
            starts,
            lengths,
            max_seqlen_q=1,
            max_seqlen_k=6,
            scale=1.0,
        )


def test_attention_fits_only_what_it_covers() -> None:
    q, cache = torch.zeros(1, 2, 8), torch.zeros(2, 4, 1, 8)
    assert not cpu.attention_fits(q, cache, cache, 9)
    assert not cpu.attention_fits(q.bfloat16(), cache, cache, 1)
    assert not cpu.attention_fits(
        q, cache.transpose(1, 2).contiguous().transpose(1, 2)[:, ::2], cache, 1
    )
    wide = torch.zeros(2, 4, 1, 264)
    assert not cpu.attention_fits(torch.zeros(1, 2, 264), wide, wide, 1)


# ---- argmax -------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 7, 16, 17, 100, 4099])
def test_argmax_takes_the_first_of_equals(width: int, dtype: torch.dtype) -> None:
    x = randn(20, width, dtype=dtype).mul(3).round()  # few distinct values: many ties
    x[3] = -math.inf
    assert cpu.argmax_fits(x)
    expected = [row.index(max(row)) for row in x.tolist()]
    assert cpu.argmax(x).tolist() == expected
    x[4, width // 2] = x[4, -1] = math.nan
    x[5, 0] = math.nan
    expected[4:6] = [width // 2, 0]
    assert cpu.argmax(x).tolist() == expected


# ---- embedding and memory -----------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("integers", [torch.int32, torch.int64], ids=str)
def test_embedding_copies_rows(integers: torch.dtype, dtype: torch.dtype) -> None:
    weight = randn(11, 7, dtype=dtype)
    token_ids = torch.tensor([3, 10, 0, 3], dtype=integers)
    assert cpu.embedding_fits(token_ids, weight)
    assert torch.equal(cpu.embedding(token_ids, weight), weight[token_ids.long()])
    for outside in (-1, 11):
        with pytest.raises(IndexError):
            cpu.embedding(torch.tensor([outside], dtype=integers), weight)


def test_empty_block_gives_separate_tensors() -> None:
    shapes = [
        ((3, 5), torch.bfloat16),
        ((0, 4), torch.float32),
        ((), torch.int64),
        ((1000, 999), torch.float32),
    ]
    tensors = cpu.empty_block(shapes)
    for i, (tensor, (shape, dtype)) in enumerate(zip(tensors, shapes, strict=True)):
        assert tensor.shape == shape
        assert tensor.dtype == dtype
        assert tensor.is_contiguous()
        assert tensor.numel() == 0 or tensor.data_ptr() % 64 == 0
        tensor.fill_(i)
    assert all((tensor == i).all() for i, tensor in enumerate(tensors))
