"""A block's weights in one piece of memory, and where they come from: pinned memory, or the file.

In one piece a block is one copy and one buffer. Its tensors begin at multiples of 256 bytes, as in
the package. Blocks of pinned memory are copied beside the kernels at the rate of the bus. Where the
host has no room for them they are read from the package's file each time, in large aligned ranges:
out of the page cache what lies there, past it what does not.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from engine.denoise.block import BlockWeights, assemble, tensor_names
from engine.machine.host_memory import HostMemory
from engine.machine.upload import PackageWeights
from engine.package.manifest import Entry, aligned
from kernels.launch import DriverError

log = logging.getLogger(__name__)

SPARE_BYTES = 2 * 2**30  # of the host, for this process beside the blocks


@dataclass(frozen=True, slots=True)
class Packed:
    """The places of a block's tensors in its piece of memory."""

    prefix: str  # of their names in the package: `blocks.3.`
    places: Mapping[str, tuple[int, Entry]]  # by the name in the package: where it begins
    nbytes: int

    def slices(self, memory: Tensor) -> dict[str, Tensor]:
        """Cuts the bytes of each tensor out of `memory` [n] u8, by name."""
        return {
            name: memory[start : start + entry.nbytes]
            for name, (start, entry) in self.places.items()
        }

    def weights(self, memory: Tensor) -> BlockWeights:
        """Makes the weights of views into `memory` [n] u8."""

        def read(name: str) -> Tensor:
            start, entry = self.places[self.prefix + name]
            codes = memory[start : start + entry.nbytes].view(getattr(torch, entry.dtype))
            return codes.view(entry.shape)

        return assemble(BlockWeights, read)


def packed_bytes(sizes: Sequence[int]) -> int:
    """Counts the bytes that tensors of these sizes take in one piece."""
    return sum(map(aligned, sizes))


def pack(weights: PackageWeights, block: int) -> Packed:
    """Lays out a block of a package. Raises `BadPackage` if one of its tensors is missing."""
    prefix, start, places = f"blocks.{block}.", 0, {}
    for name in tensor_names(BlockWeights):
        entry = weights.package.entry(prefix + name)
        assert prod(entry.shape) > 0
        places[prefix + name] = start, entry
        start += packed_bytes([entry.nbytes])
    return Packed(prefix, places, start)


class BlockSource(Protocol):
    """Whoever has the bytes of all blocks."""

    layouts: Sequence[Packed]

    def fill(self, block: int, memory: Tensor) -> None:
        """Copies a block into `memory` [n] u8, behind what the current stream does."""
        ...


class StoredBlocks:
    """Blocks that are read from the package's file whenever they are wanted."""

    def __init__(self, weights: PackageWeights, layouts: Sequence[Packed], cached: int = 0) -> None:
        """The first `cached` blocks are read through the page cache and stay there: so many have
        room. The others never displace them.
        """
        self.layouts, self._weights, self._cached = layouts, weights, cached

    def fill(self, block: int, memory: Tensor) -> None:
        places = self.layouts[block].slices(memory)
        self._weights.fill(places, through_cache=block < self._cached)

    @property
    def nbytes(self) -> int:
        return sum(layout.nbytes for layout in self.layouts)

    def caching(self, available_bytes: int) -> "StoredBlocks":
        """The same with as many in the page cache as have room there."""
        largest = max(layout.nbytes for layout in self.layouts)
        room = max(0, available_bytes - SPARE_BYTES) // largest
        return StoredBlocks(self._weights, self.layouts, min(room, len(self.layouts)))


class PinnedBlocks:
    """Blocks that were read once, into memory that a GPU copies from by itself."""

    def __init__(self, stored: StoredBlocks, pin: Callable[[int], Tensor]) -> None:
        """`pin` makes memory [n] u8. Raises what it raises, and `BadPackage`."""
        self.layouts = stored.layouts
        self._held = [pin(layout.nbytes) for layout in self.layouts]
        for block, memory in enumerate(self._held):
            stored.fill(block, memory)

    def fill(self, block: int, memory: Tensor) -> None:
        held = self._held[block]
        memory[: len(held)].copy_(held, non_blocking=True)


def can_pin(nbytes: int, host: HostMemory) -> bool:
    """Tells if the host has room for so many bytes of blocks."""
    return nbytes + SPARE_BYTES <= host.available_bytes


def kept_on_host(
    stored: StoredBlocks, host: HostMemory, pin: Callable[[int], Tensor]
) -> BlockSource:
    """Reads all blocks into pinned memory where the host has room for it, and says so where it has
    none, or refuses: then they are read whenever they are wanted.
    """
    nbytes = stored.nbytes
    reason = f"{host.owner} leaves {_gb(host.available_bytes)}"
    if can_pin(nbytes, host):
        try:
            return PinnedBlocks(stored, pin)
        except DriverError as error:
            reason = f"the system refuses it: {error}"
    log.warning(
        "streamed blocks want %s of pinned memory with %s to spare, and %s. They are read from the "
        "page cache and the disk instead: forwards may wait for it. Allow more memory "
        "(docs/deploy.md, Small GPUs).", _gb(nbytes), _gb(SPARE_BYTES), reason,
    )  # fmt: skip
    return stored.caching(host.available_bytes)


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB"
