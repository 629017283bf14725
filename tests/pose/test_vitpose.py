"""ViTPose against the official functions' numbers, by its rules, and with stand-in networks."""

import numpy as np
import pytest

from engine.errors import BadCheckpoint, BadMedia
from engine.golden import keypoints as golden_module
from engine.pose import vitpose
from engine.pose.boxes import stretch, usable, yolo10_objects, yolo10_person
from engine.pose.vitpose import VitPose, open_vitpose
from tests.pose.test_dwpose import damaged, first_plus, names_of, unreachable
from tests.support.standin_models import driving_frames, save_vitpose, save_yolo10, vitpose_cells


@pytest.mark.golden
@pytest.mark.parametrize("name", ["yolo10.npz", "vitpose_crop.npz", "vitpose_pose.npz"])
def test_every_golden_value_is_met(golden, name):
    path = golden / "keypoints" / name
    assert golden_module.recognises(names_of(path), {})
    checks = list(golden_module.checks(path))
    assert len(checks) >= 7
    assert [check for check in checks if not check.ok] == []


@pytest.mark.golden
@pytest.mark.parametrize(
    ("name", "key", "change", "failing"),
    [
        ("yolo10.npz", "input_val", first_plus(1e-3), "input_val"),
        ("yolo10.npz", "one_nms", first_plus(1), "one nms"),
        ("yolo10.npz", "thin_longest_bbox", first_plus(1), "thin_longest bbox"),
        ("yolo10.npz", "small_used", first_plus(1), "small used"),
        ("yolo10.npz", "low_conf_rows", lambda rows: rows * np.float32(0.5), "low_conf nms"),
        ("vitpose_crop.npz", "geo_ul", first_plus(1), "geo_ul"),
        ("vitpose_crop.npz", "geo_scale", first_plus(1e-6), "geo_scale"),
        ("vitpose_crop.npz", "input0", first_plus(1e-3), "input0"),
        ("vitpose_pose.npz", "loc", first_plus(1e-3), "frame 0 loc"),
        ("vitpose_pose.npz", "hands", lambda hands: hands[:, ::-1], "frame 0 hands"),
        ("vitpose_pose.npz", "swap_hands", np.logical_not, "frame 0 hands"),
        ("vitpose_pose.npz", "subset", first_plus(-1), "frame 0 subset"),
        ("vitpose_pose.npz", "win_start", first_plus(3), "frame 0 argmax"),
        ("vitpose_pose.npz", "kp", first_plus(np.nan), "frame 0 kp"),
    ],
)
def test_a_damaged_golden_fails(golden, tmp_path, name, key, change, failing):
    path = damaged(golden / "keypoints" / name, tmp_path / "copy.npz", key, change)
    failed = [check.check for check in golden_module.checks(path) if not check.ok]
    assert any(check.startswith(f"copy.npz: {failing}") for check in failed)
    assert len(failed) < 15


def hill(x, y, height=0.8):
    """A map [64, 48] with a Gaussian hill around a place between cells."""
    rows, columns = np.mgrid[:64, :48]
    return (height * np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / 8)).astype(np.float32)


def test_refinement_finds_the_top_of_a_hill_between_cells():
    heat = np.stack([hill(20.3, 30.4), hill(10.0, 50.0), hill(30.45, 12.2)])
    cells, highest = vitpose.peaks(heat)
    assert cells.tolist() == [[20, 30], [10, 50], [30, 12]]
    moved = vitpose.refine(heat, cells, highest)
    np.testing.assert_allclose(moved, [[20.3, 30.4], [10, 50], [30.45, 12.2]], atol=2e-3)


def test_a_peak_near_the_border_is_not_refined():
    places = [(1.3, 30), (46.2, 30), (20, 1.3), (20, 62.3), (2.2, 30)]
    heat = np.stack([hill(x, y) for x, y in places])
    cells, highest = vitpose.peaks(heat)
    moved = vitpose.refine(heat, cells, highest)
    assert moved[:4].tolist() == [[1, 30], [46, 30], [20, 1], [20, 62]]
    assert moved[4, 0] != 2


