"""Segment plans: the golden ones, and what every plan of every length has to keep."""

import json
from itertools import pairwise
from typing import get_args

import pytest
import torch

from engine.config import TRAINED_FRAMES
from engine.denoise.segments import (
    HISTORY_FRAMES,
    PLANS,
    Segment,
    ending,
    kept,
    plan,
    within_clip,
)
from engine.errors import BadRequest
from engine.flow import SegmentPlan

LENGTHS = range(1, 1200)
# the trained model, the shortest segments that a history allows, those of nano, longer histories
CUTS = [(81, 5), (13, 5), (17, 5), (33, 5), (25, 9), (65, 9), (5, 1)]


def clips(length, overlap):
    return LENGTHS if (length, overlap) == CUTS[0] else range(1, 5 * length)


def made(segments):
    """The frames that a clip is put together from, in order."""
    return [
        segment.start + frame
        for segment, part in zip(segments, kept(segments), strict=True)
        for frame in range(part.start, part.stop)
    ]


def dropped_tail(segments, frames):
    return frames - segments[-1].end


def test_a_plan_is_a_row_of_the_table_and_the_first_is_usual():
    assert get_args(SegmentPlan) == tuple(PLANS)
    assert next(iter(PLANS)) == "even"


@pytest.mark.golden
def test_the_golden_plans_are_made(golden):
    stored = json.loads((golden / "scail2" / "segments.json").read_text())
    assert len(stored) == 13
    for frames, plans in stored.items():
        ends = {
            name: [[s.start, s.end] for s in plan(name, int(frames))]
            for name in ("official", "sat")
        }
        cover = plan("cover", int(frames))
        whole = [[s.start, s.end, s.frames, s.history_frames] for s in cover]
        assert ends | {"cover": whole} == plans


def test_200_frames_are_three_segments_of_the_trained_model():
    assert plan("even", 200) == [
        Segment(0, 73, 73, 0),
        Segment(64, 137, 73, 5),
        Segment(128, 200, 73, 5),
    ]
    assert kept(plan("even", 200)) == [slice(0, 69), slice(5, 69), slice(5, 72)]


def test_one_frame_more_than_fits_is_two_equal_segments():
    assert plan("even", 82) == [Segment(0, 65, 65, 0), Segment(20, 82, 65, 5)]


def test_starts_of_even_segments_are_rounded_halves_to_even():
    assert [s.start for s in plan("even", 326)] == [0, 64, 128, 192, 256]
    assert [s.start for s in plan("even", 161)] == [0, 48, 96]
    halves = plan("even", 234)  # (237 - 65) / 3 = 57.33
    assert [s.start for s in halves] == [0, 57, 115, 172]


@pytest.mark.parametrize(("length", "overlap"), CUTS)
@pytest.mark.parametrize("name", ["even", "cover"])
def test_every_frame_is_made_once(name, length, overlap):
    for frames in clips(length, overlap):
        assert made(plan(name, frames, length, overlap)) == list(range(frames))


@pytest.mark.parametrize(("length", "overlap"), CUTS)
@pytest.mark.parametrize("name", ["official", "sat"])
def test_plans_of_the_official_programs_make_every_frame_but_a_tail_once(name, length, overlap):
    for frames in clips(length, overlap):
        segments = plan(name, frames, length, overlap)
        assert made(segments) == list(range(segments[-1].end))
        assert 0 <= dropped_tail(segments, frames) <= length - overlap - (name == "official")


@pytest.mark.parametrize(("length", "overlap"), CUTS)
@pytest.mark.parametrize("name", ["even", "cover", "official", "sat"])
def test_segments_are_of_lengths_that_the_model_takes(name, length, overlap):
    for frames in clips(length, overlap):
        for segment in plan(name, frames, length, overlap):
            assert segment.frames % 4 == 1
            assert segment.frames <= length
            assert 0 <= segment.frames - (segment.end - segment.start) <= 3


@pytest.mark.parametrize(("length", "overlap"), CUTS)
@pytest.mark.parametrize("name", PLANS)
def test_the_first_segment_has_no_history_and_the_others_all_of_it(name, length, overlap):
    for frames in clips(length, overlap):
        first, *later = plan(name, frames, length, overlap)
        assert first.history_frames == 0
        assert {s.history_frames for s in later} <= {overlap}


