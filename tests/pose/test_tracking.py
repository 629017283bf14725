"""Following persons across frames: choice, absences, damage."""

import logging

import numpy as np
import pytest

from engine.errors import BadMedia, BadRequest, NobodyFound
from engine.pose.bones import bones, palettes
from engine.pose.camera import base_camera
from engine.pose.tracking import Gap, prominence, track

HEIGHT, WIDTH, FPS = 512, 896, 16.0
CAMERA = base_camera(HEIGHT, WIDTH)
SHAPE = np.random.default_rng(0).normal(0, 300, (24, 3))  # one body, pelvis at 0
SHAPE[0] = 0


def person(x, z=3000.0, size=1.0):
    """A body [24, 3] with its pelvis at (x, 0, z) mm, and its box as the camera sees it."""
    pose = (SHAPE * size + (x, 0, z)).astype(np.float32)
    scale = CAMERA.fx / z
    box = (CAMERA.cx + scale * (x - 300 * size), CAMERA.cy - scale * 900 * size)
    return pose, np.float32([*box, scale * 600 * size, scale * 1800 * size, 0.9])


def detections(*frames):
    """Frames as lists of persons -> what the detector gives."""
    joints = [np.array([pose for pose, _ in frame]).reshape(-1, 24, 3) for frame in frames]
    boxes = [np.array([box for _, box in frame]).reshape(-1, 5) for frame in frames]
    return joints, boxes


def follow(*frames, **options):
    return track(*detections(*frames), HEIGHT, WIDTH, FPS, **options)


def pelvis(tracks, column=0):
    """x of the pelvis in mm; 0 where the person is missing."""
    return tracks.joints[:, column, 0, 0]


def test_prominence_is_the_share_of_the_picture_times_centrality():
    centred = np.array([224, 128, 448, 256])  # half of each side, in the middle
    assert prominence(centred, HEIGHT, WIDTH) == pytest.approx(0.25)
    corner = np.array([0, 0, 448, 256])  # its centre lies half way to the corner
    assert prominence(corner, HEIGHT, WIDTH) == pytest.approx(0.25 * 0.5)
    half_outside = np.array([-448, 0, 896, 512])  # the half inside is centred a quarter off
    want = 0.5 * (1 - 224 / np.hypot(448, 256))
    assert prominence(half_outside, HEIGHT, WIDTH) == pytest.approx(want)
    assert prominence(np.array([2000, 0, 50, 50]), HEIGHT, WIDTH) == 0


def test_the_main_person_is_the_large_central_one_whatever_row_comes_first():
    small, large = person(100, 9000), person(200, 3000)
    tracks = follow([small, large], [large, small], [small, large])
    np.testing.assert_array_equal(tracks.joints[:, 0], [large[0]] * 3)
    assert tracks.rows[:, 0].tolist() == [1, 0, 1]
    assert tracks.gaps == ()


def test_centre_wins_over_the_same_size_at_the_border():
    border, centre = person(1500), person(100)
    assert pelvis(follow([border, centre])).tolist() == [100]


def test_a_larger_person_who_comes_later_does_not_take_over():
    frames = [[person(-800, 4000)]] + [[person(300, 2000), person(-800, 4000)]] * 4
    assert pelvis(follow(*frames)).tolist() == [-800] * 5


def test_columns_are_ordered_by_prominence_and_keep_their_person():
    a, b, c = person(0, 3000), person(-1200, 3500), person(1500, 6000)
    tracks = follow([c, b, a], [b, a, c], [a, c, b], persons=3)
    assert [pelvis(tracks, i).tolist() for i in range(3)] == [[0] * 3, [-1200] * 3, [1500] * 3]
    assert tracks.rows.tolist() == [[2, 1, 0], [1, 0, 2], [0, 2, 1]]


def test_detections_shuffled_in_every_frame_give_the_same_tracks():
    rng = np.random.default_rng(1)
    frames = [
        [person(-900 + 30 * t), person(60 * np.sin(t), 4000), person(1200)] for t in range(30)
    ]
    want = follow(*frames, persons=3)
    shuffled = [[frame[i] for i in rng.permutation(3)] for frame in frames]
    np.testing.assert_array_equal(follow(*shuffled, persons=3).joints, want.joints)


@pytest.mark.parametrize("hidden", [0, 1, 4], ids=lambda n: f"{n} frames behind the other")
@pytest.mark.parametrize("depth", [3000, 3500], ids=["same depth", "behind"])
def test_two_persons_who_cross_keep_their_columns(hidden, depth):
    steps = np.arange(-20, 21)
    rng = np.random.default_rng(2)
    frames = []
    for t in steps:
        front = person(50 * t + rng.normal(0, 15), 3000)
        back = person(-50 * t + 20 + rng.normal(0, 15), depth + 1)
        seen = [front] if abs(t) < (hidden + 1) // 2 else [front, back]
        frames.append([seen[i] for i in rng.permutation(len(seen))])
    tracks = follow(*frames, persons=2)
    columns = [pelvis(tracks, i) for i in range(2)]
    rising = columns[0] if columns[0][-1] > columns[0][0] else columns[1]
    falling = columns[1] if rising is columns[0] else columns[0]
    np.testing.assert_allclose(rising, 50 * steps, atol=60)
    np.testing.assert_allclose(falling, -50 * steps + 20, atol=60)


