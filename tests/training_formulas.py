"""The operations of training in float64, one token at a time: the truth for their kernels on CPU and GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Half a unit in the last place, relative: the error of one rounding to nearest.
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str, eps: float) -> Tensor:
    if kind == "rmsnorm":
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight
    x = x - x.mean(-1, keepdim=True)
    y = x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * (1 + weight)
    return y if bias is None else y + bias


def silu_and_mul(h: Tensor) -> Tensor:
    gate, up = h.chunk(2, dim=-1)
    return gate / (1 + torch.exp(-gate)) * up


def relu2(h: Tensor) -> Tensor:
    return torch.where(h > 0, h * h, 0)


def split_heads(
    qkv: Tensor,
    angles: Tensor,  # (P, rotary_dim / 2)
    positions: Tensor,
    heads: tuple[int, int, int],
    weights: tuple[Tensor, Tensor] | None,
    eps: float,
    clip: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotation as a product of complex numbers."""
    H, G, K = heads
    q, k, v = qkv.view(-1, H + 2 * G, K).split([H, G, G], dim=1)
    if weights is not None:
        q, k = (
            norm(x.reshape(len(x), -1, w.numel()), w, None, "rmsnorm", eps).view(x.shape)
            for x, w in zip((q, k), weights, strict=True)
        )
    if clip is not None:
        q, k, v = (torch.where(x.abs() > clip, clip * x.sign(), x) for x in (q, k, v))
    half = angles.shape[1]
    turn = torch.polar(torch.ones_like(angles), angles)[positions][:, None]

    def rotate(x: Tensor) -> Tensor:
        turned = torch.complex(x[..., :half], x[..., half : 2 * half]) * turn
        return torch.cat([turned.real, turned.imag, x[..., 2 * half :]], dim=-1)

    return rotate(q), rotate(k), v


def attention(
    q: Tensor, k: Tensor, v: Tensor, starts: Sequence[int], scale: float, window: int | None
) -> Tensor:
    """starts[t] is the first row that row t may see, apart from a window."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    rows = []
    for t, start in enumerate(starts):
        first = start if window is None else max(start, t - window + 1)
        p = torch.softmax(scale * torch.einsum("hk,jhk->hj", q[t], k[first : t + 1]), dim=-1)
        rows.append(torch.einsum("hj,jhk->hk", p, v[first : t + 1]))
    return torch.stack(rows)


def route(
    x: Tensor, weight: Tensor, num_active: int, renormalize: bool, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    logits = x @ weight.T
    p = torch.softmax(logits, dim=-1)
    scores = (p if bias is None else p + bias).tolist()
    experts = torch.tensor(
        [sorted(range(len(s)), key=lambda e: (-s[e], e))[:num_active] for s in scores],
        device=x.device,
    )
    weights = torch.stack([row[chosen] for row, chosen in zip(p, experts, strict=True)])
    return logits, weights / weights.sum(-1, keepdim=True) if renormalize else weights, experts


def experts_mlp(
    x: Tensor, weights: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    rows = []
    for x_t, weights_t, experts_t in zip(x, weights, experts.tolist(), strict=True):
        parts = [
            w * (down[e] @ silu_and_mul(gate_up[e] @ x_t))
            for w, e in zip(weights_t, experts_t, strict=True)
        ]
        rows.append(torch.stack(parts).sum(0))
    return torch.stack(rows)


def cross_entropy(x: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Of each token, 0 where the target is -100."""
    losses = []
    for z, target in zip(x @ head.T, targets.tolist(), strict=True):
        losses.append(z.sum() * 0 if target == -100 else torch.logsumexp(z, 0) - z[target])
    return torch.stack(losses)


def outputs_and_gradients(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    output_gradients: Sequence[Tensor],
) -> list[Tensor]:
    """What `function` returns for float inputs, then the gradient of each input."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    outputs = [y for y in outputs if y.is_floating_point()]
    torch.autograd.backward(
        outputs, [g.to(y.dtype) for g, y in zip(output_gradients, outputs, strict=True)]
    )
    return [y.detach() for y in outputs] + [x.grad for x in leaves]


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """||actual - truth|| / ||truth||; NaN if anything is NaN."""
    return ((actual.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()


def compare(
    actual: Callable[..., Tensor | tuple[Tensor, ...]],
    truth: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    *,
    roundings: float,
    dtype: torch.dtype,
) -> None:
    """Outputs and gradients of `actual` on `inputs` against `truth` on the same values in float64.

    In norm, `roundings` roundings to `dtype` on the way to a result err by at most as many units; what is
    done in fp32 in between adds 2^-24 a term of its sums, of which some cancel.
    """
    exact_inputs = [x.double() for x in inputs]
    with torch.no_grad():
        shapes = truth(*exact_inputs)
    shapes = shapes if isinstance(shapes, tuple) else (shapes,)
    output_gradients = [torch.randn_like(y).to(dtype) for y in shapes if y.is_floating_point()]
    wanted = outputs_and_gradients(truth, exact_inputs, output_gradients)
    found = outputs_and_gradients(actual, inputs, output_gradients)
    limit = roundings * ROUNDING[dtype] + 256 * 2.0**-24
    errors = [relative_error(a, b) for a, b in zip(found, wanted, strict=True)]
    assert all(error <= limit for error in errors), f"{errors} beyond {limit}"
    for x, grad in zip(inputs, found[-len(inputs) :], strict=True):
        assert grad.dtype == x.dtype
