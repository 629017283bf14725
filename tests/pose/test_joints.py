"""Joint files: what is written is read back, and everything else is a sentence."""

import logging
import tracemalloc
import zipfile

import numpy as np
import pytest

from engine.config import LIMITS
from engine.errors import BadMedia, OutputError
from engine.pose.joints import JointClip, load_joints, save_joints


def person(frames=3, persons=1, seed=0):
    rng = np.random.default_rng(seed)
    place = rng.uniform((-400, -800, 2500), (400, 800, 3500), (frames, persons, 24, 3))
    return place.astype(np.float32)


@pytest.mark.parametrize("size", [None, (336, 208)])
def test_what_was_saved_is_read_back(tmp_path, size):
    path, clip = tmp_path / "walk.npz", JointClip(person(5, 2), 23.976, size)
    save_joints(path, clip)
    back = load_joints(path)
    assert np.array_equal(back.joints, clip.joints)
    assert (back.fps, back.size) == (23.976, size)
    assert [file.name for file in tmp_path.iterdir()] == ["walk.npz"]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int32, ">f4"])
def test_one_person_in_any_number_format_is_read(tmp_path, dtype):
    joints = np.round(person()[:, 0]).astype(dtype)
    np.savez(tmp_path / "one.npz", joints=joints, note="made elsewhere")
    clip = load_joints(tmp_path / "one.npz")
    assert clip.joints.dtype == np.float32
    assert np.array_equal(clip.joints, joints.astype(np.float32)[:, None])
    assert (clip.fps, clip.size) == (16.0, None)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_a_joint_that_is_no_number_is_missing_and_counted(tmp_path, caplog, value):
    joints = person().astype(np.float64)
    joints[1, 0, 7, 1] = joints[2, 0, 3] = value
    np.savez(tmp_path / "gaps.npz", joints=joints)
    with caplog.at_level(logging.WARNING):
        got = load_joints(tmp_path / "gaps.npz").joints
    want = person()
    want[1, 0, 7] = want[2, 0, 3] = 0
    assert np.array_equal(got, want)
    assert "2 of 72 joints" in caplog.text


