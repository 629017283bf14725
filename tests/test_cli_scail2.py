"""SCAIL-2 on the command line: the kind is the checkpoint's or the package's; bad options end."""

import base64

import pytest

from engine import source
from engine.__main__ import _parser, main
from engine.cli.generate import read_options
from engine.config import state_dir
from engine.demo.presets import PRESETS
from engine.flow import Settings
from engine.jobs.like import comment_of
from engine.media.mp4 import encode_mp4
from engine.media.video import probe_video
from engine.recipes import RECIPES
from tests.support.clips import numbered
from tests.support.scail2 import dance, labels, noise, npz, png, square

SMALL = ("--width", "96", "--height", "64", "--steps", "1", "--cfg", "1")


@pytest.fixture
def files(tmp_path):
    for name, data in (
        ("me.png", png(noise())), ("dance.mp4", dance()), ("mask.npz", npz(labels())),
        ("ref_mask.png", png(square())), ("back.png", png(noise()[::-1])),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(base64.b64decode(data))
    return tmp_path


def generate(files, *options, motion="--video", out="clip.mp4", demo=True):
    """Runs `generate` with the tiny checkpoint of SCAIL-2, and returns its exit code."""
    given = PRESETS["tiny-scail2"].weights(state_dir())
    weights = ("--checkpoint", str(given.checkpoint), "--models", str(given.models))
    try:
        main([
            "generate", "--image", str(files / "me.png"), motion, str(files / "dance.mp4"),
            "--out", str(files / out), "--quiet", *SMALL, *(weights if demo else ()), *options,
        ])  # fmt: skip
    except SystemExit as end:
        return end.code
    return 0


def named(files, **options):
    """Options whose values are files: mask="mask.npz" is --mask FILE."""
    return [
        part
        for name, file in options.items()
        for part in (f"--{name.replace('_', '-')}", str(files / file))
    ]


def refusal(capsys):
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0].removeprefix("error: ")


def test_a_video_drives_the_clip_itself_and_no_motion_is_captured(files, caplog, capsys):
    assert generate(files) == 0
    info = probe_video(files / "clip.mp4")
    assert (info.frames, info.fps, info.width, info.height) == (9, 16, 96, 64)
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert any("The motion has no mask" in one for one in told)
    assert "9 frames of 96x64 at 16 fps" in capsys.readouterr().out


def test_media_that_were_read_to_be_checked_are_not_read_again(files, monkeypatch, capsys):
    read, times = source._read_frames, []

    def counted(*given):
        times.append(given)
        return read(*given)

    monkeypatch.setattr(source, "_read_frames", counted)
    assert generate(files, *named(files, mask="mask.npz")) == 0
    assert len(times) == 1
    capsys.readouterr()


def test_masks_further_pictures_and_modes_make_clips_of_their_own(files, capsys):
    masks = named(files, mask="mask.npz", reference_mask="ref_mask.png")
    ways = {
        "plain": [], "masks": masks, "replacement": [*masks, "--mode", "replacement"],
        "further": [*masks, *named(files, reference="back.png")],
        "its mask": [*masks, *named(files, reference="back.png"),
                     "--reference-mask-of", f"1={files / 'ref_mask.png'}"],
        "pose": masks,
    }  # fmt: skip
    clips = set()
    for name, options in ways.items():
        motion = "--pose" if name == "pose" else "--video"
        assert generate(files, *options, motion=motion, out=f"{name}.mp4") == 0, name
        clips.add((files / f"{name}.mp4").read_bytes())
    capsys.readouterr()
    assert len(clips) == len(ways) - 1  # to the network a skeleton is a video as another


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--mode", "replacement"], "The mode replacement needs a driving mask, which says who in "
         "the video is replaced; send --mask, or put SAM 2.1, as sam2.1_hiera_large.safetensors "
         "(or _base_plus, _small, _tiny), into sam2 in the folder of models."),
        (["--mask", "none.npz"], "There is no mask none.npz"),
        (["--align", "exact"], "--align is for SCAIL-Preview; this checkpoint serves SCAIL-2."),
        (["--reference-mask-of", "1=a.png"], "--reference-mask-of names picture 1; --reference is "
         "given 0 times"),
        (["--persons", "7"], "The persons is 7; it must be 1 to 6."),
        (["--reference", "a"] * 5, "5 further pictures are given; at most 4 are taken"),
        (["--reference", "no.png"], "There is no picture no.png"),
    ],
)  # fmt: skip
def test_options_that_cannot_be_done_are_one_sentence(files, capsys, options, sentence):
    assert generate(files, *options) == 2
    assert sentence in refusal(capsys)
    assert not (files / "clip.mp4").exists()


