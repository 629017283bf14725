"""What a picture looks like: HDR, wide gamuts, interlaced frames, changes of shape, odd formats."""

import numpy as np
import pytest
import torch

from engine.errors import BadMedia
from engine.media.mp4 import encode_mp4
from engine.media.video import probe_video, read_video
from tests.support.clips import STEP, numbered, read_numbers, run_ffmpeg

PATCHES = np.array(
    [[255, 255, 255], [128, 128, 128], [60, 60, 60], [200, 120, 60], [30, 90, 160], [120, 0, 0],
     [0, 120, 0], [0, 0, 120], [220, 180, 150]],
    np.float64,
)  # fmt: skip
# linear RGB of BT.709 -> BT.2020 (BT.2087) and Display P3
TO_2020 = [[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]]
TO_P3 = [[0.8225, 0.1775, 0.0], [0.0332, 0.9668, 0.0], [0.0171, 0.0724, 0.9105]]
WHITE = 203  # cd/m2, BT.2408


def pq(light):
    """cd/m2 -> signal (SMPTE ST 2084)."""
    power = (light / 10_000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375


def hlg(light):
    """cd/m2 on a display of 1000 -> signal (BT.2100)."""
    display = light / 1000
    whole = display @ [0.2627, 0.6780, 0.0593]
    scene = display * np.maximum(whole, 1e-9)[:, None] ** (1 / 1.2 - 1)
    bent = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), bent)


def coded(path, signal, **tags):
    """A video of the patches, signal 0..1 [n, 3], in 10 bits with these tags."""
    shown = np.repeat((signal.clip(0, 1) * 65535).round().astype("<u2"), 32, 0)
    matrix = "bt2020" if tags["colorspace"] == "bt2020nc" else "bt709"
    told = ":".join(f"{key}={value}" for key, value in tags.items())
    run_ffmpeg(
        "-f", "rawvideo", "-pix_fmt", "rgb48le", "-s", f"{len(shown)}x64", "-r", "8", "-i", "-",
        "-vf", f"scale=out_color_matrix={matrix}:out_range=tv:flags=accurate_rnd,"
        f"format=yuv444p10le,setparams={told}:range=tv", "-c:v", "libx265",
        "-x265-params", "log-level=error:qp=4", path,
        stdin=np.tile(shown, (64, 1)).tobytes() * 2,
    )  # fmt: skip
    frame = next(read_video(probe_video(path)))[0]
    return frame[32, 16::32].numpy().astype(int)


@pytest.mark.parametrize(("curve", "tag"), [(pq, "smpte2084"), (hlg, "arib-std-b67")])
def test_hdr_becomes_what_it_shows(tmp_path, curve, tag):
    light = (PATCHES / 255) ** 2.4 @ np.transpose(TO_2020) * WHITE
    tags = {"color_trc": tag, "color_primaries": "bt2020", "colorspace": "bt2020nc"}
    got = coded(tmp_path / "hdr.mp4", curve(light), **tags)
    off = abs(got - PATCHES)[1:]  # without the mapping by up to 100
    assert off[(PATCHES[1:] > 0)].max() <= 3
    assert off.max() <= 12  # the curve is steep beside black
    assert got[0].min() > 235  # white: the rest is for what is brighter


@pytest.mark.parametrize(("curve", "tag"), [(pq, "smpte2084"), (hlg, "arib-std-b67")])
def test_hdr_that_tells_its_curve_alone_is_taken_for_bt2020(tmp_path, curve, tag):
    light = (PATCHES / 255) ** 2.4 @ np.transpose(TO_2020) * WHITE
    shown = curve(light)
    told = {"color_trc": tag, "color_primaries": "bt2020", "colorspace": "bt2020nc"}
    want = coded(tmp_path / "told.mp4", shown, **told)
    run_ffmpeg("-i", tmp_path / "told.mp4", "-c", "copy", "-bsf:v", "hevc_metadata="
               "colour_primaries=2:matrix_coefficients=2", tmp_path / "alone.mkv")  # fmt: skip
    got = next(read_video(probe_video(tmp_path / "alone.mkv")))[0, 32, 16::32].numpy()
    assert abs(got.astype(int) - want).max() <= 3


