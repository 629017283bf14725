"""The handler as the platform calls it, in this process, with clips made by hand: every outcome."""

import asyncio
import base64
import dataclasses
import json
import logging
import shutil
import threading

import pytest
import torch

from engine.config import LIMITS
from engine.errors import (
    BlankFrames,
    MissingModel,
    NobodyFound,
    NotFinite,
    TooLarge,
    UnsupportedGpu,
)
from engine.flow import RegionDrift, SegmentDrift, Settings
from engine.media.video import probe_video
from engine.worker.joblog import JsonLines
from engine.worker.scratch import Scratch
from engine.worker.service import Worker
from handler import respond
from tests.support.clips import clip, run_ffmpeg, tone
from tests.support.workers import FPS, FRAMES, HandMade, endpoint, job, left_in, started


def ask(worker, given, reports=None):
    return asyncio.run(respond(worker, given, (reports if reports is not None else []).append))


@pytest.fixture
def serve(tmp_path):
    """Starts workers and closes them."""
    workers = []

    def start(*outcomes, renderer=None, **changes):
        workers.append(started(tmp_path, renderer or HandMade(*outcomes), **changes))
        return workers[-1]

    yield start
    for worker in workers:
        worker.close()


def test_a_job_is_answered_as_clients_read_it(serve, tmp_path):
    worker = serve(renderer=(made := HandMade()))
    reply = ask(worker, job(tmp_path, seed=2**40 + 1, prompt="she dances", unheard_of=1))
    video = base64.b64decode(reply.pop("video"), validate=True)
    (tmp_path / "out.mp4").write_bytes(video)
    assert probe_video(tmp_path / "out.mp4").frames == FRAMES
    timings = reply.pop("timings_ms")
    assert {"fetch", "media", "denoise", "decode", "deliver"} == {*timings}
    assert (timings["media"], timings["denoise"]) == (1.2, 20.0)
    assert reply == {
        "seed": 2**40 + 1, "width": 96, "height": 64, "fps": FPS, "num_frames": FRAMES,
        "duration_s": 0.562, "gpu": "no GPU", "engine": "hand-made",
        "warnings": ["Not known here and ignored: unheard_of.", "a note"],
    }  # fmt: skip
    assert json.loads(json.dumps(reply)) == reply
    request = made.requests[0]
    assert (request.settings.prompt, request.settings.width) == ("she dances", 96)
    assert request.kind == "pose"
    assert request.image.name == "image_base64.png"
    assert left_in(worker) == []


def test_the_reply_of_a_long_clip_says_how_far_the_colours_of_its_segments_drifted(serve, tmp_path):
    wall = RegionDrift("background", "first segment", "corrected", 3.21, 0.9, 0.1, 1.0)
    worker = serve(renderer=HandMade(drift=(SegmentDrift(2, (69, 133), (wall,)),)))
    (told,) = json.loads(json.dumps(ask(worker, job(tmp_path))))["drift"]
    assert told == {
        "segment": 2, "frames": [69, 133],
        "regions": [{
            "region": "background", "against": "first segment", "outcome": "corrected",
            "delta_e": 3.21, "chroma": 0.9, "delta_e_after": 0.1, "chroma_after": 1.0,
        }],
    }  # fmt: skip


def test_a_folder_is_the_jobs_own_and_gone_after_it(serve, tmp_path):
    modes = []
    made = HandMade(None, NobodyFound("x"), RuntimeError("x"))
    made.each = lambda done: modes.append(left_in(worker)[0].stat().st_mode & 0o777)
    worker = serve(renderer=made)
    for _ in range(3):
        ask(worker, job(tmp_path))
        assert left_in(worker) == []
    assert {*modes} == {0o700}
    assert len({*made.folders}) == 3


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NobodyFound("Nobody is in the video. Send another."), "nobody_found"),
        (TooLarge("It does not fit. Ask for less."), "too_large"),
    ],
)
def test_an_error_is_one_sentence_and_a_code_and_the_next_job_runs(serve, tmp_path, error, code):
    worker = serve(error)
    assert ask(worker, job(tmp_path)) == {"error": str(error), "code": code}
    assert "video" in ask(worker, job(tmp_path))
    assert worker.health()["jobs"] == {"done": 1, "failed": 1}


