"""A model is where it was settled, or comes for its use and leaves again."""

import pytest
import torch

from engine.machine.resident import Resident
from tests.support.planned_gpu import Moves


@pytest.fixture
def diary():
    return []


def test_a_model_that_stays_is_not_moved(diary):
    home = Moves(diary, "m").home
    with home.present():
        pass
    home.settle(stays=True)
    assert diary == []


def test_a_model_that_does_not_stay_is_there_while_it_is_used(diary):
    home = Moves(diary, "m").home
    home.settle(stays=False)
    assert diary == ["-m"]
    for _ in range(2):
        with home.present():
            diary.append("used")
    assert diary == ["-m", *["+m", "used", "-m"] * 2]
    home.settle(stays=False)
    home.settle(stays=True)
    home.settle(stays=True)
    assert diary[7:] == ["+m"]


def test_a_model_leaves_also_when_its_use_fails(diary):
    home = Moves(diary, "m").home
    home.settle(stays=False)
    with pytest.raises(KeyboardInterrupt), home.present():
        raise KeyboardInterrupt
    assert diary == ["-m", "+m", "-m"]


def test_a_model_that_arrives_in_part_leaves_again_and_may_be_tried_again(diary):
    model = Moves(diary, "m")
    model.home.settle(stays=False)
    model.fits = False
    with pytest.raises(torch.OutOfMemoryError), model.home.present():
        diary.append("used")
    with pytest.raises(torch.OutOfMemoryError):
        model.home.settle(stays=True)
    model.fits = True
    with model.home.present():
        diary.append("used")
    assert diary == ["-m", *["+m", "-m"] * 2, "+m", "used"]


def test_without_functions_a_model_is_used_and_left_where_it_is():
    home, diary = Resident(), []
    for stays in (False, True):
        home.settle(stays=stays)
        with home.present():
            diary.append(stays)
    assert diary == [False, True]