@pytest.mark.parametrize(("length", "overlap"), CUTS)
def test_there_are_as_few_even_segments_as_can_be(length, overlap):
    for frames in clips(length, overlap):
        count = len(plan("even", frames, length, overlap))
        padded = -(-(frames - 1) // 4) * 4 + 1
        assert count * length - (count - 1) * overlap >= padded
        assert count == 1 or (count - 1) * length - (count - 2) * overlap < padded


@pytest.mark.parametrize(("length", "overlap"), CUTS)
def test_even_segments_are_of_one_length_and_history_is_never_made_of_history(length, overlap):
    for frames in clips(length, overlap):
        segments = plan("even", frames, length, overlap)
        assert len({segment.frames for segment in segments}) == 1
        for before, after in pairwise(segments):
            assert after.start >= before.history.stop
            assert after.history.stop <= before.start + before.frames
            assert after.history.stop <= before.end


def test_even_segments_of_the_trained_model_overlap_5_to_45_and_have_at_least_65_frames():
    overlaps, lengths = set(), set()
    for frames in range(82, 1200):
        segments = plan("even", frames)
        lengths |= {segment.frames for segment in segments}
        overlaps |= {
            before.start + before.frames - after.start for before, after in pairwise(segments)
        }
    assert (min(overlaps), max(overlaps)) == (5, 45)
    assert lengths == set(range(65, 82, 4)) & lengths
    assert min(lengths) == 65


def test_most_work_for_a_frame_of_a_long_clip_is_at_82_frames():
    work = {frames: sum(s.frames for s in plan("even", frames)) / frames for frames in LENGTHS}
    long = {frames: share for frames, share in work.items() if frames > TRAINED_FRAMES}
    assert max(long, key=long.__getitem__) == 82
    assert long[82] == pytest.approx(1.59, abs=0.01)


def test_the_history_of_a_segment_is_the_end_of_what_was_kept_before():
    for frames in (82, 200, 326, 1199):
        segments = plan("even", frames)
        for before, after, part in zip(segments, segments[1:], kept(segments), strict=False):
            assert before.start + part.stop == after.history.stop
            assert part.stop - part.start >= after.history_frames


@pytest.mark.parametrize("name", ["even", "cover", "windows"])
def test_the_driving_video_repeats_its_last_frame_where_it_is_too_short(name):
    for frames in (1, 2, 80, 82, 199, 200):
        clip = torch.arange(frames).view(-1, 1, 1, 1)
        for segment in plan(name, frames):
            seen = segment.stretch(clip).flatten().tolist()
            inside = list(range(segment.start, segment.end))
            assert seen == inside + [frames - 1] * (segment.frames - len(inside))


@pytest.mark.parametrize("sizes", [[1] * 73, [1, 4, 4, 4, 60], [73]])
def test_each_segment_hands_on_its_own_frames_and_its_last_ones_are_the_next_ones_history(sizes):
    segments = plan("even", 326)
    clip, tails = [], []
    for segment, part, after in zip(segments, kept(segments), [*segments[1:], None], strict=True):
        chunks = torch.arange(segment.start, segment.start + 73).split(sizes)
        made = ending(
            within_clip((one for one in chunks), part), after.history_frames if after else 0
        )
        while True:
            try:
                clip += next(made).tolist()
            except StopIteration as end:
                tails.append(end.value)
                break
    assert clip == list(range(326))
    assert tails[-1] is None
    for tail, after in zip(tails[:-1], segments[1:], strict=True):
        assert tail.tolist() == list(range(326))[after.history]


def test_what_lies_behind_the_frames_of_the_clip_is_not_made():
    made = []

    def chunks():
        for n in range(10):
            made.append(n)
            yield torch.tensor([n])

    assert [one.item() for one in within_clip(chunks(), slice(2, 5))] == [2, 3, 4]
    assert made == [0, 1, 2, 3, 4]


def test_context_windows_take_the_clip_as_one_segment_of_any_length():
    assert plan("windows", 326) == [Segment(0, 326, 329, 0)]


@pytest.mark.parametrize(
    ("figures", "told"),
    [
        (("evenly", 81), "even, cover, official, sat, windows"),
        (("even", 0), "0 frames"),
        (("even", 200, 80), "multiples of 4 plus 1"),
        (("even", 200, 81, 6), "multiples of 4 plus 1"),
        (("even", 200, 5, 5), "multiples of 4 plus 1"),
        (("even", 200, 81, -3), "multiples of 4 plus 1"),
        (("even", 200, 9), "at least 13"),
        (("cover", 200, 21, 9), "at least 25"),
    ],
)
def test_figures_that_cut_no_segments_are_refused(figures, told):
    with pytest.raises(BadRequest, match=told):
        plan(*figures)


def test_the_defaults_are_those_of_training():
    assert (TRAINED_FRAMES, HISTORY_FRAMES) == (81, 5)
    assert plan("cover", 300) == plan("cover", 300, 81, 5)
