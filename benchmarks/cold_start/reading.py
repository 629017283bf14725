"""Suite `reading`: how fast weights come off the disk that a file is on, beside direct reads by dd.

The file is any of more than 1 GB, better of random bytes.
"""

import hashlib
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

from benchmarks.cold_start.suite import evict
from benchmarks.record import Figure, Suite
from benchmarks.timing import WrongResult, columns, interleaved, require, spread
from engine.errors import Unavailable
from engine.package.stream import Piece, stream

PIECE_BYTES = 5120 * 5120  # one 8-bit weight of the 14B model
DD_BLOCK_BYTES = 16 << 20
DD_AT_ONCE = (1, 4, 8)
EVICTIONS = 20
MOST_COLD = 0.02  # others need memory meanwhile


@dataclass(frozen=True, slots=True)
class ReadRow:
    """One way of reading the file, all ways once in each round."""

    name: str
    gb_per_s: float  # median of the rounds
    noise_gb_per_s: float  # half of what lies between the best and the worst


def measure_reading(file: Path | None = None, runs: int = 5) -> tuple[str, list[ReadRow]]:
    """Reads in every way, one after the other in each of `runs`: a shared disk changes its speed.

    Raises `WrongResult` if the file cannot be taken out of the page cache, `BadPackage` for bytes
    that differ from what an ordinary read gives, and `Unavailable` without a file.
    """
    if file is None:
        raise Unavailable("Suite reading needs a file to read: add --file FILE.")
    hashed = pieces_of(file)
    plain = [replace(piece, sha256=None) for piece in hashed]
    ways: dict[str, Callable[[], float]] = {
        **{f"dd, direct, {n} at once": partial(measure_dd, file, n) for n in DD_AT_ONCE},
        "stream, cold": partial(measure_cold, file, plain),
        "stream, cold, hashed": partial(measure_cold, file, hashed),
        "stream, in the page cache": partial(measure_warm, file, plain),
    }
    found = interleaved(ways, lambda way: way(), runs)
    rows = [ReadRow(name, *(spread(speeds) or (0.0, 0.0))) for name, speeds in found.items()]
    return "the hash of every piece, and pages that were in memory or were not", rows


def pieces_of(path: Path) -> list[Piece]:
    """The whole file in pieces of a weight's size, with their hashes."""
    pieces, offset = [], 0
    with path.open("rb") as file:
        while data := file.read(PIECE_BYTES):
            digest = hashlib.sha256(data).hexdigest()
            pieces.append(Piece(f"piece {len(pieces)}", offset, len(data), digest))
            offset += len(data)
    return pieces


def measure_dd(path: Path, at_once: int) -> float:
    """GB/s of dd with direct reads, the file divided among `at_once` processes."""
    size = path.stat().st_size
    blocks = -(-size // DD_BLOCK_BYTES)
    bounds = [blocks * n // at_once for n in range(at_once + 1)]
    command = ["dd", f"if={path}", "of=/dev/null", f"bs={DD_BLOCK_BYTES}", "iflag=direct"]
    begin = time.perf_counter()
    running = [
        subprocess.Popen(
            [*command, f"skip={first}", f"count={after - first}"], stderr=subprocess.DEVNULL
        )
        for first, after in pairwise(bounds)
    ]
    codes = [process.wait() for process in running]
    seconds = time.perf_counter() - begin
    require(not any(codes), f"dd cannot read {path} directly")
    return size / seconds / 1e9


def measure_cold(path: Path, pieces: Sequence[Piece]) -> float:
    """GB/s of a file that is not in the page cache."""
    make_cold(path)
    report = stream(path, pieces, _ignore)
    require(report.cached_bytes == 0, f"{report.cached_bytes} bytes of {path} were not cold")
    return report.gb_per_s


def measure_warm(path: Path, pieces: Sequence[Piece]) -> float:
    """GB/s of a file that is in the page cache."""
    stream(path, pieces, _ignore, direct=False)
    report = stream(path, pieces, _ignore)
    cold = report.direct_bytes / report.nbytes
    require(cold <= MOST_COLD, f"{cold:.0%} of {path} did not stay in the page cache")
    return report.gb_per_s


def make_cold(path: Path) -> None:
    """Takes a file out of the page cache, and makes sure that it is."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    for _ in range(EVICTIONS):
        if evict([path]) == 0:
            return
    raise WrongResult(f"{path} stays in memory; a file on a disk is needed")


def _ignore(piece: Piece, data: object) -> None:
    """Throws away what was read."""


def reading_table(rows: Sequence[ReadRow]) -> str:
    """Columns for a terminal."""
    lines = [(row.name, row.gb_per_s, row.noise_gb_per_s) for row in rows]
    return columns({"GB/s": ".2f", "+-": ".2f"}, lines)


def reading_figures(rows: Sequence[ReadRow]) -> list[Figure]:
    return [Figure(row.name, row.gb_per_s, "GB/s", row.noise_gb_per_s, "higher") for row in rows]


SUITE = Suite(measure_reading, reading_table, reading_figures)
