"""The pairing of 2D persons with 3D persons."""

from dataclasses import replace

import numpy as np
import pytest

from engine.pose.match import FARTHEST_SHARE, match
from tests.support.dancers import CAMERA, HEIGHT, WIDTH, body, points

LEFT, RIGHT = body(-500), body(500)
NOBODY = np.zeros((24, 3), np.float32)
PARTS = ("body", "visible", "faces", "hands")


def matched(frame, *persons):
    """One frame; the columns of its 2D persons as given, -1 where nobody is."""
    (got,) = match([frame], np.stack([persons]), CAMERA, HEIGHT, WIDTH)
    return got


def check_columns(got, frame, *rows):
    """Column p holds row rows[p] of the frame; None: everything is hidden."""
    assert len(got.body) == len(rows)
    for p, row in enumerate(rows):
        for part in PARTS:
            column = getattr(got, part)[p]
            hidden = np.full_like(column, False if part == "visible" else -1)
            want = hidden if row is None else getattr(frame, part)[row]
            np.testing.assert_array_equal(column, want)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_persons_come_in_the_columns_of_their_joints(order):
    frame = points(*(np.stack([LEFT, RIGHT])[list(order)]))
    check_columns(matched(frame, LEFT, RIGHT), frame, *np.argsort(order))


def test_of_more_2d_than_3d_persons_the_nearest_is_taken():
    frame = points(RIGHT, body(-430), LEFT)
    check_columns(matched(frame, LEFT), frame, 2)


def test_who_was_not_detected_in_2d_is_hidden():
    frame = points(RIGHT)
    check_columns(matched(frame, LEFT, RIGHT), frame, None, 0)


def test_who_is_missing_in_3d_takes_nobody():
    frame = points(LEFT, RIGHT)
    check_columns(matched(frame, NOBODY, RIGHT), frame, None, 1)
    check_columns(matched(frame, NOBODY, NOBODY), frame, None, None)


def test_an_empty_frame_hides_everyone_whatever_the_detector_calls_a_body():
    for slots in (18, 24):
        empty = replace(
            points(), body=np.zeros((0, slots, 2), np.float32), visible=np.zeros((0, slots), bool)
        )
        got = matched(empty, LEFT, RIGHT)
        check_columns(got, empty, None, None)
        assert got.body.shape == (2, slots, 2)


def test_all_together_are_paired_and_not_each_with_the_nearest():
    # Both 2D persons are nearest to the first body; the pairing as a whole decides.
    frame = points(body(-100), body(0))
    check_columns(matched(frame, body(50), body(-400)), frame, 1, 0)


@pytest.mark.parametrize(("share", "is_taken"), [(0.9, True), (1.1, False)])
def test_a_quarter_of_the_longer_side_is_the_farthest_that_is_believed(share, is_taken):
    pixels = share * FARTHEST_SHARE * max(HEIGHT, WIDTH)
    frame = points(LEFT)
    moved = replace(frame, body=frame.body + np.float32([pixels / WIDTH, 0]))
    check_columns(matched(moved, LEFT), moved, 0 if is_taken else None)


def test_only_points_that_both_show_count():
    frame = points(LEFT, RIGHT)
    frame.body[0, 9:] = 50  # far off, but hidden
    frame.visible[0, 9:] = False
    arms = LEFT.copy()
    arms[[15, 12]] = 0  # a joint missing in 3D
    check_columns(matched(frame, arms), frame, 0)
    frame.visible[0] = False
    check_columns(matched(frame, LEFT), frame, None)


def test_joints_behind_the_camera_or_no_numbers_match_nothing():
    frame = points(LEFT)
    behind = LEFT * np.float32([1, 1, -1])
    check_columns(matched(frame, behind, np.full_like(LEFT, np.nan)), frame, None, None)
    check_columns(matched(frame, np.full_like(LEFT, np.inf), LEFT), frame, None, 0)


def test_2d_points_that_are_no_numbers_are_passed_over():
    frame = points(LEFT, RIGHT)
    frame.body[0, 3] = np.nan
    frame.body[1] = np.inf
    check_columns(matched(frame, RIGHT, LEFT), frame, None, 0)


def test_the_points_given_are_not_changed():
    frame = points(LEFT, RIGHT)
    before = [getattr(frame, part).copy() for part in PARTS]
    got = matched(frame, RIGHT, LEFT)
    for part in PARTS:
        getattr(got, part)[:] = 0
    for part, copy in zip(PARTS, before):
        np.testing.assert_array_equal(getattr(frame, part), copy)


def test_joints_and_keypoints_of_other_numbers_of_frames_are_refused():
    with pytest.raises(ValueError, match="zip"):
        match([points(LEFT)] * 2, LEFT[None, None], CAMERA, HEIGHT, WIDTH)
