"""Chooses the build of PyTorch that a GPU's driver can run; `make setup` installs what this says.

    python -m engine.machine.torch_build torch    what to install first
    python -m engine.machine.torch_build last     what to install after all else, or nothing

The package index has one build of each release: for CUDA 13 from 2.11 on, for CUDA 12.8 before. A
driver runs builds of its own CUDA major and older ones. This runs before anything is installed, on
Python's own modules. Source: docs/reference/runpod.md C.4, docs/reference/encoders.md 1.6.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from engine.command_line import REFUSED, program
from engine.errors import UnsupportedDriver
from engine.machine.gpu import Gpu, dotted, find_gpu


@dataclass(frozen=True, slots=True)
class TorchBuild:
    """A release of PyTorch as the package index has it."""

    torch: str
    cuda: tuple[int, int]  # the CUDA release that it was built for
    driver: tuple[int, int]  # the CUDA release that a driver must know to run it
    driver_release: str  # the oldest such driver
    last: tuple[str, ...] = ()  # installed after everything that would take it back


# The first is taken where there is no GPU. cuDNN 9.10, which 2.10.0 pins, is among the bad ones.
BUILDS = (
    TorchBuild("2.13.0", (13, 0), (13, 0), "580"),
    TorchBuild("2.10.0", (12, 8), (12, 0), "525", ("nvidia-cudnn-cu12==9.19.0.56",)),
)


def build_for(gpu: Gpu | None) -> TorchBuild:
    """Chooses the newest build that the GPU's driver can run; without a GPU the newest.

    Raises `UnsupportedDriver` for a driver that can run none.
    """
    if gpu is None:
        return BUILDS[0]
    found = next((build for build in BUILDS if gpu.cuda >= build.driver), None)
    if found is None:
        oldest = BUILDS[-1]
        raise UnsupportedDriver(
            f"The driver{_release(gpu)} of {gpu.name} knows CUDA {dotted(gpu.cuda)}; the oldest "
            f"PyTorch that this engine runs on, {oldest.torch}, needs {dotted(oldest.driver)}. "
            f"Update the driver to {oldest.driver_release} or newer."
        )
    return found


def reason(gpu: Gpu | None, build: TorchBuild) -> str:
    """Says which build is taken, and why, in one sentence."""
    taken = f"PyTorch {build.torch} is installed, the build for CUDA {dotted(build.cuda)}"
    if gpu is None:
        return f"{taken} or for CPUs: no GPU is here."
    return f"{taken}: the driver{_release(gpu)} of {gpu.name} knows CUDA {dotted(gpu.cuda)}."


def cannot_use(gpu: Gpu, torch: str, cuda: str | None, why: str) -> UnsupportedDriver:
    """Words the refusal of a machine whose GPU PyTorch cannot use.

    `torch` and `cuda` are the release here and what it was built for (None: CPUs), `why` is what
    PyTorch itself says.
    """
    try:
        right = build_for(gpu)
    except UnsupportedDriver as error:
        return UnsupportedDriver(f"PyTorch cannot use the GPU that is here. {error}")
    built = f"is built for CUDA {cuda}" if cuda else "is a build for CPUs"
    if cuda and int(cuda.partition(".")[0]) <= gpu.cuda[0]:
        mend = (
            "That build runs on that driver, so the set-up or the GPU is at fault: look at "
            "`nvidia-smi`, restart the container or the machine, or take another"
        )
    else:
        mend = (
            f"Run `rm .venv/ready; make setup`, which installs PyTorch {right.torch} for CUDA "
            f"{dotted(right.cuda)}"
        )
        newest = BUILDS[0]
        if cuda and gpu.cuda < newest.driver:
            mend += f", or update the driver to {newest.driver_release} or newer"
    return UnsupportedDriver(
        f"PyTorch cannot use the GPU that is here: the driver{_release(gpu)} of {gpu.name} knows "
        f"CUDA {dotted(gpu.cuda)}, and PyTorch {torch} {built}{f' ({why})' if why else ''}. "
        f"{mend}. To run on the CPU all the same, set CUDA_VISIBLE_DEVICES to nothing."
    )


def _release(gpu: Gpu) -> str:
    return f" {gpu.driver}" if gpu.driver else ""


def main(argv: Sequence[str] | None = None) -> None:
    """Prints requirements for pip, a line each, and on standard error why they are these."""
    asked = sys.argv[1:] if argv is None else [*argv]
    try:
        gpu = find_gpu()
        build = build_for(gpu)
    except UnsupportedDriver as error:  # an environment for the CPU is of use here too
        gpu, build = None, BUILDS[0]
        print(f"warning: {error}", file=sys.stderr)
    if asked == ["torch"]:
        print(reason(gpu, build), file=sys.stderr)
        print(f"torch=={build.torch}")
    elif asked == ["last"]:
        print(*build.last, sep="\n")
    else:
        print("error: torch or last is expected", file=sys.stderr)
        sys.exit(REFUSED)


if __name__ == "__main__":
    program(main)
