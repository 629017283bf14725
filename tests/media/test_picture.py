"""Pictures of every kind people send, and files that are none."""

import dataclasses
import io
import os
import random
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from engine.config import LIMITS
from engine.errors import BadMedia
from engine.media.files import HEAD_BYTES, sniff
from engine.media.picture import load_image, load_layers
from engine.media.picture_colours import PRIMARIES, SRGB, rgb_profile

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
    (tmp_path / "burst.jpg").write_bytes(b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(90))
    (tmp_path / "half.avif").write_bytes(b"\0\0\0\x18ftypmif1\0\0\0\0mif1avif" + bytes(90))
    (tmp_path / "new.jxl").write_bytes(b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(90))
    (tmp_path / "raw.cr3").write_bytes(b"\0\0\0\x18ftypcrx " + bytes(90))
    (tmp_path / "old.jp2").write_bytes(b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(90))
    (tmp_path / "a.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (tmp_path / "a.exr").write_bytes(b"v/1\x01" + bytes(90))
    os.mkfifo(tmp_path / "pipe.png")
    expected = "a JPEG, PNG, WebP, BMP, GIF, TIFF or AVIF picture is expected."
    assert refusal(tmp_path / "text.png") == f"text.png is a file of another kind; {expected}"
    assert refusal(tmp_path / "dance.png") == f"dance.png is a video; {expected}"
    assert refusal(tmp_path / "phone.jpg") == f"phone.jpg is a HEIC picture; {expected}"
    assert refusal(tmp_path / "burst.jpg") == f"burst.jpg is a HEIC picture; {expected}"
    assert refusal(tmp_path / "new.jxl") == f"new.jxl is a JPEG XL picture; {expected}"
    assert refusal(tmp_path / "raw.cr3") == f"raw.cr3 is a raw photograph; {expected}"
    assert refusal(tmp_path / "old.jp2") == f"old.jp2 is a JPEG 2000 picture; {expected}"
    assert refusal(tmp_path / "a.svg") == f"a.svg is an SVG drawing; {expected}"
    for before in ("\ufeff", "\n ", '<?xml version="1.0"?>\n', "<!-- drawn -->", "<!DOCTYPE svg>"):
        (tmp_path / "b.svg").write_text(f"{before}<svg/>", encoding="utf-8")
        assert refusal(tmp_path / "b.svg") == f"b.svg is an SVG drawing; {expected}"
    for name, head, found in (
        ("a.ts", b"G" + bytes(187) + b"G", "a video"),
        ("a.m2ts", bytes(4) + b"G" + bytes(191) + b"G", "a video"),
        ("a.mp3", b"ID3\4", "a sound file"),
        ("a.avci", b"\0\0\0\x18ftypavci", "a HEIF picture"),
        ("a.xml", b"<?xml version='1.0'?><a/>", "an XML document, such as an SVG drawing"),
    ):
        (tmp_path / name).write_bytes(head + bytes(90))
        assert refusal(tmp_path / name) == f"{name} is {found}; {expected}"
    assert refusal(tmp_path / "a.exr") == f"a.exr is an OpenEXR picture; {expected}"
    assert "half.avif begins as an AVIF picture and cannot be" in refusal(tmp_path / "half.avif")
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


FORMATS = {
    "jpg": {"quality": 100, "subsampling": 0},
    "png": {},
    "webp": {"lossless": True},
    "tiff": {},
    "avif": {"quality": 100, "subsampling": "4:4:4"},
}
CLOSE = 8  # what the codecs with losses change, and colours at the edge of sRGB


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_stands_as_its_exif_says(tmp_path, suffix):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = saved(tmp_path / f"a.{suffix}", Image.fromarray(ramp()), exif=exif, **FORMATS[suffix])
    got = load_image(path).numpy().astype(int)
    assert np.abs(got - np.rot90(ramp(), 3)).max() <= CLOSE


def calm():
    """[64, 96, 3]: colours that Display P3 and sRGB both have."""
    return (64 + ramp() // 2).astype(np.uint8)


def in_p3():
    """`calm` in Display P3, and that profile."""
    profile = rgb_profile(PRIMARIES[12], lambda code: code**2.2)
    space = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    srgb = ImageCms.createProfile("sRGB")
    return ImageCms.profileToProfile(Image.fromarray(calm()), srgb, space), profile


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_colour_profile_is_converted_to_srgb(tmp_path, suffix):
    coded, profile = in_p3()
    assert np.abs(np.asarray(coded).astype(int) - calm()).max() > 10
    path = saved(tmp_path / f"a.{suffix}", coded, icc_profile=profile, **FORMATS[suffix])
    assert np.abs(load_image(path).numpy().astype(int) - calm()).max() <= CLOSE


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("profile", [b"nonsense" * 30, in_p3()[1][:900], b"\0"])
def test_a_damaged_profile_is_ignored_and_told(tmp_path, caplog, suffix, profile):
    path = saved(
        tmp_path / f"a.{suffix}", Image.fromarray(ramp()), icc_profile=profile, **FORMATS[suffix]
    )
    assert np.abs(load_image(path).numpy().astype(int) - ramp()).max() <= CLOSE
    assert f"a.{suffix}: its colour profile is damaged and ignored" in caplog.text


def test_transparency_palettes_and_greys_have_profiles_too(tmp_path):
    coded, profile = in_p3()
    clear = coded.copy()
    clear.putalpha(128)
    got = load_image(saved(tmp_path / "a.png", clear, icc_profile=profile)).numpy()
    assert np.abs(got - (calm() * (128 / 255) + 127)).max() <= 4
    few = coded.quantize(16)
    flat = saved(tmp_path / "p.png", few.convert("RGB"), icc_profile=profile)
    path = saved(tmp_path / "a.gif.png", few, icc_profile=profile)
    assert torch.equal(load_image(path), load_image(flat))
    grey = Image.fromarray(calm()[..., 0])
    dark = rgb_profile(SRGB, lambda code: code**3)
    got = load_image(saved(tmp_path / "g.png", grey, icc_profile=dark)).numpy()
    assert np.abs(np.diff(got.astype(int), axis=2)).max() <= 1
    assert got.mean() < calm()[..., 0].mean() - 20


def test_a_profile_of_other_colours_is_ignored_and_told(tmp_path, caplog):
    inks = Image.fromarray(np.full((SIDE, 96, 4), 40, np.uint8), "CMYK")
    path = saved(tmp_path / "a.jpg", inks, quality=95, icc_profile=in_p3()[1])
    want = saved(tmp_path / "b.jpg", inks, quality=95)
    assert torch.equal(load_image(path), load_image(want))
    assert "its profile is for RGB and its pixels are CMYK; it is ignored" in caplog.text


def with_chunk(path, kind, data):
    whole = path.read_bytes()
    crc = zlib.crc32(kind + data).to_bytes(4, "big")
    path.write_bytes(whole[:33] + len(data).to_bytes(4, "big") + kind + data + crc + whole[33:])
    return path


def test_the_numbers_that_stand_for_a_profile_in_a_png_are_followed(tmp_path):
    coded, _ = in_p3()
    path = with_chunk(saved(tmp_path / "a.png", coded), b"cICP", bytes([12, 4, 0, 1]))
    assert np.abs(load_image(path).numpy().astype(int) - calm()).max() <= CLOSE
    light = np.rint(255 * (calm() / 255) ** 2.2).astype(np.uint8)
    path = saved(tmp_path / "b.png", Image.fromarray(light))
    linear = with_chunk(path, b"gAMA", (100_000).to_bytes(4, "big"))
    assert np.abs(load_image(linear).numpy().astype(int) - calm()).max() <= 5
    for kind, data in ((b"gAMA", (45_455).to_bytes(4, "big")), (b"cICP", bytes([1, 13, 0, 1])),
                       (b"gAMA", bytes(4)), (b"cICP", bytes([77, 77, 0, 1]))):  # fmt: skip
        path = with_chunk(saved(tmp_path / "c.png", Image.fromarray(ramp())), kind, data)
        assert np.array_equal(load_image(path).numpy(), ramp())


def test_the_codes_of_colours_in_an_avif_are_followed(tmp_path):
    coded, _ = in_p3()
    path = saved(tmp_path / "a.avif", coded, **FORMATS["avif"])
    held = bytearray(path.read_bytes())
    at = held.index(b"colrnclx") + 8
    held[at : at + 4] = bytes([0, 12, 0, 4])  # Display P3, gamma 2.2
    path.write_bytes(held)
    assert np.abs(load_image(path).numpy().astype(int) - calm()).max() <= CLOSE


def test_high_dynamic_range_becomes_a_picture_in_which_lights_differ(tmp_path):
    for transfer in (16, 18):
        grey = np.tile(np.linspace(0, 255, 96)[None, :, None], (SIDE, 1, 3)).astype(np.uint8)
        path = saved(tmp_path / "a.png", Image.fromarray(grey))
        row = load_image(with_chunk(path, b"cICP", bytes([9, transfer, 0, 1])))[0, :, 1].int()
        assert row[0] == 0 and row[-1] >= 250
        assert (row.diff() >= 0).all() and len(row.unique()) > 50


BOXES = [f"{container}-{kind}" for container in ("mif1", "msf1") for kind in ("avif", "avis")]


@pytest.mark.parametrize("kind", BOXES)
def test_an_avif_is_known_by_the_brands_it_is_compatible_with(tmp_path, kind):
    major, minor = kind.split("-")
    more = {"save_all": True, "append_images": [Image.new("RGB", (96, SIDE))]}
    path = saved(
        tmp_path / "a.avif", Image.fromarray(ramp()), quality=100, subsampling="4:4:4",
        **(more if minor == "avis" else {}),
    )  # fmt: skip
    held = bytearray(path.read_bytes())
    held[8:12] = major.encode()
    path.write_bytes(held)
    assert sniff(bytes(held[:HEAD_BYTES])) == "avif"
    assert np.abs(load_image(path).numpy().astype(int) - ramp()).max() <= CLOSE


def test_the_first_picture_of_every_animation_is_taken(tmp_path):
    first, second = (Image.new("RGB", (96, SIDE), colour) for colour in ("red", "blue"))
    for suffix in ("png", "webp", "avif", "tiff", "mpo"):
        path = saved(tmp_path / f"a.{suffix}", first, save_all=True, append_images=[second])
        assert np.abs(load_image(path).numpy().astype(int) - [255, 0, 0]).max() <= 3, suffix


def raw_tiff(path, samples, tags, order="<"):
    """An unpacked TIFF of one strip, or of one for each plane."""
    strips = [plane.tobytes() for plane in (samples if samples.ndim == 3 else [samples])]
    entries = {256: [96], 257: [SIDE], 259: [1], 277: [1], 278: [SIDE]} | tags
    data, places = b"", []
    for strip in strips:
        places.append(1000 + len(data))
        data += strip
    entries |= {273: places, 279: [len(strip) for strip in strips]}
    table, extra, start = b"", b"", 8 + 2 + 12 * len(entries) + 4
    for tag, numbers in sorted(entries.items()):
        kind, code = (4, "I") if tag in (273, 279) else (3, "H")
        value = struct.pack(f"{order}{len(numbers)}{code}", *numbers)
        if len(value) > 4:
            value, extra = struct.pack(order + "I", start + len(extra)), extra + value
        table += struct.pack(order + "HHI", tag, kind, len(numbers)) + value.ljust(4, b"\0")
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(entries))
    path.write_bytes((head + table + bytes(4) + extra).ljust(1000, b"\0") + data)
    return path


def test_tiffs_of_many_bits_and_kinds_are_read_as_they_look_or_refused(tmp_path):
    path = tmp_path / "a.tif"
    grey = np.linspace(0, 65535, 96 * SIDE).astype("<u2").reshape(SIDE, 96)
    want = np.repeat(np.rint(grey / 257).astype(int)[..., None], 3, 2)
    big = raw_tiff(path, grey.astype(">u2"), {258: [16], 262: [1]}, ">")
    assert np.array_equal(load_image(big).numpy(), want)
    zero_is_white = raw_tiff(path, grey, {258: [16], 262: [0]})
    assert np.array_equal(load_image(zero_is_white).numpy(), 255 - want)
    zero_is_white = raw_tiff(path, ramp()[..., 0], {258: [8], 262: [0]})
    assert np.array_equal(load_image(zero_is_white).numpy()[..., 0], 255 - ramp()[..., 0])
    high, low = np.split((grey >> 4).astype(int).reshape(-1, 2), 2, axis=1)
    packed = np.concatenate([high >> 4, (high & 15) << 4 | low >> 8, low & 255], axis=1)
    twelve = raw_tiff(path, packed.astype(np.uint8), {258: [12], 262: [1]})
    assert np.abs(load_image(twelve).numpy().astype(int) - want).max() <= 1
    planes = np.ascontiguousarray(ramp().transpose(2, 0, 1))
    planar = raw_tiff(path, planes, {258: [8, 8, 8], 262: [2], 277: [3], 284: [2]})
    assert np.array_equal(load_image(planar).numpy(), ramp())
    for samples, tags in (
        (grey.view("<i2"), {258: [16], 262: [1], 339: [2]}),
        (grey.astype("<u4"), {258: [32], 262: [1]}),
        (grey.astype("<i4"), {258: [32], 262: [1], 339: [2]}),
    ):
        odd = raw_tiff(path, samples, tags)
        assert "signed or 32-bit integers of unknown range" in refusal(odd)


def test_greys_of_every_depth_and_their_transparency(tmp_path):
    mask = (np.mgrid[0:SIDE, 0:96][1] % 2 * 255).astype(np.uint8)
    want = np.repeat(mask[..., None], 3, 2)
    for suffix in ("png", "tiff", "bmp", "gif", "pbm"):
        path = saved(tmp_path / f"a.{suffix}", Image.fromarray(mask).convert("1"))
        assert np.array_equal(load_image(path).numpy(), want), suffix
    pair = np.stack([np.zeros_like(mask), mask], 2)
    for suffix in ("png", "tiff"):
        path = saved(tmp_path / f"b.{suffix}", Image.fromarray(pair, "LA"))
        assert np.array_equal(load_image(path).numpy(), 255 - want), suffix
    deep = np.where(mask, 30000, 60000).astype(np.uint16)
    path = saved(tmp_path / "c.png", Image.fromarray(deep))
    clear = with_chunk(path, b"tRNS", (30000).to_bytes(2, "big"))
    assert load_image(clear).numpy()[0, :2, 0].tolist() == [233, 255]


def test_damaged_exif_leaves_the_picture_as_it_lies(tmp_path):
    for exif in (b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"):
        for suffix in ("jpg", "png", "webp"):
            path = saved(
                tmp_path / f"a.{suffix}", Image.fromarray(ramp()), exif=exif, **FORMATS[suffix]
            )
            assert np.abs(load_image(path).numpy().astype(int) - ramp()).max() <= CLOSE


@pytest.mark.golden
@pytest.mark.parametrize("case", ["avif-major-brand-mif1", "avif-animated-major-brand-msf1"])
def test_the_avif_cases_show_their_four_colours(golden, case):
    pixels = load_image(golden / "cases" / f"{case}.avif").numpy().astype(int)
    corners = pixels[[5, 5, -5, -5], [5, -5, 5, -5]]
    want = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]
    assert np.abs(corners - want).max() <= 6


@pytest.mark.golden
def test_the_cases_of_colours_and_numbers_look_as_elsewhere_or_are_refused(golden):
    cases = golden / "cases"
    got = load_image(cases / "jpeg-display-p3.jpg").numpy().astype(int)
    want = load_image(cases / "jpeg-display-p3_srgb.png").numpy().astype(int)
    assert np.abs(got - want).mean() < 1.5
    assert "of unknown range" in refusal(cases / "tiff-32-bit-integers-0-to-255.tif")


@pytest.mark.filterwarnings("ignore:Tag data larger than file")
@pytest.mark.parametrize(
    "suffix", ["png", "jpg", "webp", "gif", "tiff", "bmp", "avif", "ppm", "mpo"]
)
def test_damage_is_refused_or_survived_but_never_a_surprise(tmp_path, suffix):
    more = {"icc_profile": in_p3()[1]} if suffix in FORMATS else {}
    whole = saved(tmp_path / f"a.{suffix}", Image.fromarray(ramp()), **more).read_bytes()
    chance = random.Random(suffix)
    refused = 0
    for n in range(80):
        harmed = bytearray(whole[: chance.randrange(1, len(whole))] if n < 40 else whole)
        for _ in range(chance.randrange(4) if n < 40 else 3):  # most of it near the beginning
            place = chance.randrange(min(len(harmed), chance.choice([40, 400, len(harmed)])))
            harmed[place] = chance.choice([0, 0x7F, 0x80, 0xFF, chance.randrange(256)])
        path = tmp_path / f"harmed.{suffix}"
        path.write_bytes(harmed)
        try:
            assert load_image(path).shape[2] == 3
        except BadMedia as error:
            assert str(error).startswith(path.name)
            refused += 1
    assert refused > 20


@pytest.mark.parametrize("turn", [1, 6])
def test_the_opacity_of_a_picture_is_read_beside_its_pixels(tmp_path, turn):
    alpha = ramp()[..., 0]
    exif = Image.Exif()
    exif[0x0112] = turn
    path = tmp_path / "a.png"
    Image.fromarray(np.dstack([ramp(), alpha])).save(path, exif=exif)
    pixels, opacity = load_layers(path)
    assert np.array_equal(opacity.numpy(), np.rot90(alpha, -1) if turn == 6 else alpha)
    assert torch.equal(pixels, load_image(path))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "CMYK"])
def test_a_picture_that_is_opaque_has_no_opacity(tmp_path, mode):
    path = tmp_path / "a.tif"
    Image.fromarray(ramp()).convert(mode).save(path)
    pixels, opacity = load_layers(path)
    assert opacity is None
    assert torch.equal(pixels, load_image(path))
