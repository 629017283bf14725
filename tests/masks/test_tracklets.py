"""Boxes frame by frame -> the same person in one chain."""

import numpy as np
import pytest

from engine.masks.cuts import all_new, is_cut
from engine.masks.tracklets import joined, tracklets

FPS = 10.0


def box(x, height=100.0, width=40.0, score=0.9):
    return [x - width / 2, 200 - height, x + width / 2, 200.0, score]


def clip(*frames):
    return [np.array(frame, np.float64).reshape(-1, 5) for frame in frames]


def middles(chain):
    return ((chain.boxes[:, 0] + chain.boxes[:, 2]) / 2).tolist()


def follow(frames, first=0):
    return joined(tracklets(frames, FPS, first), FPS)


def test_boxes_in_any_order_are_two_persons():
    frames = clip(*([box(50 + t), box(300 - t)][:: -1 if t % 2 else 1] for t in range(10)))
    left, right = sorted(follow(frames, first=5), key=lambda chain: chain.boxes[0, 0])
    assert left.frames == right.frames == tuple(range(5, 15))
    assert middles(left) == [50 + t for t in range(10)]
    assert middles(right) == [300 - t for t in range(10)]
    assert left.at(4) is None and left.score(14) == 0.9 and left.score(15) == 0
    np.testing.assert_array_equal(left.at(7)[:2], [32, 100])


def test_who_walks_through_another_goes_on():
    frames = clip(*([box(100 + 8 * t), box(200 - 8 * t, 110)] for t in range(14)))
    found = follow(frames)
    assert sorted(len(chain.frames) for chain in found) == [14, 14]
    for chain in found:
        assert np.ptp(np.diff(middles(chain))) < 1e-9


@pytest.mark.parametrize(
    ("moved", "height", "is_same"),
    [(35, 100, True), (37, 100, False), (0, 129, True), (0, 131, False)],
)
def test_what_is_believed_from_one_frame_to_the_next(moved, height, is_same):
    """3 spreads of 0.06 + 0.6 / 10 of a height of 100, and a ratio of heights of 1.3."""
    frames = clip([box(100)], [box(100 + moved, height)])
    assert (len(tracklets(frames, FPS)) == 1) == is_same


def test_an_absence_of_half_a_second_does_not_end_a_tracklet():
    for gap, count in ((5, 1), (6, 2)):
        frames = clip([box(100)], *[[]] * gap, [box(100)])
        assert len(tracklets(frames, FPS)) == count
        assert len(follow(frames)) == 1  # but the person is the same


def test_who_returns_elsewhere_after_a_while_is_somebody_else():
    near = clip([box(100)], *[[]] * 20, [box(400)])
    assert len(follow(near)) == 1  # 3 heights in 2.1 s
    far = clip([box(100)], *[[]] * 20, [box(700)])
    assert len(follow(far)) == 2


def test_boxes_without_area_or_numbers_are_nobody():
    frames = clip([box(100), [0, 0, 0, 10, 0.9], [np.nan, 0, 1, 1, 0.9]])
    assert [len(chain.frames) for chain in follow(frames)] == [1]


def test_a_picture_that_changes_by_more_than_sixty_levels_is_a_cut():
    frame = np.full((8, 8, 3), 100, np.uint8)
    assert not is_cut(frame, frame + 60)
    assert is_cut(frame, frame + 61)
    assert is_cut(frame + 61, frame)


def test_all_are_new_only_if_nobody_stays():
    both = clip(*[[box(100), box(300)]] * 4, *[[box(200), box(400)]] * 4)
    assert all_new(tracklets(both, FPS)) == [4]
    one = clip(*[[box(100), box(300)]] * 4, *[[box(100), box(400)]] * 4)
    assert all_new(tracklets(one, FPS)) == []
    late = clip([], [], *[[box(100)]] * 4)
    assert all_new(tracklets(late, FPS)) == []