def test_a_passer_by_in_front_does_not_take_the_identity():
    frames = []
    for t in range(25):
        passing = person(-1500 + 125 * t, 2000)
        dancer = person(10 * (t % 2), 3500)
        frames.append([passing] if 10 <= t <= 14 else [passing, dancer])
    frames[0] = [person(0, 3500)]  # the dancer is alone at first
    tracks = follow(*frames)
    assert np.abs(pelvis(tracks)).max() <= 10
    assert tracks.gaps == (Gap(0, 10, 14, filled=True),)


def test_a_short_absence_is_interpolated_and_reported(caplog):
    walk = [[person(20.0 * t)] for t in range(12)]
    walk[4] = walk[5] = walk[6] = []
    with caplog.at_level(logging.WARNING):
        tracks = follow(*walk)
    np.testing.assert_allclose(pelvis(tracks), 20.0 * np.arange(12), atol=1e-3)
    np.testing.assert_allclose(tracks.joints[5, 0], person(100.0)[0], atol=1e-3)
    assert tracks.gaps == (Gap(0, 4, 6, filled=True),)
    assert tracks.rows[:, 0].tolist() == [0, 0, 0, 0, -1, -1, -1, 0, 0, 0, 0, 0]
    assert caplog.messages == ["person 0: seen in 9 of 12 frames; not in 4-6 interpolated"]


@pytest.mark.parametrize(("missing", "filled"), [(8, True), (9, False)])
def test_half_a_second_is_the_longest_absence_filled(missing, filled):
    frames = [[person(0)]] * 3 + [[]] * missing + [[person(0)]] * 3
    tracks = follow(*frames)
    assert tracks.gaps == (Gap(0, 3, 2 + missing, filled),)
    assert (tracks.joints[3 : 3 + missing] != 0).any() == filled


def test_the_longest_absence_filled_can_be_set():
    frames = [[person(0)], [], [], [person(0)]]
    assert follow(*frames, max_gap=1).gaps == (Gap(0, 1, 2, filled=False),)
    assert follow(*frames, max_gap=2).gaps == (Gap(0, 1, 2, filled=True),)


def test_nobody_in_the_first_frames_is_reported_and_left_empty(caplog):
    with caplog.at_level(logging.WARNING):
        tracks = follow([], [], [person(5)], [person(6)])
    assert pelvis(tracks).tolist() == [0, 0, 5, 6]
    assert tracks.gaps == (Gap(0, 0, 1, filled=False),)
    assert caplog.messages == ["person 0: seen in 2 of 4 frames; not in 0-1 empty"]


def test_a_person_who_leaves_and_returns_is_the_same_person():
    other = person(-900, 5000)
    frames = [[person(900 + 80 * t), other] for t in range(8)]
    frames += [[other]] * 20
    frames += [[other, person(1500 - 80 * t)] for t in range(8)]
    tracks = follow(*frames)
    assert pelvis(tracks)[0] == 900 and pelvis(tracks)[28] == 1500
    assert tracks.gaps == (Gap(0, 8, 27, filled=False),)
    assert tracks.cuts == ()


def test_a_person_of_another_size_is_not_taken_for_the_one_who_left():
    frames = [[person(100)]] * 5 + [[]] * 20 + [[person(100, size=0.6)]] * 5
    tracks = follow(*frames, persons=2)
    assert tracks.gaps[0] == Gap(0, 5, 29, filled=False)
    assert pelvis(tracks, 1).tolist() == [0] * 25 + [100] * 5


def test_an_implausible_place_right_after_is_not_believed():
    still = person(-1000, 4000)
    frames = [[person(0), still]] * 5 + [[person(2500), still]] * 5
    tracks = follow(*frames)
    assert pelvis(tracks).tolist() == [0] * 5 + [0] * 5
    assert tracks.gaps == (Gap(0, 5, 9, filled=False),)


def test_one_wild_frame_is_left_out_and_filled():
    frames = [[person(10.0 * t)] for t in range(9)]
    frames[4] = [person(-3000)]
    tracks = follow(*frames)
    np.testing.assert_allclose(pelvis(tracks), 10.0 * np.arange(9), atol=1e-3)
    assert tracks.gaps == (Gap(0, 4, 4, filled=True),)


