"""The sample picture and the sample dance: what is shipped, and that a body could do it."""

import numpy as np
import pytest
from PIL import Image

from benchmarks.nano import dancer
from benchmarks.nano.dance import (
    BEATS_PER_MINUTE,
    DISTANCE,
    FLOOR,
    SOLE,
    BodyProportions,
    dance,
    standing,
)
from benchmarks.nano.drawing import Look, draw_dancer, random_look
from engine.errors import BadMedia, BadRequest
from engine.pose.camera import base_camera

PARENTS = [0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19, 20, 21]
SEEDS = range(6)
FEET, ANKLES = [10, 11], [7, 8]


@pytest.fixture(scope="module")
def dances():
    """[seed, T, 24, 3] mm; every other one danced by another body."""
    bodies = [None, BodyProportions(trunk=0.9, arms=1.1, legs=1.1, shoulders=0.9, hips=1.1)]
    return np.stack([dance(65, 16.0, seed, bodies[seed % 2])[:, 0] for seed in SEEDS]).astype(float)


def unit(vector):
    return vector / np.linalg.norm(vector, axis=-1, keepdims=True)


def bend_degrees(joints, root, middle, end):
    """The angle inside a joint: 180 is straight."""
    first, second = (unit(joints[..., i, :] - joints[..., middle, :]) for i in (root, end))
    return np.degrees(np.arccos((first * second).sum(-1)))


def bulge(joints, root, middle, end, towards):
    """The distance (mm) of the middle joint from the line from root to end, in a direction."""
    start, line = joints[..., root, :], unit(joints[..., end, :] - joints[..., root, :])
    gap = joints[..., middle, :] - start
    return ((gap - line * (gap * line).sum(-1, keepdims=True)) * towards).sum(-1)


def frame(left, up):
    """Unit vectors left, up, front [3, ..., 3] of a part of the body."""
    up = unit(up)
    left = unit(left - up * (left * up).sum(-1, keepdims=True))
    return np.stack([left, up, np.cross(left, up)])


def test_the_shipped_dance_is_what_the_code_makes():
    with np.load(dancer.DANCE) as shipped:
        assert sorted(shipped) == ["fps", "height", "joints", "width"]
        assert (shipped["fps"], shipped["height"], shipped["width"]) == (16.0, 896, 512)
        assert shipped["joints"].shape == (65, 1, 24, 3)
        assert shipped["joints"].dtype == np.float32
        want = dance(dancer.FRAMES, dancer.FPS, dancer.SEED)
        assert np.abs(shipped["joints"] - want).max() <= 1e-3


def test_the_shipped_picture_is_what_the_code_draws():
    with Image.open(dancer.PICTURE) as image:
        shipped = np.asarray(image.convert("RGB")).astype(int)
    want = draw_dancer(standing(), 896, 512, Look()).astype(int)
    assert shipped.shape == (896, 512, 3)
    assert np.abs(shipped - want).max() <= 2
    assert dancer.PICTURE.stat().st_size < 150_000


def test_main_writes_both_assets(tmp_path):
    dancer.main(["--out", str(tmp_path)])
    with np.load(tmp_path / "dance.npz") as made, np.load(dancer.DANCE) as shipped:
        assert all(np.allclose(made[name], shipped[name], atol=1e-3) for name in shipped)
    with Image.open(tmp_path / "dancer.png") as made, Image.open(dancer.PICTURE) as shipped:
        assert np.abs(np.asarray(made).astype(int) - np.asarray(shipped)).max() <= 2


def test_bones_keep_their_lengths(dances):
    lengths = np.linalg.norm(dances - dances[..., PARENTS, :], axis=-1)[..., 1:]
    assert np.ptp(lengths, axis=1).max() < 1e-3 * lengths.min()
    assert lengths.min() > 50
    thigh, shin = lengths[0, 0, 3], lengths[0, 0, 6]
    assert (round(thigh), round(shin)) == (395, 405)


def test_knees_bend_forward_and_never_lock(dances):
    front = frame(dances[..., 1, :] - dances[..., 2, :], dances[..., 3, :] - dances[..., 0, :])[2]
    for leg in ((1, 4, 7), (2, 5, 8)):
        assert bulge(dances, *leg, front).min() > 40
        inside = bend_degrees(dances, *leg)
        assert 90 < inside.min() < inside.max() < 172


