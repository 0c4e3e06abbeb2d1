"""What the Triton kernel files share: guarded import, PDL, launching, the list to compile.

A kernel file uses it like this::

    from hayate.kernels._triton import (
        gdc_launch_dependents, gdc_wait, launch, next_power_of_2, register_compile, tl, triton,
    )

    @triton.jit
    def _scale_kernel(x_ptr, out_ptr, factor, n, BLOCK: tl.constexpr, PDL: tl.constexpr):
        gdc_launch_dependents(PDL)      # first: let the next kernel start its own prologue
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        # here a kernel may load weights and constants, nothing that an earlier kernel wrote
        gdc_wait(PDL)                   # before activations are read and anything is written
        x = tl.load(x_ptr + i, mask=i < n).to(tl.float32)
        tl.store(out_ptr + i, (x * factor).to(out_ptr.dtype.element_ty), mask=i < n)

    register_compile(
        _scale_kernel, "scale",
        {"x_ptr": "*bf16", "out_ptr": "*bf16", "factor": "fp32", "n": "i32:16"},
        {"BLOCK": 1024}, num_warps=4,
    )

    def _scale(x, factor):
        out = torch.empty_like(x)
        n = x.numel()
        launch(_scale_kernel, (triton.cdiv(n, 1024),), x, out, factor, n, BLOCK=1024, num_warps=4)
        return out

`launch` fills in `PDL`. Where Triton is not installed the file still imports; only `launch` fails.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from hayate.errors import DeviceError
from hayate.kernels._dispatch import has_pdl

__all__ = [
    "COMPILE_CASES",
    "HAS_TRITON",
    "CompileCase",
    "TensorDescriptor",
    "cdiv",
    "gdc_launch_dependents",
    "gdc_wait",
    "launch",
    "next_power_of_2",
    "num_sms",
    "prefetch_l2",
    "register_compile",
    "tl",
    "triton",
]


class _Absent:
    """Stands in for a module that is not installed: kernels can be defined, not launched."""

    def __getattr__(self, name: str) -> _Absent:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> _Absent:
        return self


try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    HAS_TRITON = True
except ImportError:
    triton = tl = TensorDescriptor = _Absent()
    HAS_TRITON = False


@triton.jit
def gdc_wait(PDL: tl.constexpr):
    """Wait until the kernels before this one are complete; does nothing without PDL."""
    # The branch hides the instruction from the interpreter and from GPUs before sm_90.
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def gdc_launch_dependents(PDL: tl.constexpr):
    """Let the next kernel start once every program has come here; nothing without PDL."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetch_l2(pointers, PDL: tl.constexpr):
    """Ask for the 128-byte lines at `pointers` to be brought to the L2 cache; nothing without PDL.

    For weights, before `gdc_wait`: the memory works while the kernel before this one finishes.
    """
    if PDL:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [pointers.to(tl.uint64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, pdl: bool = True, **meta: Any) -> None:
    """Run `kernel[grid](*args, **meta)` on the device of the first tensor in `args`.

    The launch is programmatic (it may overlap the end of the kernel before it) when `pdl` is true,
    the device is sm_90 or later, and the kernel takes a `PDL` constexpr, which is filled in here.
    Such a kernel must call `gdc_wait(PDL)` before it reads or writes anything an earlier kernel
    touches. `meta` holds the constexprs, `num_warps` and `num_stages`.

    Raises DeviceError where Triton is not installed.
    """
    if not HAS_TRITON:
        raise DeviceError("Triton is not installed, which GPU kernels need: pip install triton")
    device = next(a.device for a in args if isinstance(a, torch.Tensor))
    is_cuda = device.type == "cuda"
    if "PDL" in kernel.arg_names:
        meta["PDL"] = pdl and is_cuda and has_pdl(device.index)
        if meta["PDL"]:
            meta["launch_pdl"] = True
    if is_cuda and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*args, **meta)
    else:
        kernel[grid](*args, **meta)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up; `triton.cdiv`, also where Triton is not installed."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n` (n >= 1)."""
    return 1 << (n - 1).bit_length()


def num_sms(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; 132, an H200's, elsewhere (the interpreter)."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


@dataclass(frozen=True)
class CompileCase:
    """A specialisation of a kernel that `hayate.bench.compile_kernels` builds."""

    kernel: Any
    name: str
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    min_cc: int = 80  # the lowest architecture that launches this specialisation
    max_cc: int = 999
    may_spill: bool = False


COMPILE_CASES: list[CompileCase] = []


def register_compile(
    kernel: Any,
    name: str,
    signature: dict[str, str],
    constexprs: dict[str, Any],
    *,
    num_warps: int = 4,
    num_stages: int = 3,
    min_cc: int = 80,
    max_cc: int = 999,
    may_spill: bool = False,
) -> None:
    """List a specialisation of `kernel` that must compile for every architecture it can run on.

    Each costs about a second: list one for every path through the kernel and every choice of tiles, not for
    every model, and first the one that says most about an architecture (`compile_kernels.covering_jobs` compiles
    the first for all of them, the others for one each).

    Args:
        name: unique, like "gemv_4096x4096_rmsnorm".
        signature: type of every argument that is not a constexpr, in Triton's spelling ("*bf16",
            "i32", "fp32"). Pointers count as 16-byte aligned; "i32:16" is an integer divisible by
            16, which Triton specialises on at launch.
        constexprs: every constexpr but `PDL`, which is true from sm_90 on.
        min_cc, max_cc: the architectures that launch this one (80, 86, 89, 90, 100, 120).
        may_spill: do not fail when registers spill; say why in a comment.
    """
    COMPILE_CASES.append(
        CompileCase(
            kernel,
            name,
            signature,
            constexprs,
            num_warps,
            num_stages,
            min_cc,
            max_cc,
            may_spill,
        )
    )
