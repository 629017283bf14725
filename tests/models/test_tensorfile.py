"""Whatever is named as a file of tensors, what is wrong with it is told in one sentence."""

import json
import os
import pickle
import subprocess
import sys
import zipfile

import pytest
import torch

from engine.errors import BadCheckpoint, MissingModel
from engine.models.tensorfile import TensorFile, is_finite
from tests.support.checkpoints import save
from tests.support.permissions import bound_by_modes, shared_folder

INDEX = "m.safetensors.index.json"
ADVICE = r"weights_only|torch\.load|torch\.save|add_safe_globals|pytorch\.org|_use_new"


def test_an_index_of_shards_opens_them(tmp_path):
    save({"a": torch.ones(2)}, tmp_path / "1.safetensors")
    save({"b": torch.ones(3)}, tmp_path / "2.safetensors")
    held = {"a": "1.safetensors", "b": "2.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": held}))
    file = TensorFile(tmp_path / INDEX)
    assert {name: file.shape(name) for name in file} == {"a": (2,), "b": (3,)}


@pytest.mark.parametrize(
    "text",
    [
        *('{"a": 5}', "[]", "5", "null", "{", "\0", '{"weight_map": []}', '{"weight_map": 5}'),
        *(f'{{"weight_map": {{"a": {value}}}}}' for value in ('""', "5", '"."', "null", "[]")),
        '{"weight_map": {"a": "1.safetensors", "b": 5}}',
        "[" * 100_000,
        '{"weight_map": ' + "9" * 5000 + "}",
    ],
    ids=range(16),
)
def test_what_is_no_index_is_told(tmp_path, text):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(BadCheckpoint, match=rf"^{INDEX} is not an index of shards; a JSON object"):
        TensorFile(tmp_path / INDEX)


def test_an_index_that_names_nothing_or_what_is_not_there_is_told(tmp_path):
    (tmp_path / INDEX).write_text('{"weight_map": {}}')
    with pytest.raises(BadCheckpoint, match="names no shards"):
        TensorFile(tmp_path / INDEX)
    for name, kind, message in (
        ("none.safetensors", MissingModel, r"There is no file .*none\.safetensors"),
        ("a\0.safetensors", MissingModel, "There is no file"),
        ("..", BadCheckpoint, "is a folder"),
        ("a" * 256 + ".safetensors", BadCheckpoint, "cannot be read: File name too long"),
    ):
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(kind, match=message):
            TensorFile(tmp_path / INDEX)


@pytest.mark.parametrize("name", ["m-00003-of-00002.safetensors", "m-00001-of-00000.safetensors"])
def test_a_number_that_is_no_part_of_a_set_is_a_file_of_its_own(tmp_path, name):
    assert list(TensorFile(save({"a": torch.ones(1)}, tmp_path / name))) == ["a"]


@pytest.mark.parametrize("name", ["m.safetensors", "m.pt", INDEX])
def test_what_is_not_a_readable_file_is_told_for_what_it_is(tmp_path, name):
    path = tmp_path / name
    with pytest.raises(MissingModel, match=rf"^There is no file {path}\.$"):
        TensorFile(path)
    path.touch()
    with pytest.raises(MissingModel, match=rf"^There is no file {path}/{name}\.$"):
        TensorFile(path / name)
    with pytest.raises(BadCheckpoint, match=r"is empty \(0 bytes\)"):
        TensorFile(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(BadCheckpoint, match=rf"^{path} is a folder; a file of tensors is"):
        TensorFile(path)
    path.rmdir()
    os.mkfifo(path)
    with pytest.raises(BadCheckpoint, match=rf"^{path} is a pipe or a device"):
        TensorFile(path)
    with pytest.raises(BadCheckpoint, match=r"cannot be read: File name too long\.$"):
        TensorFile(tmp_path / ("a" * 256 + name))


@pytest.mark.parametrize("name", ["m.safetensors", "m.pt", INDEX])
@pytest.mark.parametrize("closed", [".", "folder", "folder/{name}"])
def test_a_file_that_may_not_be_read_is_not_called_missing(name, closed):
    with shared_folder() as root:
        path = root / "folder" / name
        path.parent.mkdir()
        path.write_text("{}")
        (root / closed.format(name=name)).chmod(0)
        with (
            bound_by_modes(),
            pytest.raises(BadCheckpoint, match=rf"^{path} cannot be read: Permission denied\.$"),
        ):
            TensorFile(path)
        (root / closed.format(name=name)).chmod(0o755)


class Trap:
    """Unpickling it would run code."""

    def __reduce__(self):
        return (print, ("code ran",))


def legacy(path):
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)


