"""Suite `denoiser`: where the time of one evaluation of the transformer goes, and what is lost.

Every step of a block for every architecture: its work, what the GPU could do at best, and a time.
Without a GPU the time is an estimate from machine code; on one, that architecture is also measured,
inside a block whose result was held against the plain one. The two never stand in one table.
"""

import statistics
import textwrap
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, TypeAlias

import torch
from torch.nn.attention import sdpa_kernel

from benchmarks import pictures
from benchmarks.denoiser.forward_blocks import UPDATE_LIMIT, drawn_scene, plain_block
from benchmarks.denoiser.forward_place import RUNS, ForwardPlace, build, name_of, prepared
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
from benchmarks.figures import Figure
from benchmarks.kernel.cases import SCAIL_14B as SIZES_14B
from benchmarks.kernel.cases import cases
from benchmarks.kernel.gpu import load
from benchmarks.kernel.model import GPUS, limits_ms
from benchmarks.kernel.suite import compile_cases, difference, runs_here
from benchmarks.timing import require
from engine.config import SCAIL_14B, ModelConfig
from engine.denoise.block import block_modulation, context_keys, run_block
from engine.errors import Unavailable
from engine.memory import ClipShape
from engine.models.attention import sdpa
from kernels.aot.cubin import Cubin
from kernels.arch import ARCHS, Arch

SIZES = (ClipShape(512, 896, 81), ClipShape(416, 672, 81))
BOTH = 0.97  # two units this close to each other both bind
REST = LaunchStep("between steps", "between steps", "", "", 1)
LAUNCHES = "small kernels of PyTorch, and launches that a CUDA graph would not wait for"
EXPLAINED = 0.01  # of the forward: losses below it are not listed
LISTED = 3  # at least

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
        """Of the limit; None for what has none."""
        return self.limit_ms / self.ms if self.limit_ms else None


@dataclass(frozen=True, slots=True)
class ForwardCase:
    """What is estimated or measured."""

    arch: Arch
    model: ModelConfig
    size: ClipShape
    tokens: int  # S


Kernels: TypeAlias = Mapping[str, Mapping[str, Cubin]]  # of each step, by the names of cases


def measure_denoiser(
    sizes: Sequence[ClipShape] = SIZES, cubins: Path | None = None
) -> tuple[str, list[StepRow]]:
    """`cubins`: a folder of `forward.py build`, in place of compiling for all architectures.

    Raises `WrongResult` for a block that is wrong, `Unavailable` for a folder that lacks kernels,
    and what compiling and launching raise.
    """
    rows: list[StepRow] = []
    held = None if cubins is None else load(cubins)
    made_for = None if held is None else {cubin.arch for cubin in held.values()}
    for arch in ARCHS:
        if made_for is None or arch.name in made_for:
            kernels = kernels_of(arch, held)
            for size in sizes:
                rows += estimated_rows(ForwardCase(arch, SCAIL_14B, size, size.tokens), kernels)
    here = next((arch for arch in ARCHS if runs_here(arch)), None)
    if here is None:
        return "the proofs of their machine code alone: estimates, no GPU here runs them", rows
    with TemporaryDirectory() as scratch:
        folder = cubins or Path(scratch) / "cubins"
        if cubins is None:
            build(folder, here)
        given = Namespace(dry=False, folder=folder, out=Path(scratch) / "said.jsonl")
        with prepared(given) as place, torch.inference_mode():
            for size in sizes:
                rows += measured_rows(place, size, CudaStopwatch)
    return f"the plain block with the same weights, off by at most {UPDATE_LIMIT:g}", rows


# --- estimated


