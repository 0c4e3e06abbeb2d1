"""Images of every kind, and everything that can be wrong with a file."""

from __future__ import annotations

import io
import random
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hayate.errors import ImageError, UsageError
from hayate.vision.image import MAX_PIXELS, limit_side, open_image
from tests.vision.photographs import photograph


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    shape = (height, width, channels)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def file_of(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("PPM", {}),
        ("WEBP", {"lossless": True}),
        ("JPEG2000", {"irreversible": False}),
    ],
)
def test_lossless_formats_and_sources(tmp_path: Path, kind: str, options: dict) -> None:
    pixels = noise(17, 23)
    content = file_of(Image.fromarray(pixels), kind, **options)
    path = tmp_path / "picture"  # the name says nothing
    path.write_bytes(content)
    for source in (content, path, str(path), Image.open(io.BytesIO(content)), pixels):
        opened = open_image(source)
        assert opened.dtype == np.uint8 and opened.flags.c_contiguous and opened.flags.writeable
        np.testing.assert_array_equal(opened, pixels)


def test_the_pixels_are_the_callers_own() -> None:
    pixels = noise(4, 4)
    image = Image.fromarray(pixels.copy())
    opened = open_image(pixels), open_image(image)
    for array in opened:
        array[:] = 0
    np.testing.assert_array_equal(np.array(image), noise(4, 4))
    np.testing.assert_array_equal(pixels, noise(4, 4))


def test_jpeg_equals_pillow() -> None:
    path = photograph("hubble_deep_field.jpg")
    np.testing.assert_array_equal(open_image(path), np.array(Image.open(path)))


# What the orientation says about the stored rows and columns (EXIF 2.3, tag 0x0112), undone.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a.transpose(1, 0, 2)[:, ::-1],
    7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda a: a.transpose(1, 0, 2)[::-1],
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_rotation(orientation: int) -> None:
    pixels = noise(5, 9)
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = file_of(Image.fromarray(pixels), exif=exif)
    for source in (content, Image.open(io.BytesIO(content))):
        np.testing.assert_array_equal(open_image(source), UPRIGHT[orientation](pixels))


def test_exif_that_is_garbage_is_no_obstacle() -> None:
    pixels = noise(5, 9)
    content = file_of(Image.fromarray(pixels), exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff garbage")
    np.testing.assert_array_equal(open_image(content), pixels)


def test_cmyk() -> None:
    inks = {(0, 0, 0, 0): "white", (255, 0, 0, 0): "cyan", (0, 255, 0, 0): "magenta"}
    inks |= {(0, 0, 255, 0): "yellow", (0, 0, 0, 255): "black", (255, 255, 0, 0): "blue"}
    image = Image.fromarray(np.array([list(inks)], dtype=np.uint8), "CMYK")
    white_paper = Image.new("CMYK", (8, 8))  # in JPEG Adobe stores the inks inverted
    expected = [list(Image.new("RGB", (1, 1), colour).getpixel((0, 0))) for colour in inks.values()]
    assert open_image(file_of(image, "TIFF"))[0].tolist() == expected
    assert open_image(file_of(white_paper, "JPEG")).min() == 255


def test_sixteen_bits_are_scaled() -> None:
    deep = np.array([[0, 128, 129, 257, 32768, 65535 - 128, 65535]], dtype=np.uint16)
    expected = [0, 0, 1, 1, 128, 255, 255]  # v / 257, rounded
    pgm = b"P5 7 1 65535\n" + deep.astype(">u2").tobytes()
    for source in (file_of(Image.fromarray(deep)), file_of(Image.fromarray(deep), "TIFF"), pgm):
        assert open_image(source)[0].tolist() == [[v] * 3 for v in expected]


def test_sixteen_bits_in_colour() -> None:
    deep = np.random.default_rng(0).integers(0, 65536, (3, 4, 3)).astype(np.uint16)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 4, 3, 16, 2, 0, 0, 0))]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)
    chunks += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    opened = open_image(png_of(chunks)).astype(int)
    assert abs(opened - deep / 257).max() <= 1  # Pillow keeps the high byte


def png_of(chunks: list[tuple[bytes, bytes]]) -> bytes:
    framed = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


