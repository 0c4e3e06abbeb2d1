"""Image files to pixels, and pixels to the patches a vision model reads.

What a file may hold and what becomes of it: rotated as its EXIF says; any colour mode to RGB; 16 bits scaled to 8;
transparency laid on white, as a page shows it (dropping it, as `convert("RGB")` does, turns black text on a
transparent ground into black on black); of an animation the first frame. Everything that can be wrong with a file is
an `ImageError` that names the file and the cause.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from hayate.errors import ImageError, UsageError
from hayate.kernels.image_resize import Resample, image_patches
from hayate.vision.slicing import Size, SlicePlan

ImageSource = str | os.PathLike[str] | bytes | Image.Image | np.ndarray

# From here on Pillow itself warns of a decompression bomb: a file of kilobytes can ask for gigabytes of pixels.
MAX_PIXELS = 2**30 // 12

# Pillow knows more, among them EPS, which runs another program, and ICO, which decodes before it says a size. ("JPEG"
# opens MPO, the phones' pairs of JPEGs, too.)
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")


def open_image(
    source: ImageSource,
    *,
    name: str = "the image",
    max_pixels: int = MAX_PIXELS,
    formats: Sequence[str] = FORMATS,
) -> np.ndarray:
    """The pixels of an image: (height, width, 3) uint8 RGB, contiguous and the caller's own.

    source: a file's path, a file's bytes, a Pillow image, or a uint8 array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4).
    name: how messages call it, a path is added. max_pixels: images with more are refused before they are decoded.
    formats: those of `FORMATS` that a file may have.

    Raises:
        ImageError: no such file, not an image, truncated or corrupt, too many pixels, or of a kind that is not read.
    """
    if isinstance(source, np.ndarray):
        source = _image_of_array(source, name)
    if isinstance(source, Image.Image):
        with _decoding(name):
            _check_size(source, name, max_pixels)
            return _rgb(ImageOps.exif_transpose(source), name)
    if isinstance(source, str | os.PathLike):
        name = f"{name} {os.fspath(source)}"
    with _opened(source, name, formats) as image:
        _check_size(image, name, max_pixels)
        ImageOps.exif_transpose(image, in_place=True)
        return _rgb(image, name)


def num_pixels(file: bytes, *, formats: Sequence[str] = FORMATS) -> int:
    """How many pixels an image file says it has. Nothing is decoded; ImageError as `open_image` raises it."""
    with _opened(file, "the image", formats) as image:
        return image.width * image.height


@contextmanager
def _opened(source: object, name: str, formats: Sequence[str]) -> Iterator[Image.Image]:
    """The image of a file or its bytes, not decoded yet. Errors inside are of its decoding."""
    with _open_file(source, name) as file:
        head = file.read(12)
        file.seek(0)
        if not head:
            raise ImageError(f"{name} is empty (0 bytes)")
        if head[4:8] == b"ftyp" and head[8:12] in _HEIC_BRANDS:
            raise ImageError(f"{name} is HEIC, which is not read; convert it to JPEG or PNG")
        known = _known(formats)
        with _decoding(name, known), Image.open(file, formats=known) as image:
            yield image


def _open_file(source: object, name: str) -> BinaryIO:
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if not isinstance(source, str | os.PathLike):
        kind = type(source).__name__
        raise ImageError(f"{name} must be a path, bytes, a Pillow image or an array, not {kind}")
    path = Path(source)
    try:
        file = path.open("rb") if path.is_file() else None  # a device or a pipe might never end
    except (OSError, ValueError) as error:
        raise ImageError(f"{name} cannot be read: {error}") from error
    if file is None:
        what = "is a folder; give the path of an image file" if path.is_dir() else "does not exist"
        raise ImageError(f"{name} {what}")
    return file


def _known(formats: Sequence[str]) -> list[str]:
    """Those of `formats` that this Pillow has."""
    Image.init()
    return [kind for kind in formats if kind in Image.OPEN]


@contextmanager
def _decoding(name: str, formats: Sequence[str] = ()) -> Iterator[None]:
    """What Pillow raises inside, as an ImageError. Decoders meet corrupt files with exceptions of every kind."""
    try:
        yield
    except (ImageError, MemoryError):
        raise
    except Image.UnidentifiedImageError as error:
        kinds = ", ".join(formats)
        raise ImageError(f"{name} is not an image, or damaged, or none of {kinds}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name} has too many pixels: {error}") from error
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise ImageError(f"{name} is cut short or corrupt: {reason}") from error


def _check_size(image: Image.Image, name: str, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(
            f"{name} has {width}x{height} = {width * height} pixels; at most {max_pixels} are decoded. Make it smaller"
        )
    if width * height == 0:
        raise ImageError(f"{name} is empty: {width}x{height} pixels")


def _image_of_array(array: np.ndarray, name: str) -> Image.Image:
    if array.dtype != np.uint8:
        raise ImageError(
            f"{name} has dtype {array.dtype}; give uint8 levels from 0 to 255 (a picture in 0..1: multiply by 255)"
        )
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] in (3, 4)):
        raise ImageError(
            f"{name} has shape {array.shape}; give (height, width), or (height, width, 3 or 4)"
        )
    if array.size == 0:
        raise ImageError(f"{name} is empty: shape {array.shape}")
    return Image.fromarray(np.ascontiguousarray(array))


def _rgb(image: Image.Image, name: str) -> np.ndarray:
    if image.mode == "F" or image.mode.startswith("I"):
        return _rgb_of_deep_gray(image, name)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        page = Image.new("RGBA", image.size, "white")
        page.alpha_composite(image)
        image = page
    return np.array(image.convert("RGB"))


def _rgb_of_deep_gray(image: Image.Image, name: str) -> np.ndarray:
    """Gray of 16 bits, which some formats deliver in 32; 65535 is white. Pillow's own conversion cuts it off at 255."""
    gray = np.asarray(image)
    if image.mode == "F" or gray.min() < 0 or gray.max() > 65535:
        raise ImageError(
            f"{name} has 32-bit pixels (mode {image.mode}), of which no value is agreed to be white; "
            "save it with 8 or 16 bits"
        )
    levels = ((gray.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    return np.repeat(levels[:, :, None], 3, axis=2)


def limit_side(image: np.ndarray, longest: int) -> np.ndarray:
    """`image` made smaller, if need be, so that its longest side has `longest` pixels; the shape is kept."""
    if longest < 1:
        raise UsageError(f"the longest side must be 1 pixel or more; it is {longest!r}")
    height, width = image.shape[:2]
    if max(height, width) <= longest:
        return image
    scale = longest / max(height, width)
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    return np.array(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


@dataclass(frozen=True)
class Pictures:
    """The pictures of one image, packed: what the vision encoder reads."""

    patches: Tensor  # (sum of h * w, 3 * patch_size^2), (channel, py, px)-flattened, in [-1, 1]
    sizes: list[tuple[int, int]]  # (h, w) of each picture in patches


def preprocess(
    image: np.ndarray,
    plan: SlicePlan,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    resample: Resample = "bicubic",
) -> Pictures:
    """Cut `image` into the pictures of its plan: the overview, then the tiles, each of them resized from the original.

    image: (H, W, 3) uint8, as `open_image` gives it, with the size the plan was made for.
    """
    if image.shape != (plan.size[1], plan.size[0], 3):
        raise UsageError(f"the plan is for an image of {plan.size}, this one has {image.shape}")
    pixels = torch.from_numpy(np.ascontiguousarray(image))
    if torch.device(device).type == "cuda":
        pixels = pixels.pin_memory().to(device, non_blocking=True)

    def patches_of(size: Size, grid: tuple[int, int] = (1, 1)) -> Tensor:
        return image_patches(
            pixels, size, grid=grid, patch_size=plan.patch_size, dtype=dtype, resample=resample
        )

    patches = patches_of(plan.overview)
    if plan.grid is not None and plan.resized is not None:
        patches = torch.cat([patches, patches_of(plan.resized, plan.grid)])
    return Pictures(patches, plan.sizes)
