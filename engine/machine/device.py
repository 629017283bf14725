"""Finds the device that models run on. A GPU that PyTorch cannot use is an error, never the CPU."""

import torch

from engine.errors import UnsupportedGpu
from engine.machine.gpu import find_gpu
from engine.machine.torch_build import cannot_use

_SHOWN = 200  # characters of what PyTorch says


def find_device() -> torch.device:
    """Finds the GPU, or the CPU of a machine without one.

    Raises `UnsupportedDriver` where the driver shows a GPU that this build of PyTorch cannot use,
    `UnsupportedGpu` where PyTorch sees one that the driver does not show.
    """
    gpu = find_gpu()
    if gpu is None:
        if torch.cuda.is_available():
            raise UnsupportedGpu("PyTorch sees a GPU and the CUDA driver shows none. Restart.")
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise cannot_use(gpu, torch.__version__, torch.version.cuda, _why())
    return torch.device("cuda")


def _why() -> str:
    """Returns what PyTorch says when it is made to use a GPU."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).strip().partition("\n")[0].rstrip(".")[:_SHOWN]
    return ""
