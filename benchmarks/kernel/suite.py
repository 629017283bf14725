"""Suite `kernels`: every kernel for every architecture, from its machine code.

Registers, shared memory, instructions for each matrix instruction, and an estimate of its rate. The
times of kernels on a GPU are those of suite `gpu`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.kernel.cases import KernelCase, cases
from benchmarks.kernel.cubins import compiled
from benchmarks.kernel.model import estimated_tflops
from benchmarks.record import Figure, Suite
from benchmarks.timing import columns
from engine.config import SCAIL_14B
from kernels.aot.cubin import Cubin
from kernels.arch import ARCHS, Arch


@dataclass(frozen=True, slots=True)
class KernelRow:
    """One kernel of one architecture, or another library's; None where nothing is known."""

    name: str
    arch: str
    registers: int | None = None  # a thread's
    shared_kib: float | None = None
    instructions_per_mma: float | None = None
    estimated_tflops: float | None = None  # from the machine code: not measured
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
    held = max((cubins[spec.name] for spec in case.specs), key=lambda cubin: cubin.registers)
    mix = held.loop
    return KernelRow(
        case.name,
        arch.name,
        held.registers,
        held.shared_bytes / 1024,
        None if mix is None else mix.instructions / sum(mix.mma.values()),
        None if mix is None else estimated_tflops(held, arch),
    )


def kernel_table(rows: Sequence[KernelRow]) -> str:
    """Columns for a terminal; "est" is an estimate and no measurement."""
    heads = {"arch": "", "regs": "d", "KiB": ".0f", "i/mma": ".2f", "est TF": ".0f", "tokens": "d",
        "error": ".1e", "ms": ".3f", "TF": ".0f", "share": ".0%", "note": ""}  # fmt: skip
    lines = [
        (row.name, row.arch, row.registers, row.shared_kib, row.instructions_per_mma,
         row.estimated_tflops, row.tokens, row.error, row.ms, row.tflops, row.share, row.note)
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
        if row.estimated_tflops is not None:
            rate = row.estimated_tflops
            found.append(Figure(name, rate, "TFLOPS", 0.0, "higher", "estimate"))
    return found


SUITE = Suite(measure_kernels, kernel_table, kernel_figures)
