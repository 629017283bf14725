"""Memory is given out as planned; where it runs out a job goes on with less, and the next one too.

Nothing here has a GPU: models write down where they are sent, and run out when they are told to.
"""

import dataclasses
import weakref
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine.config import state_dir
from engine.demo.weights import demo_weights
from engine.denoise.segments import segments_of
from engine.denoise.windows import unwatched
from engine.errors import EngineError, TooLarge
from engine.flow import Reference, Request, Settings, Source
from engine.load import load_exact
from engine.machine.ladder import LADDER
from engine.media.video import probe_video
from engine.memory import ClipShape
from engine.pose.networks import Networks
from engine.program import ModelSettings
from engine.residency import Memory, shape_of
from engine.stage_dump import StageDump
from tests.support.clips import clip
from tests.support.planned_clips import DESKTOP, REAL
from tests.support.planned_gpu import GB, IN_TURNS, QUICK, Gpu, full, made

STAGES = ["conditioning", "denoise", "decode"]


def test_the_first_rung_moves_nothing_and_the_last_everything():
    gpu = Gpu()
    gpu.memory.prepare(*made(gpu))
    assert gpu.diary == ["graphs True"]
    gpu.free = gpu.free_for(IN_TURNS)
    gpu.memory.prepare(*made(gpu))
    assert gpu.diary[1:] == ["graphs False", "-blocks", "-vision", "-vae"]
    gpu.free = 1000 * GB
    gpu.memory.prepare(*made(gpu))
    assert gpu.diary[5:] == ["graphs True", "+blocks", "+vision", "+vae"]


@pytest.mark.parametrize("fits", [2, 1, 0])
def test_models_that_do_not_fit_back_where_they_were_are_taken_in_turns(fits):
    """Another process took memory since they left. So many of three models fit."""
    gpu = Gpu()
    gpu.free = gpu.free_for(IN_TURNS)
    gpu.memory.prepare(*made(gpu))
    gpu.free = 1000 * GB
    for model in (gpu.vae, gpu.vision, gpu.blocks)[: 3 - fits]:
        model.fits = False
    gpu.memory.prepare(*made(gpu))
    assert len(gpu.memory.notes) == (3 if fits else 4)  # contexts are given up first
    assert all("Out of memory (conditioning): tried again" in note for note in gpu.memory.notes)
    here = {name[1:]: name[0] for name in gpu.diary if name[0] in "+-"}
    assert here == {"blocks": "+" if fits else "-", "vision": "-", "vae": "-"}


def test_blocks_are_streamed_as_the_plan_says_and_fewer_stay_each_time_that_runs_out():
    gpu, fails = Gpu(DESKTOP[16]), [2]
    gpu.manifest = REAL
    gpu.memory.prepare(*made(gpu, 512, 896, 81))
    (first,) = gpu.streams
    assert (first.resident > 20, first.depth) == (True, 3)
    assert gpu.memory.foresee(gpu.shapes[-1]).streaming == first

    def work():
        if fails[0]:
            fails[0] -= 1
            raise full()
        return 17

    assert gpu.memory.attempt("denoise", work) == 17
    assert [one.depth for one in gpu.streams] == [3, 3, 2]
    assert first.resident > gpu.streams[1].resident > gpu.streams[2].resident == 0
    assert len({*gpu.memory.notes}) == 2
    for note, one in zip(gpu.memory.notes, gpu.streams[1:], strict=True):
        assert note.startswith("Out of memory (denoise): tried again, blocks are streamed to the")
        assert f"through {one.depth} buffers, {one.resident} stay" in note
    fails[0] = 1
    with pytest.raises(TooLarge, match="nothing is left to be moved"):
        gpu.memory.attempt("denoise", work)
    gpu.free = 1000 * GB
    gpu.memory.prepare(*made(gpu, 512, 896, 81))
    assert gpu.streams[-1] is None


