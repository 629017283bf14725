"""The progress of a job, told now and then, and its end by a deadline or a call."""

import pytest

from engine.errors import Cancelled, DeadlineExceeded
from engine.worker.progress import REPORT_S, JobProgress, percent_done


class Clock:
    def __init__(self):
        self.time = 1000.0

    def __call__(self):
        return self.time


@pytest.fixture
def clock():
    return Clock()


def test_reports_come_no_faster_than_the_platform_takes_them(clock):
    reports = []
    progress = JobProgress(reports.append, None, clock)
    progress.begin()
    for n in range(100):
        clock.time += REPORT_S / 10
        progress("denoise", n / 100)
    assert 9 <= len(reports) <= 10
    percents = [report["percent"] for report in reports]
    assert percents == sorted(percents)
    assert {report["stage"] for report in reports} == {"denoise"}


def test_the_time_that_is_left_is_told_from_the_time_that_passed(clock):
    reports = []
    progress = JobProgress(reports.append, None, clock)
    clock.time += 500  # waited for another job
    progress.begin()
    clock.time += 40
    progress("denoise", 0.5)
    done = percent_done({"denoise": 0.5})
    assert reports == [
        {"stage": "denoise", "percent": int(done), "eta_s": round(40 * (100 - done) / done)}
    ]


def test_a_percentage_grows_from_stage_to_stage_and_never_is_all(clock):
    stages = ("fetch", "media", "conditioning", "denoise", "decode")
    told = [percent_done({stage: share}) for stage in stages for share in (0.0, 0.5, 1.0)]
    assert told == sorted(told)
    assert told[0] == 0
    assert 98 < told[-1] < 100


def test_a_percentage_grows_while_the_stages_of_a_long_clip_take_turns(clock):
    reports = []
    progress = JobProgress(reports.append, None, clock)
    for stage in ("fetch", "media"):
        progress(stage, 1.0)
    for part in range(3):
        for stage in ("conditioning", "denoise", "decode"):
            for share in (part, part + 0.5, part + 1):
                clock.time += REPORT_S
                progress(stage, share / 3)
    percents = [report["percent"] for report in reports]
    assert percents == sorted(percents)
    assert percents[-1] == 99
    assert percents[len(percents) // 3] < 45  # a third of each stage, after the first of three


def test_a_deadline_counts_from_the_beginning_of_the_work(clock):
    progress = JobProgress([].append, 30.0, clock)
    clock.time += 100
    progress.begin()
    clock.time += 29.9
    progress("conditioning", 1.0)
    assert progress.left_s(120.0) == pytest.approx(0.1)
    assert progress.left_s(0.05) == 0.05
    clock.time += 0.2
    with pytest.raises(DeadlineExceeded, match=r"longer than the 30 s .* at denoise, \d+ % done"):
        progress("denoise", 0.1)
    with pytest.raises(DeadlineExceeded):
        progress.left_s(120.0)


def test_without_a_deadline_a_wait_takes_what_it_may(clock):
    progress = JobProgress([].append, None, clock)
    progress.begin()
    clock.time += 1e9
    assert progress.left_s(120.0) == 120.0


def test_a_job_that_was_called_off_while_it_waited_never_begins(clock):
    progress = JobProgress([].append, None, clock)
    progress.cancel()
    with pytest.raises(Cancelled):
        progress.begin()
    with pytest.raises(Cancelled):
        progress("fetch", 1.0)