def test_a_sentence_loses_paths_queries_and_secrets(serve, tmp_path):
    error = MissingModel(
        "There is no VAE in /runpod-volume/models/vae\nnor at https://x.example/a?token=abc "
        "and the key was hunter2hunter2."
    )
    reply = ask(serve(error), job(tmp_path))
    assert reply == {
        "error": "There is no VAE in vae nor at https://x.example/... and the key was ***.",
        "code": "missing_model",
    }


def test_a_reply_has_an_end_whatever_others_said(serve, tmp_path):
    endless = "ffmpeg said " + "a.a " * 100_000 + "Send another."
    made = HandMade(NobodyFound(endless), notes=(endless,) * 200 + ("key hunter2hunter2 in /a/b",))
    worker = serve(renderer=made)
    reply = ask(worker, job(tmp_path))
    assert len(reply["error"]) == 1000
    assert reply["error"].endswith("Send another.")
    fields = {f"{'x' * 3000}{number}": 1 for number in range(1000)}
    reply = ask(worker, job(tmp_path, **fields))
    del reply["video"]
    assert len(json.dumps(reply)) < 100_000  # half of what is kept free for it
    told = reply["warnings"]
    assert (len(told), told[-1]) == (20, "183 more warnings are left out.")
    reply = ask(worker, job(tmp_path, action="validate", prompt="é" * 4096, **fields))
    assert len(json.dumps(reply)) < 100_000


def test_warnings_are_redacted_as_errors_are(serve, tmp_path):
    worker = serve(renderer=HandMade(notes=("key hunter2hunter2 in /a/b at http://h/p?q",)))
    assert ask(worker, job(tmp_path))["warnings"] == ["key *** in b at http://h/..."]


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: /secret/path"), MemoryError()])
def test_what_nobody_foresaw_is_told_without_details_and_ends_the_worker(
    serve, tmp_path, error, caplog
):
    with caplog.at_level(logging.ERROR):
        reply = ask(serve(error), job(tmp_path))
    assert reply["refresh_worker"] is True
    assert reply["code"] == "internal"
    assert "secret" not in reply["error"]
    assert "Traceback" not in reply["error"]
    assert type(error).__name__ in caplog.text  # for the operator


def test_out_of_memory_that_was_not_mended_ends_the_worker(serve, tmp_path):
    reply = ask(serve(torch.OutOfMemoryError("CUDA out of memory")), job(tmp_path))
    assert (reply["code"], reply["refresh_worker"]) == ("internal", True)


def test_a_fatal_error_of_a_job_ends_the_worker(serve, tmp_path):
    reply = ask(serve(UnsupportedGpu("The GPU fell off the bus.")), job(tmp_path))
    assert reply == {
        "error": "The GPU fell off the bus.", "code": "unsupported_gpu", "refresh_worker": True
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ({}, "bad_request"),
        ({"input": None}, "bad_request"),
        ({"input": {"image_base64": "!!", "pose_video_base64": "!!"}}, "bad_request"),
        ({"input": {"image_path": "/etc/passwd", "video_path": "/etc/passwd"}}, "bad_request"),
        (
            {"input": {"image_url": "http://127.0.0.1/", "video_url": "http://x.test"}},
            "bad_request",
        ),
    ],
)
def test_a_bad_job_is_refused_before_anything_is_rendered(serve, given, code):
    worker = serve(renderer=(made := HandMade()))
    reply = ask(worker, given)
    assert reply["code"] == code
    assert reply["error"].endswith(".")
    assert "/etc" not in reply["error"]
    assert made.requests == []
    assert left_in(worker) == []


def test_a_file_of_an_input_folder_can_be_named(serve, tmp_path):
    (tmp_path / "input").mkdir()
    given = job(tmp_path)
    for name, field in (("a.png", "image_base64"), ("b.mp4", "pose_video_base64")):
        (tmp_path / "input" / name).write_bytes(base64.b64decode(given["input"].pop(field)))
    given["input"] |= {"image_path": "a.png", "pose_video_path": str(tmp_path / "input" / "b.mp4")}
    assert "video" in ask(serve(), given)


