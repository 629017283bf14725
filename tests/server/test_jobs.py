"""Jobs over HTTP as RunPod's clients send them, and as the page does; clips are made by hand."""

import base64
import http.client
import json
import threading
import time

import pytest

from engine.errors import NobodyFound, UnsupportedGpu
from engine.media.video import probe_video
from tests.support.services import BROWSER, OTHER, Serving, events, model
from tests.support.workers import FRAMES, HandMade, job


@pytest.fixture
def serve(tmp_path):
    """Starts services and ends them."""
    started = []

    def start(*made, **changes):
        started.append(Serving(tmp_path, *(model(one) for one in made), **changes))
        return started[-1]

    yield start
    for service in started:
        service.stop()


@pytest.fixture
def given(tmp_path):
    return job(tmp_path)["input"]


class Gate:
    """Holds a renderer at its first forward until it is opened."""

    def __init__(self):
        self.begun, self.opened = threading.Event(), threading.Event()

    def __call__(self, done):
        self.begun.set()
        assert self.opened.wait(30)


def test_a_job_is_taken_told_of_and_answered_as_by_runpod(serve, given, tmp_path):
    service = serve()
    status, taken = service.ask("POST", "/run", {"input": given | {"seed": 7}})
    assert (status, taken["status"]) == (200, "IN_QUEUE")
    told = service.ended(taken["id"])
    assert told["status"] == "COMPLETED"
    assert told["delayTime"] >= 0
    assert told["executionTime"] > 0
    (tmp_path / "out.mp4").write_bytes(base64.b64decode(told["output"]["video"], validate=True))
    assert probe_video(tmp_path / "out.mp4").frames == FRAMES
    assert (told["output"]["seed"], told["output"]["num_frames"]) == (7, FRAMES)


def test_runsync_answers_with_the_end(serve, given):
    status, told = serve().ask("POST", "/runsync", {"input": json.dumps(given)})
    assert (status, told["status"]) == (200, "COMPLETED")
    assert "video" in told["output"]


def test_runsync_waits_no_longer_than_it_is_told_to(serve, given):
    gate = Gate()
    service = serve(HandMade(each=gate))
    status, told = service.ask("POST", "/runsync?wait=1000", {"input": given})
    assert (status, told["status"]) == (200, "IN_PROGRESS")
    gate.opened.set()
    assert service.ended(told["id"])["status"] == "COMPLETED"
    for wait in ("0", "999", "-5", "1e9", "300001"):
        status, told = service.ask("POST", f"/runsync?wait={wait}", {"input": given})
        assert (status, told["code"]) == (400, "bad_request")


def test_a_clip_that_is_wanted_as_an_address_has_ranges_and_can_be_saved(serve, given):
    service = serve()
    _, told = service.ask("POST", "/runsync", {"input": given | {"output": "url"}})
    output = told["output"]
    assert output["video_url"] == f"/results/{told['id']}.mp4"
    assert "video" not in output
    status, headers, whole = service.send("GET", output["video_url"])
    assert (status, headers["content-type"]) == (200, "video/mp4")
    assert headers["accept-ranges"] == "bytes"
    status, headers, part = service.send(
        "GET", output["video_url"], headers={"Range": "bytes=4-11"}
    )
    assert (status, part) == (206, whole[4:12])
    assert headers["content-range"] == f"bytes 4-11/{len(whole)}"
    past = {"Range": f"bytes={len(whole)}-"}
    assert service.send("GET", output["video_url"], headers=past)[0] == 416
    _, headers, _ = service.send("GET", f"{output['video_url']}?download=1")
    assert headers["content-disposition"].startswith("attachment;")


def test_an_error_is_one_sentence_and_a_code_and_the_next_job_runs(serve, given):
    service = serve(HandMade(NobodyFound("Nobody is in the video. Send another.")))
    _, told = service.ask("POST", "/runsync", {"input": given})
    assert (told["status"], told["error"]) == ("FAILED", "Nobody is in the video. Send another.")
    assert told["output"] == {"code": "nobody_found"}
    _, told = service.ask("POST", "/runsync", {"input": given | {"image_base64": "AAAA"}})
    assert told["error"].startswith("image_base64 is a file of another kind")
    assert service.ask("POST", "/runsync", {"input": given})[1]["status"] == "COMPLETED"
    assert service.ask("GET", "/health")[1]["jobs"] == {
        "completed": 1, "failed": 2, "inProgress": 0, "inQueue": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error: /secret/path"), UnsupportedGpu("Off.")]
)
def test_after_a_failure_that_nobody_foresaw_the_model_is_loaded_anew(serve, given, error):
    loads = []
    made = HandMade(error)
    service = serve()
    service.models.found["preview"] = model(lambda endpoint: loads.append(1) or made.load(endpoint))
    service.models.let_go()
    _, told = service.ask("POST", "/runsync", {"input": given})
    assert told["status"] == "FAILED"
    assert "secret" not in told["error"]
    assert service.ask("POST", "/runsync", {"input": given})[1]["status"] == "COMPLETED"
    assert len(loads) == 2


