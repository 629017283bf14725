"""The camera fit on the reference body, and the 2D points that follow it."""

import itertools
import logging
import sys
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import minimize

from engine.errors import BadMedia
from engine.pose.align import (
    LOWER,
    SMPL_OF_SLOT,
    UPPER,
    Alignment,
    Matches,
    face_scale,
    fit,
    place,
    scale_faces,
    shift,
    solve,
)
from engine.pose.camera import Camera, base_camera
from engine.pose.keypoints import Keypoints

HEIGHT, WIDTH = 512, 896
BASE = base_camera(HEIGHT, WIDTH)
MODES = ("exact", "official")


def dancer(seed=0):
    joints = np.random.default_rng(seed).normal((50, -100, 3000), 300, (24, 3))
    return joints.astype(np.float32)


def project(camera, points):
    x, y, z = np.asarray(points, np.float64).T
    return np.stack([camera.fx * x / z + camera.cx, camera.fy * y / z + camera.cy], axis=-1)


def picture(joints, camera, persons=1, hidden=()):
    """Keypoints of persons who stand where `camera` sees the joints."""
    body = np.full((persons, 18, 2), 0.5, np.float32)
    body[:, :14] = project(camera, joints[list(SMPL_OF_SLOT)]) / (WIDTH, HEIGHT)
    visible = np.ones((persons, 18), bool)
    visible[:, list(hidden)] = False
    rng = np.random.default_rng(7)
    faces = rng.uniform(0.4, 0.5, (persons, 68, 2)).astype(np.float32)
    hands = rng.uniform(0.5, 0.6, (persons, 2, 21, 2)).astype(np.float32)
    return Keypoints(body, visible, faces, hands)


def camera_of(m, s, right, down):
    return Camera(BASE.fx * m, BASE.fx * m * s, BASE.cx + right, BASE.cy + down)


def cost(camera, points, pixels, weights):
    return weights @ ((project(camera, points) - pixels) ** 2).sum(-1)


def parts(points):
    return [points.body, points.visible, points.faces, points.hands]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("body", "hidden"), [("down", ()), ("central", (9,))])
def test_a_reference_seen_through_an_allowed_camera_gives_that_camera(mode, body, hidden):
    joints, want = dancer(), camera_of(0.9, 1.05, 60, -20)
    found = fit(joints, picture(joints, want, hidden=hidden), HEIGHT, WIDTH, mode)
    assert (found.body, found.mode) == (body, mode)
    assert (found.m, found.s) == pytest.approx((0.9, 1.05), abs=1e-4)
    np.testing.assert_allclose(found.camera.matrix, want.matrix, atol=0.1)


def test_exact_is_the_default():
    joints = dancer()
    assert fit(joints, picture(joints, BASE), HEIGHT, WIDTH).mode == "exact"


@pytest.mark.parametrize("body", ["down", "central"])
@pytest.mark.parametrize("seed", range(20))
def test_no_camera_within_the_bounds_costs_less_than_the_exact_one(body, seed):
    rng = np.random.default_rng(seed)
    slots = [1, *(LOWER if body == "down" else UPPER)]
    points = dancer(seed)[[SMPL_OF_SLOT[slot] for slot in slots]]
    true = camera_of(*rng.uniform((0.5, 0.6, -90, -90), (1.7, 1.5, 90, 90)))
    pixels = project(true, points) + rng.normal(0, 10, (len(points), 2))
    weights = np.array([1] + [4] * 4 if body == "down" else [8] + [1] * 5, float)
    found = solve(Matches(points, pixels, body, True), HEIGHT, WIDTH, "exact")
    assert 0.7 - 1e-12 <= found.m <= 1.4 + 1e-12
    assert 0.8 - 1e-12 <= found.s <= 1.15 + 1e-12
    best = cost(found.camera, points, pixels, weights)
    for m, s in itertools.product(np.linspace(0.7, 1.4, 29), np.linspace(0.8, 1.15, 29)):
        trial = camera_of(m, s, 0, 0)  # the best shift of a given scale follows from the means
        shift_px = weights @ (pixels - project(trial, points)) / weights.sum()
        assert best <= cost(camera_of(m, s, *shift_px), points, pixels, weights) * (1 + 1e-9)