def test_a_job_without_a_video_takes_the_default_one(serve, tmp_path, monkeypatch):
    given = job(tmp_path)
    del given["input"]["pose_video_base64"]
    reply = ask(serve(), given)
    assert reply["code"] == "bad_request"
    (tmp_path / "dance.mp4").write_bytes(b"the default")
    monkeypatch.setenv("DEFAULT_VIDEO", str(tmp_path / "dance.mp4"))
    worker = serve(renderer=(made := HandMade()))
    assert "video" in ask(worker, given)
    assert (made.requests[0].motion, made.requests[0].kind) == (tmp_path / "dance.mp4", "video")
    assert worker.health()["default_video"] is True
    assert (tmp_path / "dance.mp4").read_bytes() == b"the default"


@pytest.mark.parametrize("error", [NotFinite("NaN."), BlankFrames("Black.")])
def test_a_clip_that_came_out_wrong_is_tried_once_with_exact_attention(serve, tmp_path, error):
    worker = serve(renderer=(made := HandMade(error)))
    reply = ask(worker, job(tmp_path))
    assert made.attentions == ["int8fp8", "sdpa"]
    assert reply["warnings"] == [
        "With attention int8fp8 no clip came out; this one was made with sdpa.", "a note"
    ]  # fmt: skip
    ask(worker, job(tmp_path))
    assert made.attentions[2:] == ["int8fp8"]


def test_wrong_twice_is_an_error(serve, tmp_path):
    worker = serve(renderer=(made := HandMade(BlankFrames("a"), BlankFrames("Black again."))))
    assert ask(worker, job(tmp_path)) == {"error": "Black again.", "code": "blank_frames"}
    assert made.attentions == ["int8fp8", "sdpa"]


def test_exact_attention_that_was_asked_for_is_not_tried_twice(serve, tmp_path):
    worker = serve(renderer=(made := HandMade(BlankFrames("Black."))))
    reply = ask(worker, job(tmp_path, attention_mode="sdpa"))
    assert (reply["code"], made.attentions) == ("blank_frames", ["sdpa"])


def test_a_deadline_ends_the_job_between_forwards(serve, tmp_path):
    made = HandMade(forwards=100, each=lambda done: threading.Event().wait(0.1))
    worker = serve(renderer=made)
    reply = ask(worker, job(tmp_path, max_seconds=1))
    assert reply["code"] == "deadline"
    assert "the 1 s it may take" in reply["error"]
    assert left_in(worker) == []
    made.each = None
    assert "video" in ask(worker, job(tmp_path))


def test_a_cancelled_job_ends_at_the_next_forward_and_only_then(serve, tmp_path):
    begun, go_on, forwards = threading.Event(), threading.Event(), []

    def each(done):
        forwards.append(done)
        begun.set()
        assert go_on.wait(30)

    made = HandMade(forwards=1000, each=each)
    worker = serve(renderer=made)

    async def cancel():
        task = asyncio.create_task(respond(worker, job(tmp_path), [].append))
        await asyncio.to_thread(begun.wait)
        for _ in range(2):  # asked again, it still waits for the job
            task.cancel()
            for _ in range(10):
                await asyncio.sleep(0)
            assert not task.done()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        return left_in(worker)

    assert asyncio.run(cancel()) == []
    assert forwards == [0]
    made.each, made.forwards = None, 1
    assert "video" in ask(worker, job(tmp_path))


def test_health_is_told_while_a_job_runs_and_jobs_run_one_by_one(serve, tmp_path):
    begun, go_on, running = threading.Event(), threading.Event(), []

    def each(done):
        running.append(len(left_in(worker)))
        begun.set()
        assert go_on.wait(30)

    worker = serve(renderer=HandMade(forwards=1, each=each))

    async def both():
        tasks = [asyncio.create_task(respond(worker, job(tmp_path), print)) for _ in range(2)]
        await asyncio.to_thread(begun.wait)
        told = await respond(worker, {"input": {"action": "health"}}, print)
        go_on.set()
        return told, await asyncio.gather(*tasks)

    told, replies = asyncio.run(both())
    assert (told["status"], told["problem"]) == ("busy", None)
    assert ["video" in reply for reply in replies] == [True, True]
    assert running == [1, 1]
    assert worker.health()["status"] == "ready"


