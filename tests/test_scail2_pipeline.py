"""From request to clip with random SCAIL-2 weights: modes, masks, pictures, segments, sound."""

import dataclasses
import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from engine.clock import Clock
from engine.conditioning import condition_motion, condition_pictures
from engine.config import TINY_SCAIL2, state_dir
from engine.demo.weights import demo_weights
from engine.denoise.segments import segments_of
from engine.drift.steady import Steady
from engine.errors import BadMedia, BadRequest, BlankFrames
from engine.flow import Recipe, Reference, Request, Settings
from engine.load import load_exact
from engine.media.framing import frames_to_network
from engine.media.video import probe_video
from engine.models.dit import Scail
from engine.pose.joints import JointClip, save_joints
from engine.pose.networks import Networks
from engine.program import ModelSettings
from engine.source import check_source, load_source
from engine.stage_dump import StageDump
from tests.support.clips import clip, tone
from tests.support.dancers import body
from tests.support.drift_scenes import darker

QUICK = Recipe("euler_simple", steps=2, cfg=1.0, shift=5.0, window_frames=17, overlap_frames=8)
SIZE = (64, 96)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    demo = demo_weights(state_dir())
    path = tmp_path_factory.mktemp("scail2") / "scail2.safetensors"
    torch.manual_seed(1)
    model = Scail(TINY_SCAIL2)
    for name, parameter in model.named_parameters():
        if name.endswith("modulation"):
            torch.nn.init.normal_(parameter, std=TINY_SCAIL2.dim**-0.5)
    save_file(model.state_dict(), path)
    settings = ModelSettings(torch.device("cpu"), "fp32", "sdpa", state_dir())
    networks = Networks(demo.models, settings.device, state_dir())
    return load_exact(path, [], demo.models, networks, settings)


@pytest.fixture
def request_of(tmp_path):
    """Makes a request for `frames` frames in which a square of blue is the dancer."""

    def make(frames=9, mode="animation", masks=True, audio=None, fps=16, **changes):
        rng = np.random.default_rng(0)
        picture, dance = tmp_path / "ref.png", tmp_path / "dance.mp4"
        Image.fromarray(rng.integers(0, 255, (*SIZE, 3), dtype=np.uint8)).save(picture)
        clip(dance, frames, fps, audio)
        info = probe_video(dance)
        labels = np.zeros((frames, info.height, info.width), np.uint8)
        for n in range(frames):
            labels[n, 16:48, 8 + n % 24 : 32 + n % 24] = 1
        np.savez_compressed(tmp_path / "mask.npz", masks=labels)
        seen = np.zeros((*SIZE, 3), np.uint8)
        seen[16:48, 24:56, 2] = 255
        Image.fromarray(seen).save(tmp_path / "ref_mask.png")
        given = {"mask": tmp_path / "mask.npz", "reference_mask": tmp_path / "ref_mask.png"}
        settings = Settings(QUICK, width=96, height=64, mode=mode, segments="even")
        request = Request(picture, dance, "video", settings, **(given if masks else {}))
        return changed(request, **changes)

    return make


@pytest.fixture
def worse(pipeline, monkeypatch):
    """Makes the pipeline decode worse: `spoil` changes frames of the segment of a number."""

    def make(spoil):
        decode, decoded = pipeline.encoders.decode, []

        def spoiled(latents):
            decoded.append(latents)
            for frames in decode(latents):
                yield spoil(frames, len(decoded) - 1)

        encoders = dataclasses.replace(pipeline.encoders, decode=spoiled)
        monkeypatch.setattr(pipeline, "encoders", encoders)
        return pipeline

    return make


@pytest.fixture
def darkening(worse):
    """The pipeline with a decoder that makes the second segment darker, and the third more."""
    return worse(lambda frames, number: darker(frames, 20 * number))


def changed(request, **settings):
    return dataclasses.replace(request, settings=dataclasses.replace(request.settings, **settings))


def run(pipeline, request, folder, keep="stages"):
    made = pipeline.run(request, folder / f"{keep}.mp4", "test", StageDump(folder / keep))
    return made, load_file(folder / keep / "latents.safetensors")


def differ(a, b):
    return (a["latents"] - b["latents"]).abs().max() > 1e-4  # random weights hardly listen


def test_every_frame_of_the_driving_video_comes_out_with_its_sound(pipeline, request_of, tmp_path):
    sound = tone(tmp_path / "sound.m4a", 5)
    for frames in (1, 8, 17, 18, 40):
        made, _ = run(pipeline, request_of(frames, audio=sound), tmp_path, f"of-{frames}")
        info = probe_video(made.path)
        assert (made.frames, info.frames, info.fps) == (frames, frames, 16)
        assert info.has_audio


