"""Suite `nano-scail2`: the drawing itself is judged faultless, and what is worse as worse."""

import numpy as np
import pytest

from benchmarks.nano_scail2.forms import Staged, forms_figures, forms_table, rows_of
from benchmarks.nano_scail2.scenes import MODES
from benchmarks.nano_scail2.suite import held_out

FRAMES = 6  # of the scene's 17: the judge takes as many as a clip has


@pytest.fixture(scope="module")
def staged():
    ((planned, true),) = held_out(persons=2, count=1)
    return [Staged(planned, true, mode, seed=0) for mode in MODES]


@pytest.fixture(scope="module")
def drawn(staged):
    return [one.true.targets[one.mode].frames[:FRAMES] for one in staged]


@pytest.fixture(scope="module")
def faultless(staged, drawn):
    return list(rows_of("int8", "int8fp8", staged, drawn, drawn))


def test_the_drawing_itself_is_judged_faultless_in_both_modes(faultless):
    animation, replacement = faultless
    for row in faultless:
        assert row.limb_iou == 1
        assert (row.right_colours, row.clips) == (1, 1)
        assert row.exact_db > 100
    assert replacement.background_db > animation.background_db + 6


def test_a_grey_clip_loses_limbs_colours_and_the_room(staged, drawn, faultless):
    grey = [np.full_like(frames, 128) for frames in drawn]
    for row, best in zip(rows_of("int8", "int8", staged, grey, drawn), faultless, strict=True):
        assert row.limb_iou < 0.8 and row.exact_db < 40
        assert row.right_colours == 0
        assert row.mode == "animation" or row.background_db < best.background_db - 6


def test_every_figure_has_its_own_name_and_the_room_is_one_of_replacement_alone(faultless):
    names = [figure.name for figure in forms_figures(faultless)]
    assert len(set(names)) == len(names) == 7
    assert [name for name in names if name.endswith("room")] == ["int8 int8fp8 replacement room"]
    for mode in MODES:
        assert f"int8 int8fp8 {mode}" in forms_table(faultless)
