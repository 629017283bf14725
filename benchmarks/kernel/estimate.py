"""Estimates the time of a launch twice: an upper bound of its speed, and what is expected.

Both come from machine code and arithmetic (`benchmarks.kernel.model`); nothing here is a clock.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.kernel.model import (
    DRAM_SHARE,
    START_WAITS,
    WAIT_CYCLES,
    GpuModel,
    blocks_together,
    loop_tflops,
    upper_bound_tflops,
)
from benchmarks.kernel.queue import throughput
from benchmarks.kernel.work import LaunchWork
from kernels.aot.cubin import Cubin

UPPER_BOUND, EXPECTED = "upper bound of speed", "expected"  # the kinds of figures, by their names


@dataclass(frozen=True, slots=True)
class Estimate:
    """Two times of a launch in milliseconds."""

    bound_ms: float  # all overlaps perfect: no launch can be faster at the rated clocks
    ms: float  # expected


def estimate(work: LaunchWork, cubin: Cubin, gpu: GpuModel, blocks: Mapping[str, int]) -> Estimate:
    """Estimates a launch of a kernel that was compiled with these tile sizes.

    A kernel without a main loop moves bytes and does nothing else.
    """
    memory = (work.moved + work.again) / gpu.gigabytes_s / 1e6
    if cubin.loop is None:
        return Estimate(memory, memory / DRAM_SHARE)
    bound = max(memory, work.flop / upper_bound_tflops(cubin, gpu) / 1e9)
    tile, together = tile_of(blocks), blocks_together(cubin, gpu)
    waves = -(-programs(work, tile) // (gpu.multiprocessors * together))
    cycles = waves * together * program_cycles(work, cubin, gpu, tile)
    return Estimate(bound, max(memory / DRAM_SHARE, cycles / gpu.ghz / 1e6))


def tile_of(blocks: Mapping[str, int]) -> tuple[int, int]:
    """Returns the rows and columns of the result that a program makes: a head is one column."""
    return (blocks["BLOCK_M"], blocks["BLOCK_N"]) if "BLOCK_M" in blocks else (blocks["BLOCK_Q"], 1)


def programs(work: LaunchWork, tile: tuple[int, int]) -> int:
    """Returns how many tiles cover the result."""
    rows, columns = tile
    return -(-int(work.rows) // rows) * (work.columns // columns)


def program_cycles(work: LaunchWork, cubin: Cubin, gpu: GpuModel, tile: tuple[int, int]) -> float:
    """Returns the cycles that a multiprocessor takes for each of its programs.

    Its blocks are customers of two stations: its units while they multiply, and its part of the
    memory for what they move at their ends. One block alone does the one after the other.
    """
    share = tile[0] * tile[1] / (work.rows * work.columns)  # of the result
    a_cycle = loop_tflops(cubin, gpu) * 1e3 / gpu.multiprocessors / gpu.ghz  # FLOP
    memory = DRAM_SHARE * gpu.gigabytes_s / gpu.multiprocessors / gpu.ghz  # bytes a cycle
    stations = share * work.flop / a_cycle, share * work.ending / memory
    return 1 / throughput(stations, blocks_together(cubin, gpu), START_WAITS * WAIT_CYCLES)
