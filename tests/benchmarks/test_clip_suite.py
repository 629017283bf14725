"""Suite `clip`: its stages add up to wall clocks, and what it cannot know it says."""

import json
import time
from dataclasses import asdict, replace
from mmap import mmap
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.clip import suite as clip_suite
from benchmarks.clip.rows import ClipRow, clip_figures, clip_pictures, clip_table
from benchmarks.clip.scene import dance_joints, fetch, served, write_media
from benchmarks.clip.stages import (
    FORWARDS,
    RENDER,
    STAGES,
    VAE_ENCODE,
    KnownDance,
    Spans,
    TimedResident,
    stages,
)
from benchmarks.nano.dancer import PICTURE
from benchmarks.timing import Row, WrongResult
from engine.config import state_dir
from engine.demo.weights import demo_weights
from engine.errors import BadMedia, BadRequest
from engine.flow import Clip
from engine.machine.resident import Resident
from engine.media.mp4 import encode_mp4
from engine.media.video import probe_video
from engine.pose.extract import Dance
from kernels.arch import SM89
from tests.support.built import tiny_package

LAPS = {"media": 100.0, "conditioning": 50.0, "denoise": 1000.0, "decode": 200.0}


def row(**changes):
    """Ten stages of 100 ms, and forwards of 600."""
    held = tuple(Row(name, 600.0 if name == FORWARDS else 100.0, 90.0, 110.0) for name in STAGES)
    made = ClipRow(
        "production", "tiny", 96, 64, 9, "CPU, 1 thread", 3, 1.6, 1.5, 1.9, held,
        (100.0,) * 6, 512.0, "RSS",
    )  # fmt: skip
    return replace(made, **changes)


@pytest.fixture(scope="module")
def measured():
    models = demo_weights(state_dir()).models
    return clip_suite.measure_clip(
        tiny_package(SM89), models, sizes=[(64, 64)], frames=5, recipes=["production"], runs=2
    )


# The whole


def test_the_stages_of_a_clip_add_up_to_its_wall_clock(measured):
    checked, [found] = measured
    assert "wall clocks" in checked
    total = sum(one.ms for one in found.stages)
    noise = clip_suite.NOISE_MS + 1000 * (found.worst_s - found.best_s)
    assert abs(total - 1000 * found.s) <= noise + clip_suite.NOISE_SHARE * total
    assert [one.name for one in found.stages] == [*STAGES]
    assert all(one.best_ms <= one.ms <= one.worst_ms for one in found.stages)
    assert found.best_s <= found.s <= found.worst_s