def test_a_clip_that_fits_in_no_way_is_refused_and_nothing_is_moved():
    gpu = Gpu(free=GB // 2)
    with pytest.raises(TooLarge, match=r"96x64, 9 frames at once needs .* GB of GPU memory"):
        gpu.memory.prepare(*made(gpu))
    assert gpu.diary == []
    gpu.free = 1000 * GB
    gpu.memory.prepare(*made(gpu))
    assert gpu.diary == ["graphs True"]


def test_a_stage_gives_back_what_it_alone_needs_also_when_it_fails():
    gpu = Gpu()
    gpu.memory.prepare(*made(gpu))
    with gpu.memory.stage("conditioning"):
        pass
    with pytest.raises(KeyboardInterrupt), gpu.memory.stage("denoise"):
        raise KeyboardInterrupt
    with gpu.memory.stage("decode"):
        pass
    assert gpu.diary == ["graphs True", "forget", "release"]


class Activations:
    """A tensor of a stage, for a weak reference."""


class Watching(Gpu):
    """Whether what a stage held is still there when graphs are decided about."""

    was_held = ()

    def held(self):
        return None

    def use_graphs(self, wanted):
        self.was_held = (*self.was_held, self.held() is not None)


def test_what_a_failed_stage_held_is_gone_before_models_are_moved():
    gpu = Watching()
    gpu.memory.prepare(*made(gpu))

    def stage():
        activations = Activations()
        gpu.held = weakref.ref(activations)
        with gpu.memory.stage("denoise"):
            raise full()

    try:
        stage()
    except torch.OutOfMemoryError as error:
        assert gpu.held() is not None
        gpu.memory.step_down(error)
    assert gpu.was_held == (False, False)


def test_a_stage_is_begun_again_until_it_is_done():
    gpu, runs_out = Watching(), [True, True, False]
    gpu.memory.prepare(*made(gpu))

    def work():
        activations = Activations()
        gpu.held = weakref.ref(activations)
        if runs_out.pop(0):
            raise full()
        return 17

    assert gpu.memory.attempt("denoise", work) == 17
    assert runs_out == []
    assert gpu.was_held == (False, False, False)
    assert len(gpu.memory.notes) == 2
    assert gpu.diary.count("forget") == 3


@pytest.mark.parametrize(
    ("changes", "frames", "want"),
    [
        ({}, 9, ClipShape(64, 96, 9, clip_frames=9, evaluations=(2, 0))),
        ({"cfg": 4.0}, 9, ClipShape(64, 96, 9, 2, clip_frames=9, evaluations=(2, 0))),
        ({"pose_until": 0.5}, 97, ClipShape(64, 96, 81, 1, "last", 97, evaluations=(2, 3))),
        ({"pose_from": 0.5}, 97, ClipShape(64, 96, 81, 1, "first", 97, evaluations=(3, 2))),
        (
            {"window_frames": 13, "overlap_frames": 4},
            97,
            ClipShape(64, 96, 13, clip_frames=97, evaluations=(17, 0)),
        ),
    ],
)
def test_a_clip_is_planned_as_it_is_denoised(changes, frames, want):
    source = Source(torch.zeros(3, 64, 96), torch.zeros(frames, 32, 48, 3).byte(), 16.0, None)
    settings = Settings(dataclasses.replace(QUICK, **changes))
    assert shape_of(Request(None, None, "pose", settings), source) == want


def test_a_clip_in_segments_is_planned_by_the_longest_with_its_history_and_further_pictures():
    """Its graphs are those of one segment: each is denoised by itself."""
    source = Source(torch.zeros(3, 64, 96), torch.zeros(201, 32, 48, 3).byte(), 16.0, None)
    settings = Settings(dataclasses.replace(QUICK, window_frames=81), segments="even")
    further = (Reference(Path("1.png")), Reference(Path("2.png")))
    longest = max(one.frames for one in segments_of(settings, 201))
    for references in ((), further):
        request = Request(None, None, "video", settings, references=references)
        assert shape_of(request, source) == ClipShape(
            64, 96, longest, clip_frames=longest, evaluations=(2, 0), references=len(references),
            has_history=True,
        )  # fmt: skip
    alone = dataclasses.replace(settings, segments="windows")
    assert not shape_of(Request(None, None, "video", alone), source).has_history


# --- a job that runs out of memory


class Hungry:
    """A denoiser and a decoder around those of a pipeline that run out so often."""

    name, device, recorded = "the hungry model", torch.device("cpu"), None

    def __init__(self, encoders, blocks):
        self.home, self._encoders = blocks, encoders
        self.fails = {"conditioning": 0, "denoise": 0, "decode": 0}
        self.begun = []
        self.encoders = dataclasses.replace(encoders, text=self.text, decode=self.decode)

    def use(self, stage):
        if self.fails[stage]:
            self.fails[stage] -= 1
            raise full()

    def text(self, prompts):
        self.begun.append("conditioning")
        self.use("conditioning")
        return self._encoders.text(prompts)

    def bind(self, conditions, recipe):
        self.begun.append("denoise")

        def velocity(latents, frames, step, timestep):
            if step == 1:
                self.use("denoise")
            return latents / 2

        return velocity

    def decode(self, latents):
        self.begun.append("decode")
        for number, frames in enumerate(self._encoders.decode(latents)):
            if number == 1:
                self.use("decode")
            yield frames


@pytest.fixture(scope="module")
def loaded():
    demo = demo_weights(state_dir())
    settings = ModelSettings(torch.device("cpu"), "fp32", None, state_dir())
    networks = Networks(demo.models, settings.device, state_dir())
    return load_exact(demo.checkpoint, [], demo.models, networks, settings)


@pytest.fixture
def hungry(loaded):
    gpu = Gpu()
    model = Hungry(loaded.encoders, gpu.blocks.home)
    model.gpu = gpu
    model.pipeline = type(loaded)(model, model.encoders, loaded.capture, gpu.memory)
    return model


@pytest.fixture
def run(tmp_path):
    rng = np.random.default_rng(0)
    picture, pose = tmp_path / "ref.png", tmp_path / "pose.mp4"
    Image.fromarray(rng.integers(0, 255, (64, 96, 3), dtype=np.uint8)).save(picture)
    clip(pose, 9)
    request = Request(picture, pose, "pose", Settings(QUICK, width=96, height=64, audio=False))

    def make(pipeline, watch=unwatched):
        return pipeline.run(request, tmp_path / "clip.mp4", "test", StageDump(None), watch)

    return make


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_runs_out_is_tried_again_with_less_and_the_clip_says_so(hungry, run, stage):
    plain = run(hungry.pipeline)
    assert plain.notes == ()
    pixels = plain.path.read_bytes()
    hungry.fails[stage] = 1
    made = run(hungry.pipeline)
    assert len(made.notes) == 1
    assert made.notes[0].startswith(f"Out of memory ({stage}): tried again, ")
    assert made.path.read_bytes() == pixels
    assert made.timings_ms.keys() == {"media", "conditioning", "denoise", "decode"}
    diary = hungry.gpu.diary
    assert diary.count("forget") == (3 if stage == "denoise" else 2)
    assert hungry.gpu.kept == [(True, True), (True, True), (False, True)]


@pytest.mark.parametrize("stage", STAGES)
def test_only_the_stage_that_ran_out_is_begun_again_and_progress_stays_in_it(hungry, run, stage):
    told = []
    hungry.fails[stage] = 1
    run(hungry.pipeline, lambda *share: told.append(share))
    assert hungry.begun == sorted([*STAGES, stage], key=STAGES.index)
    stages = [name for name, _ in told]
    assert stages == sorted(stages, key=["media", *STAGES].index)
    assert told[-1] == ("decode", 1.0)
    for name in STAGES:
        shares = [share for stage, share in told if stage == name]
        assert shares[-1] == 1.0
        falls = sum(after < before for before, after in pairwise(shares))
        assert falls <= (name == stage)  # equal shares are told while something is waited for


def test_every_rung_is_tried_once_then_the_clip_is_too_large(hungry, run, tmp_path):
    hungry.fails["denoise"] = 1000
    (tmp_path / "clip.mp4").write_bytes(b"precious")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(TooLarge, match=r"denoise: CUDA out of memory\) and nothing is left") as end:
        run(hungry.pipeline)
    assert isinstance(end.value, EngineError)
    assert end.value.code == "too_large"
    assert not end.value.fatal
    tried = 1000 - hungry.fails["denoise"]
    assert tried == 1 + len(hungry.pipeline.memory.notes) <= len(LADDER)
    assert len(set(hungry.pipeline.memory.notes)) == tried - 1
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "clip.mp4").read_bytes() == b"precious"


