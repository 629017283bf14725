"""Scenes of the nano SCAIL-2 and their judge: masks are exact, modes differ as they must."""

import cv2
import numpy as np
import pytest

from benchmarks.nano_scail2 import judge, scenes
from benchmarks.nano_scail2.scenes import BLACK, HELD_OUT, MODES, PALETTE, WHITE
from benchmarks.nano_scail2.seams import seams

FRAMES = 3
ALONE, PAIR = HELD_OUT, HELD_OUT + 2  # by how many persons they have


@pytest.fixture(scope="module")
def drawn():
    plans = {number: scenes.plan(number, FRAMES) for number in (ALONE, PAIR)}
    return {number: (plan, scenes.scene(plan)) for number, plan in plans.items()}


@pytest.mark.parametrize(("number", "persons"), [(ALONE, 1), (PAIR, 2)])
def test_a_pixel_is_of_the_person_who_covers_it(drawn, number, persons):
    planned, made = drawn[number]
    assert len(planned.heroes) == persons
    for person in range(persons):
        alone = scenes.put_into(
            planned.stage,
            planned.joints[[person], :1],
            scenes.layers(planned.dancers[person : person + 1], planned.joints[[person], :1]),
        )
        room = judge.empty_room(planned, "replacement")
        mine = made.driving.owners[0] == person + 1
        assert mine.sum() > 400
        assert not (mine & (alone.owners[0] == 0)).any()  # nobody is larger than alone
        far = cv2.erode(mine.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
        np.testing.assert_array_equal(made.driving.frames[0][far], alone.frames[0][far])
        away = judge.outside(alone.owners)[0] & (np.arange(scenes.HEIGHT) < 100)[:, None]
        np.testing.assert_array_equal(alone.frames[0][away], room[away])  # above all shadows


@pytest.mark.parametrize("mode", MODES)
def test_masks_hold_the_colours_of_their_mode_and_no_others(drawn, mode):
    for _, made in drawn.values():
        behind = {"animation": (BLACK, WHITE), "replacement": (WHITE, BLACK)}[mode]
        people = int(made.driving.owners.max())
        for mask, owners, ground in (
            (scenes.driving_mask(made, mode), made.driving.owners, behind[0]),
            (scenes.picture_mask(made, mode), made.picture.owners, behind[1]),
        ):
            found = {
                tuple(int(v) for v in colour) for colour in np.unique(mask.reshape(-1, 3), axis=0)
            }
            assert found == {ground, *PALETTE[:people]}
            for person, colour in enumerate(PALETTE[:people]):
                np.testing.assert_array_equal((mask == colour).all(-1), owners == person + 1)


def test_the_left_dancer_is_blue_and_its_hero_may_stand_anywhere(drawn):
    _, made = drawn[PAIR]
    columns = np.arange(scenes.WIDTH)
    centroids = [
        (made.driving.owners[0] == n).sum(0) @ columns / (made.driving.owners[0] == n).sum()
        for n in (1, 2)
    ]
    assert centroids[0] < centroids[1]
    places = {
        bool(np.diff(plan.pictured[:, 0, 0])[0] > 0)
        for plan in (scenes.plan(number, 1, persons=2) for number in range(8))
    }
    assert places == {True, False}


def test_modes_differ_in_the_room_and_not_in_the_people(drawn):
    for planned, made in drawn.values():
        animation, replacement = (made.targets[mode] for mode in MODES)
        np.testing.assert_array_equal(animation.owners, replacement.owners)
        inner = np.stack(
            [cv2.erode((one > 0).astype(np.uint8), np.ones((3, 3))) for one in animation.owners]
        )
        same = (animation.frames == replacement.frames).all(-1)[inner > 0]
        assert same.mean() > 0.95  # but where parts of a body meet and a little room shines through
        away = judge.outside(np.maximum(animation.owners, made.driving.owners))
        np.testing.assert_array_equal(replacement.frames[away], made.driving.frames[away])
        assert judge.judge(animation.frames, planned, made, "animation").background_db < 16


def test_a_scene_is_a_function_of_its_number(tmp_path):
    planned = scenes.plan(4)
    again = scenes.read(scenes.write(4, tmp_path))
    np.testing.assert_array_equal(again.driving.frames, scenes.scene(planned).driving.frames)
    assert again.driving.frames.shape == (scenes.FRAMES, scenes.HEIGHT, scenes.WIDTH, 3)
    assert scenes.plan(5).heroes != planned.heroes
    persons = [len(scenes.plan(number, 1).heroes) for number in range(30)]
    assert persons.count(2) == 10


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("number", [ALONE, PAIR])
def test_a_perfect_clip_is_judged_perfect(drawn, number, mode):
    planned, made = drawn[number]
    best = judge.judge(made.targets[mode].frames, planned, made, mode)
    assert best.limb_iou == 1.0 and best.psnr > 90
    assert best.right_colours and all(one.own < 0.2 for one in best.colours)
    assert (best.background_db > 90) == (mode == "replacement")


def test_who_goes_on_as_they_were_is_told_apart(drawn):
    """The driving video itself: the right limbs and the right room, and not the right people."""
    for planned, made in drawn.values():
        found = judge.judge(made.driving.frames, planned, made, "replacement")
        assert found.limb_iou > 0.7 and found.background_db > 90
        assert not found.right_colours
        assert all(one.follower < 0.3 < one.own for one in found.colours)


def test_heroes_in_each_others_place_are_told_apart(drawn):
    planned, made = drawn[PAIR]
    swapped = scenes.layers(planned.heroes[::-1], planned.joints)
    frames = scenes.put_into(planned.studio, planned.joints, swapped).frames
    found = judge.judge(frames, planned, made, "animation")
    assert not any(one.right for one in found.colours)
    assert all(one.others < 0.3 < one.own for one in found.colours)


def test_another_dance_and_an_empty_room_have_other_limbs(drawn):
    planned, made = drawn[ALONE]
    other = scenes.scene(scenes.plan(ALONE + 1, FRAMES))
    room = judge.empty_room(planned, "animation")
    empty = np.repeat(room[None], FRAMES, 0)
    assert judge.limb_iou(empty, made.targets["animation"].frames, planned, "animation") == 0.0
    owners = other.driving.owners[..., None] > 0
    moved = np.where(owners, other.driving.frames, room)
    assert judge.limb_iou(moved, made.targets["animation"].frames, planned, "animation") < 0.5


def test_a_clip_that_goes_on_is_smooth_and_one_that_skips_two_frames_is_not():
    planned = scenes.plan(HELD_OUT + 102, 31, persons=1)
    moving = scenes.layers(planned.heroes, planned.joints)
    clip = scenes.put_into(planned.studio, planned.joints, moving).frames
    starts = [17]
    found = seams(clip[:29], starts, planned, "animation")
    skipped = seams(np.delete(clip, [17, 18], axis=0), starts, planned, "animation")
    assert found.smooth and not skipped.smooth
    assert skipped.rgb > 1.3 * found.rgb
