"""The parts that drift is measured and corrected by: colours, regions, limits, cuts, sentences."""

import numpy as np
import pytest
import torch

from engine.drift.correct import Aim, Correction, correct, correction_to, outcome_of
from engine.drift.cuts import film_cuts
from engine.drift.look import Look, Tally, chroma_ratio, looks_of, to_lab, to_rgb
from engine.drift.regions import Scale, owners_of, regions_of, share_of
from engine.drift.told import is_off, told_of_drift
from engine.flow import RegionDrift, SegmentDrift
from engine.masks.colours import PERSONS
from tests.support.drift_scenes import BLACK, dancing, darker, painted
from tests.support.mask_scenes import colours

FULL = Scale.of(512, 896)


def lab_by_definition(rgb):
    """CIE LAB of sRGB [.., 3] u8 under D65, in FP64."""
    c = rgb.astype(np.float64) / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ])  # fmt: skip
    x, y, z = np.moveaxis(linear @ to_xyz.T / to_xyz.sum(1), -1, 0)
    f = [np.where(v > (6 / 29) ** 3, np.cbrt(v), v * (29 / 6) ** 2 / 3 + 4 / 29) for v in (x, y, z)]
    return np.stack([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])], -1)


def test_lab_is_that_of_the_cie_and_comes_back_within_a_level():
    rgb = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    off = to_lab(rgb) - lab_by_definition(rgb)
    assert np.abs(off).max() < 2  # OpenCV's tables; single colours
    assert np.abs(off.mean((0, 1))).max() < 0.1  # means, which alone count here
    assert np.abs(to_rgb(to_lab(rgb)).astype(int) - rgb).max() <= 1
    beyond = np.float32([[[0, 0, 100], [100, 0, -90], [120, 0, 0], [-5, 0, 0], [50, -128, 90]]])
    assert to_rgb(beyond).tolist()[0][2:4] == [[255, 255, 255], [0, 0, 0]]
    assert to_rgb(beyond)[0, 4, 0] == 0  # a red below black is black


def test_lengths_go_with_the_short_side_and_areas_with_its_square():
    assert (FULL.inside, FULL.outside, FULL.blend, FULL.least) == (3, 8, 6, 2000)
    small = Scale.of(160, 96)
    assert (small.inside, small.outside, small.blend) == (1, 2, 1)
    assert small.least == pytest.approx(70, abs=0.5)


@pytest.mark.parametrize("ground", [0, 7])
def test_owners_are_the_persons_by_colour_and_both_grounds_are_nobodys(ground):
    held = torch.arange(7, dtype=torch.uint8).repeat(1, 5, 1)
    mask = colours(held, list(PERSONS), ground)[0].numpy()
    assert np.array_equal(owners_of(mask), held[0].numpy())


def test_persons_are_measured_inside_of_their_outline_and_the_background_far_from_it():
    owners = np.zeros((512, 896), np.uint8)
    owners[100:200, 300:400] = 2
    found = regions_of(owners, FULL)
    assert sorted(found) == [0, 2]
    rows, columns = np.nonzero(found[2])
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (103, 196, 303, 396)
    is_ground = found[0] > 0
    assert not is_ground[92:208, 300:400].any()
    assert is_ground[91, 300:400].all()
    assert is_ground[:, :291].all()


def test_shares_are_one_together_and_ramp_over_six_pixels():
    owners = np.zeros((512, 896), np.uint8)
    owners[:, 448:] = 1
    shares = [share_of(owners, owner, FULL).astype(float) / 255 for owner in (0, 1)]
    assert np.allclose(sum(shares), 1, atol=0.01)
    assert np.allclose(shares[1][0, 444:452], np.arange(8) / 7, atol=0.01)


def test_a_tally_is_that_of_all_pixels_at_once():
    rng = np.random.default_rng(0)
    lab = rng.normal((50, 5, -8), (9, 4, 6), (4, 30, 40, 3)).astype(np.float32)
    region = (rng.uniform(size=(4, 30, 40)) < 0.3).astype(np.uint8) * 255
    region[2] = 0
    tally = Tally()
    for one, where in zip(lab, region, strict=True):
        tally.add(one, np.hypot(one[..., 1], one[..., 2]), where)
    look, pixels = tally.look(4, 1200), lab[region > 0].astype(np.float64)
    assert look.pixels == len(pixels)
    assert look.share == pytest.approx((region > 0).mean())
    assert np.allclose(look.mean, pixels.mean(0))
    assert np.allclose(look.spread, pixels.std(0))
    assert look.chroma == pytest.approx(np.hypot(pixels[:, 1], pixels[:, 2]).mean())
    assert Tally().look(4, 1200) is None


def look(mean=(50, 0, 0), spread=(5, 5, 5), area=5000.0, chroma=20.0):
    return Look(int(10 * area), 10, 512 * 896, np.float64(mean), np.float64(spread), chroma)


def aim(of):
    return Aim(of.mean, of.spread, of)


