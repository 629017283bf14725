"""The size of a clip: one that fills the size asked for, or one with the shape of the picture."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine.errors import BadMedia, Cancelled
from engine.flow import Request, Settings
from engine.media.framing import crop_image, fitted_size, image_to_network
from engine.media.picture import load_image
from engine.pose.joints import JointClip, save_joints
from engine.recipes import RECIPES
from engine.source import check_source, clip_size, load_source
from tests.support.clips import clip, run_ffmpeg, tone

BOX = (672, 416)  # H, W of production


@pytest.mark.parametrize(
    ("picture", "size"),
    [
        ((1000, 1000), (416, 416)),  # the example of docs/reference/runpod.md A.5
        ((672, 416), (672, 416)), ((1344, 832), (672, 416)), ((336, 208), (672, 416)),
        ((1500, 1000), (608, 416)), ((1000, 1500), (256, 416)), ((2000, 1000), (672, 320)),
        ((64, 64), (416, 416)), ((1920, 1080), (672, 352)), ((5000, 700), (672, 64)),
    ],
)  # fmt: skip
def test_a_clip_has_the_largest_size_in_the_box_that_has_the_pictures_shape(picture, size):
    assert fitted_size(*picture, BOX) == size


@pytest.mark.parametrize(("picture", "size"), [((500, 4000), "416x32"), ((4000, 50), "0x672")])
def test_a_picture_too_long_for_the_box_is_refused(picture, size):
    height, width = picture
    with pytest.raises(BadMedia, match=f"{width}x{height} fits into 416x672 at {size} only"):
        fitted_size(height, width, BOX)


@pytest.fixture
def wide(tmp_path):
    """A picture of 240x120 and a skeleton video, for a box of 96x160."""
    pixels = np.random.default_rng(0).integers(0, 255, (120, 240, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    clip(tmp_path / "pose.mp4", 5)
    recipe = dataclasses.replace(RECIPES["preview"]["production"], half_render=False)
    settings = Settings(recipe, width=160, height=192)
    return Request(tmp_path / "wide.png", tmp_path / "pose.mp4", "pose", settings)


def fitted(request, fit, **changes):
    settings = dataclasses.replace(request.settings, fit=fit)
    return dataclasses.replace(request, settings=settings, **changes)


def test_picture_and_skeleton_have_the_size_of_their_fit(wide):
    cropped = load_source(wide, capture=None)
    resized = load_source(fitted(wide, "resize"), capture=None)
    assert (cropped.image.shape, cropped.skeleton.shape[1:3]) == ((3, 192, 160), (192, 160))
    assert (resized.image.shape, resized.skeleton.shape[1:3]) == ((3, 64, 160), (64, 160))
    want = crop_image(image_to_network(load_image(wide.image)), (64, 160))
    assert torch.equal(resized.image, want)


def test_the_canvas_of_a_captured_skeleton_follows_the_fit(wide):
    asked = []

    def capture(request, video, picture, canvas, check):
        asked.append(canvas)
        return torch.zeros(5, *canvas, 3, dtype=torch.uint8), 24.0

    settings = dataclasses.replace(wide.settings, recipe=RECIPES["preview"]["production"])
    half = dataclasses.replace(wide, kind="video", settings=settings)
    for fit in ("crop", "resize"):
        load_source(fitted(half, fit), capture)
    assert asked == [(96, 80), (32, 80)]


def test_without_a_size_the_box_is_the_trained_one_as_the_picture_lies():
    settings = Settings(RECIPES["preview"]["official"], fit="resize")
    free = Request(Path("i"), Path("m"), "pose", settings)
    assert clip_size(free, torch.zeros(1000, 1000, 3)) == (512, 512)
    assert clip_size(free, torch.zeros(1000, 2000, 3)) == (448, 896)
    assert clip_size(fitted(free, "crop"), torch.zeros(9, 18, 3)) == (512, 896)


def test_a_picture_too_long_is_refused_before_anything_is_loaded(tmp_path, wide):
    Image.new("RGB", (1600, 64)).save(tmp_path / "long.png")
    long = fitted(wide, "resize", image=tmp_path / "long.png")
    with pytest.raises(BadMedia, match="1600x64 fits into 160x192 at 160x0 only"):
        check_source(long)


@pytest.fixture
def loud(tmp_path, wide):
    """The request with a skeleton video that has sound."""
    sound = tone(tmp_path / "a.wav", 1)
    clip(tmp_path / "loud.mp4", 5, audio=sound)
    return dataclasses.replace(wide, motion=tmp_path / "loud.mp4")


def unreadable(request):
    """The same with sound that no decoder in use takes."""
    path = request.motion.with_name("rare.mkv")
    run_ffmpeg("-i", request.motion, "-c:v", "copy", "-c:a", "dca", "-strict", "-2", path)
    return dataclasses.replace(request, motion=path)


def test_sound_that_cannot_be_read_is_a_note_and_told_before_anything_is_loaded(loud, caplog):
    source = load_source(loud, capture=None)
    assert (source.audio.path, source.audio.begins_s, source.notes) == (loud.motion, 0, ())
    rare = unreadable(loud)
    note = (
        "The sound of rare.mkv cannot be read: Codec (dca) not on whitelist. The clip has no sound."
    )
    source = load_source(rare, capture=None)
    assert (source.audio, source.notes) == (None, (note,))
    caplog.clear()
    check_source(rare)
    assert [record.getMessage() for record in caplog.records] == [note]
    silent = dataclasses.replace(rare, settings=dataclasses.replace(rare.settings, audio=False))
    assert load_source(silent, capture=None).notes == ()


def test_sound_is_looked_at_before_motion_is_captured(loud, caplog):
    def capture(request, video, picture, canvas, check):
        assert "The clip has no sound." in caplog.text
        return torch.zeros(5, *canvas, 3, dtype=torch.uint8), 24.0

    caplog.set_level("INFO", "engine")
    source = load_source(dataclasses.replace(unreadable(loud), kind="video"), capture)
    assert len(source.notes) == 1


@pytest.mark.parametrize("calls", [0, 5, 20])
@pytest.mark.parametrize("kind", ["pose", "joints"])
def test_a_check_ends_the_reading_of_media(loud, tmp_path, kind, calls):
    motion = loud.motion
    if kind == "joints":
        motion = tmp_path / "dance.npz"
        joints = np.ones((40, 1, 24, 3), np.float32) * 1000
        save_joints(motion, JointClip(joints, 16.0, (64, 96)))
    request, asked = dataclasses.replace(loud, kind=kind, motion=motion), []

    def check():
        asked.append(1)
        if len(asked) > calls:
            raise Cancelled("The job was called off.")

    with pytest.raises(Cancelled):
        load_source(request, None, check)
    assert len(asked) == calls + 1