@pytest.mark.parametrize("values", [np.array([[0.5, 1.0]], "float32"), np.array([[-1, 70000]])])
def test_pixels_without_a_white_are_refused(values: np.ndarray) -> None:
    content = file_of(
        Image.fromarray(values.astype(np.int32) if values.dtype == int else values), "TIFF"
    )
    with pytest.raises(ImageError, match=r"scan\.tif has 32-bit pixels .* 8 or 16 bits"):
        open_image(content, name="scan.tif")


def test_gray_palette_and_two_colours() -> None:
    gray = noise(6, 7)[:, :, 0]
    for kind in ("PNG", "TIFF"):
        opened = open_image(file_of(Image.fromarray(gray), kind))
        np.testing.assert_array_equal(opened, np.repeat(gray[:, :, None], 3, 2))
    palette = Image.fromarray(noise(6, 7)).quantize(16)
    expected = np.array(palette.getpalette()).reshape(-1, 3)[np.array(palette)]
    np.testing.assert_array_equal(open_image(file_of(palette)), expected)
    bits = Image.fromarray(gray > 127)
    np.testing.assert_array_equal(open_image(file_of(bits))[:, :, 1], np.where(gray > 127, 255, 0))


def test_transparency_is_laid_on_white() -> None:
    rgba = noise(16, 16, 4)
    alpha = rgba[:, :, 3:] / 255.0
    expected = alpha * rgba[:, :, :3] + (1 - alpha) * 255
    for source in (file_of(Image.fromarray(rgba)), rgba, Image.fromarray(rgba)):
        assert abs(open_image(source) - expected).max() <= 1  # Pillow blends in integers
    gray = Image.fromarray(rgba[:, :, 0])
    gray.putalpha(Image.fromarray(rgba[:, :, 3]))
    assert abs(open_image(file_of(gray))[:, :, 0] - expected[:, :, 0]).max() <= 1
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    opened = open_image(file_of(palette, transparency=0))
    assert opened[0].tolist() == [[255, 255, 255], [40, 50, 60]]
    keyed, kept = noise(1, 2)[0].tolist()
    opened = open_image(file_of(Image.fromarray(noise(1, 2)), transparency=tuple(keyed)))
    assert opened[0].tolist() == [[255, 255, 255], kept]


def test_a_logo_stands_on_white() -> None:
    opened = open_image(photograph("logo.png"))
    assert opened.shape == (500, 500, 3) and (opened[0, 0] == 255).all()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_an_animation(kind: str) -> None:
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    content = file_of(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert (open_image(content) == (255, 0, 0)).all()


def test_extreme_sizes() -> None:
    assert open_image(file_of(Image.new("RGB", (1, 1), (1, 2, 3)))).tolist() == [[[1, 2, 3]]]
    wide = noise(3, 20_000)
    np.testing.assert_array_equal(open_image(file_of(Image.fromarray(wide))), wide)


@pytest.mark.parametrize(
    "side", [12_000, 30_000]
)  # Pillow warns of the first and refuses the second
@pytest.mark.parametrize("action", ["ignore", "error"])
def test_bombs_are_refused_before_they_are_decoded(side: int, action: str) -> None:
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    content = png_of([(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")])
    with warnings.catch_warnings():
        warnings.simplefilter(action)
        with pytest.raises(ImageError, match=rf"bomb\.png .*{side**2}"):
            open_image(content, name="bomb.png")


def test_pixel_limit() -> None:
    assert MAX_PIXELS == Image.MAX_IMAGE_PIXELS
    content = file_of(Image.new("RGB", (20, 10)))
    assert open_image(content, max_pixels=200).shape == (10, 20, 3)
    for source in (content, Image.new("RGB", (20, 10)), noise(10, 20)):
        with pytest.raises(ImageError, match="20x10 = 200 pixels; at most 199 are decoded"):
            open_image(source, max_pixels=199)


def test_icons_are_not_opened() -> None:
    """Their header says nothing of the picture inside, which Pillow decodes to learn its size."""
    png = file_of(Image.new("1", (2000, 2000)))
    head = struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(png), 22)
    with pytest.raises(ImageError, match="none of JPEG, PNG"):
        open_image(head + png, max_pixels=1000)


def test_formats_can_be_fewer() -> None:
    image = Image.new("RGB", (2, 2))
    assert open_image(file_of(image, "PNG"), formats=("PNG", "GIF")).shape == (2, 2, 3)
    with pytest.raises(ImageError, match="none of PNG, GIF"):
        open_image(file_of(image, "TIFF"), formats=("PNG", "GIF"))


def test_bombs_in_text_chunks() -> None:
    text = b"comment\0\0" + zlib.compress(bytes(2**27))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)), (b"zTXt", text)]
    chunks += [(b"IDAT", zlib.compress(bytes(4))), (b"IEND", b"")]
    with pytest.raises(ImageError, match="corrupt"):
        open_image(png_of(chunks))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "AVIF"])