BAD_ARRAYS = {
    "no joints": ({"poses": person()}, "holds no array `joints`"),
    "17 joints": ({"joints": person()[:, :, :17]}, r"joints are \[3, 1, 17, 3\]; expected"),
    "2D": ({"joints": person()[..., :2]}, "expected .T, 24, 3."),
    "one frame, flat": ({"joints": person()[0, 0]}, r"joints are \[24, 3\]"),
    "too many axes": ({"joints": person()[None]}, "expected .T, 24, 3."),
    "no frame": ({"joints": person()[:0]}, "at least one frame"),
    "no person": ({"joints": person()[:, :0]}, "one person"),
    "text": ({"joints": np.full((3, 24, 3), "a")}, "expected numbers in millimetres"),
    "complex": ({"joints": person() + 1j}, "complex64"),
    "NaN alone": ({"joints": person() * np.nan}, "every joint is missing"),
    "zeros alone": ({"joints": person() * 0}, "every joint is missing"),
    "metres": ({"joints": person() / 1000}, "median depth .* Multiply metres by 1000"),
    "fps 0": ({"joints": person(), "fps": 0}, "fps is 0"),
    "fps above the limit": ({"joints": person(), "fps": 1000}, "fps is 1000"),
    "fps NaN": ({"joints": person(), "fps": np.nan}, "fps is not one finite number"),
    "two fps": ({"joints": person(), "fps": [16, 24]}, "fps is not one finite number"),
    "fps as text": ({"joints": person(), "fps": "16"}, "fps is not one finite number"),
    "height alone": ({"joints": person(), "height": 512}, "both or neither"),
    "half a row": ({"joints": person(), "height": 51.5, "width": 40}, "51.5 x 40"),
    "no width": ({"joints": person(), "height": 512, "width": 0}, "512 x 0"),
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_a_file_with_wrong_contents_says_what_is_wrong(tmp_path, name):
    arrays, sentence = BAD_ARRAYS[name]
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(BadMedia, match=sentence) as raised:
        load_joints(tmp_path / "bad.npz")
    assert "bad.npz" in str(raised.value)


def valid_bytes(tmp_path):
    save_joints(tmp_path / "good.npz", JointClip(person(40), 16.0, None))
    return (tmp_path / "good.npz").read_bytes()


def test_a_file_that_is_no_npz_is_refused(tmp_path):
    whole = valid_bytes(tmp_path)
    np.save(tmp_path / "array.npy", person())
    contents = {
        "empty": b"",
        "text": b"not joints",
        "cut short": whole[: len(whole) // 2],
        "an .npy": (tmp_path / "array.npy").read_bytes(),
    }
    for name, held in contents.items():
        (tmp_path / name).write_bytes(held)
        with pytest.raises(BadMedia, match=f"{name} is not an .npz file, or cut short"):
            load_joints(tmp_path / name)


def test_a_file_that_is_not_there_or_a_folder_is_refused(tmp_path):
    for path in (tmp_path / "none.npz", tmp_path):
        with pytest.raises(BadMedia, match="There is no file"):
            load_joints(path)


def test_every_flipped_byte_is_noticed_or_harmless(tmp_path):
    whole, path = valid_bytes(tmp_path), tmp_path / "flipped.npz"
    refused = 0
    for at in range(0, len(whole), 37):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        try:
            assert np.array_equal(load_joints(path).joints, person(40))
        except BadMedia:
            refused += 1
    assert refused > len(whole) // 37 * 0.9


class Pickled:
    def __reduce__(self):
        return pytest.fail, ("a pickle was opened",)


def test_pickled_objects_are_never_opened(tmp_path):
    np.savez(tmp_path / "objects.npz", joints=np.array([{"a": 1}], object))
    with pytest.raises(BadMedia, match="joints are object; expected numbers"):
        load_joints(tmp_path / "objects.npz")
    np.savez(tmp_path / "objects.npz", joints=person(), fps=np.array(Pickled(), object))
    with pytest.raises(BadMedia, match="fps is not one finite number but object"):
        load_joints(tmp_path / "objects.npz")


def test_as_many_persons_as_a_job_may_ask_for_are_read(tmp_path):
    np.savez(tmp_path / "crowd.npz", joints=person(2, LIMITS.max_persons))
    assert load_joints(tmp_path / "crowd.npz").joints.shape == (2, LIMITS.max_persons, 24, 3)
    np.savez(tmp_path / "crowd.npz", joints=person(2, LIMITS.max_persons + 1))
    with pytest.raises(BadMedia, match=r"crowd.npz has 9 persons; at most 8 are drawn"):
        load_joints(tmp_path / "crowd.npz")


def head(shape, dtype="<f4", version=(1, 0), before=b""):
    """What stands before the numbers of an array, whether or not they follow."""
    said = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    return array_of(before + said + b"\n", version)


def array_of(header, version=(1, 0)):
    width = 2 if version == (1, 0) else 4
    return b"\x93NUMPY" + bytes(version) + len(header).to_bytes(width, "little") + header


def archive(path, how=zipfile.ZIP_DEFLATED, /, **members):
    with zipfile.ZipFile(path, "w", how) as held:
        for name, content in members.items():
            held.writestr(f"{name}.npy", content)
    return path


NUMBERS = person().tobytes()
CLAIMS = {
    "15,000 persons": (head((10, 15_000, 24, 3)) + bytes(10 * 15_000 * 288), "15000 persons"),
    "a trillion frames": (head((10**12, 1, 24, 3)), "too many. Cut the clip"),
    "a number of frames beyond 64 bits": (head((10**40, 1, 24, 3)), "too many. Cut the clip"),
    "a negative number of frames": (head((-3, 1, 24, 3)) + NUMBERS, "with at least one frame"),
    "frames without numbers": (head((100, 1, 24, 3)) + NUMBERS, "fewer numbers than it says"),
    "small numbers that grow": (head((900_000, 1, 24, 3), "|u1"), "too many. Cut the clip"),
    "a shape that is none": (head("'abc'") + NUMBERS, "damaged or holds more than numbers"),
    "a shape of text": (head(("a", "b", 24, 3)) + NUMBERS, "damaged or holds more than numbers"),
    "a type that is none": (head((3, 1, 24, 3), "<q9") + NUMBERS, "damaged or holds more"),
    "a record": (head((3, 1, 24, 3), [("a", "<f4")]) + NUMBERS, "expected numbers in millimetres"),
    "dates": (head((3, 1, 24, 3), "<M8[s]") + NUMBERS * 2, "expected numbers in millimetres"),
    "an open bracket": (array_of(b"{'descr': (((((((" + b"\n"), "damaged or holds more"),
    "a hundred brackets": (array_of(b"(" * 3000 + b"\n"), "damaged or holds more than numbers"),
    "a head that is code": (array_of(b"__import__('os').abort()\n"), "damaged or holds more"),
    "a head with a NUL": (array_of(b"{'descr': '\0'}\n"), "damaged or holds more than numbers"),
    "a head of bytes": (array_of(bytes(range(128, 256))), "damaged or holds more than numbers"),
    "a head indented wrongly": (array_of(b"  {\n 'a\n"), "damaged or holds more than numbers"),
    "a long head": (head((3, 1, 24, 3), before=b" " * 20_000) + NUMBERS, "damaged or holds more"),
    "a head of 4 GB": (b"\x93NUMPY\x02\0\xff\xff\xff\xff{", "damaged or holds more"),
    "a version that is none": (head((3, 1, 24, 3), version=(9, 9)) + NUMBERS, "damaged or holds"),
    "a head cut short": (head((3, 1, 24, 3))[:20], "damaged or holds more than numbers"),
    "no array": (b"not an array", "damaged or holds more than numbers"),
    "nothing": (b"", "damaged or holds more than numbers"),
}  # fmt: skip


@pytest.mark.parametrize("name", CLAIMS)
def test_what_an_array_claims_is_looked_at_before_its_numbers(tmp_path, name):
    content, sentence = CLAIMS[name]
    path = archive(tmp_path / "claim.npz", joints=content)
    tracemalloc.start()
    with pytest.raises(BadMedia, match=sentence) as raised:
        load_joints(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 300


@pytest.mark.parametrize("how", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_an_array_packed_in_a_way_that_numpy_has_not_is_refused(tmp_path, how):
    path = archive(tmp_path / "packed.npz", how, joints=head((3, 1, 24, 3)) + NUMBERS)
    with pytest.raises(BadMedia, match="joints is locked or packed otherwise than numpy does it"):
        load_joints(path)


def table_changed(whole, at, value):
    """Writes over the entry of the first member in the table of an archive."""
    start = whole.rindex(b"PK\x01\x02") + at
    return whole[:start] + value + whole[start + len(value) :]


@pytest.mark.parametrize(
    ("at", "value"),
    [(8, b"\x01\0"), (8, b"\x41\0"), (10, b"\x63\0"), (10, b"\xff\xff"), (24, b"\xff" * 4),
     (42, b"\xff" * 4), (6, b"\xff\xff"), (46, b"\xff\xff"), (16, b"\0\0\0\0")],
)  # fmt: skip
def test_an_archive_whose_table_lies_is_refused(tmp_path, at, value):
    path = archive(tmp_path / "lies.npz", joints=head((3, 1, 24, 3)) + NUMBERS)
    path.write_bytes(table_changed(path.read_bytes(), at, value))
    with pytest.raises(BadMedia, match=r"lies.npz"):
        load_joints(path)


def test_an_archive_of_many_members_is_not_listed(tmp_path):
    members = {f"x{n}": b"" for n in range(100)}
    path = archive(tmp_path / "many.npz", joints=head((3, 1, 24, 3)) + NUMBERS, **members)
    with pytest.raises(BadMedia, match="holds more than 64 arrays; 4 are expected"):
        load_joints(path)


def test_an_array_that_unpacks_to_too_much_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("joints.npy", bytes(65 * 2**20))
    with pytest.raises(BadMedia, match="Cut the clip"):
        load_joints(tmp_path / "bomb.npz")


def test_joints_that_cannot_be_written_leave_nothing_behind(tmp_path):
    (tmp_path / "taken.npz").mkdir()
    for path in (tmp_path / "none" / "walk.npz", tmp_path / "taken.npz"):
        with pytest.raises(OutputError, match="cannot be written"):
            save_joints(path, JointClip(person(), 16.0, None))
    assert [file.name for file in tmp_path.iterdir()] == ["taken.npz"]