def test_the_reference_programs_own_words_give_the_official_camera():
    joints = dancer(3)
    rng = np.random.default_rng(3)
    reference = picture(joints, camera_of(1.2, 0.9, 30, 10))
    reference.body[:] += rng.normal(0, 0.02, reference.body.shape)
    slots = [1, 9, 10, 12, 13]
    points = joints[[SMPL_OF_SLOT[slot] for slot in slots]].astype(np.float64)
    pixels = (reference.body[0, slots] * np.float32([WIDTH, HEIGHT])).astype(np.float64)

    def objective(x):
        m, s, p, q = x
        u = BASE.fx * m * points[:, 0] / points[:, 2] + (WIDTH / 2 + p)
        v = BASE.fx * m * s * points[:, 1] / points[:, 2] + (HEIGHT / 2 + q)
        off = (pixels - np.stack([u, v], -1)) ** 2
        return np.sum(off[:1]) + np.sum(off[1:]) * 4

    bounds = [(0.7, 1.4), (0.8, 1.15), (-WIDTH, WIDTH), (-HEIGHT, HEIGHT)]
    m, s, p, q = minimize(objective, [1, 1, 0, 0], bounds=bounds).x
    found = fit(joints, reference, HEIGHT, WIDTH, "official")
    assert (found.m, found.s) == (m, s)
    assert (found.camera.cx, found.camera.cy) == (WIDTH / 2 + p, HEIGHT / 2 + q)


def test_points_in_one_column_leave_the_width_alone():
    points = np.float32([[0, y, 3000] for y in (-700, -300, 100, 500, 900)])
    pixels = project(camera_of(1, 0.9, 40, 10), points)
    found = solve(Matches(points, pixels, "down", True), HEIGHT, WIDTH, "exact")
    assert (found.m, found.s) == pytest.approx((1, 0.9))
    np.testing.assert_allclose(project(found.camera, points), pixels, atol=1e-9)


def test_points_in_one_row_keep_the_proportions():
    points = np.float32([[x, 0, 3000] for x in (-700, -300, 100, 500, 900)])
    pixels = project(camera_of(1.3, 0.9, 40, 10), points)
    found = solve(Matches(points, pixels, "down", True), HEIGHT, WIDTH, "exact")
    assert (found.m, found.s) == pytest.approx((1.3, 1))


def test_points_in_one_spot_are_only_moved():
    points = np.float32([[10, 20, 3000]] * 5)
    pixels = np.full((5, 2), 300.0)
    found = solve(Matches(points, pixels, "down", True), HEIGHT, WIDTH, "exact")
    assert (found.m, found.s) == (1, 1)
    np.testing.assert_allclose(project(found.camera, points), pixels)


def no_person(joints, reference):
    return joints, picture(joints, BASE, persons=0)


def only_the_neck(joints, reference):
    return joints, replace(reference, visible=np.arange(18)[None] == 1)


def no_joints(joints, reference):
    return np.zeros_like(joints), reference


def nan_joints(joints, reference):
    joints = np.full_like(joints, np.nan)
    joints[:, :2] = np.inf, -np.inf
    return joints, reference


def nan_reference(joints, reference):
    return joints, replace(reference, body=np.full_like(reference.body, np.nan))


def a_joint_behind_the_camera(joints, reference):
    behind = joints.copy()
    behind[SMPL_OF_SLOT[9], 2] = 0.005
    return behind, reference


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "damage",
    [no_person, only_the_neck, no_joints, nan_joints, nan_reference, a_joint_behind_the_camera],
)
def test_without_points_to_compare_the_base_camera_stays_and_says_so(caplog, mode, damage):
    joints = dancer()
    joints, reference = damage(joints, picture(joints, camera_of(0.9, 1, 50, 0)))
    with caplog.at_level(logging.WARNING):
        found = fit(joints, reference, HEIGHT, WIDTH, mode)
    assert found == Alignment(BASE, 1.0, 1.0, "none", mode, HEIGHT, WIDTH)
    assert "not aligned" in caplog.text


def test_a_hidden_neck_counts_for_the_official_mode_alone():
    joints, want = dancer(), camera_of(0.9, 1.05, 60, -20)
    reference = picture(joints, want, hidden=(1,))
    reference.body[0, 1] = -0.3  # where no neck is
    exact = fit(joints, reference, HEIGHT, WIDTH, "exact")
    np.testing.assert_allclose(exact.camera.matrix, want.matrix, atol=0.01)
    reference.body[0, 9] += 0.02  # one ankle off: the four legs still weigh the same
    exact = fit(joints, reference, HEIGHT, WIDTH, "exact")
    points = joints[[SMPL_OF_SLOT[slot] for slot in LOWER]]
    pixels = reference.body[0, list(LOWER)] * (WIDTH, HEIGHT)
    off = (project(exact.camera, points) - pixels).mean(0)
    np.testing.assert_allclose(off, 0, atol=1e-3)
    official = fit(joints, reference, HEIGHT, WIDTH, "official")
    assert abs(official.camera.cx - want.cx) > 10


