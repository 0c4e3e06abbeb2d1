"""Slice plans: an image becomes one small overview and up to nine tiles in full detail.

The algorithm of MiniCPM-V 2.6 (the same in its image processor and its training code), number for number. All sizes
are (width, height) in pixels unless said otherwise; rounding is Python's, half to even.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hayate.errors import ImageError, UsageError

MAX_SLICES = 9  # tiles an image, as trained

Size = tuple[int, int]


@dataclass(frozen=True)
class SlicePlan:
    """The pictures an image is seen as: the overview first, then the tiles row by row, left to right.

    Every side is a multiple of the patch size. Without a grid the overview is the only picture.
    """

    size: Size  # of the image
    overview: Size
    grid: tuple[int, int] | None  # (columns, rows) of tiles
    tile: Size | None
    patch_size: int

    @property
    def resized(self) -> Size | None:
        """What the whole image is resized to before it is cut into tiles."""
        if self.grid is None or self.tile is None:
            return None
        return self.grid[0] * self.tile[0], self.grid[1] * self.tile[1]

    @property
    def num_pictures(self) -> int:
        return 1 if self.grid is None else 1 + self.grid[0] * self.grid[1]

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of each picture in patches."""
        pictures = [self.overview]
        if self.tile is not None:
            pictures += [self.tile] * (self.num_pictures - 1)
        return [(h // self.patch_size, w // self.patch_size) for w, h in pictures]

    @property
    def num_patches(self) -> int:
        """Patches of all pictures."""
        return sum(h * w for h, w in self.sizes)


def plan_slices(
    width: int,
    height: int,
    *,
    max_slices: int = MAX_SLICES,
    resolution: int = 448,
    patch_size: int = 14,
) -> SlicePlan:
    """The slice plan of a `width` x `height` image.

    max_slices: most tiles, 1 to 9; 1 means the overview alone. resolution: pictures have about resolution^2 pixels.

    Raises:
        UsageError: max_slices is out of range.
        ImageError: a side is zero, or the image is so thin that a picture of resolution^2 pixels would be thinner
            than a patch (1024 times as long as wide, with the default sizes); the formulas would stretch it to
            several times the usual number of patches.
    """
    if not 1 <= max_slices <= MAX_SLICES:
        raise UsageError(f"max_slices must be 1 to {MAX_SLICES}; it is {max_slices!r}")
    if width < 1 or height < 1:
        raise ImageError(f"an image of {width}x{height} pixels is empty")
    longest_ratio = (resolution // patch_size) ** 2
    if max(width, height) > longest_ratio * min(width, height):
        raise ImageError(
            f"an image of {width}x{height} pixels is too thin: one side may be at most {longest_ratio} times the "
            "other; cut it into parts"
        )
    grid = _grid(width, height, max_slices, resolution)
    if grid is None:
        overview = _fit(width, height, resolution, patch_size, enlarge=True)
        return SlicePlan((width, height), overview, None, None, patch_size)
    overview = _fit(width, height, resolution, patch_size, enlarge=False)
    columns, rows = grid
    tile = _fit(
        _multiple_of(columns, width) / columns,
        _multiple_of(rows, height) / rows,
        resolution,
        patch_size,
        enlarge=True,
    )
    return SlicePlan((width, height), overview, grid, tile, patch_size)


def _multiple_of(divisor: int, length: float) -> int:
    """The multiple of `divisor` nearest to `length`, at least one."""
    return max(round(length / divisor) * divisor, divisor)


def _fit(width: float, height: float, resolution: int, patch_size: int, *, enlarge: bool) -> Size:
    """A size of about resolution^2 pixels and the same shape; a smaller one keeps its size unless `enlarge`."""
    if enlarge or width * height > resolution * resolution:
        ratio = width / height
        height = int(resolution / math.sqrt(ratio))
        width = int(height * ratio)
    return _multiple_of(patch_size, width), _multiple_of(patch_size, height)


def _grid(width: int, height: int, max_slices: int, resolution: int) -> tuple[int, int] | None:
    """(columns, rows) with tiles nearest to squares, for one tile less, as many, or one more than the pixels need."""
    needed = min(math.ceil(width * height / resolution**2), max_slices)
    if needed <= 1:
        return None
    counts = [n for n in (needed - 1, needed, needed + 1) if 1 < n <= max_slices]
    grids = [(m, n // m) for n in counts for m in range(1, n + 1) if n % m == 0]
    log_ratio = math.log(width / height)
    # The first of equals.
    return min(grids, key=lambda grid: abs(log_ratio - math.log(grid[0] / grid[1])))
