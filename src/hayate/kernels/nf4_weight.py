"""A matrix in NF4 (QLoRA, arXiv 2305.14314): from and to bitsandbytes' form, exactly.

A weight is one of the 16 numbers of `NF4_CODEBOOK` times the scale of its block:

    W[n, k] = codebook[code[n, k]] * scale[n, k // block]       in fp32, then rounded once

bitsandbytes cuts the flattened matrix into blocks of 64, scale = max |w| of the block, and stores
codes[i] in the high half of byte i // 2 for even i, in the low half for odd i. `nf4_pack` turns
that, once, into what the kernels read (`NF4Weight`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hayate.errors import UsageError

__all__ = [
    "GROUP",
    "NF4_CODEBOOK",
    "NF4Weight",
    "nf4_dequantize_reference",
    "nf4_pack",
    "nf4_quantize",
]

# bitsandbytes' constants, exact in fp32.
NF4_CODEBOOK = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_ZERO_CODE = 7
# Columns whose codes lie together, in the kernels' order; rows are filled up to a multiple of it.
GROUP = 128
_QUANTIZE_BLOCK = 64
# Elements that the references hold in fp32 at a time.
_PIECE = 1 << 24


class NF4Weight(NamedTuple):
    """A matrix (N, K) in NF4; all on one device, rows independent of each other.

    So layers are merged by concatenating `codes` and `scales` of weights with equal K and block, and
    cut by rows.

    codes: uint8 (N, ceil(K / 128) * 64). Byte 16 t + 4 r + p of a group of 128 columns, where
        p = 2 u + v, holds columns 32 r + 16 u + 4 t + 2 v (low half) and the one after it (high
        half): the 16 bytes t are then one lane's share of a row on the tensor cores (`nf4_gemm`), and the eight
        codes of a 32-bit word r share a scale or two where vectors are decoded (`cpu_nf4.c`). Columns
        from K on have the code of zero.
    scales: float32 (N, ceil(K / 128) * 128 / block); zero for blocks from K on. In 16 bits they
        would be read in 5 % less time, but no longer be those of the checkpoint.
    block: 64, 32 or 16: the largest of them that divides K, since bitsandbytes' blocks go on from
        one row into the next; then the pieces of a block repeat its scale.
    in_features: K.
    """

    codes: Tensor
    scales: Tensor
    block: int
    in_features: int

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.codes.shape[0], self.in_features

    def to(self, device: torch.device | str) -> NF4Weight:
        """The weight on another device."""
        return self._replace(codes=self.codes.to(device), scales=self.scales.to(device))


def nf4_quantize(w: Tensor) -> tuple[Tensor, Tensor]:
    """`w` (any shape, N K elements) in bitsandbytes' form, bit for bit what that writes.

    Returns codes uint8 (ceil(N K / 2),), two to a byte, and absmax float32 (ceil(N K / 64),). A code
    is the number of midpoints between codebook values that are below w / absmax.
    """
    flat = w.detach().reshape(-1)
    codebook = torch.tensor(NF4_CODEBOOK, device=w.device)
    midpoints = (codebook[:-1] + codebook[1:]) / 2
    codes, absmax = [], []
    for piece in flat.split(_PIECE):
        whole = piece.numel() - piece.numel() % _QUANTIZE_BLOCK
        blocks = piece[:whole].float().view(-1, _QUANTIZE_BLOCK)
        largest = blocks.abs().amax(-1)
        scaled = blocks * (1 / largest.clamp(min=1e-38))[:, None]
        parts = [scaled.clamp(-1, 1).view(-1)]
        absmax.append(largest)
        if whole < piece.numel():  # bitsandbytes divides in a block that is not full
            rest = piece[whole:].float()
            largest = rest.abs().amax().clamp(min=1e-38)
            parts.append((rest / largest).clamp(-1, 1))
            absmax.append(largest.view(1))
        scaled = torch.cat(parts)
        if scaled.numel() % 2:
            scaled = torch.nn.functional.pad(scaled, (0, 1))
        code = torch.bucketize(scaled, midpoints, out_int32=True).to(torch.uint8)
        codes.append(code[::2] << 4 | code[1::2])
    return torch.cat(codes), torch.cat(absmax)


def nf4_pack(
    codes: Tensor, absmax: Tensor, n: int, k: int, block_size: int = _QUANTIZE_BLOCK
) -> NF4Weight:
    """The weight (n, k) that bitsandbytes stored; exact.

    Args:
        codes: uint8, n k / 2 elements in any shape; element 2 i of the matrix in the high half.
        absmax: float32 (ceil(n k / block_size),), the scale of each block of the flattened matrix
            (already freed of bitsandbytes' second quantisation).
        block_size: elements that share a scale; a multiple of 16.

    Raises UsageError for sizes that do not fit together.
    """
    if k % 16 or block_size % 16:
        raise UsageError(f"NF4 takes rows and blocks of a multiple of 16, got {k} and {block_size}")
    blocks = -(-n * k // block_size)
    if codes.dtype != torch.uint8 or codes.numel() * 2 != n * k or absmax.numel() != blocks:
        raise UsageError(
            f"an NF4 weight ({n}, {k}) has {n * k // 2} bytes of codes and {blocks} scales, "
            f"got {codes.numel()} of {codes.dtype} and {absmax.numel()}"
        )
    block = next(b for b in (64, 32, 16) if k % b == 0 and block_size % b == 0)
    groups = -(-k // GROUP)
    # Bytes with the first column in the low half, as (n, group, r, u, t, v), to (n, group, t, r, u, v).
    codes = codes.reshape(n, k // 2)
    codes = codes << 4 | codes >> 4
    padding = groups * GROUP - k
    if padding:
        codes = torch.nn.functional.pad(codes, (0, padding // 2), value=_ZERO_CODE * 17)
    codes = codes.view(n, groups, 4, 2, 4, 2).permute(0, 1, 4, 2, 3, 5).reshape(n, -1).contiguous()
    starts = torch.arange(0, k, block, device=absmax.device)
    rows = torch.arange(n, device=absmax.device)
    scales = absmax.reshape(-1).float()[(rows[:, None] * k + starts) // block_size]
    scales = torch.nn.functional.pad(scales, (0, padding // block)).contiguous()
    return NF4Weight(codes, scales, block, k)


def nf4_dequantize_reference(weight: NF4Weight, dtype: torch.dtype) -> Tensor:
    """`nf4_dequantize` in PyTorch."""
    n, k = weight.shape
    codebook = torch.tensor(NF4_CODEBOOK, device=weight.codes.device)
    byte = torch.arange(256, device=weight.codes.device)
    pairs = torch.stack([codebook[byte % 16], codebook[byte // 16]], dim=1)
    out = torch.empty(n, k, dtype=dtype, device=weight.codes.device)
    step = max(1, _PIECE // k)
    for first in range(0, n, step):
        codes = weight.codes[first : first + step]
        rows = codes.shape[0]
        natural = codes.view(rows, -1, 4, 4, 2, 2).permute(0, 1, 3, 4, 2, 5).reshape(-1).int()
        values = pairs.index_select(0, natural).view(rows, -1, weight.block)
        values *= weight.scales[first : first + step, :, None]
        out[first : first + step] = values.view(rows, -1)[:, :k]
    return out
