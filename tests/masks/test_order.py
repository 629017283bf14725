"""Which person of the motion becomes which of the picture."""

import numpy as np
import pytest
import torch

from engine.errors import BadRequest, NobodyFound
from engine.masks.colours import BLACK, CLASSES, paint
from engine.masks.order import Found, by_appearance, match, other_order, read_who
from engine.masks.tracks import track


def found(*middles, first=None, width=900):
    boxes = np.array([[m - 40, 100, m + 40, 400] for m in middles], float).reshape(-1, 4)
    return Found(boxes, first or [0] * len(middles), (512, width))


@pytest.mark.parametrize(
    ("said", "who"),
    [("2,1", (2, 1)), ("red,blue", (2, 1)), (" Red ; 1 ", (2, 1)), ("3", (3,)),
     ("blue red green magenta cyan yellow", (1, 2, 3, 4, 5, 6))],
)  # fmt: skip
def test_persons_are_named_by_number_or_by_colour(said, who):
    assert read_who(said) == who


@pytest.mark.parametrize(
    ("said", "sentence"),
    [("7", "persons by number"), ("0,1", "persons by number"), ("", "persons by number"),
     ("white", "persons by number"), ("1,1", "names a person twice"),
     ("blue,1", "names a person twice"), ("1,2,3,4,5,6,1", "persons by number")],
)  # fmt: skip
def test_what_names_nobody_is_refused(said, sentence):
    with pytest.raises(BadRequest, match=sentence):
        read_who(said)


def test_persons_are_sorted_by_the_frame_they_come_in_and_from_left_to_right():
    assert by_appearance(found(500, 100, 300)) == [1, 2, 0]
    assert by_appearance(found(500, 100, 300, first=[0, 30, 0])) == [2, 0, 1]


def test_as_many_here_as_there_are_matched_in_order():
    assert match(found(100, 500), found(700, 800), "animation") == ((1, 2), None)


@pytest.mark.parametrize(("mode", "fate"), [("animation", "vanish"), ("replacement", "stay as")])
def test_of_too_many_those_are_taken_who_stand_nearest(mode, fate):
    who, note = match(found(800, 450, 100), found(120, 820), mode)
    assert who == (1, 3)
    assert "Of 3 persons of the video person 1 and person 3" in note
    assert f"The others {fate}" in note
    assert match(found(800, 450, 100), found(430), mode)[0] == (2,)


def test_squared_distances_are_matched_together_and_not_greedily():
    who, _ = match(found(0, 500, 900), found(450, 1000, width=1800), "animation")
    assert who == (1, 2)  # greedily 450 of 1800 would take 500 of 900's neighbour last
    two = Found(
        np.array([[30, 0, 50, 9], [50, 0, 70, 9], [220, 0, 240, 9]], float), [0] * 3, (9, 300)
    )
    near = Found(np.array([[50, 0, 70, 9], [70, 0, 90, 9]], float), [0] * 2, (9, 300))
    assert match(two, near, "animation")[0] == (1, 2)


def test_one_of_the_picture_replaces_whose_mask_is_most_like_it():
    who, note = match(found(500, 100), found(50), "replacement", overlaps=np.array([0.6, 0.2]))
    assert who == (2,)  # the one at 500 is second from the left
    assert "IoU 0.60" in note


def test_too_few_in_the_video_are_refused_with_both_counts():
    with pytest.raises(NobodyFound, match="1 persons were found in the video and 2 in the picture"):
        match(found(100), found(100, 200), "animation")
    with pytest.raises(NobodyFound, match="2 persons were found in the video and 0"):
        match(found(100, 200), found(), "replacement")
    with pytest.raises(BadRequest, match="7 persons are in the picture; at most 6"):
        match(found(*range(9)), found(*range(7)), "animation")


def mask(*squares, width=200):
    numbers = torch.full((100, width), BLACK, dtype=torch.uint8)
    for colour, left in squares:
        numbers[20:80, left : left + 30] = CLASSES[colour]
    return numbers


def test_persons_in_another_order_in_picture_and_video_are_told_with_the_cure():
    tracks = track(paint(mask(("blue", 20), ("red", 120)))[None], ("blue", "red"))
    assert other_order(tracks, mask(("blue", 10), ("red", 60))) == ()
    (warned,) = other_order(tracks, mask(("red", 10), ("blue", 60)))
    assert (warned.kind, warned.frame) == ("who", 0)
    assert warned.said.endswith("give who as 2,1.")
    assert other_order(tracks, mask(("red", 10))) == ()


def test_of_three_only_two_are_swapped():
    people = ("blue", "red", "green")
    tracks = track(paint(mask(("blue", 10), ("red", 70), ("green", 130)))[None], people)
    (warned,) = other_order(tracks, mask(("blue", 10), ("green", 70), ("red", 130)))
    assert warned.said.endswith("give who as 1,3,2.")
