"""ffmpeg as a process: who is to blame when it ends, what it may take, and that it can be left."""

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from engine.errors import BadMedia, Interrupted
from engine.media import ffmpeg as runs
from engine.media.ffmpeg import FfmpegFailed, ffmpeg, list_streams, read_into, write_from
from engine.media.mp4 import encode_mp4
from engine.media.sound import find_sound
from engine.media.video import probe_video, read_video
from tests.support.clips import clip, numbered, tone
from tests.support.mp4_boxes import fragmented, movie, track

pytestmark = pytest.mark.usefixtures("usual_signals")
ROOT = Path(__file__).resolve().parents[2]
ENDLESS = ["-f", "lavfi", "-i", "color=s=64x64", "-f", "rawvideo", "pipe:1"]
FED = ["-f", "rawvideo", "-video_size", "64x64", "-pixel_format", "gray", "-i", "pipe:0", "-f",
       "null", "-"]  # fmt: skip


class Stop(Exception):
    """What a check raises in tests."""


def stopping_after(calls):
    """A check that raises when it was asked so often, and then says by `asked` how often."""

    def check():
        check.asked += 1
        if check.asked > calls:
            raise Stop

    check.asked = 0
    return check


@pytest.fixture(scope="module")
def dance(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dance")
    return clip(folder / "dance.mp4", 20, audio=tone(folder / "a.wav", 2))


# Who ended it


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_process_that_somebody_ended_is_told_as_that(number):
    with (
        pytest.raises(Interrupted, match=r"^ffmpeg was ended from outside, by ") as raised,
        ffmpeg(ENDLESS) as run,
    ):
        read_into(run, memoryview(bytearray(4096)))
        os.kill(run.process.pid, number)
        while read_into(run, memoryview(bytearray(1 << 16))):
            pass
        run.finish()
    assert (raised.value.code, raised.value.fatal) == ("interrupted", False)


def test_a_process_that_is_fed_and_ended_is_told_as_that():
    with pytest.raises(Interrupted, match="SIGKILL"), ffmpeg(FED, feed=True) as run:
        os.kill(run.process.pid, signal.SIGKILL)
        for _ in range(1000):
            write_from(run, memoryview(bytes(4096)))


def test_a_crash_is_the_files_fault():
    with pytest.raises(FfmpegFailed, match=r"^ffmpeg crashed \(SIGSEGV\)$"), ffmpeg(ENDLESS) as run:
        os.kill(run.process.pid, signal.SIGSEGV)
        run.finish()


def python_program(path, text):
    """Writes a program in Python that is started by its name, though its Python may have blanks."""
    script = path.with_suffix(".py")
    script.write_text(text)
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}" "$@"\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def dying(tmp_path, monkeypatch):
    """Puts a program in ffmpeg's place that kills itself once it has been started so often."""

    def install(lives):
        real = runs._program()
        counter = tmp_path / "runs"
        counter.write_text(str(lives))
        program = python_program(
            tmp_path / "ffmpeg",
            "import os, pathlib, signal, sys\n"
            f"counter = pathlib.Path({str(counter)!r})\n"
            "left = int(counter.read_text())\n"
            "counter.write_text(str(left - 1))\n"
            "if left <= 0:\n"
            "    os.kill(os.getpid(), signal.SIGKILL)\n"
            f"os.execv({real!r}, [{real!r}, *sys.argv[1:]])\n",
        )
        monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(program))

    return install


@pytest.mark.parametrize("lives", range(13))
def test_in_no_run_is_the_video_blamed_for_a_kill(dance, tmp_path, dying, lives):
    dying(lives)

    def whole_way():
        info = probe_video(dance)
        sound = find_sound(dance, info.start_s, info.duration_s)
        frames = list(read_video(info))
        encode_mp4(frames, 16, tmp_path / "out.mp4", audio=sound)

    if lives == 12:  # as many runs as there are
        whole_way()
        return
    with pytest.raises(Interrupted, match="SIGKILL"):
        whole_way()
    assert not (tmp_path / "out.mp4").exists()


def test_a_process_that_is_stopped_is_not_the_files_fault(monkeypatch):
    monkeypatch.setattr(runs, "_STALL_S", 0.2)
    monkeypatch.setattr(runs, "_ASK_S", 0.1)
    with pytest.raises(Interrupted, match="did not get to work"), ffmpeg(ENDLESS) as run:
        os.kill(run.process.pid, signal.SIGSTOP)
        while True:
            read_into(run, memoryview(bytearray(1 << 16)))


