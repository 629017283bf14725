"""Suite `kernels`: every kernel for every architecture, from its machine code.

Registers, shared memory, instructions for each matrix instruction, and two estimates of its rate at
`TOKENS`: an upper bound, and what is expected (`benchmarks.kernel.model`). The times of kernels on
a GPU are those of suite `gpu`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.kernel.cases import KernelCase, cases
from benchmarks.kernel.cubins import compiled
from benchmarks.kernel.estimate import EXPECTED, UPPER_BOUND, estimate
from benchmarks.kernel.model import GPUS
from benchmarks.record import Figure, Suite
from benchmarks.timing import columns
from engine.config import SCAIL_14B
from kernels.aot.cubin import Cubin
from kernels.arch import ARCHS, Arch

TOKENS = 48832  # of 81 frames of 512x896


@dataclass(frozen=True, slots=True)
class KernelRow:
    """One kernel of one architecture, or another library's; None where nothing is known."""

    name: str
    arch: str
    registers: int | None = None  # a thread's
    shared_kib: float | None = None
    instructions_per_mma: float | None = None
    bound_tflops: float | None = None  # from the machine code, not measured: an upper bound
    expected_tflops: float | None = None  # and what is expected
    tokens: int | None = None
    error: float | None = None  # relative, against the reference
    ms: float | None = None  # median
    tflops: float | None = None
    share: float | None = None  # of what the GPU could do at best
    note: str = ""
    noise_ms: float | None = None  # half of the spread of several medians


def measure_kernels() -> tuple[str, list[KernelRow]]:
    """Says how kernels were checked, and gives a row for each of every architecture."""
    rows = []
    for arch in ARCHS:
        everything = cases(arch, SCAIL_14B)
        cubins = compiled(arch)
        rows += [static_row(case, arch, cubins) for case in everything]
    return "the proofs of their machine code alone", rows


def static_row(case: KernelCase, arch: Arch, cubins: dict[str, Cubin]) -> KernelRow:
    """Describes a case by its machine code: of several kernels the one with the most registers."""
    spec = max(case.specs, key=lambda spec: cubins[spec.name].registers)
    held, work = cubins[spec.name], case.work(TOKENS)
    row = KernelRow(case.name, arch.name, held.registers, held.shared_bytes / 1024)
    if held.loop is None:
        return row
    times = estimate(work, held, GPUS[arch], spec.tuning[arch].blocks)
    return replace(
        row,
        instructions_per_mma=held.loop.instructions / sum(held.loop.mma.values()),
        bound_tflops=work.flop / times.bound_ms / 1e9,
        expected_tflops=work.flop / times.ms / 1e9,
    )


def kernel_table(rows: Sequence[KernelRow]) -> str:
    """Columns for a terminal; "bound" and "expect" are estimates in TFLOPS, no measurements."""
    heads = {"arch": "", "regs": "d", "KiB": ".0f", "i/mma": ".2f", "bound": ".0f",
        "expect": ".0f", "tokens": "d",
        "error": ".1e", "ms": ".3f", "TF": ".0f", "share": ".0%", "note": ""}  # fmt: skip
    lines = [
        (row.name, row.arch, row.registers, row.shared_kib, row.instructions_per_mma,
         row.bound_tflops, row.expected_tflops, row.tokens, row.error, row.ms, row.tflops,
         row.share, row.note)
        for row in rows
    ]  # fmt: skip
    return columns(heads, lines)


def kernel_figures(rows: Sequence[KernelRow]) -> list[Figure]:
    """Times that were measured, and rates that machine code allows: never one for the other."""
    found = []
    for row in rows:
        name = f"{row.arch} {row.name}"
        if row.ms is not None:
            found.append(Figure(f"{name}, {row.tokens} tokens", row.ms, "ms", row.noise_ms or 0.0))
        for kind, rate in ((UPPER_BOUND, row.bound_tflops), (EXPECTED, row.expected_tflops)):
            if rate is not None:
                figure = f"{name}, {kind}"
                found.append(Figure(figure, rate, "TFLOPS", 0.0, "higher", "estimate"))
    return found


SUITE = Suite(measure_kernels, kernel_table, kernel_figures)
