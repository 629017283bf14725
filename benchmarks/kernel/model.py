"""Models a GPU: the limits of a kernel, and an estimate of its rate from the machine code.

The estimate is no measurement. It takes one iteration of the main loop as a closed queue, solved by
mean value analysis: the warps of a scheduler ask for its tensor core, its issue slots and its unit
for special functions, queue where others are, and wait for memory once in each iteration. It knows
nothing of tails, epilogues, DRAM and clocks below the rated one, so it lies above what to expect.
Rates and clocks: docs/reference/performance.md A. The queue: docs/reference/kernels.md 2.3.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.kernel.work import LaunchWork
from kernels.aot.cubin import Cubin
from kernels.aot.sass import Mix
from kernels.arch import SM89, SM90, SM120, Arch

SCHEDULERS = 4  # of a multiprocessor
REGISTERS = 65536  # of a multiprocessor
SPECIAL_CYCLES = 8  # that one MUFU instruction keeps a scheduler's unit busy
WAIT_CYCLES = 250  # for memory and barriers in each iteration: docs/reference/kernels.md 2.3
SHARED_RESERVED = 1024  # bytes of a block that the driver takes


@dataclass(frozen=True, slots=True)
class GpuModel:
    """The GPU whose times are estimated for an architecture."""

    name: str
    multiprocessors: int
    ghz: float
    gigabytes_s: float
    shared_bytes: int  # of a multiprocessor
    seen_ghz: float  # the highest clock that others saw in kernels; the rated one where none did


GPUS = {
    SM89: GpuModel("RTX 4090", 128, 2.52, 1008, 102_400, 2.75),
    SM90: GpuModel("H200", 132, 1.83, 4800, 233_472, 1.83),
    SM120: GpuModel("RTX 5090", 170, 2.407, 1792, 102_400, 2.91),
}

# FLOP a multiprocessor does in a cycle at best, sums in FP32 or better, by the bits of an operand.
BEST_A_CYCLE = {
    SM89: {8: 2048, 16: 512},
    SM90: {8: 8192, 16: 4096},
    SM120: {8: 2048, 16: 512},
}
SPECIAL_A_CYCLE = 16  # exponentials of a multiprocessor

# FLOP a multiprocessor does in a cycle, by the beginning of an instruction's name; first match.
FLOP_A_CYCLE = (
    (r"[QI]GMMA", 8192),
    (r"HGMMA", 4096),
    (r"QMMA\.SF|QMMA\.\d+\.F16|IMMA", 2048),
    (r"QMMA\.\d+\.F32|HMMA\.\d+\.F16", 1024),
    (r"HMMA\.\d+\.F32", 512),
)
_WARPGROUP = re.compile(r"[QIH]GMMA\.(\d+)x(\d+)x(\d+)")
_WARP = re.compile(r"[QIH]MMA(?:\.SF)?\.(\d\d)(\d)(\d\d)")


def flop(instruction: str) -> int:
    """Operations of one matrix instruction, as one warp's part of it."""
    if found := _WARPGROUP.match(instruction):
        m, n, k = map(int, found.groups())
        return 2 * m * n * k // 4  # four warps do it together
    found = _WARP.match(instruction)
    if found is None:
        raise ValueError(f"unknown matrix instruction {instruction}")
    m, n, k = map(int, found.groups())
    return 2 * m * n * k


def flop_a_cycle(instruction: str) -> int:
    """Operations of a whole multiprocessor in a cycle."""
    return next(rate for pattern, rate in FLOP_A_CYCLE if re.match(pattern, instruction))


def peak_tflops(mix: Mix, gpu: GpuModel) -> float:
    """The rate of the tensor cores alone with this mix of instructions."""
    work = sum(flop(name) * count for name, count in mix.mma.items())
    cycles = sum(flop(name) * count / flop_a_cycle(name) for name, count in mix.mma.items())
    return work / cycles * gpu.multiprocessors * gpu.ghz / 1000


@dataclass(frozen=True, slots=True)
class Demands:
    """Cycles that one iteration of a warp's main loop needs of the units of its scheduler."""

    tensor: float
    issue: float
    special: float
    warps: int  # that share these units


def demands(cubin: Cubin, arch: Arch) -> Demands:
    """Takes them from a kernel with a main loop."""
    mix = cubin.loop
    assert mix is not None
    tensor = sum(
        flop(name) * count * SCHEDULERS / flop_a_cycle(name) for name, count in mix.mma.items()
    )
    warps = blocks_together(cubin, GPUS[arch]) * cubin.warps // SCHEDULERS
    return Demands(tensor, float(mix.instructions), SPECIAL_CYCLES * mix.count("MUFU"), warps)


def estimated_tflops(cubin: Cubin, arch: Arch) -> float:
    """The rate that the main loop allows."""
    assert cubin.loop is not None
    need = demands(cubin, arch)
    iterations = iterations_a_cycle((need.tensor, need.issue, need.special), need.warps)
    return need.tensor * iterations * peak_tflops(cubin.loop, GPUS[arch])


def estimated_ms(cubin: Cubin, arch: Arch, flop: float, programs: int) -> float:
    """The time of a launch of so many programs, which run in waves: the last one may be short."""
    gpu = GPUS[arch]
    together = gpu.multiprocessors * blocks_together(cubin, gpu)
    waves = -(-programs // together)
    return flop / estimated_tflops(cubin, arch) / 1e9 * waves * together / programs


def iterations_a_cycle(needs: Sequence[float], warps: int) -> float:
    """Throughput of a closed queue. `needs`: cycles of each unit in an iteration of a warp."""
    waiting, rate = [0.0] * len(needs), 0.0
    for together in range(1, warps + 1):
        times = [cycles * (1 + queue) for cycles, queue in zip(needs, waiting)]
        rate = together / (sum(times) + WAIT_CYCLES)
        waiting = [rate * cycles for cycles in times]
    return rate


def blocks_together(cubin: Cubin, gpu: GpuModel) -> int:
    """The number of blocks of a kernel that one multiprocessor holds."""
    registers = -(-cubin.registers // 8) * 8 * 32 * cubin.warps
    return min(REGISTERS // registers, gpu.shared_bytes // (cubin.shared_bytes + SHARED_RESERVED))


def limits_ms(work: LaunchWork, arch: Arch) -> dict[str, float]:
    """The least time of each unit of the GPU, whatever instructions a kernel has: the tensor cores
    at their best rate for such operands, memory at its rated one, MUFU.
    """
    gpu = GPUS[arch]
    cycles = gpu.multiprocessors * gpu.ghz * 1e6  # of all multiprocessors in a millisecond
    return {
        "tensor": work.flop / BEST_A_CYCLE[arch][work.bits] / cycles,
        "memory": work.moved / gpu.gigabytes_s / 1e6,
        "MUFU": work.exponentials / SPECIAL_A_CYCLE / cycles,
    }
