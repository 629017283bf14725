"""What is kept over a restart, for how long, and what a full disk makes of it."""

import base64
import dataclasses
import json
import os
import threading

import pytest

from engine.server.house import make_folders
from engine.server.ids import is_id, make_id, owner_of
from engine.server.records import Record, Records
from engine.server.uploads import Uploads
from tests.support.services import BROWSER, Serving, house, model
from tests.support.workers import HandMade, job

HOUR = 3600.0


@pytest.fixture
def home(tmp_path):
    made = house(tmp_path, keep_s=10 * HOUR, keep_bytes=1000, keep_upload_s=HOUR)
    make_folders(made.folder)
    return made


def record(number, **changes):
    name = f"{number:032x}"
    return Record(name, "preview", "generate", None, 1000.0 + number, {"seed": number}, **changes)


def ended(records, number, size=100, **changes):
    one = record(number, status="COMPLETED", ended_at=1000.0 + number, output={"seed": number})
    one = dataclasses.replace(one, **changes)
    records.put(one)
    records.clip(one.id).write_bytes(bytes(size))
    return one.id


def test_an_ended_job_is_as_it_was_and_one_that_had_not_ended_is_lost(home):
    now = lambda: 2000.0  # noqa: E731
    records = Records(home, now)
    done = ended(records, 1)
    for number, status in ((2, "IN_QUEUE"), (3, "IN_PROGRESS")):
        records.put(record(number, status=status))
    again = Records(home, now)
    assert again[done] == records[done]
    assert again.clip(done).read_bytes() == bytes(100)
    waited, ran = again[f"{2:032x}"], again[f"{3:032x}"]
    assert (waited.status, waited.output, waited.ended_at) == ("FAILED", {"code": "lost"}, 2000.0)
    assert waited.error == (
        "The service ended while the job waited, so that it is lost. Send it again."
    )
    assert "while the job ran" in ran.error
    assert Records(home, now)[waited.id] == waited


def test_what_is_no_record_and_what_was_half_written_is_left_out(home):
    records = Records(home)
    done = ended(records, 1, created_at=4e9, ended_at=4e9)
    jobs, results = home.folder / "jobs", home.folder / "results"
    for name, text in (
        ("a.json", "{"),
        (f"{'0' * 32}.json", "[]"),
        (f"{'1' * 32}.json", '{"id": 1}'),
    ):
        (jobs / name).write_text(text)
    stolen = json.loads((jobs / f"{done}.json").read_text()) | {"id": "../x"}
    (jobs / f"{'2' * 32}.json").write_text(json.dumps(stolen))
    (results / f".{done}.mp4.part").write_bytes(b"x")
    (results / f"{'3' * 32}.mp4").write_bytes(b"of a job that nobody knows")
    again = Records(home)
    assert [one for one in ("a", "0" * 32, "1" * 32, "2" * 32, "../x") if one in again] == []
    assert [path.name for path in results.iterdir()] == [f"{done}.mp4"]


def test_results_go_when_their_time_is_over_the_oldest_first_when_room_is_short(home):
    clock = [2000.0]
    records = Records(home, lambda: clock[0])
    names = [ended(records, number, size=300) for number in range(1, 5)]
    records.expire()
    assert [name in records for name in names] == [False, True, True, True]
    assert not records.clip(names[0]).exists()
    clock[0] = 1000 + 3.5 + 10 * HOUR
    records.expire()
    assert [name in records for name in names] == [False, False, False, True]
    clock[0] += HOUR
    records.expire()
    assert names[3] not in records
    assert [*(home.folder / "jobs").iterdir()] == []
    large = ended(records, 9, size=5000, ended_at=clock[0])  # than all that may be kept
    records.expire()
    assert large in records


def test_answers_to_questions_go_after_ten_minutes_and_push_no_clip_out(home):
    clock = [1100.0]
    records = Records(home, lambda: clock[0])
    clip = ended(records, 1)
    answers = [ended(records, 2, action="validate"), ended(records, 3, action="overlay")]
    records.expire()
    assert [name in records for name in (clip, *answers)] == [True] * 3
    clock[0] += 601
    records.expire()
    assert [name in records for name in (clip, *answers)] == [True, False, False]


def test_uploads_go_an_hour_after_their_last_use_unless_a_job_waits_with_them(home):
    clock = [1e9]
    uploads = Uploads(home, lambda: clock[0])
    names = [make_id() for _ in range(3)]
    for name in names:
        path = home.folder / "uploads" / name
        path.write_bytes(b"x")
        os.utime(path, (clock[0], clock[0]))
    uploads.hold((names[0], names[0]))
    uploads.release((names[0],))
    clock[0] += HOUR + 1
    os.utime(home.folder / "uploads" / names[1], (clock[0], clock[0]))
    uploads.expire()
    assert {path.name for path in (home.folder / "uploads").iterdir()} == {*names[:2]}
    uploads.release((names[0],))
    uploads.expire()
    assert [path.name for path in (home.folder / "uploads").iterdir()] == [names[1]]


def test_folders_are_this_users_alone_whatever_they_were(tmp_path):
    folder = tmp_path / "state" / "serve"
    folder.mkdir(parents=True, mode=0o755)
    make_folders(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o700}
    assert is_id(make_id())
    assert len({make_id() for _ in range(100)}) == 100


