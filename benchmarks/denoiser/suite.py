"""Suite `denoiser`: where the time of one evaluation of the transformer goes, and what is lost.

Every step of a block for every architecture: its work, what the GPU could do at best, and a time.
Without a GPU the time is an estimate from machine code; on one, that architecture is also measured,
inside a block whose result was held against the plain one. The two never stand in one table.
"""

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Literal, TypeAlias

import torch
from torch.nn.attention import sdpa_kernel

from benchmarks import pictures
from benchmarks.denoiser.forward_blocks import (
    UPDATE_LIMIT,
    drawn_scene,
    our_block,
    plain_block,
)
from benchmarks.denoiser.forward_place import RUNS, SIZES, ForwardPlace, name_of, prepared
from benchmarks.denoiser.gaps import estimated_ms, why
from benchmarks.denoiser.launches import (
    KINDS,
    STEPS,
    CudaStopwatch,
    LaunchStep,
    LaunchWork,
    Stopwatch,
    candidates,
    timed_block,
    work_of,
)
from benchmarks.kernel.cases import cases
from benchmarks.kernel.cubins import compiled
from benchmarks.kernel.gpu import difference
from benchmarks.kernel.model import GPUS, limits_ms
from benchmarks.record import Figure, Suite
from benchmarks.timing import Cell, columns, require, spread
from engine.config import SCAIL_14B, ModelConfig
from engine.memory import ClipShape
from kernels.aot.cubin import Cubin
from kernels.arch import ARCHS, Arch

BOTH = 0.97  # two units this close to each other both bind
REST = LaunchStep("between steps", "between steps", "", "", 1, lambda *_: LaunchWork())
LAUNCHES = "small kernels of PyTorch, and launches that a CUDA graph would not wait for"
LISTED = 3  # of the losses of a forward

Origin = Literal["estimate", "measured"]


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
    noise_ms: float  # half of the spread between runs; 0 of an estimate
    source: Origin
    kernel: str  # of several the one whose estimate is best; "" where the host chose by a trial
    gap: str  # what stands between `ms` and the limit, and what would win it back

    @property
    def lost_ms(self) -> float:
        return self.ms - self.limit_ms

    @property
    def share(self) -> float | None:
        """The part of the time that the limit is; None where there is no limit."""
        return self.limit_ms / self.ms if self.limit_ms else None


@dataclass(frozen=True, slots=True)
class ForwardCase:
    """What is estimated or measured."""

    arch: Arch
    model: ModelConfig
    size: ClipShape
    tokens: int  # S


Kernels: TypeAlias = Mapping[str, Mapping[str, Cubin]]  # of each step, by the names of cases


def measure_denoiser(sizes: Sequence[ClipShape] = SIZES) -> tuple[str, list[StepRow]]:
    """Raises `WrongResult` for a block that is wrong, and what compiling and launching raise."""
    rows: list[StepRow] = []
    for arch in ARCHS:
        kernels = kernels_of(arch)
        for size in sizes:
            rows += estimated_rows(ForwardCase(arch, SCAIL_14B, size, size.tokens), kernels)
    if not torch.cuda.is_available():
        return "the proofs of their machine code alone: estimates, no GPU here runs them", rows
    with NamedTemporaryFile() as said, prepared(None, Path(said.name), dry=False) as place:
        for size in sizes:
            rows += measured_rows(place, size, CudaStopwatch)
    return f"the plain block with the same weights, off by at most {UPDATE_LIMIT:g}", rows


# --- estimated


def kernels_of(arch: Arch) -> Kernels:
    """The kernels that a worker may choose from for each step, compiled."""
    cubins = compiled(arch)
    spec_of = {case.name: case.specs[0].name for case in cases(arch, SCAIL_14B)}
    return {
        step.name: {name: cubins[spec_of[name]] for name in candidates(step, SCAIL_14B, arch)}
        for step in STEPS
    }


def estimated_rows(forward: ForwardCase, kernels: Kernels) -> list[StepRow]:
    """Rows from the machine code of each step's kernels, the fastest of several."""
    arch, model, rows = forward.arch, forward.model, []
    for step in STEPS:
        work = work_of(step, model, forward.tokens)
        times = {name: estimated_ms(work, c, arch) for name, c in kernels[step.name].items()}
        name = min(times, key=times.__getitem__)
        gap = why(step, work, kernels[step.name][name], arch)
        ms = step.count * model.layers * times[name]
        rows.append(_row(forward, step, (ms, 0.0), "estimate", name, gap))
    return rows


# --- measured


@torch.inference_mode()
def measured_rows(
    place: ForwardPlace, size: ClipShape, stopwatch: Callable[[], Stopwatch]
) -> list[StepRow]:
    """One block on `place`, after its result was found right; the median of some runs."""
    scene = drawn_scene(place, size)
    plain = plain_block(place, scene)
    with sdpa_kernel([*place.backends]):
        want = plain(scene.x, scene.modulation, scene.context, scene.rope)
    got = our_block(place, scene)(scene.x.clone())
    error = difference(got - scene.x, want - scene.x)[0]
    require(error <= UPDATE_LIMIT, f"{name_of(size)}: a block is off by {error:.1e}")
    del got, want, plain
    runs = [timed_block(place, scene, stopwatch()) for _ in range(RUNS)]
    forward, layers = ForwardCase(place.arch, place.model, size, size.tokens), place.model.layers
    rows = []
    for step, key in (*((step, step.name) for step in STEPS), (REST, "between")):
        time = spread([layers * run[key] for run in runs]) or (0.0, 0.0)
        rows.append(_row(forward, step, time, "measured", gap=LAUNCHES if step is REST else ""))
    return rows


