"""Files made to use up time or memory, or to open others: refused before they are decoded."""

import dataclasses
import resource
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.config import LIMITS
from engine.errors import BadMedia
from engine.media.ffmpeg import FfmpegFailed, ffmpeg
from engine.media.files import check_file, sniff
from engine.media.picture import load_image
from engine.media.sound import find_sound
from engine.media.video import probe_video, read_video
from tests.support.clips import clip, run_ffmpeg
from tests.support.hostile_server import Server

SIDE = 100_000  # ten gigapixels


@pytest.fixture(scope="module")
def clip_16(tmp_path_factory):
    """A clip of 20 frames at 16 fps."""
    return clip(tmp_path_factory.mktemp("clips") / "clip.mp4")


def refusal(call, path, *options):
    with pytest.raises(BadMedia) as raised:
        call(path, *options)
    said = str(raised.value)
    assert str(path.parent) not in said
    return said


def png(width, height, *chunks):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )


def bmp(width, height):
    return b"BM" + struct.pack("<IIIIiiHHIIiiII", 1000, 0, 54, 40, width, height, 1, 24, 0, 0,
                               0, 0, 0, 0) + bytes(946)  # fmt: skip


def gif(screen, frame):
    """A frame may be larger than the screen it is shown on."""
    head = b"GIF89a" + struct.pack("<HHBBB", *screen, 0x80, 0, 0) + bytes(6)
    return head + b"," + struct.pack("<HHHHB", 0, 0, *frame, 0) + b"\x02\x01\x44\x00;"


def webp(width, height):
    size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    chunk = b"VP8X" + struct.pack("<I", 10) + bytes(4) + size
    return b"RIFF" + struct.pack("<I", len(chunk) + 4) + b"WEBP" + chunk