def test_missing_joints_are_not_compared():
    joints, want = dancer(), camera_of(0.9, 1.05, 60, -20)
    reference = picture(joints, want)
    joints[SMPL_OF_SLOT[9]] = 0
    found = fit(joints, reference, HEIGHT, WIDTH)
    assert found.body == "central"
    np.testing.assert_allclose(found.camera.matrix, want.matrix, atol=0.01)


def test_the_exact_fit_needs_no_solver_even_where_all_edges_are_tried(monkeypatch):
    joints = dancer()
    reference = picture(joints, camera_of(2.0, 0.5, 60, -20))  # outside the bounds
    want = fit(joints, reference, HEIGHT, WIDTH)
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)  # so that importing it fails
    assert fit(joints, reference, HEIGHT, WIDTH) == want
    with pytest.raises(ImportError):
        fit(joints, reference, HEIGHT, WIDTH, "official")


def faces(points, grow=1.0):
    """Keypoints whose face is `grow` times as large about its nose tip."""
    centre = points.faces[:, 30:31]
    return replace(points, faces=((points.faces - centre) * grow + centre).astype(np.float32))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("grow", "scale"), [(1.2, 1.2), (0.5, 0.8), (4.0, 1.5)])
def test_the_face_takes_the_references_size_within_limits(mode, grow, scale):
    points = picture(dancer(), BASE)
    clip = [points, faces(points, 0.9)]
    found = face_scale(clip, faces(points, grow), mode)
    assert found == pytest.approx(scale, rel=1e-6)
    first, second = scale_faces(clip, found, mode)
    np.testing.assert_allclose(first.faces, faces(points, scale).faces, atol=1e-6)
    np.testing.assert_allclose(second.faces, faces(points, 0.9 * scale).faces, atol=1e-6)
    nose = points.body[0, 0]
    np.testing.assert_allclose(first.body[0] - nose, (points.body[0] - nose) * scale, atol=1e-6)


def test_hidden_face_points_do_not_change_the_exact_size_and_stay_hidden():
    points = picture(dancer(), BASE)
    reference = faces(points, 1.2)
    points.faces[0, [3, 40]] = -1
    reference.faces[0, [5, 50]] = -1
    assert face_scale([points], reference, "exact") == pytest.approx(1.2, rel=1e-6)
    whole = faces(picture(dancer(), BASE), 1.2)
    assert face_scale([points], whole, "official") == pytest.approx(0.8)  # as upstream
    [scaled] = scale_faces([points], 1.2, "exact")
    assert (scaled.faces[0, [3, 40]] == -1).all()


def test_a_frame_without_the_nose_tip_keeps_its_face_in_exact_and_jumps_in_official():
    points = picture(dancer(), BASE)
    points.faces[0, 30] = -1
    [exact] = scale_faces([points], 0.8, "exact")
    [official] = scale_faces([points], 0.8, "official")
    np.testing.assert_array_equal(exact.faces, points.faces)
    np.testing.assert_allclose(official.faces, (points.faces + 1) * 0.8 - 1, atol=1e-6)


