"""Addresses that answer: what arrives whole, and every way in which it may not arrive."""

import dataclasses
import gzip
import socket
import threading
import time
from functools import partial

import pytest

from engine.errors import BadMedia, BadRequest, Cancelled
from engine.jobs.fetch import Wanted, fetch_url
from tests.support.hostile_server import (
    ADDRESS,
    NAME,
    Server,
    chunked,
    first_then_again,
    redirect,
    reply,
)
from tests.support.strangers import LARGE, MP4, PNG, SMALL, picture, refusal

URL = f"http://{NAME}/a?token=secret"
PNG_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(PNG), PNG)
OK = b"HTTP/1.1 200 OK\r\n"
CHUNKS = OK + b"Transfer-Encoding: chunked\r\n\r\n"
MUCH = b"a" * 60_000
BROKEN = "failed or broke off"


@pytest.fixture
def wanted(tmp_path):
    folder = tmp_path / "job"
    folder.mkdir()
    return Wanted("image_url", "picture", folder, SMALL)


def fetch(answers, wanted, url=URL, timeout_s=30.0):
    with Server(answers) as server:
        return fetch_url(url, wanted, server.network(), timeout_s)


@pytest.mark.parametrize(
    "answer",
    [
        reply(PNG), reply(PNG, length=""), chunked(b"%x\r\n%b\r\n0\r\n\r\n" % (len(PNG), PNG)),
        chunked(b"".join(b"1;x=y\r\n%c\r\n" % byte for byte in PNG) + b"0\r\nA: b\r\n\r\n"),
        reply(PNG, head="Content-Type: text/html\r\nContent-Encoding: aws-chunked\r\n"),
        lambda sock: [sock.sendall(PNG_ANSWER[k : k + 97]) for k in range(0, len(PNG_ANSWER), 97)],
    ],
    ids=["length", "end", "chunk", "chunks", "wrong headers", "drops"],
)  # fmt: skip
def test_a_picture_arrives_as_it_was_sent_and_is_named_by_its_content(wanted, answer):
    path = fetch({"/a": answer}, wanted)
    assert path == wanted.folder / "image_url.png"
    assert path.read_bytes() == PNG
    assert [*wanted.folder.iterdir()] == [path]


def test_the_request_asks_for_nothing_packed_and_carries_nothing_of_the_environment(
    wanted, monkeypatch
):
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with Server({"/a": reply(PNG, head="Set-Cookie: a=b\r\n")}) as server:
        fetch_url(URL, wanted, server.network())
        assert server.dialled == [(ADDRESS, 80)]
    assert server.requests == [
        f"GET /a?token=secret HTTP/1.1\r\nHost: {NAME}\r\nUser-Agent: scail-engine\r\n"
        "Accept: */*\r\nAccept-Encoding: identity\r\nConnection: close\r\n\r\n"
    ]