def test_validate_tells_what_a_job_would_come_to(serve, given):
    _, told = serve().ask("POST", "/runsync", {"input": given | {"action": "validate"}})
    output = told["output"]
    assert (told["action"], output["valid"], output["num_frames"]) == ("validate", True, FRAMES)
    assert output["forwards"] == 6


def test_health_is_told_while_a_job_runs_as_a_job_and_as_a_route(serve, given):
    gate = Gate()
    service = serve(HandMade(each=gate))
    _, taken = service.ask("POST", "/run", {"input": given})
    assert gate.begun.wait(30)
    _, told = service.ask("POST", "/runsync", {"input": {"action": "health"}})
    assert (told["status"], told["output"]["status"]) == ("COMPLETED", "busy")
    _, told = service.ask("GET", "/health")
    assert (told["status"], told["workers"]) == ("busy", {"idle": 0, "running": 1})
    gate.opened.set()
    service.ended(taken["id"])
    assert service.ask("GET", "/health")[1]["status"] == "ready"


def test_jobs_wait_in_line_and_questions_go_before_clips(serve, given):
    gate = Gate()
    service = serve(HandMade(each=gate))
    _, first = service.ask("POST", "/run", {"input": given})
    assert gate.begun.wait(30)
    _, clip = service.ask("POST", "/run", {"input": given})
    _, question = service.ask("POST", "/run", {"input": given | {"action": "validate"}})
    places = [service.ask("GET", f"/status/{one['id']}")[1]["queue"] for one in (clip, question)]
    assert places == [{"position": 2, "waiting": 2}, {"position": 1, "waiting": 2}]
    gate.opened.set()
    ended = [service.ended(one["id"])["status"] for one in (first, clip, question)]
    assert ended == ["COMPLETED"] * 3


def test_a_waiting_job_is_called_off_at_once_and_a_running_one_at_its_next_forward(serve, given):
    gate = Gate()
    service = serve(HandMade(each=gate, forwards=1000))
    _, running = service.ask("POST", "/run", {"input": given})
    assert gate.begun.wait(30)
    _, waiting = service.ask("POST", "/run", {"input": given})
    _, told = service.ask("POST", f"/cancel/{waiting['id']}")
    assert told["status"] == "CANCELLED"
    _, told = service.ask("POST", f"/cancel/{running['id']}")
    assert told["status"] == "IN_PROGRESS"
    gate.opened.set()
    assert service.ended(running["id"])["status"] == "CANCELLED"
    _, told = service.ask("POST", f"/cancel/{running['id']}")  # again: it stays as it is
    assert told["status"] == "CANCELLED"


def test_more_jobs_than_may_wait_are_refused(serve, given):
    gate = Gate()
    service = serve(HandMade(each=gate), most_waiting=2)
    taken = [service.ask("POST", "/run", {"input": given})]
    assert gate.begun.wait(30)
    taken += [service.ask("POST", "/run", {"input": given}) for _ in range(3)]
    assert [status for status, _ in taken] == [200, 200, 200, 429]
    assert taken[3][1]["error"].startswith("2 jobs wait already")
    gate.opened.set()
    for _, told in taken[:3]:
        service.ended(told["id"])


def test_events_follow_a_job_from_the_queue_to_its_end(serve, given):
    gate = Gate()
    service = serve(HandMade(each=lambda done: gate(done) or time.sleep(0.15), forwards=4))
    _, taken = service.ask("POST", "/run", {"input": given | {"output": "url"}})
    assert gate.begun.wait(30)
    asked = http.client.HTTPConnection("127.0.0.1", service.port, timeout=30)
    asked.request("GET", f"/stream/{taken['id']}", headers={"Accept": "text/event-stream"})
    reply = asked.getresponse()
    assert reply.headers["content-type"].startswith("text/event-stream")
    coming = events(reply)
    assert next(coming) == ("status", service.ask("GET", f"/status/{taken['id']}")[1])
    service.records.picture(taken["id"]).write_bytes(b"a picture")
    gate.opened.set()
    rest = [*coming]
    names = [name for name, _ in rest]
    assert {"progress", "preview"} < {*names}
    assert (names[-1], names.count("end")) == ("end", 1)
    assert rest[-1][1]["output"]["video_url"] == f"/results/{taken['id']}.mp4"
    shown = next(data["url"] for name, data in rest if name == "preview")
    status, headers, picture = service.send("GET", shown)
    assert (status, headers["content-type"], picture) == (200, "image/png", b"a picture")
    progress = [data for name, data in rest if name == "progress"]
    assert progress[-1]["stage"] == "denoise"
    assert service.ask("GET", f"/status/{taken['id']}")[1]["preview_url"] == shown
    asked.close()


