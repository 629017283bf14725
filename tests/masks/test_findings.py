"""What of masks and their video a person should look at, with frame, figure and cure."""

import numpy as np
import torch

from engine.masks.colours import BLACK, CLASSES, paint
from engine.masks.findings import findings
from engine.masks.loss import Loss
from engine.masks.tracks import track

HEIGHT, WIDTH, FPS = 256, 448, 10.0


def scene(count, **persons):
    """Masks [T, H, W, 3] u8: a person is a function of the frame to left, top, height, or None."""
    numbers = torch.full((count, HEIGHT, WIDTH), BLACK, dtype=torch.uint8)
    for colour, where in persons.items():
        for frame in range(count):
            if (place := where(frame)) is not None:
                left, top, tall = place
                numbers[frame, top : top + tall, left : left + tall // 3] = CLASSES[colour]
    return paint(numbers)


def found(masks, persons, frames=None):
    frames = torch.zeros_like(masks) if frames is None else frames
    return {one.kind: one for one in findings(track(masks, persons), frames, FPS)}


def still(left=50, top=60, tall=120):
    return lambda frame: (left, top, tall)


def test_of_persons_who_stand_and_dance_there_is_nothing_to_say():
    sway = scene(30, blue=lambda n: (50 + 3 * (n % 5), 60, 120), red=still(300))
    assert found(sway, ("blue", "red")) == {}
    assert found(sway, ()) == {}


def test_small_persons_are_told_with_their_size():
    warned = found(scene(5, blue=still(tall=40)), ("blue",))["small"]
    assert warned.frame == 0
    assert "40 pixels high, 0.5% of the frame; 48 pixels and 1% are advised" in warned.said
    assert "small" not in found(scene(5, blue=still(tall=60)), ("blue",))


def test_who_comes_and_goes_is_told_with_the_frames():
    away = scene(30, blue=lambda n: None if 10 <= n < 14 or n > 27 else (50, 60, 120))
    warned = found(away, ("blue",))["absent"]
    assert warned.frame == 10
    assert "is not seen in 20% of the frames (10 to 13, 28 to 29)" in warned.said
    assert "absent" not in found(
        scene(30, blue=lambda n: None if n < 3 else (50, 60, 120)), ("blue",)
    )


def test_an_area_that_jumps_is_told():
    jump = scene(9, blue=lambda n: (50, 60, 120 if n < 4 else 60))
    warned = found(jump, ("blue",))["jump"]
    assert warned.frame == 4
    assert "changes its area 4.0 times from frame 3 to 4" in warned.said


def test_persons_who_change_places_from_one_frame_to_the_next_may_be_swapped():
    def side(first):
        return lambda n: (50 if (n < 5) == first else 300, 60, 120)

    kinds = found(scene(9, blue=side(True), red=side(False)), ("blue", "red"))
    assert kinds["swap"].frame == 5
    assert "in blue and red may be swapped at frame 5" in kinds["swap"].said
    assert kinds["order"].frame == 5


def test_persons_who_cross_change_their_order():
    cross = scene(21, blue=lambda n: (40 + 15 * n, 60, 120), red=lambda n: (340 - 15 * n, 60, 120))
    kinds = found(cross, ("blue", "red"))
    assert kinds["order"].frame == 11
    assert "swap" not in kinds


def test_a_film_cut_is_told_and_explains_what_jumps_there():
    def side(first):
        return lambda n: (50 if (n < 5) == first else 300, 60, 120 if n < 5 else 60)

    masks = scene(9, blue=side(True), red=side(False))
    frames = torch.zeros_like(masks)
    frames[5:] = 70
    kinds = found(masks, ("blue", "red"), frames)
    assert kinds.keys() == {"cut", "small"} or kinds.keys() == {"cut"}
    assert kinds["cut"].frame == 5
    assert "film cut at frame 5 (0.5 s)" in kinds["cut"].said
    frames[5:] = 50
    assert "cut" not in found(masks, ("blue", "red"), frames)


def test_all_gone_and_all_new_is_a_cut_too():
    masks = scene(
        9, blue=lambda n: (50, 60, 120) if n < 5 else None,
        red=lambda n: (300, 60, 120) if n >= 5 else None,
    )  # fmt: skip
    assert found(masks, ("blue", "red"))["cut"].frame == 5


def test_what_the_crop_cuts_off_a_person_is_told_for_every_form_of_mask():
    masks = scene(20, red=lambda n: (2 * n, 60, 120))  # 40 wide; 96 columns each side are lost
    for frames in (masks, masks[..., 0] // 255 * 2):
        loss = Loss((HEIGHT, WIDTH), (256, 256), 20)
        for number, frame in enumerate(frames):
            loss.look(number, frame)
        (warned,) = loss.warnings(("red",))
        assert (warned.kind, warned.frame) == ("crop", 0)
        assert warned.said.startswith("100% of the person in red is cut off by the crop in frame 0")
        assert loss.warnings(()) == loss.warnings(("green",)) == ()


def test_a_matte_loses_as_a_colour_does_and_who_is_inside_nothing():
    matte = (scene(3, blue=still(left=66)) > 0).any(-1, keepdim=True) * torch.full((3,), 255)
    loss = Loss((HEIGHT, WIDTH), (256, 256), 3)
    loss.look(0, matte[0].to(torch.uint8))
    assert loss.warnings(("blue",))[0].said.startswith("75% of the person in blue")
    inside = Loss((HEIGHT, WIDTH), (256, 256), 3)
    inside.look(0, scene(1, blue=still(left=200))[0])
    assert inside.warnings(("blue",)) == ()


def test_tracks_measure_boxes_areas_and_overlaps():
    masks = scene(3, blue=lambda n: (50 + 10 * n, 60, 120), red=still(300))
    got = track(masks, ("blue", "red"))
    assert got.boxes[:, 0].tolist() == [[50.0 + 10 * n, 60, 90 + 10 * n, 180] for n in range(3)]
    assert (got.areas == 4800).all()
    assert np.allclose(got.overlaps[1], [[30 / 50, 0], [0, 1]])
    assert not got.overlaps[0].any()
    speck = scene(1, blue=still(tall=9))
    assert not track(speck, ("blue",)).is_seen.any()
