"""What an optimizer state narrower than fp32 is rounded with, so that nothing is lost on average.

Stochastic rounding: a value between two neighbours of a grid becomes the upper one with the probability that
keeps its mean. The random numbers are Philox 4x32 with 7 rounds (Salmon et al., SC 2011), keyed by the seed,
with the element's index // 4 and the step as the counter: 32 bits an element, whatever ran before or beside it.

Moments in 8 bits share an fp32 scale per block of 256 elements, the largest magnitude in it. The grid is
logarithmic: code c of 1 ... top stands for scale * 2^((c - top) * 2/21), code 0 for zero, so that neighbours
differ by 6.8 % wherever they lie.

    first moment     sign and top = 127: 12 octaves below the scale; smaller ones round to the lowest code or to zero
    second moment    top = 255: 24.2 octaves, which are 12.1 of its square root; a smaller one that is not zero
                     becomes code 1, so that rounding never makes it zero and an update never explodes
"""

from __future__ import annotations

import torch
from torch import Tensor

from hayate.kernels._triton import tl, triton

__all__ = [
    "BLOCK_SIZE",
    "dequantize",
    "quantize",
    "random_bits",
    "round_to_bfloat16",
]

BLOCK_SIZE = 256  # elements that share a scale
ROUNDS = 7  # of Philox: the fewest that pass BigCrush, plus a margin, are these
OCTAVES_PER_CODE = 2 / 21
TOP_FIRST, TOP_SECOND = 127, 255
_MASK = 0xFFFFFFFF


def random_bits(seed: int, step: int, start: int, count: int, device: torch.device) -> Tensor:
    """32 random bits for each of the elements start ... start + count - 1, as int64; start is a multiple of 4."""
    group = start // 4 + torch.arange((count + 3) // 4, device=device)
    c0, c1 = group & _MASK, group >> 32
    c2, c3 = torch.full_like(group, step & _MASK), torch.zeros_like(group)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(ROUNDS):
        a, b = _product(0xD2511F53, c0), _product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = b[0] ^ c1 ^ k0, b[1], a[0] ^ c3 ^ k1, a[1]
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return torch.stack([c0, c1, c2, c3], dim=-1).flatten()[:count]


def _product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """The upper and the lower 32 bits of a * b; b below 2^32. Int64 would overflow: in two parts."""
    low, high = (a & 0xFFFF) * b, (a >> 16) * b
    middle = high + (low >> 16)
    return middle >> 16, ((middle << 16) | (low & 0xFFFF)) & _MASK


def round_to_bfloat16(x: Tensor, bits: Tensor) -> Tensor:
    """fp32 to bf16, up with the probability of the part that is cut; bits: 16 random ones, int64."""
    raised = x.contiguous().view(torch.int32) + bits.to(torch.int32).view(x.shape)
    return (raised & -65536).view(torch.float32).to(torch.bfloat16)


def quantize(x: Tensor, bits: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """(codes, scales) of a moment x (N,) fp32; bits (N,): 8 random ones, int64.

    codes (N,) are int8 for the first moment (signed), uint8 for the second; scales (ceil(N / 256),) fp32.
    """
    top = TOP_FIRST if signed else TOP_SECOND
    padding = -x.numel() % BLOCK_SIZE
    blocks = torch.nn.functional.pad(x, (0, padding)).view(-1, BLOCK_SIZE)
    scales = blocks.abs().amax(1)
    share = blocks.abs() / scales.clamp_min(1e-38)[:, None]
    low = (share.log2() / OCTAVES_PER_CODE + top).clamp(0, top).floor()
    below = torch.where(low > 0, torch.exp2((low - top) * OCTAVES_PER_CODE), 0)
    above = torch.exp2((low + 1 - top) * OCTAVES_PER_CODE)
    u = (torch.nn.functional.pad(bits, (0, padding)).view_as(blocks) + 0.5) / 256
    codes = (low + (u * (above - below) < share - below)).clamp_max(top)
    if signed:
        codes = codes * blocks.sign()
    else:
        codes = torch.where(share > 0, codes.clamp_min(1), 0)
    dtype = torch.int8 if signed else torch.uint8
    return codes.to(dtype).flatten()[: x.numel()], scales


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """The moment (N,) fp32 of its codes and scales; int8 codes are a first moment, uint8 a second."""
    c = codes.float()
    top = TOP_FIRST if codes.dtype is torch.int8 else TOP_SECOND
    magnitude = torch.where(c == 0, 0, torch.exp2((c.abs() - top) * OCTAVES_PER_CODE))
    return magnitude * c.sign() * scales.repeat_interleave(BLOCK_SIZE)[: c.numel()]


# ---- the same in Triton, for tiles (blocks, 256) ------------------------------------------------


@triton.jit
def random_bits_tile(seed, step, first, BLOCKS: tl.constexpr):
    """`random_bits` of the 256 * BLOCKS elements from `first` (int64, a multiple of 256) on, int32."""
    row = tl.arange(0, BLOCKS)[:, None]
    group = first // 4 + row * 64 + tl.arange(0, 64)[None, :]
    low = (group & 0xFFFFFFFF).to(tl.uint32)
    high = (group >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    r0, r1, r2, r3 = tl.philox(seed, low, high, zero + step, zero, 7)
    pairs = tl.join(tl.join(r0, r2), tl.join(r1, r3))  # [..., i, j] is number 2i + j
    return tl.reshape(pairs, (BLOCKS, 256)).to(tl.int32, bitcast=True)


@triton.jit
def round_to_bfloat16_tile(x, bits):
    """`round_to_bfloat16`, as the 16 bits of the result."""
    raised = x.to(tl.int32, bitcast=True) + bits
    return (raised >> 16).to(tl.int16)


@triton.jit
def quantize_tile(x, bits, SIGNED: tl.constexpr):
    """`quantize` of tiles (blocks, 256): codes and scales (blocks,)."""
    TOP: tl.constexpr = 127 if SIGNED else 255
    STEP: tl.constexpr = 2 / 21
    scales = tl.max(tl.abs(x), axis=1)
    share = tl.abs(x) / tl.maximum(scales, 1e-38)[:, None]
    low = tl.log2(tl.maximum(share, 1e-38)) / STEP + TOP
    low = tl.floor(tl.minimum(tl.maximum(low, 0.0), TOP))
    below = tl.where(low > 0, tl.exp2((low - TOP) * STEP), 0.0)
    above = tl.exp2((low + 1 - TOP) * STEP)
    u = (bits.to(tl.float32) + 0.5) / 256
    codes = tl.minimum(tl.where(u * (above - below) < share - below, low + 1, low), TOP)
    if SIGNED:
        codes = tl.where(x < 0, -codes, codes).to(tl.int8)
    else:
        codes = tl.where(share > 0, tl.maximum(codes, 1.0), 0.0).to(tl.uint8)
    return codes, scales


@triton.jit
def dequantize_tile(codes, scales, SIGNED: tl.constexpr):
    """`dequantize` of tiles (blocks, 256)."""
    TOP: tl.constexpr = 127 if SIGNED else 255
    STEP: tl.constexpr = 2 / 21
    c = codes.to(tl.float32)
    magnitude = tl.where(c == 0, 0.0, tl.exp2((tl.abs(c) - TOP) * STEP)) * scales[:, None]
    return tl.where(c < 0, -magnitude, magnitude)
