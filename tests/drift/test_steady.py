"""Segments that drift come back to where the clip began, and all others pass byte for byte."""

import cv2
import numpy as np
import pytest
import torch

from engine.drift.told import WARN
from tests.support.drift_scenes import (
    after,
    dancing,
    darker,
    figures,
    handed_on,
    outcomes,
    painted,
    paler,
    source_of,
)

FULL = (512, 896)
REGIONS = ["background", "person 1", "person 2"]


@pytest.fixture(scope="module")
def pair():
    """A full-size clip of two segments, as it should be."""
    held = dancing(2, 3, *FULL)
    return source_of(held), painted(held).split(3)


def residual(got, want):
    """The mean difference in levels."""
    return (got.int() - want.int()).abs().double().mean().item()


def test_five_levels_read_as_1_9_and_are_taken_back(pair):
    source, (first, second) = pair
    (_, got), steady = handed_on(source, [first, darker(second, 5)])
    assert sorted(figures(steady, 2)) == REGIONS
    for distance, _ in figures(steady, 2).values():
        assert distance == pytest.approx(1.9, abs=0.3)
    assert set(outcomes(steady, 2).values()) == {"corrected"}
    assert residual(darker(second, 5), second) > 4.9
    assert residual(got, second) <= 0.7


def test_a_tenth_less_chroma_reads_as_0_9_and_is_given_back(pair):
    source, (first, second) = pair
    pale = paler(second, 0.9)
    (_, got), steady = handed_on(source, [first, pale])
    for _, ratio in figures(steady, 2).values():
        assert ratio == pytest.approx(0.90, abs=0.02)
    assert residual(pale, second) > 1.5
    assert residual(got, second) <= 0.7


def test_frames_without_drift_pass_byte_for_byte(pair):
    source, parts = pair
    for drift in ("first", "previous", "none"):
        got, steady = handed_on(source, parts, drift)
        assert all(torch.equal(a, b) for a, b in zip(got, parts, strict=True))
        assert set(outcomes(steady, 2).values()) == {"steady"}
        assert max(after(steady)) < 0.3
        assert steady.notes == ()


def test_a_constant_clip_passes_byte_for_byte():
    held = dancing(1, 1).repeat(8, 1, 1)
    flat = torch.full((8, 96, 160, 3), 90, dtype=torch.uint8)
    got, _ = handed_on(source_of(held), [flat[:4], flat[4:]])
    assert torch.equal(torch.cat(got), flat)


def test_a_close_up_of_the_same_colours_passes_byte_for_byte():
    """A camera that comes nearer changes the mean of the frame, and drift is none of it."""
    held = dancing(2, 2, *FULL)
    frames = painted(held)

    def near(pictures):
        rows, columns = slice(96, 416), slice(168, 728)
        grown = [
            cv2.resize(one[rows, columns].numpy(), FULL[::-1], interpolation=cv2.INTER_NEAREST)
            for one in pictures
        ]
        return torch.from_numpy(np.stack(grown))

    held = torch.cat([held[:2], near(held[2:])])
    parts = [frames[:2], near(frames[2:])]
    got, steady = handed_on(source_of(held), parts)
    assert torch.equal(got[1], parts[1])
    assert outcomes(steady, 2) == {
        "background": "steady", "person 1": "share", "person 2": "share",
    }  # fmt: skip


@pytest.mark.parametrize("mode", ["animation", "replacement"])
def test_six_segments_each_darker_than_the_last_stay_what_the_first_is(mode):
    """The stand-in for the clip of the nano model in `test_nano_drift.py`."""
    held = dancing(6, 12)
    parts = [darker(part, 5 * n) for n, part in enumerate(painted(held).split(12))]
    _, kept = handed_on(source_of(held, mode=mode), parts)
    assert max(after(kept)) <= 1.5
    assert kept.notes == ()
    _, loose = handed_on(source_of(held, mode=mode), parts, "none")
    assert min(one.delta_e_after for one in loose.report[-1].regions) > 5
    assert {one.outcome for one in loose.report[-1].regions} == {"off"}
    assert "far off in segment 6 (frames 61 to 72)" in loose.notes[0]


def test_towards_the_segment_before_a_slow_fade_is_passed_on():
    """Steps below 1.5 are left: `first` sees their sum."""
    held = dancing(6, 6)
    parts = [darker(part, 3 * n) for n, part in enumerate(painted(held).split(6))]
    _, first = handed_on(source_of(held), parts)
    _, previous = handed_on(source_of(held), parts, "previous")
    assert max(after(first)) <= 1.5
    assert {one.outcome for one in previous.report[-1].regions} == {"steady"}
    assert min(one.delta_e for one in previous.report[-1].regions) > 5


def test_towards_the_segment_before_is_towards_it_as_it_was_corrected():
    held = dancing(3, 6)
    parts = [darker(part, 12 * n) for n, part in enumerate(painted(held).split(6))]
    _, steady = handed_on(source_of(held), parts, "previous")
    assert max(after(steady)) < 1.0


