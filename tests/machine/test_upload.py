"""Tensors of a package arrive as stored, in the order of the file, verified once."""

import gc
import os
from pathlib import Path

import pytest
import torch

from engine.errors import BadPackage
from engine.machine.upload import PackageWeights
from engine.package.folder import open_folder
from engine.package.stream import pages
from tests.support.packages import build, tensors

CPU = torch.device("cpu")


@pytest.fixture
def package(tmp_path):
    """Three groups of tensors of every dtype."""
    return open_folder(build(tmp_path / "sm89"))


def visited(weights, names):
    got = []
    weights.visit(names, lambda name, tensor: got.append((name, tensor)))
    return got


def damage(package, name):
    entry = package.entry(name)
    with package.weights.open("r+b") as file:
        file.seek(entry.offset + entry.nbytes - 1)
        last = file.read(1)[0]
        file.seek(entry.offset + entry.nbytes - 1)
        file.write(bytes([last ^ 1]))


def test_every_tensor_arrives_as_it_was_written(package):
    want = {name: tensor for group in range(3) for name, tensor in tensors(group).items()}
    got = PackageWeights(package, CPU).read(package.names)
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(got[name].float(), tensor.float()), name


def test_the_order_is_that_of_the_file_whatever_is_asked_for(package):
    names = ["blocks.2.s", "blocks.0.one", "blocks.1.q", "blocks.0.q", "blocks.2.s"]
    got = [name for name, _ in visited(PackageWeights(package, CPU), iter(names))]
    assert got == ["blocks.0.q", "blocks.0.one", "blocks.1.q", "blocks.2.s"]
    assert visited(PackageWeights(package, CPU), []) == []


def test_a_name_that_is_not_there_is_told_before_anything_is_handed_over(package):
    got = []
    with pytest.raises(BadPackage, match=r"has no tensor blocks\.7\.q\. Build it again"):
        PackageWeights(package, CPU).visit(
            ["blocks.0.q", "blocks.7.q"], lambda *one: got.append(one)
        )
    assert got == []


@pytest.mark.parametrize("name", ["blocks.0.q", "blocks.1.f8", "blocks.2.one"])
def test_a_damaged_tensor_is_named_and_those_before_it_are_whole(package, name):
    damage(package, name)
    got = []
    with pytest.raises(BadPackage, match=rf"damaged: {name} has sha256"):
        PackageWeights(package, CPU).visit(package.names, lambda *one: got.append(one[0]))
    assert got == list(package.names[: package.names.index(name)])


def test_a_file_that_was_cut_or_is_gone_is_told(package):
    weights = PackageWeights(package, CPU)
    size = package.weights.stat().st_size
    os.truncate(package.weights, size - 1)
    with pytest.raises(BadPackage, match=rf"has {size - 1} bytes, blocks\.2\.one ends behind"):
        weights.read(package.names)
    package.weights.unlink()
    with pytest.raises(BadPackage, match=r"weights\.bin is missing"):
        weights.read(["blocks.0.q"])


def test_what_was_verified_once_is_not_hashed_again(package):
    """A clip does not wait each time for 4 GB of hashes of what was read a moment ago."""
    weights = PackageWeights(package, CPU)
    before = weights.read(["blocks.1.s"])["blocks.1.s"].clone()
    damage(package, "blocks.1.s")
    damage(package, "blocks.1.q")
    assert weights.read(["blocks.1.s"])["blocks.1.s"].shape == before.shape
    with pytest.raises(BadPackage, match=r"blocks\.1\.q has sha256"):
        weights.read(["blocks.1.q"])


def test_what_the_taker_raises_ends_the_visit(package):
    class Enough(Exception):
        pass

    got = []

    def take(name, tensor):
        got.append(name)
        if len(got) == 3:
            raise Enough

    with pytest.raises(Enough):
        PackageWeights(package, CPU).visit(package.names, take)
    assert got == list(package.names[:3])
    assert len(visited(PackageWeights(package, CPU), package.names)) == len(package.names)


def test_writing_to_a_tensor_changes_neither_the_file_nor_the_next_reading(package):
    weights, stored = PackageWeights(package, CPU), package.weights.read_bytes()
    first = weights.read(["blocks.0.b16"])["blocks.0.b16"]
    kept = first.clone()
    first.zero_()
    assert torch.equal(weights.read(["blocks.0.b16"])["blocks.0.b16"], kept)
    assert package.weights.read_bytes() == stored


def test_tensors_that_nobody_holds_hold_no_file(package):
    weights = PackageWeights(package, CPU)
    gc.collect()
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        weights.visit(package.names, lambda name, tensor: None)
    gc.collect()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_file_that_changes_while_blocks_are_streamed_is_told_and_not_used(package, monkeypatch):
    monkeypatch.setattr("engine.machine.upload.pinned", pages)
    weights = PackageWeights(package, torch.device("cuda"))  # and memory of this machine
    name = package.names[0]
    place = torch.zeros(package.entry(name).nbytes, dtype=torch.uint8)
    for _ in range(2):
        weights.fill({name: place})
    want = package.read(name).flatten().view(torch.uint8)
    assert torch.equal(place, want)
    damage(package, name)
    os.utime(package.weights, ns=(0, 0))
    with pytest.raises(BadPackage, match=r"was changed while it was in use\. Start again when"):
        weights.fill({name: place})
