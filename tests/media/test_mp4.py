"""Videos out: what is in the file, and that there is a whole file or none."""

from fractions import Fraction

import pytest

from engine.errors import OutputError
from engine.media.ffmpeg import list_streams
from engine.media.mp4 import encode_mp4
from engine.media.video import probe_video
from tests.support.clips import clip, numbered, read_numbers, tone

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


@pytest.mark.parametrize("name", ["a.m4a", "a.mp3", "a.wav", "a.ogg"])
@pytest.mark.parametrize("seconds", [0.5, 4])
def test_sound_of_any_kind_and_length_lasts_as_long_as_the_picture(tmp_path, name, seconds):
    audio = tone(tmp_path / name, seconds)
    held = tracks(clip(tmp_path / "out.mp4", audio=audio))
    assert held["audio"].codec == "aac"
    assert len(held["video"].packets) == 20
    assert end(held["video"]) == SECONDS
    assert SECONDS - Fraction(1, 1000) <= end(held["audio"]) <= SECONDS


def test_a_clip_shorter_than_a_packet_of_sound_is_written(tmp_path):
    audio = tone(tmp_path / "a.m4a", 1)
    held = tracks(clip(tmp_path / "out.mp4", count=1, fps=60, audio=audio))
    assert end(held["video"]) == Fraction(1, 60)


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
    assert path.read_text("utf-8") == "the old one"


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