def test_a_segment_begins_with_the_finished_frames_of_the_one_before(
    pipeline, request_of, tmp_path
):
    request = request_of(40)
    segments = segments_of(request.settings, 40)
    assert len(segments) == 3
    source, dump = load_source(request, pipeline.capture), StageDump(tmp_path / "kept")
    steady = Steady("first", source, len(segments))
    given = request, source, segments, steady, Clock(), dump, lambda *_: None
    chunks = list(pipeline._frames(*given))
    clip_frames = torch.cat(chunks)
    assert len(clip_frames) == 40
    for number, segment in enumerate(segments[1:], start=2):
        kept = load_file(tmp_path / "kept" / f"latents-{number}.safetensors")
        tail = frames_to_network(clip_frames[segment.history])
        assert torch.equal(kept["history"], pipeline.encoders.vae.encode([tail]))
        assert torch.equal(kept["latents"][:, :2], kept["history"])
        assert kept["pose"].shape[1] == (segment.frames - 1) // 4 + 1
    assert not (tmp_path / "kept" / "latents-4.safetensors").exists()


def test_what_drifts_is_brought_back_before_it_is_history_and_both_figures_are_kept(
    pipeline, request_of, tmp_path, darkening
):
    """The test above with a decoder that darkens: what is handed on is what history is made of."""
    request = request_of(40)
    segments = segments_of(request.settings, 40)
    source, dump = load_source(request, pipeline.capture), StageDump(tmp_path / "kept")
    steady = Steady("first", source, len(segments))
    given = request, source, segments, steady, Clock(), dump, lambda *_: None
    clip_frames = torch.cat(list(darkening._frames(*given)))
    changed_regions = [one for one in steady.report[1].regions if one.outcome == "corrected"]
    assert changed_regions
    assert all(one.delta_e_after < 1.5 <= one.delta_e for one in changed_regions)
    kept = load_file(tmp_path / "kept" / "latents-3.safetensors")
    tail = frames_to_network(clip_frames[segments[2].history])
    assert torch.equal(kept["history"], pipeline.encoders.vae.encode([tail]))


def test_the_report_of_a_long_clip_is_in_the_clip_and_among_the_stages(
    darkening, request_of, tmp_path
):
    made, _ = run(darkening, request_of(40, drift="none"), tmp_path)
    stored = json.loads((tmp_path / "stages" / "drift.json").read_text())
    assert stored == json.loads(json.dumps([dataclasses.asdict(one) for one in made.drift]))
    assert [tuple(one["frames"]) for one in stored] == [(0, 17), (17, 29), (29, 40)]
    assert [one["region"] for one in stored[1]["regions"]] == ["background", "person 1"]
    assert any("drift is none" in note for note in made.notes)
    made, _ = run(darkening, request_of(9), tmp_path)
    assert made.drift == ()
    assert not (tmp_path / "stages" / "drift.json").exists()


def test_a_long_clip_without_a_driving_mask_says_that_its_colours_are_not_compared(
    pipeline, request_of, tmp_path
):
    made, _ = run(pipeline, request_of(18, masks=False), tmp_path)
    assert made.drift == ()
    assert any("neither compared nor corrected" in note for note in made.notes)


def test_a_black_frame_of_a_later_segment_ends_the_clip_and_is_not_made_lighter(
    pipeline, request_of, tmp_path, worse
):
    black = worse(lambda frames, number: frames * (number == 0))
    with pytest.raises(BlankFrames, match="Frame 18 of the clip came out black"):
        run(black, request_of(40), tmp_path)


def test_each_segment_has_the_seed_after_that_of_the_one_before(pipeline, request_of):
    request = request_of(9, seed=2**64 - 1)
    source = load_source(request, pipeline.capture)
    told = condition_motion(
        pipeline.encoders, condition_pictures(pipeline.encoders, request, source), source,
        source.skeleton, source.roles.driving,
    )  # fmt: skip
    third = pipeline.denoise(request, told, number=2)
    assert torch.equal(third, pipeline.denoise(changed(request, seed=1), told))
    assert differ({"latents": third}, {"latents": pipeline.denoise(request, told)})


def test_stages_of_a_short_clip_hold_nothing_of_a_longer_one_before(pipeline, request_of, tmp_path):
    run(pipeline, request_of(18), tmp_path)
    assert (tmp_path / "stages" / "latents-2.safetensors").exists()
    run(pipeline, request_of(9), tmp_path)
    assert [path.name for path in (tmp_path / "stages").glob("latents*")] == ["latents.safetensors"]


def test_a_clip_of_segments_sees_the_whole_dance_in_windows_too(pipeline, request_of, tmp_path):
    made, kept = run(pipeline, request_of(40, segments="windows"), tmp_path)
    assert made.frames == 40
    assert kept["latents"].shape[1] == 11
    assert "history" not in kept


