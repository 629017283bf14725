"""What a picture file costs a decoder beyond its pixels, counted before one sees it.

A file of 50 MB can hold millions of parts of a few bytes, each of which costs a decoder time and
memory, or more with each part before it. The scans here stop at the limit and keep nothing; what
they do not understand is left to the decoder, which will refuse it.
"""

import mmap
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

from engine.errors import BadMedia

Bytes: TypeAlias = "mmap.mmap | bytes"  # a file, never copied whole

MAX_SEGMENTS = 10_000  # of a JPEG; bytes between two segments count as one each
MAX_SEGMENT_BYTES = 16 * 2**20  # before the pixels of a JPEG
MAX_JOINED = 64  # segments whose contents a decoder puts together, or reads through
# Each scan of a JPEG goes over the whole picture, and a few bytes are enough for one.
MAX_SCANS = 100
MAX_FILL_BYTES = 2**16  # in a row between a JPEG's markers: a decoder begins again at the first
MAX_CHUNKS = 50_000  # of a PNG or WebP
MAX_PACKED = 256  # chunks of a PNG that are unpacked, each to a MiB
MAX_BLOCKS = 4096  # of 255 bytes, before the first picture of a GIF
MAX_TAGS = 1000  # of a TIFF
MAX_NUMBERS = 200_000  # in one tag of a TIFF: more than a place for each tile of 16x16
MAX_ITEM_BYTES = 2**18  # that list the items of an AVIF; finding one goes over all
MAX_BOXES = 10_000  # of an AVIF
MAX_SAMPLES = 100_000  # pictures of an animated AVIF
MAX_SLOW_BYTES = 8 * 2**20  # of formats that are decoded in Python
MAX_HEADER_BYTES = 4096  # of a PPM

_SCAN, _END, _WITHOUT_LENGTH = 0xDA, 0xD9, (0x01, 0xD8, *range(0xD0, 0xD8))
# one \xff of a run is enough: with \xff+ a run is gone over once for each of its bytes
_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")
_NUMBER_TYPES = (3, 4, 5, 8, 9, 10, 11, 12, 13, 16, 17, 18)  # of TIFF: all but bytes and text
_PPM_HEADER = re.compile(rb"P[1-6f]\s(?:\s|#[^\r\n]*[\r\n])*\d+\s(?:\s|#[^\r\n]*[\r\n])*\d+\s")
_PLAIN_PPM = (b"P1", b"P2", b"P3")


