"""What strangers send: bodies too large, too slow or broken, tricks with names, silent sockets."""

import base64
import contextlib
import http.client
import json
import socket
import time

import pytest

from engine.server import protocol
from engine.server.body import JSON_BYTES
from tests.support.services import BROWSER, Serving, model, multipart
from tests.support.workers import HandMade, job

SCRIPT = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def made():
    return HandMade()


@pytest.fixture(scope="module")
def service(tmp_path_factory, made):
    started = Serving(tmp_path_factory.mktemp("service"), model(made))
    yield started
    started.stop()


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return job(tmp_path_factory.mktemp("media"))["input"]


def files(service):
    return sorted(path.name for path in (service.house.folder / "uploads").iterdir())


@pytest.mark.parametrize(
    "path",
    [
        "/status/..%2f..%2fetc%2fpasswd", "/status/%00", "/stream/../x", "/preview/..",
        *(f"/status/{name}" for name in ("0" * 31, "0" * 32, "0" * 33, "G" * 32, "A" * 32)),
        "/results/../jobs/x.json", "/results/..%2fjobs%2fx.mp4", f"/results/{'0' * 32}",
        f"/results/{'0' * 32}.mp4", f"/results/{'0' * 32}.json", "/preview/" + "é" * 32,
        "/examples/preview/../../config.py", "/examples/preview/dance.npz", "/examples//etc/passwd",
        "/examples/preview%2fdancer.png%00",
    ],
)  # fmt: skip
def test_an_id_that_is_none_of_ours_names_nothing(service, path):
    status, told = service.ask("GET", path.replace("é", "%C3%A9"))
    assert status == 404
    assert told["error"].endswith(".")


def test_tricks_in_ids_of_uploads_and_jobs_remove_nothing(service):
    for name in ("..", "%2e%2e%2fjobs", "0" * 32, "lock", "*"):
        for method, path in (("DELETE", "uploads"), ("DELETE", "jobs"), ("POST", "cancel")):
            assert service.ask(method, f"/{path}/{name}", browser=BROWSER)[0] in (404, 405)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"image_path": "/etc/passwd"}, "image_path names a file of this machine"),
        ({"video_path": "../x.mp4"}, "video_path names a file of this machine"),
        ({"references": [{"path": "a.png"}]}, "path names a file of this machine"),
        ({"reference_path": ["a.png"]}, "reference_path names a file of this machine"),
        ({"image_path": "upload:../jobs"}, "There is no upload of this id here"),
        ({"image_path": f"upload:{'0' * 32}"}, "There is no upload of this id here"),
        ({"image_path": "example:../config.py"}, "There is no example of this name here"),
    ],
)
def test_no_file_of_this_machine_can_be_named(service, given, fields, sentence):
    status, told = service.ask("POST", "/run", {"input": given | fields})
    assert status in (400, 404)
    assert told["error"].startswith(sentence)


def test_nor_by_an_address_of_a_file_or_in_a_workflow(service, given):
    without = {name: value for name, value in given.items() if name != "image_base64"}
    for picture in ("file:///etc/passwd", f"file://{service.house.folder}/jobs"):
        _, told = service.ask("POST", "/runsync", {"input": without | {"image_url": picture}})
        assert (told["status"], told["output"]) == ("FAILED", {"code": "bad_request"})
        assert "names no file in an input folder" in told["error"]


def test_folders_that_the_owner_opens_are_open_and_no_others(tmp_path, given):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(base64.b64decode(given["image_base64"]))
    (tmp_path / "b.png").write_bytes(base64.b64decode(given["image_base64"]))
    service = Serving(tmp_path, inputs=(tmp_path / "in",))
    without = {name: value for name, value in given.items() if name != "image_base64"}
    ended = {}
    for name in ("a.png", "../b.png", str(tmp_path / "b.png")):
        _, told = service.ask("POST", "/runsync", {"input": without | {"image_path": name}})
        ended[name] = told["status"]
    assert [*ended.values()] == ["COMPLETED", "FAILED", "FAILED"]
    service.stop()


def test_script_in_prompts_and_names_comes_back_as_json_and_text(service, given, made):
    status, kept = service.upload(b"x" * 10, f"..\\a/%22{SCRIPT}\x07.png")
    assert (status, kept["bytes"]) == (201, 10)
    assert kept["name"] == "script>?.png"  # without its folders
    _, told = service.ask(
        "POST", "/runsync", {"input": given | {"prompt": SCRIPT, SCRIPT: 1}}, browser=BROWSER
    )
    assert told["status"] == "COMPLETED"
    assert made.requests[-1].settings.prompt == SCRIPT
    status, headers, body = service.send("GET", "/jobs", headers={"X-Browser": BROWSER})
    assert headers["content-type"] == "application/json"
    assert headers["x-content-type-options"] == "nosniff"
    assert json.loads(body)["jobs"][0]["input"]["prompt"] == SCRIPT
    _, headers, body = service.send("GET", f"/{SCRIPT.replace('<', '%3C')}")
    assert (headers["content-type"], SCRIPT.encode() in body) == ("application/json", False)