def test_without_that_header_the_stream_is_runpods_json(serve, given):
    service = serve()
    _, told = service.ask("POST", "/runsync", {"input": given | {"output": "url"}})
    _, stream = service.ask("GET", f"/stream/{told['id']}")
    assert stream["status"] == "COMPLETED"
    assert stream["stream"] == [{"output": told["output"]}]


def test_a_browser_sees_its_own_jobs_and_no_others(serve, given):
    service = serve()
    _, mine = service.ask("POST", "/runsync", {"input": given}, browser=BROWSER)
    _, whose = service.ask("POST", "/runsync", {"input": given})
    _, listed = service.ask("GET", "/jobs", browser=BROWSER)
    assert [one["id"] for one in listed["jobs"]] == [mine["id"]]
    (one,) = listed["jobs"]
    assert one["input"]["image_base64"] == f"<{len(given['image_base64'])} characters>"
    assert "video" not in one["output"]
    for browser in (None, OTHER, "short", "../" * 11, BROWSER.upper()):
        assert service.ask("GET", "/jobs", browser=browser) == (200, {"jobs": []})
    assert service.ask("DELETE", f"/jobs/{mine['id']}", browser=OTHER)[0] == 404
    assert service.ask("DELETE", f"/jobs/{mine['id']}", browser=BROWSER)[0] == 204
    assert service.ask("GET", f"/status/{mine['id']}")[0] == 404
    assert service.send("GET", f"/results/{mine['id']}.mp4")[0] == 404
    assert service.ask("GET", f"/status/{whose['id']}")[0] == 200
    assert BROWSER not in "".join(p.read_text() for p in service.house.folder.glob("jobs/*"))


def test_a_job_goes_to_the_model_that_it_names_and_one_is_loaded_at_a_time(tmp_path, given):
    first, second = HandMade(), HandMade()
    service = Serving(tmp_path, model(first), model(second, "scail2"))
    _, told = service.ask("POST", "/runsync", {"input": given, "model": "scail2"})
    assert (told["status"], told["model"]) == ("COMPLETED", "scail2")
    assert (len(second.requests), second.requests[0].settings.mode) == (1, "animation")
    assert service.models.loaded == "scail2"
    _, told = service.ask("POST", "/runsync", {"input": given})
    assert (told["status"], len(first.requests)) == ("COMPLETED", 1)
    assert service.models.loaded == "preview"
    status, told = service.ask("POST", "/run", {"input": given, "model": "<b>other"})
    assert (status, told["error"]) == (
        400, 'There is no model "<b>other" here, only preview and scail2; leave it out.',
    )  # fmt: skip
    service.stop()


def test_a_model_that_cannot_be_loaded_is_told_to_every_job_and_tried_again(serve, given):
    made, problems = HandMade(), [UnsupportedGpu("There is no GPU here."), NobodyFound("No VAE.")]

    def load(endpoint):
        if problems:
            raise problems.pop()
        return made.load(endpoint)

    service = serve(load)
    ends = time.monotonic() + 10
    while service.ask("GET", "/health")[1]["status"] == "loading" and time.monotonic() < ends:
        time.sleep(0.02)
    _, told = service.ask("GET", "/health")
    assert (told["status"], told["problem"]) == ("broken", "No VAE.")
    _, told = service.ask("POST", "/runsync", {"input": given})
    assert (told["status"], told["error"]) == ("FAILED", "There is no GPU here.")
    assert told["output"] == {"code": "unsupported_gpu"}
    assert service.ask("POST", "/runsync", {"input": given})[1]["status"] == "COMPLETED"
    assert service.ask("GET", "/health")[1]["status"] == "ready"


def test_what_is_sent_beside_the_input_is_said(serve, given):
    service = serve()
    status, told = service.ask("POST", "/run", {"input": given, "webhook": "http://me.example/"})
    assert (status, told["code"]) == (400, "bad_request")
    assert told["error"].startswith("webhook is not taken")
    body = {"input": given, "policy": {"ttl": 1}, "colour": 1}
    _, told = service.ask("POST", "/runsync", body)
    assert told["output"]["warnings"] == [
        "policy: ignored here; the field max_seconds limits the time of a job.",
        'Not known beside input and ignored: "colour".',
        "a note",
    ]
    for body in ({}, [], "text", {"output": 1}, None):
        status, told = service.ask("POST", "/run", body, Content_Type="application/json")
        assert (status, told["code"]) == (400, "bad_request")
