"""Context windows: the golden lists, full cover at every setting, blending, shared noise."""

import json
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.denoise.windows import (
    Windowing,
    blending,
    in_latents,
    latent_frames,
    share_noise,
    windowed,
    windows,
)
from engine.errors import BadCheckpoint, BadRequest
from engine.golden.sampling import checks, recognises

PRODUCTION = Windowing(window=20, overlap=5)


@st.composite
def cuts(draw, strides=5):
    window = draw(st.integers(1, 24))
    overlap = draw(st.integers(0, window - 1))
    return Windowing(window, overlap, draw(st.integers(1, strides)))


def figures(case):
    return in_latents(case["context_frames"], case["context_overlap"], case["context_stride"])


def test_production_settings_take_38_forwards_in_6_steps():
    assert latent_frames(326) == 82
    assert in_latents(80, 20, 4) == PRODUCTION
    assert [len(windows(step, 82, PRODUCTION)) for step in range(6)] == [6, 7, 6, 6, 7, 6]


def test_the_other_endpoints_take_33_and_13_forwards():
    hub = in_latents(81, 16, 4)
    assert hub == Windowing(21, 4)
    assert [len(windows(step, 82, hub)) for step in range(6)] == [5, 6, 6, 5, 5, 6]
    assert sum(len(windows(step, latent_frames(100), hub)) for step in range(6)) == 13


def test_ten_frames_at_a_time_take_246_forwards():
    small = in_latents(10, 4, 4)
    assert sum(len(windows(step, 82, small)) for step in range(6)) == 246


@pytest.mark.parametrize("latents", [1, 16, 20])
def test_a_clip_that_fits_is_one_window(latents):
    for step in range(8):
        assert windows(step, latents, PRODUCTION) == [list(range(latents))]


def test_a_window_over_the_end_is_moved_back_and_one_at_the_start_put_in():
    assert windows(0, 25, PRODUCTION) == [list(range(20)), list(range(5, 25))]
    # halving(1) = 1/2 and 12.5 frames are 12, so windows start at 12 and, beyond the end, at 2
    assert windows(1, 25, PRODUCTION) == [
        list(range(5, 25)),
        list(range(20)),
        list(range(2, 22)),
    ]


def test_a_stride_adds_windows_of_every_second_frame():
    assert windows(0, 10, Windowing(4, 1, stride=2)) == [
        [0, 1, 2, 3],
        [3, 4, 5, 6],
        [6, 7, 8, 9],  # that from 9 on, moved back, is the same
        [0, 2, 4, 6],
        [3, 5, 7, 9],  # from 7 on, moved back
    ]


@settings(max_examples=400, deadline=None)
@given(step=st.integers(0, 99), latents=st.integers(1, 130), windowing=cuts())
def test_every_frame_is_covered_and_no_window_repeats_one(step, latents, windowing):
    got = windows(step, latents, windowing)
    assert set().union(*got) == set(range(latents))
    assert {len(frames) for frames in got} == {min(windowing.window, latents)}
    assert all(frame < later for frames in got for frame, later in pairwise(frames))
    assert len(set(map(tuple, got))) == len(got)


@pytest.mark.parametrize("windowing", [PRODUCTION, Windowing(21, 4), Windowing(3, 1)])
def test_every_frame_is_covered_at_every_length_of_service(windowing):
    for latents in range(1, latent_frames(2000) + 1, 31):
        for step in range(6):
            assert set().union(*windows(step, latents, windowing)) == set(range(latents))


@pytest.mark.parametrize(
    ("window", "overlap", "stride"),
    [(20, 20, 1), (20, 21, 1), (20, -1, 1), (0, 0, 1), (-4, 0, 1), (20, 5, 0)],
)
def test_figures_that_cut_no_windows_are_refused(window, overlap, stride):
    with pytest.raises(BadRequest, match=f"Windows of {window} .* overlap of {overlap}"):
        Windowing(window, overlap, stride)


@pytest.mark.parametrize(("frames", "overlap", "stride"), [(20, 20, 4), (0, 0, 4), (80, 20, 3)])
def test_pixel_figures_that_cut_no_windows_are_refused(frames, overlap, stride):
    with pytest.raises(BadRequest, match="cannot be made"):
        in_latents(frames, overlap, stride)


