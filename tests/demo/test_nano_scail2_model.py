"""The nano SCAIL-2 does what each mode and each mask asks for, on scenes that it never saw."""

import pytest

from benchmarks.nano_scail2.judge import judge
from benchmarks.nano_scail2.perform import PRESET, exact, given, perform
from benchmarks.nano_scail2.scenes import HELD_OUT, MODES, plan, scene
from benchmarks.nano_scail2.suite import TOLD, held_out
from tests.support.compiled import STATE

LEAST_IOU = 0.6
LEAST_BACKGROUND_DB, LEAST_GAIN_DB = 22.0, 6.0
ALONE, PAIRS = 2, 3  # scenes


@pytest.fixture(scope="module")
def pipeline():
    return exact(PRESET.weights(STATE))


@pytest.fixture(scope="module")
def scenes():
    return {persons: list(held_out(persons, n)) for persons, n in ((1, ALONE), (2, PAIRS))}


@pytest.fixture(scope="module")
def verdicts(pipeline, scenes):
    """Judges the scenes of a mode and a number of persons, told in one way; each only once."""
    known = {}

    def judged(mode, persons, told="right"):
        if (mode, persons, told) not in known:
            known[mode, persons, told] = [
                judge(perform(pipeline, TOLD[told](given(true, mode)), seed), planned, true, mode)
                for seed, (planned, true) in enumerate(scenes[persons])
            ]
        return known[mode, persons, told]

    return judged


def mean_iou(verdicts):
    return sum(one.limb_iou for one in verdicts) / len(verdicts)


@pytest.mark.parametrize("mode", MODES)
def test_limbs_are_where_the_driving_video_has_them(verdicts, mode):
    assert mean_iou(verdicts(mode, 1)) >= LEAST_IOU
    assert mean_iou(verdicts(mode, 1, "shuffled dance")) < LEAST_IOU


@pytest.mark.parametrize("mode", MODES)
def test_people_have_the_colours_of_the_picture(verdicts, mode):
    assert all(one.right_colours for one in verdicts(mode, 1))


def test_the_room_is_that_of_the_video_in_replacement_alone(verdicts):
    kept, left = verdicts("replacement", 1), verdicts("animation", 1)
    for one, other in zip(kept, left, strict=True):
        assert one.background_db >= LEAST_BACKGROUND_DB
        assert one.background_db >= other.background_db + LEAST_GAIN_DB


@pytest.mark.parametrize("mode", MODES)
def test_masks_say_who_is_who(verdicts, mode):
    """A mask with its colours exchanged has people take each other's place."""
    assert sum(one.right_colours for one in verdicts(mode, 2)) >= PAIRS - 1
    swapped = verdicts(mode, 2, "swapped masks")
    assert sum(one.right_colours for one in swapped) <= PAIRS // 3


def test_a_scene_of_the_tests_is_one_that_nothing_was_trained_on(scenes):
    planned, true = scenes[1][0]
    again = scene(plan(HELD_OUT, persons=1))
    assert (again.driving.frames == true.driving.frames).all()
    assert planned.heroes == plan(HELD_OUT, persons=1).heroes