def test_elbows_bend_backward_and_never_lock(dances):
    left, up, front = frame(
        dances[..., 16, :] - dances[..., 17, :], dances[..., 12, :] - dances[..., 9, :]
    )
    for side, arm in ((1, (16, 18, 20)), (-1, (17, 19, 21))):
        towards = unit(0.5 * side * left - 0.5 * up - 0.7 * front)
        assert bulge(dances, *arm, towards).min() > 30
        inside = bend_degrees(dances, *arm)
        assert 40 < inside.min() < inside.max() < 172


def test_every_joint_is_in_the_picture_in_every_frame(dances):
    camera = base_camera(896, 512)
    for joints in (dances, standing()):
        x = camera.fx * joints[..., 0] / joints[..., 2] + camera.cx
        y = camera.fy * joints[..., 1] / joints[..., 2] + camera.cy
        assert 16 < x.min() < x.max() < 512 - 16
        assert 60 < y.min() < y.max() < 896 - 60


def test_feet_stand_on_the_floor_and_not_below(dances):
    toes = dances[..., FEET, 1]
    assert dances[..., 1].max() <= FLOOR + 10
    assert toes.max() == pytest.approx(FLOOR - 24, abs=0.01)
    assert (toes.max(axis=-1) > FLOOR - 40).mean() > 0.95  # nobody flies


def test_a_foot_on_the_floor_does_not_slide(dances):
    ankles = dances[..., ANKLES, :]
    low = np.abs(ankles[..., 1] - (FLOOR - SOLE)) < 0.01
    planted = low[:, 1:] & low[:, :-1]
    moved = np.linalg.norm(np.diff(ankles, axis=1), axis=-1)
    assert planted.mean() > 0.2
    assert moved[planted].max() < 2.0


def test_every_foot_steps_on_its_beats(dances):
    lift = FLOOR - SOLE - dances[..., ANKLES, 1]
    beat = np.arange(65) / 16 * BEATS_PER_MINUTE / 60
    middle = np.abs(beat % 1 - 0.525) < 0.06  # where a swing is highest
    left_steps = (beat.astype(int) % 2 == 0)[middle]
    assert ((lift[:, middle, 0] > 60) == left_steps).all()
    assert ((lift[:, middle, 1] > 60) == ~left_steps).all()


def test_nothing_jumps(dances):
    assert np.isfinite(dances).all()
    speed = np.linalg.norm(np.diff(dances, axis=1), axis=-1) * 16 / 1000
    acceleration = np.linalg.norm(np.diff(dances, 2, axis=1), axis=-1) * 16**2 / 1000
    assert speed.max() < 6  # m/s: a quick hand
    assert acceleration.max() < 65  # m/s2; one joint thrown 0.25 m in one frame is more
    assert acceleration[..., [0, 3, 6, 9, 12]].max() < 10  # the trunk is calm


def test_the_body_turns_once_and_comes_back_to_the_camera(dances):
    across = dances[..., 1, :] - dances[..., 2, :]
    yaw = np.unwrap(np.arctan2(-across[..., 2], across[..., 0]), axis=-1)
    turns = (yaw[:, -1] - yaw[:, 0]) / (2 * np.pi)
    assert np.abs(np.abs(turns) - 1).max() < 0.1
    assert np.abs(np.diff(yaw)).max() < np.radians(30)  # slow: no frame turns further


def test_the_dance_is_the_same_at_another_frame_rate():
    slow, fast = dance(33, 8.0, 3), dance(65, 16.0, 3)
    assert np.abs(fast[::2] - slow).max() < 5  # mm; the depth of the knees may see other frames


def test_another_seed_is_another_dance_and_the_same_seed_the_same(dances):
    for first in SEEDS:
        for second in range(first):
            gap = np.linalg.norm(dances[first] - dances[second], axis=-1)[:, [20, 21]]
            assert gap.mean() > 100  # mm between the wrists of two dances
    assert np.array_equal(dance(65, 16.0, 4), dance(65, 16.0, 4))