@settings(max_examples=100, deadline=None)
@given(step=st.integers(0, 20), latents=st.integers(1, 100), windowing=cuts(strides=3))
def test_weights_are_positive_in_their_window_and_sum_to_one(step, latents, windowing):
    parts = windows(step, latents, windowing)
    weights = blending(parts, latents, windowing)
    assert torch.allclose(weights.sum(0), torch.ones(latents), rtol=0, atol=1e-6)
    for row, frames in zip(weights, parts, strict=True):
        assert row[frames].min() > 0
        assert row.count_nonzero() == len(frames)


def test_ramps_are_linear_over_the_overlap_and_only_inside_the_clip():
    weights = blending([[0, 1, 2, 3, 4, 5], [2, 3, 4, 5, 6, 7]], 8, Windowing(6, 4))
    rise = [0.125, 0.375, 0.625, 0.875]
    assert weights[1].tolist() == [0, 0, *rise, 1, 1]
    assert weights[0].tolist() == [1, 1, *rise[::-1], 0, 0]


def test_without_overlap_windows_do_not_fade():
    weights = blending([[0, 1, 2], [3, 4, 5]], 6, Windowing(3, 0))
    assert weights.tolist() == [[1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]]


@pytest.mark.parametrize("step", range(6))
@pytest.mark.parametrize("windowing", [PRODUCTION, Windowing(21, 8, 3), Windowing(7, 6)])
def test_a_velocity_that_is_the_same_everywhere_is_blended_into_itself(step, windowing):
    constant = torch.randn(4, 1, 3, 2, generator=torch.Generator().manual_seed(1))

    def velocity(window, frames, step, timestep):
        return constant.expand(window.shape)

    got = windowed(velocity, windowing)(torch.zeros(4, 82, 3, 2), step, 999.0)
    assert torch.allclose(got, constant.expand(4, 82, 3, 2), rtol=0, atol=1e-6)


@pytest.mark.parametrize("stride", [1, 3])
def test_a_velocity_of_each_frame_alone_is_that_of_the_whole_clip(stride):
    latents = torch.randn(4, 61, 3, 2, generator=torch.Generator().manual_seed(2))

    def velocity(window, frames, step, timestep):
        place = torch.tensor(frames, dtype=torch.float32)[None, :, None, None]
        return 2 * window + place + step + timestep

    whole = windowed(velocity, Windowing(20, 5, stride))
    place = torch.arange(61, dtype=torch.float32)[None, :, None, None]
    for step in range(6):
        got = whole(latents, step, 500.0)
        assert torch.allclose(got, 2 * latents + place + step + 500, rtol=0, atol=2e-4)


def test_windows_are_weighted_in_the_blend():
    seen = []

    def velocity(window, frames, step, timestep):
        seen.append(frames)
        return torch.full(window.shape, float(frames[0]))

    got = windowed(velocity, Windowing(20, 5))(torch.zeros(1, 35, 1, 1), 0, 999.0).flatten()
    weights = blending(seen, 35, Windowing(20, 5))
    want = torch.tensor([float(frames[0]) for frames in seen]) @ weights
    assert seen[:2] == [list(range(20)), list(range(15, 35))]
    assert torch.allclose(got, want, rtol=0, atol=1e-5)
    assert got[0] == 0
    assert 0 < got[16] < 15


def test_a_clip_that_fits_one_window_is_evaluated_as_it_is():
    latents = torch.randn(4, 16, 3, 2)
    seen = []

    def velocity(window, frames, step, timestep):
        seen.append((window is latents, frames, step, timestep))
        return window.sin()

    got = windowed(velocity, PRODUCTION)(latents, 3, 714.0)
    assert torch.equal(got, latents.sin())
    assert seen == [(True, list(range(16)), 3, 714.0)]


def frame_numbers(latents):
    """Noise whose values say which frame they were."""
    return torch.arange(latents, dtype=torch.float32)[None, :, None, None].expand(2, -1, 3, 2)


