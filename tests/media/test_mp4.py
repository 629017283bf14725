"""Videos out: what is in the file, and that there is a whole file or none."""

from fractions import Fraction

import pytest
import torch

from engine.errors import BadMedia, OutputError
from engine.media.ffmpeg import list_streams
from engine.media.mp4 import encode_mp4
from engine.media.video import probe_video
from tests.support.clips import clip, numbered, read_numbers, run_ffmpeg, tone

SECONDS = Fraction(20, 16)  # of a clip of 20 frames


def tracks(path):
    streams, _ = list_streams(["-i", str(path), "-map", "0", "-c", "copy"], 30)
    return {stream.media: stream for stream in streams}


def end(stream):
    return stream.packets[-1].start + stream.packets[-1].length


def test_frames_come_back_in_order_whatever_their_chunks(tmp_path):
    path = tmp_path / "a.mp4"
    frames = numbered(10)
    assert encode_mp4([frames[:1], frames[1:1], frames[1:5], frames[5:]], 16, path, crf=4) == 10
    assert read_numbers(probe_video(path)) == list(range(10))


def test_the_index_is_in_front_and_the_colours_and_the_comment_are_stated(tmp_path):
    path = tmp_path / "a.mp4"
    encode_mp4([numbered(3)], 16, path, comment="DEMO WEIGHTS; 50% = 'half'")
    content = path.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")
    assert b"DEMO WEIGHTS; 50% = 'half'" in content
    # matrix, transfer and primaries 1 = BT.709, full range flag off
    place = content.index(b"colrnclx") + len(b"colrnclx")
    assert content[place : place + 7] == bytes([0, 1, 0, 1, 0, 1, 0])
    facts, _ = list_streams(["-i", str(path), "-frames:v", "1", "-c:v", "rawvideo"], 30)
    assert len(facts[0].packets) == 1
    assert (facts[0].width, facts[0].height) == (96, 64)


def test_frame_rates_are_exact(tmp_path):
    encode_mp4([numbered(9)], 23.976, tmp_path / "a.mp4")
    assert end(tracks(tmp_path / "a.mp4")["video"]) == 9 * Fraction(1001, 24000)


@pytest.mark.parametrize(
    ("name", "codec"), [("a.m4a", "aac"), ("a.mp3", "mp3"), ("a.wav", "aac"), ("a.ogg", "aac")]
)
@pytest.mark.parametrize("seconds", [0.5, 4])
def test_sound_of_any_kind_and_length_leaves_the_picture_as_long_as_it_is(
    tmp_path, name, codec, seconds
):
    audio = tone(tmp_path / name, seconds)
    held = tracks(clip(tmp_path / "out.mp4", audio=audio))
    assert held["audio"].codec == codec
    assert len(held["video"].packets) == 20
    assert end(held["video"]) == SECONDS
    assert end(held["audio"]) <= SECONDS
    assert end(held["audio"]) > min(Fraction(seconds), SECONDS) - Fraction(1, 15)


def test_the_sound_of_a_dance_is_copied_without_a_loss(tmp_path):
    sound = tone(tmp_path / "a.m4a", 4)
    dance = clip(tmp_path / "dance.mp4", audio=sound)
    clip(tmp_path / "out.mp4", audio=dance)
    for path in (dance, tmp_path / "out.mp4"):
        run_ffmpeg("-i", path, "-map", "0:a", "-c", "copy", "-f", "adts", path.with_suffix(".aac"))
    got, want = (tmp_path / name for name in ("out.aac", "dance.aac"))
    assert len(got.read_bytes()) > 2000
    assert want.read_bytes().startswith(got.read_bytes())
    assert probe_video(tmp_path / "out.mp4").has_audio


def test_sound_that_starts_before_the_picture_is_cut_into_step(tmp_path):
    run_ffmpeg("-i", clip(tmp_path / "a.mp4"), "-vf", "setpts=PTS+0.5/TB", "-c:v", "libx264",
               tmp_path / "late.mkv")  # fmt: skip
    # silence for half a second, until the first picture, then a tone
    tone(tmp_path / "a.wav", 1, "-af", "adelay=500")
    run_ffmpeg("-copyts", "-i", tmp_path / "late.mkv", "-i", tmp_path / "a.wav", "-c:v", "copy",
               "-c:a", "aac", tmp_path / "dance.mkv")  # fmt: skip
    clip(tmp_path / "out.mp4", audio=tmp_path / "dance.mkv")
    run_ffmpeg("-i", tmp_path / "out.mp4", "-f", "f32le", "-ac", "1", tmp_path / "raw")
    samples = torch.frombuffer(bytearray((tmp_path / "raw").read_bytes()), dtype=torch.float32)
    loud = (samples.abs() > 0.05).nonzero()
    assert loud[0].item() / 44100 < 0.05