def test_maps_without_a_peak_give_no_nan_and_the_first_maximum_wins():
    flat = np.zeros((3, 64, 48), np.float32)
    flat[1] -= 1
    flat[2, 10, 7] = flat[2, 40, 3] = 0.5
    cells, highest = vitpose.peaks(flat)
    assert cells.tolist() == [[-1, -1], [-1, -1], [7, 10]]
    assert highest.tolist() == [0, -1, 0.5]
    found = vitpose.locate(flat, np.array([50.0, 50.0]), np.array([0.375, 0.5]))
    assert np.isfinite(found).all()
    # Cell -1 of a 75 x 100 crop centred at (50, 50).
    np.testing.assert_allclose(found[0], [12.5 - 75 / 48, -100 / 64, 0], atol=1e-5)


def rows_of(*rows):
    return np.array([(*row, 0) if len(row) == 5 else row for row in rows], np.float32)


def test_corner_and_size_of_a_box_are_truncated_each_by_itself():
    found = yolo10_objects(rows_of((-10.9, 20.9, 100.8, 200.1, 0.9)), height=640, width=640)
    np.testing.assert_allclose(found, [[-10, 20, 101, 199, 0.9, 0]], rtol=1e-6)


def test_of_equal_areas_the_better_score_is_chosen_and_small_ones_are_not_used():
    rows = rows_of((0, 0, 100, 300, 0.5), (300, 0, 400, 300, 0.8))
    person = yolo10_person(yolo10_objects(rows, 640, 640))
    assert person is not None
    assert person[:4].tolist() == [300, 0, 400, 300]
    for box, fits in (([0, 0, 10, 10], True), ([0, 0, 9, 300], False), ([0, 0, 300, 9], False)):
        assert (usable(np.array([*box, 0.9])) is not None) == fits
    assert usable(None) is None


def test_rows_that_are_not_finite_or_too_weak_are_nobody():
    rows = rows_of((np.nan, 0, 50, 50, 0.9), (0, 0, np.inf, 50, 0.9), (0, 0, 50, 50, 0.05))
    assert len(yolo10_objects(rows, 640, 640)) == 0
    assert yolo10_person(yolo10_objects(rows, 640, 640)) is None


def test_a_crop_outside_the_picture_is_black():
    picture = np.ones((20, 30, 3), np.float32)
    for upper, lower in (((40, 0), (52, 16)), ((-30, -40), (-18, -24)), ((0, 25), (12, 41))):
        assert (vitpose.crop(picture, upper, lower) == 0).all()
    half = vitpose.crop(picture, (-6, 0), (6, 16))
    assert (half[:, :80] == 0).all()
    assert (half[:, 112:] == 1).all()


def points_at(x, y, score=0.9):
    return np.tile(np.array([x, y, score], np.float32), (133, 1))


def test_a_body_wholly_outside_is_taken_from_the_frame_before():
    before = vitpose.body(points_at(50, 50), None, 100, 100)
    outside = points_at(-5, 50)
    assert vitpose.body(outside, before, 100, 100) is before
    assert (vitpose.body(outside, None, 100, 100)[:, 0] < 0).all()  # the first frame
    partly = outside.copy()
    partly[0, 0] = 1
    assert vitpose.body(partly, before, 100, 100)[0, 0] == np.float32(0.01)


def test_neck_score_is_the_mean_and_hands_come_left_then_right():
    points = points_at(50, 50)
    points[[5, 6], 2] = 0.1, 0.4  # mean 0.25: the neck is hidden, the right shoulder is not
    points[91:112, 0], points[112:, 0] = 10, 20
    points[30, 2] = 0.0  # a face point keeps its place whatever its score
    body = vitpose.body(points, None, 100, 100)
    found = vitpose.keypoints(body, points, 100, 100)
    assert np.flatnonzero(~found.visible[0]).tolist() == [1, 5]
    np.testing.assert_allclose(found.hands[0, :, 0, 0], [0.1, 0.2])
    assert found.faces[0, 7].tolist() == [0.5, 0.5]
    assert (found.body.shape, found.body.dtype) == ((1, 18, 2), np.float32)


def detector(tmp_path, persons=((220.0, 70.0, 420.0, 570.0, 0.9),), slope=0.0) -> VitPose:
    yolo = save_yolo10(tmp_path / "yolov10m.onnx", persons, slope)
    return open_vitpose(yolo, save_vitpose(tmp_path / "vitpose-h.onnx"), gpu=False)


