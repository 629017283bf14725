"""The addresses that are asked: every spelling of a place that is none of a stranger's business."""

import ipaddress
import socket
import threading

import pytest

from engine.errors import BadMedia, BadRequest
from engine.jobs.addresses import Target, is_public, parse_address, public_addresses, resolve_name

PUBLIC_4, PUBLIC_6 = "93.184.215.14", "2606:2800:21f:cb07:6820:80da:af6b:8b2c"


def refusal(text):
    with pytest.raises(BadRequest) as raised:
        parse_address(text, "image_url")
    return str(raised.value)


def names(answers):
    """A resolver that knows one answer and counts how often it is asked."""
    asked = []

    def resolve(host, port, timeout_s):
        asked.append((host, port))
        return answers

    return resolve, asked


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("https://example.com", Target("https", "example.com", 443, "/")),
        ("http://EXAMPLE.com:80/a.png", Target("http", "example.com", 80, "/a.png")),
        (" https://example.com/a?b=c/d&e#f\n", Target("https", "example.com", 443, "/a?b=c/d&e")),
        ("https://example.com./a", Target("https", "example.com", 443, "/a")),
        ("https://a-b_c.xn--3e0b707e/", Target("https", "a-b_c.xn--3e0b707e", 443, "/")),
        ("http://x.co/내 사.png", Target("http", "x.co", 80, "/%EB%82%B4%20%EC%82%AC.png")),
        ("http://x.co/100%25", Target("http", "x.co", 80, "/100%25")),
        (f"http://[{PUBLIC_6.upper()}]/", Target("http", PUBLIC_6, 80, "/")),
        ("https://x.co:80/", Target("https", "x.co", 80, "/")),
    ],
)  # fmt: skip
def test_an_address_is_taken_apart_once(text, want):
    assert parse_address(text, "image_url") == want


def test_the_host_header_names_the_port_only_where_it_is_unusual():
    assert Target("https", "x.co", 443, "/").authority == "x.co"
    assert Target("https", "x.co", 80, "/").authority == "x.co:80"
    assert Target("http", PUBLIC_6, 80, "/").authority == f"[{PUBLIC_6}]"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "missing"), (5, "of the type int"), (True, "of the type bool"),
        (["https://x.co/"], "of the type list"), ({"url": "https://x.co"}, "of the type dict"),
        (b"https://x.co/", "of the type bytes"), (float("nan"), "of the type float"),
        ("", "is empty"), (" \n", "is empty"), ("https://x.co/" + "a" * 5000, "characters"),
        ("file:///etc/passwd", "not an http or https address"),
        ("ftp://x.co/a.png", "not an http or https address"),
        ("gopher://x.co/_GET", "not an http or https address"),
        ("data:image/png;base64,iVBORw0KGgo=", "not an http or https address"),
        ("javascript:alert(1)", "not an http or https address"),
        ("-O/tmp/a", "not an http or https address"), ("/etc/passwd", "not an http or https"),
        ("x.co/a.png", "not an http or https address"), ("//x.co/a", "not an http or https"),
        ("https:///a.png", "names no host"), ("https://", "names no host"),
        ("https://./", "names no host"),
        ("https://me:secret@x.co/", "user name"), ("https://x.co@127.0.0.1/", "user name"),
        ("http://x.co:22/", "names port 22"), ("http://x.co:0/", "names port 0"),
        ("http://x.co:6379/", "names port 6379"), ("http://x.co:8080/", "names port 8080"),
        ("http://x.co:99999/", "well-formed"), ("http://x.co:8o/", "well-formed"),
        ("http://x.co:-80/", "well-formed"), ("http://[::1/", "well-formed"),
        ("http://x.co/\r\nHost: y.co", "control character"), ("http://x.co/\0", "control"),
        ("http://x.co/\x7f", "control character"), ("http://x.co\\@127.0.0.1/", "backslash"),
        ("http://x.co/\ud800", "well-formed"),
        ("http://b\u00fccher.de/", "beyond ASCII"), ("http://\u0435xample.com/", "beyond ASCII"),
        ("http://\uff11\uff12\uff17.0.0.1/", "beyond ASCII"),  # full-width digits
        ("http://127\u30020\u30020\u30021/", "beyond ASCII"),  # full stops of Chinese
        ("http://\u24db\u24de\u24d2al/", "beyond ASCII"),  # letters in circles
        ("http://\u212a.co/", "beyond ASCII"),  # the sign of kelvin, whose small letter is k
        ("http://a..co/", "as host names are"), ("http://-a.co/", "as host names are"),
        ("http://a-.co/", "as host names are"), ("http://a b.co/", "as host names are"),
        ("http://%31%32%37.0.0.1.co/", "as host names are"), ("http://a,b.co/", "as host names"),
        (f"http://{'a' * 64}.co/", "as host names are"), (f"http://{'ab.' * 90}co/", "as host"),
    ],
)  # fmt: skip
def test_what_is_no_address_is_refused_in_a_sentence_that_names_the_field(text, sentence):
    said = refusal(text)
    assert said.startswith("image_url")
    assert sentence in said
    assert "secret" not in said


