"""The command line: good input makes a clip, bad input ends in one sentence and exit code 2."""

import dataclasses
import json
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from engine.__main__ import main
from engine.config import state_dir
from engine.demo.presets import SHIPPED
from engine.demo.weights import demo_weights
from engine.errors import OutputError
from engine.flow import Settings
from engine.media.video import probe_video, read_video
from tests.support.clips import clip, tone

SMALL = ("--width", "96", "--height", "64", "--steps", "1")


@pytest.fixture
def files(tmp_path):
    """One good and many bad inputs, by name."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (80, 120, 3), dtype=np.uint8)).save(tmp_path / "ok.png")
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    clip(tmp_path / "pose.mp4", 9)
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "empty.mp4").write_bytes(b"")
    data = (tmp_path / "pose.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])
    tone(tmp_path / "sound.mp4", 1)
    np.savez(tmp_path / "none.npz", joints=np.full((4, 24, 3), np.nan))
    np.savez(tmp_path / "metres.npz", joints=np.ones((4, 24, 3)))
    np.savez(tmp_path / "film.npz", joints=np.full((3000, 24, 3), 2000.0, np.float32))
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 100)
    return tmp_path


def run(files, *changes, image="ok.png", motion=("--pose", "pose.mp4"), out="clip.mp4"):
    """Runs `generate` and returns its exit code."""
    try:
        main([
            "generate", "--image", str(files / image), motion[0], str(files / motion[1]),
            "--out", str(files / out), "--quiet", *SMALL, *changes,
        ])  # fmt: skip
    except SystemExit as end:
        return end.code
    return 0


BAD = {
    "no picture": ({"image": "none.png"}, "There is no picture none.png"),
    "a picture of one pixel": ({"image": "dot.png"}, "dot.png is 1x1"),
    "a video as picture": ({"image": "pose.mp4"}, "pose.mp4"),
    "a folder as picture": ({"image": "."}, "is a folder"),
    "no motion": ({"motion": ("--pose", "none.mp4")}, "There is no video none.mp4"),
    "text as video": ({"motion": ("--pose", "text.mp4")}, "text.mp4 is not a video"),
    "an empty video": ({"motion": ("--pose", "empty.mp4")}, "empty.mp4"),
    "half a video": ({"motion": ("--pose", "cut.mp4")}, "cut.mp4"),
    "sound alone": ({"motion": ("--pose", "sound.mp4")}, "holds sound but no picture"),
    "a picture as joints": ({"motion": ("--joints", "ok.png")}, "ok.png is not an .npz file"),
    "joints of nobody": ({"motion": ("--joints", "none.npz")}, "every joint is missing"),
    "joints in metres": ({"motion": ("--joints", "metres.npz")}, "Multiply metres by 1000"),
    "a name that is too long": ({"image": "x" * 300}, "cannot be opened"),
    "a dance as long as a film": ({"motion": ("--joints", "film.npz")}, "gives 3000 frames"),
    "a result that is no MP4": ({"out": "clip.avi"}, "should end in .mp4"),
    "a result in no folder": ({"out": "no/clip.mp4"}, "There is no folder"),
    "a result over its input": ({"out": "pose.mp4"}, "is an input"),
}
BAD_OPTIONS = {
    "--steps=0": "The steps is 0; it must be 1 to 100.",
    "--cfg=nan": "The cfg is nan; it must be 0 to 20.",
    "--cfg=-1": "The cfg is -1.0",
    "--shift=inf": "The shift is inf",
    "--seed=-1": "The seed is -1",
    "--seed=18446744073709551616": "The seed is 18446744073709551616",
    "--fps=0": "The fps is 0.0",
    "--frames=0": "The frames is 0",
    "--width=100": "The width is 100; it must be a multiple of 32. The nearest is 96.",
    "--height=100000": "The height is 100000; it must be 64 to 1280.",
    "--sampler=heun": "There is no sampler called 'heun'. Choose one of: euler",
    "--attention=xformers": "Attention xformers was asked for",
    "--attention=flash": "There is no attention 'flash' here",
    "--checkpoint=none.safetensors": "There is no file none.safetensors",
    "--models=nowhere": "--models belongs to --checkpoint or --package",
    "--lora=a.safetensors:0.5": "--lora belongs to --checkpoint",
    "--persons=0": "The persons is 0; it must be 1 to 8.",
    "--checkpoint=" + "x" * 300: "x" * 20,
    "--stages=/dev/null": "/dev/null cannot hold stages",
    "--prompt=" + "x" * 5000: "The prompt has 5000 characters",
}


def check_refusal(code, files, capsys, sentence):
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if not line.startswith("DEMO WEIGHTS")]
    assert code == 2
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert sentence in lines[0]
    assert not list(files.glob("clip.*"))
    assert not list(files.glob("no/*"))


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_ends_in_one_sentence_and_leaves_nothing(files, capsys, case):
    changes, sentence = BAD[case]
    before = sorted(files.iterdir())
    code = run(files, **changes)
    check_refusal(code, files, capsys, sentence)
    assert sorted(files.iterdir()) == before


@pytest.mark.parametrize("option", BAD_OPTIONS)
def test_a_bad_option_ends_in_one_sentence(files, capsys, option):
    check_refusal(run(files, option), files, capsys, BAD_OPTIONS[option])


def test_a_damaged_checkpoint_is_named(files, capsys):
    code = run(files, "--checkpoint", str(files / "model.safetensors"))
    check_refusal(code, files, capsys, "model.safetensors is damaged or cut short (100 bytes)")


def test_missing_models_are_named_with_what_would_have_been_taken(files, capsys):
    demo = demo_weights(state_dir())
    checkpoint = ("--checkpoint", str(demo.checkpoint))
    code = run(files, *checkpoint, "--models", str(files / "none"))
    check_refusal(code, files, capsys, "There is no models folder")
    code = run(files, *checkpoint, "--models", str(files))
    check_refusal(code, files, capsys, "expected one of models_t5_umt5-xxl-enc-bf16.pth")


def test_a_failed_run_leaves_an_old_result_as_it_was(files, capsys):
    old = files / "old.mp4"
    old.write_bytes(b"precious")
    (files / "stages" / "latents.safetensors").mkdir(parents=True)
    assert run(files, "--stages", str(files / "stages"), out="old.mp4") == 2
    assert "is a folder, where a file shall be" in capsys.readouterr().err
    assert run(files, "--seed=-1", out="old.mp4") == 2
    assert old.read_bytes() == b"precious"


def test_a_state_folder_that_cannot_be_used_is_told_and_costs_no_clip(files, caplog, monkeypatch):
    monkeypatch.setenv("SCAIL_STATE", str(files / "ok.png"))
    assert run(files) == 0
    assert (files / "clip.mp4").exists()
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert any("ok.png" in one and "could not be kept" in one for one in told)
    with pytest.raises(OutputError, match=r"ok.png cannot hold the demo weights"):
        demo_weights(files / "ok.png")  # the random ones are written there


@pytest.mark.usefixtures("usual_signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_stopped_leaves_nothing(files, number):
    command = [
        sys.executable, "-m", "engine", "generate", "--image", files / "ok.png",
        "--pose", files / "pose.mp4", "--out", files / "clip.mp4",
        "--width", "320", "--height", "320", "--steps", "1",
    ]  # fmt: skip
    before = sorted(files.iterdir())
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as child:
        deadline = time.monotonic() + 120
        while not list(files.glob(".encoding-*")) and time.monotonic() < deadline:
            assert child.poll() is None
            time.sleep(0.02)
        child.send_signal(number)
        _, said = child.communicate(timeout=60)
    assert child.returncode == 128 + number
    assert "Traceback" not in said
    assert sorted(files.iterdir()) == before


@pytest.mark.parametrize("arguments", [
    [], ["dance"], ["generate"], ["generate", "--image", "a.png", "--out", "b.mp4"],
    ["generate", "--image", "a", "--pose", "b", "--joints", "c", "--out", "d.mp4"],
    ["generate", "--image", "a", "--pose", "b", "--out", "d.mp4", "--steps", "many"],
    ["generate", "--image", "", "--pose", "b", "--out", "d.mp4"],
    ["verify"],
])  # fmt: skip
def test_wrong_usage_exits_with_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1


def test_generate_writes_a_clip_that_says_it_is_a_demo(files, capsys):
    assert run(files) == 0
    assert "DEMO WEIGHTS" in capsys.readouterr().err
    info = probe_video(files / "clip.mp4")
    assert (info.width, info.height, info.frames, info.fps) == (96, 64, 9, 16)
    assert b"DEMO WEIGHTS, seed 0" in (files / "clip.mp4").read_bytes()


def test_a_clip_like_another_has_its_bytes_but_for_options_that_are_given(files, capsys):
    assert run(files, "--seed", "7", "--shift", "2.5", "--prompt", "a wish") == 0
    like, preview = ("--like", str(files / "clip.mp4")), str(files / "now.png")
    assert run(files, *like, "--preview", preview, out="same.mp4") == 0
    assert (files / "same.mp4").read_bytes() == (files / "clip.mp4").read_bytes()
    assert Image.open(preview).size[0] > 800  # frames side by side
    assert run(files, *like, "--seed", "8", out="other.mp4") == 0
    other = (files / "other.mp4").read_bytes()
    assert b"a wish" in other and b'"shift": 2.5' in other and b"DEMO WEIGHTS, seed 8" in other
    assert run(files, "--like", str(files / "clip.mp4"), out="clip.mp4") != 0  # it is an input
    assert "is an input" in capsys.readouterr().err


def test_settings_of_no_clip_of_ours_are_refused(files, capsys):
    assert run(files, "--like", str(files / "text.mp4")) != 0
    assert "text.mp4 is no video that can be read" in capsys.readouterr().err


def test_a_checkpoint_with_a_models_folder_makes_the_same_clip_as_the_demo(files, capsys):
    demo, names = SHIPPED.weights(state_dir()), ("clip.mp4", "given.mp4")
    assert run(files) == 0
    given = ("--checkpoint", str(demo.checkpoint), "--models", str(demo.models), "--cfg", "1")
    given += ("--shift", str(SHIPPED.recipe.shift))
    assert run(files, *given, out=names[1]) == 0
    assert "DEMO WEIGHTS" in capsys.readouterr().err  # of the first run
    clips = [(files / name).read_bytes() for name in names]
    assert [b"DEMO WEIGHTS" in data for data in clips] == [True, False]
    shown = [torch.cat([*read_video(probe_video(files / name))]) for name in names]
    assert shown[0].float().std() > 1 and torch.equal(*shown)


def test_info_is_one_json_object(capsys):
    main(["info"])
    found = json.loads(capsys.readouterr().out)
    assert "sdpa" in found["attention"]
    assert "non-commercial" in found["licences"]["NLF and SMPL (motion capture)"]


def test_verify_of_a_folder_without_golden_data_is_an_error(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(SystemExit) as end:
            main(["verify", str(folder)])
        assert end.value.code == 2
        assert capsys.readouterr().err.startswith("error: There is no")


def help_of(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


def test_help_groups_the_commands_by_purpose_and_shows_the_demo_first(capsys):
    told = help_of(capsys)
    purposes = ["make a clip:", "prepare:", "check:", "serve:", "examples:"]
    assert [line for line in told.splitlines() if line in purposes] == purposes
    for name in ("generate", "pose", "info", "verify", "hub-check"):
        assert f"\n  {name} " in told
    assert told.split("examples:\n")[1].startswith("  make demo\n")


def test_help_of_generate_groups_its_options(capsys):
    told = help_of(capsys, "generate")
    groups = ["input:", "model:", "look:", "size and time:", "output:"]
    assert [line for line in told.splitlines() if line in groups] == groups
    parts = re.split(r"^(?:[a-z ]+):$", told, flags=re.MULTILINE)
    assert "--joints" in parts[2] and "--checkpoint" in parts[3] and "--recipe" in parts[4]
    assert "--frames" in parts[5] and "--stages" in parts[6]


def test_every_setting_of_a_clip_has_an_option(capsys):
    told = help_of(capsys, "generate")
    options = {option.replace("-", "_") for option in re.findall(r"--(?:no-)?([a-z-]+)", told)}
    always = {"keep_settings"}  # a clip of `generate` tells its settings
    assert {field.name for field in dataclasses.fields(Settings)} <= options | always
