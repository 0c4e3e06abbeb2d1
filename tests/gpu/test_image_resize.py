"""Images resized on the GPU, in bf16, against Pillow on the CPU: equal, to the last bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hayate.vision.image import preprocess
from hayate.vision.slicing import plan_slices


def scene(height: int, width: int) -> np.ndarray:
    """Smooth shading, hard edges and noise."""
    y, x = np.mgrid[0:height, 0:width]
    smooth = np.stack([x * 255 / width, y * 255 / height, 128 + 127 * np.sin((x + y) / 9)], -1)
    edges = (((x // 7 + y // 5) % 2) * 255)[:, :, None]
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3))
    return np.where(
        (x % 3)[:, :, None] == 0, smooth, np.where((y % 2)[:, :, None], edges, noise)
    ).astype(np.uint8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("width", "height", "most"),
    [
        (4032, 3024, 9),
        (1280, 720, 9),
        (720, 1280, 9),
        (449, 448, 9),
        (30, 30, 9),
        (1, 1, 9),
        (10, 2000, 9),
        (1920, 1080, 1),
    ],
)
def test_equals_pillow(width: int, height: int, most: int, dtype: torch.dtype) -> None:
    image, plan = scene(height, width), plan_slices(width, height, max_slices=most)
    found = preprocess(image, plan, "cuda", dtype)
    expected = preprocess(image, plan, "cpu", dtype)
    assert found.sizes == expected.sizes and found.patches.dtype == dtype
    assert torch.equal(found.patches.cpu(), expected.patches)


def test_bilinear() -> None:
    image, plan = scene(500, 800), plan_slices(800, 500)
    found, expected = (
        preprocess(image, plan, d, torch.bfloat16, resample="bilinear") for d in ("cuda", "cpu")
    )
    assert torch.equal(found.patches.cpu(), expected.patches)
