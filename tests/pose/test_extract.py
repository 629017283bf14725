"""Motion capture as a whole: what is made of the networks' answers, and what is kept of them."""

import logging
from dataclasses import replace

import numpy as np
import pytest

from engine.errors import Cancelled, NobodyFound
from engine.pose import extract
from engine.pose.align import fit
from engine.pose.boxes import Detection
from engine.pose.camera import Camera
from engine.pose.extract import Dance, PoseExtractor
from engine.pose.skeleton import draw_skeleton
from tests.support.dancers import (
    BODY,
    CAMERA,
    HEIGHT,
    WIDTH,
    Dancers,
    body,
    detection,
    frames,
    picture,
    points,
)

FPS = 16.0
PARTS = ("body", "visible", "faces", "hands")
# Within what may be fitted: m 1.2, s 0.9, moved by 6 and 9 pixels.
SHOWN_BY = Camera(CAMERA.fx * 1.2, CAMERA.fy * 1.2 * 0.9, CAMERA.cx + 6, CAMERA.cy + 9)


def dance(count, **changes):
    return replace(Dance("the video", (HEIGHT, WIDTH), count, FPS), **changes)


def capture(dancers, state, persons=1):
    """The extractor and the motion it finds in a clip."""
    count = len(dancers.people)
    extractor = PoseExtractor(dancers, state)
    return extractor, extractor.motion(dance(count, persons=persons), lambda: frames(count))


def drawn(extractor, motion, shown=None, mode="exact"):
    return np.stack(list(extractor.skeleton(motion, shown, HEIGHT, WIDTH, mode)))


def same_keypoints(got, want):
    return all(
        np.array_equal(getattr(a, part), getattr(b, part))
        for a, b in zip(got, want, strict=True)
        for part in PARTS
    )


def as_shown(*persons):
    """A dance of one person as the camera of the picture sees it: bones, face and hands."""
    clip = []
    for one in persons:
        frame = points(one, camera=SHOWN_BY)
        wrists = frame.hands[:, :, :1]
        frame.hands[:] = wrists + (frame.hands - wrists) * np.float32([1.2, 1.2 * 0.9])
        clip.append(frame)
    joints = np.stack(persons)[:, None]
    return np.stack(list(draw_skeleton(joints, HEIGHT, WIDTH, camera=SHOWN_BY, keypoints=clip)))


def share_of_other_pixels(got, want):
    """Points that round to the next pixel are few."""
    return float((np.abs(got.astype(int) - want) > 8).any(-1).mean())


# What is made of the networks' answers


def test_nobody_in_the_first_frames_leaves_them_black_and_aligns_on_the_first_with_somebody(
    tmp_path, caplog
):
    caplog.set_level(logging.INFO)
    walk = [[body(20 * t)] for t in range(4)]
    dancers = Dancers([], [], *walk, reference=detection(body(0), camera=SHOWN_BY))
    extractor, motion = capture(dancers, tmp_path)
    got = drawn(extractor, motion, picture())
    assert [bool(frame.any()) for frame in got] == [False, False, True, True, True, True]
    assert "camera aligned on the down body: m 1.2000, s 0.9000 (exact)" in caplog.text
    assert share_of_other_pixels(got[2:], as_shown(*(body(20 * t) for t in range(4)))) < 0.002


def test_nobody_at_all_says_where_it_was_looked_and_keeps_nothing(tmp_path):
    dancers = Dancers([], [], [])
    for _ in range(2):
        with pytest.raises(NobodyFound, match=r"any of the 3 frames looked at \(0 to 2;"):
            capture(dancers, tmp_path)
    assert dancers.located == [0, 1, 2] * 2  # looked again
    assert dancers.detected == []  # the 2D network was not bothered
    assert list(tmp_path.rglob("*.entry")) == []


def test_who_leaves_and_returns_is_absent_meanwhile_although_somebody_else_is_seen(tmp_path):
    away = 20  # frames: more than half a second
    bystander = body(-700, 9000)
    clip = [[body(0)]] * 3 + [[]] * away + [[body(100)]] * 3
    seen = [detection(*persons, bystander) for persons in clip]
    extractor, motion = capture(Dancers(*clip, seen=seen), tmp_path)
    present = motion.joints.any(axis=(1, 2, 3))
    assert present.tolist() == [True] * 3 + [False] * away + [True] * 3
    assert [bool(k.visible.any()) for k in motion.keypoints] == present.tolist()
    assert drawn(extractor, motion).any(axis=(1, 2, 3)).tolist() == present.tolist()
    assert motion.joints[-1, 0, 0, 0] == body(100)[0, 0]


