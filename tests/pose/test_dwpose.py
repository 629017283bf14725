"""DWPose against the official functions' numbers, by its rules, and with stand-in networks."""

import numpy as np
import pytest

from engine.errors import BadCheckpoint, BadMedia
from engine.golden import keypoints as golden_module
from engine.pose import dwpose
from engine.pose.boxes import decode_yolox, letterbox, letterbox_size, yolox_objects, yolox_persons
from engine.pose.dwpose import DwPose, open_dwpose
from tests.support.standin_models import driving_frames, save_dwpose, save_yolox

FILES = ["yolox.npz", "dwpose_crop.npz", "dwpose_pose.npz"]


def names_of(path):
    with np.load(path) as file:
        return frozenset(file.files)


def damaged(path, target, key, change):
    """A copy of a golden file in which one array is changed."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    arrays[key] = change(arrays[key].copy())
    np.savez(target, **arrays)
    return target


@pytest.mark.golden
@pytest.mark.parametrize("name", FILES)
def test_every_golden_value_is_met(golden, name):
    path = golden / "keypoints" / name
    assert golden_module.recognises(names_of(path), {})
    checks = list(golden_module.checks(path))
    assert len(checks) >= 8
    assert [check for check in checks if not check.ok] == []


def first_plus(amount):
    def change(array):
        array.flat[0] += amount
        return array

    return change


@pytest.mark.golden
@pytest.mark.parametrize(
    ("name", "key", "change", "failing"),
    [
        ("yolox.npz", "lb_new_hw", first_plus(1), "lb_new_hw"),
        ("yolox.npz", "img0_val", first_plus(2), "img0 val"),
        ("yolox.npz", "img1_sum", lambda sums: sums * 1.01, "img1 sum"),
        ("yolox.npz", "two_dets", lambda rows: rows[::-1], "two dets"),
        ("yolox.npz", "chain_boxes", lambda rows: rows[:1], "chain boxes"),
        ("yolox.npz", "one_xyxy", first_plus(np.nan), "one xyxy"),
        ("dwpose_crop.npz", "center", first_plus(1e-9), "center"),
        ("dwpose_crop.npz", "crop0", lambda crop: crop[::-1], "crop0"),
        ("dwpose_crop.npz", "input_val", first_plus(0.2), "input_val"),
        ("dwpose_pose.npz", "two_hands", lambda hands: hands[[0, 2, 1, 3]], "two hands"),
        ("dwpose_pose.npz", "one_subset", first_plus(1), "one subset"),
        ("dwpose_pose.npz", "nodet_kp133", first_plus(0.01), "nodet kp133"),
        ("dwpose_pose.npz", "one_simcc_x_start", first_plus(1), "one kp133"),
    ],
)
def test_a_damaged_golden_fails(golden, tmp_path, name, key, change, failing):
    if name == "dwpose_pose.npz":  # its boxes come from the YOLOX set, whatever that is called
        (tmp_path / "other name.npz").write_bytes((golden / "keypoints/yolox.npz").read_bytes())
    path = damaged(golden / "keypoints" / name, tmp_path / "copy.npz", key, change)
    failed = [check.check for check in golden_module.checks(path) if not check.ok]
    assert any(check.startswith(f"copy.npz: {failing}") for check in failed)
    assert len(failed) < 12


@pytest.mark.golden
def test_a_pose_golden_without_its_boxes_fails_and_says_what_it_lacks(golden, tmp_path):
    (tmp_path / "pose.npz").write_bytes((golden / "keypoints/dwpose_pose.npz").read_bytes())
    checks = list(golden_module.checks(tmp_path / "pose.npz"))
    assert {check.ok for check in checks} == {False}
    assert "no YOLOX set" in checks[0].check


def test_other_files_are_not_taken_for_keypoint_goldens():
    assert not golden_module.recognises(frozenset({"cases", "boxes", "hw"}), {})
    assert not golden_module.recognises(frozenset(), {})


def test_the_letterbox_truncates_and_never_loses_a_side():
    assert letterbox_size(1080, 1920) == (360, 640, 640 / 1920)
    assert letterbox_size(1, 4000)[:2] == (1, 640)
    thin, ratio = letterbox(np.full((1, 4000, 3), 200, np.uint8))
    assert (thin[0, :, 0] == 200).all()
    assert (thin[0, :, 1:] == 114).all()
    assert ratio == 0.16


def test_a_box_that_is_not_finite_is_no_person():
    raw = np.zeros((1, 8400, 85), np.float32)
    raw[0, :3, 4:6] = 1  # three persons
    raw[0, 0, 2] = 1000  # exp overflows
    raw[0, 1, 0] = np.nan
    raw[0, 2, :4] = 4, 4, 2, 2
    persons = yolox_persons(yolox_objects(*decode_yolox(raw, 1.0)))
    half = 4 * np.exp(2)
    np.testing.assert_allclose(persons, [[48 - half, 32 - half, 48 + half, 32 + half]], rtol=1e-6)


def test_another_class_neither_counts_nor_suppresses():
    raw = np.zeros((1, 8400, 85), np.float32)
    raw[0, 0, 4:6] = 0.8  # person 0.64
    raw[0, 1, 4], raw[0, 1, 7] = 0.9, 0.9  # class 2 at 0.81, the same place
    raw[0, 1, 0] = -1
    objects = yolox_objects(*decode_yolox(raw, 2.0))
    np.testing.assert_allclose(objects, [[-2, -2, 2, 2, 0.64, 0], [-2, -2, 2, 2, 0.81, 2]])
    assert yolox_persons(objects).tolist() == [[-2, -2, 2, 2]]


def test_hidden_points_are_negative_and_the_body_keeps_its_place():
    points = np.full((1, 134, 2), [50.0, 20.0])
    scores = np.full((1, 134), 0.9)
    scores[0, [3, 30, 95, 120]] = 0.29
    scores[0, [4, 31]] = 0.3  # a body point must be above, a face point may be at the limit
    found = dwpose.keypoints(points, scores, height=40, width=200)
    assert np.flatnonzero(~found.visible[0]).tolist() == [3, 4]
    assert found.body[0, 3].tolist() == [0.25, 0.5]
    assert np.flatnonzero(found.faces[0, :, 0] < 0).tolist() == [6]
    assert np.argwhere(found.hands[0, :, :, 0] < 0).tolist() == [[0, 3], [1, 7]]
    assert found.hands.dtype == np.float32


def test_hands_are_the_persons_own_left_then_right():
    points = np.zeros((2, 134, 2))
    points[0, 92:113, 0], points[0, 113:, 0] = 1, 2
    points[1, 92:113, 0], points[1, 113:, 0] = 3, 4
    found = dwpose.keypoints(points, np.ones((2, 134)), height=1, width=1)
    assert found.hands[:, :, 0, 0].tolist() == [[1, 2], [3, 4]]


def detector(tmp_path, persons, slope=0.0, score=0.8) -> DwPose:
    yolox = save_yolox(tmp_path / "yolox_l.onnx", persons, slope)
    return open_dwpose(yolox, save_dwpose(tmp_path / "dw-ll.onnx", score), gpu=False)


def expected_nose(centre, size, shift=0.0):
    """The place in the picture of the stand-in's point 0, from crop pixels (50, 100)."""
    return np.array([50 + shift, 100]) / [288, 384] * size + centre - np.array(size) / 2


