"""What a kernel's machine code says of its time: an estimate, and why it is above the limit.

Sentences come from counts in the main loop and from traffic, not from a clock. What they propose is
in docs/reference/performance.md D.
"""

from benchmarks.denoiser.launches import ATTENTION, ROPE, LaunchStep, LaunchWork
from benchmarks.kernel.model import (
    BEST_A_CYCLE,
    GPUS,
    SCHEDULERS,
    Demands,
    demands,
    estimated_tflops,
    flop,
)
from kernels.aot.cubin import Cubin
from kernels.arch import Arch

DRAM_SHARE = 0.85  # of the rated bandwidth: assumed in estimates, docs/reference/performance.md F2
HALF_RATE = 1.05  # times the cycles of the best instructions, from which others are called slow


def estimated_ms(work: LaunchWork, cubin: Cubin, arch: Arch) -> float:
    """Of one launch: the main loop, or memory at `DRAM_SHARE` of its rate."""
    memory = work.traffic / (DRAM_SHARE * GPUS[arch].gigabytes_s) / 1e6
    if cubin.loop is None:
        return memory
    return max(memory, work.flop / estimated_tflops(cubin, arch) / 1e9)


def why(step: LaunchStep, work: LaunchWork, cubin: Cubin, arch: Arch) -> str:
    """What its machine code says of the time above the limit."""
    if cubin.loop is None:
        if step.kind == ROPE and work.traffic > work.moved:
            times = work.traffic / work.moved
            return (
                f"moves {times:.1f} times the least traffic, in six kernels: sums of squares and "
                "peaks out of the qkv product would save a third of it"
            )
        return (
            f"a pass of its own, {DRAM_SHARE:.0%} of the memory's rate assumed: a product or "
            "attention that stored 8-bit rows itself would save most of it"
        )
    slow = _slow_instruction(work, cubin, arch)
    if slow is not None:
        return slow
    need = demands(cubin, arch)
    return f"{_needs(need)}: {_remedy(step, need)}"


def _slow_instruction(work: LaunchWork, cubin: Cubin, arch: Arch) -> str | None:
    """None if its products run at the best rate of the GPU."""
    assert cubin.loop is not None
    work_of = {name: flop(name) * count for name, count in cubin.loop.mma.items()}
    best = SCHEDULERS * sum(work_of.values()) / BEST_A_CYCLE[arch][work.bits]
    needed = demands(cubin, arch).tensor
    if needed <= HALF_RATE * best:
        return None
    return (
        f"{max(work_of, key=work_of.__getitem__)} runs at {best / needed:.0%} of the best 8-bit "
        "rate: INT8 rows for this weight too, if a rotation tames its outliers, or FP16 sums moved "
        "to FP32 in time, would double it"
    )


def _needs(need: Demands) -> str:
    return (
        f"of the tensor time a turn needs {need.issue / need.tensor:.0%} in issue slots and "
        f"{need.special / need.tensor:.0%} in MUFU, {need.warps} warps a scheduler"
    )


def _remedy(step: LaunchStep, need: Demands) -> str:
    if need.special > 0.9 * need.tensor:
        return (
            "MUFU and tensor cores take turns; ping-pong warpgroups (Gluon) would overlap them, "
            "a polynomial for part of exp2 would shorten MUFU"
        )
    if step.kind == ATTENTION:
        return "lazy rescaling and a polynomial for part of exp2 would free issue slots and MUFU"
    if need.warps < 4:
        return (
            "two warps cannot cover each other's waits; a second block on each multiprocessor, or "
            "a persistent kernel with a producer warp, would"
        )
    return "waits at the end of each turn; a persistent kernel would overlap its epilogue too"