def test_a_short_absence_is_drawn_with_the_2d_points_that_belong_to_it(tmp_path):
    clip = [[body(0)], [], [body(40)]]
    seen = [detection(body(20 * t)) for t in range(3)]
    _, motion = capture(Dancers(*clip, seen=seen), tmp_path)
    np.testing.assert_allclose(motion.joints[1, 0], body(20), atol=1e-3)
    assert same_keypoints(motion.keypoints, [each.keypoints for each in seen])


def test_two_persons_who_cross_keep_joints_and_keypoints_of_their_own(tmp_path):
    steps = np.arange(-10, 11)
    rng = np.random.default_rng(0)
    right = [body(60 * t, 3000) for t in steps]
    left = [body(-60 * t + 10, 4000) for t in steps]
    clip, seen = [], []
    for t, a, b in zip(steps, right, left):
        both = [a, b] if abs(t) > 1 else [a]  # the farther one is hidden
        clip.append([both[i] for i in rng.permutation(len(both))])
        seen.append(detection(*(both[i] for i in rng.permutation(len(both)))))
    extractor, motion = capture(Dancers(*clip, seen=seen), tmp_path, persons=2)
    assert motion.joints.shape == (21, 2, 24, 3)
    near = int(motion.joints[0, 1, 0, 2] < motion.joints[0, 0, 0, 2])
    np.testing.assert_allclose(motion.joints[:, near], right, atol=1e-3)
    np.testing.assert_allclose(motion.joints[:, 1 - near], left, atol=1e-2)
    assert same_keypoints(
        [extract._persons(k, slice(near, near + 1)) for k in motion.keypoints],
        [points(a) for a in right],
    )
    hidden = [not k.visible[1 - near].any() for k in motion.keypoints]
    assert hidden == [abs(t) <= 1 for t in steps]
    assert drawn(extractor, motion).any(axis=(1, 2, 3)).all()


def test_several_persons_are_drawn_where_they_danced(tmp_path):
    dancers = Dancers([body(-500), body(500)])
    extractor, motion = capture(dancers, tmp_path, persons=2)
    assert np.array_equal(drawn(extractor, motion, picture()), drawn(extractor, motion))
    assert dancers.pictures == 0


def test_a_person_wanted_and_never_seen_changes_nothing(tmp_path):
    clip = [[body(10 * t)] for t in range(3)]
    dancers = Dancers(*clip, reference=detection(body(0), camera=SHOWN_BY))
    extractor, alone = capture(dancers, tmp_path)
    _, motion = capture(dancers, tmp_path / "three", persons=3)
    assert np.array_equal(motion.joints, alone.joints)
    assert same_keypoints(motion.keypoints, alone.keypoints)
    shown = drawn(extractor, motion, picture())
    assert np.array_equal(shown, drawn(extractor, alone, picture()))
    assert not np.array_equal(shown, drawn(extractor, alone))  # it is fitted


def test_joints_that_are_no_numbers_are_filled_and_never_drawn(tmp_path):
    clip = [[body(20 * t)] for t in range(4)]
    clip[1][0][7] = np.nan
    clip[2][0][20, 1] = np.inf
    for frame in clip:
        frame[0][4, 2] = np.nan  # a knee that is never known
    seen = [detection(body(20 * t)) for t in range(4)]
    dancers = Dancers(*clip, seen=seen, reference=detection(body(0), camera=SHOWN_BY))
    extractor, motion = capture(dancers, tmp_path)
    assert np.isfinite(motion.joints).all()
    np.testing.assert_allclose(motion.joints[1, 0, 7], body(20)[7], atol=1e-3)
    assert not motion.joints[:, 0, 4].any()
    got = drawn(extractor, motion, picture())
    assert got.any(axis=(1, 2, 3)).all()


def test_a_person_of_no_numbers_is_nobody(tmp_path):
    dancers = Dancers([body(0)], [body(0)], [body(0)])
    dancers.people[1].joints[:] = np.nan
    _, motion = capture(dancers, tmp_path)
    np.testing.assert_array_equal(motion.joints[:, 0], [body(0)] * 3)
    dancers = Dancers([body(0)])
    dancers.people[0].joints[:] = np.nan
    with pytest.raises(NobodyFound, match="1 detections had no usable joints"):
        capture(dancers, tmp_path / "alone")