def test_redirects_are_followed_to_public_hosts_five_times(wanted):
    names = {NAME: [[ADDRESS]], "b.example.com": [["1.1.1.1"]]}
    answers = {"/a": redirect("/b"), "/b": redirect("//b.example.com/c", "301 Moved"),
               "/c": redirect("d?x", "307 T"), "/d": redirect(f"http://{NAME}/e", "308 P"),
               "/e": redirect("?y#z", "303 S"), "/f": reply(PNG)}  # fmt: skip
    with Server(answers) as server:
        said = refusal(BadMedia, wanted, lambda: fetch_url(URL, wanted, server.network(names), 5))
        assert said == "image_url redirects more than 5 times; send the last address."
        assert [address for address, _ in server.dialled] == [
            ADDRESS, ADDRESS, "1.1.1.1", "1.1.1.1", ADDRESS, ADDRESS,
        ]  # fmt: skip
    answers["/d"] = reply(PNG)
    with Server(answers) as server:
        assert fetch_url(URL, wanted, server.network(names), 5).read_bytes() == PNG
        assert [head.splitlines()[1] for head in server.requests] == [
            f"Host: {NAME}", f"Host: {NAME}", "Host: b.example.com", "Host: b.example.com",
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("to", "sentence"),
    [
        ("http://127.0.0.1/", "not on the public Internet"),
        ("http://169.254.169.254/latest/meta-data/", "not on the public Internet"),
        ("http://[::1]/", "not on the public Internet"), ("http://localhost/", "public Internet"),
        ("http://[::ffff:10.0.0.1]/", "not on the public Internet"),
        ("http://0x7f.1/", "as IP addresses are"), ("http://2130706433/", "as IP addresses are"),
        ("//inside.example.com/", "not on the public Internet"),
        (f"http://{NAME}:6379/", "names port 6379"), ("file:///etc/passwd", "not an http"),
        ("ftp://x.co/", "not an http"), (f"http://me:secret@{NAME}/", "user name"),
        ("http://[", "not a well-formed address"), ("http://x.co/\xff", "not a well-formed"),
    ],
)  # fmt: skip
def test_a_redirect_leads_nowhere_that_could_not_be_asked_for(wanted, to, sentence):
    names = {NAME: [[ADDRESS]], "inside.example.com": [["10.0.0.7"]]}

    def answer(sock):
        sock.sendall(b"HTTP/1.1 302 Found\r\nLocation: %b\r\n\r\n" % to.encode("latin-1"))

    with Server({"/a": answer}) as server:
        call = partial(fetch_url, URL, wanted, server.network(names), 5)
        said = refusal((BadRequest, BadMedia), wanted, call)
        assert said.startswith("the redirect of image_url")
        assert sentence in said
        assert server.dialled == [(ADDRESS, 80)]


def test_a_host_with_one_inner_address_among_public_ones_is_not_asked(wanted):
    with Server({"/a": reply(PNG)}) as server:
        network = server.network({NAME: [[ADDRESS, "10.0.0.1"]]})
        said = refusal(BadRequest, wanted, lambda: fetch_url(URL, wanted, network))
        assert said.startswith(f"image_url: the host {NAME} is not on the public Internet")
        assert server.dialled == []


def test_the_address_that_was_checked_is_the_one_that_is_asked(wanted):
    """A name server that answers otherwise the second time is not asked a second time."""
    with Server({"/a": reply(PNG)}) as server:
        fetch_url(URL, wanted, server.network({NAME: [[ADDRESS], ["127.0.0.1"]]}))
        assert server.dialled == [(ADDRESS, 80)]
    with Server({"/a": redirect("/b"), "/b": reply(PNG)}) as server:
        network = server.network({NAME: [[ADDRESS], ["127.0.0.1"]]})
        assert "public" in refusal_after(wanted, lambda: fetch_url(URL, wanted, network))
        assert server.dialled == [(ADDRESS, 80)]


def refusal_after(wanted, call):
    for path in wanted.folder.iterdir():
        path.unlink()
    return refusal(BadRequest, wanted, call)


def test_the_next_address_is_tried_where_one_does_not_answer(wanted):
    with Server({"/a": reply(PNG)}) as server:
        network = server.network({NAME: [["1.1.1.1", ADDRESS]]})
        real = network.connect

        def connect(address, port, timeout_s):
            sock = real(address, port, timeout_s)
            if address == "1.1.1.1":
                sock.close()
                raise ConnectionRefusedError("no")
            return sock

        half = dataclasses.replace(network, connect=connect)
        assert fetch_url(URL, wanted, half).read_bytes() == PNG
        none = dataclasses.replace(server.network({NAME: [["1.1.1.1"]]}), connect=connect)
        (wanted.folder / "image_url.png").unlink()
        said = refusal(BadMedia, wanted, lambda: fetch_url(URL, wanted, none))
        assert "the connection to media.example.com failed or broke off" in said


