"""`python handler.py` as a real process with the tiny package, asked over HTTP as clients ask."""

import base64
import contextlib
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from importlib.metadata import version
from pathlib import Path

import psutil
import pytest

from engine.config import state_dir
from engine.demo.weights import demo_weights
from engine.media.video import probe_video
from kernels.arch import SM89
from tests.support.built import tiny_package
from tests.support.workers import FPS, FRAMES, job

ROOT = Path(__file__).resolve().parents[2]
START_S = 90.0
PLATFORM = ("RUNPOD_", "BUCKET_", "SCAIL_", "MAX_", "DEFAULT_VIDEO", "FIT", "RECIPE")


class Process:
    """A worker that serves on a port of this machine."""

    def __init__(
        self, folder, serve=("--rp_serve_api", "--rp_api_host", "127.0.0.1"), **environment
    ):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.folder = folder
        (folder / "tmp").mkdir(exist_ok=True)
        kept = {k: v for k, v in os.environ.items() if not k.startswith(PLATFORM)}
        self.log = (folder / f"log-{self.port}").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "handler.py", *serve, "--rp_api_port", str(self.port)],
            cwd=ROOT,
            env=kept | {"OMP_NUM_THREADS": "1", "TMPDIR": str(folder / "tmp")} | environment,
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )  # fmt: skip

    def wait_until_ready(self):
        ends = time.monotonic() + START_S
        while time.monotonic() < ends:
            assert self.process.poll() is None, self.said()
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return self
            time.sleep(0.1)
        raise AssertionError(f"not ready in {START_S} s: {self.said()}")

    def ask(self, given, route="runsync"):
        url, data = f"http://127.0.0.1:{self.port}/{route}", json.dumps(given).encode()
        request = urllib.request.Request(url, data, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.loads(answer.read())

    def output(self, **given):
        answer = self.ask({"input": given})
        assert answer["status"] == "COMPLETED", answer
        return answer["output"]

    def said(self):
        self.log.flush()
        return Path(self.log.name).read_text("utf-8")

    def left(self):
        return [path for path in (self.folder / "tmp").glob("scail-jobs/*/*") if path.is_dir()]

    def kill(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def setting():
    demo = demo_weights(state_dir())
    return {
        "SCAIL_PACKAGE": str(tiny_package(SM89)),
        "SCAIL_MODELS": str(demo.models),
        "SCAIL_STATE": os.environ["SCAIL_STATE"],
        "SCAIL_ALLOW_CPU": "1",
    }


@pytest.fixture(scope="module")
def worker(setting, tmp_path_factory):
    started = Process(tmp_path_factory.mktemp("worker"), **setting)
    yield started.wait_until_ready()
    started.kill()


@pytest.fixture
def start(setting, tmp_path):
    """Starts workers that share a folder, and ends those that are left."""
    started = []

    def run(**changes):
        started.append(Process(tmp_path, **setting | changes))
        return started[-1]

    yield run
    for process in started:
        process.kill()


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return job(tmp_path_factory.mktemp("media"), steps=1)["input"]


def test_health_and_validate_are_answered(worker, given):
    told = worker.output(action="health")
    assert (told["status"], told["problem"], told["gpu"]) == ("ready", None, "CPU")
    assert told["engine"].startswith(f"scail-engine {version('scail-engine')} sm89 ")
    assert told["start_ms"]["load"] > 0
    told = worker.output(**given, action="validate")
    assert (told["width"], told["height"], told["num_frames"], told["forwards"]) == (96, 64, 9, 1)
    assert told["settings"]["attention"] == "int8fp8"


def test_two_jobs_in_a_row_are_rendered_and_equal(worker, given, tmp_path):
    one, two = (worker.output(**given, seed=7) for _ in range(2))
    assert one["video"] == two["video"]
    (tmp_path / "clip.mp4").write_bytes(base64.b64decode(one["video"], validate=True))
    info = probe_video(tmp_path / "clip.mp4")
    assert (info.frames, info.width, info.height, info.fps) == (FRAMES, 96, 64, FPS)
    assert (one["seed"], one["num_frames"], one["warnings"]) == (7, FRAMES, [])
    assert {"fetch", "media", "conditioning", "denoise", "decode", "deliver"} == {
        *one["timings_ms"]
    }
    assert worker.left() == []


def test_a_job_by_run_and_status_is_answered_too(worker, given):
    started = worker.ask({"input": given | {"seed": 7}}, "run")
    answer = worker.ask({}, f"status/{started['id']}")
    assert (answer["status"], answer["output"]["seed"]) == ("COMPLETED", 7)


def test_a_bad_job_fails_with_one_sentence_and_the_next_one_runs(worker, given):
    answer = worker.ask({"input": given | {"image_base64": "AAAA"}})
    assert answer["status"] == "FAILED"
    assert answer["error"].startswith("image_base64 is a file of another kind")
    assert "video" in worker.output(**given)


def test_health_is_answered_while_a_job_runs(worker, given):
    replies = []
    running = threading.Thread(
        target=lambda: replies.append(worker.ask({"input": given | {"steps": 30}}))
    )
    running.start()
    seen = set()
    while running.is_alive():
        seen.add(worker.output(action="health")["status"])
    assert seen == {"busy", "ready"} or seen == {"busy"}
    assert replies[0]["status"] == "COMPLETED"


def test_the_log_is_json_with_the_job_and_without_the_media(worker, given):
    worker.output(**given, seed=11)
    assert '"message": "load ' in worker.said()  # what a worker that is ended early never says
    lines = [json.loads(line) for line in worker.said().splitlines() if line.startswith("{")]
    last = [line for line in lines if line["message"] == "clip finished"][-1]
    assert last["job"].startswith("test-")
    assert last["frames"] == FRAMES
    assert last["timings_ms"]["denoise"] > 0
    assert given["image_base64"][:60] not in worker.said()
    assert given["pose_video_base64"][:60] not in worker.said()


END_S = 8.0  # `docker stop` kills after ten


def in_mid_job(started, given, **changes):
    """Sends a job that takes minutes, and returns once it renders."""

    def send():
        with contextlib.suppress(OSError, urllib.error.URLError):
            started.ask({"input": given | {"steps": 100, "fps": 120} | changes})

    threading.Thread(target=send, daemon=True).start()
    ends = time.monotonic() + START_S
    while not started.left() and time.monotonic() < ends:
        time.sleep(0.02)
    assert started.left() != []


def ends_in_time(started, *signals):
    """Sends the signals; returns the status, when nothing of the worker is left."""
    children = psutil.Process(started.process.pid).children(recursive=True)
    for number in signals:
        started.process.send_signal(number)
        time.sleep(0.1)
    status = started.process.wait(timeout=END_S)
    assert [child for child in children if child.is_running()] == []
    scratch = started.folder / "tmp" / "scail-jobs"
    assert [path.name for path in scratch.iterdir()] == ["lock"]
    assert [path.name for path in (started.folder / "tmp").glob("[!.]*")] == ["scail-jobs"]
    assert "Traceback" not in started.said()
    return status


@pytest.mark.usefixtures("usual_signals")
def test_sigterm_in_mid_job_ends_it_in_time_and_leaves_nothing(start, given):
    started = start().wait_until_ready()
    in_mid_job(started, given)
    assert ends_in_time(started, signal.SIGTERM) == 128 + signal.SIGTERM


@pytest.mark.slow
@pytest.mark.usefixtures("usual_signals")
@pytest.mark.parametrize(
    "signals",
    [[signal.SIGINT], [signal.SIGHUP], [signal.SIGTERM] * 2, [signal.SIGINT, signal.SIGTERM]],
    ids=str,
)
def test_other_signals_and_a_second_one_end_it_too(start, given, signals):
    started = start().wait_until_ready()
    in_mid_job(started, given)
    # the first may have ended it when the second comes
    assert ends_in_time(started, *signals) in {128 + number for number in signals}


@pytest.mark.slow
def test_sigterm_is_heard_in_the_midst_of_a_request_that_never_ends(start):
    started = start().wait_until_ready()
    with socket.create_connection(("127.0.0.1", started.port)) as half:
        half.sendall(b"POST /runsync HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{")
        time.sleep(0.5)
        assert ends_in_time(started, signal.SIGTERM) == 128 + signal.SIGTERM


@pytest.mark.slow
@pytest.mark.parametrize("is_busy", [False, True], ids=["idle", "in mid job"])
def test_on_the_platform_sigterm_ends_it_in_time_and_a_job_goes_back(start, given, is_busy):
    jobs = [{"id": "long", "input": given | {"steps": 100, "fps": 120}}] if is_busy else []
    platform = Platform(*jobs, poll_s=60)
    started = start(serve=(), **platform.environment)
    if is_busy:
        platform.wait_for(lambda name, body: name == "long")
    else:
        assert platform.asked.wait(START_S)
    assert ends_in_time(started, signal.SIGTERM) == 128 + signal.SIGTERM
    final = [body for _, body in platform.told if body.get("status") != "IN_PROGRESS"]
    assert final == []  # unanswered, the platform gives it to another worker
    platform.server.shutdown()


@pytest.mark.slow
def test_killed_in_mid_job_the_next_worker_cleans_up_and_serves(start, given, tmp_path):
    first = start().wait_until_ready()

    def send():
        with contextlib.suppress(OSError, urllib.error.URLError):
            first.ask({"input": given | {"steps": 90}})

    asking = threading.Thread(target=send)
    asking.start()
    ends = time.monotonic() + 30
    while not first.left() and time.monotonic() < ends:
        time.sleep(0.02)
    left = first.left()
    first.kill()
    asking.join()
    assert len(left) == 1
    assert left[0].is_dir()
    second = start().wait_until_ready()
    assert second.left() == []
    assert "video" in second.output(**given)
    second.process.send_signal(signal.SIGTERM)
    assert second.process.wait(timeout=20) == 128 + signal.SIGTERM
    assert [path.name for path in (tmp_path / "tmp" / "scail-jobs").iterdir()] == ["lock"]
    assert "Traceback" not in second.said()


def test_without_a_gpu_it_does_not_start_and_says_so(start):
    started = start(SCAIL_ALLOW_CPU="0")
    assert started.process.wait(timeout=60) == 1
    last = started.said().splitlines()[-1]
    assert last.startswith("error: There is no GPU here")
    assert "Traceback" not in started.said()


@pytest.mark.slow
def test_sigterm_while_loading_ends_it_before_it_has_loaded(start):
    started = start()
    ends = time.monotonic() + 60
    while not started.said() and started.process.poll() is None and time.monotonic() < ends:
        time.sleep(0.02)
    started.process.send_signal(signal.SIGTERM)
    assert started.process.wait(timeout=60) == 128 + signal.SIGTERM
    assert '"message": "load ' not in started.said()


@pytest.mark.slow
def test_a_missing_model_is_told_by_a_worker_that_serves(start, given, tmp_path):
    (tmp_path / "models").mkdir()
    started = start(SCAIL_MODELS=str(tmp_path / "models"))
    started.wait_until_ready()
    answer = started.ask({"input": given})
    assert answer["status"] == "FAILED"
    assert str(tmp_path) not in answer["error"]
    told = started.output(action="health")
    assert (told["status"], told["problem"]) == ("broken", answer["error"])


class Platform:
    """A server that the platform's library asks for jobs, and brings news and results to."""

    def __init__(self, *jobs, poll_s=0.2):
        self.jobs, self.stops, self.told = [*jobs], [], []
        self.asked = threading.Event()
        platform = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                platform.asked.set()
                if "/job-take/" in self.path and platform.jobs:
                    self.answer(platform.jobs.pop(0))
                elif "/job-stop/" in self.path and platform.stops:
                    self.answer({"jobsToStop": [platform.stops.pop(0)]})
                else:
                    time.sleep(poll_s)
                    self.send_response(204)
                    self.end_headers()

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                name = self.path.split("/")[2].partition("?")[0]
                platform.told.append((name, json.loads(body)))
                self.answer({})

            def answer(self, value):
                data = json.dumps(value).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        root = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.environment = {
            "RUNPOD_WEBHOOK_GET_JOB": f"{root}/job-take/$ID?gpu=none",
            "RUNPOD_WEBHOOK_POST_OUTPUT": f"{root}/job-done/$ID?gpu=none",
            "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
            "RUNPOD_SKIP_GPU_CHECK": "true",
        }

    def wait_for(self, found):
        ends = time.monotonic() + START_S
        while time.monotonic() < ends:
            hits = [told for told in self.told if found(*told)]
            if hits:
                return hits[-1][1]
            time.sleep(0.05)
        raise AssertionError([(name, {*body}) for name, body in self.told])


@pytest.mark.slow
def test_on_the_platform_jobs_are_taken_told_of_called_off_and_answered(start, given):
    long = {"id": "long", "input": given | {"steps": 100, "fps": 120}}
    platform = Platform(long, {"id": "short", "input": given}, {"id": "bad", "input": {}})
    started = start(serve=(), **platform.environment)
    told = platform.wait_for(lambda name, body: name == "long")
    assert (told["status"], told["output"]["stage"]) == ("IN_PROGRESS", "denoise")
    assert 10 < told["output"]["percent"] < 95
    assert told["output"]["eta_s"] > 0
    platform.stops.append("long")
    told = platform.wait_for(lambda name, body: name == "short" and "error" not in body)
    assert told["output"]["num_frames"] == FRAMES
    told = platform.wait_for(lambda name, body: name == "bad")
    assert told["error"].startswith("No picture is given")
    assert told["output"] == {"code": "bad_request"}
    assert [body for name, body in platform.told if name == "long" and "video" in str(body)] == []
    assert started.left() == []
    platform.server.shutdown()


@pytest.mark.slow
def test_on_the_platform_a_missing_package_is_told_to_each_job(start, given, tmp_path):
    platform = Platform({"id": "one", "input": given}, {"id": "two", "input": given})
    started = start(serve=(), SCAIL_PACKAGE=str(tmp_path / "none"), **platform.environment)
    for name in ("one", "two"):
        told = platform.wait_for(lambda of, body, name=name: of == name)
        assert told["output"] == {"code": "bad_package"}
        assert str(tmp_path) not in told["error"]
    assert started.process.poll() is None
    platform.server.shutdown()


@pytest.mark.slow
def test_on_the_platform_a_machine_without_a_gpu_reports_it_and_ends(start):
    platform = Platform({"id": "job", "input": {"action": "health"}})
    started = start(serve=(), SCAIL_ALLOW_CPU="0", **platform.environment)
    assert started.process.wait(timeout=60) == 1
    assert "Fitness check failed: start | UnsupportedGpu: There is no GPU here" in started.said()
    assert platform.told == []
    platform.server.shutdown()
