"""A GPU, its driver and cuDNN are found as they are, or refused: with a driver of our own."""

import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from engine.errors import UnsupportedDriver, UnsupportedGpu
from engine.machine.gpu import Gpu, arch_of, find_gpu, require_cudnn, require_driver
from kernels.arch import ARCHS, SM80, SM86, SM89, SM90, SM120
from tests.support.fake_driver import FakeDriver, build_driver

ROOT = Path(__file__).resolve().parents[2]
UUID = "GPU-1f2e3d4c-5b6a-7988-97a6-b5c4d3e2f100"
RTX_4090 = Gpu(
    "NVIDIA GeForce RTX 4090", UUID, (8, 9), (12, 7), "565.57.01", 25_386_352_640, 25_000_000_000
)
RTX_5090 = replace(RTX_4090, name="NVIDIA GeForce RTX 5090", capability=(12, 0), cuda=(12, 8))
H200 = replace(RTX_4090, name="NVIDIA H200", capability=(9, 0), cuda=(13, 0))
RTX_3090 = replace(RTX_4090, name="NVIDIA GeForce RTX 3090", capability=(8, 6))
A100 = replace(RTX_4090, name="NVIDIA A100-SXM4-80GB", capability=(8, 0))
T4 = replace(RTX_4090, name="Tesla T4", capability=(7, 5))


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return build_driver(tmp_path_factory.mktemp("driver"))


@pytest.fixture
def driver(library, caplog):
    caplog.set_level(logging.INFO)
    return FakeDriver(library)


def look(driver, nvml=None):
    return find_gpu(driver.path, nvml or driver.path)


# --- the look


def test_everything_is_found_with_one_look(driver, caplog):
    assert look(driver) == RTX_4090
    assert caplog.text == ""


@pytest.mark.parametrize("gpu", [RTX_5090, H200, RTX_3090], ids=lambda gpu: gpu.name)
def test_other_gpus_are_found_as_they_are(driver, gpu):
    driver.gpu(gpu.name, gpu.capability, gpu.cuda)
    assert look(driver) == gpu


def test_the_look_makes_no_context_and_ends_nvml(driver):
    look(driver)
    assert driver.log() == ["cuInit 0", "cuDeviceGet 0", "nvml begins", "nvml ends"]


def test_of_several_gpus_the_first_is_used_and_that_is_said(driver, caplog):
    driver.gpu(RTX_4090.name, (8, 9), count=4)
    assert look(driver) == RTX_4090
    assert caplog.messages == ["4 GPUs, the first is used"]


def test_the_longest_name_is_cut_and_not_the_program(driver):
    driver.gpu("N" * 1000, (8, 9))
    assert look(driver).name == "N" * 255


