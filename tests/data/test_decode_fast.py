"""Fast pixels are Pillow's within 2 of 255 levels, for every format, size and way of resizing; what is broken is as broken."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from himix_megatron.data.errors import BadSampleError
from himix_megatron.data.images.decode import decode
from himix_megatron.data.images.image_file import blank_pixels
from tests.support.data_fixtures import EMOJI, VISION, encoded, picture

SIZES = [(640, 480), (427, 640), (333, 501), (97, 61), (48, 48), (16, 16), (7, 5), (1, 1), (1, 300), (1201, 37)]
WAYS = [(resize, interpolation) for resize in ("square", "crop") for interpolation in ("bicubic", "bilinear")]


def noise(seed, size):
    """The hardest case: neighbours have nothing to do with each other."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def vision_of(resize, interpolation, image_size):
    return dataclasses.replace(VISION, resize=resize, interpolation=interpolation, image_size=image_size)


def apart(data, vision):
    """Levels between fast and exact pixels, uint8[3, H, W]."""
    fast, exact = decode(data, vision, "fast"), decode(data, vision, "exact")
    assert fast.dtype == exact.dtype == np.uint8
    assert fast.shape == exact.shape == (3, vision.image_size, vision.image_size)
    return np.abs(fast.astype(int) - exact.astype(int))


@pytest.mark.parametrize(("resize", "interpolation"), WAYS)
def test_pixels_are_pillows_within_2_levels(resize, interpolation):
    means = []
    for number, size in enumerate(SIZES):
        for drawn in (picture(number, size), noise(number, size)):
            for data in (encoded(drawn, "JPEG", quality=90), encoded(drawn, "BMP")):
                for image_size in (16, 48, 96):
                    levels = apart(data, vision_of(resize, interpolation, image_size))
                    assert levels.max() <= 2, (size, image_size)
                    means.append(levels.mean())
    print(f"{resize} {interpolation}: mean difference {np.mean(means):.4f} levels, at most {max(means):.4f} in a picture")
    assert np.mean(means) < 0.01


def test_a_photo_scaled_to_384_is_pillows_within_2_levels():
    vision = vision_of("square", "bicubic", 384)
    for number, size in enumerate([(640, 480), (480, 640), (2000, 1503), (384, 384), (100, 80)]):
        assert apart(encoded(noise(number, size), "JPEG", quality=85), vision).max() <= 2


def test_the_real_pictures_are_pillows_within_2_levels():
    for path in sorted((EMOJI / "images").iterdir()):
        assert apart(path.read_bytes(), vision_of("square", "bicubic", 48)).max() <= 2


FORMATS = {
    "grey JPEG": lambda image: encoded(image.convert("L"), "JPEG"),
    "CMYK JPEG": lambda image: encoded(image.convert("CMYK"), "JPEG"),
    "RGB JPEG": lambda image: encoded(image, "JPEG", keep_rgb=True),
    "progressive JPEG": lambda image: encoded(image, "JPEG", progressive=True),
    "JPEG without subsampling": lambda image: encoded(image, "JPEG", subsampling=0),
    "JPEG subsampled in one direction": lambda image: encoded(image, "JPEG", subsampling=1),
    "two pictures in a JPEG": lambda image: encoded(image, "MPO", save_all=True, append_images=[image.rotate(90)]),
    "transparent PNG": lambda image: encoded(picture(8, image.size, "RGBA"), "PNG"),
    "palette PNG": lambda image: encoded(image.convert("P"), "PNG", transparency=3),
    "16-bit PNG": lambda image: encoded(Image.fromarray(np.arange(63 * 41, dtype=np.uint16).reshape(41, 63) * 25), "PNG"),
    "two-colour PNG": lambda image: encoded(image.convert("1"), "PNG"),
    "GIF": lambda image: encoded(image.convert("P"), "GIF"),
    "WEBP": lambda image: encoded(image, "WEBP"),
    "BMP": lambda image: encoded(image, "BMP"),
}


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_is_within_2_levels(form):
    data = FORMATS[form](picture(9, (63, 41)))
    for resize, interpolation in WAYS:
        assert apart(data, vision_of(resize, interpolation, 32)).max() <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_orientation_is_honoured(orientation, form):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(10, (60, 40)), form, exif=exif)
    levels = apart(data, vision_of("crop", "bicubic", 32))
    assert levels.max() <= 2
    if orientation > 1:
        upright = decode(encoded(picture(10, (60, 40)), form), vision_of("crop", "bicubic", 32), "fast")
        assert (upright != decode(data, vision_of("crop", "bicubic", 32), "fast")).any()


