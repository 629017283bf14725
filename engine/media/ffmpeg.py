"""One ffmpeg process at a time: started without network or terminal, stopped whatever happens.

A process that reads a file is bounded in memory and processor time, and opens known formats with
known decoders alone: such a file may come from a stranger (docs/reference/runpod.md F.9). Whoever
waits for a process asks now and then whether the job goes on. A process that somebody else ended
or stopped says nothing about the file, and is told as what it is.

The program comes with imageio-ffmpeg, which brings no ffprobe: what a file holds is read from
ffmpeg's `framecrc` listing, a text format made for programs, and not from its messages.
"""

import os
import re
import resource
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import IO

import imageio_ffmpeg

from engine.errors import EngineError, Interrupted, Unavailable
from engine.flow import Check, go_on

STRICT = "-xerror"  # damage that ffmpeg would paper over ends the run instead

# Local files alone, no playlist format, which could name other files or addresses, and decoders
# that see daily use, not every one of the last thirty years.
SAFE_INPUT = (
    "-protocol_whitelist", "file,pipe",
    "-format_whitelist", "mov,mp4,matroska,webm,avi,mpegts,gif,mp3,aac,wav,flac,ogg",
    "-codec_whitelist",
    "h264,hevc,av1,libdav1d,libaom-av1,vp8,vp9,libvpx,libvpx-vp9,mpeg4,mpeg2video,mpegvideo,mjpeg,"
    "prores,ffv1,png,rawvideo,gif,aac,mp2,mp2float,mp3,mp3float,opus,libopus,vorbis,libvorbis,flac,"
    "alac,ac3,eac3,pcm_u8,pcm_s8,pcm_s16le,pcm_s16be,pcm_s24le,pcm_s24be,pcm_s32le,pcm_s32be,"
    "pcm_f32le,pcm_f32be,pcm_f64le,pcm_f64be,pcm_alaw,pcm_mulaw",
)  # fmt: skip

_NO_PTS = -(2**63)
_DISCARD = 4  # packet flag: needed to decode others, not shown (before an edit list's start)
_NO_STREAM = "Stream map "
_MESSAGE_BYTES = 16_384
_LISTING_BYTES = 16 * 2**20  # some 250 000 packets: an hour of picture and sound
# A file of a few bytes may claim millions of frames, each of which would cost an entry of an index.
# To list a file of 500 MiB takes a second and 100 MiB, one with frames of 4096x4096 less than 256.
LISTING_MEMORY_BYTES = 2**29
LISTING_CPU_S = 30
# HEVC of 4096x4096 in 10 bits takes 1.9 GiB with 16 threads, and each further one 8 MiB of stack.
MEMORY_BYTES = 6 * 2**30
_CPU_S = 1800  # 2000 frames of the largest size, of all cores together
_STALL_S = 60.0  # without a byte to or from the process
_ASK_S = 0.5  # between two questions whether the job goes on
_IDLE = 0.1  # share of a stall below which the process did not work but was kept from it
# its statuses after one signal that it caught, and after many
_SIGNALLED = (255, 123)
_CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE)
# messages with which ffmpeg follows up the one that said what happened
_FOLLOW_UP = re.compile(
    r"Error (opening|parsing|processing packet|reinitializing)|Failed to configure|Task finished"
    r"|Terminating thread|Last message rep"
    r"|Conversion failed|Failed to set value|To ignore this|Nothing was written|Could not open enc"
    r"|Error (submitting|sending frames|muxing|while)"
)


