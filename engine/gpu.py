"""Which GPU is this, and how much memory has it."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Gpu:
    name: str
    capability: tuple[int, int]  # CUDA compute capability
    memory_gib: float


def find_gpu() -> Gpu | None:
    """The first CUDA device, or None."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    return Gpu(found.name, (found.major, found.minor), found.total_memory / 2**30)
