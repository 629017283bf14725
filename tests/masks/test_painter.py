"""Logits of a segmenter -> labels: whose a pixel is, what is a speck, and what growing does."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from engine.errors import BadRequest
from engine.masks.colours import CLASSES, PERSONS, driving_channels, paint
from engine.masks.painter import grown, paint_labels, without_specks
from engine.masks.reader import DRIVING, REFERENCE
from engine.media.framing import covering_size, crop_frames, crop_nearest
from tests.support.mask_scenes import labels


def logits_of(held, persons):
    """Logits [P, h, w] of +-8 whose signs are exact labels [h, w]."""
    return torch.stack([(held == n + 1).float() * 16 - 8 for n in range(persons)])


@pytest.mark.parametrize("mode", DRIVING)
@pytest.mark.parametrize("persons", [2, 6])
def test_painted_persons_are_exact_and_stay_so_in_the_official_resize(persons, mode):
    held = labels(1, persons=persons)[0]
    got = paint_labels(logits_of(held, persons), (512, 896))
    for person in range(1, persons + 1):
        assert torch.equal(got == person, without_specks(held) == person)
    for ground in (DRIVING[mode], REFERENCE[mode]):
        numbers = torch.tensor([ground, *(CLASSES[name] for name in PERSONS)], dtype=torch.uint8)
        frames = paint(numbers[got.int()])[None]
        assert set(frames.unique().tolist()) == {0, 255}
        assert torch.equal(crop_frames(frames, (512, 896)), frames)
        shares = driving_channels(frames)  # of cells; the seven classes overlap nowhere
        assert shares.unflatten(0, (4, 7)).sum(1).max() <= 1


def test_the_larger_logit_has_the_pixel_and_below_zero_nobody():
    logits = torch.full((2, 100, 100), -1.0)
    logits[0, :, :60], logits[1, :, 40:80] = 2.0, 1.0
    logits[1, :, 50:80] = 3.0
    got = paint_labels(logits, (100, 100))[0].tolist()
    assert got == [1] * 50 + [2] * 30 + [0] * 20


def test_small_logits_are_drawn_between_not_in_steps():
    """A slanting edge at a quarter of the size comes back within a pixel."""
    y, x = torch.meshgrid(torch.arange(512.0), torch.arange(896.0), indexing="ij")
    exact = x - 200 - 0.3 * y  # signed distance, in pixels across
    small = F.interpolate(exact[None, None], (256, 256), mode="bilinear", antialias=True)[0]
    got = paint_labels(small, (512, 896))[0:512]
    edge = got.eq(0).sum(1) - (200 + 0.3 * torch.arange(512.0))
    assert edge[8:-8].abs().max() <= 1


def test_holes_and_islands_below_64_pixels_are_removed_and_larger_ones_stay():
    held = torch.zeros(512, 512, dtype=torch.uint8)
    held[100:300, 100:300] = 1
    held[150:157, 150:159] = 0  # 63
    held[200:208, 200:208] = 0  # 64
    held[400:407, 400:409] = 1
    held[450:458, 450:458] = 1
    held[110:115, 110:115] = 2  # of another inside
    wanted = held.clone()
    wanted[150:157, 150:159] = 1
    wanted[400:407, 400:409] = 0
    wanted[110:115, 110:115] = 1
    assert torch.equal(without_specks(held), wanted)


def test_a_speck_is_smaller_in_a_smaller_clip():
    held = torch.zeros(128, 224, dtype=torch.uint8)
    held[10:12, 10:12] = 1  # 4 pixels: 64 at 512
    held[50, 50:53] = 1
    assert without_specks(held).sum() == 4


def test_growing_adds_a_disc_and_shrinking_takes_one_away():
    held = torch.zeros(512, 896, dtype=torch.uint8)
    held[256, 448] = 1
    disc = grown(held, 5)
    assert disc.sum() == sum(x * x + y * y <= 25 for x in range(-5, 6) for y in range(-5, 6))
    held[100:200, 100:200] = 1
    assert torch.equal(grown(held, -4)[100:200, 100:200].bool().nonzero().min(0)[0],
                       torch.tensor([4, 4]))  # fmt: skip
    assert grown(held, -4).sum() == 92 * 92
    assert torch.equal(grown(held, 0), held)


def test_growing_goes_by_the_size_of_the_clip():
    held = torch.zeros(1024, 1024, dtype=torch.uint8)
    held[:, :500] = 1
    assert grown(held, 4)[0].sum() == 508


def test_nobody_grows_over_another():
    held = torch.zeros(512, 512, dtype=torch.uint8)
    held[:, :100], held[:, 106:200] = 1, 2
    got = grown(held, 16)[0]
    assert got[:103].eq(1).all()
    assert got[103:216].eq(2).all()
    assert got[216:].eq(0).all()


def test_a_seventh_person_is_refused():
    with pytest.raises(BadRequest, match=r"7 persons are to be painted; there are 6 colours"):
        paint_labels(torch.zeros(7, 8, 8), (64, 64))
    with pytest.raises(BadRequest, match="-16 to 16"):
        paint_labels(torch.zeros(1, 8, 8), (64, 64), grow=17)
    assert not paint_labels(torch.zeros(0, 8, 8), (64, 96)).any()


@pytest.mark.parametrize("video", [(720, 1280), (1080, 1920), (480, 640), (96, 160)])
@pytest.mark.parametrize("size", [(512, 896), (896, 512), (96, 160)])
def test_what_is_painted_for_the_whole_frame_is_cropped_without_a_change(video, size):
    covered = covering_size(*video, size)
    held = torch.from_numpy(np.arange(math.prod(covered)).reshape(covered) % 251).to(torch.uint8)
    top, left = (covered[0] - size[0]) // 2, (covered[1] - size[1]) // 2
    cropped = crop_nearest(held[None], video, size)[0]
    assert torch.equal(cropped, held[top : top + size[0], left : left + size[1]])