def test_a_picture_has_one_mask(files, capsys):
    twice = ["--reference-mask-of", f"1={files / 'me.png'}"] * 2
    assert generate(files, *named(files, reference="back.png"), *twice) == 2
    assert "names a picture twice; each has one mask." in refusal(capsys)


def test_options_of_scail2_are_refused_for_a_preview_model_by_name(files, capsys):
    for options, name in (
        (named(files, mask="mask.npz"), "--mask"),
        (named(files, reference_mask="ref_mask.png"), "--reference-mask"),
        (named(files, reference="back.png"), "--reference"),
        (["--segments", "even"], "--segments"),
        (["--drift", "none"], "--drift"),
    ):
        assert generate(files, *options, demo=False) == 2
        assert refusal(capsys) == (
            f"{name} is for SCAIL-2; the demo model serves SCAIL-Preview. "
            "Leave it out, or take a package of SCAIL-2."
        )
    assert generate(files, "--mode", "replacement", demo=False) == 2
    assert refusal(capsys) == (
        "The mode replacement is for SCAIL-2; the demo model serves SCAIL-Preview."
    )
    assert generate(files, "--recipe", "turbo", demo=False) == 2
    assert "There is no recipe turbo for SCAIL-Preview" in refusal(capsys)


def test_a_clip_never_replaces_a_mask(files, capsys):
    (files / "mask.mp4").write_bytes(b"precious")
    assert generate(files, *named(files, mask="mask.mp4"), out="mask.mp4") == 2
    assert "is an input" in refusal(capsys)
    assert (files / "mask.mp4").read_bytes() == b"precious"


@pytest.mark.parametrize("wrong", ["a.png", "x=a.png", "1=", "=a.png", "12345=a.png", "-1=a.png"])
def test_a_mask_of_a_further_picture_is_numbered(files, capsys, wrong):
    assert generate(files, f"--reference-mask-of={wrong}") == 2
    assert "N=FILE is expected" in refusal(capsys)


def test_the_recipe_production_of_scail2_is_called_turbo(files, caplog, capsys):
    assert generate(files, "--recipe", "production", "--persons", "2") == 0
    capsys.readouterr()
    told = [record.getMessage() for record in caplog.records]
    assert "The recipe production is called turbo for SCAIL-2." in told
    assert "persons is 2, which changes nothing: masks say who is who." in told


def test_a_checkpoint_of_the_demos_shape_is_run_as_that_was_trained():
    demo = PRESETS["nano-scail2"]
    home = demo.weights(state_dir())
    arguments = ["generate", "--image", "i.png", "--video", "v.mp4", "--out", "o.mp4",
                 "--checkpoint", str(home.checkpoint), "--models", str(home.models)]  # fmt: skip
    asked = read_options(_parser().parse_args(arguments), None)
    assert asked.request.settings.recipe == demo.recipe
    assert (asked.request.settings.height, asked.request.settings.width) == demo.size
    assert asked.demo is None  # whose weights they are, nobody can say


def test_a_clip_of_another_kind_of_model_is_named_and_not_options_that_nobody_gave(files, capsys):
    """Its settings stand for options, and those of SCAIL-2 are no options of SCAIL-Preview."""
    encode_mp4([numbered(9, 64, 96)], 16, files / "other.mp4", None, comment_of(
        Settings(RECIPES["scail2"]["turbo"], segments="even", who=(2, 1)), "scail2", "SCAIL"
    ))  # fmt: skip
    like = ("--like", str(files / "other.mp4"))
    assert generate(files, *like, motion="--pose", demo=False) == 2
    assert refusal(capsys).startswith(
        "The clip to be like was made by SCAIL-2, and the demo model is SCAIL-Preview: take a"
    )
