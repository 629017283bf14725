"""MP4 files box by box, for tables that no encoder writes."""

import struct

MATRIX = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)


def box(kind, *parts):
    content = b"".join(parts)
    return struct.pack(">I", 8 + len(content)) + kind + content


def full(kind, *parts, flags=0):
    return box(kind, struct.pack(">I", flags), *parts)


def numbers(*values):
    return struct.pack(f">{len(values)}I", *values)


def track(samples, number=1):
    """A track of MPEG-4 video that claims so many frames of one byte."""
    entry = box(b"mp4v", bytes(6), struct.pack(">H", 1), bytes(16), struct.pack(">HH", 96, 64),
                numbers(0x480000, 0x480000, 0), struct.pack(">H", 1), bytes(32),
                struct.pack(">Hh", 24, -1))  # fmt: skip
    table = box(b"stbl", full(b"stsd", numbers(1), entry), full(b"stts", numbers(1, samples, 1)),
                full(b"stsc", numbers(1, 1, samples, 1)), full(b"stsz", numbers(1, samples)),
                full(b"stco", numbers(1, 400)))  # fmt: skip
    media = box(b"minf", full(b"vmhd", bytes(8), flags=1),
                box(b"dinf", full(b"dref", numbers(1), full(b"url ", flags=1))), table)  # fmt: skip
    head = full(b"tkhd", numbers(0, 0, number, 0, samples), bytes(16), MATRIX,
                numbers(96 << 16, 64 << 16), flags=3)  # fmt: skip
    clock = full(b"mdhd", numbers(0, 0, 1000, samples), bytes(4))
    handler = full(b"hdlr", numbers(0), b"vide", bytes(13))
    return box(b"trak", head, box(b"mdia", clock, handler, media))


def movie(*tracks, extends=b"", fragments=b""):
    """A file of these tracks, with a kilobyte of zeros for all their frames."""
    kind = box(b"ftyp", b"isom", numbers(512), b"isommp41")
    head = full(b"mvhd", numbers(0, 0, 1000, 1000, 65536), b"\1\0", bytes(10), MATRIX, bytes(24),
                numbers(9))  # fmt: skip
    return kind + box(b"moov", head, *tracks, extends) + fragments + box(b"mdat", bytes(1000))


def fragmented(counts):
    """A file whose fragments claim so many frames each."""
    extends = box(b"mvex", full(b"trex", numbers(1, 1, 1, 1, 0)))
    made = []
    for place, count in enumerate(counts):
        head = full(b"tfhd", numbers(1, 1000, 1), flags=0x18)  # a length and a size for all
        run = full(b"trun", numbers(count))
        made.append(box(b"moof", full(b"mfhd", numbers(place)), box(b"traf", head, run)))
    return movie(track(0), extends=extends, fragments=b"".join(made))