@pytest.mark.parametrize(("frames", "fps"), [(1, 16.0), (2, 30.0), (17, 24.0)])
def test_a_short_dance_begins_like_a_long_one_stands(frames, fps):
    joints = dance(frames, fps, 0)[:, 0]
    assert joints.shape == (frames, 24, 3)
    assert joints[0, FEET, 1] == pytest.approx(FLOOR - 24, abs=0.01)
    assert joints[0, 0, 2] == pytest.approx(DISTANCE, abs=60)


@pytest.mark.parametrize(
    ("frames", "fps"), [(0, 16.0), (-3, 16.0), (5, 0.0), (5, -1.0), (5, np.nan), (5, np.inf)]
)
def test_a_dance_of_nothing_is_refused(frames, fps):
    with pytest.raises(BadRequest, match=f"{frames} frames at {fps} fps"):
        dance(frames, fps, 0)


def test_the_standing_pose_is_no_frame_of_the_dance(dances):
    gap = np.linalg.norm(dances[0] - standing(), axis=-1)
    assert gap.max(axis=-1).min() > 150


def test_what_is_drawn_lies_where_the_joints_are():
    """Trousers at the knees, skin at the forearms, top at the chest, the wall beside them."""
    look, joints = Look(), standing()
    picture = draw_dancer(joints, 896, 512, look).astype(int)
    camera = base_camera(896, 512)

    def colour(point):
        x = int(camera.fx * point[0] / point[2] + camera.cx)
        y = int(camera.fy * point[1] / point[2] + camera.cy)
        return picture[y, x]

    assert np.abs(colour(joints[4]) - look.trousers).max() < 40
    assert np.abs(colour(joints[5]) - look.trousers).max() < 40
    assert np.abs(colour((joints[18] + joints[20]) / 2) - look.skin).max() < 40
    assert np.abs(colour(joints[6]) - look.top).max() < 40
    assert np.abs(picture[5, 5] - look.wall).max() < 20


def test_a_back_has_no_face_and_a_front_has_one():
    look = Look()
    front = standing()
    back = front * (-1, 1, -1) + (0, 0, 2 * DISTANCE)  # turned half round
    seen = [
        np.abs(draw_dancer(joints, 448, 256, look).astype(int) - look.skin).max(-1) < 12
        for joints in (front, back)
    ]
    head = slice(120, 160)
    assert seen[0][head, 110:146].sum() > 100
    assert seen[1][head, 110:146].sum() < 0.4 * seen[0][head, 110:146].sum()


def test_random_looks_differ_and_can_all_be_drawn(dances):
    looks = [random_look(np.random.default_rng(seed)) for seed in range(8)]
    assert len(set(looks)) == 8
    assert len({look.style for look in looks}) >= 3
    assert random_look(np.random.default_rng(3)) == looks[3]
    for number, look in enumerate(looks):
        picture = draw_dancer(dances[0, 8 * number], 224, 128, look)
        assert picture.shape == (224, 128, 3)
        assert picture.std() > 10
        colours = (look.skin, look.hair, look.top, look.trousers, look.shoes)
        assert all(0 <= value <= 255 for colour in colours for value in colour)


@pytest.mark.parametrize(("height", "width"), [(97, 63), (64, 128), (33, 33)])
def test_odd_canvases_are_filled(height, width):
    picture = draw_dancer(standing(), height, width, Look())
    assert picture.shape == (height, width, 3)
    assert picture.min() < 120 < picture.max()


def test_a_person_out_of_the_picture_leaves_the_room():
    away = draw_dancer(standing() + np.array([9000, 0, 0]), 224, 128, Look())
    again = draw_dancer(standing() - np.array([9000, 0, 0]), 224, 128, Look())
    assert np.array_equal(away[:100], again[:100])


@pytest.mark.parametrize(
    "joints",
    [
        np.zeros((24, 3)),
        np.zeros((23, 3)),
        np.zeros((1, 24, 3)),
        np.full((24, 3), np.nan),
        standing() * (1, 1, -1),
    ],
)
def test_joints_that_are_no_person_are_refused(joints):
    with pytest.raises(BadMedia, match="cannot be drawn"):
        draw_dancer(joints, 64, 64, Look())