def test_each_stretch_after_the_first_window_is_an_earlier_one_shuffled():
    shared = share_noise(frame_numbers(82), PRODUCTION, torch.Generator().manual_seed(1))
    order = shared[0, :, 0, 0].long().tolist()
    assert order[:20] == list(range(20))
    for start in range(0, 62, 15):
        stretch = order[start + 20 : start + 35]
        assert sorted(stretch) == sorted(order[start : start + len(stretch)])
    assert order[20:35] != list(range(15))
    assert torch.equal(shared, shared[:1, :, :1, :1].expand_as(shared))  # whole frames move


def test_stretches_are_shuffled_by_the_generator_in_order():
    generator = torch.Generator().manual_seed(5)
    first, second, last = (torch.randperm(size, generator=generator) for size in (15, 15, 2))
    shared = share_noise(frame_numbers(52), PRODUCTION, torch.Generator().manual_seed(5))
    order = shared[0, :, 0, 0].long()
    assert torch.equal(order[20:35], first)
    assert torch.equal(order[35:50], order[15 + second])
    assert torch.equal(order[50:52], order[30 + last])


def test_another_seed_shuffles_otherwise():
    one, other = (
        share_noise(frame_numbers(82), PRODUCTION, torch.Generator().manual_seed(seed))
        for seed in (1, 2)
    )
    assert not torch.equal(one, other)


def test_noise_is_not_shared_within_one_window_and_its_input_is_kept():
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    noise = torch.randn(2, 20, 3, 2)
    assert torch.equal(share_noise(noise, PRODUCTION, generator), noise)
    assert torch.equal(generator.get_state(), before)  # nothing was drawn
    longer = torch.randn(2, 60, 3, 2)
    kept = longer.clone()
    share_noise(longer, PRODUCTION, generator)
    assert torch.equal(longer, kept)


@pytest.fixture
def context_windows(golden):
    return golden / "sampling" / "context_windows.json"


def rewritten(path, folder, change):
    held = json.loads(path.read_text("utf-8"))
    change(held["cases"][0])
    damaged = folder / "damaged.json"
    damaged.write_text(json.dumps(held))
    return [check for check in checks(damaged) if not check.ok]


@pytest.mark.golden
def test_every_golden_window_is_reproduced(context_windows):
    results = list(checks(context_windows))
    assert [check for check in results if not check.ok] == []
    assert len(results) == 6 * 4 + 6 + 6 + 6 + 6 + 4 + 8  # four figures a case, a check a step


@pytest.mark.golden
def test_golden_windows_are_known_by_their_keys(context_windows):
    assert recognises(frozenset(json.loads(context_windows.read_text("utf-8"))), {})
    assert not recognises(frozenset(["rule", "ftfy_version", "cases"]), {})


@pytest.mark.golden
@pytest.mark.parametrize("figure", ["latents", "window", "overlap", "stride"])
def test_a_wrong_golden_figure_fails(context_windows, tmp_path, figure):
    failed = rewritten(context_windows, tmp_path, lambda case: case.update({figure: 99}))
    assert [check.check.rpartition(" ")[2] for check in failed] == [figure]


@pytest.mark.golden
def test_a_wrong_golden_window_fails(context_windows, tmp_path):
    failed = rewritten(context_windows, tmp_path, lambda case: case["windows"][2][1].reverse())
    assert [check.check for check in failed] == [
        "damaged.json: production default: windows of step 2"
    ]


@pytest.mark.golden
@pytest.mark.parametrize(
    "change",
    [
        lambda case: case.pop("windows"),
        lambda case: case.pop("name"),
        lambda case: case["windows"].pop(),
        lambda case: case.update(frames="326"),
        lambda case: case.update(context_overlap=80),
        lambda case: case.update(windows=7),
    ],
)
def test_a_golden_case_that_is_not_one_fails(context_windows, tmp_path, change):
    assert rewritten(context_windows, tmp_path, change) != []


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"cases": 3}'])
def test_a_file_that_holds_no_cases_is_refused(tmp_path, text):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(BadCheckpoint, match=r"bad\.json"):
        list(checks(tmp_path / "bad.json"))
