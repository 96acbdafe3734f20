"""Image files: which are accepted, what they hold, and how they are opened upright as RGB.

Flows in: the bytes of a file; out: its facts, or a Pillow image. `verify` decodes completely, once, in preprocessing;
`decode.py` makes the tower's input in training. No torch here: preprocessing workers import this.
"""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

from ...config import VisionConfig
from ..errors import BadSampleError

SUFFIXES = {"JPEG": "jpg", "PNG": "png", "GIF": "gif", "WEBP": "webp", "BMP": "bmp"}
"""Formats that are read, by Pillow's name, and the member suffix each gets, whatever the file was called."""

MAX_PIXELS = 50_000_000
"""Larger images are refused before decoding: 50 million pixels with alpha take 550 MB on their way to RGB."""

# EXIF orientation -> what turns the picture upright (EXIF 2.32, table 6).
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ORIENTATION = 0x0112

# What Pillow raises on damaged content. It has no error class of its own: plugins let these through.
PILLOW_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    LookupError,
    ArithmeticError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What an image is, by `verify` or `header`."""

    suffix: str
    """Of the format the bytes really are."""
    width: int
    height: int
    """Pixels as seen, after EXIF rotation."""


def verify(data: bytes) -> ImageFacts:
    """Decode an image completely and say what it is.

    Raises: BadSampleError with reason `not_an_image`, `oversized_image` or `damaged_image`.
    """
    facts = _plain_jpeg(data)
    if facts is not None:
        with contextlib.suppress(ValueError):  # Pillow shall say what is wrong
            _decode_all(data)
            return facts
    image = open_image(data)
    facts = _facts(image, orientation(image))
    try:
        if facts.suffix == "jpg":
            _decode_all(data)
        else:
            image.load()
            open_image(data).verify()  # a PNG's checksums, which load() does not look at
    except PILLOW_ERRORS as error:
        raise BadSampleError("damaged_image", _plain(error)) from None
    return facts


def header(data: bytes) -> ImageFacts:
    """What an image says it is, without decoding it: most damage passes.

    Raises: BadSampleError with reason `not_an_image` or `oversized_image`.
    """
    facts = _plain_jpeg(data)
    if facts is not None:
        return facts
    image = open_image(data)
    # Pillow would decode a PNG in search of an orientation behind its pixels.
    return _facts(image, 1 if image.format == "PNG" and "exif" not in image.info else orientation(image))


def is_plain_jpeg(data: bytes) -> bool:
    """Whether this is a JPEG that nothing turns and that has no more pictures behind it: without Exif, XMP and MPF segments.

    Goes through the segments before the pixels; what is odd there is not plain.
    """
    if not data.startswith(b"\xff\xd8"):
        return False
    place = 2
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xDA:  # start of scan
            return True
        if marker == 0xE1 or (marker == 0xE2 and data.startswith(b"MPF\0", place + 4)):
            return False
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return False


def _plain_jpeg(data: bytes) -> ImageFacts | None:
    """Most photographs without Pillow, which takes 0.05 ms to open one; None for whatever is not plain, or not whole."""
    if not is_plain_jpeg(data):
        return None
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    return ImageFacts("jpg", width, height) if 0 < width * height <= MAX_PIXELS else None


def _decode_all(jpeg: bytes) -> None:
    """Every bit of the entropy-coded data is read at any scale; 1/8 grey saves most of the rest (0.28 against 0.64 ms for
    640x480). Strict also finds what Pillow lets pass: corrupt data with a warning, a missing end mark. Raises: ValueError."""
    simplejpeg.decode_jpeg(jpeg, "GRAY", min_height=1, min_width=1)


def _facts(image: Image.Image, turn: int) -> ImageFacts:
    suffix = SUFFIXES["JPEG" if image.format == "MPO" else str(image.format)]  # MPO: a JPEG with more pictures behind it
    width, height = image.size
    return ImageFacts(suffix, *((height, width) if turn >= 5 else (width, height)))


def blank_pixels(num_images: int, size: tuple[int, int]) -> Pixels:
    """Zeros to decode into, uint8[num_images, 3, height, width], each pixel's three channels side by side in memory."""
    width, height = size
    return np.zeros((num_images, height, width, 3), np.uint8).transpose(0, 3, 1, 2)


def scaling(width: int, height: int, vision: VisionConfig, wanted: tuple[int, int]) -> tuple[int, int, int, int]:
    """How the tower wants a picture of this size: (left, top) of the part to cut from it, scaled to (width, height).

    Args: wanted: (width, height) of that part.
    Raises: BadSampleError with reason `oversized_image` for a picture so narrow that the scaled one would be.
    """
    if vision.resize == "square" or not vision.has_fixed_size:
        return 0, 0, *wanted
    size = vision.image_size
    long = int(size * max(width, height) / min(width, height))
    if size * long > MAX_PIXELS:
        raise BadSampleError(
            "oversized_image", f"{width}x{height} scaled to a shorter side of {size} has more than {MAX_PIXELS} pixels"
        )
    width, height = (size, long) if width <= height else (long, size)
    return (width - size) // 2, (height - size) // 2, width, height


def open_image(data: bytes) -> Image.Image:
    """Read the header only. Raises: BadSampleError with reason `not_an_image` or `oversized_image`."""
    try:
        image = Image.open(io.BytesIO(data), formats=list(SUFFIXES))
    except Image.DecompressionBombError:
        raise BadSampleError("oversized_image", f"more than {MAX_PIXELS} pixels") from None
    except PILLOW_ERRORS:
        # Pillow's own message names a memory address.
        raise BadSampleError("not_an_image", f"no {', '.join(SUFFIXES)} file") from None
    if image.width * image.height > MAX_PIXELS:
        raise BadSampleError("oversized_image", f"{image.width}x{image.height} is more than {MAX_PIXELS} pixels")
    return image


def orientation(image: Image.Image) -> int:
    """EXIF orientation 1 to 8; 1 where there is none or it cannot be read."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except PILLOW_ERRORS:
        return 1
    return value if isinstance(value, int) and value in UPRIGHT else 1


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright RGB: transparency on white, CMYK and greys converted, 16-bit greys scaled instead of clipped.

    Raises: BadSampleError with reason `damaged_image`.
    """
    try:
        turn = orientation(image)
        image.load()
        if turn != 1:
            image = image.transpose(UPRIGHT[turn])
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.has_transparency_data:
            image = image if image.mode == "RGBA" else image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except PILLOW_ERRORS as error:
        raise BadSampleError("damaged_image", _plain(error)) from None


def _plain(error: BaseException) -> str:
    """An error as one short line without memory addresses, the same on every run."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.split(" <", 1)[0][:200]