def _row(
    forward: ForwardCase,
    step: LaunchStep,
    time: tuple[float, float],
    source: Origin,
    kernel: str = "",
    gap: str = "",
) -> StepRow:
    """`time`: milliseconds of the whole forward, and their noise."""
    arch, launches = forward.arch, step.count * forward.model.layers
    work = work_of(step, forward.model, forward.tokens)
    limits = limits_ms(work.flop, work.moved, work.exponentials, work.bits, arch)
    limit = max(limits.values())
    bound = "+".join(unit for unit, ms in limits.items() if limit and ms > BOTH * limit)
    return StepRow(
        arch.name, GPUS[arch].name, name_of(forward.size), forward.tokens, step.name, step.kind,
        launches, launches * work.flop / 1e12, launches * work.moved / 1e9, bound,
        launches * limit, *time, source, kernel, gap,
    )  # fmt: skip


# --- shown


def groups(rows: Iterable[StepRow]) -> dict[tuple[str, str, Origin], list[StepRow]]:
    """The forwards: by size, architecture and source, in order."""
    found: dict[tuple[str, str, Origin], list[StepRow]] = {}
    for row in rows:
        found.setdefault((row.size, row.arch, row.source), []).append(row)
    return found


def largest_losses(rows: Sequence[StepRow], count: int = LISTED) -> list[StepRow]:
    """The steps of one forward that lose most."""
    return sorted(rows, key=lambda row: -row.lost_ms)[:count]


def denoiser_table(rows: Sequence[StepRow]) -> str:
    """A table and a gap list for each forward."""
    gaps = {(row.arch, row.size, row.step): row.gap for row in rows if row.gap}
    return "\n\n".join(_forward_table(group, gaps) for group in groups(rows).values())


def _forward_table(rows: Sequence[StepRow], gaps: dict[tuple[str, str, str], str]) -> str:
    first, limit, ms = rows[0], sum(row.limit_ms for row in rows), sum(row.ms for row in rows)
    estimate = first.source == "estimate"
    heads = {"count": "d", "TFLOP": ".1f", "GB": ".1f", "bound by": "", "limit ms": ".1f",
        "est ms" if estimate else "ms": ".1f", "share": ".0%", "lost ms": ".1f"}  # fmt: skip
    lines: list[Sequence[Cell]] = [
        (row.step, row.count, row.tflop or None, row.gigabytes, row.bound, row.limit_ms, row.ms,
         row.share, row.lost_ms)
        for row in rows
    ]  # fmt: skip
    work, moved = sum(row.tflop for row in rows), sum(row.gigabytes for row in rows)
    lines.append(("the forward", None, work, moved, None, limit, ms, limit / ms, ms - limit))
    how = "ESTIMATE from machine code" if estimate else "measured, median of runs"
    said = [
        f"{first.gpu} ({first.arch}), one forward of {first.size}, {first.tokens} tokens: {how}",
        columns(heads, lines),
        "Largest losses, and what would win them back",
    ]
    for at, row in enumerate(largest_losses(rows), start=1):
        gap = gaps[row.arch, row.size, row.step]
        text = f"{at}. {row.step}, {row.lost_ms:.0f} ms, {row.lost_ms / ms:.0%}: {gap}."
        said += textwrap.wrap(text, 98, initial_indent="  ", subsequent_indent="     ")
    return "\n".join(said)


def denoiser_figures(rows: Sequence[StepRow]) -> list[Figure]:
    """The whole of each forward, and its steps."""
    found = []
    for (size, arch, source), group in groups(rows).items():
        name = f"{arch} {size} {source}"
        whole = ("forward", sum(row.ms for row in group), sum(row.noise_ms for row in group))
        for step, ms, noise in (whole, *((row.step, row.ms, row.noise_ms) for row in group)):
            found.append(Figure(f"{name} {step}", ms, "ms", noise, "lower", source))
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
    for (_, _, source), group in groups(rows).items():
        fields = {"limit": "limit_ms", "estimate": "ms"} if source == "estimate" else {source: "ms"}
        for label, field in fields.items():
            bar = bars.setdefault(f"{group[0].gpu}\n{label}", {})
            for row in group:
                before = bar.get(row.kind, [0.0])[0]
                bar[row.kind] = [before + getattr(row, field) / 1000]
    kinds = [kind for kind in (*KINDS, REST.kind) if any(kind in bar for bar in bars.values())]
    fig, [axes] = pictures.figure(9.0, 1.6 + 0.62 * len(bars))
    for at, total in enumerate(pictures.stacked_bars(axes, [*bars.values()], kinds)):
        axes.text(total, at, f" {total:.2f} s", va="center")
    axes.set_yticks(range(len(bars)), [*bars])
    axes.margins(x=0.1)
    axes.set_xlabel("seconds of one forward")
    title = f"One forward at {size}. Limit: rated clocks, nothing lost. Estimate: not measured."
    fig.suptitle(title, fontsize=12)
    fig.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return pictures.save(fig, folder, stem)


SUITE = Suite(measure_denoiser, denoiser_table, denoiser_figures, denoiser_pictures)
