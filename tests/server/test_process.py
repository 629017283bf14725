"""`python -m engine serve` as a real process: the worker's HTTP tests through a second client,
kill -9 and a restart, and two hundred jobs. Clips are those of the tiny package.
"""

import base64
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest

from engine.config import state_dir
from engine.demo.weights import demo_weights
from engine.media.video import probe_video
from kernels.arch import SM89
from tests.support.built import tiny_package
from tests.support.clips import clip
from tests.support.in_use import grown, in_use, telling
from tests.support.services import BROWSER
from tests.support.workers import FPS, FRAMES, job, picture
from tests.worker import test_process as of_worker
from tests.worker.test_endurance import GROWTH, LEAK, PROMPTS, TEN, WINDOW, held

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]

JOBS = 200
SETTLED = 40  # jobs after which the heap, from which nothing goes back, grows no more


class Client(of_worker.Process):
    """The second client of the worker's tests: it starts a service instead of a worker."""

    def __init__(self, folder, package, models, **environment):
        with of_worker.socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.folder = folder
        (folder / "tmp").mkdir(exist_ok=True)
        kept = {k: v for k, v in os.environ.items() if not k.startswith(of_worker.PLATFORM)}
        self.log = (folder / f"log-{self.port}").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "engine", "serve", "--port", str(self.port),
             "--package", str(package), "--models", str(models)],
            cwd=of_worker.ROOT,
            env=kept | {"OMP_NUM_THREADS": "1", "TMPDIR": str(folder / "tmp"),
                        "SCAIL_STATE": str(folder / "state")} | environment,
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )  # fmt: skip

    def wait_until_ready(self):
        super().wait_until_ready()
        ends = time.monotonic() + of_worker.START_S
        while self.get("/health")["status"] == "loading" and time.monotonic() < ends:
            time.sleep(0.1)
        return self

    def get(self, path):
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}")
        request.add_header("X-Browser", BROWSER)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())

    def ask(self, given, route="runsync"):
        url, data = f"http://127.0.0.1:{self.port}/{route}", json.dumps(given).encode()
        headers = {"content-type": "application/json", "x-browser": BROWSER}
        request = urllib.request.Request(url, data, headers)
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.loads(answer.read())

    def ended(self, name, most_s=120):
        ends = time.monotonic() + most_s
        while (told := self.get(f"/status/{name}"))["status"] in ("IN_QUEUE", "IN_PROGRESS"):
            assert time.monotonic() < ends, told
            time.sleep(0.05)
        return told

    def left(self):
        folders = (self.folder / "tmp").glob("scail-serve-*/*/*/*")
        return [path for path in folders if path.is_dir()]


@pytest.fixture(scope="module")
def setting():
    return tiny_package(SM89), demo_weights(state_dir()).models


@pytest.fixture
def start(setting, tmp_path):
    """Starts services that share their folders, and ends those that are left."""
    started = []

    def run(**changes):
        started.append(Client(tmp_path, *setting, **changes))
        return started[-1]

    yield run
    for process in started:
        process.kill()


@pytest.fixture(scope="module")
def worker(setting, tmp_path_factory):
    """The service in the place of a worker, for the worker's own tests."""
    started = Client(tmp_path_factory.mktemp("service"), *setting)
    yield started.wait_until_ready()
    started.kill()


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return job(tmp_path_factory.mktemp("media"), steps=1)["input"]


# The worker's own tests, asked of the service.
test_two_jobs_in_a_row_are_rendered_and_equal = (
    of_worker.test_two_jobs_in_a_row_are_rendered_and_equal
)
test_a_bad_job_fails_with_one_sentence_and_the_next_one_runs = (
    of_worker.test_a_bad_job_fails_with_one_sentence_and_the_next_one_runs
)
test_health_is_answered_while_a_job_runs = of_worker.test_health_is_answered_while_a_job_runs


def test_health_and_validate_are_answered(worker, given):
    told = worker.output(action="health")
    assert (told["status"], told["problem"], told["gpu"]) == ("ready", None, "CPU")
    assert told["engine"].startswith("scail-engine ")
    assert told["start_ms"]["load"] > 0
    told = worker.output(**given, action="validate")
    assert (told["width"], told["height"], told["num_frames"], told["forwards"]) == (96, 64, 9, 1)
    assert told["settings"]["attention"] == "int8fp8"


def test_the_log_holds_no_media_and_no_addresses_of_them(worker, given):
    worker.output(**given, seed=11)
    assert given["image_base64"][:60] not in worker.said()
    assert given["pose_video_base64"][:60] not in worker.said()


