"""What a GPU could do at best with a kernel: its limits, and an estimate from the machine code.

The estimate is no measurement. It takes one turn of the main loop as a closed queue, solved by mean
value analysis: the warps of a scheduler ask for its tensor core, its issue slots and its unit for
special functions, queue where others are, and wait once a turn for memory. It knows nothing of
tails, epilogues, DRAM and clocks below the rated one, so it lies above what to expect.
Rates: spec/performance.md A, spec/kernels.md 2.1.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from kernels.arch import SM89, SM90, SM120, Arch
from kernels.cubin import Cubin
from kernels.sass import Mix

SCHEDULERS = 4  # of a multiprocessor
REGISTERS = 65536  # of a multiprocessor
SPECIAL_CYCLES = 8  # that one MUFU instruction keeps a scheduler's unit busy
WAIT_CYCLES = 250  # for memory and barriers, in each turn
SHARED_RESERVED = 1024  # bytes of a block that the driver takes


@dataclass(frozen=True, slots=True)
class Gpu:
    """The one whose times are estimated for an architecture."""

    name: str
    multiprocessors: int
    ghz: float
    gigabytes_s: float
    shared_bytes: int  # of a multiprocessor


GPUS = {
    SM89: Gpu("RTX 4090", 128, 2.52, 1008, 102_400),
    SM90: Gpu("H200", 132, 1.83, 4800, 233_472),
    SM120: Gpu("RTX 5090", 170, 2.407, 1792, 102_400),
}

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
    """Of one matrix instruction, as one warp's part of it."""
    if found := _WARPGROUP.match(instruction):
        m, n, k = map(int, found.groups())
        return 2 * m * n * k // 4  # four warps do it together
    found = _WARP.match(instruction)
    if found is None:
        raise ValueError(f"unknown matrix instruction {instruction}")
    m, n, k = map(int, found.groups())
    return 2 * m * n * k


def flop_a_cycle(instruction: str) -> int:
    """Of a whole multiprocessor."""
    return next(rate for pattern, rate in FLOP_A_CYCLE if re.match(pattern, instruction))


def peak_tflops(mix: Mix, gpu: Gpu) -> float:
    """The tensor cores alone, with this mix of instructions."""
    work = sum(flop(name) * count for name, count in mix.mma.items())
    cycles = sum(flop(name) * count / flop_a_cycle(name) for name, count in mix.mma.items())
    return work / cycles * gpu.multiprocessors * gpu.ghz / 1000


def estimated_tflops(cubin: Cubin, arch: Arch) -> float:
    """What the main loop allows."""
    gpu, mix = GPUS[arch], cubin.loop
    assert mix is not None
    tensor = sum(
        flop(name) * count * SCHEDULERS / flop_a_cycle(name) for name, count in mix.mma.items()
    )
    demands = tensor, float(mix.instructions), SPECIAL_CYCLES * float(mix.count("MUFU"))
    warps = blocks_together(cubin, gpu) * cubin.warps // SCHEDULERS
    return tensor * turns_a_cycle(demands, warps) * peak_tflops(mix, gpu)


def turns_a_cycle(demands: Sequence[float], warps: int) -> float:
    """Throughput of a closed queue. `demands`: cycles of each unit that a turn of a warp needs."""
    waiting, rate = [0.0] * len(demands), 0.0
    for together in range(1, warps + 1):
        times = [cycles * (1 + queue) for cycles, queue in zip(demands, waiting)]
        rate = together / (sum(times) + WAIT_CYCLES)
        waiting = [rate * cycles for cycles in times]
    return rate


def blocks_together(cubin: Cubin, gpu: Gpu) -> int:
    """How many blocks of a kernel one multiprocessor holds."""
    registers = -(-cubin.registers // 8) * 8 * 32 * cubin.warps
    return min(REGISTERS // registers, gpu.shared_bytes // (cubin.shared_bytes + SHARED_RESERVED))


def limit_ms(flop: float, moved: float, mix: Mix | None, gpu: Gpu) -> float:
    """Arithmetic or memory traffic, whichever takes longer."""
    arithmetic = flop / peak_tflops(mix, gpu) / 1e9 if mix is not None else 0.0
    return max(arithmetic, moved / gpu.gigabytes_s / 1e6)