def test_a_clip_of_one_frame_is_a_clip(tmp_path):
    dancers = Dancers([body(0)], reference=detection(body(0)))
    extractor, motion = capture(dancers, tmp_path)
    assert motion.joints.shape == (1, 1, 24, 3)
    assert drawn(extractor, motion, picture()).any()


def test_a_camera_inside_a_bone_sees_that_bone_everywhere(tmp_path):
    inside = BODY - BODY[[4, 7]].mean(0)  # in the middle of a shin
    dancers = Dancers([inside])
    dancers.seen = [detection()]
    dancers.people[0].boxes[:] = [10, 10, 50, 100, 0.9]
    extractor, motion = capture(dancers, tmp_path)
    got = drawn(extractor, motion)[0]
    assert got.any(axis=-1).all()
    assert len(np.unique(got.reshape(-1, 3), axis=0)) == 1  # n = 0: no light falls anywhere


# The picture


def test_a_picture_with_nobody_is_said_and_the_dance_stays_where_it_was(tmp_path, caplog):
    nobody = detection()
    nose = nobody.keypoints.faces[:, 30:31]  # ViTPose gives a face of anything
    nobody.keypoints.faces[:] = nose + 1.4 * (nobody.keypoints.faces - nose)
    dancers = Dancers([body(0)], [body(50)], reference=nobody)
    extractor, motion = capture(dancers, tmp_path)
    for mode in ("exact", "official"):
        caplog.clear()
        got = drawn(extractor, motion, picture(), mode)
        assert np.array_equal(got, drawn(extractor, motion))
        assert "nobody was found in the picture" in caplog.messages[0]
        assert caplog.messages[1].startswith("the camera is not aligned")


def test_a_drawn_figure_that_only_the_keypoint_network_sees_is_fitted(tmp_path, caplog):
    seen = Detection(points(body(0), camera=SHOWN_BY), np.empty((0, 4), np.float32))
    extractor, motion = capture(Dancers([body(0)], reference=seen), tmp_path)
    fitted = Dancers([body(0)], reference=detection(body(0), camera=SHOWN_BY))
    want = drawn(PoseExtractor(fitted, tmp_path), motion, picture())
    caplog.clear()
    assert np.array_equal(drawn(extractor, motion, picture()), want)
    assert not np.array_equal(drawn(extractor, motion), want)
    assert ["nobody was found" in message for message in caplog.messages] == [True]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_of_several_persons_in_the_picture_the_large_central_one_counts(tmp_path, order):
    shown = [body(0), body(-900, 9000)]
    alone = Dancers([body(0)], reference=detection(shown[0], camera=SHOWN_BY))
    both = detection(*(shown[i] for i in order), camera=SHOWN_BY)
    extractor, motion = capture(Dancers([body(0)], reference=both), tmp_path)
    want = drawn(PoseExtractor(alone, tmp_path), motion, picture())
    assert np.array_equal(drawn(extractor, motion, picture()), want)


@pytest.mark.parametrize("mode", ["exact", "official"])
def test_the_face_is_measured_in_the_first_frame_that_has_one(tmp_path, mode):
    large = detection(body(0))
    nose = large.keypoints.faces[:, 30:31]
    large.keypoints.faces[:] = nose + 1.4 * (large.keypoints.faces - nose)
    clip = [[body(0)]] * 3
    seen = [detection(body(5000))] + [detection(body(0))] * 2  # a stranger in the first
    dancers = Dancers(*clip, seen=seen, reference=large)
    extractor, motion = capture(dancers, tmp_path)
    assert not motion.keypoints[0].visible.any()
    late = replace(motion, joints=motion.joints[1:], keypoints=motion.keypoints[1:])
    got = drawn(extractor, motion, picture(), mode)
    assert np.array_equal(got[1:], drawn(extractor, late, picture(), mode))
    unscaled = drawn(extractor, late)
    assert not np.array_equal(got[1:], unscaled)


def test_the_way_of_the_fit_can_be_chosen(tmp_path):
    reference = detection(body(0), camera=Camera(CAMERA.fx * 2, CAMERA.fy * 2, 20, 90))
    extractor, motion = capture(Dancers([body(0)], reference=reference), tmp_path)
    cameras = [
        fit(motion.joints[0, 0], reference.keypoints, HEIGHT, WIDTH, mode).camera
        for mode in ("exact", "official")
    ]
    assert cameras[0] != cameras[1]
    for mode, camera in zip(("exact", "official"), cameras):
        hidden = replace(motion, keypoints=[extract._persons(motion.keypoints[0], slice(0))])
        got = drawn(extractor, hidden, picture(), mode)
        assert np.array_equal(got, list(draw_skeleton(motion.joints, HEIGHT, WIDTH, camera=camera)))