@pytest.mark.usefixtures("usual_signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_in_mid_job_ends_it_in_time_and_leaves_nothing(start, given, number):
    started = start().wait_until_ready()
    taken = started.ask({"input": given | {"steps": 100, "fps": 120}}, "run")
    ends = time.monotonic() + 60
    while not started.left() and time.monotonic() < ends:
        time.sleep(0.02)
    started.process.send_signal(number)
    assert started.process.wait(timeout=12) == 128 + number
    assert started.left() == []
    assert "Traceback" not in started.said()
    again = start().wait_until_ready()
    told = again.get(f"/status/{taken['id']}")
    assert (told["status"], told["output"]) == ("FAILED", {"code": "lost"})


def test_killed_in_mid_job_the_next_one_gives_what_was_finished(start, given, tmp_path):
    first = start().wait_until_ready()
    done = first.ask({"input": given | {"output": "url"}})
    running = first.ask({"input": given | {"steps": 100, "fps": 120}}, "run")
    waiting = first.ask({"input": given}, "run")
    ends = time.monotonic() + 60
    while not first.left() and time.monotonic() < ends:
        time.sleep(0.02)
    first.kill()
    second = start().wait_until_ready()
    assert second.left() == []
    assert second.get(f"/status/{done['id']}") == done
    url = f"http://127.0.0.1:{second.port}{done['output']['video_url']}"
    with urllib.request.urlopen(url, timeout=60) as answer:
        (tmp_path / "clip.mp4").write_bytes(answer.read())
    info = probe_video(tmp_path / "clip.mp4")
    assert (info.frames, info.width, info.height, info.fps) == (FRAMES, 96, 64, FPS)
    for name in (running["id"], waiting["id"]):
        told = second.get(f"/status/{name}")
        assert (told["status"], told["output"]) == ("FAILED", {"code": "lost"})
    assert second.ask({"input": given})["status"] == "COMPLETED"


def test_a_second_service_on_the_same_folder_ends_with_a_sentence(start):
    start().wait_until_ready()
    second = start()
    assert second.process.wait(timeout=60) == 2
    assert "error: Another service keeps its jobs in " in second.said()


def test_beyond_loopback_it_does_not_start_without_a_token(tmp_path):
    command = [sys.executable, "-m", "engine", "serve", "--host", "0.0.0.0", "--port", "0"]
    kept = {name: value for name, value in os.environ.items() if name != "SCAIL_TOKEN"}
    done = subprocess.run(command, cwd=of_worker.ROOT, env=kept, capture_output=True, text=True,
                          check=False, timeout=120)  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: --host 0.0.0.0 can be reached from other machines")


def test_two_hundred_jobs_in_a_row_leave_their_clips_and_nothing_else(start, tmp_path):
    worker = start(SCAIL_KEEP_GB="0.000050", **telling(tmp_path)).wait_until_ready()
    motion = clip(tmp_path / "motion.mp4", 5)
    given = {
        "image_base64": picture(),
        "pose_video_base64": base64.b64encode(motion.read_bytes()).decode(),
        "width": 64, "height": 64, "fps": 16, "steps": 1, "output": "url",
    }  # fmt: skip
    seen, counts = [], []
    for number in range(JOBS):
        told = worker.ask(
            {"input": given | {"seed": number, "prompt": f"dance {number % PROMPTS}"}}
        )
        assert (told["status"], told["output"]["seed"]) == ("COMPLETED", number)
        if number % TEN == TEN - 1:
            assert worker.ask({"input": given | {"image_base64": "AAAA"}})["status"] == "FAILED"
            counts.append(in_use(worker.process.pid, tmp_path))
        seen.append(held(worker))
    early, late = seen[SETTLED : SETTLED + WINDOW], seen[-WINDOW:]
    resident = [statistics.median(one[0] for one in part) for part in (early, late)]
    twenties = [seen[at : at + WINDOW] for at in range(0, JOBS, WINDOW)]
    print("MiB:", [round(statistics.median(o[0] for o in part) / 2**20, 1) for part in twenties])
    print("in use by tens:", *map(tuple, counts))
    growth = grown(counts[JOBS // TEN // 2 :])
    assert growth.heap_bytes < TEN * LEAK.heap_bytes
    assert growth.blocks < TEN * LEAK.blocks
    assert resident[1] <= GROWTH * resident[0]
    for what in (1, 2):
        assert min(one[what] for one in late) <= min(one[what] for one in early)
    assert [one[3] for one in late] == [[]] * WINDOW
    assert worker.left() == []
    assert worker.get("/health")["jobs"]["completed"] == JOBS
    clips = list((tmp_path / "state" / "serve" / "results").iterdir())
    assert sum(path.stat().st_size for path in clips) <= 50_000
    kept = worker.get("/jobs")["jobs"]
    assert {f"{one['id']}.mp4" for one in kept if one["status"] == "COMPLETED"} == {
        path.name for path in clips
    }


def test_jobs_of_many_clients_at_once_all_end(worker, given):
    ended = []

    def ask(number):
        with contextlib.suppress(urllib.error.URLError):
            ended.append(worker.ask({"input": given | {"seed": number}})["output"]["seed"])

    clients = [threading.Thread(target=ask, args=(number,)) for number in range(20)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    assert sorted(ended) == [*range(20)]
