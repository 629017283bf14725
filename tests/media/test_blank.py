"""Frames that show nothing are refused, frames that show little are not."""

import pytest
import torch

from engine.errors import BlankFrames, EngineError
from engine.media.blank import SPREAD, is_blank, refuse_blank
from engine.media.framing import frames_to_u8


def noise(count, low=0, high=256):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(low, high, (count, 48, 40, 3), generator=generator, dtype=torch.uint8)


def test_frames_are_handed_on_as_they_are():
    chunks = [noise(1), noise(4)]
    passed = list(refuse_blank(chunks))
    assert all(got is given for got, given in zip(passed, chunks, strict=True))


@pytest.mark.parametrize("level", [0, 1, 127, 255])
def test_one_frame_of_one_colour_ends_the_clip_and_is_counted(level):
    flat = torch.full((48, 40, 3), level, dtype=torch.uint8)
    chunk = torch.cat([noise(2), flat[None], noise(1)])
    passed = refuse_blank([noise(1), noise(4), chunk])
    assert len(next(passed)) == 1
    assert len(next(passed)) == 4
    name = "black" if level < 2 else "of one colour"
    with pytest.raises(BlankFrames, match=f"Frame 8 of the clip came out {name}"):
        next(passed)


def test_a_strong_colour_is_blank_too():
    red = torch.zeros(48, 40, 3, dtype=torch.uint8)
    red[..., 0] = 200
    assert is_blank(red)


def test_rounding_does_not_make_a_picture_and_a_faint_picture_is_one():
    assert is_blank(noise(1, 100, 101 + SPREAD)[0])
    assert not is_blank(noise(1, 100, 102 + SPREAD)[0])


def test_a_small_thing_on_black_is_a_picture():
    frame = torch.zeros(48, 40, 3, dtype=torch.uint8)
    frame[17:19, 21:23] = 255  # between the points of the coarse grid
    assert not is_blank(frame)


def test_not_a_number_becomes_a_frame_that_is_refused():
    pixels = torch.full((3, 1, 48, 40), torch.nan)
    with pytest.raises(BlankFrames):
        list(refuse_blank([frames_to_u8(pixels)]))
    assert issubclass(BlankFrames, EngineError)
