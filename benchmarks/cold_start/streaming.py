"""Suite `streaming`: how fast blocks of the 14B model come from a file, where none is pinned.

A part of a package, of random bytes: each block is read as a streamed one is, into a buffer of its
size, beside direct reads of the same file by dd.
"""

import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.cold_start.reading import (
    MOST_COLD,
    ReadRow,
    make_cold,
    measure_dd,
    reading_table,
)
from benchmarks.record import Figure, Suite
from benchmarks.timing import interleaved, require, spread
from engine.denoise.packed import packed_bytes
from engine.package.stream import Piece, StreamReport, stream

BLOCKS = 6
LAYERS = 40
_D, _FFN = 5120, 13824
# the tensors of a block: codes of the linears, and 2 FP32 vectors of each; tables and norms
OUTPUTS = {"qkv": 3 * _D, "o": _D, "cross_q": _D, "cross_o": _D, "up": _FFN, "down": _D}
SIZES = [
    *(rows * (_FFN if name == "down" else _D) for name, rows in OUTPUTS.items()),
    *(4 * rows for rows in OUTPUTS.values() for _ in range(2)),
    *(4 * values for values in (6 * _D, 2 * _D, _D, _D, _D, _D, _FFN)),
]
DD_AT_ONCE = 4


def measure_streaming(runs: int = 3) -> tuple[str, list[ReadRow]]:
    """Reads all blocks in every way, one way after the other in each of `runs`.

    Raises `WrongResult` if pages are not where they should be, or bytes differ.
    """
    with TemporaryDirectory(prefix="scail-streaming-") as folder:
        path = Path(folder) / "weights.bin"
        blocks = write_blocks(path)
        ways: dict[str, Callable[[], float]] = {
            f"dd, direct, {DD_AT_ONCE} at once": partial(measure_dd, path, DD_AT_ONCE),
            "blocks past the page cache": partial(measure_blocks, path, blocks, 0),
            "blocks, half of them cached": partial(measure_blocks, path, blocks, BLOCKS // 2),
            "blocks out of the page cache": partial(measure_blocks, path, blocks, BLOCKS),
        }
        found = interleaved(ways, lambda way: way(), runs)
    rows = [ReadRow(name, *(spread(speeds) or (0.0, 0.0))) for name, speeds in found.items()]
    return "the bytes of every block, and pages that were in memory or were not", rows


def write_blocks(path: Path) -> list[list[Piece]]:
    """Writes the file; the pieces of each block."""
    blocks, offset = [], 0
    with path.open("wb") as file:
        for n in range(BLOCKS):
            pieces = []
            for k, nbytes in enumerate(SIZES):
                pieces.append(Piece(f"blocks.{n}.{k}", offset, nbytes, None))
                offset += packed_bytes([nbytes])
            blocks.append(pieces)
            file.write(os.urandom(offset - file.tell()))
    return blocks


def measure_blocks(path: Path, blocks: Sequence[Sequence[Piece]], cached: int) -> float:
    """GB/s of all blocks, the first `cached` of which are in the page cache."""
    make_cold(path)
    memory = memoryview(bytearray(packed_bytes(SIZES)))
    for pieces in blocks[:cached]:
        read(path, pieces, memory, direct=False)
    begin = time.perf_counter()
    hits = nbytes = 0
    for pieces in blocks:
        report = read(path, pieces, memory, direct=None)
        hits, nbytes = hits + report.cached_bytes, nbytes + report.nbytes
    took = time.perf_counter() - begin
    wanted = cached / len(blocks)
    require(abs(hits / nbytes - wanted) <= MOST_COLD, f"{hits} of {nbytes} bytes were cached")
    last = blocks[-1][0]
    with path.open("rb") as file:
        file.seek(last.offset)
        require(file.read(last.nbytes) == memory[: last.nbytes], f"{last.name} differs")
    return nbytes / took / 1e9


def read(
    path: Path, pieces: Sequence[Piece], memory: memoryview, *, direct: bool | None
) -> StreamReport:
    """Reads a block into its buffer, as `engine.machine.upload` does."""
    start = pieces[0].offset

    def deliver(piece: Piece, data: memoryview) -> None:
        place = piece.offset - start
        memory[place : place + piece.nbytes] = data

    return stream(path, pieces, deliver, direct=direct)


def streaming_figures(rows: Sequence[ReadRow]) -> list[Figure]:
    """The rates, and what the 40 blocks of a forward take at them."""
    forward = [LAYERS * packed_bytes(SIZES) / 1e9 / row.gb_per_s for row in rows]
    return [
        *(Figure(row.name, row.gb_per_s, "GB/s", row.noise_gb_per_s, "higher") for row in rows),
        *(Figure(f"{row.name}: 40 blocks", took, "s", took * row.noise_gb_per_s / row.gb_per_s)
          for row, took in zip(rows, forward, strict=True)),
    ]  # fmt: skip


SUITE = Suite(measure_streaming, reading_table, streaming_figures)
