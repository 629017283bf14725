"""The choices of an endpoint: defaults from its environment, and caps on sizes."""

import os
from pathlib import Path

import pytest

from engine.config import Defaults, defaults
from engine.errors import BadRequest, Unavailable
from tests.support.job_bodies import job, refused, settings_of


def test_sides_are_floored_to_multiples_of_32_and_it_is_said():
    made = job(width=430, height=699)
    assert (made.settings.width, made.settings.height) == (416, 672)
    assert made.warnings[0].startswith("The size 430x699 becomes 416x672:")
    assert settings_of(width=70, height=64).width == 64
    assert settings_of(width=640).height == 672


@pytest.mark.parametrize(
    ("width", "height", "most", "size"),
    [
        (416, 672, 96 * 160, (96, 128)), (672, 416, 96 * 160, (128, 96)),
        (96, 160, 15360, (96, 160)),
        (1280, 64, 15360, (224, 64)), (64, 1280, 4096, (64, 64)), (1280, 1280, 10**9, (1280, 1280)),
    ],
)  # fmt: skip
def test_a_cap_on_pixels_shrinks_and_keeps_the_shape(width, height, most, size):
    made = job(Defaults(video=Path("d.mp4"), max_pixels=most), width=width, height=height)
    assert (made.settings.width, made.settings.height) == size
    assert made.settings.width * made.settings.height <= most
    assert bool(made.warnings) == (size != (width, height))


def test_a_size_that_is_left_to_the_picture_stays_so_within_a_cap_that_is_wide_enough():
    for most, size in ((512 * 896, (None, None)), (96 * 160, (64, 160))):
        small = Defaults("official", video=Path("d.mp4"), max_pixels=most)
        made = settings_of(small)
        assert (made.width, made.height) == size
        assert bool(job(small).warnings) == (size != (None, None))


def test_a_cap_never_exceeds_itself_for_any_size():
    for most in (4096, 5000, 15360, 100_000):
        for width in range(64, 1281, 96):
            for height in range(64, 1281, 96):
                small = Defaults(video=Path("d"), max_pixels=most)
                made = settings_of(small, width=width, height=height)
                assert made.width * made.height <= most


def test_a_cap_on_frames_shortens_and_a_size_out_of_range_stays_an_error():
    small = Defaults(video=Path("d.mp4"), max_frames=17, max_pixels=15360)
    assert settings_of(small).frames == settings_of(small, frames=99).frames == 17
    assert settings_of(small, frames=9).frames == 9
    assert "at most 17 frames" in job(small).warnings[1]
    assert len(job(small, frames=9).warnings) == 1
    assert refused(small, width=9999).startswith("The width is 9999; it must be 64 to 1280.")


@pytest.fixture
def environment(monkeypatch):
    for name in ("RECIPE", "FIT", "DEFAULT_VIDEO", "MAX_PIXELS", "MAX_FRAMES"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch.setenv


def test_an_endpoint_says_nothing_unless_its_environment_does(environment, tmp_path):
    assert defaults() == Defaults()
    (tmp_path / "d.mp4").touch()
    environment("DEFAULT_VIDEO", str(tmp_path / "d.mp4"))
    environment("RECIPE", "official")
    environment("FIT", "resize")
    environment("MAX_PIXELS", "96x160")
    environment("MAX_FRAMES", "17")
    assert defaults() == Defaults("official", "resize", tmp_path / "d.mp4", 15360, 17)


@pytest.mark.parametrize(
    ("name", "value"),
    [("FIT", "stretch"), ("RECIPE", "fast"), ("MAX_PIXELS", "big"), ("MAX_PIXELS", "32x32"),
     ("MAX_PIXELS", "x"), ("MAX_FRAMES", "0"), ("MAX_FRAMES", "-1"), ("MAX_FRAMES", "9" * 50),
     ("MAX_FRAMES", os.fsdecode("\u0661".encode()))],  # whatever the locale
)  # fmt: skip
def test_an_environment_that_makes_no_sense_stops_the_start(environment, name, value):
    environment(name, value)
    with pytest.raises(BadRequest, match=f"^{name} is .* expected"):
        defaults()


def test_a_default_video_that_is_not_there_stops_the_start(environment, tmp_path):
    environment("DEFAULT_VIDEO", str(tmp_path / "none.mp4"))
    with pytest.raises(Unavailable, match=r"DEFAULT_VIDEO is .*none.mp4, where there is no file"):
        defaults()
