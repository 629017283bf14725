"""Weights off a disk as fast as it gives them, handed over in the order they are used.

Threads read large aligned blocks into a ring of memory and check the hashes; the caller's thread
gets each piece as soon as it is whole, so that the first layer can be at work while the last is
still on the disk (docs/reference/runpod.md E). Imports no torch: reads can run during its import.
"""

import hashlib
import logging
import mmap
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Condition

from engine.errors import BadPackage
from engine.package.direct_file import SECTOR, RawFile

log = logging.getLogger(__name__)

THREADS = 8
BLOCK_BYTES = 4 << 20  # larger is no faster, and the first touch of a larger ring costs more


@dataclass(frozen=True, slots=True)
class Piece:
    """A range of a file. Pieces that are used one after the other should be neighbours in it."""

    name: str
    offset: int
    nbytes: int
    sha256: str | None  # hexadecimal; None: delivered unchecked


@dataclass(frozen=True, slots=True)
class StreamReport:
    """The figures of one `stream`."""

    nbytes: int  # delivered
    seconds: float
    hashed_bytes: int
    direct_bytes: int  # read past the page cache
    cached_bytes: int  # found in the page cache

    @property
    def gb_per_s(self) -> float:
        return self.nbytes / self.seconds / 1e9


ReleaseBuffer = Callable[[], None]
Deliver = Callable[[Piece, memoryview], ReleaseBuffer | None]
Buffers = Callable[[int], memoryview]


def pages(nbytes: int) -> memoryview:
    """Memory in huge pages, into which direct reads are twice as fast as into small ones.

    Copies to a GPU run beside reads only if it is pinned too (`cudaHostRegister`).
    """
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError as error:
        log.info("this kernel has no huge pages, reads take more of the CPU: %s", error)
    return memoryview(memory)


def stream(
    path: Path,
    pieces: Sequence[Piece],
    deliver: Deliver,
    *,
    threads: int = THREADS,
    block_bytes: int = BLOCK_BYTES,
    direct: bool | None = None,
    buffers: Buffers = pages,
) -> StreamReport:
    """Calls `deliver` with each piece and its bytes, in order, in this thread.

    The bytes may be used until `deliver` returns or, if it returns a function, until that function
    has returned: it is called later, in this thread, and waits for the copy of the piece to end.
    Each is called once, also if something fails, before `stream` returns or raises; only if one of
    them raises, those after it may be left out.

    `buffers(n)` gives n bytes that begin on a page: the ring, made once. It holds three blocks a
    thread, or one a thread beside the largest piece. `direct` is that of `RawFile`.

    Hashing takes a core for each 1.5 GB/s. Where all cores hash slower than the disk reads, pieces
    without hashes come faster, and the file is to be verified at another time.

    Raises `BadPackage` if the file is gone, too short, cannot be read or differs from its hashes,
    `Unavailable` for direct=True where there are no direct reads, and what `deliver` raises.
    """
    begin = time.perf_counter()
    block_bytes = _sectors(block_bytes)
    extents, ring_bytes = _lay_out(pieces, threads, block_bytes)
    with RawFile(path, direct) as file:
        _require(file, pieces)
        ring = buffers(ring_bytes)[:ring_bytes] if extents else memoryview(b"")
        reading = _Reading(file, extents, ring, block_bytes)
        with ThreadPoolExecutor(threads, "weights") as pool:
            readers = [pool.submit(reading.run) for _ in range(threads)]
            try:
                _hand_over(reading, readers, deliver)
            finally:
                reading.stop()
    report = StreamReport(
        nbytes=sum(piece.nbytes for piece in pieces),
        seconds=time.perf_counter() - begin,
        hashed_bytes=sum(piece.nbytes for piece in pieces if piece.sha256 is not None),
        direct_bytes=reading.direct_bytes,
        cached_bytes=reading.cached_bytes,
    )
    log.info(
        "%s: %.2f GB in %.0f ms, %.2f GB hashed, %.2f GB read past the page cache, %.2f GB cached",
        path.name, report.nbytes / 1e9, report.seconds * 1e3, report.hashed_bytes / 1e9,
        report.direct_bytes / 1e9, report.cached_bytes / 1e9,
    )  # fmt: skip
    return report


def _require(file: RawFile, pieces: Sequence[Piece]) -> None:
    for piece in pieces:
        if not 0 <= piece.offset <= piece.offset + piece.nbytes <= file.size:
            raise BadPackage(
                f"{file.path} has {file.size} bytes; {piece.name} is expected at byte "
                f"{piece.offset}, {piece.nbytes} bytes long. Fetch the package again."
            )


@dataclass(frozen=True, slots=True)
class _Extent:
    """Neighbouring pieces that are read together, from sector to sector."""

    pieces: tuple[Piece, ...]
    offset: int
    nbytes: int
    at: int = 0  # its place in the ring, counted on from round to round

    @property
    def end(self) -> int:
        return self.at + self.nbytes


