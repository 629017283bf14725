"""Masks of pictures: from a file, from their transparency or from nothing, and cropped alike."""

import numpy as np
import pytest
import torch
from PIL import Image

from engine.errors import BadMedia
from engine.masks.colours import BLACK, BLUE, CLASSES, WHITE, paint
from engine.masks.reader import (
    DrivingMask,
    absent_driving_mask,
    additional_mask,
    compare_persons,
    read_reference_mask,
)
from engine.media.framing import crop_image, image_to_network
from tests.support.mask_scenes import write_video

SIZE = (64, 96)
PICTURE = (120, 150)
NOBODY = "ref_mask.png shows nobody: all of the picture is taken as background."


def person(ground=BLACK, colour=BLUE):
    numbers = torch.full(PICTURE, ground, dtype=torch.uint8)
    numbers[30:110, 50:100] = colour
    return numbers


def save_picture(folder, numbers, name="ref_mask.png", **options):
    Image.fromarray(paint(numbers).numpy()).save(folder / name, **options)
    return folder / name


def cropped(numbers):
    return crop_image(image_to_network(paint(numbers)), SIZE)


@pytest.mark.parametrize(("mode", "ground"), [("animation", WHITE), ("replacement", BLACK)])
def test_a_reference_mask_goes_the_way_of_its_picture(tmp_path, mode, ground):
    for name in ("ref_mask.png", "ref_mask.jpg"):
        path = save_picture(tmp_path, person(ground), name)
        mask = read_reference_mask(path, None, PICTURE, SIZE, mode)
        assert (mask.persons, mask.notes) == (("blue",), ())
        if name.endswith("png"):
            assert torch.equal(mask.colours, cropped(person(ground)))
    assert mask.colours.min() < -1.01  # bicubic, not clamped


def test_a_black_reference_mask_shows_the_background_in_animation(tmp_path):
    mask = read_reference_mask(save_picture(tmp_path, person()), None, PICTURE, SIZE, "animation")
    wanted = cropped(person())
    wanted = torch.where(wanted.amax(0) < -0.5, torch.ones(()), wanted)
    assert torch.equal(mask.colours, wanted)
    (note,) = mask.notes
    assert note.startswith(
        "ref_mask.png has a black background (78% of it), where this mode has white"
    )


def test_black_beside_white_stays_in_animation(tmp_path):
    numbers = person(WHITE)
    numbers[:, :20] = BLACK
    path = save_picture(tmp_path, numbers)
    mask = read_reference_mask(path, None, PICTURE, SIZE, "animation")
    assert torch.equal(mask.colours, cropped(numbers))
    assert mask.notes == ()


def test_a_white_background_is_turned_in_replacement(tmp_path):
    path = save_picture(tmp_path, person(WHITE))
    mask = read_reference_mask(path, None, PICTURE, SIZE, "replacement")
    assert torch.equal(mask.colours, cropped(person(BLACK)))
    assert mask.notes[0].startswith("ref_mask.png has a white background (78% of it)")


@pytest.mark.parametrize(("mode", "ground"), [("animation", WHITE), ("replacement", BLACK)])
def test_the_alpha_of_a_picture_is_its_matte(tmp_path, mode, ground):
    alpha = torch.where(person() == BLUE, 128, 127).to(torch.uint8)
    mask = read_reference_mask(None, alpha, PICTURE, SIZE, mode)
    assert torch.equal(mask.colours, cropped(person(ground)))
    assert mask.notes == (
        "The picture is transparent in part: what is opaque of it is person 1 (blue).",
    )
    path = save_picture(tmp_path, person(ground, CLASSES["red"]))
    assert read_reference_mask(path, alpha, PICTURE, SIZE, mode).persons == ("red",)


@pytest.mark.parametrize("alpha", [None, torch.full(PICTURE, 200, dtype=torch.uint8)])
def test_a_picture_without_mask_is_background_in_animation_and_person_1_in_replacement(alpha):
    shown = read_reference_mask(None, alpha, PICTURE, SIZE, "animation")
    assert shown.colours.sub(1).abs().max() < 1e-6
    assert shown.notes == ("The picture has no mask: its background is taken over as it is.",)
    replaced = read_reference_mask(None, alpha, PICTURE, SIZE, "replacement")
    assert replaced.persons == ("blue",)
    assert replaced.colours.mean((1, 2)).tolist() == pytest.approx([-1, -1, 1])
    assert "all of it is taken as person 1" in replaced.notes[0]


def test_a_white_reference_mask_is_background_in_animation_and_person_1_in_replacement(tmp_path):
    path = save_picture(tmp_path, torch.full(PICTURE, WHITE).byte())
    shown = read_reference_mask(path, None, PICTURE, SIZE, "animation")
    assert (shown.persons, shown.notes) == ((), (NOBODY,))
    assert shown.colours.sub(1).abs().max() < 1e-6
    replaced = read_reference_mask(path, None, PICTURE, SIZE, "replacement")
    assert replaced.persons == ("blue",)
    assert replaced.notes == (
        "ref_mask.png is white everywhere: all of the picture is person 1 (blue).",
    )


