"""NLF: what may be loaded, how frames are batched, what is made of the model's answer."""

import hashlib
import logging

import numpy as np
import pytest
import torch

from engine.errors import BadCheckpoint, BadMedia, MissingModel, Unavailable
from engine.pose.nlf import Nlf, batch_size, load_nlf, register_nms
from tests.pose.test_detect import definition_of_nms
from tests.support.standin_models import NlfStandIn, driving_frames, save_nlf, save_script

CPU = torch.device("cpu")
GIB = 1 << 30


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_nlf(folder)
    return folder


@pytest.fixture
def unpinned(models, tmp_path):
    path = tmp_path / "nlf.torchscript"
    path.write_bytes((models / "nlf/nlf_l_multi_0.3.2.torchscript").read_bytes())
    return path


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def picture(box=None, height=60, width=80):
    """Black, with a white box x1, y1, x2, y2."""
    frame = np.zeros((height, width, 3), np.uint8)
    if box is not None:
        x1, y1, x2, y2 = box
        frame[y1:y2, x1:x2] = 255
    return frame


def test_the_suppression_operator_equals_its_definition_also_with_ties():
    register_nms()
    register_nms()  # a second time changes nothing
    random = np.random.default_rng(3)
    corner = random.integers(0, 40, (80, 2))
    boxes = np.concatenate([corner, corner + random.integers(1, 40, (80, 2))], axis=1)
    scores = random.integers(1, 9, 80) / 8
    for kind in (torch.float32, torch.float64, torch.float16):
        kept = torch.ops.torchvision.nms(
            torch.tensor(boxes, dtype=kind), torch.tensor(scores, dtype=kind), 0.45
        )
        assert kept.dtype == torch.int64
        assert kept.tolist() == definition_of_nms(boxes.astype(float), scores, 0.45, 0.0)


def test_the_suppression_operator_keeps_the_limit_and_takes_nothing():
    register_nms()
    boxes = torch.tensor([[0.0, 0, 2, 1], [0, 0, 1, 1]])
    scores = torch.tensor([0.9, 0.8])
    assert torch.ops.torchvision.nms(boxes, scores, 0.5).tolist() == [0, 1]
    assert torch.ops.torchvision.nms(boxes, scores, 0.49).tolist() == [0]
    empty = torch.ops.torchvision.nms(torch.empty(0, 4), torch.empty(0), 0.5)
    assert (empty.tolist(), empty.dtype) == ([], torch.int64)


def test_a_model_nobody_vouched_for_is_not_loaded_and_its_hash_is_told(unpinned):
    with pytest.raises(BadCheckpoint) as caught:
        load_nlf(unpinned, CPU)
    assert sha256(unpinned) in str(caught.value)
    assert "nlf.torchscript.sha256" in str(caught.value)


@pytest.mark.parametrize("text", ["{}", "{}\n", "{}  nlf.torchscript\n", " {} *nlf.torchscript"])
def test_a_hash_beside_the_model_is_a_pin(unpinned, text):
    unpinned.with_name("nlf.torchscript.sha256").write_text(text.format(sha256(unpinned)))
    assert load_nlf(unpinned, CPU).name == "nlf.torchscript"


def test_the_pin_given_wins_over_the_one_beside_the_model(unpinned):
    unpinned.with_name("nlf.torchscript.sha256").write_text("0" * 64)
    assert load_nlf(unpinned, CPU, sha256=sha256(unpinned).upper()).device == CPU
    with pytest.raises(BadCheckpoint, match=r"nlf\.torchscript\.sha256 says 0000"):
        load_nlf(unpinned, CPU)


@pytest.mark.parametrize("pin", ["", "yes", "0" * 63, "g" * 64])
def test_a_pin_that_is_no_hash_is_refused(unpinned, pin):
    with pytest.raises(BadCheckpoint, match="not a SHA-256"):
        load_nlf(unpinned, CPU, sha256=pin)