def test_modes_masks_and_further_pictures_each_change_the_clip(pipeline, request_of, tmp_path):
    plain = request_of()
    _, usual = run(pipeline, plain, tmp_path, "usual")
    _, replaced = run(pipeline, request_of(mode="replacement"), tmp_path, "replaced")
    _, unmasked = run(pipeline, request_of(masks=False), tmp_path, "unmasked")
    extra = (Reference(plain.image, plain.reference_mask), Reference(plain.image))
    more = dataclasses.replace(request_of(), references=extra)
    _, further = run(pipeline, more, tmp_path, "further")
    assert further["additional"].shape[1] == further["additional_masks"].shape[1] == 2
    for other in (replaced, unmasked, further):
        assert differ(usual, other)
    _, again = run(pipeline, request_of(), tmp_path, "again")
    assert torch.equal(usual["latents"], again["latents"])


def test_a_recipe_may_cut_the_picture_out_in_replacement_alone(pipeline, request_of, tmp_path):
    cutting = dataclasses.replace(QUICK, cuts_reference=True)
    for mode, is_cut in (("replacement", True), ("animation", False)):
        plain = request_of(mode=mode, framing="as-is")
        _, whole = run(pipeline, plain, tmp_path, f"{mode}-whole")
        _, cut = run(pipeline, changed(plain, recipe=cutting), tmp_path, f"{mode}-cut")
        assert torch.equal(whole["vision"], cut["vision"])
        assert torch.equal(whole["reference"], cut["reference"]) is not is_cut


def test_what_had_to_be_assumed_of_masks_is_told(pipeline, request_of, tmp_path):
    made, _ = run(pipeline, request_of(masks=False), tmp_path)
    assert len(made.notes) == 2
    assert all("no mask" in note for note in made.notes)
    with pytest.raises(BadRequest, match="Replacement needs a mask of the video"):
        check_source(request_of(mode="replacement", masks=False))


def test_more_than_30_frames_a_second_are_thinned_and_said(pipeline, request_of, tmp_path):
    made, _ = run(pipeline, request_of(18, fps=60), tmp_path)
    assert (made.frames, made.fps) == (9, 30)
    assert any("every second is shown" in note for note in made.notes)


@pytest.mark.parametrize(
    ("fps", "shown"),
    [("30", 30), ("3002/100", 30.02), ("30000/1001", 29.97), ("31", 15.5), ("60000/1001", 29.97),
     ("6002/100", 30.01), ("90", 30), ("120", 30)],
)  # fmt: skip
def test_a_rate_that_is_nearly_30_is_taken_for_it(request_of, fps, shown):
    source = load_source(request_of(12, fps=Fraction(fps), masks=False), capture=None)
    assert source.fps == pytest.approx(shown, abs=0.01)
    assert any("is shown" in note for note in source.notes) is (float(Fraction(fps)) > 30.5)


def test_joints_above_30_frames_a_second_are_thinned_too(request_of, tmp_path):
    joints = np.tile(body(), (60, 1, 1, 1))
    save_joints(tmp_path / "j.npz", JointClip(joints, 60.0, None))
    request = dataclasses.replace(request_of(masks=False), motion=tmp_path / "j.npz", kind="joints")
    source = load_source(request, capture=None)
    assert (len(source.skeleton), source.fps) == (30, 30)
    assert source.notes[0] == "j.npz has 60 frames a second: every second is shown."
    as_asked = load_source(changed(request, fps=60), capture=None)
    assert (len(as_asked.skeleton), as_asked.fps) == (60, 60)


@pytest.mark.parametrize(
    ("plan", "lost"), [("even", 0), ("cover", 0), ("windows", 0), ("official", 4), ("sat", 4)]
)
def test_frames_that_a_plan_leaves_out_are_told(request_of, caplog, plan, lost):
    """Segments of 17 frames: [0, 17) and [12, 29) of 33."""
    request = request_of(33, masks=False, segments=plan)
    said = [f"Segments {plan} leave out the last {lost} of 33 frames; even keeps all."]
    source = load_source(request, capture=None)
    assert [note for note in source.notes if "leave out" in note] == (said if lost else [])
    check_source(request)
    assert [m for m in caplog.messages if "leave out" in m] == (said if lost else [])


def test_a_mask_of_another_length_is_told_before_anything_is_loaded(request_of, tmp_path):
    request = request_of(9)
    np.savez_compressed(Path(request.mask), masks=np.ones((5, 64, 96), np.uint8))
    with pytest.raises(BadMedia, match="5 frames"):
        check_source(request)