def zipped(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")


def script(path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), path)


def unfinished(path):
    """A pickle that ends within a number."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", b"\x80\x02J\x01")
        archive.writestr("m/version", "3\n")


PICKLES = {
    "legacy": (legacy, r"is a bare pickle, as PyTorch before 1\.6"),
    "a pickle of Python": (lambda path: path.write_bytes(pickle.dumps({})), "is a bare pickle"),
    "a page of the web": (lambda path: path.write_text("<html>"), r"begins with b'<htm'"),
    "one byte": (lambda path: path.write_text("P"), r"is no PyTorch file \(1 bytes\)"),
    "code": (lambda path: torch.save({"a": Trap()}, path), "holds more than tensors"),
    "another zip": (zipped, "is damaged, cut short or holds more"),
    "TorchScript": (script, "holds more than tensors"),
    "an unfinished pickle": (unfinished, "is damaged, cut short"),
}


@pytest.mark.parametrize("case", PICKLES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*TorchScript:UserWarning")
def test_a_pt_file_is_refused_in_our_own_words(tmp_path, capsys, case):
    write, message = PICKLES[case]
    write(tmp_path / "m.pt")
    with pytest.raises(BadCheckpoint, match=rf"^m\.pt .*{message}") as caught:
        TensorFile(tmp_path / "m.pt")
    text = str(caught.value)
    assert not any(word in text for word in ADVICE.replace("\\", "").split("|"))
    assert "\n" not in text
    assert "code ran" not in capsys.readouterr().out


NOT_PLAIN = {
    "sparse": (lambda: torch.eye(3).to_sparse(), "sparse or nested"),
    "csr": (lambda: torch.eye(3).to_sparse_csr(), "sparse or nested"),
    "meta": (lambda: torch.empty(3, device="meta"), "has a shape but no data"),
    "quantised": (
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        "is a quantised tensor",
    ),
}


@pytest.mark.parametrize("case", NOT_PLAIN)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tensors_that_are_not_plain_are_refused(tmp_path, case):
    make, message = NOT_PLAIN[case]
    torch.save({"module": {"good": torch.ones(2), "odd": make()}}, tmp_path / "m.pt")
    with pytest.raises(BadCheckpoint, match=rf"^m\.pt: odd .*{message}"):
        TensorFile(tmp_path / "m.pt", top_key="module")


def test_values_packed_two_to_a_byte_are_refused(tmp_path):
    header = json.dumps({"a": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}).encode()
    path = tmp_path / "m.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    with (
        pytest.raises(
            BadCheckpoint, match=r"a cannot be read: it is stored as F4, .*FP8 is the smallest"
        ),
        TensorFile(path).open("a"),
    ):
        pass


EXPANDED = """
import sys, torch
from pathlib import Path
from engine.models.tensorfile import TensorFile
file = TensorFile(Path(sys.argv[1]))
for _ in range(2):
    for name in file:
        with file.open(name) as tensor:
            print(name, tensor.shape[0], tensor[-1].sum().item())
"""


def test_a_tensor_larger_than_what_holds_it_gives_no_others_pages_back(tmp_path):
    rows = torch.arange(3.0).repeat_interleave(2**16).view(3, 2**16)
    tensors = {"repeated": torch.ones(1).expand(2**34), "turned": rows.T, "part": rows[:, 5:9]}
    torch.save(tensors, tmp_path / "m.pt")
    run = subprocess.run(
        [sys.executable, "-c", EXPANDED, tmp_path / "m.pt"], capture_output=True, text=True
    )
    want = ["repeated 17179869184 1.0", "turned 65536 3.0", "part 3 8.0"] * 2
    assert (run.returncode, run.stdout.splitlines()) == (0, want), run.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_value_that_is_not_finite_is_seen(dtype):
    values = torch.full((3, 5), torch.finfo(dtype).max, dtype=dtype)
    assert is_finite(values)
    for odd in (torch.nan, torch.inf, -torch.inf):
        values[1, 2] = odd
        assert not is_finite(values)


def rewritten(path, change=None, **members):
    """The archive of a PyTorch file, member by member, as somebody's packer writes it again."""
    torch.save({"a": torch.arange(64.0), "b": torch.ones(3, 5)}, path)
    with zipfile.ZipFile(path) as archive:
        held = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in held.items():
            info = zipfile.ZipInfo(name)
            if change is not None and name.endswith("/data/0"):
                data = change(info, data)
            archive.writestr(info, data)
    return path