@pytest.mark.parametrize(
    ("found", "wanted", "cut", "outcome"),
    [
        (None, look(), False, "absent"),
        (look(), None, False, "new"),
        (look((51.5, 0, 0)), look(), False, "corrected"),
        (look((51.49, 0, 0)), look(), False, "steady"),
        (look((60, 0, 0), area=1999), look(), False, "small"),
        (look((60, 0, 0)), look(area=1999), False, "small"),
        (look((60, 0, 0)), look(), True, "cut"),
        (look((60, 0, 0), area=8001), look(), False, "share"),
        (look((60, 0, 0), area=7999), look(), False, "corrected"),
        (look((60, 0, 0)), look(area=8001), False, "share"),
    ],
)
def test_limits_are_those_of_the_reference(found, wanted, cut, outcome):
    target = None if wanted is None else aim(wanted)
    assert outcome_of(found, target, FULL, is_cut=cut) == outcome


def test_where_the_video_at_the_very_frames_is_the_aim_cuts_and_shares_do_not_count():
    target = Aim(np.float64([70, 0, 0]), None, None)
    assert outcome_of(look(area=90_000), target, FULL, is_cut=True) == "corrected"
    assert outcome_of(look(area=100), target, FULL, is_cut=True) == "small"


def test_a_correction_moves_a_mean_by_12_at_most_and_spreads_within_limits():
    got = correction_to(look(spread=(4, 10, 0)), aim(look((80, 40, 0), (5.5, 5, 3))))
    assert np.allclose(got.shift, [7.2, 9.6, 0])
    assert np.allclose(got.gain, [1.25, 0.8, 1])
    near = correction_to(look(spread=(5, 5, 5)), aim(look((47, 4, 0), (5.5, 4.5, 5))))
    assert np.allclose(near.shift, [-3, 4, 0])
    assert np.allclose(near.gain, [1.1, 0.9, 1])
    video = correction_to(look(), Aim(np.float64([47, 4, 0]), None, None))
    assert np.allclose(video.gain, 1)


def test_a_correction_is_the_map_that_its_figures_say():
    frame = painted(dancing(1, 1))[0].numpy()
    one = Correction(np.float64([55, 2, 3]), np.float64([0.9, 1.2, 1.1]), np.float64([4, -3, 2]))
    got = correct(frame, np.zeros(frame.shape[:2], np.uint8), {0: one}, Scale.of(96, 160))
    want = to_rgb(((to_lab(frame) - one.mean) * one.gain + one.mean + one.shift).astype(np.float32))
    assert np.abs(got.astype(int) - want).max() <= 1


def test_grey_has_no_ratio_of_chroma():
    assert chroma_ratio(look(chroma=3), look(chroma=0.9)) is None
    assert chroma_ratio(look(chroma=18), look(chroma=20)) == pytest.approx(0.9)


def test_film_cuts_are_frames_that_change_as_a_whole_or_show_others_only():
    held = dancing(1, 8)
    video, masks = painted(held), colours(held, ["blue", "red"], BLACK)
    assert film_cuts(video, masks) == []
    assert film_cuts(darker(video, 10).where(torch.arange(8).view(8, 1, 1, 1) % 2 > 0, video),
                     masks) == []  # fmt: skip
    cut = video.clone()
    cut[5:] = darker(cut[5:], 110)
    assert film_cuts(cut, masks) == [5]
    others = masks.clone()
    others[3:] = colours(held[3:], ["magenta", "cyan"], BLACK)
    assert film_cuts(video, others) == [3]
    fewer = masks.clone()
    fewer[3:] = colours(held[3:] * (held[3:] == 2), ["blue", "red"], BLACK)
    assert film_cuts(video, fewer) == []


def test_looks_are_those_of_the_frames_as_drawn():
    held = dancing(1, 2)
    found = looks_of(painted(held), colours(held, ["blue", "red"], BLACK), Scale.of(96, 160),
                     lambda: None)  # fmt: skip
    assert sorted(found) == [0, 1, 2]
    assert found[1].mean[2] > 20 > 0 > found[2].mean[2]  # person 1 is orange, 2 is blue


def region(distance, chroma=1.0, outcome="off", name="background"):
    return RegionDrift(name, "first segment", outcome, distance, chroma, distance, chroma)


@pytest.mark.parametrize(
    ("distance", "chroma", "off"),
    [(3.0, 1.0, False), (3.1, 1.0, True), (2.0, 0.91, True), (2.0, 1.09, True),
     (2.0, 0.92, False), (1.4, 0.5, False), (2.0, None, False), (None, None, False)],
)  # fmt: skip
def test_a_region_is_off_above_3_or_where_it_lost_or_won_chroma(distance, chroma, off):
    assert is_off(region(distance, chroma)) is off


def test_a_clip_is_warned_of_in_one_sentence_by_its_worst_place():
    report = [
        SegmentDrift(1, (0, 69), (region(0.0, outcome="anchor"),)),
        SegmentDrift(2, (69, 133), (region(4.0), region(1.0, outcome="steady", name="person 1"))),
        SegmentDrift(3, (133, 200), (region(6.1, 0.95), region(9.0, outcome="cut"))),
    ]
    assert told_of_drift(report) == (
        "Colours are far off in segment 3 (frames 134 to 200): background differs from the first "
        "segment by dE 6.1 (chroma 0.950), one of 2 of 4 figures beyond dE 3 or chroma 0.92 to "
        "1.08. It was not corrected, for drift is none; drift first corrects it.",
    )
    assert told_of_drift(report[:2])[0].startswith("Colours are off in segment 2")
    assert told_of_drift(report[:1]) == ()
