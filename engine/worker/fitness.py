"""Checks what a machine must have before it takes jobs: GPU, driver, package for it, disk.

Each check raises an `EngineError`; the platform then replaces the machine. What no other machine
would mend, such as a missing model, is told to jobs instead (docs/reference/runpod.md B.2).
"""

from collections.abc import Callable
from functools import partial

import torch

from engine.errors import OutputError, UnsupportedGpu
from engine.machine.gpu import Gpu, arch_of, find_gpu, require_cudnn, require_driver
from engine.package.folder import find_packages, open_package
from engine.worker.endpoint import Endpoint
from engine.worker.scratch import Scratch

FREE_BYTES = 2 * 2**30  # room for the media of a job, its clip, and that clip encoded again


def fitness_checks(endpoint: Endpoint, scratch: Scratch) -> list[Callable[[], None]]:
    """Lists the checks in their order, named as the platform reports them."""
    checks: dict[str, Callable[[], None]] = {"disk": partial(_check_disk, scratch)}
    if not endpoint.allows_cpu:
        checks = {
            "gpu": _check_gpu,
            "package": partial(_check_package, endpoint),
            "driver": partial(_check_driver, endpoint),
            **checks,
        }
    return [_named(name, check) for name, check in checks.items()]


def _check_gpu() -> None:
    gpu = _gpu()
    if not torch.cuda.is_available():
        raise UnsupportedGpu(f"The CUDA driver shows {gpu.name}, and PyTorch cannot use it.")


def _check_package(endpoint: Endpoint) -> None:
    arch_of(_gpu(), [name for name, _ in find_packages(endpoint.package)])


def _check_driver(endpoint: Endpoint) -> None:
    gpu = _gpu()
    held = [name for name, _ in find_packages(endpoint.package)]
    package = open_package(endpoint.package, arch_of(gpu, held))
    require_driver(gpu, package.manifest.driver)
    require_cudnn(torch.backends.cudnn.version())


def _check_disk(scratch: Scratch) -> None:
    free = scratch.free_bytes
    if free < FREE_BYTES:
        raise OutputError(
            f"{free / 1e9:.1f} GB of disk are free for jobs; {FREE_BYTES / 1e9:.1f} GB are needed."
        )


def _gpu() -> Gpu:
    gpu = find_gpu()
    if gpu is None:
        raise UnsupportedGpu("There is no GPU here.")
    return gpu


def _named(name: str, check: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        check()

    run.__name__ = name
    return run