@pytest.mark.parametrize("share", [0.01, 0.3, 0.6, 0.9])
def test_truncated(tmp_path: Path, kind: str, share: float) -> None:
    content = file_of(Image.fromarray(noise(64, 64)), kind)
    path = tmp_path / "half"
    path.write_bytes(content[: max(int(share * len(content)), 1)])
    with pytest.raises(
        ImageError, match=r"the image \S*/half is (cut short or corrupt|not an image)"
    ):
        open_image(path)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "JPEG2000"])
@pytest.mark.filterwarnings("ignore")  # Pillow's remarks about the damage
def test_damage_gives_an_image_or_our_error(kind: str) -> None:
    draw = random.Random(0)
    original = file_of(Image.fromarray(noise(24, 24)), kind)
    outcomes = set()
    for _ in range(150):
        content = bytearray(original)
        for _ in range(draw.choice([1, 5, 30])):
            place = draw.randrange(min(len(content), draw.choice([64, 10**9])))
            content[place] = draw.randrange(256)
        try:
            outcomes.add(open_image(bytes(content)).dtype)
        except ImageError as error:
            outcomes.add(type(error))
    assert ImageError in outcomes


def test_what_is_no_image(tmp_path: Path) -> None:
    text, empty = tmp_path / "notes.png", tmp_path / "empty.jpg"
    text.write_text("not a picture")
    empty.touch()
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    for source, message in [
        (text, r"notes\.png is not an image, or damaged, or none of JPEG, .*PNG"),
        (empty, r"empty\.jpg is empty \(0 bytes\)"),
        (b"", "the image is empty"),
        (tmp_path, "is a folder"),
        (tmp_path / "nowhere.png", r"nowhere\.png does not exist"),
        ("x\0y", "does not exist|cannot be read"),
        ("/dev/null", "/dev/null does not exist"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC, which is not read; convert it to JPEG"),
        (eps, "is not an image"),
        (7, "must be a path, bytes, a Pillow image or an array, not int"),
        (None, "not NoneType"),
    ]:
        with pytest.raises(ImageError, match=message) as caught:
            open_image(source)  # type: ignore[arg-type]
        assert caught.value.exit_code == 2
        assert isinstance(caught.value, UsageError)


def test_arrays() -> None:
    gray = noise(3, 5)[:, :, 0]
    expected = np.repeat(gray[:, :, None], 3, 2)
    np.testing.assert_array_equal(open_image(gray), expected)
    np.testing.assert_array_equal(open_image(gray[:, :, None]), expected)
    np.testing.assert_array_equal(open_image(noise(3, 5)[::-1, ::2]), noise(3, 5)[::-1, ::2])
    for array, message in [
        (np.zeros((2, 2, 3), "float32"), "dtype float32; give uint8"),
        (np.zeros((3, 5, 7), np.uint8), r"shape \(3, 5, 7\)"),
        (np.zeros((2, 3, 4, 3), np.uint8), r"shape \(2, 3, 4, 3\)"),
        (np.zeros((0, 5, 3), np.uint8), "is empty"),
    ]:
        with pytest.raises(ImageError, match=message):
            open_image(array)


def test_limit_side() -> None:
    pixels = open_image(photograph("hubble_deep_field.jpg"))
    small = limit_side(pixels, 512)
    expected = Image.fromarray(pixels).resize(
        (512, round(872 * 512 / 1000)), Image.Resampling.BICUBIC
    )
    np.testing.assert_array_equal(small, np.array(expected))
    assert limit_side(pixels, 1000) is pixels
    assert limit_side(noise(1, 2000), 10).shape == (1, 10, 3)
    with pytest.raises(UsageError, match="it is 0"):
        limit_side(pixels, 0)
