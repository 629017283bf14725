"""`python -m engine masks`: what is written, what is said, and what `generate` does with it."""

import base64
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine.__main__ import _parser, main
from engine.cli.masks import segmenter, with_own_masks
from engine.errors import BadMedia
from engine.flow import Recipe, Request, Settings, Warned
from engine.masks.made import MadeMasks
from engine.media.video import probe_video
from engine.pose.networks import Networks
from engine.source import check_source, load_source
from tests.support.drawn_joints import larger_trunk
from tests.support.made_masks import load_made
from tests.support.scail2 import FRAMES, SIZE, dance, labels, noise, npz, png, square

SMALL = ("--width", "96", "--height", "64")


@pytest.fixture
def files(tmp_path):
    for name, data in (
        ("me.png", png(noise())), ("dance.mp4", dance()), ("mask.npz", npz(labels())),
        ("ref_mask.png", png(square())),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(base64.b64decode(data))
    return tmp_path


def masks(files, *options, out="made.npz", mask="mask.npz"):
    given = [] if mask is None else ["--mask", str(files / mask)]
    try:
        main([
            "masks", "--video", str(files / "dance.mp4"), "--image", str(files / "me.png"), *given,
            "--reference-mask", str(files / "ref_mask.png"), "--out", str(files / out), "--quiet",
            *SMALL, *options,
        ])  # fmt: skip
    except SystemExit as end:
        return end.code
    return 0


def request_of(files, mode="replacement", **given):
    settings = Settings(Recipe("euler_simple", 1, 1.0, 5.0), width=96, height=64, mode=mode)
    return Request(files / "me.png", files / "dance.mp4", "video", settings, **given)


def source(files, **given):
    return load_source(request_of(files, **given), None)


def test_masks_a_preview_and_three_stills_are_written(files, capsys):
    look = files / "look.mp4"
    assert masks(files, "--mode", "replacement", "--preview", str(look)) == 0
    assert f"{files / 'made.npz'}: 9 frames, persons: 1, warnings: 0" in capsys.readouterr().out
    made = load_made(files / "made.npz")
    assert np.array_equal(made.labels.numpy(), labels())
    assert np.array_equal(made.reference.numpy(), (square()[..., 2] > 0).astype(np.uint8))
    assert (made.fps, made.order, len(made.source_sha256)) == (16, (1,), 64)
    info = probe_video(look)
    assert (info.frames, info.width) == (FRAMES, 2 * SIZE[1])
    stills = [Image.open(files / f"look-{n}.png") for n in (1, 2, 3)]
    assert {still.size for still in stills} == {(info.width, info.height)}


def test_made_masks_make_the_same_media_as_the_files_that_they_are_of(files):
    assert masks(files, "--mode", "replacement") == 0
    wanted = source(files, mask=files / "mask.npz", reference_mask=files / "ref_mask.png")
    got = source(files, mask=files / "made.npz")
    assert torch.equal(got.roles.driving, wanted.roles.driving)
    assert torch.equal(got.roles.reference, wanted.roles.reference)
    assert torch.equal(got.placed, wanted.placed)
    assert got.notes == wanted.notes
    other = png(square(left=40))
    (files / "other.png").write_bytes(base64.b64decode(other))
    got = source(files, mask=files / "made.npz", reference_mask=files / "other.png")
    assert got.standing[0].left != wanted.standing[0].left  # what is given wins


@pytest.mark.parametrize("suffix", [".mkv", ".zip"])
def test_other_forms_have_the_mask_of_the_picture_beside_them(files, suffix):
    assert masks(files, "--mode", "replacement", out=f"made{suffix}") == 0
    wanted = source(files, mask=files / "mask.npz", reference_mask=files / "ref_mask.png")
    got = source(files, mask=files / f"made{suffix}", reference_mask=files / "made-reference.png")
    assert torch.equal(got.roles.driving, wanted.roles.driving)
    assert torch.equal(got.placed, wanted.placed)


def test_masks_of_another_picture_are_told_or_refused(files):
    assert masks(files) == 0
    Image.fromarray(noise()[::-1]).save(files / "me.png")
    assert any("another picture file of the same size" in one
               for one in source(files, mask=files / "made.npz").notes)  # fmt: skip
    Image.fromarray(noise((128, 192))).save(files / "me.png")
    with pytest.raises(BadMedia, match="was made for another picture, of 96x64"):
        source(files, mask=files / "made.npz")


def test_persons_are_cast_and_grown(files):
    two = labels()
    two[:, :12, 80:] = 2
    np.savez(files / "two.npz", masks=two)
    assert masks(files, "--who", "red,blue", mask="two.npz") == 0
    made = load_made(files / "made.npz")
    assert np.array_equal(made.labels.numpy() == 2, two == 1)
    assert made.order == (2, 1)
    assert masks(files, "--grow", "16", mask="two.npz", out="large.npz") == 0
    grown = load_made(files / "large.npz").labels.numpy()
    assert ((grown == 1) >= (two == 1)).all()
    assert (grown == 1).sum() > (two == 1).sum()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [(["--who", "7"], "persons by number"), (["--who", "2"], "who names person 2; mask.npz"),
     (["--grow", "17"], "-16 to 16 pixels are taken"), (["--persons", "9"], "persons is 9"),
     (["--persons", "2", "--slow"], "--persons, --slow would change nothing: --mask gives masks"),
     (["--corrections", "none.json"], "--corrections would change nothing"),
     (["--preview", "a.png"], "a.png should end in .mp4"), (["--strict"], "Strict: a warning is")],
)  # fmt: skip
def test_what_cannot_be_done_is_one_sentence_and_leaves_nothing(files, capsys, options, sentence):
    assert masks(files, *options) == 2
    lines = capsys.readouterr().err.splitlines()
    assert sentence in lines[-1]
    assert not (files / "made.npz").exists()


