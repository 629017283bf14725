"""Videos in: which frames come out, in which order, size and colour, and what is refused."""

import dataclasses
import os
from fractions import Fraction

import pytest
import torch

from engine.config import LIMITS
from engine.errors import BadMedia
from engine.media.mp4 import encode_mp4
from engine.media.sound import find_sound
from engine.media.video import exact_rate, frame_count, probe_video, read_video, shown_frames
from tests.support.clips import clip, numbered, numbers, read_numbers, run_ffmpeg, tone


@pytest.fixture(scope="module")
def clip_16(tmp_path_factory):
    """A clip of 20 frames at 16 fps."""
    return clip(tmp_path_factory.mktemp("clips") / "clip.mp4")


def refusal(path, limits=LIMITS):
    with pytest.raises(BadMedia) as raised:
        for _ in read_video(probe_video(path, limits)):
            pass
    return str(raised.value)


def shown_at(count, source_rate, fps):
    """The definition: output frame i is the source frame on screen at i / fps."""
    total = max(1, int(Fraction(count) / source_rate * fps))
    return [int(Fraction(place) / fps * source_rate) for place in range(total)]


def test_a_probe_tells_size_rate_length_and_sound(clip_16):
    info = probe_video(clip_16)
    assert (info.height, info.width, info.fps, info.frames) == (64, 96, 16.0, 20)
    assert (info.duration_s, info.is_constant, info.has_audio) == (Fraction(20, 16), True, False)


@pytest.mark.golden
def test_the_official_skeleton_video_yields_exactly_its_frames(golden):
    info = probe_video(golden / "examples" / "001" / "rendered.mp4")
    assert (info.height, info.width, info.fps, info.frames) == (512, 896, 16.0, 65)
    assert sum(len(chunk) for chunk in read_video(info)) == 65


def test_every_frame_comes_once_and_in_order_in_chunks_of_the_size_asked_for(clip_16):
    chunks = list(read_video(probe_video(clip_16), chunk=8))
    assert [len(chunk) for chunk in chunks] == [8, 8, 4]
    assert numbers(torch.cat(chunks)) == list(range(20))


