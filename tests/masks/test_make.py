"""Masks of drawn dancers: who is followed, in which colour, and what is told of it.

The networks are stand-ins that know the drawn masks (tests/support/drawn_segmenter.py).
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.errors import BadMedia, BadRequest, Cancelled, NobodyFound
from engine.masks.corrections import parse_corrections, read_corrections
from engine.masks.kept import Clip, MaskMaker, MaskNetworks
from engine.masks.make import Driving, Wish, colour, look
from engine.masks.still import Picture, look_at_picture
from tests.support.drawn_segmenter import FPS, HEIGHT, WIDTH, draw, segmenter

LEFT, MIDDLE, RIGHT = 40, 96, 150


def still(x):
    return lambda t: x


def walk(start, speed):
    return lambda t: start + speed * t


def while_(path, is_there):
    return lambda t: path(t) if is_there(t) else None


def make_masks(driving, picture, model, finder, wish, *watched):
    looked = look(driving, picture, model, finder, wish, *watched)
    return colour(looked, driving, picture, wish)


def made(scene, picture=None, takes=None, shift=0, **wish):
    driving = Driving(scene.frames, FPS, "a video")
    wish = Wish(**{"mode": "animation", **wish})
    return make_masks(driving, picture, segmenter(scene, takes, shift), scene.finder, wish)


def picture(*middles, labels=None):
    """A picture with a labelled block for each person."""
    held = np.zeros((60, 120), np.uint8)
    for number, x in enumerate(middles):
        held[10:50, x - 8 : x + 8] = number + 1 if labels is None else labels[number]
    return Picture(np.zeros((60, 120, 3), np.uint8), "a picture", torch.from_numpy(held))


def iou(a, b):
    return (a & b).sum() / max((a | b).sum(), 1)


def worst(masks, scene, colours):
    """The least IoU of any person and frame, if person n has the label `colours[n - 1]`."""
    labels, owners = masks.labels.numpy(), scene.owners
    return min(
        iou(labels[t] == label, owners[t] == person)
        for person, label in enumerate(colours, 1)
        for t in range(len(owners))
        if (owners[t] == person).mean() > 0.005
    )


def kinds(masks):
    return [one.kind for one in masks.warned]


def test_two_persons_have_the_labels_from_left_to_right():
    scene = draw(8, still(RIGHT), still(LEFT))
    masks = made(scene)
    assert worst(masks, scene, (2, 1)) > 0.9
    assert masks.order == (1, 2) and masks.persons == 2
    assert kinds(masks) == []
    for label, person in ((1, 2), (2, 1)):
        rows, columns = np.nonzero(scene.owners[3] == person)
        want = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        np.testing.assert_allclose(masks.boxes[3, label - 1], want, atol=2)
    np.testing.assert_allclose(masks.scores, 1 / (1 + np.exp(-8)), rtol=1e-3)
    assert (masks.fps, masks.source_sha256, masks.model) == (FPS, "a video", "drawn")


def test_three_who_cross_keep_their_colours():
    scene = draw(50, walk(30, 2.6), walk(165, -2.6), still(MIDDLE), seed=3)
    masks = made(scene)
    assert worst(masks, scene, (1, 3, 2)) > 0.85
    assert "swap" not in kinds(masks) and "lost" not in kinds(masks)


def test_who_leaves_for_forty_frames_has_the_same_colour_when_back():
    scene = draw(70, while_(walk(RIGHT, 0), lambda t: t < 12 or t >= 52), still(LEFT))
    masks = made(scene)
    assert worst(masks, scene, (2, 1)) > 0.9
    assert not (masks.labels[12:52] == 2).any()
    assert masks.boxes[12:52, 1].isnan().all() and masks.scores[12:52, 1].isnan().all()
    away = [one for one in masks.warned if one.kind == "absent"]
    assert [(one.frame, "frames 12 to 51" in one.said) for one in away] == [(12, True)]
    assert away[0].said.startswith("Person 2 (red) is not seen")


def test_who_enters_late_comes_after_those_who_were_there():
    scene = draw(40, still(MIDDLE), while_(still(LEFT), lambda t: t >= 25), still(RIGHT))
    masks = made(scene)
    assert worst(masks, scene, (1, 3, 2)) > 0.9
    assert not (masks.labels[:25] == 3).any()
    assert [one.frame for one in masks.warned] == [25]
    assert "Person 3 (green) enters at frame 25" in masks.warned[0].said


def test_a_film_cut_begins_anew_and_matches_by_order_and_height():
    scene = draw(30, still(LEFT), still(RIGHT), rooms=lambda t: int(t >= 14))
    masks = made(scene)
    assert worst(masks, scene, (1, 2)) > 0.9
    cut = [one for one in masks.warned if one.kind == "cut"]
    assert [one.frame for one in cut] == [14]


def test_where_all_are_gone_and_all_are_new_the_film_was_cut():
    scene = draw(
        24,
        lambda t: 30 if t < 10 else 115,
        lambda t: RIGHT if t < 10 else 66,
    )
    masks = made(scene)
    assert [one.frame for one in masks.warned if one.kind == "cut"] == [10]
    # who was left is left again: the drawn ones have changed sides, which nobody can know
    labels = masks.labels.numpy()
    assert iou(labels[20] == 1, scene.owners[20] == 2) > 0.9
    assert iou(labels[20] == 2, scene.owners[20] == 1) > 0.9


@pytest.mark.parametrize(("gap", "is_filled"), [(1, True), (2, True), (3, False)])
def test_short_gaps_are_filled(gap, is_filled):
    scene = draw(16, still(LEFT))
    scene.boxes[6 : 6 + gap] = [np.empty((0, 5))] * gap
    masks = made(scene, takes=lambda one, t, told: None if 6 <= t < 6 + gap else one)
    assert bool((masks.labels[6] == 1).any()) == is_filled
    assert ("absent" in kinds(masks)) == (not is_filled)
    if is_filled:
        assert iou(masks.labels[6].numpy() == 1, scene.owners[6] == 1) > 0.6


def test_persons_whom_the_network_takes_for_each_other_are_reported():
    scene = draw(24, still(LEFT), still(RIGHT))
    masks = made(scene, takes=lambda one, t, told: 3 - one if t >= 12 else one)
    swaps = [one for one in masks.warned if one.kind == "swap"]
    assert [one.frame for one in swaps] == [12]
    assert swaps[0].said.startswith("Person 1 (blue) and person 2 (red) may be swapped")
    assert "lost" not in kinds(masks)


def test_two_frames_of_taking_one_for_the_other_are_no_swap():
    scene = draw(20, still(LEFT), still(RIGHT))
    masks = made(scene, takes=lambda one, t, told: 3 - one if t in (8, 9) else one)
    assert "swap" not in kinds(masks)


def test_who_is_lost_is_shown_again_and_found_from_there():
    scene = draw(30, still(LEFT), still(RIGHT))
    masks = made(scene, takes=lambda one, t, told: None if one == 2 and told < 12 <= t else one)
    lost = [one for one in masks.warned if one.kind == "lost"]
    assert [one.frame for one in lost] == [12]
    assert worst(masks, scene, (1, 2)) > 0.9


@pytest.mark.parametrize(("score", "lost"), [(0.9, [5]), (0.55, [])])
def test_who_is_lost_on_the_way_back_is_shown_again_where_a_box_is_sure(score, lost):
    scene = draw(30, still(LEFT), still(RIGHT))
    for boxes in scene.boxes[:10]:  # nobody is shown by these, and both by those of frame 10
        boxes[:, 4] = 0.45
    for boxes in scene.boxes[3:6]:
        boxes[boxes[:, 0] > MIDDLE, 4] = score
    masks = made(scene, takes=lambda one, t, told: None if one == 2 and t < 6 < told else one)
    assert [one.frame for one in masks.warned if one.kind == "lost"] == lost
    assert bool((masks.labels[2] == 2).any()) == bool(lost)


def test_persons_are_shown_again_five_times_and_no_more():
    scene = draw(60, still(LEFT))
    masks = made(scene, takes=lambda one, t, told: None if t > told + 2 else one)
    assert kinds(masks).count("lost") == 5
    assert (masks.labels[59] == 1).sum() == 0


def test_masks_that_are_off_by_little_are_believed():
    scene = draw(16, still(LEFT), still(RIGHT))
    masks = made(scene, shift=3)
    assert kinds(masks) == []
    assert 0.5 < worst(masks, scene, (1, 2)) < 0.9


def test_the_largest_are_followed_where_fewer_are_wanted():
    scene = draw(10, still(LEFT), still(RIGHT))
    areas = [(scene.owners[0] == person).sum() for person in (1, 2)]
    masks = made(scene, persons=1)
    boxes = [box for frame in scene.boxes[:1] for box in frame]
    largest = max(boxes, key=lambda box: (box[2] - box[0]) * (box[3] - box[1]))
    middle = (largest[0] + largest[2]) / 2
    assert masks.persons == 1 and min(areas) > 0
    assert abs((masks.boxes[0, 0, 0] + masks.boxes[0, 0, 2]) / 2 - middle) < 3
    assert "the largest 1 are followed" in masks.warned[0].said


@pytest.mark.parametrize("count", [-1, 0, 7])
def test_more_persons_than_colours_are_refused(count):
    scene = draw(2, still(LEFT))
    with pytest.raises(BadRequest, match=f"{count} persons are wanted; 1 to 6 have colours"):
        made(scene, persons=count)


def test_a_video_of_seven_says_that_one_must_choose():
    scene = draw(3, *(still(14 + 27 * n) for n in range(7)))
    with pytest.raises(BadRequest, match="shows 7 persons; at most 6 have colours"):
        made(scene)
    assert made(scene, persons=6).persons == 6


def test_a_video_of_fewer_than_the_picture_is_refused_before_the_network_runs():
    scene = draw(4, still(LEFT))
    model = segmenter(scene)
    with pytest.raises(BadRequest, match="shows 1 person and 2 are wanted"):
        make_masks(
            Driving(scene.frames, FPS, ""), picture(20, 90), model, scene.finder, Wish("animation")
        )
    assert model.network.calls == []


def test_nobody_in_the_video_is_told():
    scene = draw(4, still(LEFT))
    scene.blind = set(range(4))
    with pytest.raises(NobodyFound, match="Nobody was found in 4 frames"):
        made(scene)


def test_a_box_whom_the_network_never_sees_is_told():
    scene = draw(4, still(LEFT))
    scene.owners[:] = 0
    scene.owners[:, 5, 5] = 1
    with pytest.raises(NobodyFound, match="none of them could be cut out"):
        made(scene)


def test_persons_follow_those_of_the_picture_in_order():
    scene = draw(4, still(RIGHT), still(LEFT))
    masks = made(scene, picture(20, 90))
    assert worst(masks, scene, (2, 1)) > 0.9
    assert masks.image_sha256 == "a picture"
    assert masks.reference.unique().tolist() == [0, 1, 2]


def test_colours_of_the_pictures_mask_are_kept():
    scene = draw(4, still(RIGHT), still(LEFT))
    masks = made(scene, picture(20, 90, labels=(2, 5)))
    assert worst(masks, scene, (5, 2)) > 0.9
    assert masks.order == (0, 1, 0, 0, 2)


def test_who_says_whom_the_picture_takes_the_places_of():
    scene = draw(4, still(RIGHT), still(LEFT))
    assert worst(made(scene, picture(20, 90), who=(2, 1)), scene, (1, 2)) > 0.9
    masks = made(scene, picture(60), who=(2,), persons=2)
    assert masks.order == (2,) and not (masks.labels == 2).any()
    assert iou(masks.labels[0].numpy() == 1, scene.owners[0] == 1) > 0.9


@pytest.mark.parametrize("who", [(1, 2, 3), (3,), (4, 1)])
def test_a_who_that_does_not_fit_is_refused(who):
    scene = draw(4, still(RIGHT), still(LEFT))
    with pytest.raises(BadRequest, match="2 persons of the video were followed and 2 of them"):
        made(scene, picture(20, 90), who=who, persons=2)


def test_of_more_in_the_video_those_nearest_to_the_pictures_are_coloured():
    scene = draw(4, still(LEFT), still(MIDDLE), still(RIGHT))
    masks = made(scene, picture(60, 95), persons=3)
    assert iou(masks.labels[0].numpy() == 1, scene.owners[0] == 2) > 0.9
    assert iou(masks.labels[0].numpy() == 2, scene.owners[0] == 3) > 0.9
    assert masks.persons == 2 and kinds(masks) == ["who"]
    assert "The others vanish" in masks.warned[0].said


def test_one_of_the_picture_replaces_whom_it_covers_best():
    scene = draw(4, still(LEFT), still(RIGHT))
    masks = made(scene, picture(95), mode="replacement")
    assert iou(masks.labels[0].numpy() == 1, scene.owners[0] == 2) > 0.9
    assert "covers the person of the picture best" in masks.warned[0].said


def test_one_of_the_picture_that_covers_nobody_replaces_the_most_prominent():
    scene = draw(4, still(20), still(MIDDLE + 10))
    apart = picture(60)
    apart.labels[:] = 0
    apart.labels[1:3, 100:110] = 1
    masks = made(scene, apart, mode="replacement")
    assert iou(masks.labels[0].numpy() == 1, scene.owners[0] == 2) > 0.9
    assert "is the largest and most central" in masks.warned[0].said


def test_the_persons_of_a_picture_are_found_from_left_to_right():
    scene = draw(1, still(RIGHT), still(LEFT), still(MIDDLE))
    shown = Picture(scene.frames[0], "a picture")
    found = look_at_picture(shown, segmenter(scene), scene.finder, None)
    assert found.numbers == (1, 2, 3)
    for label, person in ((1, 2), (2, 3), (3, 1)):
        assert iou(found.labels.numpy() == label, scene.owners[0] == person) > 0.9
    assert look_at_picture(shown, segmenter(scene), scene.finder, 2).numbers == (1, 2)
    scene.blind = {0}
    with pytest.raises(NobodyFound, match="Nobody was found in the picture"):
        look_at_picture(shown, segmenter(scene), scene.finder, None)


def test_a_picture_of_seven_is_refused():
    scene = draw(1, *(still(14 + 27 * n) for n in range(7)))
    with pytest.raises(BadRequest, match="picture shows 7 persons; at most 6"):
        look_at_picture(Picture(scene.frames[0], ""), segmenter(scene), scene.finder, None)


@pytest.mark.parametrize("form", ["box", "points", "mask"])
def test_corrections_are_replayed(form, tmp_path):
    scene = draw(20, still(LEFT), still(RIGHT))
    scene.boxes = [np.empty((0, 5)) if t >= 8 else boxes for t, boxes in enumerate(scene.boxes)]

    def takes(one, t, told):
        return None if one == 2 and t >= 10 > told else one

    assert not (made(scene, takes=takes).labels[15] == 2).any()
    rows, columns = np.nonzero(scene.owners[14] == 2)
    said = {
        "box": [int(side) for side in (columns.min(), rows.min(), columns.max(), rows.max())],
        "points": [[int(columns[500]), int(rows[500]), True]],
        "mask": (scene.owners[14] == 2).astype(int).tolist(),
    }
    corrections = [{"frame": 14, "person": 2, form: said[form]}]
    (tmp_path / "said.json").write_text(json.dumps(corrections))
    masks = made(scene, takes=takes, corrections=read_corrections(tmp_path / "said.json"))
    for t in (14, 15, 19):
        assert iou(masks.labels[t].numpy() == 2, scene.owners[t] == 2) > 0.9
    assert not (masks.labels[13] == 2).any()


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({}, "no list"),
        ([3], "has not one of box, points, mask"),
        ([{"frame": 0, "person": 1}], "has not one of"),
        ([{"frame": 0, "person": 1, "box": [0, 0, 1, 1], "points": []}], "has not one of"),
        ([{"frame": 0, "person": 1, "box": [0, 0, 1, 1], "more": 1}], "has 'more'"),
        ([{"frame": -1, "person": 1, "box": [0, 0, 1, 1]}], "frame is -1"),
        ([{"frame": True, "person": 1, "box": [0, 0, 1, 1]}], "frame is True"),
        ([{"frame": 0, "person": 7, "box": [0, 0, 1, 1]}], "1 to 6 is expected"),
        ([{"frame": 0, "person": 1, "box": [0, 0, 0, 1]}], "x1 < x2"),
        ([{"frame": 0, "person": 1, "box": [0, 0, 1]}], "no list of 4 numbers"),
        ([{"frame": 0, "person": 1, "box": [0, 0, "1", 1]}], "something else than numbers"),
        ([{"frame": 0, "person": 1, "box": [0, 0, 10**400, 1]}], "something else than numbers"),
        ([{"frame": 0, "person": 1, "points": [[10**400, 2, True]]}], "else than numbers"),
        ([{"frame": 0, "person": 1, "points": [[float("nan"), 2, True]]}], "else than numbers"),
        ([{"frame": 0, "person": 1, "mask": [[10**400]]}], "no picture of 0 and 1"),
        ([{"frame": 0, "person": 1, "points": [[1, 2, False]]}], "none of its points"),
        ([{"frame": 0, "person": 1, "points": [[1, 2]]}], "true or false"),
        ([{"frame": 0, "person": 1, "mask": [[0, 2]]}], "no picture of 0 and 1"),
        ([{"frame": 0, "person": 1, "mask": [[0], [0, 1]]}], "rows of different lengths"),
        ([{"frame": 0, "person": 1, "mask": "/etc/passwd"}], "no name of a picture"),
        ([{"frame": 0, "person": 1, "mask": "../a.png"}], "no name of a picture"),
    ],
)  # fmt: skip
def test_corrections_that_are_none_are_refused(said, why, tmp_path):
    with pytest.raises(BadRequest, match=why):
        parse_corrections(said, tmp_path)


def test_corrections_of_another_clip_are_refused():
    scene = draw(4, still(LEFT))
    late = parse_corrections([{"frame": 4, "person": 1, "box": [0, 0, 1, 1]}])
    with pytest.raises(BadRequest, match="of frame 4; the clip has 0 to 3"):
        made(scene, corrections=late)
    small = parse_corrections([{"frame": 0, "person": 1, "mask": [[0, 1]]}])
    with pytest.raises(BadRequest, match=f"2x1; {WIDTH}x{HEIGHT}"):
        made(scene, corrections=small)
    for form, said in {
        "box": [WIDTH, 0, WIDTH + 9, 9], "points": [[3, 3, True], [3, -1, False]],
    }.items():  # fmt: skip
        outside = parse_corrections([{"frame": 0, "person": 1, form: said}])
        with pytest.raises(BadRequest, match=f"of frame 0 lies outside .* {WIDTH}x{HEIGHT}"):
            made(scene, corrections=outside)
    with pytest.raises(BadMedia):
        parse_corrections([{"frame": 0, "person": 1, "mask": "none.png"}], Path("/nowhere"))


class Networks:
    """Networks of a scene; counts how often they are asked for."""

    def __init__(self, scene):
        self.scene, self.files, self.loaded = scene, ["a"], 0

    def of(self):
        return MaskNetworks(lambda: self.files, self.segmenter, lambda: self.scene.finder)

    def segmenter(self):
        self.loaded += 1
        return segmenter(self.scene)


def test_masks_of_the_same_files_are_found_again(tmp_path):
    scene = draw(5, still(RIGHT), still(LEFT))
    networks = Networks(scene)
    maker = MaskMaker(networks.of(), tmp_path)
    clip, shown = Clip("a video", (HEIGHT, WIDTH), 5, FPS), picture(20, 90)

    def masks(**wish):
        wish = Wish(**{"mode": "animation", **wish})
        return maker.masks(clip, lambda: scene.frames, shown, wish)

    first, again, other = masks(), masks(), masks(who=(2, 1))
    assert networks.loaded == 1
    for name in ("labels", "boxes", "scores", "reference"):
        torch.testing.assert_close(
            getattr(again, name), getattr(first, name), rtol=0, atol=0, equal_nan=True
        )
    assert again.warned == first.warned and again.order == (1, 2) and other.order == (2, 1)
    assert worst(other, scene, (1, 2)) > 0.9
    masks(grow=2)
    networks.files = ["b"]
    masks()
    assert networks.loaded == 3


def test_a_refusal_before_looking_costs_nothing(tmp_path):
    scene = draw(2, still(LEFT))
    networks = Networks(scene)

    def refuse():
        raise BadRequest("too slow")

    with pytest.raises(BadRequest, match="too slow"):
        MaskMaker(networks.of(), tmp_path).masks(
            Clip("", (HEIGHT, WIDTH), 2, FPS), lambda: scene.frames, None, Wish("animation"),
            about_to_look=refuse,
        )  # fmt: skip
    assert networks.loaded == 0 and scene.asked == 0


def test_a_job_that_is_called_off_ends_between_two_frames():
    scene = draw(6, still(LEFT))
    asked = []

    def check():
        asked.append(1)
        if len(asked) == 9:
            raise Cancelled("called off")

    model, done = segmenter(scene), []
    with pytest.raises(Cancelled):
        make_masks(
            Driving(scene.frames, FPS, ""), None, model, scene.finder, Wish("animation"), check,
            lambda what, count, total: done.append((what, count, total)),
        )  # fmt: skip
    assert len(model.network.calls) == 2  # six boxes, and two frames
    assert done == [("boxes", n, 6) for n in range(1, 7)] + [("masks", 1, 7), ("masks", 2, 7)]