def test_tls_is_verified_against_the_name_and_not_the_address(wanted):
    url = f"https://{NAME}/a?token=secret"
    other = "https://other.example.com/a"
    names = {NAME: [[ADDRESS]], "other.example.com": [[ADDRESS]]}
    with Server({"/a": reply(PNG)}, tls=True) as server:
        assert fetch_url(url, wanted, server.network(names)).read_bytes() == PNG
        assert server.server_names == [NAME]
        assert server.dialled == [(ADDRESS, 443)]
        (wanted.folder / "image_url.png").unlink()
        for text, trusted, reason in ((other, True, "ostname mismatch"), (url, False, "self")):
            network = server.network(names, trusted)
            said = refusal(BadMedia, wanted, partial(fetch_url, text, wanted, network))
            assert "is refused: " in said
            assert reason in said
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (reply(PNG, length=2 * len(PNG)), "sent less than it announced"),
        (reply(PNG, length=100_001), LARGE), (reply(PNG, length=10**18), LARGE),
        (reply(PNG + 100_000 * b"a", length=""), LARGE),
        (first_then_again(OK + b"\r\n" + PNG, MUCH), LARGE),
        (first_then_again(OK + b"Content-Length: -1\r\n\r\n" + PNG, MUCH), LARGE),
        (first_then_again(OK + b"Content-Length: %b\r\n\r\n" % (b"9" * 5000) + PNG, MUCH), LARGE),
        (chunked(b"10\r\n" + PNG[:16]), BROKEN), (chunked(b"zz\r\n"), BROKEN),
        (chunked(b"fffffffffff\r\n" + PNG), BROKEN), (chunked(b"-ff\r\n" + PNG), "image_url"),
        (first_then_again(CHUNKS + b"-1\r\n", MUCH), "image_url"),
        (first_then_again(CHUNKS + b"0\r\n", b"A: b\r\n" * 99), LARGE),
        (first_then_again(CHUNKS, b"1;" + MUCH + b"\r\na\r\n"),
         "image_url"),
        (first_then_again(OK + b"A: ", MUCH), BROKEN), (first_then_again(OK, b"A: b\r\n"), BROKEN),
        (first_then_again(b"HTTP/1.1 ", MUCH), BROKEN),
        (first_then_again(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 99), LARGE),
        (lambda sock: None, BROKEN), (lambda sock: sock.sendall(b"hello\r\n\r\n"), BROKEN),
        (lambda sock: sock.sendall(b"HTTP/1.1 two\r\n\r\n"), BROKEN),
        (lambda sock: sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Le"), "is empty"),
        (lambda sock: sock.sendall(PNG), BROKEN),
        (reply(PNG, "404 Not Found"), "media.example.com answers 404"),
        (reply(PNG, "206 Partial"), "answers 206"), (reply(PNG, "500 secret"), "answers 500"),
        (reply(status="204 No Content"), "answers 204"), (reply(status="304 Same"), "answers 304"),
        (reply(), "image_url is empty; a JPEG"), (chunked(b"0\r\n\r\n"), "is empty"),
        (reply(gzip.compress(bytes(10_000_000)), head="Content-Encoding: gzip\r\n"), "with gzip"),
        (reply(b"<!DOCTYPE html><html>" + MUCH), "is a web page and not the file itself"),
        (reply(b"\n<html>"), "is a web page"), (reply(b"{}"), "is a file of another kind"),
        (reply(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "is a file of another kind"),
        (reply(b"#!/bin/sh\n"), "another kind"), (reply(b"\x89PNG"), "another kind"),
        (reply(b"\x7fELF" + bytes(99), head="Content-Type: image/png\r\n"), "another kind"),
        (reply(MP4), "image_url is a video; a JPEG, PNG, WebP, GIF or AVIF picture is expected."),
        (reply(b"\0\0\0\x18ftypheic" + bytes(40)), "is a HEIC picture"),
        (reply(picture("TIFF")), "another kind"), (redirect(""), "redirects more than 5 times"),
        (reply(status="302 Found"), "redirects more than 5 times"),
    ],
)  # fmt: skip
def test_a_hostile_answer_is_refused_and_leaves_nothing(wanted, answer, sentence):
    said = refusal((BadMedia, BadRequest), wanted, lambda: fetch({"/a": answer}, wanted))
    assert sentence in said
    assert "takes too long" not in said  # the limit of time was not waited for


