"""What a reply tells of a request: marks in prompts, and never too much."""

import pytest

from engine.jobs.told import bounded
from tests.support.job_bodies import job


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("she walks | she jumps | she bows", 'The prompt has 3 parts between "|". WanVideoWrapper'),
        ("a|b", "The prompt has 2 parts"),
        ("she walks |", "The prompt has 2 parts"),
        ("[1] she walks [2] she jumps", 'shots that are marked like "[1]"'),
        ("a (red dress:1.3) dancer", 'weights like "(words:1.2)"'),
        ("a (red dress:.5) dancer", 'weights like "(words:1.2)"'),
    ],
)
def test_a_mark_that_divides_or_weighs_a_prompt_is_told(prompt, said):
    for action in ("generate", "validate"):
        (told,) = job(prompt=prompt, action=action).warnings
        assert said in told
    assert job(prompt=prompt).settings.prompt == prompt


@pytest.mark.parametrize(
    "prompt", ["she dances (alone)", "at 12:30 [noon]", "", "a (b) c: 3", "ratio 3:2 (wide)"]
)
def test_a_usual_prompt_is_told_nothing(prompt):
    assert job(prompt=prompt).warnings == ()


def test_weights_in_the_negative_prompt_are_told_too():
    (told,) = job(negative_prompt="(blurry:1.4), low quality").warnings
    assert "weights" in told


def test_a_long_prompt_of_brackets_is_searched_in_one_pass():
    assert job(prompt="(" * 2048 + ":1" * 1024).warnings == ()


def test_what_is_told_is_bounded_in_number_and_in_length():
    few = ("a.", "b.")
    assert bounded(few) == few
    many = bounded([f"{n}." for n in range(100)])
    assert (len(many), many[18], many[19]) == (20, "18.", "81 more warnings are left out.")
    (long,) = bounded(["x" * 10**6])
    assert len(long) == 2000
    assert long.endswith("x...")


def test_a_million_unknown_fields_are_counted_and_ten_named():
    (told,) = job(**{f"x{n}": n for n in range(200_000)}).warnings
    assert told.endswith(", x9 and 199990 more.")
    (told,) = job(**{"y" * 10**6: 1}).warnings
    assert len(told) < 100
