"""The images: what their Dockerfiles promise. They are read as text: no Docker engine runs here."""

import json
import re
import tomllib
from fnmatch import fnmatch
from itertools import chain
from pathlib import Path

import pytest

from engine.config import Defaults
from engine.jobs.parse import parse_job
from kernels.arch import ARCHS

ROOT = Path(__file__).resolve().parents[2]
IMAGES = [
    next(arch for arch in ARCHS if arch.image == name)
    for name in ("Dockerfile.sm89", "Dockerfile.sm86", "Dockerfile.sm120")
]
TEXT_FILES = [
    "Dockerfile.sm86", "Dockerfile.sm89", "Dockerfile.sm120", ".runpod/Dockerfile",
    ".runpod/hub.json", ".runpod/tests.json", "entrypoint.sh", "docker-compose.yml",
    ".dockerignore", ".gitattributes",
]  # fmt: skip
KNOWN = {"ARG", "FROM", "COPY", "RUN", "ENV", "WORKDIR", "HEALTHCHECK", "ENTRYPOINT", "CMD"}

each_image = pytest.mark.parametrize("arch", IMAGES, ids=lambda arch: arch.image)


def text_of(arch):
    return (ROOT / arch.image).read_text("utf-8")


def steps(arch):
    """Instructions of an image's Dockerfile, each on one line."""
    lines = [line for line in text_of(arch).splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [line.partition(" ")[::2] for line in joined.splitlines() if line]


def stage(arch, name):
    """The steps of one stage; the last has no name."""
    stages, current = {}, None
    for step, rest in steps(arch):
        if step == "FROM":
            current = stages.setdefault(rest.partition(" AS ")[2], [])
        elif current is not None:
            current.append((step, rest))
    return stages[name]


def test_the_hub_builds_the_ada_image_to_the_byte():
    assert (ROOT / ".runpod/Dockerfile").read_bytes() == (ROOT / "Dockerfile.sm89").read_bytes()


def test_every_image_is_one_of_those():
    assert {arch.image for arch in ARCHS if arch.image} == {arch.image for arch in IMAGES}


@pytest.mark.parametrize(("other", "more"), [("sm86", []), ("sm120", ["ARG CUDA"])])
def test_the_images_differ_in_the_lines_that_name_architectures(other, more):
    texts = [(ROOT / f"Dockerfile.{name}").read_text("utf-8") for name in ("sm89", other)]
    ada, lines = (text.splitlines() for text in texts)
    assert len(ada) == len(lines)
    different = [(a, b) for a, b in zip(ada, lines) if a != b]
    assert [a.partition("=")[0].partition(":")[0] for a, _ in different] == [
        "# The worker for Ada", "ARG ARCH", *more,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("image", "named"),
    [
        ("Dockerfile.sm89", "sm89"),
        ("Dockerfile.sm86", '"sm86 sm80"'),
        ("Dockerfile.sm120", "sm120"),
    ],
)
def test_an_image_names_the_architectures_that_it_holds(image, named):
    assert f"ARG ARCH={named}\n" in (ROOT / image).read_text("utf-8")
    held = {arch.name for arch in ARCHS if arch.image == image}
    assert held == {*named.strip('"').split()}


@pytest.mark.parametrize("arch", [arch for arch in ARCHS if arch.image], ids=lambda a: a.name)
def test_an_image_is_for_the_drivers_of_its_architectures(arch):
    text = text_of(arch)
    base = re.search(r"^ARG CUDA=nvidia/cuda:(\d+)\.(\d+)\.\d+-base-", text, re.MULTILINE)
    assert f"{base[1]}.{base[2]}" == arch.toolkits[0]
    assert (int(base[1]), int(base[2])) <= arch.driver  # a newer base refuses older drivers
    floor = "{}.{}".format(*arch.driver)
    assert f"driver knows CUDA {floor} or newer" in text.splitlines()[0]
    assert all(gpu in text.splitlines()[0] for gpu in arch.gpus.split(", "))


@each_image
def test_bases_and_packages_are_pinned(arch):
    text = text_of(arch)
    for image in re.findall(r"^ARG (?:CUDA|PYTHON)=(\S+)", text, re.MULTILINE):
        assert re.fullmatch(r"[a-z/]+:\d+\.\d+\.\d+-[a-z0-9.-]+@sha256:[0-9a-f]{64}", image)
    pins = dict(re.findall(r"([a-z0-9-]+)==([0-9.]+)", text))
    assert pins == {
        "pip": "26.3", "torch": "2.10.0", "xformers": "0.0.34", "nvidia-cudnn-cu12": "9.19.0.56",
        "onnxruntime-gpu": "1.26.0",
    }  # fmt: skip
    assert re.search(r"^ARG PYTHON=python:3\.11\.", text, re.MULTILINE)


@each_image
def test_cudnn_is_installed_after_everything_that_would_take_it_back(arch):
    installs = re.findall(
        r"pip install[^&\n]*", " && ".join(rest for _, rest in stage(arch, "build"))
    )
    packages = [line.removeprefix("pip install ").split()[-1] for line in installs]
    assert packages == [
        "pip==26.3", "torch==2.10.0", "'.[worker]'", "onnxruntime-gpu==1.26.0",
        "nvidia-cudnn-cu12==9.19.0.56",
    ]  # fmt: skip
    assert "torch.backends.cudnn.version() >= 91500" in text_of(arch)


@each_image
def test_motion_capture_runs_on_the_gpu_and_the_two_onnxruntimes_never_meet(arch):
    """Both wheels have the same files: what is uninstalled later takes the other's away."""
    recipe = " && ".join(rest for _, rest in stage(arch, "build"))
    order = [
        recipe.index(part)
        for part in ("'.[worker]'", "uninstall --yes onnxruntime ", "onnxruntime-gpu==",
                     "'CUDAExecutionProvider' in ")
    ]  # fmt: skip
    assert order == sorted(order)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    named = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    assert [one for one in named if one.startswith("onnxruntime")] == ["onnxruntime==1.32.0"]


@each_image
def test_memory_grows_in_segments_without_gaps(arch):
    assert ("ENV", "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True") in stage(arch, "")


@each_image
def test_every_instruction_is_one_that_docker_knows(arch):
    found = steps(arch)
    assert {step for step, _ in found} == KNOWN
    assert found[0][0] == "ARG"
    names = [rest.partition(" AS ")[2] for step, rest in found if step == "FROM"]
    assert names == ["python", "base", "build", "weights", ""]


@each_image
def test_every_stage_declares_the_arguments_it_uses(arch):
    before = {rest.partition("=")[0] for step, rest in steps(arch)[:3] if step == "ARG"}
    assert before == {"ARCH", "CUDA", "PYTHON"}
    declared = set()
    for step, rest in steps(arch)[3:]:
        used = set(re.findall(r"\$\{([A-Z_]+)", rest))
        if step == "FROM":
            assert used <= before, rest
            declared = {"CUDA_VERSION"}  # by the CUDA image
        elif step == "ARG":
            declared.add(rest.partition("=")[0])
        else:
            assert used <= declared, rest


@each_image
def test_what_is_copied_is_there_and_reaches_the_build(arch):
    allowed = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    assert allowed[1] == "*"
    let_in = [line.removeprefix("!") for line in allowed if line.startswith("!")]
    copied = [rest.split()[:-1] for step, rest in steps(arch) if step == "COPY"]
    sources = [source for group in copied if "--from" not in group[0] for source in group]
    assert {"engine", "kernels", "handler.py", "build_engine.py", "entrypoint.sh"} < {*sources}
    for source in sources:
        assert (ROOT / source).exists(), source
        assert any(fnmatch(source.split("/")[0], pattern) for pattern in let_in), source
    assert [name for name in let_in if not (ROOT / name).exists()] == []


@each_image
def test_the_compiler_compiles_in_the_build_and_is_not_shipped(arch):
    recipe = stage(arch, "build")[-1][1].split(" && ")
    order = [
        next(n for n, line in enumerate(recipe) if part in line)
        for part in (
            "--kernels-only",
            "--preset tiny",
            "rm -rf build/toolkits",
            "uninstall --yes triton",
        )
    ]
    assert order == sorted(order)
    copies = [rest for step, rest in stage(arch, "") if step == "COPY"]
    assert copies == [
        "--from=build /opt/venv /opt/venv",
        "--from=weights /opt/scail/weights weights",
        "--from=build /opt/scail .",
    ]
    triton = re.search(r"TRITON := triton==(\S+)", (ROOT / "Makefile").read_text("utf-8"))
    assert f"it brings Triton {triton[1]}\n" in text_of(arch)


@each_image
def test_a_token_is_a_secret_and_no_argument(arch):
    for step, rest in steps(arch):
        if step in ("ARG", "ENV"):
            assert not re.search(r"TOKEN|SECRET|KEY|PASSW", rest), rest
    weights = stage(arch, "weights")[-1][1]
    assert weights.startswith("--mount=type=secret,id=hf_token,required=false")


@each_image
def test_the_worker_is_watched_and_starts_through_the_entrypoint(arch):
    last = dict(stage(arch, ""))
    assert json.loads(last["CMD"]) == ["python", "handler.py"]
    assert json.loads(last["ENTRYPOINT"]) == ["bash", "/opt/scail/entrypoint.sh"]
    health = json.loads(last["HEALTHCHECK"].partition("CMD ")[2])
    assert health[:2] == ["bash", "-c"]
    assert all(part in health[2] for part in ("nvidia-smi", "handler.py"))


@pytest.mark.parametrize("name", TEXT_FILES)
def test_lines_end_as_linux_wants_them(name):
    data = (ROOT / name).read_bytes()
    assert b"\r" not in data
    assert data.endswith(b"\n")
    assert data.isascii()


def test_git_keeps_line_ends():
    assert "* text=auto eol=lf" in (ROOT / ".gitattributes").read_text("utf-8").splitlines()


def test_the_hubs_tests_are_jobs_that_the_worker_understands():
    light, render = json.loads((ROOT / ".runpod/tests.json").read_text("utf-8"))["tests"]
    assert parse_job(light, Defaults()).action == "health"
    job = parse_job(render, Defaults())
    assert (job.action, job.kind) == ("generate", "pose")
    assert (job.settings.width, job.settings.height) == (128, 224)
    assert job.settings.recipe.steps == 2
    assert job.warnings == ()


def test_the_hubs_render_uses_the_tiny_package_of_the_image():
    config = json.loads((ROOT / ".runpod/tests.json").read_text("utf-8"))["config"]
    assert {item["key"]: item["value"] for item in config["env"]} == {
        "SCAIL_PACKAGE": "/opt/scail/demo/packages",
        "SCAIL_MODELS": "/opt/scail/demo/models",
    }
    recipe = stage(IMAGES[0], "build")[-1][1]
    assert "--preset tiny --out demo/packages" in recipe
    assert "mv build/tiny-* demo/models" in recipe