def test_the_exact_size_is_measured_in_the_first_frame_that_shows_the_face():
    nobody, points = picture(dancer(), BASE, persons=0), picture(dancer(), BASE)
    hidden = replace(points, faces=np.full_like(points.faces, -1))
    reference = faces(points, 1.3)
    assert face_scale([nobody, hidden, points], reference, "exact") == pytest.approx(1.3, rel=1e-6)
    assert face_scale([nobody, points], reference, "official") == pytest.approx(1.3, rel=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_faces_that_cannot_be_compared_keep_their_size(mode):
    nobody, points = picture(dancer(), BASE, persons=0), picture(dancer(), BASE)
    hidden = replace(points, faces=np.full_like(points.faces, -1))
    assert face_scale([points], nobody, mode) == 1
    assert face_scale([nobody], points, mode) == 1
    assert face_scale([], points, mode) == 1
    assert face_scale([hidden], points, mode) == 1


ALIGNED = {
    mode: Alignment(camera_of(0.9, 1.1, 40, -30), 0.9, 1.1, "down", mode, HEIGHT, WIDTH)
    for mode in MODES
}


@pytest.mark.parametrize("mode", MODES)
def test_points_move_as_their_joints_move(mode):
    joints, aligned = dancer(), ALIGNED[mode]
    points = picture(joints, BASE)
    moved = shift(points, joints, aligned)
    moves = (project(aligned.camera, joints) - project(BASE, joints)) / (WIDTH, HEIGHT)
    np.testing.assert_allclose(moved.body[0], points.body[0] + moves[15], atol=1e-6)
    np.testing.assert_allclose(moved.faces[0], points.faces[0] + moves[15], atol=1e-6)
    for side, wrist in enumerate((20, 21)):
        hand, got = points.hands[0, side], moved.hands[0, side]
        want = (hand - hand[0]) * (0.9, 0.9 * 1.1) + hand[0] + moves[wrist]
        np.testing.assert_allclose(got, want, atol=1e-6)
    np.testing.assert_array_equal(moved.visible, points.visible)


@pytest.mark.parametrize("depth", [0.0, 0.01, -5.0, np.nan])
def test_points_of_a_missing_joint_stay(depth):
    joints = dancer()
    joints[:, 2] = depth
    points = picture(dancer(), BASE)
    moved = shift(points, joints, ALIGNED["exact"])
    np.testing.assert_array_equal(moved.faces, points.faces)
    np.testing.assert_array_equal(moved.body, points.body)
    np.testing.assert_allclose(moved.hands[0, :, 0], points.hands[0, :, 0])


def test_hidden_points_stay_hidden_in_exact_mode():
    joints = dancer()
    points = picture(joints, BASE)
    points.faces[0, 8] = points.hands[0, 1, 4] = -1
    far = replace(ALIGNED["exact"], camera=camera_of(0.9, 1.1, 1.5 * WIDTH, 1.5 * HEIGHT))
    exact = shift(points, joints, far)
    assert (exact.faces[0, 8] == -1).all() and (exact.hands[0, 1, 4] == -1).all()
    official = shift(points, joints, replace(far, mode="official"))
    assert (official.faces[0, 8] > 0).all()  # the reference program would draw it


def test_a_hand_without_its_wrist_is_moved_but_not_scaled_in_exact_mode():
    joints = dancer()
    points = picture(joints, BASE)
    points.hands[0, 0, 0] = -1
    move = (project(ALIGNED["exact"].camera, joints) - project(BASE, joints))[20] / (WIDTH, HEIGHT)
    exact = shift(points, joints, ALIGNED["exact"])
    np.testing.assert_allclose(exact.hands[0, 0, 1:], points.hands[0, 0, 1:] + move, atol=1e-6)
    official = shift(points, joints, ALIGNED["official"])
    want = (points.hands[0, 0] + 1) * (0.9, 0.99) - 1 + move
    np.testing.assert_allclose(official.hands[0, 0], want, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_given_is_changed_and_other_persons_stay(mode):
    joints = np.stack([dancer(), dancer(1), dancer(2)])
    clip = [picture(joints[0], BASE, persons=2), picture(joints[1], BASE, persons=0)]
    clip.append(picture(joints[2], BASE, persons=1))
    reference = faces(picture(joints[0], camera_of(0.9, 1.1, 50, 5)), 1.3)
    given = [joints, *(array for points in (*clip, reference) for array in parts(points))]
    before = [array.copy() for array in given]
    aligned = fit(joints[0], reference, HEIGHT, WIDTH, mode)
    placed = place(clip, joints, reference, aligned)
    for points in placed:
        for array in parts(points)[::2]:
            array[:1] += 1  # also a result that is written to leaves them alone
    for array, copy in zip(given, before):
        np.testing.assert_array_equal(array, copy)
    np.testing.assert_array_equal(placed[0].faces[1], clip[0].faces[1])
    np.testing.assert_array_equal(placed[0].hands[1], clip[0].hands[1])
    assert [len(points.body) for points in placed] == [2, 0, 1]
    assert (placed[2].faces != clip[2].faces).any()


@pytest.mark.parametrize("mode", MODES)
def test_a_reference_that_stands_like_the_dancer_moves_nothing(mode):
    joints = dancer()
    points = picture(joints, BASE)
    [placed] = place([points], joints[None], points, fit(joints, points, HEIGHT, WIDTH, mode))
    for got, want in zip(parts(placed), parts(points)):
        np.testing.assert_allclose(got, want, atol=2e-6)


def test_the_face_is_scaled_before_it_is_moved():
    joints = dancer()
    points = picture(joints, BASE)
    reference = faces(picture(joints, camera_of(0.9, 1, 50, 0)), 1.25)
    aligned = fit(joints, reference, HEIGHT, WIDTH)
    [placed] = place([points], joints[None], reference, aligned)
    tip = placed.faces[0, 30]
    move = (project(aligned.camera, joints) - project(BASE, joints))[15] / (WIDTH, HEIGHT)
    np.testing.assert_allclose(tip, points.faces[0, 30] + move, atol=1e-6)
    want = faces(points, 1.25).faces[0] + move
    np.testing.assert_allclose(placed.faces[0], want, atol=1e-6)


def test_points_and_joints_of_different_clips_are_refused():
    joints = dancer()
    points = picture(joints, BASE)
    with pytest.raises(BadMedia, match="2D points of 2 frames and 3D joints of 1"):
        place([points, points], joints[None], points, ALIGNED["exact"])