def expected_face(box):
    """The places of the stand-in's face points for a box in the picture."""
    x1, y1, x2, y2 = box
    height = max((x2 - x1) * 256 / 192, y2 - y1) * 1.25
    size = np.array([height * 0.75, height])
    centre = np.array([x1 + x2, y1 + y2]) / 2
    return (vitpose_cells() / [48, 64] * size + centre - size / 2)[23:91]


def test_networks_and_rules_together_find_the_stand_ins_person(tmp_path):
    frame = np.full((640, 320, 3), 30, np.uint8)
    (found,) = detector(tmp_path).detect([frame])
    assert found.boxes.tolist() == [[110, 70, 210, 570]]
    face = expected_face((110, 70, 210, 570)) / [320, 640]
    np.testing.assert_allclose(found.keypoints.faces[0], face, atol=1e-4)
    assert found.keypoints.visible.all()


def test_what_is_found_depends_on_the_picture(tmp_path):
    frames = [np.full((640, 640, 3), level, np.uint8) for level in (0, 255)]
    dark, bright = detector(tmp_path, slope=20.0).detect(frames)
    assert (bright.boxes - dark.boxes).tolist() == [[20, 0, 20, 0]]
    shift = bright.keypoints.faces - dark.keypoints.faces
    np.testing.assert_allclose(shift, np.broadcast_to([20 / 640, 0], shift.shape), atol=1e-6)


@pytest.mark.parametrize("persons", [(), ((300, 300, 305, 400, 0.9),)], ids=["nobody", "tiny"])
def test_without_a_usable_person_the_whole_picture_is_searched(tmp_path, persons):
    (found,) = detector(tmp_path, persons).detect([np.zeros((400, 300, 3), np.uint8)])
    assert found.boxes.shape == (0, 4)
    face = expected_face((0, 0, 300, 400)) / [300, 400]
    np.testing.assert_allclose(found.keypoints.faces[0], face, atol=1e-4)


def test_a_box_beyond_the_borders_is_not_clipped(tmp_path):
    persons = [(-100.0, 300.0, 200.0, 900.0, 0.9)]
    (found,) = detector(tmp_path, persons).detect([np.full((640, 640, 3), 255, np.uint8)])
    assert found.boxes.tolist() == [[-100, 300, 200, 900]]
    face = expected_face((-100, 300, 200, 900)) / 640
    np.testing.assert_allclose(found.keypoints.faces[0], face, atol=1e-4)


def test_a_picture_of_one_pixel_goes_through(tmp_path):
    (found,) = detector(tmp_path).detect([np.full((1, 1, 3), 255, np.uint8)])
    assert found.boxes.shape == (0, 4)
    assert np.isfinite(found.keypoints.body).all()


@pytest.mark.parametrize("frame", [np.zeros((8, 8, 3), np.float32), np.zeros((8, 8), np.uint8)])
def test_a_frame_that_is_no_picture_of_bytes_is_refused(frame):
    with pytest.raises(BadMedia, match="A frame is"):
        list(VitPose(unreachable, unreachable).detect([frame]))


def test_weights_beside_the_file_are_used_and_missed(tmp_path):
    yolo = save_yolo10(tmp_path / "yolov10m.onnx")
    pose = save_vitpose(tmp_path / "vitpose_h.onnx", external="vitpose_h_data.bin")
    (found,) = open_vitpose(yolo, pose, gpu=False).detect([np.zeros((640, 640, 3), np.uint8)])
    face = expected_face((220, 70, 420, 570)) / 640
    np.testing.assert_allclose(found.keypoints.faces[0], face, atol=1e-4)
    (tmp_path / "vitpose_h_data.bin").unlink()
    with pytest.raises(BadCheckpoint, match=r"vitpose_h.onnx .* is its data file beside it"):
        open_vitpose(yolo, pose, gpu=False)


@pytest.mark.golden
def test_frames_of_a_real_video_go_through(golden, tmp_path):
    frames = driving_frames(golden / "examples/001/driving.mp4", 2)
    found = list(detector(tmp_path, slope=20.0).detect(frames))
    for frame, each in zip(frames, found):
        height, width = frame.shape[:2]
        mean = stretch(vitpose.to_unit(frame)).mean(dtype=np.float64)
        left = int((220 + 20 * mean) * width / 640)
        assert each.boxes[0, :2].tolist() == [left, int(70 * height / 640)]
        face = expected_face(each.boxes[0]) / [width, height]
        np.testing.assert_allclose(each.keypoints.faces[0], face, atol=1e-4)
