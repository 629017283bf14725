"""Models a GPU: the limits of a kernel, and two estimates of its time from the machine code.

upper bound   of its speed: every unit works whenever it can, and the busiest decides. All overlaps
              are perfect, there are no waits, ends and last waves.
expected      The warps of a multiprocessor as a closed queue (`benchmarks.kernel.queue`): they ask
              for the tensor core, the issue slots and MUFU of their scheduler, and for the pipe to
              shared memory that four schedulers share, and wait once in each iteration. Hopper's
              warpgroups that meet at a barrier in each iteration move in step: what one unit does
              no other hides. Around that are the ends of programs, which move their results while
              their multiprocessor multiplies nothing unless it holds a second block, and the last
              wave, which may be short.

No estimate is a measurement. Clocks of instructions and rates are those of data sheets,
`WAIT_CYCLES` and `DRAM_SHARE` are assumed, one constant was fitted to one figure
(`STEP_WAIT_CYCLES`). What others measured is held against this in `benchmarks.kernel.published`.
The model knows nothing of the bandwidth of L2, of clocks below the rated one, of how the
instructions of one warp overlap, and of an A100's half as many FP32 lanes.
Rates and clocks: docs/reference/performance.md A. The queue: docs/reference/kernels.md 2.3.
"""

import re
from dataclasses import dataclass

from benchmarks.kernel.queue import throughput
from benchmarks.kernel.work import LaunchWork
from kernels.aot.cubin import Cubin, Mix
from kernels.arch import SM80, SM86, SM89, SM90, SM120, Arch

SCHEDULERS = 4  # of a multiprocessor
REGISTERS = 65536  # of a multiprocessor
SHARED_RESERVED = 1024  # bytes of a block that the driver takes
SPECIAL_CYCLES = 8  # that one MUFU instruction keeps a scheduler's unit busy
# Cycles that an instruction of a warp keeps the pipe to shared memory busy, at 128 bytes a cycle.
# Our loops' LDSM load four matrices, their copies 16 bytes a thread; the other loads are scalars.
SHARED_CYCLES = {"LDSM": 4, "LDGSTS": 4, "STS": 4, "LDS": 1}
WAIT_CYCLES = 250  # for memory and barriers in each iteration: docs/reference/kernels.md 2.3
# The same for warpgroups in step, fitted to one figure: Triton's FP16 attention of head size 128 on
# an H100, 477 and 487 TFLOPS. 0 gives 465 with starts and waves, 250 would give 439.
STEP_WAIT_CYCLES = 0
START_WAITS = 2  # of a program before its first product: for its start, and for its first tiles
DRAM_SHARE = 0.85  # of the rated bandwidth: assumed, docs/reference/performance.md F2


@dataclass(frozen=True, slots=True)
class GpuModel:
    """A GPU whose times are estimated."""

    name: str
    multiprocessors: int
    ghz: float
    gigabytes_s: float
    shared_bytes: int  # of a multiprocessor
    seen_ghz: float  # the highest clock that others saw in kernels; the rated one where none did
    rates: tuple[tuple[str, int], ...] = ()  # instructions that differ from FLOP_A_CYCLE


# the GPU of an architecture
GPUS = {
    SM80: GpuModel(
        "A100", 108, 1.41, 2039, 167_936, 1.41, rates=((r"IMMA", 4096), (r"HMMA", 2048))
    ),
    SM86: GpuModel("RTX 3090", 82, 1.695, 936, 102_400, 1.695),
    SM89: GpuModel("RTX 4090", 128, 2.52, 1008, 102_400, 2.75),
    SM90: GpuModel("H200", 132, 1.83, 4800, 233_472, 1.83),
    SM120: GpuModel("RTX 5090", 170, 2.407, 1792, 102_400, 2.91),
}

# FLOP a multiprocessor does in a cycle at best, sums in FP32 or better, by the bits of an operand.
BEST_A_CYCLE = {
    SM80: {8: 4096, 16: 2048},
    SM86: {8: 2048, 16: 512},
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


def flop_a_cycle(instruction: str, gpu: GpuModel) -> int:
    """Operations of a whole multiprocessor in a cycle."""
    rates = (*gpu.rates, *FLOP_A_CYCLE)
    return next(rate for pattern, rate in rates if re.match(pattern, instruction))


def peak_tflops(mix: Mix, gpu: GpuModel) -> float:
    """The rate of the tensor cores alone with this mix of instructions."""
    work = sum(flop(name) * count for name, count in mix.mma.items())
    cycles = sum(flop(name) * count / flop_a_cycle(name, gpu) for name, count in mix.mma.items())
    return work / cycles * gpu.multiprocessors * gpu.ghz / 1000


@dataclass(frozen=True, slots=True)
class Demands:
    """What one iteration of a warp's main loop needs of each unit, in cycles, and who shares it."""

    tensor: float
    issue: float
    special: float
    shared: float  # of the pipe to shared memory, which all schedulers have in common
    warps: int  # of a block, on each scheduler
    blocks: int  # on a multiprocessor
    is_in_step: bool  # warpgroups that meet in each iteration

    @property
    def busiest(self) -> float:
        """The cycles of the unit that has most to do, for a warp of each scheduler."""
        return max(self.tensor, self.issue, self.special, SCHEDULERS * self.shared)


def demands(cubin: Cubin, gpu: GpuModel) -> Demands:
    """Takes them from a kernel with a main loop."""
    mix = cubin.loop
    assert mix is not None
    tensor = sum(
        flop(name) * count * SCHEDULERS / flop_a_cycle(name, gpu) for name, count in mix.mma.items()
    )
    shared = sum(cycles * mix.count(name) for name, cycles in SHARED_CYCLES.items())
    return Demands(
        tensor,
        float(mix.instructions),
        SPECIAL_CYCLES * mix.count("MUFU"),
        shared,
        cubin.warps // SCHEDULERS,
        blocks_together(cubin, gpu),
        mix.count("BAR") > 0 and any(_WARPGROUP.match(name) for name in mix.mma),
    )


def expected_rate(need: Demands) -> float:
    """Iterations of a warp that a scheduler gets done in a cycle."""
    own = need.tensor, need.issue, need.special
    if need.is_in_step:  # copies are nobody's step: they land meanwhile
        return need.warps * throughput((need.warps * sum(own),), need.blocks, STEP_WAIT_CYCLES)
    return throughput(own, need.warps * need.blocks, WAIT_CYCLES, need.shared, SCHEDULERS)


def upper_bound_tflops(cubin: Cubin, gpu: GpuModel) -> float:
    """The rate of the main loop if all units overlap perfectly."""
    assert cubin.loop is not None
    need = demands(cubin, gpu)
    return need.tensor / need.busiest * peak_tflops(cubin.loop, gpu)


def loop_tflops(cubin: Cubin, gpu: GpuModel) -> float:
    """The rate that is expected of the main loop."""
    assert cubin.loop is not None
    need = demands(cubin, gpu)
    return need.tensor * expected_rate(need) * peak_tflops(cubin.loop, gpu)


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
