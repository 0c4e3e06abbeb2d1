"""Native CPU forms of what stands between the matrix products of training (`kernels/cpu_training.c`).

fp32 and contiguous alone; the caller asks `fits` first and has a form in PyTorch for all else, and for a machine
without a C compiler. Formulas and shapes are those of the operation's own file. The number of threads is PyTorch's
and changes no bit of a result.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from hayate.kernels.cpu_library import library

__all__ = [
    "adamw",
    "combine_rows",
    "cross_entropy",
    "fits",
    "join_heads",
    "rmsnorm",
    "rmsnorm_backward",
    "split_heads",
    "swiglu",
    "swiglu_backward",
]

_ROWS_A_SUM = 128  # whose gradient of a norm's weight is one partial sum

# One letter an argument: pointer, integer, double; the number of threads comes last and is not listed.
_SIGNATURES = {
    "adamw": "ppppqpdddddd",
    "cross_entropy": "pppqqq",
    "swiglu": "ppqq",
    "swiglu_backward": "ppppppqq",
    "combine_rows": "ppppqqq",
    "rmsnorm": "pppqqd",
    "rmsnorm_backward": "pppppqqqd",
    "split_heads": "ppppppqqqqqqq",
}
_TYPES = {"p": ctypes.c_void_p, "q": ctypes.c_int64, "d": ctypes.c_double}


@cache
def _functions(path: Path) -> ctypes.CDLL:
    functions = ctypes.CDLL(str(path))
    for name, letters in _SIGNATURES.items():
        function = getattr(functions, f"hayate_{name}")
        function.argtypes = [_TYPES[letter] for letter in letters + "q"]
        function.restype = ctypes.c_int64 if name in ("cross_entropy", "split_heads") else None
    return functions


def _call(name: str, *arguments: Tensor | float | None) -> int | None:
    native = library()
    assert native is not None, "ask `fits` first"
    plain = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
    function = getattr(_functions(native.path), f"hayate_{name}")
    result: int | None = function(*plain, torch.get_num_threads())
    return result


def fits(*tensors: Tensor) -> bool:
    """All on the CPU, fp32 and contiguous, and the native kernels are there."""
    return (
        all(x.dtype is torch.float32 and x.is_cpu and x.is_contiguous() for x in tensors)
        and library() is not None
    )


def adamw(
    param: Tensor,
    grad: Tensor,
    first: Tensor,
    second: Tensor,
    grad_scale: Tensor | None,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    keep: float,
    step_size: float,
    unbias: float,
) -> None:
    """One step on one parameter, in place; `keep` is 1 - lr decay, the rest as `adamw_kernel.Scalars`."""
    n = param.numel()
    scalars = (beta1, beta2, eps, keep, step_size, unbias)
    _call("adamw", param, grad, first, second, n, grad_scale, *scalars)


def cross_entropy(logits: Tensor, targets: Tensor, loss: Tensor, *, with_grad: bool) -> None:
    """`loss` of each row; with the gradient, it is left in the place of the logits.

    IndexError: a target that is neither a column of `logits` nor -100.
    """
    if _call("cross_entropy", logits, targets, loss, *logits.shape, with_grad):
        raise IndexError(f"a target is outside 0..{logits.shape[1] - 1} and not -100")


def swiglu(h: Tensor) -> Tensor:
    rows, width = h.shape[0], h.shape[1] // 2
    out = h.new_empty(rows, width)
    _call("swiglu", h, out, rows, width)
    return out


def swiglu_backward(
    h: Tensor, g: Tensor, order: Tensor | None = None, weights: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """As `expert_rows.swiglu_backward`: dh and dweights; with weights g becomes the weighted activation."""
    dh = torch.empty_like(h)
    dweights = None if weights is None else torch.empty_like(weights)
    _call("swiglu_backward", h, g, order, weights, dh, dweights, *g.shape)
    return dh, dweights


def combine_rows(y: Tensor, place: Tensor, num_active: int, weights: Tensor | None) -> Tensor:
    tokens, width = len(place) // num_active, y.shape[1]
    out = y.new_empty(tokens, width)
    _call("combine_rows", y, place, weights, out, tokens, num_active, width)
    return out


def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = torch.empty_like(x)
    _call("rmsnorm", x, weight, out, *x.shape, eps)
    return out


def rmsnorm_backward(x: Tensor, dy: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """dx and dweight."""
    rows, width = x.shape
    dx, sums = torch.empty_like(x), x.new_empty(-(-rows // _ROWS_A_SUM), width)
    _call("rmsnorm_backward", x, dy, weight, dx, sums, rows, _ROWS_A_SUM, width, eps)
    return dx, sums.sum(0)


def _heads(parts: tuple[Tensor, ...], positions: Tensor, cos_sin: Tensor, backward: bool) -> None:
    tokens, num_heads, dim = parts[1].shape
    sizes = tokens, len(cos_sin), num_heads, parts[2].shape[1], dim, cos_sin.shape[1] // 2
    if _call("split_heads", *parts, positions, cos_sin, *sizes, backward):
        raise IndexError(f"a position is outside 0..{len(cos_sin) - 1}")


def split_heads(
    qkv: Tensor, cos_sin: Tensor, positions: Tensor, num_heads: int, num_kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v; positions int64. IndexError: a position that is no row of `cos_sin`."""
    dim = qkv.shape[1] // (num_heads + 2 * num_kv_heads)
    q, k, v = (qkv.new_empty(len(qkv), n, dim) for n in (num_heads, num_kv_heads, num_kv_heads))
    _heads((qkv, q, k, v), positions, cos_sin, False)
    return q, k, v


def join_heads(dq: Tensor, dk: Tensor, dv: Tensor, cos_sin: Tensor, positions: Tensor) -> Tensor:
    """The gradient of `split_heads`."""
    dqkv = dq.new_empty(len(dq), dq[0].numel() + 2 * dk[0].numel())
    _heads((dqkv, dq, dk, dv), positions, cos_sin, True)
    return dqkv
