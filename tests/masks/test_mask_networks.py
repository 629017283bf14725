"""The networks of a models folder for masks: which is taken, what is refused, how long it takes."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from engine.errors import BadCheckpoint, BadMedia, BadRequest, MissingModel
from engine.masks.networks import WORK_BYTES, MaskFiles
from engine.masks.person_boxes import find_box_network, open_boxes, persons
from engine.masks.sam2_find import cpu_seconds, find_segmenter, require_time, told_time
from engine.masks.sam2_load import look_at
from engine.masks.sam2_sizes import SIZES, Sam2Kind
from engine.masks.segment import segment_with
from tests.support.standin_models import save_yolo10, save_yolox

CPU = torch.device("cpu")
LARGE, *_, TINY = (Sam2Kind(size, True) for size in SIZES)


def touch(models, *names):
    for name in names:
        place = models / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()


@pytest.mark.parametrize(
    ("held", "found"),
    [
        (("sam2/sam2.1_hiera_small.pt", "sam2.1_hiera_large-fp16.safetensors"), 1),
        (("sam2/sam2.1_hiera_small.safetensors", "sam2/sam2_hiera_large.pt"), 0),
        (("sams/sam2.1_hiera_tiny.pt", "sam2/sam2.1-hiera-base-plus/config.json"), 1),
        (("sam2/sam2_hiera_tiny.safetensors",), 0),
    ],
)
def test_the_best_segmenter_of_a_folder_is_taken(tmp_path, held, found):
    touch(tmp_path, *held)
    want = tmp_path / held[found]
    assert find_segmenter(tmp_path) == (want.parent if want.name == "config.json" else want)


def test_what_was_named_is_taken_or_missing(tmp_path):
    touch(tmp_path, "sam2/sam2.1_hiera_large.pt", "mine.pt")
    assert find_segmenter(tmp_path, tmp_path / "mine.pt") == tmp_path / "mine.pt"
    with pytest.raises(MissingModel, match=r"There is no .*other\.pt"):
        find_segmenter(tmp_path, tmp_path / "other.pt")


def test_a_folder_without_one_says_what_to_put_where_and_what_is_not_taken(tmp_path):
    touch(tmp_path, "sam2/sam3.1_multiplex_fp16.safetensors", "sams/sam_vit_h.pth")
    with pytest.raises(MissingModel) as refused:
        find_segmenter(tmp_path)
    said = str(refused.value)
    assert f"into {tmp_path / 'sam2'}, {tmp_path / 'sams'}, or give a file of masks" in said
    assert "sam3.1_multiplex_fp16.safetensors is SAM 3. It is not run here" in said
    assert "sam_vit_h.pth is SAM of 2023" in said
    assert segment_with(tmp_path, CPU, tmp_path) is None


def test_a_file_of_another_model_is_refused_without_loading_it(tmp_path):
    save_file({"detector.a": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(BadCheckpoint, match="is SAM 3"):
        look_at(tmp_path / "a.safetensors")


def test_yolox_comes_before_yolo10(tmp_path):
    with pytest.raises(MissingModel, match=r"put yolox_l\.onnx or yolov10m\.onnx into"):
        find_box_network(tmp_path)
    touch(tmp_path, "detection/yolov10m.onnx")
    assert find_box_network(tmp_path)[0].name == "YOLOv10"
    touch(tmp_path, "DWPose/yolox_l.onnx")
    assert find_box_network(tmp_path)[0].name == "YOLOX"


@pytest.mark.parametrize(
    ("name", "save"), [("yolox_l.onnx", save_yolox), ("yolov10m.onnx", save_yolo10)]
)
def test_all_persons_of_a_picture_are_found(tmp_path, name, save):
    if name == "yolox_l.onnx":  # middle, size, score
        save(
            tmp_path / name, ((160.0, 320.0, 100.0, 400.0, 0.6), (480.0, 320.0, 120.0, 500.0, 0.9))
        )
    else:  # corners, score
        save(tmp_path / name, ((110.0, 120.0, 210.0, 520.0, 0.6), (420.0, 70.0, 540.0, 570.0, 0.9)))
    found = open_boxes(*find_box_network(tmp_path), gpu=False)(np.zeros((640, 640, 3), np.uint8))
    want = [[420, 70, 540, 570, 0.9], [110, 120, 210, 520, 0.6]]
    np.testing.assert_allclose(found, want, rtol=1e-3)
    with pytest.raises(BadMedia):
        open_boxes(*find_box_network(tmp_path), gpu=False)(np.zeros((4, 4), np.uint8))


def test_other_classes_and_doubtful_persons_are_nobody():
    box = [0.0, 0, 10, 20]
    objects = np.array([[*box, 0.3, 0], [*box, 0.31, 0], [*box, 0.9, 1], [*box, 0.8, 0]])
    np.testing.assert_array_equal(persons(objects)[:, 4], [0.8, 0.31])


def test_on_a_cpu_the_time_is_said_and_has_to_be_asked_for(caplog):
    with pytest.raises(
        BadRequest, match=r"81 frames by SAM 2\.1 large take about 52 minutes"
    ) as said:
        require_time(LARGE, 81, 1, CPU, False, threads=1)
    assert "masks ... --slow" in str(said.value) and "SAM 2.1 small takes" in str(said.value)
    require_time(LARGE, 81, 1, CPU, True, threads=1)
    assert "take about 52 minutes on this CPU" in caplog.text
    require_time(LARGE, 81, 1, torch.device("cuda"), False)


def test_times_grow_with_frames_and_persons_and_fall_with_threads():
    assert cpu_seconds(TINY, 10, 1, 1) == pytest.approx(10 * (4.8 + 12))
    assert cpu_seconds(TINY, 10, 2, 4) == pytest.approx(10 * (4.8 + 24) / 4)
    assert cpu_seconds(None, 1, 1, 1) == cpu_seconds(LARGE, 1, 1, 1)
    assert [told_time(s) for s in (3, 60, 61, 7199, 7201)] == [
        "1 minute", "1 minute", "2 minutes", "2 hours", "3 hours",
    ]  # fmt: skip


def test_a_missing_detector_is_named_before_anything_is_loaded(tmp_path):
    touch(tmp_path, "sam2/sam2.1_hiera_large.pt")
    with pytest.raises(MissingModel, match="Nothing finds persons"):
        MaskFiles(tmp_path, CPU, tmp_path / "state").require()


def test_what_sam_2_takes_of_a_gpu_is_counted_in_half_precision(tmp_path):
    (tmp_path / "sam2").mkdir()
    save_file({"a": torch.ones(3, 5)}, tmp_path / "sam2" / "sam2.1_hiera_large.safetensors")
    gpu, state = torch.device("cuda"), tmp_path / "state"
    assert MaskFiles(tmp_path, gpu, state).gpu_bytes() == 2 * 15 + WORK_BYTES
    assert MaskFiles(tmp_path, CPU, state).gpu_bytes() == 0
    assert MaskFiles(tmp_path / "none", gpu, state).gpu_bytes() == 0
