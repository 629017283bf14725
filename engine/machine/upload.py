"""The tensors of a package, handed to a device in the order of the file.

On a GPU they come through `engine.package.stream` and pinned memory: the copy of one runs while
the next is read. On the CPU they are mapped, and take no memory that the system cannot take back.
Each tensor is verified when it is first read.
"""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from engine.package.folder import Package
from engine.package.stream import Piece, stream

Take = Callable[[str, Tensor], None]


class PackageWeights:
    """Reads tensors of one package for one device."""

    def __init__(self, package: Package, device: torch.device) -> None:
        self.package = package
        self.device = device
        self._verified: set[str] = set()

    def visit(self, names: Iterable[str], take: Take) -> None:
        """Calls `take` with each of these tensors, in the order of the file. Raises `BadPackage`.

        On the CPU a tensor is a view of the file: what is written to it stays in this process.
        On a GPU the first visit reads past the page cache, later ones through it: weights that are
        read twice, as those of contexts where memory is short, are read for every clip.
        """
        wanted = set(names)
        ordered = [name for name in self.package.names if name in wanted]
        for name in wanted.difference(ordered):
            self.package.entry(name)  # raises, as it is not there
        if self.device.type == "cpu":
            for name in ordered:
                take(name, self.package.read(name))
        else:
            pieces = [self._piece(name) for name in ordered]
            deliver = partial(self._upload, take)
            direct = False if wanted <= self._verified else None
            stream(self.package.weights, pieces, deliver, direct=direct, buffers=pinned)
            self._verified |= wanted

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Reads these tensors, by name."""
        held: dict[str, Tensor] = {}
        self.visit(names, held.__setitem__)
        return held

    def _piece(self, name: str) -> Piece:
        entry = self.package.entry(name)
        known = name in self._verified
        return Piece(name, entry.offset, entry.nbytes, None if known else entry.sha256)

    def _upload(self, take: Take, piece: Piece, data: memoryview) -> Callable[[], None]:
        entry = self.package.entry(piece.name)
        there = torch.empty(entry.nbytes, dtype=torch.uint8, device=self.device)
        there.copy_(torch.frombuffer(data, dtype=torch.uint8), non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        take(piece.name, there.view(getattr(torch, entry.dtype)).view(entry.shape))
        return copied.synchronize


def pinned(nbytes: int) -> memoryview:
    """Allocates memory that a GPU copies from while the program goes on."""
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).numpy().data