def test_the_look_needs_no_torch(library):
    program = (
        "import sys\nfrom engine.machine.gpu import find_gpu\n"
        "print(find_gpu(*sys.argv[1:]).uuid, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, library, library],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == [UUID, "False"]


# --- no GPU


def test_a_machine_without_a_driver_has_no_gpu_and_says_so(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    assert find_gpu(str(tmp_path / "libcuda.so.1")) is None
    assert "no GPU: no CUDA driver: " in caplog.text and "Install NVIDIA's driver" in caplog.text


def test_a_library_that_is_no_driver_is_no_gpu(caplog):
    caplog.set_level(logging.INFO)
    assert find_gpu("libc.so.6") is None
    assert "no GPU: no CUDA driver" in caplog.text


def test_a_driver_without_a_device_has_no_gpu_and_says_so(driver, caplog):
    driver.fail("cuInit", 100)
    assert look(driver) is None
    assert "no GPU: cuInit failed" in caplog.text and "(100)" in caplog.text


def test_a_hidden_device_is_no_gpu(driver, caplog):
    driver.gpu(RTX_4090.name, (8, 9), count=0)
    assert look(driver) is None
    assert "CUDA_VISIBLE_DEVICES" in caplog.text


@pytest.mark.parametrize(
    ("function", "code"),
    [
        ("cuInit", 803),  # the libraries in the container are not those of the host's driver
        ("cuInit", 999),
        ("cuDeviceGetCount", 3),
        ("cuDeviceGet", 46),  # another process has the GPU for itself
        ("cuDeviceGetName", 101),
        ("cuDeviceGetAttribute", 1),
        ("cuDeviceTotalMem_v2", 201),
        ("cuDeviceGetUuid", 1),
        ("cuDriverGetVersion", 1),
    ],
)
def test_a_driver_that_does_not_work_is_an_error_and_no_machine_without_gpu(driver, function, code):
    driver.fail(function, code)
    wanted = rf"A CUDA driver is here.*{function} failed.*\({code}\).*Restart"
    with pytest.raises(UnsupportedDriver, match=wanted) as caught:
        look(driver)
    assert caught.value.fatal and caught.value.__cause__.code == code


# --- NVML


def test_without_nvml_free_memory_and_release_are_unknown(driver, tmp_path, caplog):
    blind = replace(RTX_4090, driver=None, free_bytes=None)
    assert look(driver, str(tmp_path / "libnvidia-ml.so.1")) == blind
    assert "free GPU memory is unknown, NVML is not here" in caplog.text
    assert look(driver, "libc.so.6") == blind


@pytest.mark.parametrize(
    ("function", "unknown"),
    [
        ("nvmlInit_v2", {"driver": None, "free_bytes": None}),
        ("nvmlSystemGetDriverVersion", {"driver": None}),
        ("nvmlDeviceGetHandleByUUID", {"free_bytes": None}),
        ("nvmlDeviceGetMemoryInfo", {"free_bytes": None}),
    ],
)
def test_what_nvml_does_not_tell_stays_unknown(driver, caplog, function, unknown):
    driver.fail(function, 999)
    assert look(driver) == replace(RTX_4090, **unknown)
    assert ("free GPU memory is unknown" in caplog.text) == ("free_bytes" in unknown)
    assert driver.log().count("nvml begins") == driver.log().count("nvml ends")


# --- the package for it


@pytest.mark.parametrize(
    ("gpu", "arch"),
    [(RTX_4090, SM89), (H200, SM90), (RTX_5090, SM120), (RTX_3090, SM86), (A100, SM80)],
)
def test_a_gpu_gets_the_package_of_its_architecture(gpu, arch):
    assert arch_of(gpu, {"sm80", "sm86", "sm89", "sm90", "sm120"}) is arch
    assert arch_of(gpu, [arch.name]) is arch


@pytest.mark.parametrize(
    ("gpu", "held", "sentence"),
    [
        (
            RTX_5090, ["sm89"],
            "NVIDIA GeForce RTX 5090 has compute capability 12.0, which is sm120; the packages "
            "here are for sm89. Deploy the image of Dockerfile.sm120, or build the package with "
            "`python build_engine.py --arch sm120`.",
        ),
        (
            RTX_4090, [],
            "NVIDIA GeForce RTX 4090 has compute capability 8.9, which is sm89; no package is "
            "here. Deploy the image of Dockerfile.sm89, or build the package with "
            "`python build_engine.py --arch sm89`.",
        ),
        (
            H200, ["sm89", "sm120"],
            "NVIDIA H200 has compute capability 9.0, which is sm90; the packages here are for "
            "sm120, sm89. No image has it: build the package with "
            "`python build_engine.py --arch sm90`.",
        ),
        (
            A100, ["sm86"],
            "NVIDIA A100-SXM4-80GB has compute capability 8.0, which is sm80; the packages here "
            "are for sm86. Deploy the image of Dockerfile.sm86, or build the package with "
            "`python build_engine.py --arch sm80`.",
        ),
        (
            T4, ["sm120"],
            "Tesla T4 has compute capability 7.5, which no package can be built for; the packages "
            "here are for sm120. Run on RTX 5090, RTX PRO 6000 (sm120).",
        ),
        (
            T4, [],
            "Tesla T4 has compute capability 7.5, which no package can be built for; no package "
            "is here. Run on A100 (sm80); RTX 3090, RTX A6000, A40 (sm86); RTX 4090, L40S, RTX "
            "6000 Ada (sm89); H100, H200 (sm90); RTX 5090, RTX PRO 6000 (sm120).",
        ),
    ],
)  # fmt: skip
def test_a_gpu_without_a_package_is_named_with_what_is_held_and_what_to_deploy(gpu, held, sentence):
    with pytest.raises(UnsupportedGpu) as caught:
        arch_of(gpu, held)
    assert str(caught.value) == sentence
    assert caught.value.fatal and caught.value.code == "unsupported_gpu"


@pytest.mark.parametrize("capability", [(7, 5), (8, 7), (10, 0), (12, 1), (0, 0)])
def test_a_capability_beside_those_built_for_is_refused(capability):
    """Cubins run on exactly their own: 12.1 does not take what is made for 12.0."""
    with pytest.raises(UnsupportedGpu, match="which no package can be built for"):
        arch_of(replace(RTX_4090, capability=capability), [arch.name for arch in ARCHS])


def test_every_image_is_the_one_of_its_package():
    assert {arch.name: arch.image for arch in ARCHS} == {
        "sm80": "Dockerfile.sm86", "sm86": "Dockerfile.sm86", "sm89": "Dockerfile.sm89",
        "sm90": None, "sm120": "Dockerfile.sm120",
    }  # fmt: skip


# --- the driver


def takes(cuda, floor):
    try:
        require_driver(replace(RTX_4090, cuda=cuda), floor)
    except UnsupportedDriver:
        return False
    return True


@pytest.mark.parametrize(
    ("cuda", "floor"),
    [((12, 7), (12, 7)), ((12, 8), (12, 7)), ((13, 0), (12, 8)), ((12, 10), (12, 9))],
)
def test_a_driver_takes_every_floor_up_to_its_own_release(cuda, floor):
    assert takes(cuda, floor)
    assert takes(cuda, cuda) and not takes(cuda, (cuda[0], cuda[1] + 1))


@pytest.mark.parametrize(
    ("cuda", "floor"),
    [((12, 6), (12, 7)), ((12, 7), (12, 8)), ((11, 8), (12, 7)), ((12, 9), (12, 10))],
)
def test_a_driver_below_the_floor_is_refused_with_both_versions(cuda, floor):
    found, wanted = (f"{major}\\.{minor}" for major, minor in (cuda, floor))
    sentence = f"driver 565.57.01 of NVIDIA.*knows CUDA {found};.*needs {wanted} or newer. Update"
    with pytest.raises(UnsupportedDriver, match=sentence) as caught:
        require_driver(replace(RTX_4090, cuda=cuda), floor)
    assert caught.value.fatal and caught.value.code == "unsupported_driver"


def test_a_driver_whose_release_is_unknown_is_refused_too():
    with pytest.raises(UnsupportedDriver, match="The driver of NVIDIA GeForce RTX 4090 knows"):
        require_driver(replace(RTX_4090, driver=None), (12, 8))


def test_the_floors_are_those_of_the_design():
    assert (SM86.driver, SM89.driver, SM120.driver) == ((12, 6), (12, 7), (12, 8))


# --- cuDNN


@pytest.mark.parametrize("version", [8902, 90100, 90701, 91500, 91501, 92000, 100000])
def test_a_cudnn_beside_the_bad_ones_is_taken(version, caplog):
    require_cudnn(version)
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("version", "name"),
    [(90800, "9.8.0"), (91002, "9.10.2"), (91400, "9.14.0"), (91499, "9.14.99")],
)
def test_a_cudnn_with_the_regression_is_refused_with_the_mend(version, name):
    with pytest.raises(UnsupportedDriver, match=rf"cuDNN {name} is.*nvidia-cudnn-cu12>=9.15"):
        require_cudnn(version)


def test_no_cudnn_at_all_is_slow_and_said(caplog):
    require_cudnn(None)
    assert "no cuDNN" in caplog.text
