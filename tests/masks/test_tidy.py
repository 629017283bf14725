"""Short gaps in what the network said of a person."""

import numpy as np
import torch

from engine.masks.follow import Followed
from engine.masks.stream import Seen
from engine.masks.tidy import paint_all

SIZE = (64, 64)


def followed(*places):
    """A person who is a block with its left side at each place; None: not seen."""
    held = Followed(len(places))
    for frame, x in enumerate(places):
        logits = torch.full(SIZE, -8.0)
        if x is not None:
            logits[10:50, x : x + 20] = 8
        held.keep(frame, 0, Seen(logits, -5.0 if x is None else 5.0))
    return held


def lefts(labels):
    return [int(np.flatnonzero(frame.any(0))[0]) if frame.any() else None for frame in labels]


def test_a_gap_is_filled_half_way_between_its_sides():
    labels, there = paint_all(followed(10, None, 14, None, None, 14), SIZE)
    assert lefts(labels) == [10, 12, 14, 14, 14, 14]
    assert there.all()
    np.testing.assert_array_equal(labels[3], labels[2])
    assert 780 < (labels[1] == 1).sum() <= 800  # corners are rounded


def test_gaps_that_are_long_or_across_which_nobody_is_the_same_stay():
    held = followed(10, None, None, None, 10, None, 40)
    labels, _ = paint_all(held, SIZE)
    assert lefts(labels) == [10, None, None, None, 10, None, 40]
    assert [event.said for event in held.events] == [
        "{0} is not seen in frames 1 to 3: look at the clip around it.",
        "{0} is not seen in frames 5 to 5: look at the clip around it.",
    ]


def test_entrances_and_exits_are_told():
    held = followed(None, None, 10, 10, None)
    paint_all(held, SIZE)
    assert [(event.frame, event.said.partition(":")[0]) for event in held.events] == [
        (2, "{0} enters at frame 2"),
        (4, "{0} leaves at frame 4"),
    ]


def test_a_mask_smaller_than_a_twentieth_of_a_percent_is_nobody():
    held = Followed(2)
    for frame, side in enumerate((1, 2)):  # of 4096 pixels, two are enough
        logits = torch.full(SIZE, -8.0)
        logits[:side, :side] = 8
        held.keep(frame, 0, Seen(logits, 5.0))
    assert [held.is_there(0, 0), held.is_there(1, 0)] == [False, True]


def test_of_two_who_overlap_whose_logit_is_larger_is_seen():
    held = Followed(1)
    for person, (left, most) in enumerate(((10, 4.0), (20, 6.0))):
        logits = torch.full(SIZE, -8.0)
        logits[10:50, left : left + 20] = most
        held.keep(0, person, Seen(logits, 5.0))
    labels, _ = paint_all(held, SIZE)
    assert labels[0, 30, 15] == 1 and labels[0, 30, 25] == 2 and labels[0, 30, 35] == 2
