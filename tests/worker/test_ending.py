"""Signals end a process that is busy, with its children, whoever else handles signals in it."""

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.usefixtures("usual_signals")
ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import signal, subprocess, sys, threading, time
from engine.worker.ending import end_on_signals

class Job:
    def call_off(self, patience_s):
        print("called off", patience_s, flush=True)
        while patience_s and "stuck" in sys.argv:
            time.sleep(0.1)

    def leave(self):
        print("left", flush=True)

end_on_signals([Job()])
for number in (signal.SIGTERM, signal.SIGINT):  # as the platform's library does
    signal.signal(number, lambda *_: print("theirs"))
child = subprocess.Popen(["sleep", "60"])
print(child.pid, flush=True)
threading.Thread(target=time.sleep, args=(60,)).start()
time.sleep(60)
"""


def ended(*signals, stuck=(), **ignored):
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *stuck],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **ignored,
    )  # fmt: skip
    child = psutil.Process(int(process.stdout.readline()))
    said = []
    for number in signals:
        process.send_signal(number)
        said.append(process.stdout.readline().strip())
    said += process.stdout.read().splitlines()
    assert not child.is_running()
    return process.wait(timeout=60), said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_a_busy_process_and_its_children(number):
    assert ended(number) == (128 + number, ["called off 5.0", "left"])


def test_a_second_signal_waits_for_nothing():
    status, said = ended(signal.SIGTERM, signal.SIGTERM, stuck=["stuck"])
    assert (status, said) == (128 + signal.SIGTERM, ["called off 5.0", "called off 0.0", "left"])


def test_signals_that_were_to_be_ignored_are():
    def ignore():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.replace("(signal.SIGTERM, signal.SIGINT)", "()")],
        cwd=ROOT, stdout=subprocess.PIPE, text=True, preexec_fn=ignore,
    )  # fmt: skip
    process.stdout.readline()
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    assert process.stdout.read().splitlines() == ["called off 5.0", "left"]
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
