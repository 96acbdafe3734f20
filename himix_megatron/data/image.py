"""Image bytes in, pixels out. `verify` really decodes once, in preprocessing; `decode` makes the tower's input in training.

Resizing is Pillow's, so that pixels equal those of transformers' PIL image processors bit for bit. Pixels stay uint8 here:
normalisation is (x / 255 - mean) / std where they are used. No torch: preprocessing workers import this.
"""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

from himix_megatron.config import VisionConfig
from himix_megatron.data.schema import BadSampleError

SUFFIXES = {"JPEG": "jpg", "PNG": "png", "GIF": "gif", "WEBP": "webp", "BMP": "bmp"}
"""Formats that are read, by Pillow's name, and the member suffix each gets, whatever the file was called."""

MAX_PIXELS = 50_000_000
"""Larger images are refused before decoding: 50 million pixels with alpha take 550 MB on their way to RGB."""

FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}

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
    """What `verify` found out."""

    suffix: str
    """Of the format the bytes really are."""
    width: int
    height: int
    """Pixels as seen, after EXIF rotation."""


def verify(data: bytes) -> ImageFacts:
    """Decode an image completely and say what it is.

    Raises: BadSampleError with reason `not_an_image`, `oversized_image` or `damaged_image`.
    """
    image = _open(data)
    suffix = SUFFIXES["JPEG" if image.format == "MPO" else str(image.format)]  # MPO: a JPEG with more pictures behind it
    turned = _orientation(image) >= 5
    try:
        if suffix == "jpg":
            # Every bit of the entropy-coded data is read at any scale; 1/8 grey saves most of the rest (0.28 against 0.64 ms
            # for 640x480). Strict also finds what Pillow lets pass: corrupt data with a warning, a missing end mark.
            simplejpeg.decode_jpeg(data, "GRAY", min_height=1, min_width=1)
        else:
            image.load()
            _open(data).verify()  # a PNG's checksums, which load() does not look at
    except PILLOW_ERRORS as error:
        raise BadSampleError("damaged_image", _plain(error)) from None
    width, height = image.size
    return ImageFacts(suffix, *((height, width) if turned else (width, height)))


def decode(data: bytes, vision: VisionConfig) -> Pixels:
    """Image bytes to the tower's pixels, uint8[3, H, W] with H = W = `vision.image_size`.

    `square` scales both sides; `crop` scales the shorter one and cuts the centre. Both as transformers' PIL processors do.
    Raises: BadSampleError, as `verify`.
    """
    image = _open(data)
    try:
        rgb = _to_rgb(image)
    except PILLOW_ERRORS as error:
        raise BadSampleError("damaged_image", _plain(error)) from None
    size, resample = vision.image_size, FILTERS[vision.interpolation]
    if vision.resize == "square":
        return _channels_first(rgb.resize((size, size), resample))
    short, long = sorted(rgb.size)
    scaled_long = int(size * long / short)
    width, height = (size, scaled_long) if rgb.width <= rgb.height else (scaled_long, size)
    left, top = (width - size) // 2, (height - size) // 2
    return _channels_first(rgb.resize((width, height), resample).crop((left, top, left + size, top + size)))


def _open(data: bytes) -> Image.Image:
    """Read the header only."""
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


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1 to 8; 1 where there is none or it cannot be read."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except PILLOW_ERRORS:
        return 1
    return value if isinstance(value, int) and value in UPRIGHT else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """Upright RGB: transparency on white, CMYK and greys converted, 16-bit greys scaled instead of clipped."""
    orientation = _orientation(image)
    image.load()
    if orientation != 1:
        image = image.transpose(UPRIGHT[orientation])
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        seen = image.convert("RGBA")
        white = Image.new("RGBA", seen.size, "white")
        image = Image.alpha_composite(white, seen)
    return image.convert("RGB")


def _channels_first(image: Image.Image) -> Pixels:
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def _plain(error: BaseException) -> str:
    """An error as one short line without memory addresses, the same on every run."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.split(" <", 1)[0][:200]
