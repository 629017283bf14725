"""The demo as it ships and is shown: a nano model known by its shape, its dancer, large clips."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.nano import dancer
from benchmarks.nano.dance import dance
from benchmarks.nano_scail2 import demo
from engine.__main__ import main
from engine.config import NANO, NANO_SCAIL2, SCAIL_14B, TINY, TINY_SCAIL2
from engine.demo import show
from engine.demo.presets import NANO_HOME, NANO_SCAIL2_HOME, PRESETS, SHIPPED, preset_of
from engine.media.mp4 import encode_mp4
from engine.media.video import probe_video, read_video
from engine.models.checkpoint import Checkpoint
from engine.pose.joints import load_joints


def test_demo_models_are_known_by_their_shape_and_no_other_is():
    assert [preset_of(preset.config) for preset in PRESETS.values()] == [*PRESETS.values()]
    assert {name: preset.config for name, preset in PRESETS.items()} == {
        "tiny": TINY, "nano": NANO, "tiny-scail2": TINY_SCAIL2, "nano-scail2": NANO_SCAIL2,
    }  # fmt: skip
    assert preset_of(SCAIL_14B) is None


def test_the_shipped_model_has_the_shape_that_its_preset_says_and_is_small(tmp_path):
    shipped = SHIPPED.weights(tmp_path)
    assert Checkpoint(shipped.checkpoint).config == NANO
    assert [*tmp_path.iterdir()] == []  # nothing is written for it
    assert sum(path.stat().st_size for path in NANO_HOME.rglob("*")) < 20e6


def test_the_nano_scail2_has_the_shape_that_its_preset_says_and_is_small(tmp_path):
    shipped = PRESETS["nano-scail2"].weights(tmp_path)
    assert Checkpoint(shipped.checkpoint).config == NANO_SCAIL2
    assert [*tmp_path.iterdir()] == []
    assert sum(path.stat().st_size for path in NANO_SCAIL2_HOME.rglob("*")) < 20e6


def test_the_tiny_scail2_is_written_once_and_read_as_what_it_is(tmp_path):
    written = PRESETS["tiny-scail2"].weights(tmp_path)
    assert Checkpoint(written.checkpoint).config == TINY_SCAIL2
    before = written.checkpoint.stat().st_mtime_ns
    assert PRESETS["tiny-scail2"].weights(tmp_path) == written
    assert written.checkpoint.stat().st_mtime_ns == before


def test_the_files_of_the_scail2_demo_are_of_one_scene(tmp_path):
    video = probe_video(NANO_SCAIL2_HOME / demo.DRIVING)
    assert video.frames / video.fps >= 4
    assert video.frames > 5 * PRESETS["nano-scail2"].recipe.window_frames  # history is seen at work
    with np.load(NANO_SCAIL2_HOME / demo.DRIVING_MASK) as file:
        labels = file["masks"]
    assert labels.shape == (video.frames, video.height, video.width)
    demo.write_demo(tmp_path, frames=2)
    for name in (demo.PICTURE, demo.PICTURE_MASK):
        found, want = (np.asarray(Image.open(folder / name), np.int16)
                       for folder in (NANO_SCAIL2_HOME, tmp_path))  # fmt: skip
        assert np.abs(found - want).max() <= 1


def test_the_dance_of_the_demo_lasts_four_seconds_and_is_what_the_code_makes():
    clip = load_joints(NANO_HOME / dancer.DANCE.name)
    assert len(clip.joints) / clip.fps >= 4
    assert len(clip.joints) > SHIPPED.recipe.window_frames  # it runs in windows
    want = dance(dancer.NANO_FRAMES, dancer.NANO_FPS, dancer.NANO_SEED)
    assert np.abs(clip.joints + np.array([0, 0, dancer.NANO_NEARER]) - want).max() <= 1e-2


def test_the_picture_of_the_demo_is_what_the_code_draws(tmp_path):
    dancer.write_nano(tmp_path)
    found, want = (
        np.asarray(Image.open(folder / dancer.PICTURE.name), np.int16)
        for folder in (NANO_HOME, tmp_path)
    )
    assert np.abs(found - want).max() <= 1


def test_without_a_size_the_demo_makes_clips_of_the_size_that_it_was_trained_on(tmp_path, capsys):
    given = ["--joints", str(NANO_HOME / "dance.npz"), "--out", str(tmp_path / "clip.mp4")]
    picture = str(NANO_HOME / "dancer.png")
    main(["generate", "--image", picture, *given, "--frames", "5", "--steps", "1", "--quiet"])
    info = probe_video(tmp_path / "clip.mp4")
    assert (info.height, info.width, info.frames) == (*SHIPPED.size, 5)
    assert SHIPPED.warning in capsys.readouterr().err


@pytest.fixture
def stages(tmp_path):
    """A clip and its skeleton of one colour each, and the times it took."""
    folder = tmp_path / "stages"
    folder.mkdir()
    for name, level in (("clip.mp4", 200), ("skeleton.mp4", 60)):
        encode_mp4([torch.full((5, 96, 64, 3), level, dtype=torch.uint8)], 12.0, folder / name)
    (folder / "timings_ms.json").write_text(json.dumps({"denoise": 1500.0}))
    Image.new("RGB", (64, 96), (120, 120, 120)).save(tmp_path / "picture.png")
    return folder


def options(stages):
    home = stages.parent
    named = {
        "--image": home / "picture.png", "--stages": stages, "--clip": stages / "clip.mp4",
        "--out": home / "large.mp4", "--beside": home / "beside.mp4",
    }  # fmt: skip
    return [str(part) for pair in named.items() for part in pair]


def test_a_clip_is_shown_large_and_beside_what_it_was_made_from(stages, capsys):
    show.main(options(stages))
    large, beside = (probe_video(stages.parent / name) for name in ("large.mp4", "beside.mp4"))
    assert (large.height, large.width, large.frames, large.fps) == (384, 256, 5, 12.0)
    assert (beside.height, beside.width, beside.frames) == (384, 3 * 256, 5)
    for name in ("large.mp4", "beside.mp4"):  # "the MP4 says DEMO WEIGHTS"
        assert b"DEMO WEIGHTS" in (stages.parent / name).read_bytes()
    row = torch.cat([*read_video(beside)]).float()
    for column, level in enumerate((120, 60, 200)):
        part = row[:, :, column * 256 + 8 : column * 256 + 248]
        assert part.mean().item() == pytest.approx(level, abs=3)
    said = capsys.readouterr().out
    assert "denoise 1.5 s" in said and str(stages.parent / "beside.mp4") in said


def test_a_driven_clip_is_shown_beside_the_picture_and_the_video_that_drove_it(stages, capsys):
    home = stages.parent
    driving = torch.full((5, 96, 80, 3), 90, dtype=torch.uint8)  # of another size than the clip
    encode_mp4([driving], 12.0, home / "driving.mp4")
    named = {
        "--image": home / "picture.png", "--driving": home / "driving.mp4",
        "--clip": stages / "clip.mp4", "--beside": home / "beside.mp4",
    }  # fmt: skip
    show.main([str(part) for pair in named.items() for part in pair])
    row = torch.cat([*read_video(probe_video(home / "beside.mp4"))]).float()
    assert row.shape == (5, 384, 3 * 256, 3)
    for column, level in enumerate((120, 90, 200)):
        part = row[:, :, column * 256 + 8 : column * 256 + 248]
        assert part.mean().item() == pytest.approx(level, abs=3)
    assert str(home / "beside.mp4") in capsys.readouterr().out


def test_a_clip_that_is_not_there_ends_in_one_sentence(stages):
    (stages / "clip.mp4").unlink()
    with pytest.raises(SystemExit, match=r"error: .*clip.mp4"):
        show.main(options(stages))
    assert not (stages.parent / "large.mp4").exists()