def kernels_of(arch: Arch, held: Mapping[str, Cubin] | None = None) -> Kernels:
    """What a worker may choose from: out of `held`, by the names of specs, or compiled."""
    by_name = {case.name: case for case in cases(arch, SIZES_14B)}
    wanted = {step.name: candidates(step, SCAIL_14B, arch) for step in STEPS}
    used = [by_name[name] for name in dict.fromkeys(n for names in wanted.values() for n in names)]
    cubins = compile_cases(used, arch) if held is None else held
    lacking = {case.specs[0].name for case in used} - {*cubins}
    if lacking:
        raise Unavailable(
            f"There are no kernels {', '.join(sorted(lacking))} for {arch.name}. Make the folder "
            f"with: python benchmarks/denoiser/forward.py build DIR --arch {arch.name}"
        )
    return {
        step: {name: cubins[by_name[name].specs[0].name] for name in names}
        for step, names in wanted.items()
    }


def estimated_rows(forward: ForwardCase, kernels: Kernels) -> list[StepRow]:
    """From the machine code of each step's kernels, the fastest of several."""
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


def measured_rows(
    place: ForwardPlace, size: ClipShape, stopwatch: Callable[[], Stopwatch]
) -> list[StepRow]:
    """One block on `place`, after its result was found right; the median of some runs."""
    scene = drawn_scene(place, size)
    context, rope = scene.context, scene.rope
    keys = context_keys(place.ops, scene.context_weights, context.text, context.vision)
    modulation = block_modulation(scene.weights, scene.modulation)
    dtype = torch.bfloat16 if place.device.type == "cuda" else torch.float32
    plain = plain_block(place.model, scene.weights, scene.context_weights, dtype, sdpa)
    with sdpa_kernel([*place.backends]):
        want = plain(scene.x, scene.modulation, context, rope)
    got = run_block(place.ops, scene.weights, keys, scene.x.clone(), modulation, rope)
    error = difference(got - scene.x, want - scene.x)[0]
    require(error <= UPDATE_LIMIT, f"{name_of(size)}: a block is off by {error:.1e}")
    del got, want, plain
    runs = [
        timed_block(place.ops, scene.weights, keys, scene.x.clone(), modulation, rope, stopwatch())
        for _ in range(RUNS)
    ]
    forward, layers = ForwardCase(place.arch, place.model, size, size.tokens), place.model.layers
    rows = [
        _row(forward, step, _middle([layers * run[step.name] for run in runs]), "measured")
        for step in STEPS
    ]
    rest = _middle([layers * run["between"] for run in runs])
    return [*rows, _row(forward, REST, rest, "measured", gap=LAUNCHES)]


def _middle(values: Sequence[float]) -> tuple[float, float]:
    return statistics.median(values), (max(values) - min(values)) / 2


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
    nothing = LaunchWork(0, 0, 0, 0, 8)
    work = nothing if step is REST else work_of(step, forward.model, forward.tokens)
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


def largest_losses(rows: Sequence[StepRow], count: int | None = None) -> list[StepRow]:
    """Of one forward, sorted; of a measured one too, so its gaps may be empty."""
    return sorted(rows, key=lambda row: -row.lost_ms)[:count]


def denoiser_table(rows: Sequence[StepRow]) -> str:
    """A table and a gap list for each forward."""
    gaps = {(row.arch, row.size, row.step): row.gap for row in rows if row.gap}
    return "\n\n".join(_forward_table(group, gaps) for group in groups(rows).values())


