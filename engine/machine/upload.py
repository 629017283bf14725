"""The tensors of a package, handed to a device in the order of the file.

On a GPU they come through `engine.package.stream` and pinned memory: the copy of one runs while
the next is read. On the CPU they are mapped, and take no memory that the system cannot take back.
Each tensor is verified when it is first read.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor

from engine.errors import BadPackage
from engine.package.folder import Package
from engine.package.stream import Deliver, Piece, stream

Take = Callable[[str, Tensor], None]


class PackageWeights:
    """Reads tensors of one package for one device."""

    def __init__(self, package: Package, device: torch.device) -> None:
        self.package = package
        self.device = device
        self._verified: set[str] = set()
        self._seen: tuple[int, ...] | None = None  # what tells the file from another, once read
        self.read_bytes, self.read_s = 0, 0.0  # of all that was streamed to a GPU

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
            direct = False if wanted <= self._verified else None
            self._stream(ordered, partial(self._upload, take), direct=direct)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Reads these tensors, by name."""
        held: dict[str, Tensor] = {}
        self.visit(names, held.__setitem__)
        return held

    def fill(self, places: Mapping[str, Tensor], *, through_cache: bool = False) -> None:
        """Copies the bytes of tensors into memory [n] u8 of their sizes, on the host or on the
        device, behind what the current stream does. Raises `BadPackage`.

        Where a range is not in the page cache it is read past it, unless `through_cache`.
        """
        if self.device.type != "cuda":
            for name, place in places.items():
                place.copy_(self.package.read(name).flatten().view(torch.uint8))
            return

        def deliver(piece: Piece, data: memoryview) -> Callable[[], None] | None:
            place = places[piece.name]
            place.copy_(torch.frombuffer(data, dtype=torch.uint8), non_blocking=True)
            return self._copied() if place.is_cuda else None

        ordered = sorted(places, key=lambda name: self.package.entry(name).offset)
        self._stream(ordered, deliver, direct=False if through_cache else None)

    def _stream(self, ordered: list[str], deliver: Deliver, *, direct: bool | None) -> None:
        pieces = [self._piece(name) for name in ordered]
        self._require_same()
        report = stream(self.package.weights, pieces, deliver, direct=direct, buffers=pinned)
        self.read_bytes += report.nbytes
        self.read_s += report.seconds
        self._verified |= {*ordered}

    def _require_same(self) -> None:
        """Raises `BadPackage` if the file is another one by now: what was verified once is not
        hashed again, though it is read for every forward where blocks are streamed.
        """
        path = self.package.weights
        try:
            found = path.stat()
        except OSError:
            return  # reading says what is wrong
        seen = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
        self._seen = self._seen or seen
        if seen != self._seen:
            raise BadPackage(
                f"{path} was changed while it was in use. Start again when it is complete, and "
                "replace packages only while nobody runs them."
            )

    def _piece(self, name: str) -> Piece:
        entry = self.package.entry(name)
        known = name in self._verified
        return Piece(name, entry.offset, entry.nbytes, None if known else entry.sha256)

    def _upload(self, take: Take, piece: Piece, data: memoryview) -> Callable[[], None]:
        entry = self.package.entry(piece.name)
        there = torch.empty(entry.nbytes, dtype=torch.uint8, device=self.device)
        there.copy_(torch.frombuffer(data, dtype=torch.uint8), non_blocking=True)
        copied = self._copied()
        take(piece.name, there.view(getattr(torch, entry.dtype)).view(entry.shape))
        return copied

    def _copied(self) -> Callable[[], None]:
        """Makes a function that returns when the copies until now are done."""
        copied = torch.cuda.Event()
        copied.record()
        return copied.synchronize


def pinned(nbytes: int) -> memoryview:
    """Allocates memory that a GPU copies from while the program goes on."""
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).numpy().data
