"""Clips into buckets that answer late, at length, wrongly or not at all."""

import socket
import struct
import threading
from queue import SimpleQueue

import pytest

from engine.errors import Cancelled, DeadlineExceeded, OutputError
from engine.jobs.job import Bucket
from engine.worker.delivery import deliver
from engine.worker.progress import JobProgress
from engine.worker.upload import upload
from tests.support.hostile_server import (
    ADDRESS,
    NAME,
    Server,
    first_then_again,
    redirect,
    reply,
)

SECRET = "a-secret-that-nobody-may-see"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
BODY = bytes(range(256)) * 4000  # four pieces, more than sockets buffer in one
MUCH = b"a" * 60_000


def nothing():
    """A check that lets the job go on."""


@pytest.fixture
def clip(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(BODY)
    return path


def jobs(scheme="http", name="clips"):
    return Bucket(f"{scheme}://{NAME}", "key", SECRET, name)


def taking(then, arrived=None):
    """An answer that takes the whole body before it does `then`."""

    def answer(sock):
        sock.sendall(CONTINUE)
        left, taken = len(BODY), []
        while left and (piece := sock.recv(min(left, 1 << 16))):
            left -= len(piece)
            taken.append(piece)
        if arrived is not None:
            arrived.append(b"".join(taken))
        then(sock)

    return answer


def in_turn(*answers):
    """One answer after the other, the last one for ever."""
    left = [*answers]
    return lambda sock: (left.pop(0) if len(left) > 1 else left[0])(sock)


def refused(code, status="403 Forbidden", more=b""):
    return reply(b"<Error><Code>" + code + b"</Code>" + more + b"</Error>", status)


def reset(sock):
    """Ends a connection as a machine does that is gone."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def put(clip, answer, timeout_s=20.0, check=nothing, bucket=None, tls=False):
    with Server({"*": answer}, tls=tls) as server:
        bucket = bucket or jobs("https" if tls else "http")
        try:
            return upload(clip, bucket, "job/1", check, server.network(), timeout_s), server
        except OutputError as error:
            return str(error), server


@pytest.mark.parametrize("tls", [False, True])
def test_a_clip_is_put_whole_at_the_checked_address_with_a_signature(clip, tls):
    arrived = []
    url, server = put(clip, taking(reply(), arrived), tls=tls)
    assert arrived == [BODY]
    scheme = "https" if tls else "http"
    assert url.startswith(f"{scheme}://{NAME}/clips/job_1/")
    assert server.dialled == [(ADDRESS, 443 if tls else 80)]
    asked, *head = server.requests[0].split("\r\n")
    method, path, version = asked.split()
    assert (method, version) == ("PUT", "HTTP/1.1")
    assert path.partition("?")[0] == url.removeprefix(f"{scheme}://{NAME}").partition("?")[0]
    assert "X-Amz-Signature=" in path
    assert {
        f"Host: {NAME}", "Content-Type: video/mp4", f"Content-Length: {len(BODY)}",
        "Expect: 100-continue", "Connection: close",
    } < {*head}  # fmt: skip
    assert SECRET not in server.requests[0] + url


def test_a_bucket_that_does_not_know_continue_gets_the_clip_all_the_same(clip):
    """It waits for the body without a word, and we do not wait for long."""
    arrived = []

    def answer(sock):
        left = len(BODY)
        while left:
            piece = sock.recv(min(left, 1 << 16))
            left -= len(piece)
            arrived.append(piece)
        reply()(sock)

    assert put(clip, answer)[0].startswith("http://")
    assert b"".join(arrived) == BODY


@pytest.mark.parametrize(
    ("answer", "reason", "asked"),
    [
        (refused(b"NoSuchBucket", "404 Not Found"), "NoSuchBucket", 1),
        (refused(b"a." * 40_000), "it answers 403", 1),
        (refused(b"X" * 61), "it answers 403", 1), (refused(b"evil\n<b>"), "it answers 403", 1),
        (refused(b"AccessDenied", more=b"x" * 1_000_000), "AccessDenied", 1),
        (reply(b"{}", "400 " + "r" * 3000), "it answers 400", 1),
        (first_then_again(b"HTTP/1.1 403 No\r\n\r\n", MUCH), "it answers 403", 1),
        (redirect("http://169.254.169.254/", "307 Temporary Redirect"), "it answers 307", 1),
        (redirect(f"http://{NAME}/else", "301 Moved"), "it answers 301", 1),
        (refused(b"PermanentRedirect", "301 M", b"<Endpoint>10.0.0.1</Endpoint>"),
         "PermanentRedirect", 1),
        (refused(b"SlowDown", "503 Slow"), "SlowDown", 3),
        (reply(b"", "500 x"), "it answers 500", 3),
        (first_then_again(b"HTTP/1.1 200 OK\r\n", b"A: b\r\n"), "HTTPException", 3),
        (first_then_again(b"HTTP/1.1 200 OK\r\nA: ", MUCH), "LineTooLong", 3),
        (first_then_again(b"HTTP/1.1 ", MUCH), "BadStatusLine", 3),
        (first_then_again(b"", CONTINUE), "TooMuch", 3),
        (lambda sock: sock.sendall(b"hello\r\n\r\n"), "BadStatusLine", 3),
        (lambda sock: sock.sendall(b"\x16\x03\x01" + bytes(99)), "BadStatusLine", 3),
        (reset, "ConnectionResetError", 3),
    ],
)  # fmt: skip
def test_a_hostile_answer_is_a_short_reason_after_few_attempts(clip, answer, reason, asked):
    told, server = put(clip, answer)
    assert told == f"The bucket did not take the clip ({reason})."
    assert len(server.requests) == asked
    assert {address for address, _ in server.dialled} == {ADDRESS}


@pytest.mark.parametrize("whole", [False, True], ids=["at once", "after the clip"])
def test_an_endless_answer_is_read_as_far_as_its_reason(clip, whole):
    sent = []

    def answer(sock):
        sock.sendall(b"HTTP/1.1 400 Bad\r\n\r\n")
        while True:
            sock.sendall(MUCH)
            sent.append(len(MUCH))

    told, _ = put(clip, taking(answer) if whole else answer)
    assert told == "The bucket did not take the clip (it answers 400)."
    assert sum(sent) < 20_000_000  # what the two sockets hold, and no gigabytes


@pytest.mark.parametrize(
    "answer",
    [
        first_then_again(b""), taking(first_then_again(b"")), taking(first_then_again(b"HTTP/1.1")),
        taking(first_then_again(b"HTTP/1.1 200 OK\r\n", b"A", pause_s=0.01)),
        taking(first_then_again(b"", CONTINUE, pause_s=0.01)),
    ],
    ids=["silent", "no answer", "half a line", "drops of headers", "continue"],
)  # fmt: skip
def test_a_slow_bucket_ends_with_the_time_for_the_clip(clip, answer):
    told, server = put(clip, answer, timeout_s=0.5)
    assert told == "The bucket did not take the clip (it takes too long)."
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "first",
    [
        refused(b"SlowDown", "503 Slow Down"), reset, taking(reset), lambda sock: None,
        taking(reply(b"", "429 Too Many")),
        lambda sock: (sock.sendall(CONTINUE), sock.recv(9), reset(sock)),
    ],
    ids=["busy", "reset", "reset after the clip", "hangs up", "too many", "reset in the midst"],
)  # fmt: skip
def test_what_another_attempt_mends_is_tried_again(clip, first):
    arrived = []
    url, server = put(clip, in_turn(first, taking(reply(), arrived)))
    assert url.startswith("http://")
    assert arrived == [BODY]
    assert len(server.requests) == 2


def test_a_refusal_before_the_clip_saves_sending_it(clip):
    got = SimpleQueue()

    def answer(sock):
        refused(b"QuotaExceeded")(sock)
        got.put(sock.recv(1 << 16))

    told, _ = put(clip, answer)
    assert told == "The bucket did not take the clip (QuotaExceeded)."
    assert got.get(timeout=30) == b""


@pytest.fixture
def large(tmp_path):
    """A clip of more than two sockets hold, which takes no room on the disk."""
    path = tmp_path / "large.mp4"
    with path.open("wb") as file:
        file.truncate(200_000_000)
    return path


def test_a_bucket_that_stops_reading_is_not_waited_for(large):
    told, _ = put(large, first_then_again(CONTINUE), timeout_s=0.5)
    assert told == "The bucket did not take the clip (it takes too long)."


def test_a_refusal_in_the_midst_of_the_clip_is_heard(large):
    over = threading.Event()

    def answer(sock):
        sock.sendall(CONTINUE)
        sock.recv(1 << 16)
        refused(b"EntityTooLarge", "400 Bad")(sock)
        over.wait(30)  # closing with the clip unread would take the answer back

    assert put(large, answer)[0] == "The bucket did not take the clip (EntityTooLarge)."
    over.set()


def test_a_bucket_in_another_region_is_asked_once_more_at_the_same_address(clip):
    arrived = []
    moved = refused(b"AuthorizationHeaderMalformed", "400 Bad", b"<Region>eu-west-1</Region>")
    url, server = put(clip, in_turn(moved, taking(reply(), arrived)))
    assert arrived == [BODY]
    assert "%2Feu-west-1%2Fs3%2F" in server.requests[1]
    assert "%2Feu-west-1%2Fs3%2F" in url
    told, server = put(clip, reply(b"", "301 M", head="x-amz-bucket-region: eu-west-1\r\n"))
    assert told == "The bucket did not take the clip (it answers 301)."
    assert len(server.requests) == 2
    told, server = put(clip, reply(b"", "301 M", head=f"x-amz-bucket-region: {'e' * 900}/\r\n"))
    assert len(server.requests) == 1


class Counted:
    """A check that ends the job when it is asked for the nth time."""

    def __init__(self, count):
        self.left = count

    def __call__(self):
        self.left -= 1
        if self.left < 0:
            raise Cancelled("The job was called off.")


@pytest.mark.parametrize(
    "answer",
    [
        first_then_again(b""), first_then_again(CONTINUE), taking(first_then_again(b"")),
        reply(b"", "503 Slow"),
    ],
    ids=["before the clip", "in the midst of it", "after it", "between attempts"],
)  # fmt: skip
def test_a_job_is_called_off_whatever_the_upload_waits_for(clip, answer):
    with Server({"*": answer}) as server, pytest.raises(Cancelled):
        upload(clip, jobs(), "job", Counted(8), server.network())


def test_the_jobs_deadline_ends_an_upload(clip):
    times = iter(range(10_000))
    progress = JobProgress(print, 60, now=lambda: next(times) * 10.0)
    progress.begin()
    with (
        Server({"*": first_then_again(CONTINUE)}) as server,
        pytest.raises(DeadlineExceeded, match="the 60 s"),
    ):
        deliver(clip, "job", "url", jobs(), progress.check, network=server.network())


def test_a_name_that_leads_inside_since_it_was_checked_is_not_asked(clip):
    with Server({"*": taking(reply())}) as server:
        inside = server.network({NAME: [["10.0.0.7"]]})
        with pytest.raises(OutputError, match="is not on the public Internet"):
            upload(clip, jobs(), "job", nothing, inside)
        with pytest.raises(OutputError, match="cannot be found"):
            upload(clip, jobs(), "job", nothing, server.network({}))
        assert server.dialled == []


def test_a_certificate_of_somebody_else_is_refused_at_once(clip):
    with Server({"*": taking(reply())}, tls=True) as server:
        untrusted = server.network(trusted=False)
        with pytest.raises(OutputError, match=r"\(its certificate is refused\)\.$"):
            upload(clip, jobs("https"), "job", nothing, untrusted)
        assert len(server.dialled) == 1


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:9/", "not an address", "http://", "ftp://127.0.0.1/"]
)
def test_an_upload_that_fails_says_why_without_address_or_key(clip, url):
    bucket = Bucket(url, "key-id-4711", SECRET, "clips", is_operators=True)
    with pytest.raises(OutputError, match=r"^The bucket did not take the clip \(.+\)\.$") as told:
        upload(clip, bucket, "job", nothing)
    assert told.value.__cause__ is None
    assert "127.0.0.1" not in str(told.value)
    assert "4711" not in str(told.value)


def test_a_long_id_of_a_job_makes_a_short_name(clip):
    with Server({"*": taking(reply())}) as server:
        url = upload(clip, jobs(), "../" * 50_000, nothing, network=server.network())
    assert len(url) < 1000
    assert ".." not in url


def test_a_clip_that_no_bucket_takes_is_in_the_reply_with_a_bounded_warning(clip):
    with Server({"*": refused(b"b." * 40_000)}) as server:
        sent = deliver(clip, "job", "url", jobs(), nothing, network=server.network())
    assert sent.key == "video"
    assert sent.warnings == (
        "The bucket did not take the clip (it answers 403). The clip is in the reply instead.",
    )


def test_a_server_that_expects_nothing_gets_the_clip_at_once(clip):
    arrived = []
    unknown = reply(b"", "417 Expectation Failed")
    url, server = put(clip, in_turn(unknown, taking(reply(), arrived)))
    assert url.startswith("http://")
    assert arrived == [BODY]
    assert [("Expect" in request) for request in server.requests] == [True, False]
    told, server = put(clip, unknown)
    assert told == "The bucket did not take the clip (it answers 417)."
    assert len(server.requests) == 2


def test_a_clip_that_is_gone_is_no_fault_of_the_bucket(clip):
    clip.unlink()
    told, server = put(clip, taking(reply()))
    assert told == "The clip cannot be read: No such file or directory."
    assert server.requests == []


def test_a_clip_that_is_removed_meanwhile_arrives_all_the_same(clip):
    arrived = []

    def first(sock):
        clip.unlink()
        reply(b"", "503 Slow")(sock)

    url, _ = put(clip, in_turn(first, taking(reply(), arrived)))
    assert url.startswith("http://")
    assert arrived == [BODY]