def test_networks_and_rules_together_find_the_stand_ins_person(tmp_path):
    frame = np.full((320, 160, 3), 30, np.uint8)  # letterboxed by 2
    (found,) = detector(tmp_path, [(160, 300, 120, 400, 0.9)]).detect([frame])
    np.testing.assert_allclose(found.boxes, [[50, 50, 110, 250]], atol=1e-3)
    # The box is 60 x 200, padded by a quarter to 250 high, made 3 to 4.
    nose = expected_nose((80, 150), (187.5, 250))
    np.testing.assert_allclose(found.keypoints.body[0, 0], nose / [160, 320], atol=1e-5)
    assert found.keypoints.visible.all()
    neck = (found.keypoints.body[0, 2] + found.keypoints.body[0, 5]) / 2
    np.testing.assert_allclose(found.keypoints.body[0, 1], neck, atol=1e-6)


def test_what_is_found_depends_on_the_picture(tmp_path):
    found = detector(tmp_path, [(160, 300, 120, 400, 0.9)], slope=0.05).detect(
        [np.full((640, 640, 3), level, np.uint8) for level in (0, 200)]
    )
    dark, bright = found
    np.testing.assert_allclose(bright.boxes - dark.boxes, [[80, 0, 80, 0]], atol=1e-3)
    nose = expected_nose((240, 300), (375, 500), shift=25) / 640  # 50 bins further right
    np.testing.assert_allclose(bright.keypoints.body[0, 0], nose, atol=1e-5)


