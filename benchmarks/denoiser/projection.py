"""Suite `projection`: how long a forward and a clip may take on GPUs that nobody here has.

A projection is the estimate from machine code. Its bar begins at the highest clocks that others saw
in kernels, and reaches to what the best public systems get. Nothing here was measured.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import pictures
from benchmarks.denoiser.forward_place import SIZES, name_of
from benchmarks.denoiser.suite import Kernels, StepRow, estimated_rows, kernels_of
from benchmarks.kernel.model import GPUS, limits_ms
from benchmarks.record import Figure, Suite
from benchmarks.timing import columns
from engine.errors import BadRequest
from engine.flow import Recipe
from engine.memory import ClipShape
from engine.recipes import RECIPES
from kernels.arch import ARCHS, Arch

# Shares of the 8-bit rate that the best public system reaches (docs/reference/performance.md C0)
PEERS = {
    "sm89": (0.32, "LightX2V, Wan2.1-I2V-14B 480p"),
    "sm90": (0.36, "LightX2V, Wan2.1-I2V-14B 480p"),
    "sm120": (0.37, "TurboDiffusion, Wan2.1-T2V-14B 720p"),
}
MODEL = "machine code"


@dataclass(frozen=True, slots=True)
class ProjectionRow:
    """Seconds that were measured nowhere."""

    arch: str
    gpu: str
    size: str
    what: str  # "one forward", or the denoising of a clip by a recipe
    seconds: float
    fastest_s: float
    slowest_s: float
    limit_s: float  # rated clocks, nothing lost
    basis: str


def measure_projection(
    archs: Sequence[str], sizes: Sequence[ClipShape] = SIZES
) -> tuple[str, list[ProjectionRow]]:
    """Raises `BadRequest` for an unknown architecture."""
    known = {arch.name: arch for arch in ARCHS}
    rows = []
    for name in archs:
        if name not in known:
            raise BadRequest(f"There is no architecture {name!r}. Choose from {', '.join(known)}.")
        kernels = kernels_of(known[name])
        for size in sizes:
            rows += projected(known[name], size, kernels)
    return "nothing: no time was measured, machine code alone is behind it", rows


def assumptions() -> list[str]:
    """Everything that a projection takes for granted, in sentences."""
    shares = ", ".join(f"{name} {share:.0%} ({who})" for name, (share, who) in PEERS.items())
    clocks = ", ".join(f"{gpu.name} {gpu.seen_ghz:g} GHz" for gpu in GPUS.values())
    counts = ", ".join(
        "{} {} with the skeleton and {} without".format(name, *evaluations(recipe))
        for name, recipe in RECIPES.items()
    )
    return [
        "A clip is its denoising alone, in one window: encoders, VAE and files are not in it.",
        f"Its forwards: {counts}.",
        "A clock is the rated one; the bar begins at the highest that others saw in kernels "
        f"({clocks}).",
        "The figure is what main loops allow, without tails, epilogues and limits of power. The "
        f"bar ends where the best public systems are, as shares of the 8-bit rate: {shares}.",
    ]


def projected(arch: Arch, size: ClipShape, kernels: Kernels) -> list[ProjectionRow]:
    """A forward and the clips of each recipe."""
    bars = [
        bar(arch, estimated_rows(arch, size, tokens, kernels))
        for tokens in (size.tokens, without_pose(size))
    ]
    rows = []
    counted = {f"{name} clip": evaluations(recipe) for name, recipe in RECIPES.items()}
    for what, counts in ({"one forward": (1, 0)} | counted).items():
        figure, fastest, slowest, limit = (
            sum(n * part[at] for n, part in zip(counts, bars)) for at in range(4)
        )
        name = arch.name, GPUS[arch].name, name_of(size), what
        rows.append(ProjectionRow(*name, figure, fastest, slowest, limit, MODEL))
    return rows


def bar(arch: Arch, rows: Sequence[StepRow]) -> tuple[float, float, float, float]:
    """Seconds of a forward: the figure, the fastest, the slowest, the limit."""
    quick = GPUS[arch].seen_ghz / GPUS[arch].ghz
    limit = sum(row.limit_ms for row in rows) / 1000
    figure = sum(row.ms for row in rows) / 1000
    fastest = sum(row.ms / (quick if row.tflop else 1) for row in rows) / 1000
    work = 1e12 * sum(row.tflop for row in rows)
    best = limits_ms(work, 0, 0, 8, arch)["tensor"] / 1000
    return figure, fastest, max(figure, best / PEERS[arch.name][0]), limit


def without_pose(size: ClipShape) -> int:
    """The tokens S of an evaluation that does not see the skeleton."""
    time, area = size.grid
    return area * (1 + time)


def evaluations(recipe: Recipe) -> tuple[int, int]:
    """The evaluations of a clip of one window: those that see the skeleton, those that do not."""
    places = [n / recipe.steps for n in range(recipe.steps)]
    seen = sum(recipe.pose_from <= place < recipe.pose_until for place in places)
    times = 1 if recipe.cfg == 1 else 2
    return times * seen, times * (recipe.steps - seen)


# --- shown


def projection_table(rows: Sequence[ProjectionRow]) -> str:
    """Seconds with their bars, then what they rest on."""
    heads = {"size": "", "what": "", "seconds": ".1f", "from": ".1f", "to": ".1f", "limit": ".1f",
        "based on": ""}  # fmt: skip
    lines = [
        (row.gpu, row.size, row.what, row.seconds, row.fastest_s, row.slowest_s, row.limit_s,
         row.basis)
        for row in rows
    ]  # fmt: skip
    said = ["PROJECTED, measured on none of these GPUs", columns(heads, lines), "Assumptions"]
    for sentence in assumptions():
        said += textwrap.wrap(sentence, 98, initial_indent="  - ", subsequent_indent="    ")
    return "\n".join(said)


def projection_figures(rows: Sequence[ProjectionRow]) -> list[Figure]:
    """The noise is half of the bar."""
    return [
        Figure(
            f"{row.arch} {row.size} {row.what} projected", row.seconds, "s",
            (row.slowest_s - row.fastest_s) / 2, "lower", "estimate",
        )
        for row in rows
    ]  # fmt: skip


def projection_pictures(rows: Sequence[ProjectionRow], folder: Path, stem: str) -> list[Path]:
    """Draws seconds of a forward with their bars, and the limits."""
    forwards = [row for row in rows if row.what == "one forward"]
    labels = [f"{row.gpu}\n{row.size}" for row in forwards]
    fig, [axes] = pictures.figure(9.0, 1.8 + 0.6 * len(forwards))
    for at, row in enumerate(forwards):
        around = [[row.seconds - row.fastest_s], [row.slowest_s - row.seconds]]
        name, limit = ("projected", "limit at the rated clock") if at == 0 else (None, None)
        axes.errorbar(
            [row.seconds], [at], xerr=around, fmt="o", capsize=6, lw=2.5, ms=8,
            color=pictures.COLOURS[0], label=name,
        )  # fmt: skip
        axes.plot([row.limit_s], [at], "|", ms=20, mew=3, color=pictures.COLOURS[3], label=limit)
        axes.annotate(
            f"{row.seconds:.1f} s ({row.fastest_s:.1f} to {row.slowest_s:.1f})",
            (row.slowest_s, at), (10, 0), textcoords="offset points", va="center",
        )  # fmt: skip
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlim(0, 1.35 * max(row.slowest_s for row in forwards))
    axes.set_xlabel("seconds of one forward")
    fig.suptitle(f"Projected from {MODEL}: not measured on these GPUs", fontsize=12)
    fig.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return pictures.save(fig, folder, stem)


SUITE = Suite(measure_projection, projection_table, projection_figures, projection_pictures)
