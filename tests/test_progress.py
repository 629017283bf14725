"""Long work tells how far it is: in a log by lines that are far apart, in a terminal by a bar."""

import io
import logging

import pytest

from engine.clock import EVERY_S, Progress, over


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, logger="engine.clock")
    return lambda: [record.getMessage() for record in caplog.records]


class Time:
    """A clock that goes on by `step_s` with each look at it."""

    def __init__(self, step_s):
        self.s, self.step_s = -step_s, step_s

    def __call__(self):
        self.s += self.step_s
        return self.s


def test_a_log_gets_a_line_now_and_then_with_what_is_left(lines):
    progress = Progress("denoise", 10, "step", now=Time(EVERY_S / 2))
    for done in range(1, 11):
        progress.reach(done)
    assert lines() == [
        "denoise: 20 % after 30 s, 120 s left",
        "denoise: 40 % after 60 s, 90 s left",
        "denoise: 60 % after 90 s, 60 s left",
        "denoise: 80 % after 120 s, 30 s left",
    ]


def test_short_work_and_its_end_leave_no_line(lines):
    with Progress("decode", 3, now=Time(EVERY_S / 4)) as progress:
        for _ in range(3):
            progress.advance()
    assert list(over([], "nothing")) == []
    assert lines() == []


def test_work_is_told_of_once_where_two_ways_of_counting_meet(lines):
    with Progress("verify", 8, now=Time(EVERY_S)) as progress:
        progress.advance(2)
        progress.reach(4)
    assert [line.split(" after")[0] for line in lines()] == ["verify: 25 %", "verify: 50 %"]


def test_a_terminal_gets_a_bar_and_no_lines(lines, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    assert list(over("abc", "quantise", "group")) == ["a", "b", "c"]
    assert "quantise: 100%" in terminal.getvalue() and "3/3" in terminal.getvalue()
    assert lines() == []


def test_items_are_handed_on_and_counted(lines, monkeypatch):
    monkeypatch.setattr("engine.clock.EVERY_S", 0)
    assert list(over(["a", "b", "c"], "tensorrt", "plan")) == ["a", "b", "c"]
    assert [line.split(" after")[0] for line in lines()] == ["tensorrt: 33 %", "tensorrt: 67 %"]
