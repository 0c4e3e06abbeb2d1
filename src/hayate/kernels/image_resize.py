"""An image resized as Pillow resizes it, normalised and cut into patches.

Separable resampling with antialiasing; output x of a row of n pixels that becomes one of m is

    out[x] = sum_j w[x, j] in[j],   w[x, j] = f((j + 1/2 - c) / s) / sum_j f(...)
    c = (x + 1/2) n / m,   s = max(n / m, 1)

with f the cubic convolution kernel of a = -1/2 (Keys, IEEE ASSP 29(6), 1981) or the triangle, over the taps within its
support, which is s times wider when shrinking. As in Pillow, weights are fixed-point numbers of 22 fractional bits and
the horizontal pass is rounded to 8 bits before the vertical one: every result equals Pillow's, bit for bit. (Pillow 13
runs the vertical pass first where the height shrinks much more than the width; models were trained before that.)

A level v becomes (v / 255 - 1/2) / (1/2), in [-1, 1], and the picture a row a patch, (channel, py, px)-flattened.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from hayate.kernels._dispatch import implementation_for
from hayate.kernels._triton import (
    cdiv,
    gdc_launch_dependents,
    gdc_wait,
    launch,
    register_compile,
    tl,
    triton,
)

Resample = Literal["bicubic", "bilinear"]

_FRACTION_BITS = 22  # of a weight: 8 bits of level and 2 of overshoot leave 22 of an int32


@lru_cache(maxsize=64)
def resize_table(length: int, new_length: int, resample: Resample) -> np.ndarray:
    """Row 0: the first source index of each output; rows 1..: its fixed-point weights. (1 + taps, new_length) int32.

    Computed in float64 in Pillow's order of operations, so that the rounded weights are the same.
    """
    scale = length / new_length
    stretch = max(scale, 1.0)
    support = (2.0 if resample == "bicubic" else 1.0) * stretch
    center = (np.arange(new_length) + 0.5) * scale
    first = np.maximum((center - support + 0.5).astype(np.int64), 0)
    end = np.minimum((center + support + 0.5).astype(np.int64), length)
    tap = np.arange((end - first).max())[:, None]
    weights = _filter((tap + first - center + 0.5) * (1.0 / stretch), resample)
    weights[tap >= end - first] = 0.0
    weights /= np.cumsum(weights, axis=0)[-1]  # one after the other, unlike np.sum
    fixed = np.trunc(weights * (1 << _FRACTION_BITS) + np.where(weights < 0, -0.5, 0.5))
    return np.concatenate([first[None], fixed]).astype(np.int32)


def _filter(x: np.ndarray, resample: Resample) -> np.ndarray:
    x = np.abs(x)
    if resample == "bilinear":
        return np.maximum(1.0 - x, 0.0)
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def resize_reference(
    image: Tensor, size: tuple[int, int], resample: Resample = "bicubic"
) -> Tensor:
    """The specification of the resize: (H, W, 3) uint8 -> (height, width, 3) uint8 with size = (width, height)."""
    rows = _resize_last(image.transpose(1, 2), size[0], resample).transpose(1, 2)  # horizontal
    return _resize_last(rows.permute(1, 2, 0), size[1], resample).permute(2, 0, 1)


def _resize_last(x: Tensor, new_length: int, resample: Resample) -> Tensor:
    """Resample the last axis, by a dense matrix. float64 holds all these integers exactly."""
    length = x.shape[-1]
    table = torch.from_numpy(resize_table(length, new_length, resample)).to(x.device)
    taps = torch.arange(table.shape[0] - 1, device=x.device)[:, None]
    source = (table[0] + taps).clamp(max=length - 1)  # beyond the last the weights are 0
    matrix = torch.zeros(length, new_length, dtype=torch.float64, device=x.device)
    matrix.scatter_add_(0, source.long(), table[1:].double())
    half = 1 << (_FRACTION_BITS - 1)
    total = x.double() @ matrix + half
    return (total / (1 << _FRACTION_BITS)).floor().clamp(0, 255).to(torch.uint8)


def normalized_levels(levels: Tensor, dtype: torch.dtype) -> Tensor:
    """(v / 255 - 1/2) / (1/2) of uint8 levels, in float32 step by step and rounded once to `dtype`."""
    return levels.float().div_(255).sub_(0.5).div_(0.5).to(dtype)


def _resize_native(image: Tensor, size: tuple[int, int], resample: Resample) -> Tensor:
    """`resize_reference` by Pillow, one direction a call: so the horizontal pass comes first in every version."""
    from PIL import Image  # only where pictures are met: text models do not wait for it

    how = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}[resample]
    narrowed = Image.fromarray(image.numpy()).resize((size[0], image.shape[0]), how)
    return torch.from_numpy(np.array(narrowed.resize(size, how)))


def _cut(levels: Tensor, grid: tuple[int, int], patch: int, dtype: torch.dtype) -> Tensor:
    (columns, rows), (height, width, channels) = grid, levels.shape
    h, w = height // rows // patch, width // columns // patch
    tiles = levels.view(rows, h, patch, columns, w, patch, channels).permute(0, 3, 1, 4, 6, 2, 5)
    return normalized_levels(tiles.reshape(-1, channels * patch * patch), dtype)


@triton.jit
def _horizontal_kernel(
    image_ptr,  # (H, W, 3) uint8
    table_ptr,  # (1 + taps, new_width) int32
    out_ptr,  # (H, new_width, 3) uint8, written
    height,
    width,
    new_width,
    num_taps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (i, j) computes BLOCK bytes of ROWS rows; neighbouring lanes read neighbouring bytes."""
    gdc_launch_dependents(PDL)
    y = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x, channel = column // 3, column % 3
    inside = (y < height) & (x < new_width)[None, :]
    gdc_wait(PDL)
    first = tl.load(table_ptr + x, mask=x < new_width, other=0)
    total = tl.full((ROWS, BLOCK), 1 << 21, tl.int32)
    for tap in range(num_taps):
        weight = tl.load(table_ptr + (1 + tap) * new_width + x, mask=x < new_width, other=0)
        source = tl.minimum(first + tap, width - 1) * 3 + channel
        level = tl.load(image_ptr + y * (width * 3) + source[None, :], mask=inside, other=0)
        total += level.to(tl.int32) * weight[None, :]
    level = tl.minimum(tl.maximum(total >> 22, 0), 255).to(tl.uint8)
    tl.store(out_ptr + y * (new_width * 3) + column[None, :], level, mask=inside)