def test_a_row_says_what_was_made_and_is_json(measured):
    _, [found] = measured
    assert (found.name, found.frames) == ("production tiny 64x64x5", 5)
    assert len(found.forward_ms) == 6
    assert all(ms > 0 for ms in found.forward_ms)
    assert 50 < found.peak_mib < 50_000
    assert json.loads(json.dumps(asdict(found)))["stages"][0]["name"] == "fetch"


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"sizes": [(100, 64)]}, "multiple of 32. The nearest is 96"),
        ({"recipes": ["dance"]}, "no recipe 'dance'. Choose of: production, official"),
        ({"frames": 8}, "8 frames fill no whole latents; ask for 5 or 9"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is_made(asked, sentence):
    with pytest.raises(BadRequest, match=sentence):
        clip_suite.measure_clip(Path("no package"), **asked)


def test_a_clip_without_frames_is_refused():
    with pytest.raises(BadMedia, match="0 frames"):
        clip_suite.measure_clip(Path("no package"), frames=0)


# Checks


def test_two_clocks_that_disagree_give_no_time():
    clip_suite.check_sum({"fetch": 100.0, "decode": 880.0}, 1000.0)
    with pytest.raises(WrongResult, match="add up to 700 ms, the wall clock says 1000"):
        clip_suite.check_sum({"fetch": 100.0, "decode": 600.0}, 1000.0)


def test_a_stage_that_is_less_than_nothing_gives_no_time():
    with pytest.raises(WrongResult, match="sampler: -200 ms are left for it"):
        clip_suite.check_sum({"forwards": 1200.0, "sampler": -200.0}, 1000.0)


def test_an_mp4_of_other_frames_or_size_or_one_begun_twice_gives_no_time(tmp_path):
    path = tmp_path / "clip.mp4"
    encode_mp4([torch.zeros(5, 64, 96, 3, dtype=torch.uint8)], 16.0, path)
    clip = Clip(path, 96, 64, 5, 16.0, 1, LAPS)
    clip_suite.check_clip(clip, (64, 96), 5)
    for size, count in (((64, 96), 9), ((96, 64), 5)):
        with pytest.raises(WrongResult, match=r"holds \(5, 64, 96\)"):
            clip_suite.check_clip(clip, size, count)
    with pytest.raises(WrongResult, match=r"begun twice.*Out of memory"):
        clip_suite.check_clip(replace(clip, notes=("Out of memory",)), (64, 96), 5)


def test_peak_memory_is_that_since_the_last_reset():
    clip_suite.reset_peak(on_gpu=False)
    before = clip_suite.peak_mib(on_gpu=False)
    with mmap(-1, 64 * 2**20) as held:
        held.write(bytes(range(1, 256)) * (len(held) // 255))
        assert 60 < clip_suite.peak_mib(on_gpu=False) - before < 200
    clip_suite.reset_peak(on_gpu=False)
    assert clip_suite.peak_mib(on_gpu=False) < before + 60


# Clocks


def test_stages_are_what_spans_leave_of_the_engines_laps():
    spans = Spans()
    for name in (RENDER, RENDER, VAE_ENCODE, FORWARDS, VAE_ENCODE):
        with spans(name):
            time.sleep(0.002)
    found = stages(spans, LAPS)
    assert set(found) == set(STAGES)
    assert found[RENDER] == sum(spans.of(RENDER)) > 4
    assert found[VAE_ENCODE] == spans.of(VAE_ENCODE)[0]  # the second time it decodes
    assert sum(found.values()) == pytest.approx(sum(LAPS.values()))
    assert found["sampler"] == pytest.approx(LAPS["denoise"] - spans.of(FORWARDS)[0])


def test_a_span_ends_when_the_device_is_done():
    waits = []
    spans = Spans(lambda: waits.append(time.sleep(0.005)))
    with spans("forwards"):
        pass
    assert spans.of("forwards")[0] >= 5 and len(waits) == 1


def test_only_the_making_of_items_is_timed():
    spans, start = Spans(), time.perf_counter()
    for _ in spans.each("render", iter([1, 2, 3])):
        time.sleep(0.02)
    whole_ms = 1000 * (time.perf_counter() - start)
    assert len(spans.of("render")) == 4  # the end is looked for too
    assert sum(spans.of("render")) < whole_ms - 60


def test_a_timed_home_still_lets_its_model_come_and_go():
    events, spans = [], Spans()
    home = Resident(lambda: events.append("arrives"), lambda: events.append("leaves"))
    home.settle(stays=False)
    with TimedResident(home, "image encoder", spans).present():
        events.append("works")
    assert events == ["leaves", "arrives", "works", "leaves"]
    assert len(spans.of("image encoder")) == 1


def test_a_known_dance_is_drawn_as_long_as_its_video():
    spans = Spans()
    extractor = KnownDance(spans)
    motion = extractor.motion(Dance("a video", (64, 64), 3, 16.0), lambda: np.zeros((3, 64, 64, 3)))
    assert np.array_equal(motion.joints, dance_joints(3))
    assert all(frame.any() for frame in extractor.skeleton(motion, None, 64, 64))
    assert len(spans.of(RENDER)) == 4  # the end is looked for too


def test_files_arrive_as_a_job_gets_them(tmp_path):
    write_media(tmp_path / "media", 3)
    (tmp_path / "job").mkdir()
    with served(tmp_path / "media") as network:
        image, video = fetch(tmp_path / "job", network)
    assert image.read_bytes() == PICTURE.read_bytes()
    assert video.read_bytes() == (tmp_path / "media" / "dance.mp4").read_bytes()
    info = probe_video(video)
    assert (info.frames, info.height, info.width, info.fps) == (3, 1280, 720, 16.0)


def test_a_file_that_is_not_served_is_an_error_with_its_host(tmp_path):
    (tmp_path / "job").mkdir()
    with served(tmp_path) as network, pytest.raises(BadMedia, match=r"media\.example\.org"):
        fetch(tmp_path / "job", network)


# What is shown


def test_the_table_fits_100_columns_and_has_every_stage_of_every_clip():
    large = row(height=512, width=896, frames=81)
    rows = [row(), large, replace(large, recipe="official"), row(recipe="official")]
    text = clip_table(rows)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    forwards = [line.split() for line in lines if line.startswith("forwards")]
    assert forwards == [["forwards"] + 3 * ["600", "+-10"], ["forwards", "600", "+-10"]]
    seconds = next(line for line in lines if line.startswith("s a clip"))
    assert seconds.split()[3:5] == ["1.60", "+-0.20"]
    assert text.count("Motion capture is not measured") == 1


def test_figures_are_named_by_recipe_weights_and_size():
    found = {figure.name: figure for figure in clip_figures([row()])}
    clip = found["production tiny 96x64x9: clip"]
    assert (clip.value, clip.unit, clip.better, clip.source) == (1.6, "s", "lower", "measured")
    assert clip.noise == pytest.approx(0.2)
    assert found["production tiny 96x64x9: forwards"].value == 600.0
    assert found["production tiny 96x64x9: peak RSS"].value == 512.0
    assert len(found) == len(row().stages) + 2
    assert clip_figures([row(runs=1)]) == []


def test_the_picture_has_every_clip_and_group_of_stages(tmp_path):
    rows = [row(), row(recipe="official", s=12.0, forward_ms=(200.0,) * 8)]
    png, svg = clip_pictures(rows, tmp_path, "clip")
    assert png.read_bytes().startswith(b"\x89PNG")
    texts = ("1.60 s", "12.00 s", "video encode", "encoders")
    assert all(f"<!-- {text} -->" in svg.read_text("utf-8") for text in texts)
