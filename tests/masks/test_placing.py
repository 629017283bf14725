"""Framing: how large a drawn person becomes in the clip, and where its feet are."""

import dataclasses

import numpy as np
import pytest
import torch

from engine.masks.colours import BLACK, BLUE, CLASSES, WHITE, paint
from engine.masks.cutting import cut_out, moved
from engine.masks.framed import Shown, frame_persons, move_motion, other_shape
from engine.masks.placing import Body, Placement, placement
from engine.masks.tracks import box_of, track
from tests.support.mask_scenes import drawn_person

SIZE = (512, 896)


def body(box, height, joints=None):
    return Body(np.array(box, float), height, joints)


def joints(neck=(50, 40), hips=((45, 80), (55, 80)), shoulders=((40, 40), (60, 40)), **others):
    """Joints [1, 18, 2] of somebody of whom the rest is not seen."""
    found = np.full((1, 18, 2), np.nan)
    places = {"nose": 0, "neck": 1, "right": 2, "left": 5, "hip": 8, "other hip": 11} | {
        "knee": 9, "other knee": 12, "ankle": 10, "other ankle": 13
    }  # fmt: skip
    seen = {"neck": neck, "hip": hips and hips[0], "other hip": hips and hips[1]}
    seen |= {"right": shoulders and shoulders[0], "left": shoulders and shoulders[1]} | others
    for name, point in seen.items():
        if point is not None:
            found[0, places[name]] = point
    return found


def picture_of(height, width, tall, foot, across):
    """A picture, and its mask, of somebody `tall` pixels high with the feet at `foot`."""
    mask = drawn_person(height, width, tall, foot, across)
    picture = np.full((height, width, 3), 250, np.uint8)
    picture[mask] = (180, 40, 40)
    return torch.from_numpy(picture), torch.from_numpy(np.where(mask, BLUE, BLACK).astype(np.uint8))


def motion(tall, foot, across, frames=3, size=SIZE):
    mask = drawn_person(*size, tall, foot, across)
    numbers = torch.from_numpy(np.where(mask, BLUE, WHITE).astype(np.uint8))
    return paint(numbers)[None].repeat(frames, 1, 1, 1)


def shown(picture, numbers, masks, persons=("blue",)):
    return Shown(picture, numbers, torch.zeros_like(masks), masks, track(masks, persons))


def seen(cut):
    return box_of((cut.numbers == BLUE).numpy())


