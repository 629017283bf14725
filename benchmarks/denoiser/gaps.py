"""An estimate of a kernel's time from its machine code, and why it is above the limit.

Sentences come from counts in the main loop and from traffic, not from a clock. What they propose is
in docs/reference/performance.md D.
"""

from benchmarks.denoiser.launches import ATTENTION, ROPE, LaunchStep, LaunchWork
from benchmarks.kernel.model import (
    BEST_A_CYCLE,
    GPUS,
    SCHEDULERS,
    demands,
    estimated_tflops,
    flop,
)
from kernels.aot.cubin import Cubin
from kernels.arch import Arch

DRAM_SHARE = 0.85  # of the rated bandwidth: assumed in estimates, docs/reference/performance.md F2
HALF_RATE = 1.05  # times the cycles of the best instructions, from which others are called slow


def estimated_ms(work: LaunchWork, cubin: Cubin, arch: Arch) -> float:
    """The time of one launch: the main loop, or memory at `DRAM_SHARE` of its rate."""
    memory = work.traffic / (DRAM_SHARE * GPUS[arch].gigabytes_s) / 1e6
    if cubin.loop is None:
        return memory
    return max(memory, work.flop / estimated_tflops(cubin, arch) / 1e9)


def why(step: LaunchStep, work: LaunchWork, cubin: Cubin, arch: Arch) -> str:
    """Explains the time above the limit by the machine code."""
    if cubin.loop is None:
        if step.kind == ROPE and work.traffic > work.moved:
            return (
                f"moves {work.traffic / work.moved:.1f} times the least traffic, in six kernels: "
                "row sums out of the qkv product would save a third of it"
            )
        return "a pass of its own: a product or attention that stored 8-bit rows would save it"
    need, mma = demands(cubin, arch), cubin.loop.mma
    work_by = {name: flop(name) * count for name, count in mma.items()}
    best = SCHEDULERS * sum(work_by.values()) / BEST_A_CYCLE[arch][work.bits]
    if need.tensor > HALF_RATE * best:
        return (
            f"{max(work_by, key=work_by.__getitem__)} runs at {best / need.tensor:.0%} of the best "
            "8-bit rate: INT8 rows after a rotation, or FP16 sums moved to FP32, would double it"
        )
    if need.special > 0.9 * need.tensor:
        remedy = "MUFU and tensor cores take turns; ping-pong warpgroups would overlap them"
    elif step.kind == ATTENTION:
        remedy = "lazy rescaling and a polynomial for part of exp2 would free issue slots and MUFU"
    elif need.warps < 4:
        remedy = "two warps cannot cover each other's waits; a second block or a producer would"
    else:
        remedy = "waits at the end of each iteration; a persistent kernel would overlap them"
    return (
        f"of the tensor time an iteration needs {need.issue / need.tensor:.0%} in issue slots and "
        f"{need.special / need.tensor:.0%} in MUFU, {need.warps} warps a scheduler: {remedy}"
    )
