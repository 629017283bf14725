"""Compiled kernels for tests: made once, and kept beside the packages of the environment.

Unlike other state of tests this is worth keeping: 60 MB of toolkits, and a second or more a kernel.
`kernels.aot.compile` takes nothing from there that was made from other sources.
"""

import fcntl
import sys
from pathlib import Path

import pytest

from kernels.aot.compile import compile_kernels
from kernels.aot.cubin import Cubin
from kernels.arch import ARCHS, SM80, Arch
from kernels.spec import KernelSpec

STATE = Path(sys.prefix) / "scail-build"

# sm80 has the kernels of sm86, compiled for another target: what is run of both is long.
_MARKS = {SM80: pytest.mark.slow}
EACH_ARCH = [pytest.param(arch, id=arch.name, marks=_MARKS.get(arch, ())) for arch in ARCHS]
QUICK_ARCHS = [arch for arch in ARCHS if arch not in _MARKS]
each_arch = pytest.mark.parametrize("arch", EACH_ARCH)


def compiled(*wanted: tuple[KernelSpec, Arch]) -> list[Cubin]:
    """Returns proven cubins, in order. Of processes that want the same kernels one makes them."""
    STATE.mkdir(parents=True, exist_ok=True)
    with (STATE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
        return compile_kernels(wanted, STATE)
