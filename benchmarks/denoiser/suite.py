"""Suite `denoiser`: an estimate of where the time of one evaluation goes, and what is lost.

Every step of a block for every architecture: its work, what the GPU could do at best, and a time
from machine code. What is measured on a GPU is in suites `gpu` and `forward`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from benchmarks import pictures
from benchmarks.denoiser.launches import KINDS, SIZES, STEPS, candidates, name_of
from benchmarks.kernel.cases import cases
from benchmarks.kernel.cubins import compiled
from benchmarks.kernel.model import GPUS, demands, estimated_tflops, limits_ms
from benchmarks.kernel.work import LaunchWork
from benchmarks.record import Figure, Suite
from benchmarks.timing import Cell, columns
from engine.config import SCAIL_14B
from engine.memory import ClipShape
from kernels.aot.cubin import Cubin
from kernels.arch import ARCHS, Arch

BOTH = 0.97  # two units this close to each other both bind
DRAM_SHARE = 0.85  # of the rated bandwidth: assumed in estimates, docs/reference/performance.md F2


@dataclass(frozen=True, slots=True)
class StepRow:
    """A step in all layers of one forward."""

    arch: str
    size: str
    step: str
    kind: str
    count: int  # launches of it in a forward
    tflop: float
    gigabytes: float  # every input read once, every output written once
    bound: str  # which unit the limit comes from: tensor, memory, MUFU
    limit_ms: float  # the GPU at its rated clock, perfectly used
    ms: float
    # where there is a main loop: parts of the time of its tensor cores that an iteration needs
    issue: float | None  # to issue its instructions
    mufu: float | None  # for exponentials
    warps: int | None  # of a scheduler

    @property
    def lost_ms(self) -> float:
        return self.ms - self.limit_ms


Kernels: TypeAlias = Mapping[str, Mapping[str, Cubin]]  # of each step, by the names of cases


def measure_denoiser(sizes: Sequence[ClipShape] = SIZES) -> tuple[str, list[StepRow]]:
    """Says how kernels were checked, and gives a row for each step."""
    rows: list[StepRow] = []
    for arch in ARCHS:
        kernels = kernels_of(arch)
        for size in sizes:
            rows += estimated_rows(arch, size, size.tokens, kernels)
    return "the proofs of their machine code alone: all times are estimates", rows


def kernels_of(arch: Arch) -> Kernels:
    """The kernels that a worker may choose from for each step, compiled."""
    cubins = compiled(arch)
    spec_of = {case.name: case.specs[0].name for case in cases(arch, SCAIL_14B)}
    return {
        step.name: {name: cubins[spec_of[name]] for name in candidates(step, arch)}
        for step in STEPS
    }


def estimated_rows(arch: Arch, size: ClipShape, tokens: int, kernels: Kernels) -> list[StepRow]:
    """Rows from the machine code of each step's kernels, the fastest of several."""
    rows = []
    for step in STEPS:
        work = step.work(tokens)
        times = {name: estimated_ms(work, c, arch) for name, c in kernels[step.name].items()}
        name = min(times, key=times.__getitem__)
        kernel = kernels[step.name][name]
        limits = limits_ms(work, arch)
        limit, launches = max(limits.values()), step.count * SCAIL_14B.layers
        need = None if kernel.loop is None else demands(kernel, arch)
        rows.append(
            StepRow(
                arch.name, name_of(size), step.name, step.kind,
                launches, launches * work.flop / 1e12, launches * work.moved / 1e9,
                "+".join(unit for unit, ms in limits.items() if ms > BOTH * limit),
                launches * limit, launches * times[name],
                None if need is None else need.issue / need.tensor,
                None if need is None else need.special / need.tensor,
                None if need is None else need.warps,
            )
        )  # fmt: skip
    return rows


def estimated_ms(work: LaunchWork, cubin: Cubin, arch: Arch) -> float:
    """The time of one launch: the main loop, or memory at `DRAM_SHARE` of its rate."""
    memory = (work.moved + work.again) / (DRAM_SHARE * GPUS[arch].gigabytes_s) / 1e6
    if cubin.loop is None:
        return memory
    return max(memory, work.flop / estimated_tflops(cubin, arch) / 1e9)


# --- shown


def groups(rows: Iterable[StepRow]) -> dict[tuple[str, str], list[StepRow]]:
    """The forwards: by size and architecture, in order."""
    found: dict[tuple[str, str], list[StepRow]] = {}
    for row in rows:
        found.setdefault((row.size, row.arch), []).append(row)
    return found


def denoiser_table(rows: Sequence[StepRow]) -> str:
    """A table for each forward."""
    return "\n\n".join(_forward_table(group) for group in groups(rows).values())


def _forward_table(rows: Sequence[StepRow]) -> str:
    heads = {"count": "d", "TFLOP": ".1f", "GB": ".1f", "bound by": "", "limit ms": ".1f",
        "est ms": ".1f", "lost ms": ".1f", "issue": ".0%", "MUFU": ".0%",
        "warps": "d"}  # fmt: skip
    lines: list[Sequence[Cell]] = [
        (row.step, row.count, row.tflop or None, row.gigabytes, row.bound, row.limit_ms, row.ms,
         row.lost_ms, row.issue, row.mufu, row.warps)
        for row in rows
    ]  # fmt: skip
    limit, ms = sum(row.limit_ms for row in rows), sum(row.ms for row in rows)
    work, moved = sum(row.tflop for row in rows), sum(row.gigabytes for row in rows)
    whole = limit, ms, ms - limit, None, None, None
    lines.append(("the forward", None, work, moved, None, *whole))
    title = f"{rows[0].arch}, one forward of {rows[0].size}: ESTIMATE"
    return f"{title} (issue, MUFU: shares of tensor time)\n{columns(heads, lines)}"


def denoiser_figures(rows: Sequence[StepRow]) -> list[Figure]:
    """The whole of each forward, and its steps."""
    found = []
    for (size, arch), group in groups(rows).items():
        whole = ("forward", sum(row.ms for row in group))
        for step, ms in (whole, *((row.step, row.ms) for row in group)):
            name = f"{arch} {size} estimate {step}"
            found.append(Figure(name, ms, "ms", 0.0, "lower", "estimate"))
    return found


def denoiser_pictures(rows: Sequence[StepRow], folder: Path, stem: str) -> list[Path]:
    """Draws seconds of a forward by kind of step, limits beside times, the sizes side by side."""
    gpu_names = {arch.name: gpu.name for arch, gpu in GPUS.items()}
    bars: dict[str, dict[str, dict[str, list[float]]]] = {}
    for row in rows:
        of_size = bars.setdefault(row.size, {})
        for label, ms in (("limit", row.limit_ms), ("estimate", row.ms)):
            bar = of_size.setdefault(f"{gpu_names[row.arch]}\n{label}", {})
            bar[row.kind] = [bar.get(row.kind, [0.0])[0] + ms / 1000]
    fig, parts = pictures.figure(12.0, 6.0, len(bars))
    for axes, (size, of_size) in zip(parts, bars.items()):
        for at, total in enumerate(pictures.stacked_bars(axes, [*of_size.values()], KINDS)):
            axes.text(total, at, f" {total:.2f} s", va="center")
        axes.set_yticks(range(len(of_size)), [*of_size])
        axes.margins(x=0.15)
        axes.set_xlabel(f"seconds of one forward of {size}")
    fig.suptitle("Limit: rated clocks, nothing lost. Estimate: not measured.", fontsize=12)
    fig.legend(*parts[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return pictures.save(fig, folder, stem)


SUITE = Suite(measure_denoiser, denoiser_table, denoiser_figures, denoiser_pictures)