def refuse_costly(path: Path) -> None:
    """Raises `BadMedia` for a file whose decoding would cost far more than its size tells."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        head = data[:16]
        scan = next((scan for magic, scan in _SCANS if magic.match(head)), None)
        try:
            what = scan(data) if scan is not None else None
        except (struct.error, IndexError):  # it is cut short
            return
    if what is not None:
        raise BadMedia(f"{path.name} is {what}; save it again.")


def _jpeg(data: Bytes) -> str | None:
    """Steps as decoders do: from segment to segment, and over each byte that is none."""
    place, size = 2, len(data)
    steps = nbytes = joined = 0
    while place + 4 <= size:
        steps += 1
        if steps > MAX_SEGMENTS:
            return f"a JPEG of more than {MAX_SEGMENTS} segments"
        code = data[place + 1] if data[place] == 0xFF else 0
        if code in (0, 0xFF):
            place += 1
            continue
        place += 2
        if code == _SCAN:
            break
        if code == _END:
            return None
        if code not in _WITHOUT_LENGTH:
            length = int.from_bytes(data[place : place + 2], "big")
            nbytes += length
            joined += code == 0xED or data[place + 2 : place + 8] == b"Exif\0\0"
            place += max(length, 2)
    if nbytes > MAX_SEGMENT_BYTES:
        return f"a JPEG with more than {MAX_SEGMENT_BYTES >> 20} MiB before its pixels"
    if joined > MAX_JOINED:
        return f"a JPEG with more than {MAX_JOINED} segments of notes"
    return _jpeg_scans(data, place, steps)


def _jpeg_scans(data: Bytes, place: int, steps: int) -> str | None:
    """Counts scans from marker to marker as decoders do, so that other bytes do not count.
    `place`: behind the marker of the first.
    """
    if data.find(b"\xff" * MAX_FILL_BYTES, place) >= 0:
        return f"a JPEG with more than {MAX_FILL_BYTES >> 10} KiB of filling"
    scans = 1
    place += int.from_bytes(data[place : place + 2], "big")
    while marker := _MARKER.search(data, place):
        code, place = marker[1][0], marker.end()
        if code == _END:
            return None
        scans, steps = scans + (code == _SCAN), steps + 1
        if scans > MAX_SCANS:
            return f"a JPEG of more than {MAX_SCANS} scans"
        if steps > MAX_SEGMENTS:
            return f"a JPEG of more than {MAX_SEGMENTS} segments"
        if code not in _WITHOUT_LENGTH:
            place += int.from_bytes(data[place : place + 2], "big")
    return None


def _png(data: Bytes) -> str | None:
    place, packed = 8, 0
    for _ in range(MAX_CHUNKS):
        kind = data[place + 4 : place + 8]
        if place + 12 > len(data) or kind == b"IEND":
            return None
        packed += kind in (b"iCCP", b"zTXt", b"iTXt")
        if packed > MAX_PACKED:
            return f"a PNG of more than {MAX_PACKED} chunks of notes"
        place += 12 + int.from_bytes(data[place : place + 4], "big")
    return f"a PNG of more than {MAX_CHUNKS} chunks"


def _webp(data: Bytes) -> str | None:
    place, end = 12, min(len(data), 8 + int.from_bytes(data[4:8], "little"))
    for _ in range(MAX_CHUNKS):
        if place + 8 > end:
            return None
        length = int.from_bytes(data[place + 4 : place + 8], "little")
        place += 8 + length + length % 2
    return f"a WebP picture of more than {MAX_CHUNKS} chunks"


def _gif(data: Bytes) -> str | None:
    flags = data[10]
    place = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    steps = 0
    while place + 2 <= len(data) and steps <= MAX_BLOCKS:
        steps += 1
        kind = data[place]
        if kind in (0x2C, 0x3B):  # the first picture, the end
            return None
        if kind != 0x21:
            place += 1
            continue
        place += 2
        while steps <= MAX_BLOCKS and (length := data[place]):
            place, steps = place + 1 + length, steps + 1
        place += 1
    return None if steps <= MAX_BLOCKS else f"a GIF of more than {MAX_BLOCKS} blocks of notes"


def _tiff(data: Bytes) -> str | None:
    order = "<" if data[:2] == b"II" else ">"
    is_big = 43 in data[2:4]
    first = struct.unpack_from(order + ("Q" if is_big else "I"), data, 8 if is_big else 4)[0]
    entry = struct.Struct(order + ("HHQ8x" if is_big else "HHI4x"))
    count = struct.unpack_from(order + ("Q" if is_big else "H"), data, first)[0]
    if count > MAX_TAGS:
        return f"a TIFF of more than {MAX_TAGS} tags"
    for n in range(count):
        tag, kind, numbers = entry.unpack_from(data, first + (8 if is_big else 2) + n * entry.size)
        if kind in _NUMBER_TYPES and numbers > MAX_NUMBERS:
            return f"a TIFF whose tag {tag} has more than {MAX_NUMBERS} numbers"
    return None


def _avif(data: Bytes) -> str | None:
    items = 0
    for boxes, (path, start, end) in enumerate(iter_boxes(data), start=1):
        if boxes > MAX_BOXES:
            return f"an AVIF of more than {MAX_BOXES} boxes"
        if path[-1:] in ((b"iinf",), (b"iloc",), (b"iref",), (b"ipma",), (b"grpl",)):
            items += end - start
        if items > MAX_ITEM_BYTES:
            return f"an AVIF whose lists of items have more than {MAX_ITEM_BYTES >> 10} KiB"
        # version and flags come first; in stsz a size for all stands before the number
        place = {b"stsz": 8, b"stz2": 8, b"stts": 4, b"stsc": 4, b"stco": 4, b"co64": 4}
        if (at := place.get(path[-1])) is not None:
            samples = int.from_bytes(data[start + at : start + at + 4], "big")
            if samples > MAX_SAMPLES:
                return f"an AVIF of more than {MAX_SAMPLES} pictures"
    return None


_CONTAINERS = {
    (b"meta",): 4, (b"meta", b"iprp"): 0, (b"meta", b"iprp", b"ipco"): 0, (b"moov",): 0,
    (b"moov", b"trak"): 0, (b"moov", b"trak", b"mdia"): 0, (b"moov", b"trak", b"meta"): 4,
    (b"moov", b"trak", b"mdia", b"minf"): 0, (b"moov", b"trak", b"mdia", b"minf", b"stbl"): 0,
    (b"moov", b"meta"): 4,
}  # fmt: skip


def iter_boxes(
    data: Bytes, start: int = 0, end: int | None = None, path: tuple[bytes, ...] = ()
) -> Iterator[tuple[tuple[bytes, ...], int, int]]:
    """The boxes of an AVIF, outer ones first: the names that lead to one, and where what it holds
    begins and ends. They are at most as deep as a picture's boxes are.
    """
    place, end = start, len(data) if end is None else end
    while place + 8 <= end:
        size, name = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        head = 8
        if size == 1:
            size, head = int.from_bytes(data[place + 8 : place + 16], "big"), 16
        size = end - place if size == 0 else size
        if size < head:
            return
        inner, after = (*path, bytes(name)), min(place + size, end)
        yield inner, place + head, after
        if inner in _CONTAINERS:
            yield from iter_boxes(data, place + head + _CONTAINERS[inner], after, inner)
        place = after


def _bmp(data: Bytes) -> str | None:
    is_packed = struct.unpack_from("<I", data, 14)[0] >= 40 and data[30] in (1, 2)
    if is_packed and len(data) > MAX_SLOW_BYTES:
        return f"a run-length coded BMP of more than {MAX_SLOW_BYTES >> 20} MiB"
    return None


def _ppm(data: Bytes) -> str | None:
    if _PPM_HEADER.match(data[:MAX_HEADER_BYTES]) is None:
        return f"a PPM without its size in the first {MAX_HEADER_BYTES} bytes"
    if data[:2] in _PLAIN_PPM and len(data) > MAX_SLOW_BYTES:
        return f"a PPM of decimal numbers of more than {MAX_SLOW_BYTES >> 20} MiB"
    return None


_SCANS: tuple[tuple[re.Pattern[bytes], Callable[[Bytes], str | None]], ...] = tuple(
    (re.compile(magic, re.DOTALL), scan)
    for magic, scan in (
        (rb"\xff\xd8\xff", _jpeg),
        (rb"\x89PNG\r\n\x1a\n", _png),
        (rb"RIFF....WEBP", _webp),
        (rb"GIF8[79]a", _gif),
        (rb"II[*+]\0|MM\0[*+]|MM[*+]\0|II\0[*+]", _tiff),
        (rb"....ftyp", _avif),
        (rb"BM", _bmp),
        (rb"P[0-9fy]", _ppm),
    )
)
