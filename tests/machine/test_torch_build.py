"""A driver gets the PyTorch that it can run, and a GPU that PyTorch cannot use is an error."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine import __main__ as program
from engine.errors import UnsupportedDriver, UnsupportedGpu
from engine.machine import device
from engine.machine.gpu import Gpu
from engine.machine.torch_build import BUILDS, build_for, cannot_use, reason
from engine.media.mp4 import encode_mp4
from tests.support.fake_driver import build_driver, with_driver

ROOT = Path(__file__).resolve().parents[2]
ADA = Gpu("NVIDIA GeForce RTX 4090", "GPU-0", (8, 9), (12, 7), "565.57.01", 2**34, 2**34)
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch sees the GPU here")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return build_driver(tmp_path_factory.mktemp("driver"))


@pytest.mark.parametrize(
    ("knows", "release"),
    [((12, 0), "2.10.0"), ((12, 7), "2.10.0"), ((12, 9), "2.10.0"), ((13, 0), "2.13.0"),
     ((13, 2), "2.13.0"), ((14, 0), "2.13.0")],
)  # fmt: skip
def test_a_driver_gets_the_newest_pytorch_that_it_can_run(knows, release):
    gpu = replace(ADA, cuda=knows)
    assert build_for(gpu).torch == release
    assert f"PyTorch {release} is installed" in reason(gpu, build_for(gpu))
    assert f"RTX 4090 knows CUDA {knows[0]}.{knows[1]}." in reason(gpu, build_for(gpu))


def test_without_a_gpu_the_newest_is_taken_and_that_is_said():
    assert build_for(None) == BUILDS[0]
    assert reason(None, BUILDS[0]).endswith("or for CPUs: no GPU is here.")


def test_a_driver_that_can_run_none_is_refused_with_the_release_to_update_to():
    with pytest.raises(UnsupportedDriver, match=r"knows CUDA 11\.8; .* needs 12\.0.*525 or newer"):
        build_for(replace(ADA, cuda=(11, 8)))


def test_the_build_of_older_drivers_gets_the_cudnn_of_the_images_last():
    """PyTorch 2.10.0 pins a cuDNN whose Conv3d is wrong in half precision."""
    [old] = [build for build in BUILDS if build.cuda < (13, 0)]
    image = (ROOT / "Dockerfile.sm89").read_text("utf-8")
    assert f"torch=={old.torch}" in image
    assert [re.search(r"nvidia-cudnn-cu12==[\d.]+", image)[0]] == [*old.last]
    assert all(build.last == () for build in BUILDS if build is not old)


def test_setup_installs_what_this_says_and_cudnn_after_everything_else():
    recipe = (ROOT / "Makefile").read_text("utf-8")
    steps = re.findall(r"^\t\$\(BIN\)/(.*)", recipe.partition(".venv/ready:")[2], re.MULTILINE)
    order = [
        next(n for n, step in enumerate(steps) if part in step)
        for part in ("torch_build torch", "torch.txt", "--editable", "torch_build last", "last.txt")
    ]
    assert order == sorted(order)
    assert "torch==" not in recipe


# --- as a program, before anything is installed


def choose(what, environment):
    """Runs as `make setup` does, where nothing is installed: without site-packages."""
    return subprocess.run(
        [sys.executable, "-S", "-m", "engine.machine.torch_build", *what],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_setup_on_a_machine_with_an_older_driver_takes_the_older_pytorch(library):
    done = choose(["torch"], with_driver(library))
    assert (done.returncode, done.stdout) == (0, "torch==2.10.0\n")
    assert done.stderr == (
        "PyTorch 2.10.0 is installed, the build for CUDA 12.8: the driver 565.57.01 of NVIDIA "
        "GeForce RTX 4090 knows CUDA 12.7.\n"
    )
    assert choose(["last"], with_driver(library)).stdout == "nvidia-cudnn-cu12==9.19.0.56\n"


def test_setup_without_a_gpu_takes_the_newest_and_nothing_last(library):
    hidden = with_driver(library, CUDA_VISIBLE_DEVICES="")
    assert choose(["torch"], hidden).stdout == "torch==2.13.0\n"
    assert choose(["last"], hidden).stdout.strip() == ""


def test_an_unknown_question_is_a_sentence():
    done = choose([], {})
    assert (done.returncode, done.stderr) == (2, "error: torch or last is expected\n")


# --- a GPU that PyTorch cannot use


def test_the_refusal_names_both_releases_of_cuda_and_the_mend():
    said = str(cannot_use(ADA, "2.13.0+cu130", "13.0", "The NVIDIA driver is too old"))
    assert said == (
        "PyTorch cannot use the GPU that is here: the driver 565.57.01 of NVIDIA GeForce RTX 4090 "
        "knows CUDA 12.7, and PyTorch 2.13.0+cu130 is built for CUDA 13.0 (The NVIDIA driver is "
        "too old). Run `rm .venv/ready; make setup`, which installs PyTorch 2.10.0 for CUDA 12.8, "
        "or update the driver to 580 or newer. To run on the CPU all the same, set "
        "CUDA_VISIBLE_DEVICES to nothing."
    )


def test_a_build_for_cpus_is_told_as_one():
    said = str(cannot_use(replace(ADA, cuda=(13, 0), driver=None), "2.13.0+cpu", None, ""))
    assert (
        "the driver of NVIDIA GeForce RTX 4090 knows CUDA 13.0, and PyTorch 2.13.0+cpu is a "
        in said
    )
    assert "installs PyTorch 2.13.0 for CUDA 13.0. To run" in said


@pytest.mark.parametrize(("cuda", "knows"), [("12.8", (12, 7)), ("13.0", (13, 0))])
def test_a_build_that_the_driver_runs_is_not_installed_again(cuda, knows):
    """In an image say, where the GPU is broken or its devices were not handed to the container."""
    said = str(cannot_use(replace(ADA, cuda=knows), "2.10.0", cuda, "CUDA unknown error"))
    assert f"PyTorch 2.10.0 is built for CUDA {cuda} (CUDA unknown error). That build runs" in said
    assert "restart the container" in said and "make setup" not in said


def test_a_driver_that_no_pytorch_runs_on_is_told_as_such():
    said = str(cannot_use(replace(ADA, cuda=(11, 8)), "2.13.0+cu130", "13.0", ""))
    assert said.startswith("PyTorch cannot use the GPU that is here. The driver 565.57.01 of ")


@needs_no_gpu
def test_the_device_is_the_cpu_where_no_gpu_is_and_an_error_where_one_is_hidden(monkeypatch):
    monkeypatch.setattr(device, "find_gpu", lambda: None)
    assert device.find_device() == torch.device("cpu")
    monkeypatch.setattr(device, "find_gpu", lambda: ADA)
    with pytest.raises(UnsupportedDriver, match=r"knows CUDA 12\.7, and PyTorch "):
        device.find_device()


def test_a_gpu_that_both_see_is_the_device_and_one_that_pytorch_alone_sees_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(device, "find_gpu", lambda: ADA)
    assert device.find_device() == torch.device("cuda")
    monkeypatch.setattr(device, "find_gpu", lambda: None)
    with pytest.raises(UnsupportedGpu, match="PyTorch sees a GPU and the CUDA driver shows none"):
        device.find_device()


GENERATE = ("-m", "engine", "generate", "--image", "engine/demo/nano/dancer.png",
            "--joints", "engine/demo/nano/dance.npz", "--out", "CLIP")  # fmt: skip
POSE = ("-m", "engine", "pose", "--video", "DANCE", "--out", "CLIP")


@needs_no_gpu
@pytest.mark.parametrize(
    ("command", "status"),
    [
        (GENERATE, 2),
        pytest.param(POSE, 2, marks=pytest.mark.slow),
        (("handler.py",), 1),
        pytest.param(("benchmarks/run.py", "media"), 1, marks=pytest.mark.slow),
    ],
    ids=["generate", "pose", "handler", "benchmark"],
)
def test_nothing_runs_on_the_cpu_of_a_machine_with_a_gpu(library, tmp_path, command, status):
    """A worker that may use a CPU may not either: a package of 14B would take it for hours."""
    clip, dance = tmp_path / "clip.mp4", tmp_path / "dance.mp4"
    encode_mp4([torch.zeros(2, 64, 64, 3, dtype=torch.uint8)], 16.0, dance)
    places = {"CLIP": str(clip), "DANCE": str(dance)}
    environment = with_driver(library, SCAIL_ALLOW_CPU="1", PYTHONPATH=str(ROOT))
    environment.pop("RUNPOD_WEBHOOK_GET_JOB", None)
    done = subprocess.run(
        [sys.executable, *(places.get(part, part) for part in command)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == status
    assert "error: PyTorch cannot use the GPU that is here: the driver 565.57.01" in done.stderr
    assert "knows CUDA 12.7, and PyTorch " in done.stderr
    assert not clip.exists()


@needs_no_gpu
def test_info_says_that_nothing_would_run_on_a_gpu_that_pytorch_cannot_use(monkeypatch, capsys):
    for module in (device, program):
        monkeypatch.setattr(module, "find_gpu", lambda: ADA)
    program.main(["info"])
    found = json.loads(capsys.readouterr().out)
    assert found["gpu"]["name"] == "NVIDIA GeForce RTX 4090"
    assert found["runs"].startswith("none: PyTorch cannot use the GPU that is here: the driver")
