"""The motion capture networks of a models folder: which files count, and when they are opened."""

import hashlib
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engine.errors import BadCheckpoint, MissingModel
from engine.pose import onnx
from engine.pose.networks import Networks
from engine.pose.onnx import CPU as ON_CPU
from engine.pose.onnx import CUDA, WORK_BYTES, gpu_bytes, provider_options, weight_files
from tests.support.standin_models import save_detectors, save_nlf

CPU = torch.device("cpu")
NLF = "nlf/nlf_l_multi_0.3.2.torchscript"
DWPOSE = ("DWPose/yolox_l.onnx", "DWPose/dw-ll_ucoco_384.onnx")
VITPOSE = (
    "detection/yolov10m.onnx",
    "detection/vitpose_h_wholebody_model.onnx",
    "detection/vitpose_h_wholebody_data.bin",
)


@pytest.fixture(scope="module")
def standins(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_detectors(folder)
    save_nlf(folder)
    return folder


@pytest.fixture
def models(standins, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(standins, tmp_path / "models")


@pytest.fixture
def onnxruntime_of_the_gpu(tmp_path, monkeypatch):
    """Puts the file that tells the wheel for the GPU where the wheel would have it."""
    library = tmp_path / "onnxruntime" / onnx.CUDA_LIBRARY
    library.parent.mkdir(parents=True)
    library.touch()
    found = SimpleNamespace(submodule_search_locations=[str(tmp_path / "onnxruntime")])
    monkeypatch.setattr(onnx, "find_spec", lambda name: found)


def networks(models):
    return Networks(models, CPU, models.parent / "state")


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_networks_on_the_gpu_are_counted_and_held_to_what_is_counted(
    models, onnxruntime_of_the_gpu
):
    on_gpu = Networks(models, torch.device("cuda"), models.parent / "state")
    sizes = [(models / name).stat().st_size for name in (NLF, *DWPOSE)]
    assert on_gpu.gpu_bytes() == sum(sizes) + 2 * WORK_BYTES
    persons = models / DWPOSE[0]
    (cuda, limits), (cpu, none) = provider_options(persons, [CUDA, ON_CPU])
    assert (cuda, cpu, none) == (CUDA, ON_CPU, {})
    assert int(limits["gpu_mem_limit"]) == gpu_bytes(persons) == sizes[1] + WORK_BYTES
    assert limits["arena_extend_strategy"] == "kSameAsRequested"  # it would double beyond need


def test_weights_in_a_file_of_their_own_are_counted_too(models, onnxruntime_of_the_gpu):
    graph, weights = models / VITPOSE[1], models / VITPOSE[2]
    assert gpu_bytes(graph) == graph.stat().st_size + weights.stat().st_size + WORK_BYTES


def test_where_the_networks_take_no_gpu_memory_none_is_counted(models, tmp_path):
    assert networks(models).gpu_bytes() == 0  # on the CPU
    gpu = torch.device("cuda")
    assert Networks(tmp_path / "none", gpu, tmp_path).gpu_bytes() == 0  # no dance can come
    without = Networks(models, gpu, tmp_path).gpu_bytes()  # onnxruntime here is for CPUs
    assert without == (models / NLF).stat().st_size


def test_the_hashes_are_those_of_the_files_in_use(models):
    assert networks(models).hashes() == [sha256(models / name) for name in (NLF, *DWPOSE)]


def test_weights_in_a_file_of_their_own_are_hashed_too(models):
    for name in DWPOSE:
        (models / name).unlink()
    before = networks(models).hashes()
    assert before == [sha256(models / name) for name in (NLF, *VITPOSE)]
    weights = models / VITPOSE[2]
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    os.utime(weights, (1, 1))
    after = networks(models).hashes()
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, True, True, False]


def test_a_network_that_holds_its_weights_or_nothing_names_no_other_file(models):
    assert list(weight_files(models / DWPOSE[0])) == []
    empty = models / "empty.onnx"
    empty.touch()
    assert list(weight_files(empty)) == []


def test_a_network_too_large_for_a_graph_alone_is_not_searched(models):
    large = models / "detection" / "large.onnx"
    with large.open("wb") as file:
        file.write(b"yolov10m.onnx")
        file.truncate(65 * 2**20)  # takes no room on the disk
    assert list(weight_files(large)) == []
    os.truncate(large, 63 * 2**20)
    assert [path.name for path in weight_files(large)] == ["yolov10m.onnx"]


def test_each_network_is_opened_once(models):
    found = networks(models)
    assert found.locator() is found.locator()
    assert found.detector() is found.detector()


def test_keypoints_alone_need_no_network_of_3d_joints(models, onnxruntime_of_the_gpu):
    (models / NLF).unlink()
    found = networks(models)
    (seen,) = found.look([np.zeros((64, 48, 3), np.uint8)])
    assert seen.keypoints.body.shape[2] == 2
    sizes = [(models / name).stat().st_size for name in DWPOSE]
    on_gpu = Networks(models, torch.device("cuda"), models.parent / "state")
    assert on_gpu.gpu_bytes() == sum(sizes) + 2 * WORK_BYTES
    for name in (DWPOSE[0], VITPOSE[0]):
        (models / name).unlink()
    with pytest.raises(MissingModel, match="No 2D keypoint networks"):
        networks(models).look([])  # at once, before anything is asked


@pytest.mark.parametrize(("gone", "sentence"), [
    (NLF, "No NLF model: put nlf_l_multi_0.3.2.torchscript"),
    ((DWPOSE[0], VITPOSE[0]), r"No 2D keypoint networks: put yolox_l.onnx and dw-ll_ucoco"),
])  # fmt: skip
def test_what_is_missing_is_named_at_once(models, gone, sentence):
    for name in (gone,) if isinstance(gone, str) else gone:
        (models / name).unlink()
    for ask in (networks(models).require, networks(models).hashes, networks(models).locator):
        with pytest.raises(MissingModel, match=sentence):
            ask()


def test_a_file_that_goes_away_meanwhile_is_named(models):
    found = networks(models)
    found.require()
    (models / DWPOSE[1]).unlink()
    with pytest.raises(MissingModel, match=r"dw-ll_ucoco_384\.onnx cannot be read: No such file"):
        found.hashes()


def test_a_failure_to_open_is_not_remembered(models):
    pin = models / f"{NLF}.sha256"
    right = pin.read_text("utf-8")
    pin.write_text("0" * 64)
    found = networks(models)
    with pytest.raises(BadCheckpoint, match="says 0000"):
        found.locator()
    pin.write_text(right)
    assert found.locator().name == "nlf_l_multi_0.3.2.torchscript"
