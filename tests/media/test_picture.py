"""Pictures of every kind people send, and files that are none."""

import dataclasses
import os
import random

import numpy as np
import pytest
from PIL import Image

from engine.config import LIMITS
from engine.errors import BadMedia
from engine.media.picture import load_image

SIDE = 64


def ramp():
    """[64, 96, 3]: every corner another colour."""
    rows, columns = np.mgrid[0:SIDE, 0:96]
    return np.stack([rows * 4, columns * 2, 255 - rows * 2], axis=2).astype(np.uint8)


def saved(path, picture, **options):
    picture.save(path, **options)
    return path


def refusal(path, limits=LIMITS):
    with pytest.raises(BadMedia) as raised:
        load_image(path, limits)
    return str(raised.value)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "ppm"])
def test_pixels_come_back_as_they_were_saved(tmp_path, suffix):
    path = saved(tmp_path / f"a.{suffix}", Image.fromarray(ramp()))
    assert np.array_equal(load_image(path).numpy(), ramp())


def test_the_kind_is_read_from_the_content_and_not_from_the_name(tmp_path):
    path = saved(tmp_path / "a.mp4", Image.fromarray(ramp()), format="PNG")
    assert np.array_equal(load_image(path).numpy(), ramp())


@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (8, 1), (3, 2), (6, 3)])
def test_a_picture_stands_as_its_exif_says(tmp_path, orientation, turns):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / "a.png", Image.fromarray(ramp()), exif=exif)
    assert np.array_equal(load_image(path).numpy(), np.rot90(ramp(), turns))


def test_transparency_shows_white(tmp_path):
    alpha = np.full((SIDE, 96, 1), 255, np.uint8)
    alpha[:32] = 0
    alpha[32:40] = 128
    path = saved(tmp_path / "a.png", Image.fromarray(np.concatenate([ramp(), alpha], axis=2)))
    got = load_image(path).numpy().astype(int)
    assert (got[:32] == 255).all()
    half = ramp()[32:40] * (128 / 255) + 255 * (127 / 255)
    assert np.abs(got[32:40] - half).max() <= 1
    assert np.array_equal(got[40:], ramp()[40:])


def test_a_transparent_palette_entry_shows_white(tmp_path):
    picture = Image.fromarray((np.arange(96 * SIDE).reshape(SIDE, 96) % 2).astype(np.uint8), "P")
    picture.putpalette([10, 20, 30, 200, 100, 50])
    path = saved(tmp_path / "a.png", picture, transparency=1)
    assert load_image(path).numpy()[0, :2].tolist() == [[10, 20, 30], [255, 255, 255]]


def test_greyscale_becomes_three_equal_channels(tmp_path):
    grey = ramp()[..., 0]
    path = saved(tmp_path / "a.png", Image.fromarray(grey))
    assert np.array_equal(load_image(path).numpy(), np.repeat(grey[..., None], 3, axis=2))


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bits_are_scaled_to_eight_and_not_clipped(tmp_path, suffix):
    grey = np.linspace(0, 65535, 96 * SIDE).astype(np.uint16).reshape(SIDE, 96)
    path = saved(tmp_path / f"a.{suffix}", Image.fromarray(grey))
    want = np.rint(grey / 257).astype(np.uint8)
    assert np.array_equal(load_image(path).numpy(), np.repeat(want[..., None], 3, axis=2))


def test_print_colours_become_red_green_blue(tmp_path):
    inks = np.zeros((SIDE, 96, 4), np.uint8)
    inks[..., 1] = 255  # magenta
    path = saved(tmp_path / "a.jpg", Image.fromarray(inks, "CMYK"), quality=95)
    assert np.abs(load_image(path).numpy().astype(int) - [255, 0, 255]).max() <= 3


def test_the_first_picture_of_an_animation_is_taken(tmp_path):
    first, second = (Image.new("RGB", (96, SIDE), colour) for colour in ("red", "blue"))
    path = saved(tmp_path / "a.gif", first, save_all=True, append_images=[second])
    assert (load_image(path).numpy() == [255, 0, 0]).all()


def test_what_is_no_picture_is_refused_in_a_sentence_that_names_it(tmp_path):
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "dance.png").write_bytes(b"\0\0\0\x20ftypisom" + bytes(90))
    (tmp_path / "phone.jpg").write_bytes(b"\0\0\0\x20ftypheic" + bytes(90))
    os.mkfifo(tmp_path / "pipe.png")
    expected = "a JPEG, PNG, WebP, BMP, GIF, TIFF or AVIF picture is expected."
    assert refusal(tmp_path / "text.png") == f"text.png is a file of another kind; {expected}"
    assert refusal(tmp_path / "dance.png") == f"dance.png is a video; {expected}"
    assert refusal(tmp_path / "phone.jpg") == f"phone.jpg is a HEIC picture; {expected}"
    assert refusal(tmp_path / "empty.png") == "empty.png is empty; a picture is expected."
    assert refusal(tmp_path / "pipe.png").startswith("pipe.png is a device or a pipe")
    assert refusal(tmp_path / "none.png") == "There is no picture none.png."
    assert refusal(tmp_path) == f"{tmp_path.name} is a folder; a picture file is expected."


def test_limits_are_checked_before_a_pixel_is_decoded(tmp_path):
    small = saved(tmp_path / "dot.png", Image.new("RGB", (1, 1)))
    assert refusal(small) == "dot.png is 1x1; a picture needs 64 pixels a side."
    path = saved(tmp_path / "a.png", Image.fromarray(ramp()))
    # The pixels are gone: only the header can have been read.
    path.write_bytes(path.read_bytes()[:60])
    few = dataclasses.replace(LIMITS, max_image_pixels=5000)
    assert "96x64, 0.0 megapixels" in refusal(path, few)
    light = dataclasses.replace(LIMITS, max_image_bytes=50)
    assert "a.png has 0.0 MiB; a picture may have 0.0 MiB." in refusal(path, light)


def test_floating_point_pixels_are_refused(tmp_path):
    path = saved(tmp_path / "a.tiff", Image.fromarray(np.ones((SIDE, 96), np.float32)))
    assert "floating-point numbers of unknown range" in refusal(path)


@pytest.mark.filterwarnings("ignore:Tag data larger than file")
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "tiff", "bmp"])
def test_damage_is_refused_or_survived_but_never_a_surprise(tmp_path, suffix):
    whole = saved(tmp_path / f"a.{suffix}", Image.fromarray(ramp())).read_bytes()
    chance = random.Random(suffix)
    refused = 0
    for _ in range(60):
        harmed = bytearray(whole[: chance.randrange(1, len(whole))])
        for _ in range(chance.randrange(4)):
            harmed[chance.randrange(len(harmed))] = chance.randrange(256)
        path = tmp_path / f"harmed.{suffix}"
        path.write_bytes(harmed)
        try:
            assert load_image(path).shape[2] == 3
        except BadMedia as error:
            assert str(error).startswith(path.name)
            refused += 1
    assert refused > 20
