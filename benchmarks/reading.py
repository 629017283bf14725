"""How fast weights come off the disk that a file is on, beside direct reads by dd.

python benchmarks/reading.py FILE                any file of more than 1 GB, better of random bytes
python benchmarks/reading.py FILE --rounds 3
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median

from benchmarks.timing import WrongResult, require
from engine.errors import EngineError
from engine.package.direct_file import cached_bytes
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
    best_gb_per_s: float
    cpu_s_per_gb: float  # median; what it takes of an idle core


def measure_reading(path: Path, rounds: int = 5) -> list[ReadRow]:
    """Every way of reading, one after the other in each round: a shared disk changes its speed.

    Raises `WrongResult` if the file cannot be taken out of the page cache, `BadPackage` for bytes
    that differ from what an ordinary read gives.
    """
    hashed = pieces_of(path)
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
    for _ in range(rounds):
        for name, measure in ways.items():
            found[name].append(measure())
    rows = []
    for name, measured in found.items():
        speeds, busy = zip(*measured)
        rows.append(ReadRow(name, median(speeds), max(speeds), median(busy)))
    return rows


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
    evict(path)
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


def evict(path: Path) -> None:
    """Takes a file out of the page cache, and makes sure that it is."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
        for _ in range(EVICTIONS):
            os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
            if not cached_bytes(number, 0, os.fstat(number).st_size):
                return
        raise WrongResult(f"{path} stays in memory; a file on a disk is needed")
    finally:
        os.close(number)


def _read(
    path: Path, pieces: Sequence[Piece], direct: bool | None = None
) -> tuple[StreamReport, float]:
    busy = _cpu_s()
    report = stream(path, pieces, lambda _piece, _bytes: None, direct=direct)
    return report, (_cpu_s() - busy) / report.nbytes * 1e9


def _cpu_s() -> float:
    """Of this process and those that it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def reading_table(rows: Sequence[ReadRow]) -> str:
    """Columns for a terminal; the share is that of the best way to use dd."""
    dd = max(row.gb_per_s for row in rows if row.name.startswith("dd"))
    lines = [f"{'':40}{'GB/s':>8}{'best':>8}{'CPU s/GB':>10}{'of dd':>8}"]
    for row in rows:
        measured = f"{row.gb_per_s:8.2f}{row.best_gb_per_s:8.2f}{row.cpu_s_per_gb:10.2f}"
        lines.append(f"{row.name:40}{measured}{row.gb_per_s / dd:8.0%}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    args = parser.parse_args(argv)
    try:
        rows = measure_reading(args.file, args.rounds)
    except (WrongResult, EngineError, OSError) as error:
        sys.exit(f"error: {error}")
    print(reading_table(rows))
    print(json.dumps({"reading": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    main()
