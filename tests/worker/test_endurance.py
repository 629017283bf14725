"""A worker that serves for long: one long clip, a clip too large for a reply, 200 jobs in a row."""

import base64
import json
import os
import statistics
from pathlib import Path

import pytest
import torch

from engine.config import TINY, state_dir
from engine.demo.weights import demo_weights
from engine.media.mp4 import encode_mp4
from engine.models.known_prompts import KEPT
from engine.worker.delivery import RUN_BYTES, clip_limit
from kernels.arch import SM89
from kernels.cross_attention import KEY_TILE
from tests.support.built import tiny_package
from tests.support.clips import clip, run_ffmpeg, tone
from tests.support.in_use import InUse, grown, in_use, telling
from tests.support.workers import picture
from tests.worker.test_process import Process
from tests.worker.test_stored_jobs import checked, output, send

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]

JOBS, SETTLED, WINDOW = 200, 20, 20
GROWTH = 1.03
PROMPTS = 8  # in turns: of each other one something is kept for the next jobs, as a test measures
TEN = 10  # jobs between counts; one more, that fails, is among them
LEAK = InUse(1024, 5)  # of a job: a frame has 12 KiB, and a request some dozens of objects
# keys, values and a centre in BF16 and a bias of each layer, and less than 4 KiB of objects
KEYS_OF_A_PROMPT = TINY.layers * (KEY_TILE * (2 * 2 * TINY.dim + 4) + 2 * TINY.dim)
AROUND_THEM = 4096


@pytest.fixture
def worker(tmp_path):
    started = Process(
        tmp_path,
        SCAIL_PACKAGE=str(tiny_package(SM89)),
        SCAIL_MODELS=str(demo_weights(state_dir()).models),
        SCAIL_STATE=str(state_dir()),
        SCAIL_ALLOW_CPU="1",
        **telling(tmp_path),
    )
    yield started.wait_until_ready()
    started.kill()


def held(worker):
    """Resident bytes, threads, open files and children of the worker's process."""
    process = worker.process.pid
    home = Path(f"/proc/{process}")
    resident = int((home / "statm").read_text("utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    children = (home / "task" / str(process) / "children").read_text("utf-8").split()
    return resident, len([*(home / "task").iterdir()]), len([*(home / "fd").iterdir()]), children


def files(worker):
    """All that lies in the worker's folder of temporary files."""
    root = worker.folder / "tmp"
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


def danced(folder):
    """The smallest job."""
    motion = clip(folder / "motion.mp4", 5)
    return {
        "image_base64": picture(),
        "pose_video_base64": base64.b64encode(motion.read_bytes()).decode(),
        "width": 64, "height": 64, "fps": 16, "steps": 1,
    }  # fmt: skip


def test_two_hundred_jobs_in_a_row_leave_nothing_behind(worker, tmp_path):
    given = danced(tmp_path)
    before, seen, counts = files(worker), [], []
    for number in range(JOBS):
        told = {"seed": number, "prompt": f"dance number {number % PROMPTS}"}
        reply = output(worker, given | told)
        assert (reply["seed"], reply["num_frames"]) == (number, 5)
        if number % TEN == TEN - 1:  # those that fail must leave nothing either
            assert send(worker, given | {"image_base64": "AAAA"})["status"] == "FAILED"
            counts.append(in_use(worker.process.pid, tmp_path))
        seen.append(held(worker))
    early = seen[SETTLED : SETTLED + WINDOW]
    late = seen[-WINDOW:]
    resident = [[one[0] for one in part] for part in (early, late)]
    print("MiB by twenties:", [
        round(statistics.median(one[0] for one in seen[at : at + WINDOW]) / 2**20, 1)
        for at in range(0, JOBS, WINDOW)
    ])  # fmt: skip
    print("in use by tens:", *map(tuple, counts))
    print("threads, files, children:", early[0][1:], late[-1][1:])
    growth = grown(counts[JOBS // TEN // 2 :])
    assert growth.heap_bytes < TEN * LEAK.heap_bytes
    assert growth.blocks < TEN * LEAK.blocks
    assert statistics.median(resident[1]) <= GROWTH * statistics.median(resident[0])
    for what in (1, 2):  # at its least, as a connection that is being closed counts for a moment
        assert min(one[what] for one in late) <= min(one[what] for one in early)
    assert [one[3] for one in late] == [[]] * WINDOW
    assert files(worker) == before
    assert output(worker, {"action": "health"})["jobs"] == {"done": JOBS, "failed": JOBS // TEN}


def test_of_each_further_prompt_its_keys_are_kept_and_nothing_else(worker, tmp_path):
    """As far as `KEPT_TEXT_BYTES` goes, which no test of prompts this small reaches."""
    given, counts = danced(tmp_path), []
    for number in range(KEPT + 6 * TEN):  # of embeddings no more are kept
        output(worker, given | {"prompt": f"dance number {number}"})
        if number % TEN == 0:
            counts.append(in_use(worker.process.pid, tmp_path))
    print("in use by tens:", *map(tuple, counts))
    growth = grown([count for at, count in enumerate(counts) if at * TEN > KEPT])
    assert 0 <= growth.heap_bytes / TEN - KEYS_OF_A_PROMPT <= AROUND_THEM


def test_a_production_job_of_326_frames_has_every_frame_at_its_rate(worker, tmp_path):
    motion = tmp_path / "motion.mp4"
    frames = torch.zeros(326, 160, 96, 3, dtype=torch.uint8)
    for number in range(326):
        frames[number, 20:140, number % 60 : number % 60 + 30] = 200
    encode_mp4([frames], 24, motion)
    given = {
        "image_base64": picture(),
        "pose_video_base64": base64.b64encode(motion.read_bytes()).decode(),
        "width": 96, "height": 160,
    }  # fmt: skip
    told = output(worker, given | {"action": "validate"})
    assert (told["num_frames"], told["settings"]["steps"]) == (325, 6)
    assert told["forwards"] > 6  # in windows
    reply = output(worker, given)
    print(reply["timings_ms"], len(reply["video"]))
    assert checked(reply, tmp_path / "clip.mp4") == ((96, 160), 325, 24, False)
    assert reply["duration_s"] == 13.542
    assert worker.left() == []


def test_a_clip_too_large_for_a_reply_comes_smaller_with_every_frame_and_its_sound(
    worker, tmp_path
):
    silent, motion = tmp_path / "silent.mp4", tmp_path / "motion.mp4"
    frames = torch.zeros(49, 448, 256, 3, dtype=torch.uint8)
    frames[:, 50:400, 60:200] = 200
    encode_mp4([frames], 24, silent)
    sound = tone(tmp_path / "tone.wav", 49 / 24)
    run_ffmpeg("-i", silent, "-i", sound, "-c:v", "copy", motion)
    given = {
        "image_base64": picture(),
        "pose_video_base64": base64.b64encode(motion.read_bytes()).decode(),
        "width": 512, "height": 896, "steps": 1,
        "context_frames": 21, "context_overlap": 4,  # on a CPU much faster than all at once
    }  # fmt: skip
    reply = output(worker, given)
    (said,) = [one for one in reply["warnings"] if "encoded again with less quality" in one]
    assert "more than the 7.3 MB a reply can carry" in said
    assert 4 / 5 * clip_limit("test-1") < len(reply["video"]) / 4 * 3 <= clip_limit("test-1")
    assert len(json.dumps(reply)) < RUN_BYTES
    assert checked(reply, tmp_path / "clip.mp4") == ((512, 896), 49, 24, True)
    assert worker.left() == []