def test_a_body_that_is_no_json_is_refused_whatever_it_says_it_is(service):
    sent = json.dumps({"input": {"action": "health"}})
    for kind in (
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data",
        "",
        "json",
    ):
        status, _, said = service.send("POST", "/run", sent, {"Content-Type": kind})
        assert (status, json.loads(said)["code"]) == (415, "not_json")
    for body in (b"", b"{", b"\xff\xfe{}", b"[" * 200_000, b'{"input": ' + b"9" * 6000 + b"}"):
        status, _, said = service.send("POST", "/run", body, {"Content-Type": "application/json"})
        assert (status, json.loads(said)["code"]) == (400, "bad_request")


def test_a_body_of_a_hundred_megabytes_is_refused_by_its_length_and_by_its_count(service):
    head = "POST /run HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", service.port), 30) as sock:
        sock.sendall(f"{head}Content-Length: 100000000\r\n\r\n".encode())
        assert sock.recv(4096).startswith(b"HTTP/1.1 413 ")
    with socket.create_connection(("127.0.0.1", service.port), 30) as sock:
        sock.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        piece = b"100000\r\n" + b"x" * 2**20 + b"\r\n"
        for _ in range(JSON_BYTES // 2**20 + 1):
            sock.sendall(piece)
        assert sock.recv(4096).startswith(b"HTTP/1.1 413 ")
    assert service.ask("GET", "/health")[0] == 200


def test_an_upload_is_kept_as_it_was_sent_and_can_be_named_by_a_job(service, given, made):
    picture = base64.b64decode(given["image_base64"])
    status, kept = service.upload(picture)
    assert (status, kept["bytes"], kept["name"]) == (201, len(picture), "me.png")
    path = service.house.folder / "uploads" / kept["id"]
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (picture, 0o600)
    without = {name: value for name, value in given.items() if name != "image_base64"}
    _, told = service.ask("POST", "/runsync", {"input": without | {"image_path": kept["medium"]}})
    assert told["status"] == "COMPLETED"
    assert made.requests[-1].image.name == "image_path.png"
    assert service.ask("DELETE", f"/uploads/{kept['id']}")[0] == 204
    status, told = service.ask("POST", "/run", {"input": without | {"image_path": kept["medium"]}})
    assert (status, told["code"]) == (404, "unknown")


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body[:-20],
        lambda body: body[40:],
        lambda body: body.replace(b'filename="me.png"', b""),
        lambda body: body.replace(b"\r\n\r\nabc", b"\r\nabc"),
        lambda body: body.replace(b"BOUNDARY", b"OTHER"),
        lambda body: body.replace(b"x/y", b"x" * 9000),
        lambda body: b"",
    ],
)
def test_a_broken_upload_leaves_nothing(service, change):
    before = files(service)
    body, headers = multipart(b"abc" * 1000)
    status, _, said = service.send("POST", "/uploads", change(body), headers)
    assert (status, json.loads(said)["code"]) == (400, "bad_upload")
    assert files(service) == before
    for kind in ("multipart/form-data", "application/json", 'multipart/form-data; boundary="a b"'):
        assert service.send("POST", "/uploads", body, {"Content-Type": kind})[0] in (400, 415)


def test_a_form_that_another_site_could_send_is_taken_by_no_other_route(service):
    body, headers = multipart(b"x")
    for path in ("/run", "/runsync"):
        assert service.send("POST", path, body, headers)[0] == 415


def test_fifty_connections_that_say_nothing_keep_nobody_out_and_are_closed(service, monkeypatch):
    monkeypatch.setattr(protocol, "HEAD_S", 1.0)
    monkeypatch.setattr(protocol, "_LOOK_S", 0.2)
    silent = [socket.create_connection(("127.0.0.1", service.port), 30) for _ in range(50)]
    for number, sock in enumerate(silent):
        sock.sendall(b"GET /health HTTP/1.1\r\nHost:"[: number % 28])  # some begin
    began = time.monotonic()
    assert service.ask("GET", "/health")[0] == 200
    assert time.monotonic() - began < 5
    for sock in silent:
        sock.settimeout(20)
        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(100) == b""
        sock.close()


