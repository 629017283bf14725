"""Memory of the host that a GPU copies from by itself, in the size that was asked for.

PyTorch's own pinned memory comes in powers of two: 40 blocks of 305 MB would take 21 GB for 12.
Here pages are made and registered with the driver.
"""

import ctypes
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from engine.package.stream import pages
from kernels.launch import LIBRARY, Driver

_PORTABLE = 1  # CU_MEMHOSTREGISTER_PORTABLE: of all contexts


def pinner(library: str = LIBRARY) -> Callable[[int], Tensor]:
    """Makes the function that pins n bytes, as a tensor [n] u8, for as long as it lives.

    The function raises `DriverError` where the system refuses, as WSL2 does beyond its limit.
    """
    driver = Driver(library)

    def pin(nbytes: int) -> Tensor:
        memory = torch.frombuffer(pages(nbytes), dtype=torch.uint8)
        address = ctypes.c_void_p(memory.data_ptr())
        size = ctypes.c_size_t(nbytes)
        driver.call("cuMemHostRegister_v2", address, size, _PORTABLE, what=f"{nbytes} bytes")
        unpin = weakref.finalize(memory, driver.library.cuMemHostUnregister, address)
        unpin.atexit = False  # the process takes its memory along
        return memory

    return pin
