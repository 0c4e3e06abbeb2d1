"""From codes of NF4 to the codebook's values on a GPU, eight codes of a word at a time.

At 4.5 bits a weight an H200 could read 7.8e12 weights a second, and can issue 3.9 instructions for
each, half of them of integers: these lookups are most of what a product with few rows costs.

| Lookup    | how                                                            | instructions a weight |
|-----------|----------------------------------------------------------------|-----------------------|
| "shared"  | two codes, one byte, in a table of the 256 pairs in shared     | 1.5                   |
|           | memory, one copy for each lane so that no two lanes meet in a  |                       |
|           | bank: 32 KB, filled by every program                           |                       |
| "permute" | one code among 16 values in registers, two planes of bytes: PRMT | 2.6 (integers)      |
| "memory"  | loads from the codebook; for Triton's interpreter              | many                  |

The values are the codebook's in 16 bits, without the scale. For bf16 the codebook is first
multiplied by a number that brings its values close to bf16's: they are then 0.08 % off (rms), where
numbers rounded to bf16 are 0.16 % off.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
from torch import Tensor

from hayate.kernels._triton import tl, triton
from hayate.kernels.nf4_weight import NF4_CODEBOOK

__all__ = ["Lookup", "fill_shared_pairs", "lookup", "lookup_table", "stretch"]

Lookup = Literal["shared", "permute", "memory"]

# The multiple of the codebook, in steps of 0.00005 from 1 to 2, that is closest to bf16 numbers.
_BF16_STRETCH = 1.4367


def stretch(dtype: torch.dtype) -> float:
    """What the codebook is multiplied by before it is rounded to `dtype`."""
    return _BF16_STRETCH if dtype == torch.bfloat16 else 1.0


def _codebook(dtype: torch.dtype, device: torch.device) -> Tensor:
    values = torch.tensor(NF4_CODEBOOK, dtype=torch.float64) * stretch(dtype)
    return values.to(dtype).to(device)


@cache
def lookup_table(lookup: Lookup, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """What the kernel's `table_ptr` points at."""
    if lookup == "permute":
        return None
    codebook = _codebook(dtype, device)
    if lookup == "memory":
        return codebook
    # Word e: the value of the low half of the byte e in the low half of the word.
    e = torch.arange(256, device=device)
    pairs = torch.stack([codebook[e % 16], codebook[e // 16]], dim=1)
    return pairs.contiguous().view(torch.int32).view(256)


def _byte_planes(dtype: torch.dtype) -> list[str]:
    """The codebook in 16 bits as PRMT's operands: low bytes of codes 0-3, 4-7, ..., then high bytes."""
    values = _codebook(dtype, torch.device("cpu")).view(torch.int16).tolist()
    planes = [[value >> shift & 255 for value in values] for shift in (0, 8)]
    return [
        f"0x{int.from_bytes(plane[i : i + 4], 'little'):08x}"
        for plane in planes
        for i in (0, 4, 8, 12)
    ]


def _permute_assembly(dtype: torch.dtype) -> str:
    """PTX of eight lookups: the codes of $8, from the lowest bits up, to the 16-bit $0 to $7.

    PRMT chooses four bytes of eight, by three bits of each half byte of its last operand. So four
    codes are looked up among the eight low and the eight high ones, and bit 3 of each code chooses
    between the two; once for the low bytes of the values and once for the high ones.
    """
    low = _byte_planes(dtype)
    lines = [
        ".reg .b32 code, half, below, above, low, high, pair;",
        "and.b32 code, $8, 0x77777777;",
        "shr.u32 half, $8, 1;",
        "lop3.b32 half, half, 0x44444444, 0x32103210, 0xea;",  # (half & 0x44444444) | 0x32103210
    ]
    for first in (0, 4):
        for plane, name in ((low[:4], "low"), (low[4:], "high")):
            lines += [
                f"prmt.b32 below, {plane[0]}, {plane[1]}, code;",
                f"prmt.b32 above, {plane[2]}, {plane[3]}, code;",
                f"prmt.b32 {name}, below, above, half;",
            ]
        for i, order in ((first, "0x5140"), (first + 2, "0x7362")):
            lines += [f"prmt.b32 pair, low, high, {order};", f"mov.b32 {{${i}, ${i + 1}}}, pair;"]
        if first == 0:
            lines += ["shr.u32 code, code, 16;", "shr.u32 half, half, 16;"]
    return "{\n" + "\n".join(lines) + "\n}"


def _shared_assembly() -> str:
    """PTX of eight lookups, two at a time, in the table at $9."""
    lines = [".reg .b32 at, pair;"]
    for i in range(4):
        lines += [
            f"prmt.b32 at, $8, 0, 0x444{i};",
            "mad.lo.u32 at, at, 128, $9;",
            "ld.shared.b32 pair, [at];",
            f"mov.b32 {{${2 * i}, ${2 * i + 1}}}, pair;",
        ]
    return "{\n" + "\n".join(lines) + "\n}"


def _fill_assembly() -> str:
    """PTX that writes the word $2 to the 128 bytes at $3 + 128 $1."""
    lines = [
        ".reg .b32 word, copy, at;",
        "shl.b32 word, $1, 7;",
        "add.u32 word, word, $3;",
        # 16 bytes at a time; eight neighbouring lanes begin at different banks.
        "mov.u32 copy, %laneid;",
        "shl.b32 copy, copy, 4;",
        "and.b32 copy, copy, 112;",
    ]
    for _ in range(8):
        lines += [
            "add.u32 at, word, copy;",
            "st.shared.v4.b32 [at], {$2, $2, $2, $2};",
            "add.u32 copy, copy, 16;",
            "and.b32 copy, copy, 112;",
        ]
    return "{\n" + "\n".join([*lines, "mov.u32 $0, 0;"]) + "\n}"


_FILL = tl.constexpr(_fill_assembly())
_SHARED = tl.constexpr(_shared_assembly())
_PERMUTE_BF16 = tl.constexpr(_permute_assembly(torch.bfloat16))
_PERMUTE_FP16 = tl.constexpr(_permute_assembly(torch.float16))


@triton.jit
def fill_shared_pairs(pairs_ptr):
    """Fill a table in shared memory: 32 copies of each of the 256 words at `pairs_ptr`.

    Word e, copy l at 128 e + 4 l; returns the address of the lane's own copy of word 0.
    """
    base = tl.inline_asm_elementwise(
        """{
        .shared .align 1024 .b32 pairs[8192];
        mov.u32 $0, pairs;
        }""",
        "=r,r", [tl.full((), 0, tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    e = tl.arange(0, 256)
    tl.inline_asm_elementwise(
        _FILL, "=r,r,r,r", [e, tl.load(pairs_ptr + e), base],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    tl.debug_barrier()
    # Not pure, so that it stays behind the barrier, and with it every lookup.
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 lane;
        mov.u32 lane, %laneid;
        shl.b32 lane, lane, 2;
        add.u32 $0, $1, lane;
        }""",
        "=r,r", [base], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def lookup(words, table, dtype: tl.constexpr, LOOKUP: tl.constexpr):
    """The eight codebook values of each word, from the lowest bits up; a tuple of tiles."""
    if LOOKUP == "shared":
        values = tl.inline_asm_elementwise(
            _SHARED, "=h,=h,=h,=h,=h,=h,=h,=h,r,r", [words, table],
            dtype=(dtype.value,) * 8, is_pure=True, pack=1,
        )  # fmt: skip
    elif LOOKUP == "permute":
        values = tl.inline_asm_elementwise(
            _PERMUTE_BF16 if dtype == tl.bfloat16 else _PERMUTE_FP16,
            "=h,=h,=h,=h,=h,=h,=h,=h,r", [words],
            dtype=(dtype.value,) * 8, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        values = ()
        for i in tl.static_range(8):
            values = values + (tl.load(table + (words >> (4 * i) & 15)),)  # noqa: RUF005
    return values
