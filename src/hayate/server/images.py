"""Images of a request: what its parts name -> pixels, within the server's limits."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hayate.errors import UsageError
from hayate.server.errors import ApiError
from hayate.server.image_source import ImageLimits, read_image
from hayate.server.service import Service

if TYPE_CHECKING:
    import numpy as np

    from hayate.models.vision_config import VisionConfig

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # Pillow's names of `ImageLimits.types`


@dataclass(frozen=True)
class NamedImage:
    """An image as a request names it. `open_images` alone makes pixels of it, and it opens no path."""

    source: str | bytes  # a URL, or the file itself
    place: str  # in the request: `messages[0].content[1]`
    low: bool = False  # shown as one small picture, without tiles


async def open_images(service: Service, images: Sequence[NamedImage]) -> list[np.ndarray]:
    """The pixels of each, (H, W, 3) uint8; the work is done in threads.

    Raises:
        ApiError: 400 with the place of the image that is at fault: it cannot be had or read, it is one too many, the
            pixels of all together are too many, or the model takes no images.
    """
    options, vision = service.options, service.llm.config.vision
    if vision is None:
        place = images[0].place
        raise ApiError(
            400,
            f"{place}: the model {service.names[0]} takes no images",
            param=place,
            code="unsupported_parameter",
        )
    if len(images) > options.max_images:
        place = images[options.max_images].place
        raise ApiError(
            400,
            f"{place}: a request may show {options.max_images} images at most (--max-images); it shows {len(images)}",
            param=place,
        )
    limits = ImageLimits(fetch=options.fetch_images)
    pixels: list[np.ndarray] = []
    for image in images:
        left = options.max_pixels - sum(p.shape[0] * p.shape[1] for p in pixels)
        try:
            source = image.source
            file = source if isinstance(source, bytes) else await read_image(source, limits)
            pixels.append(await asyncio.to_thread(_open, file, left, vision))
        except UsageError as error:
            raise ApiError(400, f"{image.place}: {error}", param=image.place) from None
    return pixels


def _open(file: bytes, max_pixels: int, vision: VisionConfig) -> np.ndarray:
    from hayate.vision.image import open_image  # which imports torch
    from hayate.vision.slicing import plan_slices

    pixels = open_image(file, max_pixels=max_pixels, formats=_FORMATS)
    height, width, _ = pixels.shape
    # Only to refuse here, where its place is known, what is too thin to be cut.
    plan_slices(width, height, resolution=vision.slice_side, patch_size=vision.patch_size)
    return pixels