@pytest.mark.parametrize(
    "host",
    [
        "127.1", "127.0.1", "0", "2130706433", "0x7f000001", "0x7f.1", "0x7f.0.0.0x1", "0177.0.0.1",
        "017700000001", "127.0.0.01", "127.0.0.1.0", "256.0.0.1", "4294967296", "1.2.3.0x",
        "[fe80::1%eth0]", "[fe80::1%25eth0]", "[::1%lo]", "[1.2.3.4]", "[v1.a]", "[]", "[x.co]",
    ],
)  # fmt: skip
def test_odd_spellings_of_ip_addresses_are_refused_before_anybody_is_asked(host):
    said = refusal(f"http://{host}/")
    assert "not written as IP addresses are" in said or "well-formed" in said or "no host" in said


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST.", "a.localhost", "metadata", "metadata.google.internal", "nas.local",
     "printer.lan", "redis", "router.home.arpa", "wiki.corp", "1.0.0.127.in-addr.arpa"],
)  # fmt: skip
def test_names_of_no_public_host_are_refused_before_anybody_is_asked(host):
    assert "not on the public Internet" in refusal(f"http://{host}/")


INSIDE = [
    "0.0.0.0", "0.1.2.3", "10.0.0.1", "100.64.0.1", "100.100.100.200", "127.0.0.1", "127.8.9.1",
    "168.63.129.16", "169.254.169.254", "169.254.170.2", "172.16.0.1", "172.31.255.255",
    "192.0.0.192", "192.0.2.1", "192.88.99.1", "192.168.1.1", "198.18.0.1", "198.51.100.1",
    "203.0.113.1", "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255",
    "::", "::1", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:93.184.215.14", "::ffff:0:127.0.0.1",
    "64:ff9b::7f00:1", "64:ff9b:1::a00:1", "100::1", "2001::1", "2001:0:4136:e378::1", "2001:2::1",
    "2001:10::1", "2001:20::1", "2001:db8::1", "2002:7f00:1::", "2002:c0a8:101::1", "3fff::1",
    "5f00::1", "fc00::1", "fd00:ec2::254", "fd20:ce::254", "fe80::1", "fec0::1", "ff02::1",
    "4000::1",
]  # fmt: skip


@pytest.mark.parametrize("address", [*INSIDE, "fe80::1%eth0", f"{PUBLIC_6}%eth0", "x.co", "", "1"])
def test_addresses_inside_are_not_public(address):
    assert is_public(address) is False


@pytest.mark.parametrize("address", INSIDE)
def test_an_address_inside_is_refused_as_a_number_and_behind_a_name(address):
    host = f"[{address}]" if ":" in address else address
    resolve, asked = names([PUBLIC_4, address])
    literal, named = parse_address(f"http://{host}/", "image_url"), Target("http", "x.co", 80, "/")
    for target in (literal, named):
        with pytest.raises(BadRequest) as raised:
            public_addresses(target, "image_url", resolve, 1)
        want = f"the host {target.host} is not on the public Internet; nothing else is asked."
        assert str(raised.value) == f"image_url: {want}"
    assert asked == [("x.co", 80)]  # a number asks nobody


def test_nothing_is_public_here_that_python_calls_private():
    edges = [edge for first in range(0, 2**32, 2**24) for edge in (first, first + 2**24 - 1)]
    for place in edges:
        ip = ipaddress.IPv4Address(place)
        assert not is_public(str(ip)) or ip.is_global


@pytest.mark.parametrize("address", [PUBLIC_4, PUBLIC_6, "1.1.1.1", "100.128.0.1", "172.32.0.1",
                                     "11.0.0.1", "223.255.255.255", "2a00:1450::1"])  # fmt: skip
def test_addresses_of_the_internet_are_public(address):
    assert is_public(address) is True


def test_all_addresses_of_a_name_come_once_and_in_order():
    resolve, _ = names([PUBLIC_6, PUBLIC_4, PUBLIC_6])
    target = Target("http", "x.co", 80, "/")
    assert public_addresses(target, "image_url", resolve, 1) == [PUBLIC_6, PUBLIC_4]


def test_a_name_without_addresses_is_a_fault_of_the_media():
    for answer in ([], socket.gaierror(-2, "no name"), UnicodeError("label"), TimeoutError()):

        def resolve(host, port, timeout_s, answer=answer):
            if isinstance(answer, Exception):
                raise answer
            return answer

        with pytest.raises(BadMedia, match=r"^image_url: the host x\.co cannot be found\.$"):
            public_addresses(Target("http", "x.co", 80, "/"), "image_url", resolve, 1)


def test_the_machines_resolver_is_asked_and_not_waited_for_longer_than_said():
    assert "127.0.0.1" in resolve_name("127.0.0.1", 80, 5)
    go_on, ended = threading.Event(), threading.Event()

    def late(*_, **__):
        go_on.wait(60)
        ended.set()
        return []

    with pytest.raises(TimeoutError):
        resolve_name("x.co", 80, 0.05, late)
    assert not ended.is_set()
    go_on.set()