def _lay_out(pieces: Sequence[Piece], threads: int, block_bytes: int) -> tuple[list[_Extent], int]:
    """Joins pieces to extents, and sizes a ring in which each extent lies in one part."""
    extents = [_extent(group) for group in _groups(pieces, block_bytes)]
    largest = max((extent.nbytes for extent in extents), default=0)
    ring_bytes = max(3 * threads * block_bytes, largest + threads * block_bytes)
    placed, at = [], 0
    for extent in extents:
        if at % ring_bytes + extent.nbytes > ring_bytes:
            at = -(-at // ring_bytes) * ring_bytes
        placed.append(replace(extent, at=at))
        at += extent.nbytes
    return placed, ring_bytes


def _groups(pieces: Sequence[Piece], block_bytes: int) -> Iterator[list[Piece]]:
    """Joins neighbours until they fill a block: many tensors are too small to be read alone."""
    group: list[Piece] = []
    for piece in pieces:
        if group:
            end = group[-1].offset + group[-1].nbytes
            if end - group[0].offset >= block_bytes or not 0 <= piece.offset - end < SECTOR:
                yield group
                group = []
        group.append(piece)
    if group:
        yield group


def _extent(pieces: Sequence[Piece]) -> _Extent:
    offset = pieces[0].offset // SECTOR * SECTOR
    return _Extent(tuple(pieces), offset, _sectors(pieces[-1].offset + pieces[-1].nbytes - offset))


def _sectors(nbytes: int) -> int:
    return -(-nbytes // SECTOR) * SECTOR


def _hand_over(reading: "_Reading", readers: Sequence[Future[None]], deliver: Deliver) -> None:
    """Delivers all pieces in order. Memory is given back when nothing is there to deliver, or when
    half of the ring waits for copies: waiting for all of them each time would let the disk rest.
    """
    held: deque[list[ReleaseBuffer]] = deque()  # by extent, the oldest first

    def give_back() -> None:
        for release in held.popleft():
            release()
        reading.release()

    try:
        for number, extent in enumerate(reading.extents):
            while held and not (
                reading.is_ready(number)
                and reading.span(number - len(held), number) <= reading.ring_bytes // 2
            ):
                give_back()
            if not reading.wait_for(number):
                for reader in readers:
                    reader.result()  # raises what stopped it
            held.append([])
            for piece in extent.pieces:
                release = deliver(piece, reading.bytes_of(extent, piece))
                if release is not None:
                    held[-1].append(release)
    finally:
        while held:
            give_back()


class _Reading:
    """The state that the threads share. An extent is read once the ring has room for it."""

    def __init__(
        self, file: RawFile, extents: Sequence[_Extent], ring: memoryview, block_bytes: int
    ) -> None:
        self.extents = extents
        self.ring_bytes = len(ring)
        self.direct_bytes = self.cached_bytes = 0
        self._file = file
        self._ring = ring
        starts = [range(0, max(extent.nbytes, 1), block_bytes) for extent in extents]
        self._blocks = deque(
            (number, start, min(start + block_bytes, extents[number].nbytes))
            for number, group in enumerate(starts)
            for start in group
        )
        self._missing = [len(group) for group in starts]  # blocks of each extent
        self._ready = [False] * len(extents)
        self._released = 0  # extents
        self._stopped = False
        self._changed = Condition()

    def run(self) -> None:
        """Reads, in one of the threads, until nothing is left. If it fails, all stop."""
        done = False
        try:
            while (block := self._take()) is not None:
                number, start, stop = block
                self._read(self.extents[number], start, stop)
                if self._was_last(number):
                    self._verify(self.extents[number])
                    self._set_ready(number)
            done = True
        finally:
            if not done:
                self.stop()

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def release(self) -> None:
        """Allows the oldest extent that was delivered to be overwritten."""
        with self._changed:
            self._released += 1
            self._changed.notify_all()

    def is_ready(self, number: int) -> bool:
        return self._ready[number]

    def wait_for(self, number: int) -> bool:
        """Waits until an extent is there. False if a reader failed."""
        with self._changed:
            self._changed.wait_for(lambda: self._ready[number] or self._stopped)
            return not self._stopped

    def span(self, first: int, last: int) -> int:
        """Bytes of the ring from the start of one extent to the end of another."""
        return self.extents[last].end - self.extents[first].at

    def bytes_of(self, extent: _Extent, piece: Piece) -> memoryview:
        start = extent.at % self.ring_bytes + piece.offset - extent.offset
        return self._ring[start : start + piece.nbytes]

    def _take(self) -> tuple[int, int, int] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or not self._blocks or self._fits())
            return None if self._stopped or not self._blocks else self._blocks.popleft()

    def _fits(self) -> bool:
        return self.span(self._released, self._blocks[0][0]) <= self.ring_bytes

    def _read(self, extent: _Extent, start: int, stop: int) -> None:
        at = extent.at % self.ring_bytes
        offset = extent.offset + start
        piece = next((p for p in extent.pieces if p.offset + p.nbytes > offset), extent.pieces[-1])
        needed = min(offset + stop - start, extent.pieces[-1].offset + extent.pieces[-1].nbytes)
        try:
            found = self._file.read(self._ring[at + start : at + stop], offset)
        except OSError as error:
            raise BadPackage(
                f"{self._file.path} cannot be read at byte {offset} ({piece.name}): "
                f"{error.strerror}. Check the disk or volume, or fetch the package again."
            ) from error
        if offset + found.nbytes < needed:
            raise BadPackage(
                f"{self._file.path} ends at byte {offset + found.nbytes}, in or after {piece.name}:"
                " it was cut short while it was read. Start again when it is complete."
            )
        with self._changed:
            self.direct_bytes += found.direct
            self.cached_bytes += found.cached

    def _was_last(self, number: int) -> bool:
        with self._changed:
            self._missing[number] -= 1
            return not self._missing[number]

    def _verify(self, extent: _Extent) -> None:
        for piece in extent.pieces:
            if piece.sha256 is None:
                continue
            found = hashlib.sha256(self.bytes_of(extent, piece)).hexdigest()
            if found != piece.sha256:
                raise BadPackage(
                    f"{self._file.path}: {piece.name} is damaged: its sha256 is {found[:12]}..., "
                    f"{piece.sha256[:12]}... is expected. Fetch or build the package again."
                )

    def _set_ready(self, number: int) -> None:
        with self._changed:
            self._ready[number] = True
            self._changed.notify_all()
