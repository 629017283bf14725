"""What is told and logged: without secrets, short, and written in no time whatever is in it."""

import json
import logging
import re
import sys

import pytest

from engine.worker import joblog
from engine.worker.joblog import JsonLines, Redactor, name_of, shortened

SIZE = 500_000
REDACT = Redactor(("hunter2hunter2",))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("at https://x.example/a?token=abc.", "at https://x.example/..."),
        ("at https://me:pw@x.example:81/a", "at https://x.example:81/..."),
        ("at s3://bucket?x and b", "at s3://bucket/... and b"),
        ("'http://a.b/c' is", "'http://a.b/...' is"), ("x" * 50 + "://h/p", "x" * 50 + "://h/..."),
        ("http://a@b@c.d/e", "http://c.d/..."), ("http://a:b@", "http:///..."),
        ("in /runpod-volume/models/vae", "in vae"), ("in /a/b/c, /d/e", "in c, e"),
        ("and/or 1/2 a/b/c", "and/or 1/2 a/b/c"), ("key hunter2hunter2!", "key ***!"),
        ("a" * 99, "a" * 99), ("is " + "A+/" * 40 + "==", "is <122 characters>"),
    ],
)  # fmt: skip
def test_a_text_loses_what_nobody_may_see(text, told):
    assert REDACT(text) == told


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "unit",
    [
        "a.", "a", "a+", "a-b.", "://", "a://", "a://b@", "@", "//", "/", "/a", "/a ", " /", " /a",
        "(/", "/a/:", ".a://", "a.a ", "=", "é", "\n", "'", "hunter2hunter", "http:/", "a@b:",
        "A" * 99 + " ", "A" * 99 + ".", "\t/x", "x://y@z/", "data:;base64,", "\udc80",
    ],
)  # fmt: skip
def test_redaction_takes_a_time_in_proportion_to_the_text(unit):
    """It takes parts of a second, or half an hour where an expression goes back."""
    text = (unit * (SIZE // len(unit)))[:SIZE]
    assert len(REDACT("x://h/ " + text + " b")) <= len(text) + 13
    assert REDACT("/c/d " + text).startswith("d ")


def test_no_expression_gives_back_what_it_took():
    """A repetition without a limit is possessive, or it could be tried anew from each place."""
    found = [p for p in vars(joblog).values() if isinstance(p, re.Pattern)]
    unbounded = [p.pattern for p in found if re.search(r"[*+}](?!\+)", _outside_sets(p.pattern))]
    assert len(found) == 4
    assert unbounded == []


def _outside_sets(pattern):
    """Takes sets of characters and possessive repetitions out of an expression."""
    return re.sub(r"(\*\+|\+\+|\{100,\}\+)", "", re.sub(r"\[[^\]]*\]", "", pattern))


def test_what_is_told_is_one_short_line_with_its_beginning_and_its_end():
    told = REDACT.tell("The bucket said \n" + "a.a " * 20_000 + "\nAsk again.")
    assert len(told) == 1000
    assert told.startswith("The bucket said a.a ")
    assert told.endswith("Ask again.")
    assert " [...] " in told
    assert REDACT.tell("Short.") == "Short."
    assert len(shortened("x" * 101, 100)) == 100


def test_a_secret_is_taken_out_before_a_text_is_cut():
    text = "b. " * 200 + "hunter2hunter2" + " c." * 2000
    for start in range(600, 800):
        assert "hunter2" not in REDACT.tell("d" * (start % 97) + " " + text)


@pytest.mark.parametrize(
    ("job", "name"),
    [
        ({"id": "sync-1"}, "sync-1"), ({}, "local"), ({"id": None}, "local"), ({"id": 7}, "local"),
        ({"id": [[]]}, "local"), ({"id": "x" * 10**6}, "x" * 100),
    ],
)  # fmt: skip
def test_an_id_of_a_job_is_a_short_text(job, name):
    assert name_of(job) == name


def line(message, *values, error=None):
    info = None if error is None else (type(error), error, None)
    record = logging.LogRecord("engine", logging.INFO, "x.py", 1, message, values, info)
    return json.loads(JsonLines(REDACT).format(record))


def test_a_line_of_the_log_has_an_end():
    whole = line("%s", "a." * 10**6, error=ValueError("b." * 10**6))
    assert len(whole["message"]) == 20_000
    assert len(whole["traceback"]) == 20_000


def test_a_line_is_written_whatever_the_output_can_hold(tmp_path, monkeypatch):
    path = tmp_path / "log"
    with path.open("w", encoding="ascii") as file:
        monkeypatch.setattr(sys, "stdout", file)
        root = logging.getLogger()
        kept = root.handlers[:], root.level, logging.getLogger("engine").level
        try:
            joblog.log_as_json(REDACT)
            logging.getLogger("engine.x").info("a name \ud800 of é")
        finally:
            root.handlers[:], level, engine = kept
            root.setLevel(level)
            logging.getLogger("engine").setLevel(engine)
            logging.captureWarnings(False)
    assert json.loads(path.read_text("utf-8"))["message"].startswith("a name ")