def test_a_clip_shorter_than_a_packet_of_sound_is_written(tmp_path):
    audio = tone(tmp_path / "a.m4a", 1)
    held = tracks(clip(tmp_path / "out.mp4", count=1, fps=60, audio=audio))
    assert end(held["video"]) == Fraction(1, 60)


def test_sound_of_a_rate_that_mp4_cannot_hold_as_it_is_becomes_aac(tmp_path):
    audio = tone(tmp_path / "a.mp3", 1, "-ar", "8000")
    assert tracks(clip(tmp_path / "out.mp4", audio=audio))["audio"].codec == "aac"


def test_a_glitch_in_the_sound_does_not_cost_the_clip(tmp_path):
    content = bytearray(tone(tmp_path / "a.ogg", 2).read_bytes())
    content[len(content) // 2 : len(content) // 2 + 100] = bytes(100)
    (tmp_path / "a.ogg").write_bytes(content)
    held = tracks(clip(tmp_path / "out.mp4", audio=tmp_path / "a.ogg"))
    assert end(held["video"]) == SECONDS
    assert "audio" in held


def test_a_source_without_sound_is_no_error(tmp_path):
    silent = clip(tmp_path / "silent.mp4")
    assert set(tracks(clip(tmp_path / "out.mp4", audio=silent))) == {"video"}


def test_a_sound_file_that_is_none_is_refused_before_a_frame_is_asked_for(tmp_path):
    (tmp_path / "a.mp3").write_text("hello")

    def frames():
        pytest.fail("a frame was rendered for nothing")
        yield numbered(1)

    with pytest.raises(BadMedia, match=r"^The sound of a\.mp3 cannot be read: "):
        encode_mp4(frames(), 16, tmp_path / "out.mp4", audio=tmp_path / "a.mp3")
    with pytest.raises(BadMedia, match=r"^There is no sound b\.mp3\.$"):
        encode_mp4(frames(), 16, tmp_path / "out.mp4", audio=tmp_path / "b.mp3")


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, OSError])
def test_a_source_of_frames_that_fails_leaves_the_folder_as_it_was(tmp_path, failure):
    path = tmp_path / "out.mp4"
    path.write_text("the old one")

    def frames():
        yield numbered(5)
        raise failure("in the middle")

    with pytest.raises(failure, match="in the middle"):
        encode_mp4(frames(), 16, path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.mp4"]
    assert path.read_text() == "the old one"


def test_what_cannot_be_written_is_said_and_leaves_nothing(tmp_path):
    with pytest.raises(OutputError, match=r"^There are no frames to write to out\.mp4\.$"):
        encode_mp4([], 16, tmp_path / "out.mp4")
    with pytest.raises(OutputError, match="There are no frames"):
        encode_mp4([numbered(0)], 16, tmp_path / "out.mp4")
    with pytest.raises(OutputError, match=r"^A clip of 97x64 cannot be H\.264"):
        encode_mp4([numbered(2, width=97)], 16, tmp_path / "out.mp4")
    with pytest.raises(OutputError, match="is a folder; a file name is expected"):
        encode_mp4([numbered(2)], 16, tmp_path)
    with pytest.raises(OutputError, match="No such file or directory"):
        encode_mp4([numbered(2)], 16, tmp_path / "none" / "out.mp4")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="Not a directory"):
        encode_mp4([numbered(2)], 16, tmp_path / "file" / "out.mp4")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_an_encoder_that_dies_says_why(tmp_path):
    too_wide = (numbered(3, 64, 20_000) for _ in range(3))  # x264 ends at 16384
    with pytest.raises(OutputError, match=r"^out\.mp4 could not be written: .*20000"):
        encode_mp4(too_wide, 16, tmp_path / "out.mp4")
    assert list(tmp_path.iterdir()) == []
