"""Finding the models of motion capture, choosing who runs them, and refusing other files."""

import logging
from dataclasses import dataclass, field

import numpy as np
import pytest

from engine.errors import BadCheckpoint, MissingModel
from engine.pose.boxes import nms
from engine.pose.detect import DWPOSE, VITPOSE, find_detector, find_nlf, open_detector
from engine.pose.onnx import CPU, CUDA, OnnxNetwork, OnnxRuntime
from tests.support.permissions import bound_by_modes, shared_folder
from tests.support.standin_models import save_detectors, save_dwpose, save_yolox

FLOAT = "tensor(float)"
TAKES, GIVES = (1, 3, 640, 640), [(1, 8400, 85)]


@dataclass
class FakeNode:
    name: str
    type: str
    shape: list[int | str | None] = field(default_factory=lambda: ["batch", 2])


class FakeSession:
    """A session of a network that adds one; it runs where it says unless told to fail."""

    def __init__(self, providers, run_error=None, kind=FLOAT):
        self.providers, self.run_error, self.kind = providers, run_error, kind

    def get_providers(self):
        return self.providers

    def get_inputs(self):
        return [FakeNode("x", self.kind)]

    def get_outputs(self):
        return [FakeNode("y", self.kind)]

    def run(self, names, feed):
        if self.run_error is not None:
            raise self.run_error
        return [feed["x"] + 1]


class FakeRuntime:
    """onnxruntime on a machine with a GPU, healthy or not."""

    def __init__(
        self, held=(CUDA, CPU), open_error=None, run_error=None, dropped=False, kind=FLOAT
    ):
        self.held, self.open_error = held, open_error
        self.run_error, self.dropped, self.kind = run_error, dropped, kind
        self.opened = []

    def open(self, path, providers):
        self.opened.append(list(providers))
        if providers[0] == CPU:
            return FakeSession([CPU], kind=self.kind)
        if self.open_error is not None:
            raise self.open_error
        return FakeSession([CPU] if self.dropped else [CUDA, CPU], self.run_error)

    def runtime(self):
        return OnnxRuntime(lambda: self.held, self.open)


@pytest.fixture
def some_file(tmp_path):
    path = tmp_path / "net.onnx"
    path.write_bytes(b"not read by the fake")
    return path


def network(path, fake, gpu=True):
    return OnnxNetwork(path, (1, 2), [(1, 2)], gpu=gpu, runtime=fake.runtime())


def test_a_working_gpu_runs_the_network_and_the_log_says_so(some_file, caplog):
    caplog.set_level(logging.INFO)
    fake = FakeRuntime()
    net = network(some_file, fake)
    assert net.provider == CUDA
    assert fake.opened == [[CUDA, CPU]]
    assert net(np.ones((1, 2), np.float32))[0].tolist() == [[2, 2]]
    assert [record.message for record in caplog.records] == [
        f"net.onnx runs on {CUDA}: proved by one run"
    ]


@pytest.mark.parametrize(
    ("fake", "reason"),
    [
        (FakeRuntime(held=(CPU,)), f"onnxruntime has {CPU}"),
        (FakeRuntime(open_error=RuntimeError("CUDA driver too old\nmore")), "CUDA driver too old"),
        (FakeRuntime(run_error=RuntimeError("cudaErrorInvalidPtx")), "cudaErrorInvalidPtx"),
        (FakeRuntime(dropped=True), "gave its CUDA provider up"),
    ],
    ids=["no provider", "opening fails", "first kernel fails", "provider dropped"],
)
def test_a_gpu_that_does_not_work_is_warned_about_and_the_cpu_runs(some_file, caplog, fake, reason):
    caplog.set_level(logging.INFO)
    assert network(some_file, fake).provider == CPU
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"runs on {CPU}" in record.message
    assert reason in record.message
    assert "\n" not in record.message


def test_without_a_wish_for_the_gpu_it_is_not_tried(some_file, caplog):
    caplog.set_level(logging.INFO)
    fake = FakeRuntime()
    assert network(some_file, fake, gpu=False).provider == CPU
    assert fake.opened == [[CPU]]
    assert "no GPU was asked for" in caplog.text


def test_a_defect_of_our_own_is_not_taken_for_a_failing_gpu(some_file):
    with pytest.raises(KeyError):
        network(some_file, FakeRuntime(open_error=KeyError("bug")))


def test_another_networks_file_is_refused_on_the_gpu_too(some_file):
    with pytest.raises(BadCheckpoint, match=r"net.onnx takes x \[batch, 2\]"):
        OnnxNetwork(some_file, (1, 3), [(1, 2)], gpu=True, runtime=FakeRuntime().runtime())


@pytest.mark.parametrize("content", [b"", b"hello, I am no network", b"\x08\x09" * 1000])
def test_a_damaged_onnx_file_is_refused(tmp_path, content):
    path = tmp_path / "yolox_l.onnx"
    path.write_bytes(content)
    with pytest.raises(BadCheckpoint, match=rf"yolox_l.onnx \({len(content)} bytes\)"):
        OnnxNetwork(path, TAKES, GIVES, gpu=False)


def test_a_cut_short_onnx_file_is_refused(tmp_path):
    path = save_yolox(tmp_path / "yolox_l.onnx")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(BadCheckpoint, match=r"yolox_l\.onnx"):
        OnnxNetwork(path, TAKES, GIVES, gpu=False)


def test_a_missing_onnx_file_is_named(tmp_path):
    with pytest.raises(MissingModel, match=r"absent\.onnx"):
        OnnxNetwork(tmp_path / "absent.onnx", TAKES, GIVES, gpu=False)