class FfmpegFailed(EngineError):
    """Says that ffmpeg stopped by itself; `reason` is the last message that tells why."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Packet:
    """A packet of a stream; times are in seconds."""

    start: Fraction
    length: Fraction
    place: int = 0  # its time of decoding, in ticks


@dataclass(frozen=True, slots=True)
class Stream:
    """One stream as `framecrc` lists it, its packets in the order in which they are shown."""

    media: str  # "video" or "audio"
    codec: str
    tick: Fraction  # seconds; of a decoded video, one frame at its nominal rate
    width: int
    height: int
    pixel_aspect: Fraction
    sample_rate: int
    packets: list[Packet]
    first_s: Fraction  # the time of the first packet of the file, shown or not; 0 without one


@dataclass(frozen=True, slots=True)
class Ffmpeg:
    """A running process, where its messages go, its limit, and whom to ask."""

    process: subprocess.Popen[bytes]
    messages: IO[bytes]
    cpu_s: int
    check: Check

    def finish(self) -> str:
        """Waits for the end and returns the last message or nothing.

        Raises `FfmpegFailed`, `Interrupted` if somebody else ended the process, and what `check`
        raises.
        """
        if self.process.stdin is not None:
            self.process.stdin.close()
        code, used_s = self._wait()
        said = last_words(self.messages)
        if code:
            raise self._failure(code, used_s, said)
        return said

    def _wait(self) -> tuple[int, float]:
        """The exit code, and the seconds of processor time that were used."""
        pause_s = 0.001
        while self.process.returncode is None:
            # Not `Popen.wait`: it throws away what the process used.
            ended, status, usage = os.wait4(self.process.pid, os.WNOHANG)
            if ended:
                self.process.returncode = os.waitstatus_to_exitcode(status)
                return self.process.returncode, usage.ru_utime + usage.ru_stime
            self.check()
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.05)
        return self.process.returncode, 0.0

    def _failure(self, code: int, used_s: float, said: str) -> EngineError:
        if code > 0 and code not in _SIGNALLED:
            return FfmpegFailed(said or f"ffmpeg ended with status {code}")
        if used_s >= 0.95 * self.cpu_s:
            return FfmpegFailed("it takes too much processor time")
        if -code in _CRASHES:
            return FfmpegFailed(f"ffmpeg crashed ({signal.Signals(-code).name})")
        how = _signal_name(-code) if code < 0 else "a signal"
        return Interrupted(
            f"ffmpeg was ended from outside, by {how}: often because the machine ran out of "
            "memory. The file is not to blame. Try again, or give the machine more memory."
        )


def file_url(path: Path) -> str:
    """A name of the file that ffmpeg never takes for an option, a pattern or an address."""
    return f"file:{path.absolute()}"


@contextmanager
def ffmpeg(
    arguments: Sequence[str],
    feed: bool = False,
    cpu_s: int = _CPU_S,
    memory_bytes: int = MEMORY_BYTES,
    check: Check = go_on,
) -> Iterator[Ffmpeg]:
    """Starts ffmpeg; its output is on `process.stdout`, or its input on `process.stdin` if `feed`.

    The process never outlives the block. It is bounded unless all it reads is what we feed it.
    `check` is asked whenever the process is waited for.
    """
    command = [_program(), "-hide_banner", "-nostdin", "-v", "error", *arguments]
    stdin = subprocess.PIPE if feed else subprocess.DEVNULL
    stdout = subprocess.DEVNULL if feed else subprocess.PIPE
    with _messages() as messages:
        # A group of its own: Ctrl-C is ours to handle, and ends the process through this block.
        try:
            process = subprocess.Popen(
                command, stdin=stdin, stdout=stdout, stderr=messages, bufsize=0, process_group=0
            )
        except OSError as error:
            raise Unavailable(f"ffmpeg cannot be started: {error}.") from error
        try:
            if not feed:
                _bound(process.pid, cpu_s, memory_bytes)
            yield Ffmpeg(process, messages, _CPU_S if feed else cpu_s, check)
        finally:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()


def list_streams(
    arguments: Sequence[str],
    cpu_s: int = LISTING_CPU_S,
    memory_bytes: int = LISTING_MEMORY_BYTES,
    check: Check = go_on,
) -> tuple[list[Stream], str]:
    """Runs ffmpeg with `framecrc` output: the streams, and the last message if there is one.

    There are no streams if `-map` names none. Raises `FfmpegFailed` and `Interrupted`.
    """
    listing = bytearray()
    command = [STRICT, *arguments, "-flush_packets", "0", "-f", "framecrc", "pipe:1"]
    with ffmpeg(command, cpu_s=cpu_s, memory_bytes=memory_bytes, check=check) as run:
        buffer = memoryview(bytearray(1 << 16))
        while size := read_into(run, buffer):
            listing += buffer[:size]
            if len(listing) > _LISTING_BYTES:
                raise FfmpegFailed("it holds more packets than any clip has")
        try:
            said = run.finish()
        except FfmpegFailed as error:
            if error.reason.startswith(_NO_STREAM):
                return [], ""
            raise
    try:
        return _parse(listing.decode("utf-8", "replace")), said
    except (ValueError, KeyError, IndexError, ArithmeticError) as error:
        raise FfmpegFailed(f"what ffmpeg tells of it makes no sense ({error})") from error


def clock_zero(source: Sequence[str], track: str, counted: Stream, check: Check) -> Fraction:
    """The moment on the clock of a file from which ffmpeg counted the times of `counted`.

    Where clocks begin anywhere, as in MPEG-TS, that is the start of the one track which was read,
    another for each track. `source`: what makes ffmpeg read the file.
    """
    arguments = ["-copyts", *source, "-map", track, "-c", "copy", "-frames", "1"]
    streams, _ = list_streams(arguments, check=check)
    return streams[0].first_s - counted.first_s if streams else Fraction(0)


def read_into(run: Ffmpeg, view: memoryview) -> int:
    """Fills `view` from the process's output and returns the bytes filled: fewer only at its end.

    Raises `FfmpegFailed` if nothing comes for a minute, `Interrupted` if that is because the
    process is kept from its work, and what its `check` raises.
    """
    assert run.process.stdout is not None
    pipe, filled = run.process.stdout.fileno(), 0
    while filled < len(view):
        _await(run, pipe, select.POLLIN)
        size = os.readv(pipe, [view[filled:]])
        if not size:
            break
        filled += size
    return filled


def write_from(run: Ffmpeg, view: memoryview) -> None:
    """Gives all of `view` to the process. Raises as `read_into` does, and as `finish` does."""
    assert run.process.stdin is not None
    pipe = run.process.stdin.fileno()
    os.set_blocking(pipe, False)
    try:
        while view:
            _await(run, pipe, select.POLLOUT)
            view = view[os.write(pipe, view) :]
    except BrokenPipeError as error:
        run.finish()  # raises what ffmpeg said
        raise FfmpegFailed("the encoder stopped taking frames") from error


def _await(run: Ffmpeg, pipe: int, event: int) -> None:
    """Waits until the pipe is ready, asking `run.check` meanwhile."""
    ready = select.poll()  # `select.select` knows no descriptor above 1023
    ready.register(pipe, event)
    run.check()
    if ready.poll(1000 * _ASK_S):
        return
    began_s, waited_s = _used_s(run.process.pid), _ASK_S
    while waited_s < _STALL_S:
        run.check()
        if ready.poll(1000 * _ASK_S):
            return
        waited_s += _ASK_S
    if _used_s(run.process.pid) - began_s < _IDLE * _STALL_S:
        raise Interrupted(
            f"ffmpeg did not get to work for {_STALL_S:.0f} s: it was stopped, or waits for a "
            "disk. The file is not to blame. Try again."
        )
    raise FfmpegFailed(f"no progress in {_STALL_S:.0f} s")


def _used_s(process_id: int) -> float:
    """The seconds of processor time that a process has used; 0 if it is gone."""
    try:
        stat = Path(f"/proc/{process_id}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0.0
    user, system = stat.rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


def last_words(messages: IO[bytes]) -> str:
    """The last message that is not a follow-up of another, without ffmpeg's prefixes."""
    size = messages.seek(0, 2)
    messages.seek(max(0, size - _MESSAGE_BYTES))
    lines = messages.read().decode("utf-8", "replace").splitlines()
    lines = [re.sub(r"^(\[[^\]]*\] )+", "", line).strip() for line in lines]
    lines = [re.sub(r"(not on whitelist) '.*", r"\1", line) for line in lines]
    telling = [line for line in lines if line and not _FOLLOW_UP.match(line)]
    return (telling or lines or [""])[-1]


