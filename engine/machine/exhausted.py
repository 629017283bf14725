"""Tells if an error means that the GPU's memory is used up, and how much of it others have.

PyTorch's allocator says so by a type of its own. Libraries that ask for memory themselves do not:
cuDNN gives up each plan whose workspace it does not get, and the last thing that it says is that it
found no engine. An error of a GPU that works no more, or of tensors that no plan takes at any size,
is none of these.
"""

import re

import torch

from kernels.launch import DriverError

_OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY, and cudaErrorMemoryAllocation
_SAID = re.compile(
    r"out of memory"  # the CUDA runtime's words
    r"|can't allocate memory|cannot allocate memory"
    r"|CUDA_ERROR_OUT_OF_MEMORY|cudaErrorMemoryAllocation"
    # CUBLAS_STATUS_ALLOC_FAILED, CUFFT_ALLOC_FAILED, ..._DEVICE_ALLOCATION_FAILED
    r"|ALLOC(?:ATION)?_FAILED"
    r"|unable to find an engine|[Uu]nable to find a valid cuDNN algorithm"
    r"|[Nn]o valid (?:execution plans|engine configs)"
    r"|CUDNN_STATUS_NOT_SUPPORTED",
)


def held_by_others(outside_bytes: int) -> int:
    """Counts the bytes of the GPU that neither are free nor belong to this process, whose own are
    those of PyTorch's allocator and `outside_bytes` more: other programs, and the driver's.
    """
    free, total = torch.cuda.mem_get_info()
    return max(0, total - free - torch.cuda.memory_reserved() - outside_bytes)


def ran_out(error: BaseException | None) -> bool:
    """Tells if `error` says that the GPU, or a library on it, got no memory.

    "Unable to find an engine" and "not supported" are taken for it: the convolutions here have run
    at other sizes before. "Not initialized" is not: a handle is made once, and one that cannot be
    made later is the sign of a broken context.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return True
    if isinstance(error, DriverError):
        return error.code == _OUT_OF_MEMORY
    return isinstance(error, RuntimeError) and _SAID.search(str(error)) is not None
