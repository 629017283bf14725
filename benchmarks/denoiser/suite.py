"""Suite `denoiser`: an estimate of where the time of one evaluation goes, and what is lost.

Every step of a block for every architecture: its work, what the GPU could do at best, and two times
from machine code, an upper bound of its speed and what is expected (`benchmarks.kernel.model`).
What is measured on a GPU is in suites `gpu` and `forward`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from benchmarks import pictures
from benchmarks.denoiser.launches import KINDS, SIZES, STEPS, candidates, name_of
from benchmarks.kernel.cases import cases
from benchmarks.kernel.cubins import compiled
from benchmarks.kernel.estimate import EXPECTED, UPPER_BOUND, Estimate, estimate
from benchmarks.kernel.model import GPUS, SCHEDULERS, demands, limits_ms
from benchmarks.kernel.work import LaunchWork
from benchmarks.record import Figure, Suite
from benchmarks.timing import Cell, columns
from engine.config import SCAIL_14B
from engine.memory import ClipShape
from kernels.aot.cubin import Cubin
from kernels.arch import ARCHS, Arch

BOTH = 0.97  # two units this close to each other both bind


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
    bound_ms: float  # this machine code, all overlaps perfect: an upper bound of its speed
    ms: float  # expected
    # where there is a main loop: parts of the time of its tensor cores that an iteration needs
    issue: float | None  # to issue its instructions
    mufu: float | None  # for exponentials
    shared: float | None  # to load operands from shared memory
    warps: int | None  # of a scheduler

    @property
    def lost_ms(self) -> float:
        return self.ms - self.limit_ms


@dataclass(frozen=True, slots=True)
class Candidate:
    """A kernel that may do a step, and the tile sizes that it was compiled with."""

    cubin: Cubin
    blocks: Mapping[str, int]

    def estimate(self, work: LaunchWork, arch: Arch) -> Estimate:
        return estimate(work, self.cubin, GPUS[arch], self.blocks)


Kernels: TypeAlias = Mapping[str, Mapping[str, Candidate]]  # of each step, by the names of cases


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
    specs = {case.name: case.specs[0] for case in cases(arch, SCAIL_14B)}
    made = {
        name: Candidate(cubins[spec.name], spec.tuning[arch].blocks) for name, spec in specs.items()
    }
    return {step.name: {name: made[name] for name in candidates(step, arch)} for step in STEPS}


def estimated_rows(arch: Arch, size: ClipShape, tokens: int, kernels: Kernels) -> list[StepRow]:
    """Rows from the machine code of each step's kernels, the fastest of several."""
    rows = []
    for step in STEPS:
        work = step.work(tokens)
        found = [(each.estimate(work, arch), each) for each in kernels[step.name].values()]
        time, best = min(found, key=lambda pair: pair[0].ms)
        limits = limits_ms(work, arch)
        limit, launches = max(limits.values()), step.count * SCAIL_14B.layers
        need = None if best.cubin.loop is None else demands(best.cubin, GPUS[arch])
        rows.append(
            StepRow(
                arch.name, name_of(size), step.name, step.kind,
                launches, launches * work.flop / 1e12, launches * work.moved / 1e9,
                "+".join(unit for unit, ms in limits.items() if ms > BOTH * limit),
                launches * limit, launches * time.bound_ms, launches * time.ms,
                None if need is None else need.issue / need.tensor,
                None if need is None else need.special / need.tensor,
                None if need is None else SCHEDULERS * need.shared / need.tensor,
                None if need is None else need.warps * need.blocks,
            )
        )  # fmt: skip
    return rows


# --- shown


def groups(rows: Iterable[StepRow]) -> dict[tuple[str, str], list[StepRow]]:
    """The forwards: by size and architecture, in order."""
    found: dict[tuple[str, str], list[StepRow]] = {}
    for row in rows:
        found.setdefault((row.size, row.arch), []).append(row)
    return found


def totals(rows: Iterable[StepRow]) -> tuple[float, float, float]:
    """Milliseconds of all steps: the limit, the upper bound of speed, what is expected."""
    times = [(row.limit_ms, row.bound_ms, row.ms) for row in rows]
    limit, bound, ms = map(sum, zip(*times))
    return limit, bound, ms


def denoiser_table(rows: Sequence[StepRow]) -> str:
    """A table for each forward."""
    return "\n\n".join(_forward_table(group) for group in groups(rows).values())


def _forward_table(rows: Sequence[StepRow]) -> str:
    heads = {"TFLOP": ".1f", "GB": ".0f", "bound by": "", "limit": ".0f",
        "bound": ".0f", "expect": ".0f", "lost": ".0f", "issue": ".0%", "MUFU": ".0%",
        "smem": ".0%", "warps": "d"}  # fmt: skip
    lines: list[Sequence[Cell]] = [
        (row.step, row.tflop or None, row.gigabytes, row.bound, row.limit_ms,
         row.bound_ms, row.ms, row.lost_ms, row.issue, row.mufu, row.shared, row.warps)
        for row in rows
    ]  # fmt: skip
    limit, bound, ms = totals(rows)
    work, moved = sum(row.tflop for row in rows), sum(row.gigabytes for row in rows)
    whole = limit, bound, ms, ms - limit, None, None, None, None
    lines.append(("the forward", work, moved, None, *whole))
    title = f"{rows[0].arch}, one forward of {rows[0].size}: ESTIMATES in ms"
    return f"{title} (issue, MUFU, smem: shares of tensor time)\n{columns(heads, lines)}"


def denoiser_figures(rows: Sequence[StepRow]) -> list[Figure]:
    """The whole of each forward, and its steps; the name of a figure ends in its kind."""
    found = []
    for (size, arch), group in groups(rows).items():
        steps = [("forward", *totals(group)[1:])]
        steps += [(row.step, row.bound_ms, row.ms) for row in group]
        for step, bound, ms in steps:
            for kind, value in ((UPPER_BOUND, bound), (EXPECTED, ms)):
                name = f"{arch} {size} {step}, {kind}"
                found.append(Figure(name, value, "ms", 0.0, "lower", "estimate"))
    return found


def denoiser_pictures(rows: Sequence[StepRow], folder: Path, stem: str) -> list[Path]:
    """Draws seconds of a forward by kind of step, limits beside times, the sizes side by side."""
    gpu_names = {arch.name: gpu.name for arch, gpu in GPUS.items()}
    bars: dict[str, dict[str, dict[str, list[float]]]] = {}
    for row in rows:
        of_size = bars.setdefault(row.size, {})
        times = row.limit_ms, row.bound_ms, row.ms
        for label, ms in zip(("limit", "upper bound", "expected"), times):
            bar = of_size.setdefault(f"{gpu_names[row.arch]}\n{label}", {})
            bar[row.kind] = [bar.get(row.kind, [0.0])[0] + ms / 1000]
    fig, parts = pictures.figure(12.0, 7.0, len(bars))
    for axes, (size, of_size) in zip(parts, bars.items()):
        for at, total in enumerate(pictures.stacked_bars(axes, [*of_size.values()], KINDS)):
            axes.text(total, at, f" {total:.2f} s", va="center")
        axes.set_yticks(range(len(of_size)), [*of_size])
        axes.margins(x=0.15)
        axes.set_xlabel(f"seconds of one forward of {size}")
    fig.suptitle(
        "Not measured. Limit: any code, nothing lost. Upper bound of speed: our code, all "
        "overlaps perfect.",
        fontsize=12,
    )
    fig.legend(*parts[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return pictures.save(fig, folder, stem)


SUITE = Suite(measure_denoiser, denoiser_table, denoiser_figures, denoiser_pictures)