def test_a_tampered_model_is_not_loaded(unpinned):
    pin = sha256(unpinned)
    data = bytearray(unpinned.read_bytes())
    data[len(data) // 2] ^= 1
    unpinned.write_bytes(data)
    with pytest.raises(BadCheckpoint, match=f"the pin given says {pin}"):
        load_nlf(unpinned, CPU, sha256=pin)


def test_a_missing_model_is_named(tmp_path):
    with pytest.raises(MissingModel, match=r"absent\.torchscript"):
        load_nlf(tmp_path / "absent.torchscript", CPU)


def test_a_file_that_is_not_torchscript_is_refused(tmp_path):
    path = tmp_path / "nlf.torchscript"
    torch.save({"weight": torch.ones(3)}, tmp_path / "weights")
    for data in (b"", b"text", (tmp_path / "weights").read_bytes()):
        path.write_bytes(data)
        with pytest.raises(BadCheckpoint, match=r"cannot be loaded as TorchScript: \S"):
            load_nlf(path, CPU, sha256=sha256(path))


class Cropper(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images


def test_torchscript_of_another_model_is_refused(tmp_path):
    path = save_script(tmp_path / "nlf_l_crop.torchscript", Cropper())
    with pytest.raises(BadCheckpoint, match="without detect_smpl_batched"):
        load_nlf(path, CPU)


def test_people_are_found_frame_by_frame_in_pixels_and_millimetres(models):
    nlf = load_nlf(models / "nlf/nlf_l_multi_0.3.2.torchscript", CPU)
    done = []
    frames = [picture((10, 5, 30, 45)), picture(), picture((40, 20, 80, 60))]
    people = nlf.locate(iter(frames), done.append)
    assert done == [2, 3]
    assert [len(each.joints) for each in people] == [1, 0, 1]
    np.testing.assert_allclose(people[0].boxes, [[10, 5, 20, 40, 0.9]], rtol=1e-6)
    np.testing.assert_allclose(people[2].boxes, [[40, 20, 40, 40, 0.9]], rtol=1e-6)
    # 1700 mm look 40 pixels high: focal length 0.960491 * 80, middle of the picture (39.5, 29.5).
    depth = 0.960491 * 80 * 1700 / 40
    pelvis = [(20 - 39.5) * 1700 / 40, (25 - 29.5) * 1700 / 40 - 60, depth]
    np.testing.assert_allclose(people[0].joints[0, 0], pelvis, rtol=1e-5)
    assert (people[0].joints.dtype, people[0].joints.shape) == (np.float32, (1, 24, 3))
    assert (people[1].joints.shape, people[1].boxes.shape) == ((0, 24, 3), (0, 5))


def test_nobody_in_the_whole_clip_and_no_clip_at_all_are_no_errors(models):
    nlf = load_nlf(models / "nlf/nlf_l_multi_0.3.2.torchscript", CPU)
    assert [len(each.boxes) for each in nlf.locate([picture()] * 3)] == [0, 0, 0]
    assert nlf.locate([]) == []


class Answers:
    """A model that answers with the mean of each frame, or with what it is told to."""

    def __init__(self, answer=None, room=64):
        self.answer, self.room, self.batches = answer, room, []

    def detect_smpl_batched(self, images):
        assert images.dtype == torch.uint8
        assert images.shape[1] == 3
        self.batches.append(len(images))
        if len(images) > self.room:
            raise RuntimeError("The following operation failed: CUDA out of memory. Tried to ...")
        if self.answer is not None:
            return self.answer
        means = [image.float().mean() for image in images]
        return {
            "joints3d_nonparam": [mean.expand(1, 24, 3) for mean in means],
            "boxes": [mean.expand(1, 5) for mean in means],
        }


def with_model(model, free=None):
    return Nlf(model, "nlf.torchscript", CPU, lambda: free)


def test_batches_follow_the_free_memory_and_keep_the_order():
    model = Answers()
    frames = [np.full((4, 4, 3), level, np.uint8) for level in range(100)]
    people = with_model(model, 80 * GIB).locate(frames)
    assert model.batches == [64, 36]
    assert [each.boxes[0, 0] for each in people] == list(range(100))


def test_running_out_of_memory_halves_the_batch_and_loses_no_frame(caplog):
    caplog.set_level(logging.WARNING)
    model = Answers(room=20)
    frames = [np.full((4, 4, 3), level, np.uint8) for level in range(100)]
    done = []
    people = with_model(model, 80 * GIB).locate(iter(frames), done.append)
    assert model.batches == [64, 32, 16, 16, 16, 16, 16, 16, 4]
    assert done == [16, 32, 48, 64, 80, 96, 100]
    assert [each.boxes[0, 0] for each in people] == list(range(100))
    assert [record.message for record in caplog.records] == [
        "NLF: out of memory with 64 frames at once, now 32",
        "NLF: out of memory with 32 frames at once, now 16",
    ]


def test_a_short_clip_that_runs_out_of_memory_is_halved_from_its_own_length():
    model = Answers(room=2)
    assert len(with_model(model, 80 * GIB).locate([picture()] * 5)) == 5
    assert model.batches == [5, 2, 2, 1]


def test_one_frame_that_does_not_fit_is_an_error_that_says_so():
    with pytest.raises(Unavailable, match=r"out of memory on cpu with a single frame of 80x60"):
        with_model(Answers(room=0)).locate([picture()])


class Broken:
    def detect_smpl_batched(self, images):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_any_other_failure_is_not_taken_for_a_lack_of_memory():
    with pytest.raises(RuntimeError, match="illegal memory access"):
        with_model(Broken()).locate([picture()])


JOINTS, BOXES = torch.zeros(1, 24, 3), torch.zeros(1, 5)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"boxes": [BOXES]}, "gave boxes; expected joints3d_nonparam"),
        ({"joints3d_nonparam": [JOINTS]}, "expected boxes"),
        ({"joints3d_nonparam": [JOINTS[:, :23]], "boxes": [BOXES]}, r"\[n, 24, 3\]"),
        ({"joints3d_nonparam": [JOINTS[0]], "boxes": [BOXES]}, r"\[n, 24, 3\]"),
        ({"joints3d_nonparam": [JOINTS], "boxes": [BOXES[:, :4]]}, r"\[n, 5\]"),
        ({"joints3d_nonparam": [JOINTS] * 2, "boxes": [BOXES] * 2}, "for 1 frames"),
        ({"joints3d_nonparam": [JOINTS], "boxes": [torch.zeros(2, 5)]}, "other numbers"),
        (torch.zeros(1), "gave Tensor"),
    ],
)
def test_an_answer_that_is_not_nlfs_is_refused(answer, message):
    with pytest.raises(BadCheckpoint, match=message):
        with_model(Answers(answer)).locate([picture()])


