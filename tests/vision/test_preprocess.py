"""Images to patches, against the model's own steps written out with Pillow and PyTorch's unfold."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from hayate.errors import UsageError
from hayate.vision.image import open_image, preprocess
from hayate.vision.slicing import plan_slices
from tests.vision.photographs import photograph

GRACE_HOPPER = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"


def pictures_of(image: Image.Image, overview, grid, tile) -> list[Image.Image]:
    """The overview and the tiles by Pillow's resize and crop."""
    pictures = [image.resize(overview, Image.Resampling.BICUBIC)]
    if grid is not None:
        (columns, rows), (w, h) = grid, tile
        whole = image.resize((columns * w, rows * h), Image.Resampling.BICUBIC)
        pictures += [
            whole.crop((x, y, x + w, y + h))
            for y in range(0, rows * h, h)
            for x in range(0, columns * w, w)
        ]
    return pictures


def patches_of(picture: Image.Image) -> torch.Tensor:
    """float32: x / 255, then (x - 0.5) / 0.5, channels first; the columns a 14x14 convolution of stride 14 sees."""
    levels = np.asarray(picture).astype(np.float32) / 255
    mean = std = np.array([0.5, 0.5, 0.5], dtype=np.float32)
    pixels = torch.from_numpy(((levels - mean) / std).transpose(2, 0, 1).copy())
    return torch.nn.functional.unfold(pixels[None], 14, stride=14)[0].T


# file, most slices -> overview (w, h), grid, tile (w, h): sizes written out, not taken from the plan.
CASES = [
    (photograph("coffee.png"), 9, (546, 364), (2, 1), (392, 518)),
    (photograph("retina.jpg"), 9, (448, 448), (3, 3), (448, 448)),
    (photograph("page.png"), 9, (630, 308), None, None),
    (GRACE_HOPPER, 9, (420, 490), (1, 2), (588, 336)),
    (GRACE_HOPPER, 1, (420, 490), None, None),
]


@pytest.mark.parametrize(("file", "most", "overview", "grid", "tile"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_models_own_steps(file: Path, most, overview, grid, tile, dtype) -> None:
    image = Image.open(file).convert("RGB")
    pixels = open_image(file)
    plan = plan_slices(*image.size, max_slices=most)
    found = preprocess(pixels, plan, "cpu", dtype)
    pictures = pictures_of(image, overview, grid, tile)
    assert found.sizes == [(p.height // 14, p.width // 14) for p in pictures] == plan.sizes
    expected = torch.cat([patches_of(p) for p in pictures])
    assert found.patches.shape == (plan.num_patches, 588) and found.patches.dtype == dtype
    assert torch.equal(found.patches, expected.to(dtype))


def test_small_images_are_enlarged() -> None:
    pixels = np.full((1, 1, 3), (0, 51, 255), dtype=np.uint8)
    found = preprocess(pixels, plan_slices(1, 1), "cpu", torch.float32)
    assert found.sizes == [(32, 32)]
    values = torch.tensor([-1.0, -0.6, 1.0]).repeat_interleave(196).expand(1024, 588)
    # 51 / 255 and the two steps after it round in float32.
    torch.testing.assert_close(found.patches, values, rtol=0, atol=2e-7)


def test_bilinear_is_another_filter() -> None:
    image = Image.open(photograph("chelsea.png")).convert("RGB")
    plan = plan_slices(*image.size, max_slices=1)
    found = preprocess(np.array(image), plan, "cpu", torch.float32, resample="bilinear")
    expected = patches_of(image.resize(plan.overview, Image.Resampling.BILINEAR))
    assert torch.equal(found.patches, expected)
    assert not torch.equal(
        found.patches, preprocess(np.array(image), plan, "cpu", torch.float32).patches
    )


def test_arrays_of_any_strides() -> None:
    pixels = open_image(photograph("chelsea.png"))
    plan = plan_slices(300, 451)
    turned = pixels.transpose(1, 0, 2)
    found = preprocess(turned, plan, "cpu", torch.float32)
    assert torch.equal(found.patches, preprocess(turned.copy(), plan, "cpu", torch.float32).patches)


def test_a_plan_of_another_size_is_refused() -> None:
    with pytest.raises(UsageError, match=r"the plan is for an image of \(20, 10\)"):
        preprocess(np.zeros((20, 10, 3), np.uint8), plan_slices(20, 10), "cpu", torch.float32)