def test_validate_tells_what_a_job_would_come_to_and_renders_nothing(serve, tmp_path):
    worker = serve(renderer=(made := HandMade()))
    told = ask(worker, job(tmp_path, action="validate", steps=3, cfg=2.0, max_seconds=60))
    assert made.requests == []
    found = {key: told[key] for key in ("valid", "width", "height", "num_frames", "fps")}
    assert found == {"valid": True, "width": 96, "height": 64, "num_frames": 9, "fps": 16.0}
    assert (told["forwards"], told["memory"], told["estimate_s"]) == (6, None, None)
    settings = {field.name for field in dataclasses.fields(Settings)} - {"recipe"}
    assert settings < {*told["settings"]}
    assert told["settings"]["steps"] == 3
    assert told["settings"]["max_seconds"] == 60
    assert left_in(worker) == []
    ask(worker, job(tmp_path, steps=3, cfg=2.0))
    again = ask(worker, job(tmp_path, action="validate", steps=3, cfg=2.0))
    longer = ask(worker, job(tmp_path, action="validate", steps=60, cfg=2.0))
    assert again["estimate_s"] == 0.0  # 31 ms were told
    assert longer["estimate_s"] == pytest.approx(20 * 0.020 + 0.011, abs=0.06)


def test_validate_refuses_what_a_job_would_be_refused_for(serve, tmp_path):
    worker = serve()
    assert ask(worker, job(tmp_path, action="validate", output="url"))["code"] == "unavailable"
    bad = job(
        tmp_path, action="validate", image_base64=base64.b64encode(b"GIF89a" + bytes(9)).decode()
    )
    assert ask(worker, bad)["code"] == "bad_media"
    assert ask(worker, job(tmp_path, action="validate", width=LIMITS.max_side * 2))["code"] == (
        "bad_request"
    )


def test_validate_warns_of_sound_that_cannot_be_read(serve, tmp_path):
    made, video = tmp_path / "made.mp4", tmp_path / "rare.mkv"
    clip(made, 9, audio=tone(tmp_path / "a.wav", 1))
    run_ffmpeg("-i", made, "-c:v", "copy", "-c:a", "dca", "-strict", "-2", video)
    sent = base64.b64encode(video.read_bytes()).decode()
    told = ask(serve(), job(tmp_path, action="validate", pose_video_base64=sent))
    (warning,) = told["warnings"]
    assert warning.endswith("cannot be read: Codec (dca) not on whitelist. The clip has no sound.")
    assert told["valid"]


def test_a_bucket_of_a_job_must_be_on_the_internet(serve, tmp_path):
    config = {"endpointUrl": "http://169.254.169.254/", "accessId": "id", "accessSecret": "key"}
    worker = serve(renderer=(made := HandMade()))
    reply = ask(worker, job(tmp_path, beside={"s3Config": config}))
    assert reply["code"] == "bad_request"
    assert made.requests == []


class Unloadable:
    def __init__(self, error):
        self.error = error

    def load(self, endpoint):
        raise self.error


def test_a_missing_model_is_told_to_every_job_and_health_still_answers(serve, tmp_path):
    error = MissingModel("There is no VAE in /runpod-volume/models. Put it there.")
    worker = serve(renderer=Unloadable(error))
    for _ in range(2):
        assert ask(worker, job(tmp_path)) == {
            "error": "There is no VAE in models. Put it there.", "code": "missing_model"
        }  # fmt: skip
    told = ask(worker, {"input": {"action": "health"}})
    assert (told["status"], told["engine"]) == ("broken", None)
    assert told["problem"] == "There is no VAE in models. Put it there."