def test_two_persons_come_in_the_order_of_their_scores(tmp_path):
    persons = [(200, 300, 120, 400, 0.6), (480, 300, 120, 400, 0.9)]
    frame = np.zeros((640, 640, 3), np.uint8)
    (found,) = detector(tmp_path, persons).detect([frame])
    np.testing.assert_allclose(found.boxes[:, 0], [420, 140], atol=1e-3)
    assert found.keypoints.body.shape == (2, 24, 2)
    noses = [expected_nose((x, 300), (375, 500)) / 640 for x in (480, 200)]
    np.testing.assert_allclose(found.keypoints.body[:, 0], noses, atol=1e-5)


def test_without_a_person_the_whole_picture_is_searched_and_no_box_reported(tmp_path):
    (found,) = detector(tmp_path, []).detect([np.zeros((400, 300, 3), np.uint8)])
    assert found.boxes.shape == (0, 4)
    nose = expected_nose((150, 200), (375, 500)) / [300, 400]
    np.testing.assert_allclose(found.keypoints.body[0, 0], nose, atol=1e-5)


def test_a_box_beyond_the_borders_is_not_clipped(tmp_path):
    (found,) = detector(tmp_path, [(10, 620, 300, 500, 0.9)]).detect(
        [np.full((640, 640, 3), 255, np.uint8)]
    )
    np.testing.assert_allclose(found.boxes, [[-140, 370, 160, 870]], atol=1e-3)
    assert np.isfinite(found.keypoints.body).all()
    assert found.keypoints.body[0, 0, 0] < 0  # the left edge of its crop lies outside


def test_points_with_a_score_of_zero_stay_finite_and_hidden(tmp_path):
    (found,) = detector(tmp_path, [], score=-1.0).detect([np.zeros((40, 30, 3), np.uint8)])
    assert not found.keypoints.visible.any()
    assert (found.keypoints.faces == -1).all()
    assert np.isfinite(found.keypoints.body).all()


def unreachable(picture):
    raise AssertionError("no network may see a bad frame")


@pytest.mark.parametrize(
    "frame",
    [
        np.zeros((8, 8), np.uint8),
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((0, 8, 3), np.uint8),
        np.zeros((8, 8, 3), np.float32),
    ],
    ids=["grey", "RGBA", "empty", "float"],
)
def test_a_frame_that_is_no_picture_of_bytes_is_refused(frame):
    with pytest.raises(BadMedia, match=r"expected uint8 \[H, W, 3\]"):
        list(DwPose(unreachable, unreachable).detect([frame]))


def test_swapped_files_are_refused(tmp_path):
    yolox, pose = save_yolox(tmp_path / "a.onnx"), save_dwpose(tmp_path / "b.onnx")
    with pytest.raises(BadCheckpoint, match=r"b.onnx .*another network"):
        open_dwpose(pose, yolox, gpu=False)


@pytest.mark.golden
def test_frames_of_a_real_video_go_through(golden, tmp_path):
    frames = driving_frames(golden / "examples/001/driving.mp4", 2)
    found = list(detector(tmp_path, [(160, 300, 120, 400, 0.9)], slope=0.01).detect(frames))
    for frame, each in zip(frames, found):
        picture, ratio = letterbox(np.ascontiguousarray(frame[:, :, ::-1]))
        left = (160 + 8 * 0.01 * picture.mean(dtype=np.float64) - 60) / ratio
        np.testing.assert_allclose(each.boxes[0, 0], left, atol=0.01)