@pytest.mark.parametrize(
    "answer",
    [
        first_then_again(b""), first_then_again(OK), first_then_again(OK + b"\r\n" + PNG[:40]),
        first_then_again(OK + b"\r\n" + PNG[:40], b"a", pause_s=0.01),
        first_then_again(OK, b"a", pause_s=0.01), first_then_again(b"", b"H", pause_s=0.01),
        first_then_again(OK + b"Content-Length: 9\r\n\r\n"),
        first_then_again(b"", b"HTTP/1.1 100 Continue\r\n\r\n", pause_s=0.01),
        first_then_again(CHUNKS, b"1\r\na\r\n", pause_s=0.01),
    ],
    ids=["silent", "no headers", "half a body", "drops of body", "drops of headers",
         "drops of status", "no body", "continue", "drops of chunks"],
)  # fmt: skip
def test_a_slow_answer_ends_with_the_time_for_the_whole_file(wanted, answer):
    call = partial(fetch, {"/a": answer}, wanted, timeout_s=0.3)
    assert "media.example.com takes too long" in refusal(BadMedia, wanted, call)


@pytest.mark.parametrize(
    "answer",
    [first_then_again(b""), first_then_again(OK + b"\r\n" + PNG[:40], b"a", pause_s=0.01)],
    ids=["silent", "drops"],
)
def test_a_download_is_called_off_whatever_it_waits_for(wanted, answer):
    asked = []

    def check():
        asked.append(1)
        if len(asked) > 5:
            raise Cancelled("The job was called off.")

    with Server({"/a": answer}) as server, pytest.raises(Cancelled):
        fetch_url(URL, wanted, server.network(), check=check)
    assert [*wanted.folder.iterdir()] == []


def test_the_time_of_all_redirects_together_is_limited(wanted):
    def slow_redirect(sock):
        time.sleep(0.15)
        redirect("/a")(sock)

    call = partial(fetch, {"/a": slow_redirect}, wanted, timeout_s=0.4)
    assert "takes too long" in refusal(BadMedia, wanted, call)


def test_a_server_that_is_silent_in_the_handshake_is_given_up(wanted):
    with socket.create_server(("127.0.0.1", 0)) as listener, Server({}) as server:
        port = listener.getsockname()[1]
        network = dataclasses.replace(
            server.network(),
            connect=lambda _, __, timeout_s: socket.create_connection(
                ("127.0.0.1", port), timeout_s
            ),
        )
        url = f"https://{NAME}/a"
        said = refusal(BadMedia, wanted, lambda: fetch_url(url, wanted, network, 0.3))
        assert "takes too long" in said


@pytest.mark.parametrize("waits_for", ["the name", "the connection", "the handshake"])
def test_a_download_is_called_off_before_it_is_connected(wanted, waits_for):
    """What cannot be interrupted is left to itself: neither name nor host ever answers."""
    asked, over = [], threading.Event()

    def check():
        asked.append(1)
        if len(asked) > 3:
            raise Cancelled("The job was called off.")

    def silent(*_):
        over.wait(30)
        raise OSError

    with socket.create_server(("127.0.0.1", 0)) as listener, Server({}) as server:
        port = listener.getsockname()[1]
        given = {
            "the name": {"resolve": silent},
            "the connection": {"connect": silent},
            "the handshake": {"connect": lambda *_: socket.create_connection(("127.0.0.1", port))},
        }[waits_for]
        network = dataclasses.replace(server.network(), **given)
        with pytest.raises(Cancelled):
            fetch_url(f"https://{NAME}/a", wanted, network, check=check)
    over.set()