def test_a_form_that_is_none_is_refused(files, capsys):
    assert masks(files, out="made.gif") == 2
    assert "made.gif should end in .npz, .mkv, .zip." in capsys.readouterr().err


def test_without_a_segmenter_it_is_said_what_to_put_where(files, capsys):
    assert masks(files, "--models", str(files), mask=None) == 2
    said = capsys.readouterr().err
    assert "Put SAM 2.1 (Apache-2.0), as sam2.1_hiera_large.safetensors" in said
    assert f"into {files / 'sam2'}, or give masks with --mask." in said
    assert segmenter(files, torch.device("cpu")) is None


def test_a_clip_in_replacement_without_masks_has_them_made(files):
    def segment(wanted, check):
        assert (wanted.mode, wanted.persons, wanted.size) == ("replacement", 2, (64, 96))
        held = torch.from_numpy(labels(wanted.count))
        boxes = torch.zeros(wanted.count, 1, 4)
        return MadeMasks(held, None, boxes, boxes[..., 0], wanted.fps, "", (1,), "drawn", "",
                         (Warned("swap", "Not sure.", 2),))  # fmt: skip

    request = request_of(files)
    made = with_own_masks(request, 2, segment, files)
    assert np.array_equal(load_made(made.mask).labels.numpy(), labels())
    assert with_own_masks(request, 2, None, files) == request
    given = dataclasses.replace(request, mask=files / "mask.npz")
    assert with_own_masks(given, 2, segment, files) == given
    dances = request_of(files, mode="animation")
    assert with_own_masks(dances, 2, segment, files) == dances


def test_the_command_is_listed_with_its_options():
    args = _parser().parse_args(
        ["masks", "--video", "v", "--image", "i", "--out", "m.npz", "--who", "2,1", "--slow"]
    )
    assert (args.who, args.slow, args.mode, args.out) == ((2, 1), True, "animation", Path("m.npz"))


def test_where_legs_are_cut_joints_tell_the_size(files, monkeypatch, caplog):
    cut = np.zeros((FRAMES, *SIZE), np.uint8)
    cut[:, 16:, 8:40] = 1
    np.savez(files / "cut.npz", masks=cut)
    given = ["--mode", "replacement", "--models", str(files)]
    assert masks(files, *given, mask="cut.npz") == 0
    assert (
        "Joints would tell. No 2D keypoint networks: put yolox_l.onnx and dw-ll_ucoco_384.onnx"
        in caplog.text
    )
    assert f"into {files} or its detection, DWPose" in caplog.text
    caplog.clear()
    monkeypatch.setattr(Networks, "look", lambda self, frames: larger_trunk(frames))
    assert masks(files, *given, "--framing", "auto", mask="cut.npz") == 0
    assert "nothing tells how large" not in caplog.text
    assert "No face is seen of the person in blue" in caplog.text
    caplog.clear()
    request = request_of(files, mask=files / "cut.npz", reference_mask=files / "ref_mask.png")
    with caplog.at_level("INFO", "engine"):
        check_source(request, larger_trunk)  # as `generate` does before it loads
    assert "The person in blue: scale 1.500, 48 pixels high" in caplog.text
