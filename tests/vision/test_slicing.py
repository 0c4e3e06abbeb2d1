"""Slice plans against the published table, and the bounds that hold for every image."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hayate.errors import ImageError, UsageError
from hayate.vision.slicing import plan_slices

# image, most slices: grid (columns, rows), overview in patches (h, w), resized, tile in patches (h, w), tokens.
# Computed by the model's own image processor.
TABLE = [
    ((448, 448), 9, None, (32, 32), None, None, 64),
    ((100, 100), 9, None, (32, 32), None, None, 64),
    ((30, 30), 9, None, (32, 32), None, None, 64),
    ((449, 448), 9, (2, 1), (32, 32), (644, 630), (45, 23), 192),
    ((512, 512), 9, (1, 2), (32, 32), (630, 644), (23, 45), 192),
    ((600, 400), 9, (2, 1), (26, 39), (784, 518), (37, 28), 192),
    ((640, 480), 9, (2, 1), (28, 37), (728, 546), (39, 26), 192),
    ((800, 600), 9, (2, 2), (28, 37), (1036, 784), (28, 37), 320),
    ((1024, 1024), 9, (3, 2), (32, 32), (1092, 1092), (39, 26), 448),
    ((1280, 720), 9, (3, 2), (24, 43), (1470, 812), (29, 35), 448),
    ((720, 1280), 9, (2, 3), (43, 24), (812, 1470), (35, 29), 448),
    ((1344, 1344), 9, (3, 3), (32, 32), (1344, 1344), (32, 32), 640),
    ((1700, 2200), 9, (3, 3), (36, 28), (1176, 1512), (36, 28), 640),
    ((1920, 1080), 9, (4, 2), (24, 43), (1680, 952), (34, 30), 576),
    ((4032, 3024), 9, (3, 3), (28, 37), (1554, 1176), (28, 37), 640),
    ((3000, 500), 9, (7, 1), (13, 78), (2940, 476), (34, 30), 512),
    ((10, 2000), 9, None, (452, 2), None, None, 64),
    ((1920, 1080), 1, None, (24, 43), None, None, 64),
    ((1920, 1080), 2, (2, 1), (24, 43), (840, 476), (34, 30), 192),
]


@pytest.mark.parametrize(("size", "most", "grid", "overview", "resized", "tile", "tokens"), TABLE)
def test_table(size, most, grid, overview, resized, tile, tokens) -> None:
    plan = plan_slices(*size, max_slices=most)
    assert plan.size == size and plan.grid == grid and plan.resized == resized
    num_tiles = 0 if grid is None else grid[0] * grid[1]
    assert plan.sizes == [overview] + [tile] * num_tiles
    assert plan.overview == (14 * overview[1], 14 * overview[0])
    assert plan.tile == (None if tile is None else (14 * tile[1], 14 * tile[0]))
    assert plan.num_pictures == 1 + num_tiles and 64 * plan.num_pictures == tokens
    assert plan.num_patches == overview[0] * overview[1] + num_tiles * (
        tile[0] * tile[1] if tile else 0
    )


@given(st.integers(1, 30_000), st.integers(1, 30_000), st.integers(1, 9))
def test_every_plan_is_bounded(width: int, height: int, most: int) -> None:
    if max(width, height) > 1024 * min(width, height):
        with pytest.raises(ImageError, match=f"{width}x{height} pixels is too thin"):
            plan_slices(width, height, max_slices=most)
        return
    plan = plan_slices(width, height, max_slices=most)
    assert plan.num_pictures <= 1 + (most if most > 1 else 0)
    # 448^2 pixels are 1024 patches; rounding a side of 1.5 patches up to 2 adds at most a third, and the same again
    # for the other side, which is then long and rounds by next to nothing.
    assert all(h >= 1 and w >= 1 and h * w <= 1024 * 4 / 3 + max(h, w) for h, w in plan.sizes)


def test_what_cannot_be_planned() -> None:
    for width, height in ((0, 10), (10, 0), (-1, 5)):
        with pytest.raises(ImageError, match="empty"):
            plan_slices(width, height)
    plan_slices(1024, 1)
    with pytest.raises(ImageError, match="at most 1024 times"):
        plan_slices(1025, 1)
    for most in (0, 10):
        with pytest.raises(UsageError, match=f"max_slices must be 1 to 9; it is {most}"):
            plan_slices(100, 100, max_slices=most)