@pytest.mark.parametrize(
    ("matrix", "tag", "space"), [(TO_2020, "bt2020", "bt2020nc"), (TO_P3, "smpte432", "bt709")]
)
def test_a_wide_gamut_becomes_that_of_bt709(tmp_path, matrix, tag, space):
    signal = ((PATCHES / 255) ** 2.4 @ np.transpose(matrix)) ** (1 / 2.4)
    tags = {"color_trc": "bt709", "color_primaries": tag, "colorspace": space}
    got = coded(tmp_path / "wide.mp4", signal, **tags)
    assert abs(got - PATCHES).max() <= 6


def test_highlights_keep_their_order(tmp_path):
    light = np.outer([203, 400, 600, 800, 1000], [1, 1, 1])
    tags = {"color_trc": "smpte2084", "color_primaries": "bt2020", "colorspace": "bt2020nc"}
    got = coded(tmp_path / "hdr.mp4", pq(light), **tags)
    assert (np.diff(got[:, 0]) >= 0).all()
    assert got[0].max() + 8 < got[1].min() < got[-1].min()


def test_interlaced_frames_are_woven_apart_and_others_left_as_they_are(tmp_path):
    count = 20
    fields = np.zeros((2 * count, 64, 96, 3), np.uint8)
    for place, field in enumerate(fields):
        field[:, place : place + 40] = 235  # moves with each field
    feed = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "96x64", "-r", "50", "-i", "-"]
    weave = ["-vf", "tinterlace=mode=interleave_top,fieldorder=tff"]
    h264 = ["-c:v", "libx264", "-crf", "4", "-flags", "+ilme+ildct", "-x264-params", "tff=1"]
    run_ffmpeg(*feed, *weave, *h264, tmp_path / "woven.mp4", stdin=fields.tobytes())
    info = probe_video(tmp_path / "woven.mp4")
    frames = torch.cat(list(read_video(info)))[..., 1].float()
    assert (info.rate, info.frames, len(frames)) == (25, count, count)
    combs = (frames[:, 1::2] - frames[:, ::2]).abs().mean()
    assert combs < 1  # 2.4 where the fields of two moments stand in one frame
    for place, frame in enumerate(frames):  # each shows the moment of its first field
        left = int((frame[31] > 120).float().argmax())
        assert abs(left - 2 * place) <= 1
    run_ffmpeg(*feed, "-c:v", "libx264", "-crf", "4", tmp_path / "plain.mp4",
               stdin=fields.tobytes())  # fmt: skip
    plain = probe_video(tmp_path / "plain.mp4")
    assert sum(map(len, read_video(plain))) == plain.frames == 2 * count


def test_a_single_interlaced_frame_is_shown(tmp_path):
    run_ffmpeg("-f", "lavfi", "-i", "testsrc=s=96x64:r=25:d=0.04", "-vf", "setfield=tff",
               "-c:v", "mpeg2video", "-flags", "+ilme+ildct", tmp_path / "one.ts")  # fmt: skip
    info = probe_video(tmp_path / "one.ts")
    assert (info.frames, sum(map(len, read_video(info)))) == (1, 1)


@pytest.mark.parametrize("suffix", ["mkv", "ts"])
@pytest.mark.parametrize("second", ["scale=128:80", "scale=96:48"])
def test_a_picture_that_changes_its_shape_is_refused(tmp_path, suffix, second):
    names = []
    for name, filters in (("a", "null"), ("b", second)):
        run_ffmpeg("-f", "lavfi", "-i", "testsrc=s=96x64:r=8:d=1", "-vf", filters, "-c:v",
                   "libx264", "-bf", "0", tmp_path / f"{name}.ts")  # fmt: skip
        names.append(f"file {name}.ts\n")
    (tmp_path / "list.txt").write_text("".join(names))
    path = tmp_path / f"both.{suffix}"
    run_ffmpeg("-f", "concat", "-i", tmp_path / "list.txt", "-c", "copy", path)
    with pytest.raises(BadMedia, match=f"^both.{suffix} changes the size or shape of its picture"):
        for _ in read_video(probe_video(path)):
            pass