def test_a_worker_whose_folders_were_cleaned_away_mends_itself(serve, tmp_path):
    worker = serve()
    for take in (worker.endpoint.scratch, *worker.endpoint.scratch.glob("worker-*")):
        shutil.rmtree(take)
        assert worker.health()["status"] == "ready"
        shutil.rmtree(take, ignore_errors=True)
        assert "video" in ask(worker, job(tmp_path))


def test_health_is_broken_while_no_job_could_store_its_files(serve, tmp_path):
    worker = serve()
    shutil.rmtree(worker.endpoint.scratch)
    worker.endpoint.scratch.write_bytes(b"in the way")
    told = ask(worker, {"input": {"action": "health"}})
    assert (told["status"], told["problem"].split(":")[0]) == (
        "broken", "jobs cannot hold the files of jobs",
    )  # fmt: skip
    reply = ask(worker, job(tmp_path))
    assert (reply["code"], "refresh_worker" in reply) == ("output_failed", False)
    worker.endpoint.scratch.unlink()
    assert worker.health()["status"] == "ready"
    assert "video" in ask(worker, job(tmp_path))


def test_a_folder_that_goes_in_mid_job_costs_that_job_alone(serve, tmp_path):
    made = HandMade(each=lambda done: shutil.rmtree(tmp_path / "jobs", ignore_errors=True))
    worker = serve(renderer=made)
    reply = ask(worker, job(tmp_path))
    assert (reply["code"], "refresh_worker" in reply) == ("output_failed", False)
    made.each = None
    assert "video" in ask(worker, job(tmp_path))


def test_settings_that_make_no_sense_are_told_to_every_job(serve, tmp_path, monkeypatch):
    monkeypatch.setenv("BUCKET_ENDPOINT_URL", "https://s3.example.com")
    worker = serve()
    reply = ask(worker, job(tmp_path))
    assert reply["code"] == "unavailable"
    assert "BUCKET_ACCESS_KEY_ID" in reply["error"]
    monkeypatch.delenv("BUCKET_ENDPOINT_URL")
    monkeypatch.setenv("FIT", "stretch")
    assert ask(serve(), job(tmp_path))["code"] == "bad_request"


def test_a_machine_that_cannot_serve_does_not_start(tmp_path):
    given = endpoint(tmp_path)
    worker = Worker(given, Scratch(given.scratch))
    with pytest.raises(UnsupportedGpu, match="no GPU"):
        worker.start(Unloadable(UnsupportedGpu("There is no GPU here.")).load)
    worker.close()


def test_lines_of_the_log_are_json_with_the_job_and_without_payloads(serve, tmp_path, caplog):
    format_line = JsonLines(endpoint(tmp_path).redact).format
    lines = []

    class Keep(logging.Handler):
        def emit(self, record):
            lines.append(format_line(record))

    keeper = Keep()
    logging.getLogger("engine").addHandler(keeper)
    logging.getLogger("engine").setLevel(logging.INFO)
    given = job(tmp_path, name="job-7", prompt="hunter2hunter2")
    ask(serve(NobodyFound("x at https://h.example/a?sig=1")), given)
    logging.getLogger("engine").removeHandler(keeper)
    read = [json.loads(line) for line in lines]
    of_job = [line for line in read if line["job"] == "job-7"]
    assert of_job[-1]["message"] == "nobody_found: x at https://h.example/..."
    assert any("fetch" in line["message"] for line in of_job)  # the thread knows its job too
    whole = "\n".join(lines)
    assert given["input"]["image_base64"][:40] not in whole
    assert "hunter2" not in whole
    assert "sig=1" not in whole


def test_a_jobs_secrets_are_not_shown_when_it_is_printed(tmp_path):
    from engine.config import Defaults
    from engine.jobs.parse import parse_job

    config = {"endpointUrl": "https://e.example", "accessId": "id-id", "accessSecret": "s3cret"}
    shown = repr(parse_job(job(tmp_path, beside={"s3Config": config}), Defaults()))
    assert "s3cret" not in shown
    assert "id-id" not in shown
    assert dataclasses.is_dataclass(parse_job(job(tmp_path), Defaults()))
