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
    """Image bytes to the tower's pixels, uint8[3, H, W], of the size that `vision.input_size` gives.

    `vision.resize` `square` scales both sides; `crop` scales the shorter one and cuts the centre. Given `out`, the pixels are
    written there, in its size; fast ones sooner when it is a part of `blank_pixels`, or laid out alike.
    Raises: BadSampleError, as `verify`.
    """
    if how == "fast":
        from .decode_fast import decode_fast  # it needs torch

        return decode_fast(data, vision, out)
    rgb = to_rgb(open_image(data))
    wanted = vision.input_size(rgb.width, rgb.height) if out is None else (out.shape[2], out.shape[1])
    left, top, width, height = scaling(rgb.width, rgb.height, vision, wanted)
    scaled = rgb.resize((width, height), FILTERS[vision.interpolation])
    if scaled.size != wanted:
        scaled = scaled.crop((left, top, left + wanted[0], top + wanted[1]))
    pixels = np.asarray(scaled).transpose(2, 0, 1)
    if out is None:
        return np.ascontiguousarray(pixels)
    out[...] = pixels
    return out