def test_the_background_of_a_replacement_is_brought_back_to_the_video_from_the_first_frame_on():
    held = dancing(2, 6)
    video = painted(held)
    parts = darker(video, 6).split(6)
    got, steady = handed_on(source_of(held, mode="replacement"), parts)
    assert outcomes(steady, 1) == {
        "background": "corrected", "person 1": "anchor", "person 2": "anchor",
    }  # fmt: skip
    assert {one.against for one in steady.report[0].regions} == {"driving video", "first segment"}
    wall = held == 0
    for made, want, where in zip(got, video.split(6), wall.split(6), strict=True):
        assert residual(made[where], want[where]) < 0.7
    people = held[:6] > 0
    inside = cv2.erode(people[0].byte().numpy(), np.ones((7, 7), np.uint8)) > 0
    assert torch.equal(got[0][0][inside], parts[0][0][inside])  # persons are the model's own
    _, animated = handed_on(source_of(held), parts)
    assert set(outcomes(animated, 1).values()) == {"anchor"}
    assert set(outcomes(animated, 2).values()) == {"steady"}


def test_the_background_of_a_replacement_may_change_as_that_of_the_video_does():
    held = dancing(2, 6)
    video = torch.cat([painted(held)[:6], darker(painted(held)[6:], 40)])
    _, steady = handed_on(source_of(held, video, "replacement"), video.split(6))
    assert outcomes(steady, 2)["background"] == "steady"
    assert outcomes(steady, 2)["person 1"] == "corrected"  # it has the light of the first segment


def test_only_regions_that_drifted_are_changed():
    held = dancing(2, 6)
    first, second = painted(held).split(6)
    drifted = second.where((held[6:] != 1)[..., None], darker(second, 20))
    (_, got), steady = handed_on(source_of(held), [first, drifted])
    assert outcomes(steady, 2) == {
        "background": "steady", "person 1": "corrected", "person 2": "steady",
    }  # fmt: skip
    person, square = (held[6] == 1).byte().numpy(), np.ones((3, 3), np.uint8)
    near, inside = cv2.dilate(person, square) > 0, cv2.erode(person, square) > 0
    assert torch.equal(got[0][~near], drifted[0][~near])
    assert residual(got[0][inside], second[0][inside]) < 0.7


def test_behind_a_film_cut_nothing_is_compared_with_what_was_before():
    held = dancing(3, 6)
    video = painted(held)
    video[9:] = darker(video[9:], 100)
    parts = [darker(part, 10 * n) for n, part in enumerate(painted(held).split(6))]
    got, steady = handed_on(source_of(held, video), parts)
    for segment in (2, 3):
        assert set(outcomes(steady, segment).values()) == {"cut"}
    assert torch.equal(got[2], parts[2])
    _, previous = handed_on(source_of(held, video), parts, "previous")
    assert set(outcomes(previous, 3).values()) == {"cut"}  # the cut is inside of the one before
    longer = dancing(4, 6)
    video = painted(longer)
    video[9:] = darker(video[9:], 100)
    parts = [darker(part, 10 * n) for n, part in enumerate(painted(longer).split(6))]
    _, previous = handed_on(source_of(longer, video), parts, "previous")
    assert set(outcomes(previous, 4).values()) == {"corrected"}


def test_persons_who_come_go_or_are_tiny_are_left_alone():
    held = dancing(2, 6, persons=3)
    held[:6][held[:6] == 2] = 0  # comes with the second segment
    held[6:][held[6:] == 3] = 0  # goes
    one = held == 1
    held[one] = 0
    held[:, 40:47, 20:27] = 1  # 7x7, 25 of them inside
    parts = [painted(held)[:6], darker(painted(held)[6:], 30)]
    _, steady = handed_on(source_of(held), parts)
    assert outcomes(steady, 2) == {
        "background": "corrected", "person 1": "small", "person 2": "new", "person 3": "absent",
    }  # fmt: skip
    assert figures(steady, 2)["person 2"] == figures(steady, 2)["person 3"] == (None, None)


def test_a_clip_without_persons_in_its_masks_passes_and_says_so():
    held = dancing(2, 6)
    parts = [painted(held)[:6], darker(painted(held)[6:], 30)]
    nobody = torch.zeros_like(held)
    got, steady = handed_on(source_of(nobody, painted(held)), parts)
    assert torch.equal(got[1], parts[1])
    assert steady.report == ()
    assert "No driving mask shows where somebody is" in steady.notes[0]
    _, asked_for = handed_on(source_of(nobody, painted(held)), parts, "none")
    _, short = handed_on(source_of(nobody, painted(held)), parts[:1])
    assert asked_for.notes == short.notes == ()


def test_a_clip_of_one_segment_passes_as_it_comes():
    held = dancing(1, 6)
    chunks = darker(painted(held), 30).split(3)
    got, steady = handed_on(source_of(held), [torch.cat(chunks)])
    assert torch.equal(got[0], torch.cat(chunks))
    assert (steady.report, steady.notes) == ((), ())


def test_a_job_can_be_called_off_while_colours_are_measured():
    held, asked = dancing(2, 6), []

    def check():
        asked.append(1)
        if len(asked) == 4:
            raise TimeoutError

    with pytest.raises(TimeoutError):
        handed_on(source_of(held), painted(held).split(6), check=check)


def test_what_cannot_be_taken_back_is_warned_of():
    held = dancing(2, 6)
    parts = [painted(held)[:6], darker(painted(held)[6:], 60)]
    _, steady = handed_on(source_of(held), parts)
    assert max(after(steady)) > WARN
    (told,) = steady.notes
    assert "differs from the first segment by dE" in told
    assert told.endswith("That is after the correction, which has limits.")