def test_a_reference_mask_without_person_is_noted_in_animation(tmp_path):
    path = save_picture(tmp_path, torch.zeros(PICTURE).byte())
    assert read_reference_mask(path, None, PICTURE, SIZE, "animation").notes == (NOBODY,)
    shown = read_reference_mask(None, torch.zeros(PICTURE).byte(), PICTURE, SIZE, "animation")
    assert shown.notes == (NOBODY.replace("ref_mask.png", "The picture"),)
    (note,) = additional_mask(path, None, PICTURE, SIZE).notes
    assert note == "ref_mask.png shows nobody and no background: nothing of it is to be seen."


def test_a_reference_mask_without_person_is_refused_in_replacement(tmp_path):
    path = save_picture(tmp_path, torch.zeros(PICTURE).byte())
    with pytest.raises(BadMedia, match=r"ref_mask\.png shows nobody; the person of the picture"):
        read_reference_mask(path, None, PICTURE, SIZE, "replacement")


def test_a_reference_mask_of_another_size_is_brought_to_that_of_the_picture(tmp_path):
    numbers = torch.nn.functional.interpolate(person()[None, None], scale_factor=2)[0, 0]
    path = save_picture(tmp_path, numbers)
    mask = read_reference_mask(path, None, PICTURE, SIZE, "replacement")
    assert torch.equal(mask.colours, cropped(person()))
    path = save_picture(tmp_path, numbers[:, 10:])
    with pytest.raises(BadMedia, match=r"ref_mask\.png is 290x240 and the picture 150x120"):
        read_reference_mask(path, None, PICTURE, SIZE, "replacement")


def test_a_reference_mask_may_come_as_labels(tmp_path):
    path = tmp_path / "masks.npz"
    np.savez(path, masks=(person() == BLUE).numpy().astype(np.uint8)[None] * 2)
    mask = read_reference_mask(path, None, PICTURE, SIZE, "animation")
    assert torch.equal(mask.colours, cropped(person(WHITE, CLASSES["red"])))


def test_a_clip_is_no_mask_of_a_picture(tmp_path):
    path = write_video(tmp_path / "mask.mkv", paint(person()[None].expand(3, -1, -1)))
    with pytest.raises(BadMedia, match=r"mask\.mkv has 3 frames; the mask of a picture has one"):
        read_reference_mask(path, None, PICTURE, SIZE, "animation")


def with_alpha(folder, rgb, alpha):
    path = folder / "mask.png"
    Image.fromarray(np.dstack([rgb, alpha]), "RGBA").save(path)
    return path


def test_a_transparent_mask_keeps_its_colours_and_a_cut_out_becomes_its_alpha(tmp_path):
    alpha = (person() == BLUE).numpy().astype(np.uint8) * 255
    red = paint(person(WHITE, CLASSES["red"])).numpy()
    mask = read_reference_mask(with_alpha(tmp_path, red, alpha), None, PICTURE, SIZE, "replacement")
    assert torch.equal(mask.colours, cropped(person(BLACK, CLASSES["red"])))
    photo = np.random.default_rng(0).integers(60, 200, red.shape).astype(np.uint8)
    for rgb in (photo, np.zeros_like(red), np.full_like(red, 255)):
        path = with_alpha(tmp_path, rgb, alpha)
        mask = read_reference_mask(path, None, PICTURE, SIZE, "replacement")
        assert torch.equal(mask.colours, cropped(person()))


def test_an_additional_picture_keeps_its_background_or_is_cut_out_or_is_white(tmp_path):
    for ground in (BLACK, WHITE):
        path = save_picture(tmp_path, person(ground))
        mask = additional_mask(path, None, PICTURE, SIZE)
        assert torch.equal(mask.colours, cropped(person(ground)))
        assert (mask.persons, mask.notes) == (("blue",), ())
    alpha = (person() == BLUE).to(torch.uint8) * 255
    assert torch.equal(additional_mask(None, alpha, PICTURE, SIZE).colours, cropped(person()))
    white = additional_mask(None, None, PICTURE, SIZE)
    assert white.colours.sub(1).abs().max() < 1e-6
    assert len(white.notes) == 1


def test_colours_that_one_side_lacks_are_told(tmp_path):
    clip = torch.zeros(1, *SIZE, 3, dtype=torch.uint8)
    driving = DrivingMask(clip, persons=("blue", "red"), notes=())
    blue = read_reference_mask(save_picture(tmp_path, person()), None, PICTURE, SIZE, "replacement")
    green = additional_mask(
        save_picture(tmp_path, person(BLACK, CLASSES["green"])), None, PICTURE, SIZE
    )
    assert compare_persons(driving, [blue]) == (
        "The mask of the video shows red, which no picture has: check the colours.",
    )
    assert compare_persons(driving, [blue, green])[1] == (
        "The masks of the pictures show green, which the video has not: check the colours."
    )
    assert compare_persons(absent_driving_mask(5, SIZE, "animation"), [blue]) == ()
    assert compare_persons(driving, []) == ()