@pytest.mark.parametrize("suffix", ["mkv", "webm", "avi", "ts", "gif"])
def test_containers_with_coarse_clocks_keep_rate_and_frames(clip_16, tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    codec = {"webm": ["-c:v", "libvpx", "-qmin", "0", "-crf", "4", "-b:v", "2M"], "gif": []}
    run_ffmpeg("-i", clip_16, *codec.get(suffix, ["-c", "copy"]), path)
    info = probe_video(path)
    assert (info.fps, info.is_constant) == (16.0, True)
    assert read_numbers(info) == list(range(20))
    assert read_numbers(info, 8) == shown_at(20, 16, 8)


@pytest.mark.parametrize("fps", [1, 8, 10, 15, 16, 23.976, 24, 30, 60])
def test_another_rate_is_met_by_choice_of_the_frame_on_screen(clip_16, fps):
    info = probe_video(clip_16)
    want = shown_at(20, 16, exact_rate(fps))
    assert read_numbers(info, fps) == want
    assert frame_count(info, fps) == len(want)


def test_the_default_dance_has_326_frames_at_24(clip_16):
    dance = dataclasses.replace(
        probe_video(clip_16), rate=Fraction(30), frames=408, duration_s=Fraction(408, 30)
    )
    assert frame_count(dance, 24) == 326
    assert frame_count(dance) == 408
    assert frame_count(dance, 0.01) == 1


def test_frame_rates_of_television_are_exact(tmp_path):
    info = probe_video(clip(tmp_path / "a.mp4", fps=23.976))
    assert info.rate == Fraction(24000, 1001)
    run_ffmpeg("-i", tmp_path / "a.mp4", "-c", "copy", tmp_path / "a.mkv")
    assert probe_video(tmp_path / "a.mkv").rate == Fraction(24000, 1001)


@pytest.mark.parametrize(
    ("fps", "rate"),
    [
        (23.976, Fraction(24000, 1001)), (29.97, Fraction(30000, 1001)), (24.0, Fraction(24)),
        (59.94, Fraction(60000, 1001)), (12.5, Fraction(25, 2)), (16.0, Fraction(16)),
    ],
)  # fmt: skip
def test_a_decimal_rate_is_read_as_the_rate_meant(fps, rate):
    assert exact_rate(fps) == rate


def test_a_variable_rate_becomes_constant_at_its_usual_rate(clip_16, tmp_path):
    path = tmp_path / "a.mp4"
    # Frames 3, 8, 13 and 18 are missing; the ones before them stay on screen twice as long.
    run_ffmpeg("-i", clip_16, "-vf", "select=not(eq(mod(n\\,5)\\,3))", "-fps_mode", "vfr",
               "-x264-params", "bframes=0:crf=4", path)  # fmt: skip
    info = probe_video(path)
    assert (info.rate, info.is_constant, info.frames) == (16, False, 16)
    want = [place - (place % 5 == 3) for place in range(20)]
    assert read_numbers(info) == want
    assert read_numbers(info, 8) == want[::2]


def test_no_more_frames_are_decoded_than_asked_for(clip_16):
    info = probe_video(clip_16)
    assert read_numbers(info, None, 5) == [0, 1, 2, 3, 4]
    assert read_numbers(info, 8, 99) == shown_at(20, 16, 8)


def test_a_reader_that_stops_early_leaves_no_process(clip_16):
    frames = read_video(probe_video(clip_16), chunk=1)
    assert numbers(next(frames)) == [0]
    frames.close()
    assert list(frames) == []


def test_frames_before_an_edit_are_neither_counted_nor_shown(clip_16, tmp_path):
    path = tmp_path / "cut.mp4"
    run_ffmpeg("-ss", "0.5", "-i", clip_16, "-c", "copy", path)
    info = probe_video(path)
    assert info.frames == 12
    assert read_numbers(info) == list(range(8, 20))


def test_rotation_is_applied(clip_16, tmp_path):
    frames = numbered(3)
    frames[:, :16, :16] = 250  # a mark at the top left
    encode_mp4([frames], 16, tmp_path / "a.mp4", crf=4)
    run_ffmpeg("-display_rotation", "90", "-i", tmp_path / "a.mp4", "-c", "copy",
               tmp_path / "turned.mp4")  # fmt: skip
    info = probe_video(tmp_path / "turned.mp4")
    got = next(read_video(info))
    assert (info.height, info.width) == (96, 64)
    assert got.shape[1:3] == (96, 64)
    assert got[0, 90, 5].min() > 240  # anticlockwise: bottom left
    assert got[0, 5, 5].max() < 10


def test_pixels_that_are_not_square_become_square(clip_16, tmp_path):
    path = tmp_path / "a.mkv"
    run_ffmpeg("-i", clip_16, "-vf", "setsar=4/3", "-c:v", "libx264", "-crf", "4", path)
    info = probe_video(path)
    assert (info.height, info.width) == (64, 128)
    assert read_numbers(info) == list(range(20))


PATCHES = torch.tensor(
    [[255, 0, 0], [0, 255, 0], [0, 0, 255], [200, 120, 60], [30, 90, 160], [128, 128, 128]],
    dtype=torch.uint8,
)


def patches():
    """[1, 64, 192, 3]: columns of 32 pixels."""
    return PATCHES.repeat_interleave(32, 0).expand(1, 64, 192, 3).contiguous()


def patch_errors(path):
    got = next(read_video(probe_video(path)))[0, 32, 16::32]
    return (got.int() - PATCHES.int()).abs().max().item()


@pytest.mark.parametrize(
    ("matrix", "tag"),
    [("bt601", "smpte170m"), ("bt709", "bt709"), ("bt2020", "bt2020nc"), ("bt601", "unknown")],
)
@pytest.mark.parametrize("levels", ["tv", "pc"])
def test_colours_follow_the_matrix_and_range_that_the_stream_declares(
    tmp_path, matrix, tag, levels
):
    path = tmp_path / "a.mp4"
    run_ffmpeg(
        "-f", "rawvideo", "-pixel_format", "rgb24", "-video_size", "192x64", "-i", "-", "-vf",
        f"scale=in_range=pc:out_color_matrix={matrix}:out_range={levels}:flags=accurate_rnd,"
        f"format=yuv420p,setparams=colorspace={tag}:range={levels}", "-crf", "4", path,
        stdin=patches().numpy().tobytes(),
    )  # fmt: skip
    assert patch_errors(path) <= 3


def test_colours_survive_our_own_encoder(tmp_path):
    encode_mp4([patches()], 16, tmp_path / "a.mp4")
    assert patch_errors(tmp_path / "a.mp4") <= 3


def test_what_is_no_video_is_refused_in_a_sentence_that_names_it(clip_16, tmp_path):
    kinds = "Expected MP4, MOV, MKV, WebM, AVI, MPEG-TS or GIF."
    (tmp_path / "text.mp4").write_text("hello\n" * 200)
    assert (
        refusal(tmp_path / "text.mp4") == f"text.mp4 is not a video: moov atom not found. {kinds}"
    )
    (tmp_path / "empty.mp4").write_bytes(b"")
    assert refusal(tmp_path / "empty.mp4") == "empty.mp4 is empty; a video is expected."
    assert refusal(tmp_path / "none.mp4") == "There is no video none.mp4."
    assert refusal(tmp_path) == f"{tmp_path.name} is a folder; a video file is expected."
    tone(tmp_path / "song.m4a", 1)
    want = "song.m4a holds sound but no picture; a video is expected."
    assert refusal(tmp_path / "song.m4a") == want


def test_a_playlist_cannot_make_the_engine_open_other_files(clip_16, tmp_path):
    concat = f"ffconcat version 1.0\nfile {clip_16}\n"
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{clip_16}\n#EXT-X-ENDLIST\n"
    for name, text in (("a.mp4", concat), ("b.m3u8", playlist)):
        (tmp_path / name).write_text(text)
        assert "is not a video: Format not on whitelist" in refusal(tmp_path / name)


def test_damaged_and_shortened_videos_are_refused(clip_16, tmp_path):
    whole = clip_16.read_bytes()
    run_ffmpeg("-i", clip_16, "-c", "copy", tmp_path / "whole.mkv")
    matroska = (tmp_path / "whole.mkv").read_bytes()
    media = whole.index(b"mdat")
    middle = (media + len(whole)) // 2
    harmed = whole[:middle] + bytes(len(whole) - middle)
    for name, content in {
        "index_only.mp4": whole[: media + 20],
        "half.mp4": whole[:middle],
        "half.mkv": matroska[: len(matroska) // 2],
        "harmed.mp4": harmed,
    }.items():
        (tmp_path / name).write_bytes(content)
        assert refusal(tmp_path / name).startswith((f"{name} is a damaged", f"{name} is cut short"))


def test_a_track_of_sound_that_never_comes_spoils_no_pictures(clip_16, tmp_path):
    run_ffmpeg("-i", clip_16, "-f", "lavfi", "-i", "sine=d=1", "-c:v", "copy", tmp_path / "a.ts")
    content = (tmp_path / "a.ts").read_bytes()
    packets = [content[at : at + 188] for at in range(0, len(content), 188)]
    silent = [one for one in packets if one[1] & 31 != 1 or one[2] != 1]  # the second track's id
    assert len(silent) < len(packets)
    (tmp_path / "b.ts").write_bytes(b"".join(silent))
    whole, without = probe_video(tmp_path / "a.ts"), probe_video(tmp_path / "b.ts")
    assert (without.frames, without.rate) == (whole.frames, whole.rate)
    assert len(torch.cat(list(read_video(without)))) == whole.frames
    with pytest.raises(BadMedia, match=r"^The sound of b\.ts cannot be read: "):
        find_sound(tmp_path / "b.ts", without.start_s)


def test_limits_on_bytes_sides_and_frames_are_named(clip_16, tmp_path):
    light = dataclasses.replace(LIMITS, max_video_bytes=100)
    assert "a video may have 0.0 MiB" in refusal(clip_16, light)
    narrow = dataclasses.replace(LIMITS, max_video_side=80)
    assert refusal(clip_16, narrow) == "clip.mp4 is 96x64; a video may have 80 pixels a side."
    coarse = dataclasses.replace(LIMITS, min_side=65)
    assert refusal(clip_16, coarse) == "clip.mp4 is 96x64; a video needs at least 65 pixels a side."
    few = dataclasses.replace(LIMITS, max_frames=10)
    with pytest.raises(BadMedia, match=r"clip.mp4 gives 20 frames; a clip may have 10\. Shorten"):
        frame_count(probe_video(clip_16), limits=few)
    assert frame_count(probe_video(clip_16), max_frames=9, limits=few) == 9


def test_names_that_look_like_options_or_addresses_are_names(clip_16, tmp_path):
    for name in ("-y.mp4", "http:a.mp4", "100%03d.mp4", os.fsdecode("ä b'\".mp4".encode())):
        path = tmp_path / name
        path.write_bytes(clip_16.read_bytes())
        assert probe_video(path).frames == 20


@pytest.mark.parametrize("fps", [None, 5, 12.5, 16, 24])
@pytest.mark.parametrize("uneven", [None, "(N+floor(N/3))/16/TB", "N*N/40/TB"])
def test_the_frames_that_are_shown_are_known_by_their_numbers(clip_16, tmp_path, uneven, fps):
    path = clip_16
    if uneven:
        path, stretch = tmp_path / "uneven.mkv", ["-vf", f"setpts='{uneven}'"]
        run_ffmpeg("-i", clip_16, *stretch, "-fps_mode", "passthrough", "-crf", "4", path)
    info = probe_video(path)
    assert info.is_constant == (uneven is None)
    assert shown_frames(info, fps) == read_numbers(info, fps)
    assert shown_frames(info, fps, 4) == read_numbers(info, fps, 4)