@triton.jit
def _vertical_kernel(
    image_ptr,  # (H, W, 3) uint8
    table_ptr,  # (1 + taps, new_height) int32
    values_ptr,  # (256,): the normalised value of each level
    out_ptr,  # (patches, 3 * PATCH * PATCH), written
    height,
    width,
    new_height,
    num_taps,
    columns,  # of tiles
    tile_height,  # in patches
    tile_width,
    num_values,
    PATCH: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """The vertical pass for BLOCK values in the order of the output, which is written once and in sequence."""
    gdc_launch_dependents(PDL)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < num_values
    patch, within = i // (3 * PATCH * PATCH), i % (3 * PATCH * PATCH)
    channel, within = within // (PATCH * PATCH), within % (PATCH * PATCH)
    tile, patch = patch // (tile_height * tile_width), patch % (tile_height * tile_width)
    row = tile // columns * tile_height + patch // tile_width
    column = tile % columns * tile_width + patch % tile_width
    y, x = row * PATCH + within // PATCH, column * PATCH + within % PATCH
    gdc_wait(PDL)
    first = tl.load(table_ptr + y, mask=inside, other=0)
    total = tl.full((BLOCK,), 1 << 21, tl.int32)
    for tap in range(num_taps):
        weight = tl.load(table_ptr + (1 + tap) * new_height + y, mask=inside, other=0)
        source = tl.minimum(first + tap, height - 1)
        level = tl.load(image_ptr + (source * width + x) * 3 + channel, mask=inside, other=0)
        total += level.to(tl.int32) * weight
    level = tl.minimum(tl.maximum(total >> 22, 0), 255)
    tl.store(out_ptr + i, tl.load(values_ptr + level, mask=inside, other=0.0), mask=inside)


_SIZES = dict.fromkeys(("height", "width", "num_taps"), "i32")
register_compile(
    _horizontal_kernel,
    "image_resize_horizontal",
    {"image_ptr": "*u8", "table_ptr": "*i32", "out_ptr": "*u8", **_SIZES, "new_width": "i32"},
    {"ROWS": 4, "BLOCK": 256},
)
register_compile(
    _vertical_kernel,
    "image_resize_patches",
    {
        **{"image_ptr": "*u8", "table_ptr": "*i32", "values_ptr": "*bf16", "out_ptr": "*bf16"},
        **_SIZES,
        **dict.fromkeys(("new_height", "columns", "tile_height", "tile_width"), "i32"),
        "num_values": "i32",
    },
    {"PATCH": 14, "BLOCK": 1024},
)


def _image_patches_triton(
    image: Tensor,
    size: tuple[int, int],
    grid: tuple[int, int],
    patch: int,
    dtype: torch.dtype,
    resample: Resample,
) -> Tensor:
    assert image.is_contiguous()
    (height, width, _), (new_width, new_height), device = image.shape, size, image.device
    assert max(image.numel(), height * new_width * 3) < 2**31  # the kernels' offsets are 32 bits
    across = torch.from_numpy(resize_table(width, new_width, resample)).to(device)
    down = torch.from_numpy(resize_table(height, new_height, resample)).to(device)
    values = normalized_levels(torch.arange(256, dtype=torch.uint8, device=device), dtype)
    narrowed = image.new_empty(height, new_width, 3)
    rows, block = 4, 256
    launch(
        _horizontal_kernel,
        (cdiv(height, rows), cdiv(3 * new_width, block)),
        *(image, across, narrowed, height, width, new_width, across.shape[0] - 1),
        ROWS=rows,
        BLOCK=block,
        num_warps=4,
    )
    out = values.new_empty(new_height // patch * (new_width // patch), 3 * patch * patch)
    block = 1024
    launch(
        _vertical_kernel,
        (cdiv(out.numel(), block),),
        *(narrowed, down, values, out, height, new_width, new_height, down.shape[0] - 1, grid[0]),
        *(new_height // grid[1] // patch, new_width // grid[0] // patch, out.numel()),
        PATCH=patch,
        BLOCK=block,
        num_warps=4,
    )
    return out


def image_patches(
    image: Tensor,
    size: tuple[int, int],
    *,
    grid: tuple[int, int] = (1, 1),
    patch_size: int = 14,
    dtype: torch.dtype,
    resample: Resample = "bicubic",
) -> Tensor:
    """`image` (H, W, 3) uint8, resized to size = (width, height), as patches (rows, 3 * patch_size^2) of `dtype`.

    grid: (columns, rows) of equal tiles; the patches come tile by tile, row by row inside each. Both sides of a tile
    are multiples of patch_size. Resized on the CPU by Pillow itself, on the GPU with the same result.
    """
    (columns, rows), (width, height) = grid, size
    assert image.dtype == torch.uint8 and image.ndim == 3 and image.shape[2] == 3
    assert width % (columns * patch_size) == 0 and height % (rows * patch_size) == 0
    implementation = implementation_for(image)
    if implementation == "triton":
        return _image_patches_triton(image, size, grid, patch_size, dtype, resample)
    if implementation == "native":
        levels = _resize_native(image, size, resample)
    else:
        levels = resize_reference(image, size, resample)
    return _cut(levels.contiguous(), grid, patch_size, dtype)