def test_a_file_whose_bytes_are_in_another_order_is_refused(tmp_path):
    path, other = tmp_path / "m.pt", b"big" if sys.byteorder == "little" else b"little"
    torch.save({"a": torch.arange(64.0)}, path)
    with zipfile.ZipFile(path) as archive:
        held = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in held.items():
            archive.writestr(name, other if name.endswith("/byteorder") else data)
    with pytest.raises(BadCheckpoint, match=rf"in the order {other}, {sys.byteorder} is exp"):
        TensorFile(path)


def deflated(info, data):
    info.compress_type = zipfile.ZIP_DEFLATED
    return data


def with_bytes(path, place, new):
    data = bytearray(path.read_bytes())
    data[place : place + len(new)] = new
    path.write_bytes(data)


def directory_place(path, member):
    """Where the entry of a member begins in the directory at the end."""
    data = path.read_bytes()
    return data.rindex(b"PK\x01\x02", 0, data.rindex(member))


def flagged(path):
    place = directory_place(rewritten(path), b"/data/0")
    with_bytes(path, place + 8, b"\1")


def locally_deflated(path):
    rewritten(path)
    with zipfile.ZipFile(path) as archive:
        start = next(i.header_offset for i in archive.infolist() if i.filename.endswith("/data/0"))
    with_bytes(path, start + 8, b"\x08")


def overlapping(path):
    """Two members at one place."""
    place = directory_place(rewritten(path), b"/data/0")
    other = directory_place(path, b"/data/1")
    with_bytes(path, other + 42, path.read_bytes()[place + 42 : place + 46])


def outside(path):
    with_bytes(path, directory_place(rewritten(path), b"/data/0") + 42, b"\xff\xff\xff\x7f")


def shifted(path):
    rewritten(path)
    with zipfile.ZipFile(path) as archive:
        first = archive.infolist()[0].header_offset
    assert first == 0
    path.write_bytes(b"PK\x03\x04" + bytes(60) + path.read_bytes())


ARCHIVES = {
    "compressed": (lambda p: rewritten(p, deflated), r"data/0 is compressed; PyTorch files are"),
    "of packed members by its own header": (locally_deflated, r"data/0 is compressed"),
    "encrypted": (flagged, r"is damaged|data/0 is encrypted"),
    "shorter than its tensor": (
        lambda p: rewritten(p, lambda _, data: data[:100]),
        "its tensors are longer or shorter than what is stored",
    ),
    "longer than its tensor": (
        lambda p: rewritten(p, lambda _, data: data + data),
        "its tensors are longer or shorter than what is stored",
    ),
    "overlapping": (overlapping, "cannot be read|overlap|longer or shorter|is damaged"),
    "outside of the file": (outside, "is damaged"),
    "behind other bytes": (shifted, "is damaged|overlap|begin behind"),
}


@pytest.mark.parametrize("case", ARCHIVES)
def test_an_archive_that_cannot_be_mapped_as_it_lies_is_refused(tmp_path, case):
    write, message = ARCHIVES[case]
    path = tmp_path / "m.pt"
    write(path)
    with pytest.raises(BadCheckpoint, match=rf"^m\.pt.*({message})"):
        TensorFile(path)


def test_an_archive_that_was_written_again_without_compression_is_read(tmp_path):
    file = TensorFile(rewritten(tmp_path / "m.pt"))
    with file.open("a") as a, file.open("b") as b:
        assert torch.equal(a, torch.arange(64.0)) and torch.equal(b, torch.ones(3, 5))