def test_a_connection_that_dribbles_its_head_is_closed_too(service, monkeypatch):
    monkeypatch.setattr(protocol, "HEAD_S", 0.5)
    monkeypatch.setattr(protocol, "_LOOK_S", 0.1)
    with socket.create_connection(("127.0.0.1", service.port), 20) as sock, pytest.raises(OSError):
        sock.sendall(b"GET /health HTTP/1.1\r\n")
        for number in range(200):
            sock.sendall(f"x{number}: y\r\n".encode())
            time.sleep(0.05)


def test_a_client_that_reads_nothing_is_given_up(service, given, monkeypatch):
    monkeypatch.setattr(protocol, "READ_S", 0.5)
    monkeypatch.setattr(protocol, "_LOOK_S", 0.1)
    _, told = service.ask("POST", "/runsync", {"input": given | {"output": "url"}})
    service.records.clip(told["id"]).write_bytes(bytes(40 * 2**20))
    with socket.create_connection(("127.0.0.1", service.port), 20) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.sendall(f"GET /results/{told['id']}.mp4 HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        ends = time.monotonic() + 20
        while len(service.server.server_state.connections) == 0 and time.monotonic() < ends:
            time.sleep(0.02)
        while len(service.server.server_state.connections) and time.monotonic() < ends:
            time.sleep(0.05)
        assert len(service.server.server_state.connections) == 0


def test_what_is_no_http_is_answered_and_ends_nothing(service):
    for said in (b"\x16\x03\x01\x02", b"GET\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"\r\n" * 5000,
                 b"GET /" + b"x" * 70000, b"POST /run HTTP/1.1\r\nHost: localhost\r\n"
                 b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"):  # fmt: skip
        with socket.create_connection(("127.0.0.1", service.port), 20) as sock:
            sock.sendall(said)
            sock.shutdown(socket.SHUT_WR)
            answer = sock.recv(4096)
            assert answer == b"" or answer.split()[1] in (b"400", b"421", b"415")
    assert service.ask("GET", "/health")[0] == 200


def test_other_methods_are_told_so(service):
    for method, path in (
        ("PUT", "/run"),
        ("GET", "/run"),
        ("DELETE", "/health"),
        ("PATCH", "/jobs"),
    ):
        status, told = service.ask(method, path)
        assert status in (404, 405)
        assert told["error"].endswith(".")


def test_an_upload_in_small_pieces_with_half_a_boundary_in_it_is_whole(service):
    contents = (b"\r\n--xxBOUNDARYx" + b"\r\n--" + b"a" * 7) * 50
    body, headers = multipart(contents)
    asked = http.client.HTTPConnection("127.0.0.1", service.port, timeout=30)
    pieces = (body[at : at + 11] for at in range(0, len(body), 11))
    asked.request("POST", "/uploads", pieces, headers, encode_chunked=True)
    kept = json.loads(asked.getresponse().read())
    assert (service.house.folder / "uploads" / kept["id"]).read_bytes() == contents
    asked.close()


def test_half_a_character_in_a_job_is_told_and_listed_as_json(service, given):
    half = {"action": "\ud800", "prompt": "\udc00", "\ud83d": 1}
    status, told = service.ask("POST", "/runsync", {"input": given | half}, browser=BROWSER)
    assert (status, told["status"], told["action"]) == (200, "FAILED", "\ud800")
    status, listed = service.ask("GET", "/jobs", browser=BROWSER)
    assert (status, listed["jobs"][0]["input"]["prompt"]) == (200, "\udc00")
    assert service.ask("DELETE", f"/jobs/{told['id']}", browser=BROWSER)[0] == 204


def test_a_job_that_is_nested_deep_ends_in_a_sentence_and_is_remembered_in_short(service, given):
    deep = json.loads("[" * 500 + "]" * 500)
    status, told = service.ask(
        "POST", "/runsync", {"input": given | {"workflow": deep}}, browser=BROWSER
    )
    assert (status, told["status"], told["output"]) == (200, "FAILED", {"code": "bad_request"})
    _, listed = service.ask("GET", "/jobs", browser=BROWSER)
    assert "<nested too deep>" in json.dumps(listed["jobs"][0]["input"]["workflow"])
    assert service.ask("DELETE", f"/jobs/{told['id']}", browser=BROWSER)[0] == 204


def test_the_service_names_its_routes_whole_in_what_it_refuses(service, given):
    status, told = service.ask("POST", "/run", {"input": given, "webhook": "http://me.example/"})
    assert (status, told["code"]) == (400, "bad_request")
    assert told["error"].endswith("Ask GET /status/ID, or listen to GET /stream/ID.")