@pytest.mark.parametrize(
    "content",
    [
        png(SIDE, SIDE), png(2**31 - 1, 2**31 - 1), png(2**31 - 1, 64), png(0, 0), bmp(SIDE, SIDE),
        bmp(2**31 - 1, -(2**31)), gif((65535, 65535), (64, 64)), gif((64, 64), (65535, 65535)),
        webp(16384, 16384), webp(2**24, 2**24),
        png(96, 64, (b"zTXt", b"a\0\0" + zlib.compress(bytes(200_000_000)))),
        png(96, 64, *[(b"zTXt", b"a\0\0" + zlib.compress(bytes(1_000_000)))] * 100),
    ],
    ids=["png", "png 2^31", "png wide", "png empty", "bmp", "bmp 2^31", "gif screen", "gif frame",
         "webp", "webp 2^24", "png text", "png texts"],
)  # fmt: skip
def test_a_picture_that_would_grow_is_refused_in_little_memory(tmp_path, content):
    path = tmp_path / "bomb.png"
    path.write_bytes(content)
    assert len(content) < 200_000
    tracemalloc.start()
    said = refusal(load_image, path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert said.startswith("bomb.png ")
    assert peak < 80 * 2**20


def progressive(path, scans):
    """A JPEG whose first scan comes `scans` times more: each decodes, and changes nothing."""
    Image.fromarray(np.full((64, 96), 90, np.uint8)).save(path, "JPEG", progressive=True)
    whole = path.read_bytes()
    first = whole.index(b"\xff\xda")
    second = whole.index(b"\xff", first + 2)
    path.write_bytes(whole[:second] + whole[first:second] * scans + whole[second:])
    return path


def test_a_jpeg_of_very_many_scans_is_refused(tmp_path):
    assert load_image(progressive(tmp_path / "a.jpg", 0)).shape == (64, 96, 3)
    assert load_image(progressive(tmp_path / "a.jpg", 50)).shape == (64, 96, 3)
    said = refusal(load_image, progressive(tmp_path / "a.jpg", 2000))
    assert said == "a.jpg is a JPEG of more than 100 scans; save it again."


def test_what_looks_like_a_scan_inside_or_after_a_jpeg_does_not_count(tmp_path):
    whole = progressive(tmp_path / "a.jpg", 0).read_bytes()
    note = b"\xff\xfe" + struct.pack(">H", 60_002) + b"\xff\xda\x00\x02" * 15_000
    (tmp_path / "b.jpg").write_bytes(whole[:2] + note + whole[2:] + b"\xff\xda" * 1000)
    assert load_image(tmp_path / "b.jpg").shape == (64, 96, 3)


def test_a_video_that_lasts_for_hours_or_has_countless_frames_is_refused(clip_16, tmp_path):
    path = tmp_path / "long.mp4"
    run_ffmpeg("-f", "lavfi", "-i", "color=s=64x64:r=1:d=601", path)
    said = refusal(probe_video, path)
    assert said.startswith("long.mp4 lasts 601 s; a video may last 600 s.")
    few = dataclasses.replace(LIMITS, max_fps=0.03)
    said = refusal(probe_video, clip_16, few)
    assert said == "clip.mp4 holds 20 frames; cut it to the part that is meant."


@pytest.mark.slow
def test_a_listing_without_end_is_cut_off(tmp_path):
    path = tmp_path / "many.avi"
    run_ffmpeg(
        "-f", "lavfi", "-i", "color=s=2x2:r=1000:d=300,format=gray", "-c:v", "rawvideo", path
    )
    assert "it holds more packets than any clip has" in refusal(probe_video, path)


def test_a_process_that_reads_a_file_is_bounded_and_one_that_is_fed_is_not():
    endless = ["-f", "lavfi", "-i", "color=s=64x64", "-f", "rawvideo", "pipe:1"]
    with ffmpeg(endless, cpu_s=7) as run:
        pid = run.process.pid
        assert resource.prlimit(pid, resource.RLIMIT_CPU) == (7, 12)
        assert resource.prlimit(pid, resource.RLIMIT_DATA) == (6 * 2**30, 6 * 2**30)
    with ffmpeg(["-i", "pipe:0", "-f", "null", "-"], feed=True) as run:
        pid = run.process.pid
        assert resource.prlimit(pid, resource.RLIMIT_CPU)[0] == resource.RLIM_INFINITY


def test_too_much_processor_time_ends_in_a_sentence():
    busy = ["-f", "lavfi", "-i", "mandelbrot=s=640x480:maxiter=9999", "-f", "null", "-"]
    with pytest.raises(FfmpegFailed, match="it takes too much processor time"), \
            ffmpeg(busy, cpu_s=1) as run:  # fmt: skip
        run.finish()


@pytest.mark.parametrize(("codec", "suffix"), [("libtheora", "mkv"), ("huffyuv", "avi")])
def test_a_rare_decoder_is_not_started(tmp_path, codec, suffix):
    path = tmp_path / f"a.{suffix}"
    run_ffmpeg("-f", "lavfi", "-i", "testsrc=s=96x64:d=1", "-c:v", codec, path)
    said = refusal(probe_video, path)
    name = codec.removeprefix("lib")
    assert said.startswith(f"a.{suffix} is an unusual video: Codec ({name}) not on whitelist.")


@pytest.mark.parametrize(
    "codec", ["libx265", "libaom-av1", "libvpx-vp9", "mjpeg", "prores", "ffv1"]
)
def test_decoders_in_daily_use_are_started(tmp_path, codec):
    path = tmp_path / "a.mkv"
    quick = ["-cpu-used", "8"] if "av1" in codec or "vp9" in codec else []
    run_ffmpeg("-f", "lavfi", "-i", "testsrc=s=96x64:r=8:d=1", "-c:v", codec, *quick, path)
    assert sum(len(chunk) for chunk in read_video(probe_video(path))) == 8


PLAYLISTS = {
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{url}\n#EXT-X-ENDLIST\n",
    "concat": "ffconcat version 1.0\nfile {url}\n",
    "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
            'mediaPresentationDuration="PT9S"><Period><AdaptationSet mimeType="video/mp4">'
            '<Representation id="1" bandwidth="1"><BaseURL>{url}</BaseURL></Representation>'
            "</AdaptationSet></Period></MPD>",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=a\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5 RTP/AVP 96\n"
           "a=control:{url}\na=rtpmap:96 H264/90000\n",
    "asx": '<asx version="3.0"><entry><ref href="{url}"/></entry></asx>',
    "svg": '<svg xmlns="http://www.w3.org/2000/svg"><image href="{url}"/></svg>',
    "ism": '<SmoothStreamingMedia MajorVersion="2"><StreamIndex Url="{url}"/>'
           "</SmoothStreamingMedia>",
}  # fmt: skip


def avi_with_subtitles(text):
    """An AVI whose only stream is a subtitle that was another file: "GAB2"."""

    def chunk(kind, data):
        return kind + struct.pack("<I", len(data)) + data + bytes(len(data) % 2)

    text = text.encode()
    name = "a.srt".encode("utf-16-le")
    gab2 = b"GAB2\0" + struct.pack("<HI", 2, len(name)) + name + struct.pack("<HI", 4, len(text))
    main = struct.pack("<14I", 40_000, 0, 0, 16, 1, 0, 1, 0, 96, 64, 0, 0, 0, 0)
    stream = b"txts" + struct.pack("<11I4H", 0, 0, 0, 0, 1, 1, 0, 1, 0, 0, 0, 0, 0, 96, 64)
    lists = chunk(b"strh", stream) + chunk(b"strf", bytes(40))
    head = chunk(b"avih", main) + chunk(b"LIST", b"strl" + lists)
    movie = chunk(b"LIST", b"movi" + chunk(b"00tx", gab2 + text))
    return chunk(b"RIFF", b"AVI " + chunk(b"LIST", b"hdrl" + head) + movie)


@pytest.mark.parametrize("kind", PLAYLISTS)
@pytest.mark.parametrize("wrap", [str.encode, avi_with_subtitles], ids=["bare", "in an avi"])
@pytest.mark.parametrize("suffix", ["mp4", "m3u8"])
def test_a_playlist_bare_or_in_a_container_opens_nothing(tmp_path, clip_16, kind, wrap, suffix):
    with Server({}) as server:
        for url in (f"http://127.0.0.1:{server.port}/a.mp4", f"file:{clip_16}", str(clip_16)):
            path = tmp_path / f"list.{suffix}"
            path.write_bytes(wrap(PLAYLISTS[kind].format(url=url)))
            said = refusal(probe_video, path)
            assert said.startswith("list.")
            assert clip_16.name not in said
            assert refusal(load_image, path).startswith("list.")
        assert server.requests == []


def test_sound_of_a_playlist_opens_nothing_either(clip_16, tmp_path):
    with Server({}) as server:
        path = tmp_path / "list.mp3"
        path.write_text(PLAYLISTS["hls"].format(url=f"http://127.0.0.1:{server.port}/a.mp3"))
        with pytest.raises(BadMedia, match=r"The sound of list\.mp3 cannot be read: ") as raised:
            find_sound(path)
        assert str(tmp_path) not in str(raised.value)
        assert server.requests == []


def test_refusals_do_not_tell_where_files_lie(tmp_path):
    said = refusal(lambda path: check_file(path, "picture", 9), Path(tmp_path, "a" * 300))
    assert said.endswith("' cannot be opened: File name too long.")


@pytest.mark.parametrize(
    ("head", "suffix"),
    [(b"", None), (b"\x89PN", None), (b"RIFF\0\0\0\0WAVE", None), (b"BM" + bytes(40), None),
     (b"\0\0\0\x1cftypavif", "avif"), (b"\0\0\0\x1cftypmif1", "heic"), (b"<HTML>", "html"),
     (b"\0\0\0\x08wide", "mov"), (b"\xff\xd8\xff\xe0", "jpg"), (b"GIF88a", None)],
)  # fmt: skip
def test_the_first_bytes_name_the_kind_or_nothing(head, suffix):
    assert sniff(head) == suffix