def _messages() -> IO[bytes]:
    try:
        return tempfile.TemporaryFile()
    except OSError as error:
        raise Unavailable(
            f"ffmpeg cannot be started: there is no place for its messages ({error.strerror})."
        ) from error


def _bound(process_id: int, cpu_s: int, memory_bytes: int) -> None:
    """Limits a process from outside: a hook after fork is not safe in a program with threads."""
    with suppress(ProcessLookupError):  # it has ended already
        resource.prlimit(process_id, resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
        resource.prlimit(process_id, resource.RLIMIT_CPU, (cpu_s, cpu_s + 5))


def _program() -> str:
    try:
        return imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:
        raise Unavailable(
            "ffmpeg is not here: install imageio-ffmpeg, or name one in IMAGEIO_FFMPEG_EXE."
        ) from error


def _parse(listing: str) -> list[Stream]:
    """Lines are "#key index: value" or "index, dts, pts, duration, size, checksum[, F=flags]"."""
    facts: dict[int, dict[str, str]] = {}
    packets: dict[int, list[Packet]] = {}
    first_s: dict[int, Fraction] = {}
    for line in listing.splitlines():
        if header := re.fullmatch(r"#(\w+) (\d+): (.*)", line):
            facts.setdefault(int(header[2]), {})[header[1]] = header[3].strip()
        elif not line.startswith("#"):
            fields = [field.strip() for field in line.split(",")]
            index, dts, pts, duration = map(int, fields[:4])
            flags = next((int(field[2:], 16) for field in fields if field[:2] == "F="), 0)
            tick = Fraction(facts[index]["tb"])
            start_s = (dts if pts == _NO_PTS else pts) * tick
            first_s.setdefault(index, start_s)
            if not flags & _DISCARD:
                packets.setdefault(index, []).append(Packet(start_s, duration * tick, dts))
    return [
        _stream(known, packets.get(index, []), first_s.get(index, Fraction(0)))
        for index, known in facts.items()
    ]


def _stream(facts: dict[str, str], packets: list[Packet], first_s: Fraction) -> Stream:
    width, height = map(int, facts.get("dimensions", "0x0").split("x"))
    across, down = map(int, facts.get("sar", "0/1").split("/"))
    return Stream(
        media=facts.get("media_type", ""),
        codec=facts.get("codec_id", ""),
        tick=Fraction(facts.get("tb", "1/1")),
        width=width,
        height=height,
        pixel_aspect=Fraction(across, down) if across > 0 and down > 0 else Fraction(1),
        sample_rate=int(facts.get("sample_rate", "0")),
        packets=sorted(packets, key=lambda packet: packet.start),
        first_s=first_s,
    )