def test_what_cannot_be_stored_ends_in_a_sentence_and_the_next_job_runs(tmp_path):
    service = Serving(tmp_path)
    given = job(tmp_path)["input"]
    for name in ("jobs", "results"):
        place = service.house.folder / name
        place.rename(tmp_path / "away")
        place.write_bytes(b"in the way")
        status, told = service.ask("POST", "/runsync", {"input": given})
        if name == "jobs":  # nothing is begun that could not be remembered
            assert (status, told["code"]) == (507, "output_failed")
        else:
            assert (told["status"], told["output"]) == ("FAILED", {"code": "output_failed"})
        assert told["error"].endswith(
            " cannot be stored by the service: Not a directory. Remove something from the disk, or "
            "set SCAIL_STATE to a folder with room."
        )
        place.unlink()
        (tmp_path / "away").rename(place)
    assert service.ask("POST", "/runsync", {"input": given})[1]["status"] == "COMPLETED"
    assert list(service.house.folder.rglob("*.part")) == []
    service.stop()


def test_where_the_disk_has_no_room_nothing_is_begun(tmp_path):
    service = Serving(tmp_path, free_bytes=10**18)
    status, told = service.ask("POST", "/run", {"input": job(tmp_path)["input"]})
    assert (status, told["code"]) == (507, "output_failed")
    assert "1000000000000 MB are needed" in told["error"]
    assert service.upload(b"x")[0] == 507
    service.stop()


def test_uploads_take_no_more_room_than_they_may(tmp_path):
    service = Serving(tmp_path, upload_bytes=1000)
    assert service.upload(bytes(900))[0] == 201
    status, told = service.upload(bytes(200))
    assert (status, told["code"]) == (507, "output_failed")
    assert len([*(service.house.folder / "uploads").iterdir()]) == 1
    service.stop()


def test_a_service_that_ended_is_followed_by_one_that_gives_the_results(tmp_path):
    given = job(tmp_path)["input"]
    held = threading.Event()
    made = HandMade(each=lambda done: held.wait(20))
    held.set()
    first = Serving(tmp_path, model(made))
    _, done = first.ask("POST", "/runsync", {"input": given}, browser=BROWSER)
    held.clear()
    _, running = first.ask("POST", "/run", {"input": given}, browser=BROWSER)
    _, waiting = first.ask("POST", "/run", {"input": given}, browser=BROWSER)
    second = Serving(tmp_path)  # as after kill -9: nobody told the first to end
    assert second.ask("GET", f"/status/{done['id']}") == (200, done)
    assert second.send("GET", f"/results/{done['id']}.mp4")[0] == 200
    for name in (running["id"], waiting["id"]):
        _, told = second.ask("GET", f"/status/{name}")
        assert (told["status"], told["output"]) == ("FAILED", {"code": "lost"})
    _, listed = second.ask("GET", "/jobs", browser=BROWSER)
    assert [one["id"] for one in listed["jobs"]] == [waiting["id"], running["id"], done["id"]]
    held.set()
    for service in (first, second):
        service.stop()


@pytest.mark.parametrize(
    "changes",
    [
        {"created_at": None}, {"created_at": float("nan")}, {"began_at": "x"}, {"ended_at": "x"},
        {"input": []}, {"output": 5}, {"output": {"a": float("inf")}}, {"owner": [1]},
        {"error": [1]}, {"status": []}, {"model": None}, {"action": 1}, {"id": 5}, "[" * 100_000,
    ],
)  # fmt: skip
def test_a_record_that_was_damaged_is_left_out_and_the_others_are_there(home, changes):
    records = Records(home, lambda: 2000.0)
    done, damaged = ended(records, 1), ended(records, 2)
    path = home.folder / "jobs" / f"{damaged}.json"
    if isinstance(changes, dict):
        changes = json.dumps(json.loads(path.read_text()) | changes)
    path.write_text(changes)
    again = Records(home, lambda: 2000.0)
    assert (done in again, damaged in again) == (True, False)


def test_records_with_stills_in_them_take_no_more_memory_than_they_may(home, monkeypatch):
    monkeypatch.setattr("engine.server.records._MOST_BYTES", 5000)
    records = Records(home, lambda: 2000.0)
    names = [ended(records, n, size=1, output={"stills": "x" * 2000}) for n in (1, 2, 3)]
    for known in (records, Records(home, lambda: 2000.0)):
        known.expire()
        assert [name in known for name in names] == [False, True, True]


def test_an_upload_that_a_job_needs_is_not_removed_before_the_job_has_ended(tmp_path):
    made = HandMade()
    service = Serving(tmp_path, model(made))
    (tmp_path / "media").mkdir()
    given = job(tmp_path / "media")["input"]
    _, kept = service.upload(base64.b64decode(given.pop("image_base64")))
    held = service.service.uploads
    held.hold((kept["id"],))
    status, told = service.ask("DELETE", f"/uploads/{kept['id']}")
    assert (status, told["code"]) == (409, "in_use")
    held.release((kept["id"],))
    assert service.ask("DELETE", f"/uploads/{kept['id']}")[0] == 204
    service.stop()


def test_a_list_of_jobs_tells_what_is_long_in_short(tmp_path):
    service = Serving(tmp_path)
    owner = owner_of(BROWSER)
    long = {"masks": "x" * 10_000, "seed": 3}
    done = ended(service.records, 1, owner=owner, output=long, ended_at=4e9)
    _, listed = service.ask("GET", "/jobs", browser=BROWSER)
    assert listed["jobs"][0]["output"] == {"masks": "<10000 characters>", "seed": 3}
    assert service.ask("GET", f"/status/{done}")[1]["output"] == long
    service.stop()
