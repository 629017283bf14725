"""Small files that cost a decoder much are refused by a count, before one sees them."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from engine.errors import BadMedia
from engine.media import picture_cost
from engine.media.picture import load_image
from engine.media.picture_cost import refuse_costly

SIDE = (96, 64)


def encoded(kind, **options):
    held = io.BytesIO()
    Image.fromarray(np.full((*SIDE[::-1], 3), 90, np.uint8)).save(held, kind, **options)
    return held.getvalue()


def chunk(kind, data=b""):
    crc = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + crc


def packed(nbytes=1000):
    return b"a\0\0" + zlib.compress(bytes(nbytes))


def jpeg(before=b"", after=b""):
    whole = encoded("JPEG")
    return whole[:2] + before + whole[2:-2] + after + whole[-2:]


def png(*chunks):
    whole = encoded("PNG")
    return whole[:33] + b"".join(chunks) + whole[33:]


def gif(notes):
    whole = encoded("GIF")
    start = 13 + (3 << (whole[10] & 7) + 1)
    return whole[:start] + notes + whole[start:]


def comment(blocks):
    return b"\x21\xfe" + (b"\xff" + bytes(255)) * blocks + b"\0"


def webp(frames=0, notes=0):
    image = encoded("WEBP")[12:]
    size = struct.pack("<I", SIDE[0] - 1)[:3] + struct.pack("<I", SIDE[1] - 1)[:3]
    frame = b"ANMF" + struct.pack("<I", 16 + len(image)) + bytes(6) + size + bytes(4) + image
    body = b"VP8X" + struct.pack("<I", 10) + b"\2\0\0\0" + size
    body += b"ANIM" + struct.pack("<IIH", 6, 0, 0) + frame * frames + b"XXXX\0\0\0\0" * notes
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def tiff(tags, numbers=1, big=False):
    kinds = {256: SIDE[0], 257: SIDE[1], 258: 8, 259: 1, 262: 1, 273: 1000, 277: 1, 278: SIDE[1],
             279: SIDE[0] * SIDE[1]}  # fmt: skip
    kinds |= {40_000 + n: 1 for n in range(tags - len(kinds))}
    entry, count = ("<HHQQ", "<Q") if big else ("<HHII", "<H")
    head = b"II+\0\x08\0\0\0" + struct.pack("<Q", 16) if big else b"II*\0\x08\0\0\0"
    rows = [
        struct.pack(entry, tag, 4, numbers if tag == 40_000 else 1, value)
        for tag, value in kinds.items()
    ]
    data = head + struct.pack(count, len(rows)) + b"".join(rows) + bytes(8)
    return data.ljust(1000, b"\0") + bytes(SIDE[0] * SIDE[1] + 4 * numbers)


def box(kind, data=b""):
    return struct.pack(">I", 8 + len(data)) + kind + data


def item_lists(nbytes):
    whole = encoded("AVIF")
    meta = box(b"meta", bytes(4) + box(b"iinf", bytes(nbytes)))
    return whole[: int.from_bytes(whole[:4], "big")] + meta


def samples(count):
    held = io.BytesIO()
    first = Image.new("RGB", SIDE)
    first.save(held, "AVIF", save_all=True, append_images=[Image.new("RGB", SIDE, "red")])
    data = bytearray(held.getvalue())
    at = data.index(b"stsz") + 8
    data[at : at + 8] = struct.pack(">II", 9, count)
    return bytes(data)


def bmp(nbytes):
    head = b"BM" + struct.pack("<IHHI", 0, 0, 0, 1078)
    head += struct.pack("<IiiHHIIiiII", 40, *SIDE, 1, 8, 1, 0, 0, 0, 256, 0)
    return (head + bytes(1024) + b"\x60\1\0\0" * 64 + b"\0\1").ljust(nbytes, b"\0")


def ppm(kind, header_bytes=0, nbytes=0):
    return (kind + b"\n#" + b"x" * header_bytes + b"\n96 64 255\n").ljust(nbytes, b"1")


# a file at the limit of a scan, one beyond it, and what is said of that
M = picture_cost
CASES = {
    "jpeg segments": (lambda n: jpeg(b"\xff\xe5\0\2" * n), 9000, M.MAX_SEGMENTS, "JPEG of more"),
    "jpeg filling": (lambda n: jpeg(b"\xff" * n), 9000, M.MAX_SEGMENTS, "10000 segments"),
    "jpeg zeros": (lambda n: jpeg(b"\xff\0" * n), 4000, M.MAX_SEGMENTS, "10000 segments"),
    "jpeg segments behind": (
        lambda n: jpeg(after=b"\xff\xe5\0\2" * n), 9000, M.MAX_SEGMENTS, "10000 segments",
    ),
    "jpeg filling behind": (
        lambda n: jpeg(after=b"\xff" * n), M.MAX_FILL_BYTES - 8, M.MAX_FILL_BYTES, "64 KiB of fill",
    ),
    "jpeg notes": (
        lambda n: jpeg(b"\xff\xe1\0\x0cExif\0\0MM\0*" * n), 60, M.MAX_JOINED + 1, "64 segments",
    ),
    "jpeg bytes": (
        lambda n: jpeg((b"\xff\xfe\xff\xff" + bytes(65533)) * n), 200, 257, "16 MiB before its",
    ),
    "png chunks": (lambda n: png(chunk(b"teXx") * n), 20_000, M.MAX_CHUNKS, "50000 chunks"),
    "png pixels": (lambda n: png(chunk(b"IDAT") * n), 20_000, M.MAX_CHUNKS, "50000 chunks"),
    "png profiles": (lambda n: png(chunk(b"iCCP", packed()) * n), 200, 257, "256 chunks of notes"),
    "png texts": (lambda n: png(chunk(b"zTXt", packed()) * n), 200, 257, "256 chunks of notes"),
    "gif comment": (lambda n: gif(comment(n)), 4000, M.MAX_BLOCKS, "4096 blocks of notes"),
    "gif extensions": (lambda n: gif(b"\x21\xfe\0" * n), 2000, M.MAX_BLOCKS + 1, "4096 blocks"),
    "gif junk": (lambda n: gif(b"\1" * n), 4000, M.MAX_BLOCKS + 1, "4096 blocks"),
    "webp frames": (lambda n: webp(frames=n), 2000, M.MAX_CHUNKS, "WebP picture of more"),
    "webp chunks": (lambda n: webp(1, notes=n), 20_000, M.MAX_CHUNKS, "WebP picture of more"),
    "tiff tags": (lambda n: tiff(n), 900, M.MAX_TAGS + 1, "TIFF of more than 1000 tags"),
    "big tiff tags": (lambda n: tiff(n, big=True), 900, M.MAX_TAGS + 1, "1000 tags"),
    "tiff numbers": (lambda n: tiff(11, n), 9000, M.MAX_NUMBERS + 1, "tag 40000 has more than"),
    "avif boxes": (lambda n: encoded("AVIF") + box(b"free") * n, 9000, M.MAX_BOXES, "10000 boxes"),
    "avif items": (item_lists, None, M.MAX_ITEM_BYTES + 1, "lists of items have more than 256"),
    "avif pictures": (samples, None, 50_000_000, "more than 100000 pictures"),
    "packed bmp": (bmp, 4000, M.MAX_SLOW_BYTES + 1, "run-length coded BMP of more than 8"),
    "decimal ppm": (lambda n: ppm(b"P3", 0, n), None, M.MAX_SLOW_BYTES + 1, "decimal numbers"),
    "ppm header": (lambda n: ppm(b"P6", n, 40_000), 4000, M.MAX_HEADER_BYTES, "first 4096 bytes"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", CASES)
def test_a_file_of_very_many_parts_is_refused_and_one_of_many_is_read(tmp_path, case):
    make, few, many, said = CASES[case]
    path = tmp_path / "a.x"
    if few is not None:
        path.write_bytes(make(few))
        assert load_image(path).shape == (64, 96, 3)
    path.write_bytes(make(many))
    with pytest.raises(BadMedia, match=rf"^a\.x is an? .*{said}.*; save it again\.$"):
        load_image(path)


def test_a_run_of_one_byte_is_gone_over_once(tmp_path):
    """With an expression that begins again at each byte this would take days."""
    path = tmp_path / "a.jpg"
    run = b"\xff" * (M.MAX_FILL_BYTES - 8) + b"\0"
    path.write_bytes(jpeg(after=run * 200))
    refuse_costly(path)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "AVIF", "BMP", "PPM"])
def test_a_file_that_is_cut_anywhere_is_left_to_the_decoder(tmp_path, kind):
    whole, path = encoded(kind), tmp_path / "a.x"
    for end in range(1, min(len(whole), 200), 3):
        path.write_bytes(whole[:end])
        try:
            refuse_costly(path)
        except BadMedia as error:
            assert kind == "PPM" and "without its size" in str(error)
