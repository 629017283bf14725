"""A dance video and a picture become a skeleton, with files of the real interfaces."""

import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from engine.__main__ import main
from engine.errors import Cancelled
from engine.flow import Request, Settings
from engine.media.framing import crop_frames
from engine.media.mp4 import encode_mp4
from engine.media.picture import load_image
from engine.media.video import probe_video, read_video
from engine.pose.camera import base_camera
from engine.pose.capture import capture_motion, capture_skeleton
from engine.pose.extract import PoseExtractor
from engine.pose.joints import load_joints
from engine.pose.networks import Networks
from engine.pose.overlay import composite, overlay
from engine.recipes import RECIPES
from engine.source import load_source
from tests.support.clips import run_ffmpeg
from tests.support.standin_models import save_detectors, save_nlf

CPU = torch.device("cpu")
SMALL = ("--width", "160", "--height", "96", "--frames", "5", "--quiet")
SIZE = (96, 160)
NLF = "nlf/nlf_l_multi_0.3.2.torchscript"
YOLOX, DWPOSE = "DWPose/yolox_l.onnx", "DWPose/dw-ll_ucoco_384.onnx"


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
def state(tmp_path, monkeypatch):
    """Nothing is in the cache."""
    monkeypatch.setenv("SCAIL_STATE", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.fixture
def example(golden):
    return golden / "examples" / "001"


def run(*arguments):
    """The exit code of a command."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as end:
        return end.code
    return 0


def pose(models, video, out, *more):
    return run("pose", "--video", video, "--models", models, "--out", out, *SMALL, *more)


def decoded(path):
    return torch.cat(list(read_video(probe_video(path)))).numpy()


def boxes_video(path, *boxes, height=100, width=200, fps=16):
    """Black frames, each with a white box x1, y1, x2, y2 or None."""
    clip = torch.zeros(len(boxes), height, width, 3, dtype=torch.uint8)
    for frame, box in zip(clip, boxes):
        if box is not None:
            x1, y1, x2, y2 = box
            frame[y1:y2, x1:x2] = 255
    encode_mp4([clip], fps, path, crf=4)
    return path


def extractor(models, tmp_path):
    return PoseExtractor(Networks(models, CPU, tmp_path / "state"), tmp_path / "state")


def spoil(path):
    """Other content of the same size and time: whoever opens it fails."""
    stat = path.stat()
    path.write_bytes(b"?" * stat.st_size)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


# The commands on a real video


@pytest.mark.golden
def test_pose_writes_a_skeleton_and_joints_and_remembers_them(
    example, models, state, tmp_path, capsys
):
    video, first, second = example / "driving.mp4", tmp_path / "a.mp4", tmp_path / "b.mp4"
    joints = tmp_path / "a.npz"
    assert pose(models, video, first, "--joints", joints) == 0
    assert "5 frames of 160x96 at 16 fps" in capsys.readouterr().out
    assert decoded(first).any(axis=(1, 2, 3)).all()
    clip = load_joints(joints)
    assert (clip.joints.shape, clip.fps, clip.size) == ((5, 1, 24, 3), 16, SIZE)

    for name in (NLF, YOLOX, DWPOSE):
        spoil(models / name)
    assert pose(models, video, second) == 0  # nobody looks: the networks cannot be opened
    assert np.array_equal(decoded(first), decoded(second))
    capsys.readouterr()
    assert pose(models, video, second, "--image", example / "ref.jpg") == 2
    assert "onnxruntime cannot open yolox_l.onnx" in capsys.readouterr().err


@pytest.mark.golden
def test_generate_dances_as_pose_does(example, standins, tmp_path, capsys):
    media = ("--video", example / "driving.mp4", "--image", example / "ref.jpg", *SMALL)
    alone, clip, stages = tmp_path / "pose.mp4", tmp_path / "clip.mp4", tmp_path / "stages"
    assert run("pose", *media, "--models", standins, "--out", alone) == 0
    options = ("--models", standins, "--stages", stages, "--steps", "1")
    assert run("generate", *media, *options, "--out", clip) == 0
    assert "DEMO WEIGHTS" in capsys.readouterr().err
    made = probe_video(clip)
    assert (made.width, made.height, made.frames, made.fps) == (160, 96, 5, 16)
    assert np.array_equal(decoded(stages / "skeleton.mp4"), decoded(alone))


@pytest.mark.golden
def test_the_joints_that_pose_keeps_draw_the_same_bones(example, standins, tmp_path):
    joints = tmp_path / "joints.npz"
    assert pose(standins, example / "driving.mp4", tmp_path / "a.mp4", "--joints", joints) == 0
    settings = Settings(RECIPES["preview"]["official"], height=SIZE[0], width=SIZE[1])
    made_of = Request(example / "ref.jpg", joints, "joints", settings)
    source = load_source(made_of, capture=None)
    found = extractor(standins, tmp_path)
    motion, fps = capture_motion(found, probe_video(example / "driving.mp4"), SIZE, None, 5, 1)
    want = [
        composite(bones, overlay(points, *SIZE))
        for bones, points in zip(source.skeleton.numpy(), motion.keypoints, strict=True)
    ]
    assert source.fps == fps
    assert np.array_equal(list(found.skeleton(motion, None, *SIZE)), want)
    assert source.skeleton.any()
    out = tmp_path / "clip.mp4"
    still = ("--image", example / "ref.jpg", "--out", out, "--steps", "1", *SMALL)
    assert run("generate", "--joints", joints, *still) == 0
    assert probe_video(out).frames == 5


@pytest.mark.golden
def test_the_production_recipe_captures_in_full_and_draws_at_half_size(example, standins, tmp_path):
    settings = Settings(RECIPES["preview"]["production"], height=SIZE[0], width=SIZE[1], frames=5)
    request = Request(example / "ref.jpg", example / "driving.mp4", "video", settings)
    found = extractor(standins, tmp_path)
    picture, dance = load_image(request.image), probe_video(request.motion)
    half = SIZE[0] // 2, SIZE[1] // 2
    got, fps = capture_skeleton(found, request, dance, picture, half)
    motion, _ = capture_motion(found, dance, SIZE, None, 5, 1)
    shown = crop_frames(picture[None], SIZE)[0].numpy()
    assert fps == 16
    assert np.array_equal(got.numpy(), list(found.skeleton(motion, shown, *half)))
    assert len(list((tmp_path / "state").rglob("*.entry"))) == 1  # both looked at one size


# Videos that are unlike the canvas, or hardly videos


def test_a_video_of_another_shape_shares_the_camera_of_its_crop(standins, tmp_path):
    # 200x100 covers the 64x96 canvas at 192x96: 64 columns are cut off on each side.
    video = probe_video(boxes_video(tmp_path / "wide.mp4", (80, 20, 100, 80)))
    motion, _ = capture_motion(extractor(standins, tmp_path), video, (96, 64), None, None, 1)
    middle = np.array([90 * 0.96 - 64, 50 * 0.96])
    pelvis = motion.joints[0, 0, 0] + np.float32([0, 60, 0])  # the stand-in's is 60 mm above
    camera = base_camera(96, 64)
    seen = pelvis[:2] / pelvis[2] * camera.fx + (camera.cx, camera.cy)
    np.testing.assert_allclose(seen, middle, atol=1.5)


def test_frame_rate_and_length_are_those_asked_for(standins, tmp_path):
    boxes = [(60 + 4 * t, 20, 80 + 4 * t, 80) for t in range(12)]
    video = probe_video(boxes_video(tmp_path / "v.mp4", *boxes))
    found = extractor(standins, tmp_path)
    whole, fps = capture_motion(found, video, (96, 192), None, None, 1)
    half, rate = capture_motion(found, video, (96, 192), 8, 5, 1)
    assert (fps, rate) == (16, 8)
    assert np.array_equal(half.joints, whole.joints[::2][:5])


def test_a_video_of_one_frame_gives_a_skeleton_of_one(standins, state, tmp_path):
    video = boxes_video(tmp_path / "one.mp4", (80, 20, 120, 80))
    assert pose(standins, video, tmp_path / "out.mp4") == 0
    assert decoded(tmp_path / "out.mp4").shape == (1, *SIZE, 3)


def test_a_dancer_who_enters_late_is_drawn_from_then_on(standins, state, tmp_path):
    video = boxes_video(tmp_path / "v.mp4", None, None, *[(80, 20, 120, 80)] * 3)
    assert pose(standins, video, tmp_path / "out.mp4") == 0
    bright = decoded(tmp_path / "out.mp4").max(axis=(1, 2, 3)) > 100
    assert bright.tolist() == [False, False, True, True, True]


def test_a_video_with_nobody_in_it_leaves_nothing_behind(standins, state, tmp_path, capsys):
    video = boxes_video(tmp_path / "empty.mp4", *[None] * 4)
    Image.new("RGB", (160, 96)).save(tmp_path / "i.png")
    before = sorted(tmp_path.iterdir())
    out, joints = tmp_path / "out.mp4", tmp_path / "j.npz"
    assert pose(standins, video, out, "--joints", joints) == 2
    sentence = "Nobody was found in any of the 4 frames looked at (0 to 3;"
    assert capsys.readouterr().err.startswith(f"error: {sentence}")
    media = ("--video", video, "--image", tmp_path / "i.png", "--models", standins)
    assert run("generate", *media, "--out", out, *SMALL) == 2
    assert sentence in capsys.readouterr().err
    assert set(tmp_path.iterdir()) - set(before) <= {state}


# Model files


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:200])


WRONG_MODELS = {
    "tampered NLF": (NLF, flip, "is damaged or another one"),
    "NLF nobody vouched for": (f"{NLF}.sha256", os.remove, "nobody has vouched for it"),
    "no NLF": (NLF, os.remove, "No NLF model: put nlf_l_multi_0.3.2.torchscript"),
    "damaged YOLOX": (YOLOX, cut, "onnxruntime cannot open yolox_l.onnx (200 bytes)"),
    "another network": (
        DWPOSE,
        lambda path: shutil.copy(path.with_name("yolox_l.onnx"), path),
        "It is the file of another network",
    ),
}


@pytest.mark.parametrize("case", WRONG_MODELS)
def test_a_wrong_model_file_ends_in_one_sentence(models, state, tmp_path, capsys, case):
    name, damage, sentence = WRONG_MODELS[case]
    video = boxes_video(tmp_path / "v.mp4", (80, 20, 120, 80))
    assert pose(models, video, tmp_path / "a.mp4") == 0  # the cache must not hide what follows
    damage(models / name)
    (tmp_path / "v.mp4").unlink()
    video = boxes_video(tmp_path / "v.mp4", (80, 20, 120, 70))
    capsys.readouterr()
    assert pose(models, video, tmp_path / "b.mp4") == 2
    lines = capsys.readouterr().err.splitlines()
    assert [sentence in line for line in lines] == [True]
    assert not (tmp_path / "b.mp4").exists()


def test_a_tampered_network_is_not_taken_for_the_one_that_was_cached(models, state, tmp_path):
    video = boxes_video(tmp_path / "v.mp4", (80, 20, 120, 80))
    assert pose(models, video, tmp_path / "a.mp4") == 0
    flip(models / NLF)
    assert pose(models, video, tmp_path / "b.mp4") == 2


def test_generate_names_missing_networks_before_it_loads_anything(tmp_path, capsys):
    video = boxes_video(tmp_path / "v.mp4", (80, 20, 120, 80))
    Image.new("RGB", (160, 96)).save(tmp_path / "i.png")
    media = ("--video", video, "--image", tmp_path / "i.png", "--out", tmp_path / "o.mp4")
    assert run("generate", *media, "--models", tmp_path / "nowhere", *SMALL) == 2
    said = capsys.readouterr().err
    assert "error: No NLF model: put" in said and "nowhere" in said
    assert "DEMO WEIGHTS" not in said


# Options of `pose`


@pytest.mark.parametrize(("joints", "sentence"), [
    ("j.txt", "should end in .npz"), ("no/j.npz", "There is no folder"),
    ("folder.npz", "is a folder"), ("v.npz", "is an input"),
])  # fmt: skip
def test_joints_that_cannot_be_kept_are_refused_at_once(tmp_path, capsys, joints, sentence):
    (tmp_path / "folder.npz").mkdir()
    video = boxes_video(tmp_path / "v.mp4", (80, 20, 120, 80)).rename(tmp_path / "v.npz")
    assert pose(tmp_path, video, tmp_path / "o.mp4", "--joints", tmp_path / joints) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "o.mp4").exists()


@pytest.mark.parametrize(("options", "sentence"), [
    (("--persons", "0"), "The persons is 0; it must be 1 to 8."),
    (("--fps", "nan"), "The fps is nan"),
    (("--frames", "0"), "The frames is 0"),
    (("--width", "100"), "The width is 100"),
    (("--image", "none.png"), "There is no picture none.png"),
    (("--video", "none.mp4"), "There is no video none.mp4"),
])  # fmt: skip
def test_bad_options_of_pose_end_in_one_sentence(tmp_path, capsys, options, sentence):
    video = boxes_video(tmp_path / "v.mp4", None)
    assert pose(tmp_path, video, tmp_path / "o.mp4", *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {sentence}")


def test_a_damaged_video_is_named_before_any_network_is_looked_for(tmp_path, capsys):
    video = tmp_path / "sound.mp4"
    run_ffmpeg("-f", "lavfi", "-i", "sine=duration=1", video)
    assert pose(tmp_path / "nowhere", video, tmp_path / "o.mp4") == 2
    assert "holds sound but no picture" in capsys.readouterr().err


@pytest.mark.parametrize("calls", [0, 4, 12, 20])
def test_a_check_ends_capturing_wherever_it_is(standins, tmp_path, calls):
    Image.new("RGB", (160, 96)).save(tmp_path / "i.png")
    video = boxes_video(tmp_path / "v.mp4", *[(80, 20, 120, 80)] * 5)
    settings = Settings(RECIPES["preview"]["official"], height=SIZE[0], width=SIZE[1])
    request = Request(tmp_path / "i.png", video, "video", settings)
    picture, asked = load_image(request.image), []

    def check():
        asked.append(1)
        if len(asked) > calls:
            raise Cancelled("The job was called off.")

    with pytest.raises(Cancelled):
        capture_skeleton(
            extractor(standins, tmp_path), request, probe_video(video), picture, SIZE, check
        )
    assert len(asked) == calls + 1
