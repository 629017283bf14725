"""From request to clip with the tiny weights: sizes, seeds, frame rules, sound, what is kept."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from benchmarks.nano.dance import dance
from engine.config import state_dir
from engine.demo.weights import demo_weights
from engine.errors import BadCheckpoint, EngineError, NotFinite
from engine.flow import Recipe, Request, Settings
from engine.load import load_exact
from engine.media.ffmpeg import list_streams
from engine.media.picture import load_image
from engine.media.video import probe_video, read_video
from engine.pose.joints import JointClip, save_joints
from engine.pose.networks import Networks
from engine.program import ModelSettings
from engine.stage_dump import StageDump
from tests.support.clips import clip, run_ffmpeg, tone

QUICK = Recipe(sampler="euler", steps=2, cfg=1.0, shift=5.0)


@pytest.fixture(scope="module")
def pipeline():
    demo = demo_weights(state_dir())
    settings = ModelSettings(torch.device("cpu"), "fp32", "sdpa", state_dir())
    networks = Networks(demo.models, settings.device, state_dir())
    return load_exact(demo.checkpoint, [], demo.models, networks, settings)


@pytest.fixture
def request_of(tmp_path):
    """Makes a request for a small clip from 9 frames of a moving grey level."""

    def make(image_size=(80, 120), frames=9, **changes):
        rng = np.random.default_rng(0)
        picture, pose = tmp_path / "ref.png", tmp_path / "pose.mp4"
        Image.fromarray(rng.integers(0, 255, (*image_size, 3), dtype=np.uint8)).save(picture)
        clip(pose, frames)
        settings = Settings(QUICK, width=96, height=64)
        return changed(Request(picture, pose, "pose", settings), **changes)

    return make


def changed(request, **settings):
    return dataclasses.replace(request, settings=dataclasses.replace(request.settings, **settings))


def run(pipeline, request, folder, name="clip.mp4", keep="stages"):
    made = pipeline.run(request, folder / name, "test", StageDump(folder / keep))
    return made, load_file(folder / keep / "latents.safetensors")


def test_the_same_seed_gives_the_same_latents_and_another_seed_does_not(
    pipeline, request_of, tmp_path
):
    request = request_of(seed=2**40 + 7)
    _, first = run(pipeline, request, tmp_path)
    _, again = run(pipeline, request, tmp_path, keep="again")
    _, other = run(pipeline, changed(request, seed=7), tmp_path, keep="other")
    assert torch.equal(first["latents"], again["latents"])
    assert not torch.allclose(first["latents"], other["latents"], atol=0.1)


@pytest.mark.parametrize("sampler", ["euler", "dpm++_sde", "dpm++", "unipc"])
def test_every_sampler_makes_a_clip_and_each_its_own(pipeline, request_of, tmp_path, sampler):
    recipe = dataclasses.replace(QUICK, sampler=sampler, steps=3)
    made, kept = run(pipeline, request_of(recipe=recipe), tmp_path)
    assert probe_video(made.path).frames == 9
    assert kept["latents"].isfinite().all()
    _, euler = run(pipeline, request_of(recipe=dataclasses.replace(QUICK, steps=3)), tmp_path)
    assert (sampler == "euler") == torch.allclose(kept["latents"], euler["latents"], atol=1e-3)


@pytest.mark.parametrize(("frames", "kept"), [(1, 1), (4, 1), (5, 5), (8, 5), (9, 9), (12, 9)])
def test_a_clip_has_4k_plus_1_frames(pipeline, request_of, tmp_path, frames, kept):
    made, latents = run(pipeline, changed(request_of(frames=12), frames=frames), tmp_path)
    assert made.frames == kept == probe_video(made.path).frames
    assert latents["latents"].shape == (16, (kept - 1) // 4 + 1, 8, 12)
    assert latents["pose"].shape == (16, (kept - 1) // 4 + 1, 4, 6)


def test_frames_and_fps_of_the_request_win_over_those_of_the_motion(pipeline, request_of, tmp_path):
    request = changed(request_of(frames=20), fps=8.0)
    made, _ = run(pipeline, request, tmp_path)  # 20 frames at 16 fps are 10 at 8
    assert (made.frames, probe_video(made.path).fps) == (9, 8)
    made, _ = run(pipeline, changed(request, fps=None), tmp_path)
    assert (made.frames, probe_video(made.path).fps) == (17, 16)


@pytest.mark.parametrize("size", [(64, 96), (96, 64), (64, 64)])
def test_landscape_portrait_and_square_come_out_as_asked(pipeline, request_of, tmp_path, size):
    request = request_of(height=size[0], width=size[1])
    made, kept = run(pipeline, request, tmp_path)
    info = probe_video(made.path)
    assert (info.height, info.width) == (made.height, made.width) == size
    assert kept["reference"].shape == (16, 1, size[0] // 8, size[1] // 8)


def test_sound_of_the_motion_is_kept_or_left_out_as_asked(pipeline, request_of, tmp_path):
    request = request_of()
    sound = tone(tmp_path / "sound.m4a", 3)
    clip(tmp_path / "loud.mp4", 9, audio=sound)
    loud = dataclasses.replace(request, motion=tmp_path / "loud.mp4")
    found = {}
    for name, job in (
        ("silent", request),
        ("loud", loud),
        ("muted", changed(loud, audio=False)),
    ):
        made, _ = run(pipeline, job, tmp_path, f"{name}.mp4")
        streams, _ = list_streams(["-i", str(made.path), "-map", "0", "-c", "copy"], 30)
        found[name] = {stream.media for stream in streams}
        assert probe_video(made.path).frames == 9
    assert found == {"silent": {"video"}, "loud": {"video", "audio"}, "muted": {"video"}}
    run_ffmpeg("-i", loud.motion, "-c:v", "copy", "-c:a", "dca", "-strict", "-2",
               tmp_path / "rare.mkv")  # fmt: skip
    made, _ = run(pipeline, dataclasses.replace(loud, motion=tmp_path / "rare.mkv"), tmp_path)
    assert [note.split(": ")[0] for note in made.notes] == ["The sound of rare.mkv cannot be read"]
    assert not probe_video(made.path).has_audio


def test_a_long_clip_runs_in_windows_that_make_another_clip_of_the_same_length(
    pipeline, request_of, tmp_path
):
    whole = dataclasses.replace(QUICK, steps=1)
    cut = dataclasses.replace(whole, window_frames=13, overlap_frames=4)
    _, one = run(pipeline, request_of(frames=25, recipe=whole), tmp_path)
    _, many = run(pipeline, request_of(frames=25, recipe=cut), tmp_path, keep="cut")
    assert one["latents"].shape == many["latents"].shape
    assert not torch.equal(one["latents"], many["latents"])
    assert many["latents"].isfinite().all()


def test_guidance_looks_at_the_negative_prompt_and_only_then(pipeline, request_of, tmp_path):
    request = request_of(prompt="a dancer", negative_prompt="blur")
    _, alone = run(pipeline, request, tmp_path)
    assert "negative" not in alone
    guided = changed(request, recipe=dataclasses.replace(QUICK, cfg=4.0))
    _, one = run(pipeline, guided, tmp_path, keep="one")
    _, two = run(pipeline, changed(guided, negative_prompt="sharp"), tmp_path)
    assert not torch.equal(one["latents"], alone["latents"])
    assert not torch.equal(one["latents"], two["latents"])


def test_the_second_half_of_the_production_recipe_does_not_see_the_skeleton(
    pipeline, request_of, tmp_path
):
    seen = []
    hook = pipeline.denoiser.model.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[4] is not None)
    )
    recipe = dataclasses.replace(QUICK, steps=6, pose_until=0.5)
    run(pipeline, request_of(recipe=recipe), tmp_path)
    hook.remove()
    assert seen == [True] * 3 + [False] * 3


def test_joints_are_drawn_in_full_or_at_half_size(pipeline, request_of, tmp_path):
    path = tmp_path / "dance.npz"
    save_joints(path, JointClip(dance(9, 16.0, seed=1), 16.0, (896, 512)))
    request = dataclasses.replace(request_of(), kind="joints", motion=path)
    made, full = run(pipeline, request, tmp_path)
    assert (made.frames, made.fps) == (9, 16)
    skeleton = next(read_video(probe_video(tmp_path / "stages" / "skeleton.mp4")))
    assert skeleton.shape[1:3] == (64, 96)
    assert skeleton.float().amax(dim=(1, 2)).min() > 60  # somebody is in every frame
    half = changed(request, recipe=dataclasses.replace(QUICK, half_render=True))
    _, drawn_half = run(pipeline, half, tmp_path)
    assert full["pose"].shape == drawn_half["pose"].shape
    assert not torch.equal(full["pose"], drawn_half["pose"])
    made, _ = run(pipeline, changed(request, fps=32.0), tmp_path)
    assert (made.frames, made.fps) == (17, 32)


def test_stages_keep_what_calibration_needs(pipeline, request_of, tmp_path):
    run(pipeline, request_of(), tmp_path)
    kept = load_file(tmp_path / "stages" / "activations.safetensors")
    linear = pipeline.denoiser.model.blocks[1].ffn[2]
    assert kept["blocks.1.ffn.2.absmax"].shape == (linear.in_features,)
    mean_square = kept["blocks.1.ffn.2.mean_square"]
    assert (mean_square > 0).all()
    assert (mean_square <= kept["blocks.1.ffn.2.absmax"] ** 2 * 1.0001).all()
    assert json.loads((tmp_path / "stages" / "timings_ms.json").read_text("utf-8")).keys() == {
        "media", "conditioning", "denoise", "decode",
    }  # fmt: skip


def stopping(decode):
    """A decoder that breaks after its first piece."""

    def decode_one(latents):
        yield next(iter(decode(latents)))
        raise EngineError("stop")

    return decode_one


def test_a_failure_in_the_middle_leaves_the_old_result(pipeline, request_of, tmp_path):
    request = request_of()
    (tmp_path / "clip.mp4").write_bytes(b"precious")
    before = sorted(tmp_path.iterdir())
    encoders = pipeline.encoders
    encoders = dataclasses.replace(encoders, decode=stopping(encoders.decode))
    failing = type(pipeline)(pipeline.denoiser, encoders, pipeline.capture, pipeline.memory)
    with pytest.raises(EngineError, match="stop"):
        failing.run(request, tmp_path / "clip.mp4", "test", StageDump(None))
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "clip.mp4").read_bytes() == b"precious"


def test_numbers_that_are_not_finite_make_no_clip(pipeline, request_of, tmp_path):
    bias = pipeline.denoiser.model.head.head.bias
    kept = bias.detach().clone()
    bias.data[3] = torch.inf
    with pytest.raises(NotFinite, match=r"scail_tiny_bf16\.safetensors gives numbers"):
        pipeline.run(request_of(), tmp_path / "clip.mp4", "test", StageDump(None))
    bias.data.copy_(kept)
    assert not (tmp_path / "clip.mp4").exists()


def test_encoders_of_another_model_are_refused(pipeline, request_of, tmp_path):
    encoders = pipeline.encoders
    wide = dataclasses.replace(encoders, vision=lambda image: torch.zeros(257, 1280))
    other = type(pipeline)(pipeline.denoiser, wide, pipeline.capture, pipeline.memory)
    with pytest.raises(BadCheckpoint, match=r"image encoder makes features 1280 wide.*takes 160"):
        other.run(request_of(), tmp_path / "clip.mp4", "test", StageDump(None))


def test_a_turned_picture_is_upright_in_the_latents(pipeline, request_of, tmp_path):
    request = request_of()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter
    upright = load_image(request.image)
    Image.fromarray(np.rot90(upright.numpy()).copy()).save(tmp_path / "turned.png", exif=exif)
    _, one = run(pipeline, request, tmp_path)
    turned = dataclasses.replace(request, image=tmp_path / "turned.png")
    _, two = run(pipeline, turned, tmp_path, keep="two")
    assert torch.equal(one["reference"], two["reference"])