@pytest.mark.parametrize(
    ("scale", "foot", "across"),
    [(0.3, 470, 300), (0.45, 505, 448), (0.7, 401, 700), (1.0, 433, 200), (1.37, 500, 600),
     (2.0, 390, 448), (3.0, 505, 150), (3.0, 401, 700)],
)  # fmt: skip
def test_a_person_of_any_size_gets_the_height_and_the_feet_of_the_driver(scale, foot, across):
    tall = 330
    own = round(tall / scale)
    picture, numbers = picture_of(own + 150, own + 200, own, own + 77, own // 2 + 60)
    masks = motion(tall, foot, across)
    found = frame_persons(shown(picture, numbers, masks), "replacement", "auto")
    driver, person = box_of((masks[0] == 0).any(-1).numpy()), box_of((numbers == BLUE).numpy())
    (standing,) = found.standing
    exact = (driver[3] - driver[1]) / (person[3] - person[1])
    assert standing.scale == pytest.approx(exact)
    assert standing.foot_line == pytest.approx(driver[3])
    box = seen(found.cut)
    assert box[3] - box[1] == pytest.approx(driver[3] - driver[1], rel=0.01)
    assert abs(box[3] - driver[3]) <= 1
    assert abs(box[0] + box[2] - driver[0] - driver[2]) / 2 <= 1
    image = ((found.cut.image + 1) * 127.5).round()
    inner = found.cut.numbers == BLUE
    assert image[:, ~inner].max() == 0
    there = image[:, inner]
    assert (there[0].eq(180) & there[1].eq(40)).float().mean() > 0.8  # the rest is its edge
    assert there.max() < 200  # and no white is left of what was behind


@pytest.mark.parametrize(("tall", "help_"), [(400, 1.0), (154, 1.0), (140, 153.6 / 140), (90, 1.2)])
def test_small_persons_are_enlarged_within_the_range_that_was_measured(tall, help_):
    found = placement(body((0, 500 - tall, 50, 500), 512), body((0, 100, 60, 300), 400))
    assert found.scale == pytest.approx(tall / 200 * help_)
    assert found.scale * 300 + found.top == pytest.approx(500)
    assert (found.scale * 30 + found.left, found.by) == (pytest.approx(25), "height")


def test_cut_legs_are_told_by_the_torso_and_the_necks_meet():
    person = body((20, 10, 80, 120), 120, joints())
    driver = body((100, 100, 300, 500), 512, joints(neck=(200, 150), hips=((190, 250), (210, 250))))
    found = placement(driver, person)
    assert (found.scale, found.by) == (pytest.approx(100 / 40), "torso")
    assert found.scale * np.array([50, 40]) + [found.left, found.top] == pytest.approx([200, 150])


def test_the_torso_is_the_largest_of_8_frames_and_hips_unseen_leave_shoulders_and_head():
    person = body((20, 0, 80, 120), 120, joints())
    many = np.concatenate([joints(hips=((45, 60 + 5 * n), (55, 60 + 5 * n))) for n in range(12)])
    assert placement(body((0, 0, 9, 99), 512, many), person).scale == pytest.approx(55 / 40)
    wide = joints(hips=None, shoulders=((30, 40), (70, 40)))
    found = placement(body((0, 0, 9, 99), 512, wide), person)
    assert (found.scale, found.by) == (pytest.approx(2.0), "shoulders")
    head = joints(hips=None, shoulders=None, nose=(50, 20))
    found = placement(body((0, 0, 9, 400), 512, head), dataclasses.replace(person, joints=head))
    assert found.by == "head"


def test_a_driver_who_crouches_is_measured_by_limbs():
    def person(shrink, at=0.0):  # the knees bend sideways, so that limbs keep their lengths
        reach = 60 * shrink
        side = np.sqrt(60**2 - reach**2)
        legs = {}
        for name, x in (("", 45), ("other ", 55)):
            legs[f"{name}knee"] = (x + side, at + 80 + reach)
            legs[f"{name}ankle"] = (x, at + 80 + 2 * reach)
        return joints((50, at + 40), ((45, at + 80), (55, at + 80)), nose=(50, at + 20), **legs)

    standing = body((20, 10, 80, 210), 300, person(1.0))
    crouched = np.concatenate([person(0.2, 96), *[person(1.0)] * 7])
    found = placement(body((20, 106, 120, 210), 512, crouched), standing)
    assert (found.by, found.scale) == ("limbs", pytest.approx(1.0))
    assert placement(body((20, 10, 80, 210), 512, person(1.0)), standing).by == "height"


def test_without_joints_cut_legs_leave_the_picture_as_it_is_and_say_so():
    picture, numbers = picture_of(400, 300, 500, 600, 150)  # the picture ends at the knees
    found = frame_persons(shown(picture, numbers, motion(300, 480, 400)), "replacement", "auto")
    assert [one.kind for one in found.warned] == ["legs", "enlarged", "crop"]
    assert "has no feet in the picture, and has them in frame 0 of the video" in (
        found.warned[0].said
    )
    assert found.standing[0].scale == pytest.approx(896 / 300, rel=1e-3)


def test_somebody_who_comes_in_is_measured_when_the_frame_has_all_of_him():
    masks = torch.cat([
        torch.full((2, *SIZE, 3), 255, dtype=torch.uint8),
        motion(300, 480, 0, 1), motion(300, 480, 400, 1),
    ])  # fmt: skip
    picture, numbers = picture_of(400, 300, 200, 300, 150)
    found = frame_persons(shown(picture, numbers, masks), "replacement", "auto")
    assert found.standing[0].frame == 3


def test_each_of_several_goes_to_its_partner_and_near_ones_cover_far_ones():
    near, far = drawn_person(*SIZE, 380, 500, 420), drawn_person(*SIZE, 220, 420, 500)
    numbers = np.full(SIZE, WHITE, np.uint8)
    numbers[far], numbers[near] = CLASSES["red"], BLUE
    masks = paint(torch.from_numpy(numbers))[None]
    one, other = drawn_person(600, 800, 300, 500, 200), drawn_person(600, 800, 300, 500, 600)
    held = np.where(one, BLUE, np.where(other, CLASSES["red"], BLACK)).astype(np.uint8)
    picture = torch.zeros(600, 800, 3, dtype=torch.uint8)
    picture[torch.from_numpy(one)], picture[torch.from_numpy(other)] = 100, 200
    found = frame_persons(
        shown(picture, torch.from_numpy(held), masks, ("blue", "red")), "replacement", "auto"
    )
    assert [standing.person for standing in found.standing] == ["red", "blue"]
    box = seen(found.cut)
    assert (box[1], box[3]) == (pytest.approx(120, abs=2), pytest.approx(500, abs=1))
    both = near & far
    assert both.sum() > 500
    covered = found.cut.numbers.numpy()[both]
    assert (covered == BLUE).mean() > 0.95


def test_in_animation_sizes_are_measured_and_told_and_nothing_moves():
    picture, numbers = picture_of(512, 896, 200, 480, 300)
    found = frame_persons(shown(picture, numbers, motion(400, 500, 448)), "animation", "auto")
    assert (found.cut, found.motion) == (None, None)
    (warned,) = found.warned
    assert (warned.kind, warned.frame) == ("size", 0)
    assert "200 pixels high in the picture and 400 in frame 0 of the video, 0.50 times" in (
        warned.said
    )
    near = frame_persons(shown(picture, numbers, motion(230, 500, 448)), "animation", "auto")
    assert near.warned == ()  # 0.87
    replaced = frame_persons(shown(picture, numbers, motion(400, 500, 448)), "replacement", "as-is")
    assert "--framing auto places it" in replaced.warned[0].said


@pytest.mark.parametrize("tall", [250, 440])
def test_the_motion_can_be_moved_to_where_the_picture_has_the_person(tall):
    picture, numbers = picture_of(512, 896, 320, 470, 300)
    masks = paint((motion(tall, 500, 448)[..., 0] == 0).to(torch.uint8) * BLUE)
    frames = (masks > 0) * torch.tensor([0, 0, 200], dtype=torch.uint8)
    held = Shown(picture, numbers, frames, masks, track(masks, ("blue",)))
    found = frame_persons(held, "animation", "driving")
    move_motion(frames, masks, found.motion)
    box = box_of((masks[1] > 0).any(-1).numpy())
    assert box[3] == pytest.approx(470, abs=1)
    assert box[3] - box[1] == pytest.approx(320, rel=0.01)
    assert (box[0] + box[2]) / 2 == pytest.approx(300, abs=1.5)
    outside = frames[1][(masks[1] == 0).all(-1)]
    assert (outside > 0).float().mean() < 0.01  # the edge of the person


def test_a_picture_without_a_person_of_the_motion_is_left_alone():
    picture, numbers = picture_of(400, 300, 200, 300, 150)
    masks = motion(300, 480, 400)
    empty = torch.full_like(numbers, BLUE)  # the whole picture is taken as person 1
    assert frame_persons(shown(picture, empty, masks), "replacement", "auto").standing == ()
    assert frame_persons(shown(picture, numbers, masks, ()), "replacement", "auto").cut is None


def test_pictures_of_another_shape_than_the_video_are_told():
    assert other_shape((1280, 720), (720, 1280))[0].kind == "shape"
    assert other_shape((768, 1024), (720, 1280)) == ()


@pytest.mark.parametrize("scale", [0.11, 0.3, 0.9, 1.0, 2.5])
def test_a_mark_is_where_the_affine_puts_it_to_a_part_of_a_pixel(scale):
    side, middle = round(200 / scale), 90.7
    picture = torch.zeros(side, side, 3, dtype=torch.uint8)
    spread = max(3, round(6 / scale))
    rows, columns = np.ogrid[:side, :side]
    centre = round(side * 0.45)
    blob = 255 * np.exp(-((rows + 0.5 - centre) ** 2 + (columns + 0.5 - centre) ** 2) / spread**2)
    picture[:] = torch.from_numpy(blob.round()).to(torch.uint8)[..., None]
    place = Placement(scale, middle - scale * centre, middle - scale * centre, "height")
    got = moved(picture, place, (200, 200))[..., 0].double().numpy()
    places = np.arange(200) + 0.5
    assert (got.sum(0) * places).sum() / got.sum() == pytest.approx(middle, abs=0.1)
    assert (got.sum(1) * places).sum() / got.sum() == pytest.approx(middle, abs=0.1)


def test_who_is_not_placed_is_not_in_the_clip():
    picture, numbers = picture_of(300, 300, 200, 280, 150)
    cut = cut_out(picture, numbers, [], SIZE)
    assert not cut.numbers.any()
    assert cut.image.eq(-1).all()