def test_a_network_with_other_outputs_is_refused(tmp_path):
    path = save_dwpose(tmp_path / "yolox_l.onnx")
    with pytest.raises(BadCheckpoint, match=r"takes input \[1, 3, 384, 288\].*\[1, 8400, 85\]"):
        OnnxNetwork(path, TAKES, GIVES, gpu=False)


def test_an_output_that_is_not_as_declared_is_refused(some_file):
    net = OnnxNetwork(some_file, (1, 2), [(5, 2)], gpu=False, runtime=FakeRuntime().runtime())
    with pytest.raises(BadCheckpoint, match=r"net.onnx gave \[1, 2\]; expected \[5, 2\]"):
        net(np.zeros((1, 2), np.float32))


def test_a_half_precision_network_is_refused_by_its_type(some_file):
    fake = FakeRuntime(kind="tensor(float16)")
    with pytest.raises(BadCheckpoint, match=r"tensor\(float16\).*float32 export"):
        network(some_file, fake, gpu=False)


def test_the_official_pair_is_preferred_and_the_log_says_so(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    save_detectors(tmp_path)
    files = find_detector(tmp_path)
    assert files.pair is DWPOSE
    assert files.persons == tmp_path / "DWPose" / "yolox_l.onnx"
    assert "2D keypoints by DWPose" in caplog.text


def test_half_a_pair_is_passed_over_with_a_warning(tmp_path, caplog):
    save_detectors(tmp_path)
    (tmp_path / "DWPose" / "dw-ll_ucoco_384.onnx").unlink()
    files = find_detector(tmp_path)
    assert files.pair is VITPOSE
    assert files.keypoints.name == "vitpose_h_wholebody_model.onnx"
    assert "DWPose is passed over" in caplog.text
    assert len(list(open_detector(files, gpu=False).detect([np.zeros((64, 48, 3), np.uint8)]))) == 1


@pytest.mark.parametrize("folder", ["", "detection", "DWPose"])
def test_a_pair_is_found_in_every_usual_folder(tmp_path, folder):
    (tmp_path / folder).mkdir(exist_ok=True)
    for name in ("yolov10m.onnx", "vitpose-l-wholebody.onnx"):
        (tmp_path / folder / name).touch()
    files = find_detector(tmp_path)
    assert (files.pair, files.keypoints) == (
        VITPOSE,
        tmp_path / folder / "vitpose-l-wholebody.onnx",
    )


@pytest.mark.parametrize("folder", ["", "nlf", "torch_cache", "../torch_cache"])
def test_nlf_is_found_in_every_usual_folder_also_beside_the_models(tmp_path, folder):
    models = tmp_path / "models"
    models.mkdir()
    (models / folder).mkdir(exist_ok=True)
    (models / folder / "nlf_l_multi_0.3.2.torchscript").touch()
    assert find_nlf(models).resolve().parent == (models / folder).resolve()


def test_missing_models_are_named_with_every_name_and_folder(tmp_path):
    with pytest.raises(MissingModel) as caught:
        find_detector(tmp_path)
    for text in ("yolox_l.onnx", "dw-ll_ucoco_384.onnx", "yolov10m.onnx", "torch_cache"):
        assert text in str(caught.value)
    assert "vitpose_h_wholebody_model.onnx | vitpose-h-wholebody.onnx" in str(caught.value)
    with pytest.raises(MissingModel, match=r"nlf_l_multi_0\.3\.2\.torchscript"):
        find_nlf(tmp_path / "absent")


def test_a_folder_that_may_not_be_entered_is_named():
    with shared_folder() as models:
        (models / "nlf").mkdir()
        (models / "nlf").chmod(0)
        with (
            bound_by_modes(),
            pytest.raises(MissingModel, match=r"^The NLF model .*/nlf/\S+ cannot be read: Permis"),
        ):
            find_nlf(models)
        (models / "nlf").chmod(0o755)


def definition_of_nms(boxes, scores, limit, edge):
    """Greedy suppression with scalars: a kept box removes what overlaps it, a removed one none."""
    order = sorted(range(len(scores)), key=lambda row: (-scores[row], row))
    kept = []
    for row in order:
        if all(iou(boxes[row], boxes[other], edge) <= limit for other in kept):
            kept.append(row)
    return kept


def iou(a, b, edge):
    width = max(min(a[2], b[2]) - max(a[0], b[0]) + edge, 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]) + edge, 0)
    areas = [(box[2] - box[0] + edge) * (box[3] - box[1] + edge) for box in (a, b)]
    return width * height / (sum(areas) - width * height)


@pytest.mark.parametrize("edge", [0.0, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_suppression_equals_its_definition_also_with_ties(seed, edge):
    random = np.random.default_rng(seed)
    corner = random.integers(0, 40, (60, 2))
    boxes = np.concatenate([corner, corner + random.integers(1, 40, (60, 2))], axis=1).astype(float)
    scores = random.integers(1, 9, 60) / 10  # many equal scores
    assert nms(boxes, scores, 0.4, edge).tolist() == definition_of_nms(boxes, scores, 0.4, edge)


def test_suppression_keeps_an_overlap_of_exactly_the_limit():
    boxes = np.array([[0, 0, 2, 1], [0, 0, 1, 1], [0, 0, 2, 1.5]], float)
    assert nms(boxes, np.array([0.9, 0.8, 0.7]), 0.5).tolist() == [0, 1]


def test_suppression_of_nothing_is_nothing_and_empty_boxes_remove_nothing():
    assert nms(np.empty((0, 4)), np.empty(0), 0.5).tolist() == []
    points = np.zeros((2, 4))
    assert nms(points, np.array([0.5, 0.6]), 0.5).tolist() == [1, 0]
