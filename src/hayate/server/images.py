"""Images of a request: what its parts name -> pixels, within the server's limits."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hayate.errors import UsageError
from hayate.server.errors import ApiError
from hayate.server.image_source import ImageLimits, read_image

if TYPE_CHECKING:
    import numpy as np

    from hayate.models.vision_config import VisionConfig
    from hayate.server.service import Service

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # Pillow's names of `ImageLimits.types`


@dataclass(frozen=True)
class NamedImage:
    """An image as a request names it. `open_images` alone makes pixels of it, and it opens no path."""

    source: str | bytes  # a URL, or the file itself
    place: str  # in the request: `messages[0].content[1]`
    low: bool = False  # shown as one small picture, without tiles


class PixelBudget:
    """Counts the pixels that the requests being answered have opened. For the event loop's thread."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._taken = 0

    def take(self, count: int) -> None:
        """Take `count` until the running task, which answers one request, has ended. ApiError 429: none are left."""
        if self._taken + count > self._limit:
            raise ApiError(
                429,
                f"other requests hold {self._taken} of the {self._limit} pixels that may be open at once "
                f"(--max-open-pixels) and this image has {count}; try again later",
                code="rate_limit_exceeded",
                headers={"Retry-After": "1"},
            )
        task = asyncio.current_task()
        assert task is not None
        self._taken += count
        task.add_done_callback(lambda _: self._give_back(count))

    def _give_back(self, count: int) -> None:
        self._taken -= count


async def open_images(service: Service, images: Sequence[NamedImage]) -> list[np.ndarray]:
    """The pixels of each, (H, W, 3) uint8; the work is done in threads.

    Raises:
        ApiError: 400 with the place of the image that is at fault: it cannot be had or read, it is one too many, the
            pixels of all together are too many, or the model takes no images; 429 while other requests hold too many.
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
            count = await asyncio.to_thread(_num_pixels, file)
            if count <= left:  # more are refused when they are opened, before they are decoded
                service.open_pixels.take(count)
            pixels.append(await asyncio.to_thread(_open, file, left, vision))
        except UsageError as error:
            raise ApiError(400, f"{image.place}: {error}", param=image.place) from None
    return pixels


def _num_pixels(file: bytes) -> int:
    from hayate.vision.image import num_pixels  # which imports torch

    return num_pixels(file, formats=_FORMATS)


def _open(file: bytes, max_pixels: int, vision: VisionConfig) -> np.ndarray:
    from hayate.vision.image import open_image  # which imports torch
    from hayate.vision.slicing import plan_slices

    pixels = open_image(file, max_pixels=max_pixels, formats=_FORMATS)
    height, width, _ = pixels.shape
    # Only to refuse here, where its place is known, what is too thin to be cut.
    plan_slices(width, height, resolution=vision.slice_side, patch_size=vision.patch_size)
    return pixels