# What is kept


def refuse():
    raise AssertionError("the frames were asked for")


def test_a_known_dance_is_not_looked_at_again(tmp_path):
    clip = [[body(20 * t), body(600)] for t in range(5)]
    dancers = Dancers(*clip)
    _, first = capture(dancers, tmp_path, persons=2)
    later = PoseExtractor(dancers, tmp_path).motion(dance(5, persons=2), refuse)
    assert (dancers.located, dancers.detected) == ([0, 1, 2, 3, 4],) * 2
    assert np.array_equal(later.joints, first.joints)
    assert same_keypoints(later.keypoints, first.keypoints)
    assert [array.dtype for array in (later.joints, later.keypoints[0].visible)] == ["f4", "?"]


@pytest.mark.parametrize("change", [
    {"sha256": "another video"}, {"size": (WIDTH, HEIGHT)}, {"frames": 4}, {"fps": 24.0},
    {"persons": 2},
], ids=lambda change: next(iter(change)))  # fmt: skip
def test_another_video_or_setting_is_another_dance(tmp_path, change):
    dancers = Dancers(*[[body(0)]] * 5)
    extractor, _ = capture(dancers, tmp_path)
    extractor.motion(dance(5, **change), lambda: frames(5))
    assert len(dancers.located) == 10
    extractor.motion(dance(5), refuse)  # the first is still known


def test_other_networks_look_again(tmp_path):
    dancers = Dancers([body(0)])
    extractor, _ = capture(dancers, tmp_path)
    dancers.files[1] = "another"
    extractor.motion(dance(1), lambda: frames(1))
    assert dancers.located == [0, 0]


def test_a_damaged_entry_is_said_and_made_again(tmp_path, caplog):
    dancers = Dancers([body(0)])
    _, want = capture(dancers, tmp_path)
    (entry,) = tmp_path.rglob("*.entry")
    whole = entry.read_bytes()
    entry.write_bytes(whole[:-10])
    _, got = capture(dancers, tmp_path)
    assert np.array_equal(got.joints, want.joints)
    assert f"{entry} is damaged" in caplog.text
    assert dancers.located == [0, 0]
    assert entry.read_bytes() == whole


def test_a_folder_that_cannot_be_written_is_said_and_no_obstacle(tmp_path, caplog):
    (tmp_path / "motion").write_text("a file where the folder should be")
    dancers = Dancers([body(0)])
    for _ in range(2):
        _, motion = capture(dancers, tmp_path)
        np.testing.assert_array_equal(motion.joints[0, 0], body(0))
    assert dancers.located == [0, 0]
    assert caplog.text.count("could not be kept") == 2


def test_hundreds_of_dances_fit_and_the_cap_holds(tmp_path):
    count = 326
    rng = np.random.default_rng(0)
    clip = [[body(0) + rng.normal(0, 30, (24, 3)).astype(np.float32)] for _ in range(count)]
    dancers = Dancers(*clip)
    motion = extract.CapturedMotion(
        np.stack([each.joints for each in dancers.people]),
        [each.keypoints for each in dancers.seen],
    )
    assert 500 < extract.CACHE_BYTES / len(extract._packed(motion)) < 1000
    folder = tmp_path / "motion"
    folder.mkdir()
    old = folder / "old.entry"
    with old.open("wb") as file:
        file.truncate(extract.CACHE_BYTES)  # takes no room on the disk
    capture(Dancers([body(0)]), tmp_path)
    assert not old.exists()
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize("calls", [0, 3, 7])
def test_a_check_ends_the_search_before_the_next_frame_and_nothing_is_kept(tmp_path, calls):
    dancers = Dancers(*[[body()]] * 5)
    extractor, left = PoseExtractor(dancers, tmp_path), iter(range(calls))

    def check():
        if next(left, None) is None:
            raise Cancelled("The job was called off.")

    with pytest.raises(Cancelled):
        extractor.motion(dance(5), lambda: frames(5), check)
    assert len(dancers.located) + len(dancers.detected) == calls
    assert extractor.motion(dance(5), lambda: frames(5)).joints.shape[0] == 5
