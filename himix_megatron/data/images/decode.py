"""Image bytes in, the tower's pixels out, in one of two ways.

Exact pixels are decoded and resized by Pillow and equal those of transformers' PIL image processors bit for bit. Fast ones take
less than half of the time and are within 2 of 255 levels of them: libjpeg-turbo decodes plain JPEGs at full resolution (smaller
scales of the DCT differ from a resize by tens of levels), and torch resizes uint8 pixels with Pillow's filters and two rounded
passes, but in 16-bit arithmetic and with vector instructions. Pixels stay uint8: they are normalised where they are used.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor

from ...config import VisionConfig
from . import image_file
from .image_file import Pixels

PLAIN_COLORSPACES = {"YCbCr", "RGB", "Gray"}
"""Of JPEGs that libjpeg-turbo converts to RGB; it leaves CMYK and YCCK to others."""

FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}

# What torch.nn.functional.interpolate(antialias=True) calls. Only this form takes `out`: writing into memory that is there
# already saves a third of the time (0.53 instead of 0.88 ms for 640x480 -> 384).
RESIZE = {"bicubic": torch.ops.aten._upsample_bicubic2d_aa.out, "bilinear": torch.ops.aten._upsample_bilinear2d_aa.out}


def decode(data: bytes, vision: VisionConfig, how: Literal["fast", "exact"] = "exact", out: Pixels | None = None) -> Pixels:
    """Image bytes to the tower's pixels, uint8[3, H, W] with H = W = `vision.image_size`.

    `vision.resize` `square` scales both sides; `crop` scales the shorter one and cuts the centre. Given `out`, the pixels are
    written there; fast ones sooner when it is a part of `blank_pixels`, or laid out alike.
    Raises: BadSampleError, as `verify`.
    """
    if how == "fast":
        return _decode_fast(data, vision, out)
    rgb = image_file.to_rgb(image_file.open_image(data))
    left, top, width, height = image_file.scaling(rgb.width, rgb.height, vision)
    size, resample = vision.image_size, FILTERS[vision.interpolation]
    scaled = rgb.resize((width, height), resample)
    if scaled.size != (size, size):
        scaled = scaled.crop((left, top, left + size, top + size))
    pixels = np.asarray(scaled).transpose(2, 0, 1)
    if out is None:
        return np.ascontiguousarray(pixels)
    out[...] = pixels
    return out


def _decode_fast(data: bytes, vision: VisionConfig, out: Pixels | None) -> Pixels:
    rgb = _jpeg(data)
    if rgb is None:
        rgb = np.array(image_file.to_rgb(image_file.open_image(data)))
    pixels = image_file.blank_pixels(1, vision)[0] if out is None else out
    left, top, width, height = image_file.scaling(rgb.shape[1], rgb.shape[0], vision)
    scaled = torch.from_numpy(rgb).permute(2, 0, 1)[None]  # uint8[1, 3, h, w], channels last in memory
    place = torch.from_numpy(pixels)[None]
    if place.shape[2:] == (height, width) and place.is_contiguous(memory_format=torch.channels_last):
        _resize(scaled, place, vision)
        return pixels
    whole = torch.empty((1, 3, height, width), dtype=torch.uint8, memory_format=torch.channels_last)
    _resize(scaled, whole, vision)
    place.copy_(whole[:, :, top : top + vision.image_size, left : left + vision.image_size])
    return pixels


def _resize(scaled: Tensor, into: Tensor, vision: VisionConfig) -> None:
    """Rows first and then columns, or the other way about where Pillow does so; a clipped overshoot between them is seen."""
    (height, width), (new_height, new_width) = scaled.shape[2:], into.shape[2:]
    resize = RESIZE[vision.interpolation]
    if height - new_height > 2 * max(width - new_width, 0):  # Pillow 13's own rule: it shortens tall pictures first
        shorter = torch.empty((1, 3, new_height, width), dtype=torch.uint8, memory_format=torch.channels_last)
        resize(scaled, [new_height, width], False, None, None, out=shorter)
        scaled = shorter
    resize(scaled, [new_height, new_width], False, None, None, out=into)


def _jpeg(data: bytes) -> Pixels | None:
    """A plain JPEG upright, uint8[H, W, 3]; None for whatever else, and for what is wrong with one: Pillow shall judge."""
    if not data.startswith(b"\xff\xd8\xff"):
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        if colorspace not in PLAIN_COLORSPACES or height * width > image_file.MAX_PIXELS:
            return None
        rgb: Pixels = simplejpeg.decode_jpeg(data, "RGB")
    except ValueError:
        return None
    # Only where an orientation could stand is it looked for: Pillow takes 0.05 ms to open a file.
    if not image_file.is_plain_jpeg(data):
        turn = image_file.orientation(image_file.open_image(data))
        if turn != 1:
            return np.array(Image.fromarray(rgb).transpose(image_file.UPRIGHT[turn]))
    return rgb
