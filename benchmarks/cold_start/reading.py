"""Suite `reading`: how fast weights come off the disk that a file is on, beside direct reads by dd.

The file is any of more than 1 GB, better of random bytes.
"""

import hashlib
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from benchmarks.cold_start.suite import evict
from benchmarks.record import Figure, Suite
from benchmarks.timing import WrongResult, columns, require, spread
from engine.errors import Unavailable
from engine.package.stream import Piece, StreamReport, stream

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
    cpu_s_per_gb: float  # median; what it takes of an idle core


def measure_reading(file: Path | None = None, runs: int = 5) -> tuple[str, list[ReadRow]]:
    """Reads in every way, one after the other in each of `runs`: a shared disk changes its speed.

    Raises `WrongResult` if the file cannot be taken out of the page cache, `BadPackage` for bytes
    that differ from what an ordinary read gives, and `Unavailable` without a file.
    """
    if file is None:
        raise Unavailable("Suite reading needs a file to read: add --file FILE.")
    path, hashed = file, pieces_of(file)
    plain = [replace(piece, sha256=None) for piece in hashed]
    ways: dict[str, Callable[[], tuple[float, float]]] = {
        **{f"dd, direct, {n} at once": lambda n=n: measure_dd(path, n) for n in DD_AT_ONCE},
        "stream, cold": lambda: measure_cold(path, plain),
        "stream, cold, hashed": lambda: measure_cold(path, hashed),
        "stream, cold, through the page cache": lambda: measure_cold(path, plain, direct=False),
        "stream, in the page cache": lambda: measure_warm(path, plain),
        "stream, in the page cache, hashed": lambda: measure_warm(path, hashed),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(runs):
        for name, way in ways.items():
            found[name].append(way())
    rows = []
    for name, measured in found.items():
        (speed, noise), (busy, _) = (spread(values) or (0.0, 0.0) for values in zip(*measured))
        rows.append(ReadRow(name, speed, noise, busy))
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


def measure_dd(path: Path, at_once: int) -> tuple[float, float]:
    """GB/s and CPU s/GB of dd with direct reads, the file divided among `at_once` processes."""
    size = path.stat().st_size
    blocks = -(-size // DD_BLOCK_BYTES)
    bounds = [blocks * n // at_once for n in range(at_once + 1)]
    command = ["dd", f"if={path}", "of=/dev/null", f"bs={DD_BLOCK_BYTES}", "iflag=direct"]
    begin, busy = time.perf_counter(), _cpu_s()
    running = [
        subprocess.Popen(
            [*command, f"skip={first}", f"count={after - first}"], stderr=subprocess.DEVNULL
        )
        for first, after in pairwise(bounds)
    ]
    codes = [process.wait() for process in running]
    seconds, busy = time.perf_counter() - begin, _cpu_s() - busy
    require(not any(codes), f"dd cannot read {path} directly")
    return size / seconds / 1e9, busy / size * 1e9


def measure_cold(
    path: Path, pieces: Sequence[Piece], direct: bool | None = None
) -> tuple[float, float]:
    """GB/s and CPU s/GB of a file that is not in the page cache."""
    make_cold(path)
    report, busy = _read(path, pieces, direct)
    if direct is None:  # through the cache, read-ahead makes later blocks warm
        require(report.cached_bytes == 0, f"{report.cached_bytes} bytes of {path} were not cold")
    return report.gb_per_s, busy


def measure_warm(path: Path, pieces: Sequence[Piece]) -> tuple[float, float]:
    """GB/s and CPU s/GB of a file that is in the page cache."""
    _read(path, pieces, direct=False)
    report, busy = _read(path, pieces)
    cold = report.direct_bytes / report.nbytes
    require(cold <= MOST_COLD, f"{cold:.0%} of {path} did not stay in the page cache")
    return report.gb_per_s, busy


def make_cold(path: Path) -> None:
    """Takes a file out of the page cache, and makes sure that it is."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    for _ in range(EVICTIONS):
        if evict([path]) == 0:
            return
    raise WrongResult(f"{path} stays in memory; a file on a disk is needed")


def _read(
    path: Path, pieces: Sequence[Piece], direct: bool | None = None
) -> tuple[StreamReport, float]:
    busy = _cpu_s()
    report = stream(path, pieces, lambda _piece, _bytes: None, direct=direct)
    return report, (_cpu_s() - busy) / report.nbytes * 1e9


def _cpu_s() -> float:
    """The processor time of this process and of those that it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def reading_table(rows: Sequence[ReadRow]) -> str:
    """Columns for a terminal; the share is that of the best way to use dd."""
    dd = max(row.gb_per_s for row in rows if row.name.startswith("dd"))
    heads = {"GB/s": ".2f", "+-": ".2f", "CPU s/GB": ".2f", "of dd": ".0%"}
    lines = [
        (row.name, row.gb_per_s, row.noise_gb_per_s, row.cpu_s_per_gb, row.gb_per_s / dd)
        for row in rows
    ]
    return columns(heads, lines)


def reading_figures(rows: Sequence[ReadRow]) -> list[Figure]:
    return [Figure(row.name, row.gb_per_s, "GB/s", row.noise_gb_per_s, "higher") for row in rows]


SUITE = Suite(measure_reading, reading_table, reading_figures)