# Whom to ask


@pytest.mark.parametrize("calls", [0, 3, 30])
def test_a_check_ends_reading_and_writing_at_once(calls):
    for feed, arguments in ((False, ENDLESS), (True, FED)):
        check = stopping_after(calls)
        with pytest.raises(Stop), ffmpeg(arguments, feed=feed, check=check) as run:
            while True:
                if feed:
                    write_from(run, memoryview(bytes(4096)))
                else:
                    read_into(run, memoryview(bytearray(4096)))
        assert check.asked == calls + 1
        assert run.process.returncode == -signal.SIGKILL


def test_a_check_ends_waiting_for_a_process():
    check = stopping_after(3)
    endless = [*ENDLESS[:-3], "-f", "null", "-"]
    with pytest.raises(Stop), ffmpeg(endless, check=check) as run:
        run.finish()
    assert run.process.returncode == -signal.SIGKILL


def test_probing_reading_and_encoding_ask(dance, tmp_path):
    with pytest.raises(Stop):
        probe_video(dance, check=stopping_after(0))
    info, check = probe_video(dance), stopping_after(20)
    with pytest.raises(Stop):
        for _ in read_video(info, chunk=1, check=check):
            pass
    check = stopping_after(5)
    with pytest.raises(Stop):
        encode_mp4((numbered(1) for _ in range(10_000)), 16, tmp_path / "out.mp4", check=check)
    assert list(tmp_path.iterdir()) == []


# What it says and takes


@pytest.mark.parametrize(
    "line",
    ["#tb 0: 0/0\n0, 1, 1, 1, 1, 0x0", "#tb 0: x\n0, 1, 1, 1, 1, 0x0", "0, 1, 1, 1, 1, 0x0",
     "#tb 0: 1/25\n0, a, 1, 1", "#tb 0: 1/25\n0, 1", "#tb 0: 1/25\n#dimensions 0: 3",
     "#tb 0: 1/25\n#sar 0: 1", "#tb 0: 1/25\n#sample_rate 0: x", "#tb 0: 1/25\n0, 1, 1, 1, F=z"],
)  # fmt: skip
def test_a_listing_that_makes_no_sense_is_a_failure_and_no_traceback(tmp_path, monkeypatch, line):
    program = python_program(tmp_path / "ffmpeg", f"print({line!r})\n")
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(program))
    with pytest.raises(FfmpegFailed, match="makes no sense"):
        list_streams(["-i", "a.mp4"])
    with pytest.raises(BadMedia, match=r"^a\.mp4 is not a video: what ffmpeg tells of it"):
        (tmp_path / "a.mp4").write_text("x")
        probe_video(tmp_path / "a.mp4")


BOMBS = {
    "a track of 50 million frames": movie(track(50_000_000)),
    "five tracks of 20 million": movie(*[track(20_000_000, number=n + 1) for n in range(5)]),
    "200 tracks of a million": movie(*[track(1_000_000, number=n + 1) for n in range(200)]),
    "a fragment of 50 million": fragmented([50_000_000]),
    "a hundred fragments of a million": fragmented([1_000_000] * 100),
}


# In a process of its own: see tests/support/measured.py.
PROBE = """
import json, resource, sys
from pathlib import Path
from engine.errors import BadMedia
from engine.media.video import probe_video
try:
    probe_video(Path(sys.argv[1]))
except BadMedia as error:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(json.dumps([str(error), used.ru_maxrss / 2**10, used.ru_utime + used.ru_stime]))
"""


@pytest.mark.parametrize("kind", BOMBS)
def test_a_file_that_claims_countless_frames_costs_little(tmp_path, kind):
    path = tmp_path / "bomb.mp4"
    path.write_bytes(BOMBS[kind])
    assert path.stat().st_size < 100_000
    command = [sys.executable, "-c", PROBE, str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    said, memory, seconds = json.loads(done.stdout)
    assert said.startswith("bomb.mp4 ")
    assert memory < 700  # MiB; 3500 without a bound
    assert seconds < 40  # of the processor, twice what a run may take; 22 of them without a bound
