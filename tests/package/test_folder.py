"""A package opens only as it was written, and every other thing is named for what it is."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.config import TINY
from engine.errors import BadPackage
from engine.package.folder import open_folder, summary
from engine.package.manifest import Entry, PackageFile, encode
from kernels.arch import SM89, SM120
from tests.support.packages import CODE, KERNEL, MANIFEST, PLAN, build, reseal, tensors
from tests.support.permissions import bound_by_modes, shared_folder

FILES = ("manifest.json", "weights.bin", "kernels/gemm.i8.cubin", "plans/block.plan")


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return build(tmp_path_factory.mktemp("sound") / "sm89")


@pytest.fixture
def package(sound, tmp_path):
    """A copy to be broken."""
    return shutil.copytree(sound, tmp_path / "sm89")


def examine(path):
    """All that a worker or an operator does with a package."""
    opened = open_folder(path)
    for name in opened.names:
        opened.read(name)
    for part in opened.manifest.files:
        opened.file(part.path)
    opened.verify()
    return opened


def refusal(path, arch=None):
    with pytest.raises(BadPackage) as caught:
        open_folder(path, arch)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- what is written is read


def test_tensors_come_back_as_they_were_written(sound):
    opened = examine(sound)
    want = {name: tensor for n in range(3) for name, tensor in tensors(n).items()}
    assert opened.names == tuple(want)
    for name, tensor in want.items():
        got = opened.read(name)
        assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape), name
        assert got.is_contiguous()
        assert torch.equal(got.float(), tensor.float()), name


def test_the_weights_file_is_its_tensors_in_order_each_on_a_multiple_of_256(sound):
    data = (sound / "weights.bin").read_bytes()
    want = b""
    for n in range(3):
        for tensor in tensors(n).values():
            want += bytes(-len(want) % 256)
            want += bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())
    assert data == want
    manifest = open_folder(sound).manifest
    assert manifest.files[0] == PackageFile(
        "weights.bin", len(data), hashlib.sha256(data).hexdigest()
    )
    for entry in manifest.tensors:
        stored = data[entry.offset : entry.offset + entry.nbytes]
        assert entry.offset % 256 == 0
        assert hashlib.sha256(stored).hexdigest() == entry.sha256


def test_facts_kernels_and_files_come_back_as_they_were_given(sound):
    opened = open_folder(sound, SM89)
    assert replace(opened.manifest, tensors=(), files=()) == MANIFEST
    assert opened.manifest.driver == (12, 7)
    assert opened.kernels == (KERNEL,)
    assert opened.file("plans/block.plan") == PLAN
    assert opened.file("kernels/gemm.i8.cubin") == CODE
    assert sorted(path.name for path in sound.iterdir()) == [
        "kernels", "manifest.json", "plans", "weights.bin"
    ]  # fmt: skip


def test_the_digest_names_the_package(sound, tmp_path):
    digest = open_folder(sound).digest
    assert open_folder(build(tmp_path / "same")).digest == digest
    other = build(tmp_path / "other", manifest=replace(MANIFEST, engine="0.2.0"))
    assert open_folder(other).digest != digest


def test_a_tensor_that_is_written_to_stays_in_the_process(package):
    opened = open_folder(package)
    opened.read("blocks.0.s").zero_()
    assert torch.equal(opened.read("blocks.0.s"), tensors(0)["blocks.0.s"])
    examine(package)


def test_tensors_keep_no_file_open_and_give_their_memory_back(package):
    """A package of 14B has a thousand tensors, and a process may have 1024 files open."""
    opened, maps = open_folder(package), Path("/proc/self/maps")
    weights = str(opened.weights.resolve())
    held = [opened.read(entry.name) for entry in opened.manifest.tensors]
    assert weights not in {os.path.realpath(file) for file in Path("/proc/self/fd").iterdir()}
    assert weights in maps.read_text("utf-8") and len(held) > 1
    del held
    assert weights not in maps.read_text("utf-8")


def test_what_is_not_there_is_named(sound):
    opened = open_folder(sound)
    with pytest.raises(BadPackage, match=r"no tensor blocks\.9\.q"):
        opened.read("blocks.9.q")
    with pytest.raises(BadPackage, match=r"has no \.\./secret"):
        opened.file("../secret")


def test_opening_does_not_wait_for_torch(sound):
    code = (
        "import sys; from pathlib import Path; from engine.package.folder import open_folder;"
        "print(len(open_folder(Path(sys.argv[1])).names), 'torch' in sys.modules)"
    )
    run = [sys.executable, "-c", code, sound]
    assert subprocess.run(run, capture_output=True, text=True).stdout == "18 False\n"


# --- damage


@pytest.mark.parametrize("file", FILES)
def test_a_byte_changed_anywhere_is_found(package, file):
    path = package / file
    data = path.read_bytes()
    places = {*range(0, len(data), max(len(data) // 60, 1)), 1, len(data) - 2, len(data) - 1}
    with path.open("r+b", buffering=0) as stored:
        for place in sorted(places):
            for flip in (0x20, 0xFF):
                os.pwrite(stored.fileno(), bytes([data[place] ^ flip]), place)
                with pytest.raises(BadPackage):
                    examine(package)
            os.pwrite(stored.fileno(), data[place : place + 1], place)
    examine(package)


@pytest.mark.parametrize("file", FILES)
def test_a_file_that_is_cut_longer_empty_or_gone_is_named(package, file):
    path = package / file
    data = path.read_bytes()
    for damaged in (data[:-1], data[: len(data) // 2], data + b"\0", b""):
        path.write_bytes(damaged)
        assert str(path) in refusal(package)
    path.unlink()
    if file != "manifest.json":
        assert refusal(package).startswith(f"{path} is missing.")
    else:
        assert "holds no package" in refusal(package)


@pytest.mark.parametrize("file", FILES)
def test_a_link_a_folder_or_a_pipe_in_place_of_a_file_is_refused(package, tmp_path, file):
    path = package / file
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert refusal(package).startswith(f"{path} is a link.")
    path.unlink()
    path.mkdir()
    assert refusal(package).startswith(f"{path} is no file.")
    path.rmdir()
    os.mkfifo(path)
    assert refusal(package).startswith(f"{path} is no file.")


def test_a_link_in_place_of_a_folder_of_files_is_refused(package, tmp_path):
    (package / "plans").rename(tmp_path / "plans")
    (package / "plans").symlink_to(tmp_path / "plans")
    assert refusal(package).startswith(f"{package / 'plans'} is a link.")


def test_a_damaged_tensor_is_named_when_it_is_read(package):
    opened = open_folder(package)
    entry = opened.entry("blocks.1.b16")
    with (package / "weights.bin").open("r+b") as file:
        file.seek(entry.offset + 5)
        file.write(b"!")
    opened.read("blocks.1.q")
    with pytest.raises(BadPackage, match=r"weights\.bin is damaged: blocks\.1\.b16 has sha256"):
        opened.read("blocks.1.b16")


def test_weights_that_shrink_after_opening_are_no_crash(package):
    opened = open_folder(package)
    os.truncate(package / "weights.bin", 300)
    with pytest.raises(BadPackage, match=r"has 300 bytes, blocks\.2\.one ends behind them"):
        opened.read("blocks.2.one")
    (package / "weights.bin").unlink()
    with pytest.raises(BadPackage, match=r"weights\.bin is missing"):
        opened.read("blocks.2.one")


NOT_A_MANIFEST = {
    b"": "damaged",
    b"{": "damaged",
    b"[1]": "a JSON object is expected",
    b"null": "a JSON object is expected",
    b"\xff\xfe": "damaged",
    b"[" * 100_000: "damaged",
    b"9" * 5000: "damaged",
    b"{}": "names no schema",
    b'{"schema": "1"}': "names no schema",
    b'{"schema": true}': "names no schema",
    b'{"schema": 0}': "names no schema",
    b'{"schema": -1}': "names no schema",
    b'{"schema": 1, "anything": "else"}': "build the package again, which takes two minutes",
    b'{"schema": 2}': "digest",
    b'{"schema": 2, "digest": 7}': "digest",
    b'{"schema": 2, "digest": "%s"}' % (b"0" * 64): "changed after the build",
    b'{"schema": 2, "digest": "%s"}' % (b"\\ud800" * 64): "damaged",
    b'{"schema": 3, "anything": "else"}': "Update the engine",
    b'{"schema": 2e9}': "names no schema",
    b'{"schema": %s}' % (b"9" * 4000): "Update the engine",
}


@pytest.mark.parametrize(("data", "told"), NOT_A_MANIFEST.items(), ids=range(len(NOT_A_MANIFEST)))
def test_a_manifest_that_is_none_is_refused_in_a_short_sentence(package, data, told):
    (package / "manifest.json").write_bytes(data)
    sentence = refusal(package)
    assert told in sentence
    assert len(sentence) < 400 + len(str(package))


def test_a_huge_manifest_is_not_parsed(package):
    with (package / "manifest.json").open("r+b") as file:
        file.truncate(2**26 + 1)
    assert "67108865 bytes" in refusal(package)


def edit(*keys, value):
    """Sets one value of the manifest; the last key may be a new one."""

    def change(body):
        for key in keys[:-1]:
            body = body[key]
        body[keys[-1]] = value

    return change


CONTRADICTIONS = {
    "an unknown field": (edit("colour", value=1), r"unknown 'colour'"),
    "a field less": (lambda body: {k: body[k] for k in body if k != "model"}, r"lacks 'model'"),
    "a float for a count": (edit("padded_ffn", value=5.0), r"padded_ffn is '?5\.0"),
    "a truth for a count": (edit("padded_ffn", value=True), r"padded_ffn is '?True"),
    "a negative count": (edit("model", "layers", value=-2), r"layers is '?-2"),
    "a huge count": (edit("tensors", 0, "offset", value=2**80), r"offset is"),
    "a list for an object": (edit("model", value=[]), r"model is '\[\]'"),
    "an object for a list": (edit("tensors", value={}), r"tensors is"),
    "a number for a text": (edit("toolchain", value={"torch": 2}), r"toolchain\.torch is '?2"),
    "a strength that is none": (
        edit("sources", 1, "lora", "strength", value=float("nan")),
        r"strength is",
    ),
    "an infinite strength": (
        edit("sources", 1, "lora", "strength", value=float("inf")),
        r"strength is",
    ),
    "a role that no LoRA has": (edit("sources", 1, "lora", "role", value="hat"), r"role is 'hat'"),
    "a kind that no model has": (edit("model_kind", value="scail3"), r"model_kind is 'scail3'"),
    "another kind than the model's": (
        edit("model_kind", value="scail2"),
        r"package of SCAIL-2, whose masks have 28 channels, and its model takes masks of 0",
    ),
    "a model of another kind": (
        edit("model", "mask_dim", value=28),
        r"package of SCAIL-Preview, whose masks have 0 channels, .* takes masks of 28",
    ),
    "a rotation of other fields": (edit("rotation", value={"size": 256}), r"rotation lacks"),
    "a rotation that is a word": (edit("rotation", value="hadamard"), r"rotation is 'hadamard'"),
    "unknown weights": (
        edit("weights", value="int4"),
        r"weights is 'int4', 'int8' or 'fp8' is",
    ),
    "an unknown architecture": (edit("arch", value="sm75"), r"architecture is 'sm75'"),
    "a floor that is none": (edit("driver_floor", value="12"), r"driver floor is '12'"),
    "no tensors": (edit("tensors", value=[]), r"0 tensors end at byte 0"),
    "a tensor less": (lambda body: body["tensors"].pop() and None, r"17 tensors end at byte"),
    "tensors in another order": (lambda body: body["tensors"].reverse(), r"is expected"),
    "a tensor twice": (edit("tensors", 1, "name", value="blocks.0.q"), r"'blocks\.0\.q' is there"),
    "overlapping tensors": (edit("tensors", 1, "offset", value=0), r"begins at byte 0, 256 is"),
    "a gap": (edit("tensors", 1, "offset", value=512), r"begins at byte 512, 256 is expected"),
    "an odd place": (edit("tensors", 1, "offset", value=232), r"begins at byte 232"),
    "an unknown dtype": (edit("tensors", 0, "dtype", value="int4"), r"has dtype 'int4'"),
    "another shape": (edit("tensors", 0, "shape", value=[33, 8]), r"\[33, 8\] int8 has 231 bytes"),
    "a negative size": (edit("tensors", 0, "shape", value=[-33, -7]), r"shape is '?-33"),
    "no values": (edit("tensors", 0, "shape", value=[0]), r"\[0\] int8 has 231 bytes"),
    "weights beyond the file": (
        lambda body: body["tensors"].append(
            {"name": "x", "dtype": "int8", "shape": [1], "offset": 10**9, "nbytes": 1, "sha256": ""}
        ),
        r"begins at byte 1000000000",
    ),
    "a file outside": (edit("files", 2, "path", value="../secret"), r"no plain path"),
    "a file of the system": (edit("files", 2, "path", value="/etc/passwd"), r"no plain path"),
    "a hidden way up": (edit("files", 2, "path", value="plans/../../x"), r"no plain path"),
    "a NUL in a path": (edit("files", 2, "path", value="plans\0"), r"no plain text"),
    "an empty path": (edit("files", 2, "path", value=""), r"no plain path"),
    "the manifest itself": (edit("files", 2, "path", value="manifest.json"), r"or itself"),
    "a file twice": (edit("files", 2, "path", value="weights.bin"), r"names one twice"),
    "no weights": (lambda body: body["files"].pop(0) and None, r"lacks weights\.bin"),
    "prompts that are not there": (
        edit("prompts", value={"count": 1, "encoder_sha256": ""}),
        r"lacks prompts\.safetensors",
    ),
    "a kernel without code": (lambda body: body["files"].pop(1) and None, r"lacks kernels/gemm"),
    "a kernel of no name": (edit("native", "kernels", 0, value={}), r"lacks kernels/None"),
    "a kernel of other code": (edit("native", "kernels", 0, "sha256", value=""), r"has sha256"),
    "a kernel in words": (edit("native", "kernels", 0, "registers", value="many"), r"registers"),
    "a kernel with a wrong loop": (
        edit("native", "kernels", 0, "loop", value={"instructions": 1, "mma": [], "others": {}}),
        r"damaged",
    ),
    "a kernel for another GPU": (edit("arch", value="sm120"), r"gemm\.i8\.cubin is for sm89, not"),
}


@pytest.mark.parametrize(("change", "told"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_a_manifest_that_contradicts_itself_is_refused_though_its_digest_is_right(
    package, change, told
):
    reseal(package, change)
    with pytest.raises(BadPackage, match=told) as caught:
        open_folder(package)
    assert str(caught.value).startswith(f"{package / 'manifest.json'} is damaged: ")


def test_a_manifest_with_a_new_digest_and_no_change_opens_as_before(package):
    before = open_folder(package).manifest
    reseal(package, lambda body: None)
    assert examine(package).manifest == before


def test_a_newer_schema_is_told_first_whatever_else_is_new(package):
    reseal(package, lambda body: {"schema": 3, "colours": [], **body, "arch": 120} | {"schema": 3})
    assert "was made by a newer engine: it has schema 3, this engine reads 2" in refusal(package)


OLDER = {
    "schema": 1,
    "digest": "0" * 64,
    "arch": "sm120",
    "sources": [
        {"file": "my scail-00001-of-00002.safetensors", "bytes": 1, "sha256": "", "strength": None},
        {"file": "my scail-00002-of-00002.safetensors", "bytes": 1, "sha256": "", "strength": None},
        {"file": "steps.safetensors", "bytes": 1, "sha256": "", "strength": 1.0},
        {"file": "style.safetensors", "bytes": 1, "sha256": "", "strength": 0.8},
    ],
}


def test_a_package_of_the_older_schema_is_refused_with_the_line_that_builds_it_again(package):
    (package / "manifest.json").write_text(json.dumps(OLDER), encoding="utf-8")
    assert refusal(package).endswith(
        "was made by an older engine: it has schema 1, this engine reads 2; build the package "
        "again, which takes two minutes: python build_engine.py --arch sm120 --checkpoint "
        "'my scail-00001-of-00002.safetensors' --lora steps.safetensors:1 "
        "--lora style.safetensors:0.8 --out DIR"
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"arch": "sm75\n", "sources": None},
        {"arch": 5, "sources": [None, 7, {}, {"file": "", "strength": None}, {"file": "x" * 9999}]},
        {"arch": ["sm89"], "sources": [{"file": "\n\x1b[2J", "strength": "1"}]},
        {"sources": [{"file": "l", "strength": 1e999}] * 5000},
    ],
)
def test_whatever_an_older_manifest_holds_the_line_is_one_and_short(package, changes):
    (package / "manifest.json").write_text(json.dumps(OLDER | changes), encoding="utf-8")
    sentence = refusal(package).removeprefix(str(package))
    assert sentence.isprintable()
    assert len(sentence) < 400
    assert "python build_engine.py --arch" in sentence


# --- what is no package


def test_a_package_for_another_architecture_is_refused(sound):
    sentence = refusal(sound, SM120)
    assert sentence.startswith(f"{sound} is for sm89, sm120 is needed.")


def test_what_is_no_package_is_named_for_what_it_is(sound, tmp_path):
    assert "does not exist" in refusal(tmp_path / "nowhere")
    assert "does not exist" in refusal(tmp_path / "a\0b")
    assert "is a file" in refusal(sound / "weights.bin")
    assert "does not exist" in refusal(sound / "weights.bin" / "deeper")
    (tmp_path / "empty").mkdir()
    assert "holds no package: there is no manifest.json" in refusal(tmp_path / "empty")
    (tmp_path / "sm89.partial").mkdir()
    assert "unfinished build" in refusal(tmp_path / "sm89.partial")
    (tmp_path / "link").symlink_to(tmp_path / "sm89.partial")
    assert "unfinished build" in refusal(tmp_path / "link")


@pytest.mark.parametrize("file", FILES)
def test_files_that_may_not_be_read_are_told(sound, file):
    with shared_folder() as folder:
        package = shutil.copytree(sound, folder / "sm89")
        (package / file).chmod(0)
        with bound_by_modes(), pytest.raises(BadPackage, match=r"cannot be read: Permission"):
            examine(package)


def test_a_folder_that_may_not_be_entered_is_told(sound):
    with shared_folder() as folder:
        package = shutil.copytree(sound, folder / "sm89")
        package.chmod(0)
        with bound_by_modes():
            assert "cannot be read: Permission denied" in refusal(package)
        package.chmod(0o755)


# --- size


def bytes_read():
    """Counts what this process has read, from files or the page cache."""
    return int(Path("/proc/self/io").read_text("utf-8").split()[1])


def test_a_package_of_full_size_opens_without_its_weights_being_read(sound, tmp_path):
    """40 layers and 16 GB; the weights are a hole, which takes no place on the disk."""
    package = shutil.copytree(sound, tmp_path / "sm89")
    entries, end = [], 0
    for n in range(1900):
        offset, nbytes = -(-end // 256) * 256, 8_421_504
        entries.append(Entry(f"blocks.{n}.q", "int8", (nbytes,), offset, nbytes, "ab" * 32))
        end = offset + nbytes
    manifest = open_folder(package).manifest
    files = (PackageFile("weights.bin", end, "ab" * 32), *manifest.files[1:])
    manifest = replace(manifest, tensors=(*entries,), files=files)
    (package / "manifest.json").write_bytes(encode(manifest))
    os.truncate(package / "weights.bin", end)
    before = bytes_read()
    opened = open_folder(package)
    needed = sum((package / file).stat().st_size for file in ("manifest.json", FILES[2]))
    assert needed <= bytes_read() - before < needed + 10_000
    assert len(opened.names) == 1900
    assert opened.weights.stat().st_size == end > 16e9


# --- what is shown


def test_info_shows_what_is_inside(sound):
    shown = summary(open_folder(sound))
    assert json.loads(json.dumps(shown)) == {
        "path": str(sound),
        "kind": "preview",
        "arch": "sm89",
        "driver_floor": "12.7",
        "engine": "0.1.0",
        "digest": open_folder(sound).digest,
        "model": {
            "layers": TINY.layers, "dim": TINY.dim, "ffn": TINY.ffn, "text_dim": TINY.text_dim,
            "clip_dim": TINY.clip_dim, "mask_dim": 0, "padded_ffn": 512,
        },
        "weights": "int8",
        "rotation": None,
        "tensors": 18,
        "bytes": sum((sound / file).stat().st_size for file in FILES[1:]),
        "native": {
            "kernels": [
                {"name": "gemm.i8", "toolkit": "12.6", "registers": 168, "shared_bytes": 4096,
                 "instructions_per_mma": 5.0}
            ]
        },
        "tensorrt": {"absent": "It was not asked for."},
        "sources": [
            {"file": "m.safetensors", "bytes": 10, "sha256": "ab" * 32, "lora": None},
            {"file": "l.safetensors", "bytes": 5, "sha256": "0",
             "lora": {"strength": 0.5, "role": "other", "rank": 64}},
        ],
        "prompts": None,
        "toolchain": {"torch": "2.13.0"},
    }  # fmt: skip