@pytest.mark.parametrize("stage", STAGES)
def test_the_job_after_a_clip_that_was_too_large_works_and_has_all_memory(hungry, run, stage):
    hungry.fails[stage] = 1000
    with pytest.raises(TooLarge):
        run(hungry.pipeline)
    hungry.fails[stage] = 0
    hungry.gpu.diary.clear()
    made = run(hungry.pipeline)
    assert (made.notes, probe_video(made.path).frames) == ((), 9)
    assert hungry.gpu.diary[0] == "graphs True"
    assert not [move for move in hungry.gpu.diary if move.startswith("-")]
    assert hungry.gpu.shapes == [ClipShape(64, 96, 9, clip_frames=9, evaluations=(2, 0))] * 2


def test_a_job_goes_down_rung_by_rung_over_its_stages(hungry, run):
    hungry.fails = {"conditioning": 3, "denoise": 0, "decode": 1}
    made = run(hungry.pipeline)
    assert [note.partition(":")[0] for note in made.notes] == [
        *["Out of memory (conditioning)"] * 3,
        "Out of memory (decode)",
    ]
    assert hungry.gpu.kept == [(True, True), (False, True), *[(False, False)] * 3]
    assert made.notes[-1].endswith(f"{IN_TURNS.does}.")


def test_without_a_plan_running_out_is_told_at_once_and_the_next_job_works(hungry, loaded, run):
    memory = Memory.unplanned()
    pipeline = type(loaded)(hungry, hungry.encoders, loaded.capture, memory)
    hungry.fails["denoise"] = 1
    with pytest.raises(TooLarge, match="Ask for a smaller or shorter clip"):
        run(pipeline)
    assert run(pipeline).notes == ()


def test_other_failures_are_no_reason_to_try_again(hungry, run):
    class Stop(Exception):
        pass

    def decode(latents):
        raise Stop
        yield

    hungry.pipeline.encoders = dataclasses.replace(hungry.encoders, decode=decode)
    with pytest.raises(Stop):
        run(hungry.pipeline)
    assert hungry.gpu.diary == ["graphs True", "forget", "release"]
    assert hungry.pipeline.memory.notes == []