def test_a_film_cut_is_followed_and_reported(caplog):
    frames = [[person(-1200)]] * 6 + [[]] + [[person(1200, 2500)]] * 6
    with caplog.at_level(logging.WARNING):
        tracks = follow(*frames)
    assert pelvis(tracks).tolist() == [-1200] * 6 + [0] + [1200] * 6
    assert tracks.cuts == ((0, 7),)
    assert tracks.gaps == (Gap(0, 6, 6, filled=False),)  # nothing slides across a cut
    assert caplog.messages == [
        "person 0: seen in 12 of 13 frames; not in 6 empty; followed across a cut at 7"
    ]


def test_joints_that_are_not_finite_are_filled_one_by_one():
    frames = [[person(20.0 * t)] for t in range(6)]
    frames[2][0][0][20] = np.nan
    frames[3][0][0][20, 1] = np.inf
    frames[4][0][0][7] = 0
    tracks = follow(*frames)
    want = np.stack([person(20.0 * t)[0] for t in range(6)])
    np.testing.assert_allclose(tracks.joints[:, 0], want, atol=1e-3)
    assert tracks.lost_joints == 3
    assert tracks.gaps == ()


def test_a_joint_that_is_never_known_stays_empty_and_the_rest_is_followed():
    frames = [[person(0)] for _ in range(4)]
    for frame in frames:
        frame[0][0][0] = np.nan  # the pelvis itself
    tracks = follow(*frames)
    assert (tracks.joints[:, 0, 0] == 0).all()
    np.testing.assert_array_equal(tracks.joints[:, 0, 1:], [person(0)[0][1:]] * 4)


def test_a_detection_of_nan_or_zeros_counts_as_nobody():
    ghost = person(0)
    broken = [np.full((24, 3), np.nan, np.float32), np.zeros((24, 3), np.float32)]
    frames = [[ghost]] + [[(pose, ghost[1])] for pose in broken] + [[ghost]]
    assert follow(*frames).gaps == (Gap(0, 1, 2, filled=True),)
    no_box = (ghost[0], np.full(5, np.nan, np.float32))
    assert follow([ghost], [no_box], [ghost]).gaps == (Gap(0, 1, 1, filled=True),)


def test_a_video_of_one_frame_works():
    tracks = follow([person(3)])
    np.testing.assert_array_equal(tracks.joints, person(3)[0][None, None])
    assert (tracks.gaps, tracks.cuts) == ((), ())


def test_columns_without_a_person_are_empty_and_reported(caplog):
    with caplog.at_level(logging.WARNING):
        tracks = follow([person(3)], [person(3)], persons=2)
    assert tracks.joints.shape == (2, 2, 24, 3)
    assert (tracks.joints[:, 1] == 0).all()
    assert tracks.gaps == (Gap(1, 0, 1, filled=False),)
    assert caplog.messages == ["person 1: seen in 0 of 2 frames; not in 0-1 empty"]


def test_absent_persons_are_not_drawn():
    tracks = follow([person(3)], [], [], [], [], max_gap=0)
    drawn = [len(bones(frame, palettes(1)).start) for frame in tracks.joints]
    assert drawn == [13, 0, 0, 0, 0]


def test_nobody_in_the_whole_video_says_where_it_looked():
    with pytest.raises(NobodyFound, match=r"any of the 7 frames looked at \(0 to 6; 0"):
        follow(*[[]] * 7)
    nothing = [(np.full((24, 3), np.nan, np.float32), person(0)[1])]
    with pytest.raises(NobodyFound, match="2 detections"):
        follow(nothing, nothing)


@pytest.mark.parametrize(
    ("options", "found"),
    [({"persons": 0}, "0 persons"), ({"max_gap": -1}, "gaps of -1")],
)
def test_impossible_wishes_are_refused(options, found):
    with pytest.raises(BadRequest, match=found):
        follow([person(0)], **options)


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf")])
def test_an_impossible_frame_rate_is_refused(fps):
    with pytest.raises(BadRequest, match="fps"):
        track(*detections([person(0)]), HEIGHT, WIDTH, fps)


def test_joints_and_boxes_must_belong_together():
    joints, boxes = detections([person(0)], [person(0)])
    with pytest.raises(BadMedia, match="joints of 2 frames and boxes of 1"):
        track(joints, boxes[:1], HEIGHT, WIDTH, FPS)
    with pytest.raises(BadMedia, match="joints of 1 persons and boxes of 0"):
        track(joints, [boxes[0], boxes[1][:0]], HEIGHT, WIDTH, FPS)
    with pytest.raises(BadMedia, match="joints of 0 frames"):
        track([], [], HEIGHT, WIDTH, FPS)


def test_the_arrays_given_are_not_changed():
    joints, boxes = detections([person(0)], [], [person(50)])
    joints[2][0, 3] = np.nan
    before = [array.copy() for array in (*joints, *boxes)]
    tracks = track(joints, boxes, HEIGHT, WIDTH, FPS)
    tracks.joints[:] = -1
    for array, copy in zip((*joints, *boxes), before):
        np.testing.assert_array_equal(array, copy)
