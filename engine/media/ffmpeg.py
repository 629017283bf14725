"""One ffmpeg process at a time: started without network or terminal, stopped whatever happens.

A process that reads a file is bounded in memory and processor time, and opens known formats with
known decoders alone: such a file may come from a stranger (docs/reference/runpod.md F.9).

The program comes with imageio-ffmpeg, which brings no ffprobe: what a file holds is read from
ffmpeg's `framecrc` listing, a text format made for programs, and not from its messages.
"""

import math
import os
import re
import resource
import select
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import IO

import imageio_ffmpeg

from engine.errors import EngineError, Unavailable

STRICT = "-xerror"  # damage that ffmpeg would paper over ends the run instead

# Local files alone, no playlist format, which could name other files or addresses, and decoders
# that see daily use, not every one of the last thirty years.
SAFE_INPUT = (
    "-protocol_whitelist", "file,pipe",
    "-format_whitelist", "mov,mp4,matroska,webm,avi,mpegts,gif,mp3,aac,wav,flac,ogg",
    "-codec_whitelist",
    "h264,hevc,av1,libdav1d,libaom-av1,vp8,vp9,libvpx,libvpx-vp9,mpeg4,mpeg2video,mpegvideo,mjpeg,"
    "prores,ffv1,gif,aac,mp3,mp3float,opus,libopus,vorbis,libvorbis,flac,alac,ac3,eac3,pcm_u8,"
    "pcm_s16le,pcm_s16be,pcm_s24le,pcm_s24be,pcm_s32le,pcm_f32le,pcm_alaw,pcm_mulaw",
)  # fmt: skip

_NO_PTS = -(2**63)
_DISCARD = 4  # packet flag: needed to decode others, not shown (before an edit list's start)
_MESSAGE_BYTES = 16_384
_LISTING_BYTES = 16 * 2**20  # some 250 000 packets: an hour of picture and sound
# HEVC of 4096x4096 in 10 bits takes 1.9 GiB with 16 threads, and each further one 8 MiB of stack.
_MEMORY_BYTES = 6 * 2**30
_SIGNALLED = 255  # its status after a signal; from us it gets only that of the limit below
_CPU_S = 1800  # 2000 frames of the largest size, of all cores together
# messages with which ffmpeg follows up the one that said what happened
_FOLLOW_UP = re.compile(
    r"Error (opening|parsing|processing packet)|Task finished|Terminating thread|Last message rep"
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


@dataclass(frozen=True, slots=True)
class Ffmpeg:
    """A running process and where its messages go."""

    process: subprocess.Popen[bytes]
    messages: IO[bytes]

    def finish(self) -> str:
        """Waits for the end and returns the last message or nothing. Raises `FfmpegFailed`."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        code = self.process.wait()
        said = last_words(self.messages)
        if code:
            ended = "it takes too much processor time" if code == _SIGNALLED else ""
            raise FfmpegFailed(said or ended or f"ffmpeg ended with status {code}")
        return said


def file_url(path: Path) -> str:
    """A name of the file that ffmpeg never takes for an option, a pattern or an address."""
    return f"file:{path.absolute()}"


@contextmanager
def ffmpeg(arguments: Sequence[str], feed: bool = False, cpu_s: int = _CPU_S) -> Iterator[Ffmpeg]:
    """Starts ffmpeg; its output is on `process.stdout`, or its input on `process.stdin` if `feed`.

    The process never outlives the block. It is bounded unless all it reads is what we feed it.
    """
    command = [_program(), "-hide_banner", "-nostdin", "-v", "error", *arguments]
    stdin = subprocess.PIPE if feed else subprocess.DEVNULL
    stdout = subprocess.DEVNULL if feed else subprocess.PIPE
    with tempfile.TemporaryFile() as messages:
        # A group of its own: Ctrl-C is ours to handle, and ends the process through this block.
        try:
            process = subprocess.Popen(
                command, stdin=stdin, stdout=stdout, stderr=messages, bufsize=0, process_group=0
            )
        except OSError as error:
            raise Unavailable(f"ffmpeg cannot be started: {error}.") from error
        try:
            if not feed:
                _bound(process.pid, cpu_s)
            yield Ffmpeg(process, messages)
        finally:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()


def list_streams(arguments: Sequence[str], timeout_s: float) -> tuple[list[Stream], str]:
    """Runs ffmpeg with `framecrc` output: the streams, and the last message if there is one.

    `timeout_s` limits the waiting and, separately, the processor time. Raises `FfmpegFailed`.
    """
    listing = bytearray()
    command = [STRICT, *arguments, "-flush_packets", "0", "-f", "framecrc", "pipe:1"]
    with ffmpeg(command, cpu_s=math.ceil(timeout_s)) as run:
        buffer = memoryview(bytearray(1 << 16))
        while size := read_into(run.process, buffer, timeout_s):
            listing += buffer[:size]
            if len(listing) > _LISTING_BYTES:
                raise FfmpegFailed("it holds more packets than any clip has")
        said = run.finish()
    return _parse(listing.decode("utf-8", "replace")), said


def read_into(process: subprocess.Popen[bytes], view: memoryview, timeout_s: float) -> int:
    """Fills `view` from the process's output and returns the bytes filled: fewer only at its end.

    Raises `FfmpegFailed` if nothing comes for `timeout_s`.
    """
    assert process.stdout is not None
    ready, filled = select.poll(), 0  # `select.select` knows no descriptor above 1023
    ready.register(process.stdout, select.POLLIN)
    while filled < len(view):
        if not ready.poll(1000 * timeout_s):
            raise FfmpegFailed(f"no progress in {timeout_s:.0f} s")
        size = os.readv(process.stdout.fileno(), [view[filled:]])
        if not size:
            break
        filled += size
    return filled


def last_words(messages: IO[bytes]) -> str:
    """The last message that is not a follow-up of another, without ffmpeg's prefixes."""
    size = messages.seek(0, 2)
    messages.seek(max(0, size - _MESSAGE_BYTES))
    lines = messages.read().decode("utf-8", "replace").splitlines()
    lines = [re.sub(r"^(\[[^\]]*\] )+", "", line).strip() for line in lines]
    lines = [re.sub(r"(not on whitelist) '.*", r"\1", line) for line in lines]
    telling = [line for line in lines if line and not _FOLLOW_UP.match(line)]
    return (telling or lines or [""])[-1]


def _bound(process_id: int, cpu_s: int) -> None:
    """Limits a process from outside: a hook after fork is not safe in a program with threads."""
    with suppress(ProcessLookupError):  # it has ended already
        resource.prlimit(process_id, resource.RLIMIT_DATA, (_MEMORY_BYTES, _MEMORY_BYTES))
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
    for line in listing.splitlines():
        if header := re.fullmatch(r"#(\w+) (\d+): (.*)", line):
            facts.setdefault(int(header[2]), {})[header[1]] = header[3].strip()
        elif not line.startswith("#"):
            fields = [field.strip() for field in line.split(",")]
            index, dts, pts, duration = map(int, fields[:4])
            flags = next((int(field[2:], 16) for field in fields if field[:2] == "F="), 0)
            if not flags & _DISCARD:
                tick = Fraction(facts[index]["tb"])
                start = dts if pts == _NO_PTS else pts
                packets.setdefault(index, []).append(Packet(start * tick, duration * tick))
    return [_stream(known, packets.get(index, [])) for index, known in facts.items()]


def _stream(facts: dict[str, str], packets: list[Packet]) -> Stream:
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
    )
