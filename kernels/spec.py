"""The description of a kernel that the build compiles and the bank launches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

from kernels.arch import Arch

if TYPE_CHECKING:  # the build compiles kernels on machines without torch
    from torch import Tensor

Constant = int | float | str | bool
Argument: TypeAlias = "Tensor | int | float"


class KernelError(Exception):
    """A launcher was called with tensors its kernel cannot take: a bug of ours, not of the user."""


class BuildError(Exception):
    """A kernel could not be built, or what was built does not hold what is asked of it."""


@dataclass(frozen=True, slots=True)
class Tuning:
    """How one kernel is compiled for one architecture."""

    warps: int
    stages: int
    blocks: Mapping[str, int]  # those constants that are tile sizes
    toolkit: str  # ptxas release, one of the architecture's
    max_registers: int | None = None


@dataclass(frozen=True, slots=True)
class Loop:
    """Demands on the machine code of the main loop, beside no spills and no scalar loads."""

    mma: Mapping[Arch, tuple[str, ...]]  # prefixes of matrix instructions that must be there
    max_shared_loads: int = 8  # LDS; more means that an operand is shuffled through memory


@dataclass(frozen=True, slots=True)
class KernelSpec:
    """One variant of one kernel. Data only: the function is found by name, at build time."""

    name: str  # unique, "op" or "op.variant"; also the stem of the cubin
    device: str  # "module:function" in the package
    signature: str  # Triton types of the run-time arguments in order: "*fp32 *fp8e4nv i32 fp32"
    constants: Mapping[str, Constant]
    tuning: Mapping[Arch, Tuning]
    multiples_of_16: tuple[int, ...] = ()  # places of integer arguments; pointers all are
    loop: Loop | None = None  # None: a kernel without matrix products
    fuse_multiply_add: bool = True  # False: every product is rounded before it is added
    package: str = "kernels.device"  # tests have kernels of their own

    @property
    def module(self) -> str:
        """The module of the device function, which the build and tests alone import."""
        return f"{self.package}.{self.device.partition(':')[0]}"

    @property
    def function(self) -> str:
        return self.device.partition(":")[2]


class Bank(Protocol):
    """Launches kernels: through the CUDA driver, or in an interpreter in tests."""

    def launch(self, spec: KernelSpec, grid: Sequence[int], *arguments: Argument) -> None:
        """Runs one kernel over 1 to 3 grid axes. Raises `KernelError` for arguments that the spec
        does not allow (`kernels.signature`).
        """
        ...

    def tuning(self, spec: KernelSpec) -> Tuning:
        """Returns how the kernel was compiled; its grid depends on the tile sizes."""
        ...