def test_nobody_in_a_batch_may_come_as_empty_tensors_of_any_shape():
    nothing = {"joints3d_nonparam": [torch.zeros(0)], "boxes": [torch.zeros(0, 5)]}
    people = with_model(Answers(nothing)).locate([picture()] * 2)
    assert [each.joints.shape for each in people] == [(0, 24, 3)] * 2


@pytest.mark.parametrize("frame", [np.zeros((8, 8, 3), np.float32), np.zeros((8, 8), np.uint8)])
def test_a_frame_that_is_no_picture_of_bytes_is_refused(frame):
    with pytest.raises(BadMedia, match="A frame is"):
        with_model(Answers()).locate([frame])


def test_frames_of_two_sizes_are_refused():
    with pytest.raises(BadMedia, match="Frame 1 is 80x61, but the first is 80x60"):
        with_model(Answers()).locate([picture(), picture(height=61)])


def test_the_batch_grows_with_memory_and_shrinks_with_the_frame():
    assert batch_size(None, 896, 512) == 2
    assert batch_size(0, 896, 512) == 1
    assert batch_size(4 * GIB, 896, 512) == 1
    assert batch_size(6 * GIB, 896, 512) == 12
    assert batch_size(6 * GIB, 2160, 3840) == 4
    assert batch_size(140 * GIB, 896, 512) == 64


class OldNlf(torch.nn.Module):
    """Says other things than joints."""

    @torch.jit.export
    def detect_smpl_batched(self, images: torch.Tensor) -> dict[str, list[torch.Tensor]]:
        return {"boxes": [torch.zeros([0, 5]) for _ in images]}


def test_a_script_without_joints_is_refused_when_it_answers(tmp_path):
    nlf = load_nlf(save_script(tmp_path / "old.torchscript", OldNlf()), CPU)
    with pytest.raises(BadCheckpoint, match=r"old\.torchscript gave boxes"):
        nlf.locate([picture()])


class Greedy(NlfStandIn):
    """Runs out of memory inside TorchScript, where the error loses its class."""

    @torch.jit.export
    def detect_smpl_batched(self, images: torch.Tensor) -> dict[str, list[torch.Tensor]]:
        scratch = torch.empty([1 << 50 if images.shape[0] > 1 else 1])
        nobody = [torch.zeros([0, 24, 3]) + scratch[0] for _ in images]
        return {"joints3d_nonparam": nobody, "boxes": [torch.zeros([0, 5]) for _ in images]}


def test_running_out_inside_torchscript_halves_the_batch_too(tmp_path, caplog):
    nlf = load_nlf(save_script(tmp_path / "greedy.torchscript", Greedy()), CPU)
    assert len(nlf.locate([picture()] * 3)) == 3
    assert "out of memory with 2 frames at once, now 1" in caplog.text


@pytest.mark.golden
def test_frames_of_a_real_video_go_through(golden, models):
    frames = driving_frames(golden / "examples/001/driving.mp4", 3)
    nlf = load_nlf(models / "nlf/nlf_l_multi_0.3.2.torchscript", CPU)
    for frame, each in zip(frames, nlf.locate(frames)):
        rows, columns = np.nonzero(frame.mean(2) > 128)
        low, high = (columns.min(), rows.min()), (columns.max() + 1, rows.max() + 1)
        np.testing.assert_allclose(each.boxes[0, :4], [*low, *np.subtract(high, low)])
