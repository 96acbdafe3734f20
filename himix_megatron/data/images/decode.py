"""Image bytes in, the tower's pixels out, exact or fast.

Exact pixels are decoded and resized by Pillow and equal those of transformers' PIL image processors bit for bit; fast ones are
within 2 of 255 levels of them (`decode_fast.py`). Pixels stay uint8: they are normalised where they are used.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from PIL import Image

from ...config import VisionConfig
from .image_file import Pixels, open_image, scaling, to_rgb

FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def decode(data: bytes, vision: VisionConfig, how: Literal["fast", "exact"] = "exact", out: Pixels | None = None) -> Pixels:
    """Image bytes to the tower's pixels, uint8[3, H, W] with H = W = `vision.image_size`.

    `vision.resize` `square` scales both sides; `crop` scales the shorter one and cuts the centre. Given `out`, the pixels are
    written there; fast ones sooner when it is a part of `blank_pixels`, or laid out alike.
    Raises: BadSampleError, as `verify`.
    """
    if how == "fast":
        from .decode_fast import decode_fast  # it needs torch

        return decode_fast(data, vision, out)
    rgb = to_rgb(open_image(data))
    left, top, width, height = scaling(rgb.width, rgb.height, vision)
    size, resample = vision.image_size, FILTERS[vision.interpolation]
    scaled = rgb.resize((width, height), resample)
    if scaled.size != (size, size):
        scaled = scaled.crop((left, top, left + size, top + size))
    pixels = np.asarray(scaled).transpose(2, 0, 1)
    if out is None:
        return np.ascontiguousarray(pixels)
    out[...] = pixels
    return out
