"""Programs end in the status that they should, whatever became of their standard streams."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
from engine.command_line import Parser, program, run
from engine.errors import BadRequest

def command(args):
    if args.fails:
        raise BadRequest("No such thing.")
    print("done")

def main():
    parser = Parser(prog="it")
    parser.add_argument("--fails", action="store_true")
    run(command, parser.parse_args(), out_of_memory="Ask for less.")

program(main, output_matters=True)
"""


PROGRAMS = (
    "-m engine", "build_engine.py", "benchmarks/run.py", "benchmarks/first_hour.py",
    "-m engine.machine.torch_build",
)  # fmt: skip


def status(arguments, ends="", unbuffered="", script=PROGRAM):
    """Runs the program in a shell that has its streams as `ends` says."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    environment |= {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(
        ["sh", "-c", f'"$0" -c "$1" {arguments} {ends}', sys.executable, script],
        cwd=ROOT, env=environment, capture_output=True, encoding="utf-8", check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("ends", ["2>/dev/full", "2>&-", ">&- 2>&-", ">/dev/full 2>/dev/full",
                                  "<&- >&- 2>&-"])  # fmt: skip
@pytest.mark.parametrize("arguments", ["--nonsense", "--fails"])
def test_a_refusal_is_2_where_nobody_can_be_told(arguments, ends, unbuffered):
    assert status(arguments, ends, unbuffered) == (2, "", "")


@pytest.mark.parametrize("ends", ["", "2>/dev/full", "2>&-", "<&-"])
def test_success_is_0_where_nobody_can_be_told_of_warnings(ends):
    assert status("", ends) == (0, "done\n", "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", ["", "--help"])
def test_a_result_that_cannot_be_written_is_one_sentence(arguments, unbuffered):
    code, _, told = status(arguments, ">/dev/full", unbuffered)
    assert code == 2
    assert told.count("Standard output cannot be written: No space left on device.") == 1
    assert len(told.splitlines()) == 1
    assert "Traceback" not in told


def test_output_that_was_closed_or_is_not_read_is_nobodys_error():
    assert status("", ">&-") == (0, "", "")
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, stdout=writing, stderr=subprocess.PIPE
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_service_goes_on_where_its_log_cannot_be_written():
    script = PROGRAM.replace("output_matters=True", "output_matters=False")
    assert status("", ">/dev/full", script=script) == (0, "", "")


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("ends", ["2>/dev/full", "2>&-"])
def test_every_program_refuses_with_2(program, ends):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = f"{sys.executable} {program} --nonsense {ends}"
    assert subprocess.run(["sh", "-c", command], cwd=ROOT, env=environment).returncode == 2


@pytest.mark.slow
@pytest.mark.parametrize("program", ["benchmarks/first_hour.py --help",
                                     "-m engine.machine.torch_build torch"])  # fmt: skip
def test_these_programs_too_say_where_their_output_cannot_be_written(program):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = f"{sys.executable} {program} >/dev/full"
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, env=environment, capture_output=True)
    assert done.returncode == 2
    assert b"Standard output cannot be written: No space left on device." in done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("encoding", ["ascii:strict", "latin-1:strict", "utf-8:strict"])
def test_a_name_that_no_terminal_can_show_costs_no_result(encoding, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    script = PROGRAM.replace('"done"', "chr(0x4E2D) + chr(0xDCFF)")
    shown = "中" if encoding.startswith("utf") else "\\u4e2d"
    assert status("", script=script) == (0, f"{shown}\\udcff\n", "")
