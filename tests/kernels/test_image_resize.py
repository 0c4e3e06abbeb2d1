"""Image resize and patches: PyTorch reference and Triton kernels against Pillow, with no difference at all."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tests.vision.photographs import photograph

from hayate.kernels._dispatch import use
from hayate.kernels.image_resize import Resample, image_patches, resize_reference

FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def random_image(height: int, width: int, kind: str = "noise") -> np.ndarray:
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return np.where(image > 127, 255, 0).astype(np.uint8) if kind == "black and white" else image


def by_pillow(image: np.ndarray, size: tuple[int, int], resample: Resample) -> np.ndarray:
    """Horizontally, then vertically: one call of Pillow before version 13, and of most shapes since."""
    narrowed = Image.fromarray(image).resize((size[0], image.shape[0]), FILTERS[resample])
    return np.array(narrowed.resize(size, FILTERS[resample]))


def patches_of(levels: np.ndarray, grid: tuple[int, int], p: int) -> torch.Tensor:
    """Naively: tile by tile, patch by patch, (channel, py, px)."""
    height, width, _ = levels.shape
    h, w = height // grid[1], width // grid[0]
    table = (torch.arange(256).float() / 255 - 0.5) / 0.5
    patches = [
        table[torch.from_numpy(levels[y : y + p, x : x + p]).long()].permute(2, 0, 1).flatten()
        for top in range(0, height, h)
        for left in range(0, width, w)
        for y in range(top, top + h, p)
        for x in range(left, left + w, p)
    ]
    return torch.stack(patches)


side = st.integers(1, 90)


@settings(max_examples=150, deadline=None)
@given(
    side,
    side,
    side,
    side,
    st.sampled_from(["noise", "black and white"]),
    st.sampled_from(sorted(FILTERS)),
)
def test_reference_equals_pillow(height, width, new_height, new_width, kind, resample) -> None:
    # Black and white noise overshoots the most, so that clipping is met.
    image = random_image(height, width, kind)
    size = (new_width, new_height)
    found = resize_reference(torch.from_numpy(image), size, resample)
    np.testing.assert_array_equal(found.numpy(), by_pillow(image, size, resample))


def test_reference_equals_one_call_of_pillow_on_photographs() -> None:
    for name, size in (
        ("chelsea.png", (322, 210)),
        ("retina.jpg", (196, 196)),
        ("coffee.png", (784, 518)),
    ):
        image = np.array(Image.open(photograph(name)).convert("RGB"))
        for resample, filter in FILTERS.items():
            expected = np.array(Image.fromarray(image).resize(size, filter))
            found = resize_reference(torch.from_numpy(image), size, resample)
            np.testing.assert_array_equal(found.numpy(), expected)


@pytest.mark.parametrize("how", ["reference", "native", "triton"])
@pytest.mark.parametrize("resample", sorted(FILTERS))
@pytest.mark.parametrize(
    ("height", "width", "size", "grid", "patch"),
    [
        (30, 41, (14, 14), (1, 1), 14),  # shrink
        (9, 7, (42, 28), (3, 2), 14),  # enlarge
        (40, 10, (16, 12), (1, 3), 4),  # one of each
        (28, 28, (28, 28), (2, 1), 14),  # neither
        (1, 1, (14, 14), (1, 1), 14),
        (2, 200, (28, 14), (1, 1), 14),  # wide taps
    ],
)
def test_patches(how, resample, height, width, size, grid, patch) -> None:
    image = random_image(height, width, "black and white")
    expected = patches_of(by_pillow(image, size, resample), grid, patch)
    options = {"grid": grid, "patch_size": patch, "resample": resample}
    with use(how):
        found = image_patches(torch.from_numpy(image), size, dtype=torch.float32, **options)
    assert torch.equal(found, expected)


def test_photograph() -> None:
    # A part of one: the interpreter takes a minute for the whole.
    image = np.array(Image.open(photograph("chelsea.png")).convert("RGB"))[100:160, 120:200].copy()
    expected = np.array(Image.fromarray(image).resize((28, 28), FILTERS["bicubic"]))
    with use("triton"):
        found = image_patches(torch.from_numpy(image), (28, 28), grid=(2, 1), dtype=torch.float16)
    assert torch.equal(found, patches_of(expected, (2, 1), 14).half())