def test_colours_that_change_in_midstream_do_not_move_frames(tmp_path):
    names = []
    for place, matrix in enumerate(("smpte170m", "bt709")):
        frames = numbered(20)[10 * place : 10 * place + 10]
        encode_mp4([frames], 16, tmp_path / "a.mp4", crf=4)
        run_ffmpeg("-i", tmp_path / "a.mp4", "-vf", f"setparams=colorspace={matrix}", "-c:v",
                   "libx264", "-crf", "4", "-bf", "0", tmp_path / f"{place}.ts")  # fmt: skip
        names.append(f"file {place}.ts\n")
    (tmp_path / "list.txt").write_text("".join(names))
    path = tmp_path / "both.mkv"
    run_ffmpeg("-f", "concat", "-i", tmp_path / "list.txt", "-c", "copy", path)
    info = probe_video(path)
    assert read_numbers(info) == list(range(20))
    assert read_numbers(info, 8) == list(range(0, 20, 2))


FORMATS = {
    "4:4:4": ("yuv444p", ["libx264", "-crf", "4"], "mp4"),
    "4:2:2 in 10 bits": ("yuv422p10le", ["libx264", "-crf", "4"], "mp4"),
    "10 bits": ("yuv420p10le", ["libx265", "-x265-params", "log-level=error:qp=8"], "mp4"),
    "grey": ("gray", ["ffv1"], "mkv"),
    "RGB": ("gbrp", ["ffv1"], "mkv"),
    "RGB packed": ("bgr0", ["ffv1"], "mkv"),
    "alpha": ("yuva444p10le", ["prores_ks", "-profile:v", "4"], "mov"),
    "palette": ("pal8", ["gif"], "gif"),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_frames_of_any_pixel_format_keep_their_levels(tmp_path, kind):
    pixels, codec, suffix = FORMATS[kind]
    encode_mp4([numbered(10)], 16, tmp_path / "a.mp4", crf=4)
    path = tmp_path / f"b.{suffix}"
    run_ffmpeg("-i", tmp_path / "a.mp4", "-pix_fmt", pixels, "-c:v", *codec, path)
    info = probe_video(path)
    assert read_numbers(info) == list(range(10))
    frame = list(read_video(info))[-1][-1].float()
    assert abs(frame.mean() - 9 * STEP) <= 3  # a palette of few colours dithers


def test_the_default_picture_is_taken_and_never_a_cover(tmp_path):
    for name, first in (("a", 0), ("b", 10)):
        encode_mp4([numbered(20)[first : first + 10]], 16, tmp_path / f"{name}.mp4", crf=4)
    run_ffmpeg("-f", "lavfi", "-i", "color=red:s=640x640", "-frames:v", "1", tmp_path / "c.png")
    path = tmp_path / "both.mkv"
    run_ffmpeg("-i", tmp_path / "a.mp4", "-i", tmp_path / "b.mp4", "-map", "0:v", "-map", "1:v",
               "-c", "copy", "-disposition:v:0", "0", "-disposition:v:1", "default",
               path)  # fmt: skip
    assert read_numbers(probe_video(path)) == list(range(10, 20))
    covered = tmp_path / "covered.mp4"
    run_ffmpeg("-i", tmp_path / "c.png", "-i", tmp_path / "a.mp4", "-map", "0:v", "-map", "1:v",
               "-c", "copy", "-disposition:v:0", "attached_pic", covered)  # fmt: skip
    assert read_numbers(probe_video(covered)) == list(range(10))


def test_turned_pixels_that_are_not_square_are_turned_too(tmp_path):
    encode_mp4([numbered(3, 128, 160)], 16, tmp_path / "a.mp4", crf=4)
    run_ffmpeg("-i", tmp_path / "a.mp4", "-vf", "setsar=2", "-c:v", "libx264", tmp_path / "b.mp4")
    run_ffmpeg("-display_rotation", "90", "-i", tmp_path / "b.mp4", "-c", "copy",
               tmp_path / "turned.mp4")  # fmt: skip
    info = probe_video(tmp_path / "turned.mp4")
    assert (info.width / info.height) == pytest.approx(128 / 320, rel=0.02)
    assert sum(map(len, read_video(info))) == 3
