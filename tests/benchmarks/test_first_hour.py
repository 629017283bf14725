"""The first hour on a GPU: every step is walked, whatever fails, and one file tells all."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import first_hour, run
from benchmarks.first_hour import HourStep, parsed, steps
from engine.machine.gpu import find_gpu
from tests.support.fake_driver import build_driver, with_driver

ROOT = Path(__file__).resolve().parents[2]


def test_json_is_found_among_other_lines_and_the_end_of_the_rest_is_kept():
    whole = json.dumps({"gpu": None, "list": [1]}, indent=1)
    text = f"no GPU: none\n{whole}\n 10%\r 20%\n{{broken\n{json.dumps({'ms': 3})}\nthe end"
    found, said = parsed(text)
    assert found == ({"gpu": None, "list": [1]}, {"ms": 3})
    assert said.splitlines() == ["no GPU: none", " 10%", " 20%", "{broken", "the end"]
    assert parsed("") == ((), "")
    assert len(parsed("x\n" * 1000)[1].splitlines()) == first_hour.TAIL_LINES


def python(program, limit_s=20.0):
    return HourStep("step", "what", (sys.executable, "-c", program), limit_s)


def test_a_step_keeps_what_it_found_and_nothing_that_names_the_machine():
    uuid = "GPU-01234567-89ab-cdef-0123-456789abcdef"
    program = f"import json; print('in /home/me/x'); print(json.dumps({{'uuid': {uuid!r}}}))"
    done = first_hour.run(python(program), {"/home/me": "~"})
    assert (done.ok, done.found, done.said) == (True, ({"uuid": "GPU-"},), "in ~/x")
    assert "/home/me" not in done.command


@pytest.mark.parametrize(
    ("step", "says"),
    [
        (python("import sys; print('so far'); sys.exit('error: no')"), "error: no"),
        (python("import time; print('so far', flush=True); time.sleep(60)", 1.5), "stopped after"),
        (HourStep("step", "what", ("no-such-program-here",), 5.0), "No such file or directory"),
    ],
    ids=["fails", "takes too long", "is not there"],
)
def test_a_step_that_goes_wrong_is_recorded_with_what_it_said(step, says):
    done = first_hour.run(step, {})
    assert not done.ok
    assert says in done.said
    assert done.seconds < 15


def test_every_program_of_the_steps_is_there_and_names_are_unique(tmp_path):
    for dry in (True, False):
        found = steps("sm89", tmp_path, tmp_path / "package", None, dry)
        names = [step.name for step in found]
        assert len({*names}) == len(names) and {"kernels", "twins", "clip", "forward"} < {*names}
        for step in found:
            scripts = [part for part in step.command if part.endswith(".py")]
            assert all((ROOT / script).is_file() for script in scripts)
            if "benchmarks/run.py" in step.command:
                run.parse(step.command[2:])  # the options are those of the suite


def hour(*arguments, **environment):
    """Runs the first hour as its owner would."""
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "first_hour.py"), *arguments],
        env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch sees the GPU here")
def test_a_gpu_that_pytorch_cannot_use_ends_the_hour_at_once(driver, tmp_path):
    out = tmp_path / "hour.json"
    done = hour("--out", str(out), **with_driver(driver))
    assert done.returncode == 2 and not out.exists()
    assert done.stderr.startswith("error: PyTorch cannot use the GPU that is here: the driver 565")


def test_the_hour_goes_on_when_three_steps_fail_and_its_file_is_complete(
    driver, tmp_path, monkeypatch, capsys
):
    """With a driver that shows an RTX 4090: the tiny package is for it, no step is shown it."""
    out, fails = tmp_path / "hour.json", ("kernels", "clip", "forward")
    monkeypatch.setattr(first_hour, "find_gpu", lambda: find_gpu(str(driver), str(driver)))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    real = first_hour.steps
    wanted: list[HourStep] = []

    def quick(*arguments):
        """The steps of the hour, each replaced by a program that tells what it was shown."""
        wanted.extend(real(*arguments))
        said = (
            "import json, os, sys; print(json.dumps(dict(gpu=os.environ['CUDA_VISIBLE_DEVICES'])))"
        )
        ends = dict.fromkeys(fails, "; sys.exit('no such luck')")
        return [
            replace(step, command=(sys.executable, "-c", said + ends.get(step.name, "")))
            for step in wanted
        ]

    monkeypatch.setattr(first_hour, "steps", quick)
    with pytest.raises(SystemExit, match="some steps failed; what they said is in the file"):
        first_hour.main(["--dry", "--out", str(out)])
    found = json.loads(out.read_text("utf-8"))["first_hour"]
    assert [step["step"] for step in found] == [step.name for step in wanted]
    assert {step["step"] for step in found if not step["ok"]} == {*fails}
    assert all(step["found"] == [{"gpu": ""}] for step in found)
    assert all(step["said"] == "no such luck" for step in found if not step["ok"])
    assert any("sm89" in part for step in wanted for part in step.command)
    assert capsys.readouterr().out.count("FAILED") == 3


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    return build_driver(tmp_path_factory.mktemp("driver"))


@pytest.mark.slow
def test_the_first_hour_runs_dry_and_is_one_file(tmp_path):
    environment = os.environ | {"OUT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(ROOT / "benchmarks" / "first_hour.sh"), "--dry"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = json.loads((tmp_path / "first_hour.json").read_text("utf-8"))["first_hour"]
    assert done.returncode == 0, found
    assert [step["step"] for step in found] == [
        "info", "kernels", "twins", "tiny package", "clip", "forward", "cold start",
    ]  # fmt: skip
    assert all(step["ok"] for step in found)
    assert found[0]["found"][0]["gpu"] is None
    assert str(Path.home()) not in (tmp_path / "first_hour.json").read_text("utf-8")