def _forward_table(rows: Sequence[StepRow], gaps: dict[tuple[str, str, str], str]) -> str:
    first = rows[0]
    how = "ESTIMATE from machine code" if first.source == "estimate" else "measured, median of runs"
    head = "est ms" if first.source == "estimate" else "ms"
    lines = [
        f"{first.gpu} ({first.arch}), one forward of {first.size}, {first.tokens} tokens: {how}",
        f"{'':20}{'count':>6}{'TFLOP':>8}{'GB':>7}  {'bound by':12}{'limit ms':>9}"
        f"{head:>9}{'share':>7}{'lost ms':>9}",
    ]
    for row in rows:
        work = f"{row.tflop:8.1f}" if row.tflop else f"{'':8}"
        lines.append(
            f"{row.step:20}{row.count:6d}{work}{row.gigabytes:7.1f}  {row.bound:12}"
            f"{row.limit_ms:9.1f}{row.ms:9.1f}{_share(row.share):>7}{row.lost_ms:9.1f}"
        )
    layers = min(row.count for row in rows)
    limit, ms = sum(row.limit_ms for row in rows), sum(row.ms for row in rows)
    for name, part in (("one block", layers), ("the forward", 1)):
        work = sum(row.tflop for row in rows) / part, sum(row.gigabytes for row in rows) / part
        lines.append(
            f"{name:26}{work[0]:8.1f}{work[1]:7.1f}  {'':12}{limit / part:9.1f}{ms / part:9.1f}"
            f"{_share(limit / ms):>7}{(ms - limit) / part:9.1f}"
        )
    lines.append("Largest losses, and what would win them back")
    for at, row in enumerate(largest_losses(rows), start=1):
        if at > LISTED and row.lost_ms < EXPLAINED * ms:
            break
        gap = gaps[row.arch, row.size, row.step]
        text = f"{at}. {row.step}, {row.lost_ms:.0f} ms, {row.lost_ms / ms:.0%}: {gap}."
        lines += textwrap.wrap(text, 98, initial_indent="  ", subsequent_indent="     ")
    return "\n".join(lines)


def _share(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def denoiser_figures(rows: Sequence[StepRow]) -> list[Figure]:
    """The whole of each forward, and its steps."""
    found = []
    for (size, arch, source), group in groups(rows).items():
        name = f"{arch} {size} {source}"
        ms, noise = sum(row.ms for row in group), sum(row.noise_ms for row in group)
        found.append(Figure(f"{name} forward", ms, "ms", noise, "lower", source))
        for row in group:
            label = f"{name} {row.step}"
            found.append(Figure(label, row.ms, "ms", row.noise_ms, "lower", source))
    return found


def denoiser_pictures(rows: Sequence[StepRow], folder: Path, stem: str) -> list[Path]:
    """A picture for each size: seconds of a forward by kind of step, limits beside times."""
    made = []
    for size in dict.fromkeys(row.size for row in rows):
        of_size = [row for row in rows if row.size == size]
        made += _picture(size, of_size, folder, f"{stem}-{size}")
    return made


def _picture(size: str, rows: Sequence[StepRow], folder: Path, stem: str) -> list[Path]:
    bars: list[tuple[str, dict[str, float]]] = []
    for arch in dict.fromkeys(row.arch for row in rows):
        of_arch = [row for row in rows if row.arch == arch]
        estimates = [row for row in of_arch if row.source == "estimate"]
        for label, group in (
            ("limit", estimates),
            ("estimate", estimates),
            ("measured", [row for row in of_arch if row.source == "measured"]),
        ):
            if group:
                value = "limit_ms" if label == "limit" else "ms"
                bars.append((f"{of_arch[0].gpu}\n{label}", _seconds(group, value)))
    fig, axes = pictures.figure(9.0, 1.6 + 0.62 * len(bars))
    labels = [label for label, _ in bars]
    start = [0.0] * len(bars)
    kinds = [k for k in (*KINDS, REST.kind) if any(parts.get(k) for _, parts in bars)]
    for kind, colour in zip(kinds, pictures.COLOURS):
        widths = [parts.get(kind, 0.0) for _, parts in bars]
        axes.barh(labels, widths, left=start, color=colour, label=kind, height=0.72)
        start = [left + width for left, width in zip(start, widths)]
    for at, total in enumerate(start):
        axes.text(total, at, f" {total:.2f} s", va="center")
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.1)
    axes.set_xlabel("seconds of one forward")
    title = f"One forward at {size}. Limit: rated clocks, nothing lost. Estimate: not measured."
    fig.suptitle(title, fontsize=12)
    fig.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return pictures.save(fig, folder, stem)


def _seconds(rows: Sequence[StepRow], field: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for row in rows:
        found[row.kind] = found.get(row.kind, 0.0) + getattr(row, field) / 1000
    return found
