"""Sound with pictures: in step, as long as they are, and refused before a clip is made for it."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from engine.errors import BadMedia
from engine.media.mp4 import encode_mp4
from engine.media.sound import find_sound
from engine.media.video import probe_video, read_video
from tests.support.clips import clip, read_sound, run_ffmpeg, tone

FPS, SECONDS = 24, 2
HZ = 48_000
FRAME_S = 1 / FPS


@pytest.fixture(scope="module")
def silent(tmp_path_factory):
    """Two seconds; one frame is bright, at 1 s."""
    frames = torch.full((FPS * SECONDS, 64, 96, 3), 20, dtype=torch.uint8)
    frames[FPS] = 250
    path = tmp_path_factory.mktemp("sound") / "silent.mp4"
    encode_mp4([frames], FPS, path)
    return path


def beep(path, at_s, *options, seconds=SECONDS):
    """A sound that is silent but for 80 ms."""
    here = f"if(between(t,{at_s},{at_s + 0.08}),0.8*sin(2000*PI*t),0)"
    run_ffmpeg("-f", "lavfi", "-i", f"aevalsrc='{here}':s={HZ}:d={seconds}", *options, path)
    return path


def joined(path, silent, sound, *options, delay_s=0, video_delay_s=0):
    run_ffmpeg("-itsoffset", video_delay_s, "-i", silent, "-itsoffset", delay_s, "-i", sound,
               "-map", "0:v", "-map", "1:a", "-c:v", "copy", *options, path)  # fmt: skip
    return path


def made_of(path, out, fps=None):
    """Makes a clip of the frames and the sound of a file; its length, flash, beep and sound end."""
    info = probe_video(path)
    sound = find_sound(path, info.start_s, info.duration_s)
    rate = fps or info.fps
    count = encode_mp4(read_video(info, fps), rate, out, audio=sound)
    shown = torch.cat(list(read_video(probe_video(out)))).float()
    row, column = shown.shape[1] // 2, shown.shape[2] // 2
    middle = shown[:, row - 8 : row + 8, column - 8 : column + 8].mean((1, 2))
    flash = int((middle[:, 0] + middle[:, 1] - middle[:, 2]).argmax()) / rate
    samples = read_sound(out, HZ)
    loud = np.flatnonzero(abs(samples) > 0.15)
    return count / rate, flash, loud[0] / HZ if len(loud) else None, len(samples) / HZ


@pytest.mark.golden
@pytest.mark.parametrize("fps", [None, pytest.param(16, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("name", "seconds", "begins"),
    [
        ("sound-opus-starts-10s-late.mkv", 1, None),
        ("sound-pcm-starts-half-a-second-late.mov", 1, 0.5),
        ("sound-ac3-starts-late.mkv", 1, 0.75),
        ("sound-aac-with-a-gap-of-1s.mp4", 3, 2.5),
        ("open-gop-hevc-cut-fragmented.mp4", 3, 1.5),
        ("open-gop-h264-cut-by-copy.mkv", 3, 1.5),
        ("two-sounds-second-is-default.mkv", 1, 0.5),
    ],
)
def test_the_cases_of_the_golden_data_last_and_beep_as_they_should(
    golden, tmp_path, name, seconds, begins, fps
):
    length, flash, found, sound = made_of(golden / "cases" / name, tmp_path / "out.mp4", fps)
    assert length == seconds
    assert sound == pytest.approx(seconds, abs=0.001)
    assert found == (None if begins is None else pytest.approx(begins, abs=0.01))
    if name.startswith("open-gop"):
        assert flash == pytest.approx(found, abs=FRAME_S)


@pytest.mark.golden
@pytest.mark.parametrize("name", ["sound-amr-in-3gp.3gp", "sound-dts-in-mkv.mkv"])
def test_sound_of_a_rare_codec_is_refused_before_a_frame_is_rendered(golden, name):
    path = golden / "cases" / name
    with pytest.raises(
        BadMedia, match=r"^The sound of sound-.* cannot be read: Codec \("
    ) as raised:
        find_sound(path)
    assert str(path.parent) not in str(raised.value)


@pytest.mark.parametrize(
    ("suffix", "codec"),
    [("mp4", "aac"), ("mp4", "libmp3lame"), ("mkv", "libopus"), ("mkv", "flac"), ("mov", "alac"),
     ("ts", "ac3"), ("avi", "pcm_s16le"), ("mkv", "libvorbis"), ("ts", "mp2"),
     ("mov", "pcm_s32be"), ("mov", "pcm_f64le")],
)  # fmt: skip
def test_the_beep_is_on_the_flash_in_every_container(silent, tmp_path, suffix, codec):
    path = tmp_path / f"dance.{suffix}"
    joined(path, silent, beep(tmp_path / "a.wav", 1), "-c:a", codec)
    length, flash, found, sound = made_of(path, tmp_path / "out.mp4")
    assert (length, flash) == (SECONDS, 1)
    assert sound == pytest.approx(SECONDS, abs=0.001)
    assert found == pytest.approx(1, abs=FRAME_S)


@pytest.mark.parametrize("suffix", ["mkv", "ts"])  # the clock of MPEG-TS begins anywhere
@pytest.mark.parametrize(("delay_s", "video_delay_s"), [(0.3, 0), (0, 0.3), (0.3, 0.5)])
def test_tracks_that_start_apart_stay_apart(silent, tmp_path, delay_s, video_delay_s, suffix):
    sound = beep(tmp_path / "a.wav", 1)
    path = tmp_path / f"dance.{suffix}"
    joined(path, silent, sound, "-c:a", "aac", delay_s=delay_s, video_delay_s=video_delay_s)
    length, _, found, lasts = made_of(path, tmp_path / "out.mp4")
    assert found == pytest.approx(1 + delay_s - video_delay_s, abs=0.01)
    assert (length, lasts) == (SECONDS, pytest.approx(SECONDS, abs=0.001))


@pytest.mark.parametrize(("suffix", "codec"), [("mkv", "libopus"), ("ts", "aac"), ("mp4", "aac")])
def test_gaps_of_the_sound_are_silence(silent, tmp_path, suffix, codec):
    gaps = "aselect='not(between(t,0.2,0.26)+between(t,0.4,0.9))'"
    path = tmp_path / f"gap.{suffix}"
    joined(path, silent, beep(tmp_path / "a.wav", 1), "-af", gaps, "-c:a", codec)
    _, flash, found, _ = made_of(path, tmp_path / "out.mp4")
    assert found == pytest.approx(flash, abs=FRAME_S)


@pytest.mark.parametrize("late_s", [10, 250_000])
def test_sound_that_starts_after_the_end_is_silence_at_no_cost(silent, tmp_path, late_s):
    path = tmp_path / "late.mkv"
    joined(path, silent, beep(tmp_path / "a.wav", 1), "-c:a", "aac", delay_s=late_s)
    _, _, found, lasts = made_of(path, tmp_path / "out.mp4")
    assert (found, lasts) == (None, pytest.approx(SECONDS, abs=0.001))


def test_the_default_track_is_taken_or_else_the_first(silent, tmp_path):
    quiet, loud = beep(tmp_path / "quiet.wav", 9), beep(tmp_path / "loud.wav", 1)
    for place, marks in enumerate((["0", "default"], ["0", "0"])):
        path = tmp_path / "two.mkv"
        run_ffmpeg("-i", silent, "-i", quiet, "-i", loud, "-map", "0:v", "-map", "1:a", "-map",
                   "2:a", "-c:v", "copy", "-c:a", "flac", "-disposition:a:0", marks[0],
                   "-disposition:a:1", marks[1], path)  # fmt: skip
        _, _, found, _ = made_of(path, tmp_path / "out.mp4")
        assert found == (pytest.approx(1, abs=0.01) if place == 0 else None)


@pytest.mark.parametrize(("channels", "hz"), [(1, 8000), (7, 44_100), (8, 192_000)])
def test_sound_of_any_rate_and_layout_is_taken(silent, tmp_path, channels, hz):
    layout = f"pan={channels}c|" + "|".join(f"c{place}=c0" for place in range(channels))
    sound = beep(tmp_path / "a.wav", 1, "-af", layout, "-ar", hz)
    path = joined(tmp_path / "a.mkv", silent, sound, "-c:a", "flac")
    _, _, found, _ = made_of(path, tmp_path / "out.mp4")
    assert found == pytest.approx(1, abs=0.01)


def test_damage_in_the_midst_of_the_sound_is_passed_over_and_rubbish_refused(tmp_path):
    content = bytearray(tone(tmp_path / "a.m4a", 3).read_bytes())
    start = content.index(b"mdat")
    middle = (start + len(content)) // 2
    content[middle : middle + 300] = b"\xff" * 300
    (tmp_path / "b.m4a").write_bytes(content)
    assert find_sound(tmp_path / "b.m4a") is not None
    content[start + 100 : start + 20_000] = bytes(19_900)
    (tmp_path / "c.m4a").write_bytes(content)
    with pytest.raises(BadMedia, match=r"^The sound of c\.m4a cannot be read: "):
        find_sound(tmp_path / "c.m4a")


def test_a_sound_file_that_is_none_is_refused_and_silence_is_none(tmp_path):
    (tmp_path / "a.mp3").write_text("hello")
    with pytest.raises(BadMedia, match=r"^The sound of a\.mp3 cannot be read: "):
        find_sound(tmp_path / "a.mp3")
    with pytest.raises(BadMedia, match=r"^There is no sound b\.mp3\.$"):
        find_sound(tmp_path / "b.mp3")
    assert find_sound(clip(tmp_path / "silent.mp4")) is None


def test_a_check_ends_the_trial_of_a_sound(tmp_path):
    path = tone(tmp_path / "a.wav", 60)

    def check():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find_sound(path, Fraction(0), Fraction(60), check)
