"""Pixels equal transformers' own; damaged and foreign files are named, whatever they are called."""

import contextlib
import dataclasses
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from himix_megatron.data.errors import BadSampleError
from himix_megatron.data.images.decode import decode
from himix_megatron.data.images.image_file import verify
from tests.support.data_fixtures import VISION, encoded, picture

SIZES = [(40, 30), (30, 40), (97, 61), (16, 16), (7, 5), (200, 9)]
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def normalised(data: bytes, vision):
    """As a tower sees it; in numpy and in the processors' own order: uint8 -> float64 product -> float32."""
    pixels = (decode(data, vision).astype(np.float64) * (1 / 255)).astype(np.float32)
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (vision.pixel_mean, vision.pixel_std))
    return (pixels - mean) / std


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_square_equals_siglips_processor_bit_for_bit(size, form):
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    data = encoded(picture(1, size), form)
    vision = dataclasses.replace(VISION, image_size=24)
    processor = SiglipImageProcessorPil(size={"height": 24, "width": 24})
    wanted = processor(Image.open(io.BytesIO(data)), return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(normalised(data, vision), wanted)


@pytest.mark.parametrize("size", SIZES)
def test_crop_equals_clips_processor_bit_for_bit(size):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    data = encoded(picture(2, size), "PNG")
    vision = dataclasses.replace(VISION, resize="crop", pixel_mean=CLIP_MEAN, pixel_std=CLIP_STD)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    wanted = processor(Image.open(io.BytesIO(data)), return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(normalised(data, vision), wanted)


def test_the_filter_is_the_configured_one():
    data = encoded(picture(3), "PNG")
    bilinear = decode(data, dataclasses.replace(VISION, interpolation="bilinear"))
    wanted = np.asarray(picture(3).resize((16, 16), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    np.testing.assert_array_equal(bilinear, wanted)
    assert (bilinear != decode(data, VISION)).any()


def test_transparency_is_seen_on_white():
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([0, 0, 0] * 256)
    grey = Image.new("LA", (8, 8), (0, 0))
    for data in (
        encoded(clear, "PNG"),
        encoded(palette, "PNG", transparency=0),
        encoded(palette, "GIF", transparency=0),
        encoded(grey, "PNG"),
        encoded(Image.new("RGB", (8, 8)), "PNG", transparency=(0, 0, 0)),
        encoded(clear, "WEBP", lossless=True),
    ):
        assert (decode(data, VISION) == 255).all()


def test_cmyk_grey_and_16_bit_become_rgb():
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    r, g, b = decode(encoded(red, "JPEG", quality=95), VISION)[:, 0, 0].astype(int)
    assert r > 220
    assert max(g, b) < 60
    deep = Image.fromarray(np.full((8, 8), 0x8000, np.uint16))
    assert (decode(encoded(deep, "PNG"), VISION) == 0x80).all()
    assert (decode(encoded(Image.new("1", (8, 8), 1), "PNG"), VISION) == 255).all()
    for data in (encoded(red, "JPEG"), encoded(deep, "PNG")):
        assert verify(data).width == 8


# How a camera held so has stored an upright picture.
STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = Image.new("RGB", (32, 16))
    upright.paste("red", (0, 0, 16, 8))  # the top left quarter, as it should be seen
    stored = upright if orientation == 1 else upright.transpose(STORED[orientation])
    data = encoded(stored, "PNG", exif=exif)
    facts = verify(data)
    assert (facts.width, facts.height) == (32, 16)
    seen = decode(data, VISION)
    assert seen[0, 2, 2] > 200
    assert seen[0, 12, 12] < 50
    assert seen[0, 2, 12] < 50


def test_verify_names_the_real_format():
    image = picture(4)
    for form, suffix in (("JPEG", "jpg"), ("PNG", "png"), ("GIF", "gif"), ("WEBP", "webp"), ("BMP", "bmp")):
        facts = verify(encoded(image, form))
        assert (facts.suffix, facts.width, facts.height) == (suffix, 40, 30)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "WEBP", "BMP"])
def test_what_is_cut_is_refused_unless_no_pixel_is_missing(form):
    data = encoded(picture(5), form)
    whole = decode(data, VISION)
    num_passed = 0
    for length in [*range(0, len(data), 7), *range(len(data) - 9, len(data))]:
        try:
            verify(data[:length])
        except BadSampleError:
            continue
        num_passed += 1
        np.testing.assert_array_equal(decode(data[:length], VISION), whole)
    assert num_passed <= 8  # PNG's last checksum and GIF's end mark follow the last pixel


def reason(data: bytes) -> str:
    with pytest.raises(BadSampleError) as caught:
        verify(data)
    assert "object at" not in caught.value.detail  # no memory address: details are written into shards' quarantine
    return caught.value.reason


def png(width: int, height: int, body: bytes = b"") -> bytes:
    """A PNG with this header, whatever it holds."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


def test_files_that_are_no_images_are_named():
    for data in (b"", b"not an image", b"<html></html>", b"%PDF-1.7", b"\x80\x04\x95", encoded(picture(), "TIFF"), bytes(5000)):
        assert reason(data) == "not_an_image"


def test_bombs_are_refused_before_decoding():
    assert reason(png(60_000, 60_000)) == "oversized_image"
    assert reason(png(9_000, 9_000)) == "oversized_image"
    with pytest.raises(BadSampleError, match="oversized"):
        decode(png(9_000, 9_000), VISION)


def test_damage_inside_is_found():
    assert reason(png(64, 64, b"\0" * 100)) == "damaged_image"
    data = bytearray(encoded(picture(6, (400, 300)), "PNG"))
    data[len(data) // 2] ^= 1
    assert reason(bytes(data)) == "damaged_image"
    assert reason(encoded(picture(6, (400, 300)), "JPEG")[:-1000]) == "damaged_image"


def test_flipped_bits_raise_nothing_else():
    random = np.random.default_rng(0)
    for form in ("JPEG", "PNG", "GIF", "WEBP", "BMP"):
        whole = encoded(picture(7), form, **({"exif": Image.Exif()} if form in ("JPEG", "PNG", "WEBP") else {}))
        for _ in range(150):
            data = bytearray(whole)
            for place in random.integers(0, len(data), 2):
                data[place] ^= 1 << random.integers(8)
            for look in (verify, lambda d: decode(d, VISION)):
                with contextlib.suppress(BadSampleError):
                    look(bytes(data))
