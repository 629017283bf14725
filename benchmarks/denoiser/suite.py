"""Suite `denoiser`: an estimate of where the time of one evaluation goes, and what is lost.

Every step of a block for every architecture: its work, what the GPU could do at best, and a time
from machine code. What is measured on a GPU is in suites `gpu` and `forward`.
"""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from benchmarks import pictures
from benchmarks.denoiser.forward_place import SIZES, name_of
from benchmarks.denoiser.gaps import estimated_ms, why
from benchmarks.denoiser.launches import (
    KINDS,
    STEPS,
    candidates,
)
from benchmarks.kernel.cases import cases
from benchmarks.kernel.cubins import compiled
from benchmarks.kernel.model import GPUS, limits_ms
from benchmarks.record import Figure, Suite
from benchmarks.timing import Cell, columns
from engine.config import SCAIL_14B
from engine.memory import ClipShape
from kernels.aot.cubin import Cubin
from kernels.arch import ARCHS, Arch

BOTH = 0.97  # two units this close to each other both bind
LISTED = 3  # of the losses of a forward


@dataclass(frozen=True, slots=True)
class StepRow:
    """A step in all layers of one forward."""

    arch: str
    gpu: str
    size: str
    tokens: int
    step: str
    kind: str
    count: int  # launches of it in a forward
    tflop: float
    gigabytes: float  # every input read once, every output written once
    bound: str  # which unit the limit comes from: tensor, memory, MUFU
    limit_ms: float  # the GPU at its rated clock, perfectly used
    ms: float
    kernel: str  # of several the one whose estimate is best
    gap: str  # what stands between `ms` and the limit, and what would win it back

    @property
    def lost_ms(self) -> float:
        return self.ms - self.limit_ms

    @property
    def share(self) -> float:
        """The part of the time that the limit is."""
        return self.limit_ms / self.ms


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
        limits = limits_ms(work.flop, work.moved, work.exponentials, work.bits, arch)
        limit, launches = max(limits.values()), step.count * SCAIL_14B.layers
        rows.append(
            StepRow(
                arch.name, GPUS[arch].name, name_of(size), tokens, step.name,
                step.kind, launches, launches * work.flop / 1e12, launches * work.moved / 1e9,
                "+".join(unit for unit, ms in limits.items() if ms > BOTH * limit),
                launches * limit, launches * times[name], name,
                why(step, work, kernels[step.name][name], arch),
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


def largest_losses(rows: Sequence[StepRow], count: int = LISTED) -> list[StepRow]:
    """The steps of one forward that lose most."""
    return sorted(rows, key=lambda row: -row.lost_ms)[:count]


def denoiser_table(rows: Sequence[StepRow]) -> str:
    """A table and a gap list for each forward."""
    return "\n\n".join(_forward_table(group) for group in groups(rows).values())


def _forward_table(rows: Sequence[StepRow]) -> str:
    first, limit, ms = rows[0], sum(row.limit_ms for row in rows), sum(row.ms for row in rows)
    heads = {"count": "d", "TFLOP": ".1f", "GB": ".1f", "bound by": "", "limit ms": ".1f",
        "est ms": ".1f", "share": ".0%", "lost ms": ".1f"}  # fmt: skip
    lines: list[Sequence[Cell]] = [
        (row.step, row.count, row.tflop or None, row.gigabytes, row.bound, row.limit_ms, row.ms,
         row.share, row.lost_ms)
        for row in rows
    ]  # fmt: skip
    work, moved = sum(row.tflop for row in rows), sum(row.gigabytes for row in rows)
    lines.append(("the forward", None, work, moved, None, limit, ms, limit / ms, ms - limit))
    said = [
        f"{first.gpu} ({first.arch}), one forward of {first.size}, {first.tokens} tokens: ESTIMATE",
        columns(heads, lines),
        "Largest losses, and what would win them back",
    ]
    for at, row in enumerate(largest_losses(rows), start=1):
        text = f"{at}. {row.step}, {row.lost_ms:.0f} ms, {row.lost_ms / ms:.0%}: {row.gap}."
        said += textwrap.wrap(text, 98, initial_indent="  ", subsequent_indent="     ")
    return "\n".join(said)


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
    """A picture for each size: seconds of a forward by kind of step, limits beside times."""
    made = []
    for size in dict.fromkeys(row.size for row in rows):
        of_size = [row for row in rows if row.size == size]
        made += _picture(size, of_size, folder, f"{stem}-{size}")
    return made


def _picture(size: str, rows: Sequence[StepRow], folder: Path, stem: str) -> list[Path]:
    bars: dict[str, dict[str, list[float]]] = {}
    for group in groups(rows).values():
        for label, field in (("limit", "limit_ms"), ("estimate", "ms")):
            bar = bars.setdefault(f"{group[0].gpu}\n{label}", {})
            for row in group:
                before = bar.get(row.kind, [0.0])[0]
                bar[row.kind] = [before + getattr(row, field) / 1000]
    fig, [axes] = pictures.figure(9.0, 1.6 + 0.62 * len(bars))
    for at, total in enumerate(pictures.stacked_bars(axes, [*bars.values()], KINDS)):
        axes.text(total, at, f" {total:.2f} s", va="center")
    axes.set_yticks(range(len(bars)), [*bars])
    axes.margins(x=0.1)
    axes.set_xlabel("seconds of one forward")
    title = f"One forward at {size}. Limit: rated clocks, nothing lost. Estimate: not measured."
    fig.suptitle(title, fontsize=12)
    fig.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return pictures.save(fig, folder, stem)


SUITE = Suite(measure_denoiser, denoiser_table, denoiser_figures, denoiser_pictures)
