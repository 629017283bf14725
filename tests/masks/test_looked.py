"""Framing by joints: a stand-in detector answers from the drawn persons' own joints."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.errors import Cancelled, MissingModel
from engine.flow import go_on
from engine.masks.colours import BLACK, BLUE, CLASSES, WHITE, paint
from engine.masks.framed import Shown, frame_persons
from engine.masks.looked import Looked, joints_of, masks_of
from engine.masks.tracks import box_of, track
from tests.support.drawn_joints import NOBODY, Drawn, detected, points
from tests.support.mask_scenes import drawn_person

SIZE = (512, 896)
KNEE = 235  # rows below the top of a drawn person 300 high


def without_networks(frames):
    raise MissingModel("No 2D keypoint networks: put a.onnx into models.")


def scene(picture_masks, motion_masks, persons=("blue",)):
    """Masks [h, w] of the picture's persons, and of each frame's -> what is framed."""
    held = np.full(picture_masks[0].shape, BLACK, np.uint8)
    for mask, colour in zip(picture_masks, persons, strict=True):
        held[mask] = CLASSES[colour]
    picture = np.full((*held.shape, 3), 200, np.uint8)
    picture[0, 0] = 255
    frames = torch.zeros(len(motion_masks), *SIZE, 3, dtype=torch.uint8)
    numbers = np.full((len(motion_masks), *SIZE), WHITE, np.uint8)
    for frame, masks in enumerate(motion_masks):
        frames[frame, 0, 0] = frame
        for mask, colour in zip(masks, persons, strict=True):
            numbers[frame][mask] = CLASSES[colour]
    masks = torch.stack([paint(one) for one in torch.from_numpy(numbers)])
    tracks = track(masks, persons)
    return Shown(torch.from_numpy(picture), torch.from_numpy(held), frames, masks, tracks)


def drawn(own, driver, frames=1, height=None, hidden=(), hidden_driver=()):
    """A picture of `own` (tall, foot, across) that ends at `height`, a motion that stands at
    `driver`, and the detector of both.
    """
    height = own[1] + 40 if height is None else height
    width = 2 * own[2]
    shown = scene([drawn_person(height, width, *own)], [[drawn_person(*SIZE, *driver)]] * frames)
    still = detected(*SIZE, points(*driver, hidden_driver))
    return shown, Drawn(detected(height, width, points(*own, hidden)), *[still] * frames)


@pytest.mark.parametrize("scale", [0.3, 0.45, 0.7, 1.0, 1.37, 2.0, 3.0])
@pytest.mark.parametrize("cut", ["picture", "motion", "both"])
def test_somebody_with_cut_legs_gets_the_height_of_the_driver(scale, cut):
    tall, foot, across = 330, 470 if cut == "picture" else 570, 400
    own = round(tall / scale)
    unit, top = own / 300, 30
    ends = None if cut == "motion" else top + round(KNEE * unit)
    shown, look = drawn((own, top + own, own // 2), (tall, foot, across), height=ends)
    found = frame_persons(shown, "replacement", "auto", look)
    (standing,) = found.standing
    assert standing.scale == pytest.approx(tall / own, rel=1e-5)
    # the neck of the picture is at the driver's
    wanted_top = foot - tall
    assert standing.scale * (top + 60 * unit) + standing.top == pytest.approx(
        wanted_top + 60 * tall / 300, abs=0.01
    )
    person = box_of((shown.numbers == BLUE).numpy())
    low = min(standing.foot_line, SIZE[0])
    assert standing.foot_line == pytest.approx(standing.scale * person[3] + standing.top)
    box = box_of((found.cut.numbers == BLUE).numpy())
    assert box[3] - box[1] == pytest.approx(low - wanted_top, rel=0.01, abs=1)
    assert abs(box[3] - low) <= 1
    kinds = {one.kind for one in found.warned}
    assert ("legs" in kinds) == (cut != "both")  # in one only: what is not shown is made up
    if cut != "both":
        assert "what is not shown is made up" in found.warned[0].said
    assert look.asked == [255, 0]


def test_no_detector_is_asked_where_both_stand_on_their_feet():
    shown, look = drawn((300, 340, 200), (330, 470, 400))
    before = frame_persons(shown, "replacement", "auto")
    found = frame_persons(shown, "replacement", "auto", look)
    assert (look.asked, found.standing, found.warned) == ([], before.standing, before.warned)


def test_8_frames_are_looked_at_for_a_torso_and_the_largest_counts():
    own = (300, 330, 200)
    height, width = 30 + KNEE, 700
    driver = [points(300, 570, 400) for _ in range(20)]
    for frame, longer in ((5, 1.25), (9, 1.5)):  # the second comes too late
        joints, seen = points(300, 570, 400)
        joints[[8, 11], 1] = joints[1, 1] + longer * (joints[8, 1] - joints[1, 1])
        driver[frame] = joints.clip(0, 511), seen
    mask = drawn_person(*SIZE, 300, 570, 400)
    shown = scene([drawn_person(height, width, *own)], [[mask]] * 20)
    look = Drawn(detected(height, width, points(*own)), *[detected(*SIZE, each) for each in driver])
    found = frame_persons(shown, "replacement", "auto", look)
    assert look.asked == [255, *range(8)]
    assert found.standing[0].scale == pytest.approx(1.25, rel=1e-5)


def crouching(unit, foot, across):
    """The mask and joints of somebody who squats, the knees bent sideways: limbs keep lengths."""
    joints, seen = points(300 * unit, foot, across)
    reach = 15.0
    side = np.sqrt([67**2 - reach**2, 55**2 - reach**2])  # thigh and shin; ankles stay below
    for hip, knee, ankle, way in ((8, 9, 10, -1), (11, 12, 13, 1)):
        joints[knee] = joints[hip] + unit * np.array([way * side[0], reach])
        joints[ankle] = joints[knee] + unit * np.array([-way * side[1], reach])
    lower = foot - 10 * unit - joints[10, 1]
    joints[:, 1] += lower
    mask = np.zeros(SIZE, bool)
    top = round(joints[0, 1] - 30 * unit)
    mask[top:foot, round(across - 45 * unit) : round(across + 45 * unit)] = True
    knees = joints[[9, 12]].round().astype(int)
    mask[knees[0, 1] - 10 : foot, knees[0, 0] - 5 : knees[1, 0] + 6] = True
    return mask, (joints, seen)


@pytest.mark.parametrize("scale", [0.3, 0.7, 1.0, 2.0, 3.0])
def test_a_driver_who_crouches_at_first_keeps_its_standing_size(scale):
    unit, foot = 1.1, 480
    own = round(330 / scale)
    mask, low = crouching(unit, foot, 448)
    up, standing = drawn_person(*SIZE, 330, foot, 448), points(330, foot, 448)
    height, width, across = own + 100, own, own // 2
    person = drawn_person(height, width, own, own + 50, across)
    shown = scene([person], [[mask], *[[up]] * 15])
    look = Drawn(
        detected(height, width, points(own, own + 50, across)), detected(*SIZE, low),
        *[detected(*SIZE, standing)] * 15,
    )  # fmt: skip
    found = frame_persons(shown, "replacement", "auto", look)
    assert look.asked == [255, *range(16)]
    assert found.standing[0].scale == pytest.approx(330 / own, rel=1e-3)
    assert found.standing[0].foot_line == pytest.approx(foot, abs=1e-6)
    box = box_of((found.cut.numbers == BLUE).numpy())
    assert box[3] - box[1] == pytest.approx(330, rel=0.01)
    assert abs(box[3] - foot) <= 1
    squashed = frame_persons(shown, "replacement", "auto")
    assert squashed.standing[0].scale < 0.8 * found.standing[0].scale
    asked = len(look.asked)
    frame_persons(shown, "animation", "auto", look)  # sizes of boxes are told, and nothing moves
    assert len(look.asked) == asked


def test_each_of_two_has_the_joints_that_lie_on_its_mask():
    persons = ("blue", "red")
    left, right = (330, 600, 300), (250, 560, 420)  # the frame cuts the legs of both
    masks = [drawn_person(*SIZE, *left), drawn_person(*SIZE, *right)]
    own = [(300, 330, 200), (300, 330, 500)]
    height, width = 30 + KNEE, 700
    shown = scene([drawn_person(height, width, *one) for one in own], [masks], persons)
    look = Drawn(
        detected(height, width, *(points(*one) for one in reversed(own))),
        detected(*SIZE, points(*right), points(*left)),
    )
    found = frame_persons(shown, "replacement", "auto", look)
    scales = {one.person: one.scale for one in found.standing}
    assert scales["blue"] == pytest.approx(330 / 300, rel=1e-5)
    assert scales["red"] == pytest.approx(250 / 300, rel=1e-5)
    assert look.asked == [255, 0]  # each frame once for both


def test_points_outside_of_the_picture_are_unseen_and_strangers_are_nobody():
    height, width = 30 + KNEE, 700
    mask = drawn_person(height, width, 300, 330, 200)
    found = joints_of(detected(height, width, points(300, 330, 200)), mask)
    assert np.flatnonzero(np.isnan(found[:, 0])).tolist() == [9, 10, 12, 13]  # 265 is out
    assert found[1] == pytest.approx([200, 90], abs=1e-4)
    assert np.isnan(joints_of(detected(height, width, points(300, 330, 500)), mask)).all()
    own, box = detected(height, width, points(300, 330, 200)), box_of(mask)
    beside = replace(detected(height, width, points(300, 330, 280)), boxes=box[None])
    assert np.isnan(joints_of(beside, mask)).all()  # the box fits, and the points do not
    large = np.array([[0, 0, width, height]], np.float32)  # the points fit, and the box does not
    assert np.isnan(joints_of(replace(own, boxes=large), mask)).all()
    assert np.isnan(joints_of(NOBODY, mask)).all()
    assert np.isnan(joints_of(own, np.zeros_like(mask))).all()


def test_who_comes_later_is_looked_at_from_where_all_of_him_is_seen():
    nobody, there = np.zeros(SIZE, bool), drawn_person(*SIZE, 330, 570, 400)
    own, height = (300, 330, 200), 30 + KNEE
    shown = scene([drawn_person(height, 700, *own)], [[nobody]] * 3 + [[there]] * 9)
    still = detected(*SIZE, points(330, 570, 400))
    look = Drawn(detected(height, 700, points(*own)), *[NOBODY] * 3, *[still] * 9)
    found = frame_persons(shown, "replacement", "auto", look)
    assert look.asked == [255, *range(3, 11)]
    assert found.standing[0].scale == pytest.approx(1.1, rel=1e-5)


def test_a_driver_whose_box_grows_may_stand_up_and_is_looked_at():
    own = (300, 350, 300)
    low, up = drawn_person(*SIZE, 250, 470, 400), drawn_person(*SIZE, 280, 470, 400)
    person, driver = detected(400, 600, points(*own)), detected(*SIZE, points(250, 470, 400))
    for after, asked in ((low, []), (up, [255, *range(16)])):
        look = Drawn(person, *[driver] * 20)
        shown = scene([drawn_person(400, 600, *own)], [[low]] * 5 + [[after]] * 15)
        frame_persons(shown, "replacement", "auto", look)
        assert look.asked == asked


def test_missing_networks_are_named_by_the_warning_of_missing_legs_alone():
    shown, _ = drawn((300, 330, 200), (330, 470, 400), height=30 + KNEE)
    found = frame_persons(shown, "replacement", "auto", without_networks)
    assert found.warned[0].kind == "legs"
    assert found.warned[0].said.endswith(
        "Joints would tell. No 2D keypoint networks: put a.onnx into models."
    )
    assert found.standing == frame_persons(shown, "replacement", "auto").standing
    mask, _ = crouching(1.1, 480, 448)
    broad = scene([drawn_person(400, 600, 300, 350, 300)], [[mask]])
    want = frame_persons(broad, "replacement", "auto")
    assert frame_persons(broad, "replacement", "auto", without_networks).warned == want.warned


def test_nobody_found_changes_no_size_that_boxes_tell():
    mask, _ = crouching(1.1, 480, 448)
    shown = scene([drawn_person(400, 600, 300, 350, 300)], [[mask]])
    want = frame_persons(shown, "replacement", "auto")
    look = Drawn(NOBODY)
    found = frame_persons(shown, "replacement", "auto", look)
    assert (found.standing, found.warned) == (want.standing, want.warned)
    assert look.asked == [255]  # and the motion is not looked at
    person = detected(400, 600, points(300, 350, 300))
    found = frame_persons(shown, "replacement", "auto", Drawn(person, NOBODY))
    assert (found.standing, found.warned) == (want.standing, want.warned)


def test_ankles_that_are_hidden_above_the_edge_count_as_cut_legs():
    """Somebody behind a table: its mask ends there."""
    mask = drawn_person(*SIZE, 330, 470, 400)
    mask[140 + 200 :] = False
    own = (300, 350, 300)
    shown = scene([drawn_person(400, 600, *own)], [[mask]])
    look = Drawn(
        detected(400, 600, points(*own)),
        detected(*SIZE, points(330, 470, 400, [9, 10, 12, 13])),
    )
    found = frame_persons(shown, "replacement", "auto", look)
    assert found.standing[0].scale == pytest.approx(1.1, rel=1e-5)
    assert [one.kind for one in found.warned] == ["legs"]


@pytest.mark.parametrize(("hidden", "told"), [((), 0), ([14], 0), ([14, 15], 1), ([0], 1)])
def test_a_picture_without_a_face_is_told(hidden, told):
    shown, look = drawn((300, 330, 200), (330, 570, 400), height=30 + KNEE, hidden=hidden)
    found = frame_persons(shown, "animation", "auto", look)
    faces = [one.said for one in found.warned if one.kind == "face"]
    assert len(faces) == told
    if told:
        assert faces[0].startswith("No face is seen of the person in blue in the picture")


def test_looking_can_be_called_off():
    shown, look = drawn((300, 330, 200), (330, 570, 400), frames=3)

    def check():
        if len(look.asked) == 2:
            raise Cancelled("called off")

    with pytest.raises(Cancelled):
        Looked(look, shown.frames, check).joints("blue", masks_of(shown.masks))
    assert look.asked == [0, 1]
    again = Looked(look, shown.frames, go_on)
    assert again.joints("blue", masks_of(shown.masks)).shape == (3, 18, 2)
