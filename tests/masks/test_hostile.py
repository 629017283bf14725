"""Mask files that lie, burst, or are something else: each ends in a sentence, and soon."""

import io
import os
import struct
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from engine.config import LIMITS
from engine.errors import BadMedia
from engine.flow import go_on
from engine.masks import archive
from engine.masks.stored import open_mask
from tests.support.clips import clip

LABELS = np.zeros((3, 64, 96), np.uint8)
LABELS[:, 20:40, 20:60] = 1


def png(width=96, height=64):
    file = io.BytesIO()
    Image.new("RGB", (width, height), "blue").save(file, "PNG")
    return file.getvalue()


def huge_png(side):
    """A PNG of a few KB that claims `side` x `side` pixels, and has them."""

    def chunk(kind, data):
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes((side // 8 + 1) * side), 9)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def npz(path, masks):
    np.savez_compressed(path / "m.npz", masks=masks)
    return path / "m.npz"


def zipped(path, **members):
    """An archive of members by their names, in which `0` stands for a dot, `1` for a slash."""
    with zipfile.ZipFile(path / "m.zip", "w", zipfile.ZIP_DEFLATED) as made:
        for name, data in members.items():
            made.writestr(name.replace("_0", ".").replace("_1", "/"), data)
    return path / "m.zip"


def claiming(path, shape, dtype="'|u1'", fortran=False, data=bytes(100)):
    """An .npz file whose header says whatever it is told to."""
    head = f"{{'descr': {dtype}, 'fortran_order': {fortran}, 'shape': {shape}}}\n".encode()
    array = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + data
    return zipped(path, masks_0npy=array)


def pickled(path):
    return npz(path, np.array([{"a": 1}, open], dtype=object))


def changed(path, place, *values):
    data = bytearray(path.read_bytes())
    data[place : place + len(values)] = values
    path.write_bytes(data)
    return path


def cut(path, share=0.5):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def locked(path):
    made = zipped(path, a1_0png=png())
    data = made.read_bytes()
    for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = data.index(mark) + place
        data = data[:at] + b"\x01" + data[at + 1 :]
    made.write_bytes(data)
    return made


def packed(path, how):
    with zipfile.ZipFile(path / "m.zip", "w", how) as made:
        made.writestr("masks.npy", bytes(1000))
    return path / "m.zip"


def twice(path):
    with zipfile.ZipFile(path / "m.zip", "w") as made, pytest.warns(UserWarning):
        made.writestr("1.png", png())
        made.writestr("1.png", png())
    return path / "m.zip"


def seven(value=7, kind=np.uint8):
    masks = LABELS.astype(kind)
    masks[2, 5, 5] = value
    return masks


def folder(path, **files):
    (path / "masks").mkdir()
    for name, data in files.items():
        place = path / "masks" / name.replace("_0", ".")
        place.mkdir() if data is None else place.write_bytes(data)
    return path / "masks"


def pipe(path):
    os.mkfifo(path / "mask.png")
    return path / "mask.png"


def file(path, name, data):
    (path / name).write_bytes(data)
    return path / name


HOSTILE = {
    "a pickle": (pickled, "object"),
    "a pickle by its header": (lambda p: claiming(p, (3, 64, 96), "'|O'"), "object"),
    "an absurd count": (lambda p: claiming(p, (10**12, 64, 96)), "has not as many numbers"),
    "an absurd side": (lambda p: claiming(p, (1, 10**9, 10**9)), "1 to 4096 pixels a side"),
    "a side too many": (lambda p: npz(p, np.zeros((1, 4, 5000), np.uint8)), "1 to 4096 pixels"),
    "a negative count": (lambda p: claiming(p, (-3, 64, 96)), "1 to 4096 pixels a side"),
    "a count that overflows": (lambda p: claiming(p, (2**62, 2, 2)), "not as many numbers"),
    "no frames": (lambda p: npz(p, LABELS[:0]), "1 to 4096 pixels"),
    "no persons": (lambda p: npz(p, np.zeros((3, 0, 64, 96), bool)), "1 to 4096 pixels"),
    "code in a header": (lambda p: claiming(p, "__import__('os')"), "is a damaged ZIP or .npz"),
    "a header without end": (
        lambda p: claiming(p, "(" * 60_000), "is a damaged ZIP or .npz"),
    "seven persons": (lambda p: npz(p, np.ones((3, 7, 64, 96), bool)), "at most 6 are told apart"),
    "label 7": (lambda p: npz(p, seven()), "frame 2 has the label 7; 0, for the background, to 6"),
    "label 255": (lambda p: npz(p, seven(255)), "frame 2 has the label 255"),
    "NaN": (lambda p: npz(p, seven(np.nan, np.float32)), "masks is float32 [3, 64, 96]; uint8"),
    "wide integers": (lambda p: npz(p, LABELS.astype(np.int64)), "masks is int64"),
    "words": (lambda p: npz(p, np.array(["who"])), "masks is <U3"),
    "one number": (lambda p: npz(p, np.uint8(3)), "masks is uint8 []"),
    "too many axes": (lambda p: npz(p, np.zeros((2, 2, 2, 2, 2), bool)), "bool [2, 2, 2, 2, 2]"),
    "persons as numbers": (lambda p: npz(p, np.ones((3, 2, 64, 96), np.uint8)), "bool [T, P, H"),
    "Fortran order": (lambda p: npz(p, np.asfortranarray(LABELS)), "numpy.ascontiguousarray"),
    "no masks": (lambda p: zipped(p, joints_0npy=b"x", fps_0npy=b"x"), "no array masks, but 'fps"),
    "an .npz cut short": (lambda p: cut(npz(p, LABELS)), "is a damaged ZIP or .npz"),
    "a broken checksum": (
        lambda p: changed(npz(p, LABELS), 60, 255, 0, 255, 0, 255), "is a damaged ZIP or .npz"),
    "a locked member": (locked, "is locked or packed otherwise"),
    "packed by LZMA": (lambda p: packed(p, zipfile.ZIP_LZMA), "is locked or packed otherwise"),
    "packed by bzip2": (lambda p: packed(p, zipfile.ZIP_BZIP2), "is locked or packed otherwise"),
    "a way out": (lambda p: zipped(p, _0_0_1a1_0png=png()), "to be written outside of it"),
    "a hidden way out": (lambda p: zipped(p, a_1_0_0_1_0_0_1a1_0png=png()), "outside of it"),
    "an absolute name": (lambda p: zipped(p, _1etc_1a1_0png=png()), "outside of it, '/etc/a1.png'"),
    "a way out of Windows": (
        lambda p: zipped(p, **{"..\\a1_0png": png()}), "outside of it"),
    "two files of one name": (twice, "two files of the same name"),
    "an empty archive": (lambda p: zipped(p), "m.zip is a file of another kind; a mask is a pict"),
    "hidden files alone": (lambda p: zipped(p, __MACOSX_1a_0png=b"x"), "holds no pictures"),
    "a text": (lambda p: zipped(p, a1_0png=b"hello, this is no picture"), "picture is expected"),
    "an archive in an archive": (
        lambda p: zipped(p, a1_0png=zipped(p, b_0png=png()).read_bytes()), "is a ZIP archive; a"),
    "a picture that bursts": (lambda p: zipped(p, a1_0png=huge_png(20_000)), "16.8 megapixels"),
    "a member that bursts": (
        lambda p: zipped(p, a1_0png=bytes(LIMITS.max_image_bytes + 1)), "at most 52428800 are"),
    "pictures of two sizes": (
        lambda p: zipped(p, a1_0png=png(), a2_0png=png(64, 96)), "'a2.png' is 64x96 and the first"),
    "a frame that is missing": (
        lambda p: zipped(p, a1_0png=png(), a3_0png=png()), "'a3.png' comes after 'a1.png'"),
    "a frame that is there twice": (
        lambda p: zipped(p, a1_0png=png(), a01_0png=png()), "comes after 'a"),
    "a name of many lines": (
        lambda p: zipped(p, **{"a1\n_0png": png(), "a3\n_0png": png()}), "comes after 'a1\\n.png'"),
    "an empty folder": (folder, "masks holds no pictures"),
    "a folder in a folder": (lambda p: folder(p, a1_0png=None), "a1.png is a folder"),
    "a folder with a video": (
        lambda p: folder(p, a1_0png=clip(p / "a.mp4", 3).read_bytes()), "a1.png is a video; a"),
    "nothing": (lambda p: p / "mask.png", "There is no mask mask.png."),
    "an empty file": (lambda p: file(p, "mask.png", b""), "is empty; a mask is expected"),
    "a pipe": (pipe, "is a device or a pipe"),
    "a page": (lambda p: file(p, "mask.png", b"<!doctype html><p>404"), "is a page of the web; a"),
    "an array that is not packed": (
        lambda p: file(p, "mask.npy", b"\x93NUMPY"), ".npz file with an array masks."),
    "a picture cut short": (
        lambda p: cut(file(p, "mask.png", png(400, 400)), 0.4), "cannot be decoded, it is damaged"),
    "a video cut short": (lambda p: cut(clip(p / "mask.mp4")), "is a damaged video"),
    "a small picture": (lambda p: file(p, "mask.png", png(20, 20)), "needs 64 pixels a side"),
}  # fmt: skip


def read_all(path):
    stored = open_mask(path)
    return [*stored.frames(range(stored.count), go_on)]


@pytest.mark.parametrize(("make", "sentence"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_ends_in_a_sentence(tmp_path, make, sentence):
    path = make(tmp_path)
    before = sorted(entry.name for entry in tmp_path.iterdir())
    with pytest.raises(BadMedia) as raised:
        read_all(path)
    said = str(raised.value)
    assert sentence in said
    assert said.endswith(".")
    assert "\n" not in said
    assert len(said) < 400
    assert str(tmp_path) not in said
    assert sorted(entry.name for entry in tmp_path.iterdir()) == before


def test_an_archive_of_too_many_files_is_not_listed(tmp_path, monkeypatch):
    path = zipped(tmp_path, **{f"a{n}_0png": b"x" for n in range(30)})
    monkeypatch.setattr(archive, "_MAX_MEMBERS", 29)
    with pytest.raises(BadMedia, match=r"m\.zip holds more than 29 files\."):
        open_mask(path)


def test_labels_that_burst_are_not_unpacked(tmp_path, monkeypatch):
    path = npz(tmp_path, np.zeros((100, 64, 96), np.uint8))
    assert path.stat().st_size < 3000
    monkeypatch.setattr(archive, "_MAX_UNPACKED", 600_000)
    with pytest.raises(BadMedia, match=r"Halve its sides, or give a video\."):
        open_mask(path)


def test_labels_are_read_frame_by_frame_and_not_beyond_the_last_that_is_wanted(tmp_path):
    masks = seven()
    stored = open_mask(npz(tmp_path, masks))
    frames = [*stored.frames([0, 0, 1], go_on)]
    assert [frame.numpy().tolist() == LABELS[0].tolist() for frame in frames] == [True] * 3
    assert stored.count == 3
