"""Finds the GPU of this machine and the package that fits it; refuses old drivers and cuDNN.

The CUDA driver is asked once, without PyTorch and without a context: that takes milliseconds and no
memory. The memory that is free and the driver's release come from NVML; without NVML both stay
unknown. Source: docs/reference/runpod.md C.2, docs/reference/encoders.md 1.6.
"""

import ctypes
import logging
from collections.abc import Collection
from dataclasses import dataclass
from uuid import UUID

from engine.errors import UnsupportedDriver, UnsupportedGpu
from kernels.arch import ARCHS, Arch
from kernels.launch import LIBRARY, Driver, DriverError

log = logging.getLogger(__name__)

NVML = "libnvidia-ml.so.1"  # comes with the driver; containers may leave it out
GOOD_CUDNN = 91500  # 9.15
BAD_CUDNN = range(90800, GOOD_CUDNN)  # Conv3d in half precision; PyTorch 2.10's wheels bring one

_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
_NAME_BYTES, _UUID_BYTES, _RELEASE_BYTES = 256, 16, 80


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU as its driver describes it."""

    name: str
    uuid: str  # "GPU-...", as nvidia-smi writes it
    capability: tuple[int, int]  # CUDA compute capability
    cuda: tuple[int, int]  # the CUDA release that its driver knows: (12, 8)
    driver: str | None  # release of the driver, "570.86.15"; None: no NVML
    memory_bytes: int
    free_bytes: int | None  # None: no NVML


def find_gpu(library: str = LIBRARY, nvml: str = NVML) -> Gpu | None:
    """Finds the first CUDA device that this process may see; None, and a log line, without any.

    Raises `UnsupportedDriver` if a driver is there and does not work: a machine with a GPU must not
    be taken for one without.
    """
    try:
        driver = Driver(library)
        count = ctypes.c_int()
        driver.call("cuDeviceGetCount", ctypes.byref(count))
    except DriverError as error:
        if error.code not in (None, _NO_DEVICE):
            raise _broken(error) from error
        log.info("no GPU: %s", error)
        return None
    if not count.value:
        log.info("no GPU: the CUDA driver shows none (CUDA_VISIBLE_DEVICES may hide it)")
        return None
    if count.value > 1:
        log.info("%d GPUs, the first is used", count.value)
    try:
        return _look(driver, nvml)
    except DriverError as error:
        raise _broken(error) from error


def arch_of(gpu: Gpu, held: Collection[str]) -> Arch:
    """Finds the row of `ARCHS` for this GPU, whose package must be among those `held`, by name.

    Raises `UnsupportedGpu`.
    """
    has = f"{gpu.name} has compute capability {dotted(gpu.capability)}"
    holds = f"the packages here are for {', '.join(sorted(held))}" if held else "no package is here"
    arch = next((arch for arch in ARCHS if arch.capability == gpu.capability), None)
    if arch is None:
        fitting = [arch for arch in ARCHS if arch.name in held] or ARCHS
        gpus = "; ".join(f"{arch.gpus} ({arch.name})" for arch in fitting)
        raise UnsupportedGpu(f"{has}, which no package can be built for; {holds}. Run on {gpus}.")
    if arch.name not in held:
        image = (
            f"Deploy the image of {arch.image}, or build"
            if arch.image
            else "No image has it: build"
        )
        raise UnsupportedGpu(
            f"{has}, which is {arch.name}; {holds}. {image} the package with "
            f"`python build_engine.py --arch {arch.name}`."
        )
    return arch


def require_driver(gpu: Gpu, floor: tuple[int, int]) -> None:
    """Refuses a driver that is older than `floor`, the CUDA release that a package wants.

    Raises `UnsupportedDriver`.
    """
    if gpu.cuda < floor:
        release = f" {gpu.driver}" if gpu.driver else ""
        raise UnsupportedDriver(
            f"The driver{release} of {gpu.name} knows CUDA {dotted(gpu.cuda)}; the package needs "
            f"{dotted(floor)} or newer. Update the driver, or take a machine with a newer one "
            f"(on RunPod: allowedCudaVersions from {dotted(floor)} on)."
        )


def require_cudnn(version: int | None) -> None:
    """Refuses releases of cuDNN with the Conv3d regression. Raises `UnsupportedDriver`.

    `version` is that of `torch.backends.cudnn.version()`: 91002 is 9.10.2; None: no cuDNN.
    """
    if version is None:
        log.warning("PyTorch has no cuDNN here: convolutions are right, and slow")
    elif version in BAD_CUDNN:
        found = f"{version // 10000}.{version // 100 % 100}.{version % 100}"
        raise UnsupportedDriver(
            f"cuDNN {found} is loaded; 9.8 to 9.14 do 3D convolutions in half precision badly. "
            f"Install 9.15 or newer after PyTorch: pip install 'nvidia-cudnn-cu12>=9.15'"
        )


def _look(driver: Driver, nvml: str) -> Gpu:
    device, total = ctypes.c_int(), ctypes.c_size_t()
    name = ctypes.create_string_buffer(_NAME_BYTES)
    identity = (ctypes.c_ubyte * _UUID_BYTES)()
    call, out = driver.call, ctypes.byref
    call("cuDeviceGet", out(device), 0)
    call("cuDeviceGetName", name, _NAME_BYTES, device)
    call("cuDeviceGetUuid", out(identity), device)
    call("cuDeviceTotalMem_v2", out(total), device)
    capability = _attribute(driver, _MAJOR, device), _attribute(driver, _MINOR, device)
    uuid = f"GPU-{UUID(bytes=bytes(identity))}"
    shown = name.value.decode(errors="replace")
    release, free_bytes = _ask_nvml(nvml, uuid)
    return Gpu(shown, uuid, capability, driver.version(), release, total.value, free_bytes)


def _attribute(driver: Driver, attribute: int, device: ctypes.c_int) -> int:
    value = ctypes.c_int()
    driver.call("cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
    return value.value


class _Memory(ctypes.Structure):
    """nvmlMemory_t"""

    _fields_ = [(name, ctypes.c_ulonglong) for name in ("total", "free", "used")]


def _ask_nvml(path: str, uuid: str) -> tuple[str | None, int | None]:
    """Asks for the driver's release and the free bytes; None for what NVML does not tell."""
    try:
        nvml = ctypes.CDLL(path)
        code = nvml.nvmlInit_v2()
    except (OSError, AttributeError) as error:
        log.info("free GPU memory is unknown, NVML is not here: %s", error)
        return None, None
    if code:
        log.info("free GPU memory is unknown, NVML does not start (%d)", code)
        return None, None
    release = ctypes.create_string_buffer(_RELEASE_BYTES)
    device, memory = ctypes.c_void_p(), _Memory()
    unknown = nvml.nvmlSystemGetDriverVersion(release, _RELEASE_BYTES)
    code = nvml.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(device))
    code = code or nvml.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory))
    nvml.nvmlShutdown()
    if code:
        log.info("free GPU memory is unknown, NVML does not tell it of %s (%d)", uuid, code)
    found = None if unknown else release.value.decode(errors="replace")
    return found, None if code else memory.free


def _broken(error: DriverError) -> UnsupportedDriver:
    return UnsupportedDriver(
        f"A CUDA driver is here, and does not work: {error}. Restart the machine or take another "
        f"one; in a container, check that its driver libraries are those of the host."
    )


def dotted(release: tuple[int, int]) -> str:
    """Writes a CUDA release or a compute capability as people do: 12.8."""
    return f"{release[0]}.{release[1]}"