def test_an_orientation_in_xmp_is_honoured():
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    turned = encoded(picture(11, (60, 40)), "JPEG", xmp=xmp)
    assert apart(turned, VISION).max() <= 2
    assert (decode(turned, VISION, "fast") != decode(encoded(picture(11, (60, 40)), "JPEG"), VISION, "fast")).any()


@pytest.mark.parametrize("how", ["fast", "exact"])
@pytest.mark.parametrize(("resize", "interpolation"), WAYS)
def test_pixels_can_be_written_into_a_batch(how, resize, interpolation):
    vision = vision_of(resize, interpolation, 24)
    data = encoded(picture(12, (64, 48)), "JPEG")
    wanted = decode(data, vision, how)
    for batch in (blank_pixels(3, vision.blank_size), np.zeros((3, 3, 24, 24), np.uint8)):
        into = batch[1]
        assert decode(data, vision, how, into) is into
        np.testing.assert_array_equal(batch[1], wanted)
        assert not batch[[0, 2]].any()


def test_blank_pixels_are_zeros_with_channels_last():
    blank = blank_pixels(2, VISION.blank_size)
    assert blank.shape == (2, 3, 16, 16)
    assert blank.strides == (768, 1, 48, 3)
    assert not blank.any()


def judged(data, how):
    try:
        return decode(data, VISION, how)
    except BadSampleError as error:
        return error.reason


def test_what_pillow_refuses_is_refused_for_the_same_reason():
    random = np.random.default_rng(1)
    num_refused = 0
    for form in ("JPEG", "PNG", "GIF"):
        whole = encoded(picture(13, (50, 40)), form, **({"exif": Image.Exif()} if form == "JPEG" else {}))
        broken = [whole[:length] for length in range(0, len(whole), 97)]
        for _ in range(100):
            data = bytearray(whole)
            data[random.integers(len(data))] ^= 1 << random.integers(8)
            broken.append(bytes(data))
        for data in broken:
            fast, exact = judged(data, "fast"), judged(data, "exact")
            assert isinstance(fast, str) == isinstance(exact, str)
            if isinstance(exact, str):
                num_refused += 1
                assert fast == exact
            else:
                assert np.abs(fast.astype(int) - exact.astype(int)).max() <= 2
    assert num_refused > 20


@pytest.mark.parametrize("how", ["fast", "exact"])
def test_a_picture_too_narrow_to_crop_is_refused_before_it_fills_the_memory(how):
    data = encoded(Image.new("RGB", (60_000, 1)), "PNG")
    with pytest.raises(BadSampleError, match="oversized_image: 60000x1 scaled to a shorter side of 48"):
        decode(data, vision_of("crop", "bicubic", 48), how)
    assert decode(data, vision_of("square", "bicubic", 48), how).shape == (3, 48, 48)


def test_verifying_and_exact_decoding_need_no_torch(tmp_path):
    (tmp_path / "picture.jpg").write_bytes(encoded(picture(), "JPEG"))
    vision = {field.name: getattr(VISION, field.name) for field in dataclasses.fields(VISION)}
    script = f"""
import sys
from himix_megatron.config import VisionConfig
from himix_megatron.data.images.decode import decode
from himix_megatron.data.images.image_file import verify
data = open({str(tmp_path / "picture.jpg")!r}, "rb").read()
verify(data)
decode(data, VisionConfig(**{vision!r}))
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
