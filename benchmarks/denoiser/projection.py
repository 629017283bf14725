"""Suite `projection`: how long a forward and a clip may take on GPUs that nobody here has.

A projection is what is expected from machine code at the rated clock (`benchmarks.kernel.model`),
without limits of power; beside it is the upper bound of speed, all overlaps perfect. Its bar begins
at the highest clocks that others saw in kernels, reaches to what the best public systems get, and
is no narrower than what the model may miss (`WITHIN`). Nothing here was measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import pictures
from benchmarks.denoiser.launches import SIZES, name_of
from benchmarks.denoiser.suite import Kernels, StepRow, estimated_rows, kernels_of, totals
from benchmarks.kernel.estimate import EXPECTED, UPPER_BOUND
from benchmarks.kernel.model import GPUS, limits_ms
from benchmarks.kernel.published import WITHIN
from benchmarks.kernel.work import LaunchWork
from benchmarks.record import Figure, Suite
from benchmarks.timing import columns
from engine.errors import BadRequest
from engine.flow import Recipe
from engine.memory import ClipShape
from engine.recipes import RECIPES
from kernels.arch import ARCHS, Arch

# Shares of the 8-bit rate that the best public system reaches (docs/reference/performance.md C0)
PEERS = {
    "sm80": 0.32,  # nobody's is known in 8 bits: that of an RTX 4090
    "sm86": 0.32,  # the same
    "sm89": 0.32,  # LightX2V, Wan2.1-I2V-14B 480p
    "sm90": 0.36,  # the same
    "sm120": 0.37,  # TurboDiffusion, Wan2.1-T2V-14B 720p
}
TITLE = "PROJECTED, measured on none of these GPUs. A clip is its denoising alone, in one window"


@dataclass(frozen=True, slots=True)
class ProjectionRow:
    """Seconds that were measured nowhere."""

    arch: str
    gpu: str
    size: str
    what: str  # "one forward", or the denoising of a clip by a recipe
    seconds: float  # expected
    bound_s: float  # an upper bound of speed: this machine code, all overlaps perfect
    fastest_s: float
    slowest_s: float
    limit_s: float  # rated clocks, nothing lost


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


def projected(arch: Arch, size: ClipShape, kernels: Kernels) -> list[ProjectionRow]:
    """A forward and the clips of each recipe."""
    bars = [
        bar(arch, estimated_rows(arch, size, tokens, kernels))
        for tokens in (size.tokens, without_pose(size))
    ]
    rows = []
    counted = {f"{name} clip": evaluations(recipe) for name, recipe in RECIPES["preview"].items()}
    for what, counts in ({"one forward": (1, 0)} | counted).items():
        times = (sum(n * part[at] for n, part in zip(counts, bars)) for at in range(5))
        rows.append(ProjectionRow(arch.name, GPUS[arch].name, name_of(size), what, *times))
    return rows


def bar(arch: Arch, rows: Sequence[StepRow]) -> tuple[float, float, float, float, float]:
    """Seconds of a forward: expected, at the upper bound of speed, the fastest, the slowest, the
    limit.
    """
    quick = GPUS[arch].seen_ghz / GPUS[arch].ghz
    limit, bound, figure = (ms / 1000 for ms in totals(rows))
    fastest = sum(row.ms / (quick if row.tflop else 1) for row in rows) / 1000
    fastest = min(fastest, (1 - WITHIN) * figure)
    best = limits_ms(LaunchWork(1e12 * sum(row.tflop for row in rows)), arch)["tensor"] / 1000
    slowest = max(best / PEERS[arch.name], (1 + WITHIN) * figure)
    return figure, bound, fastest, slowest, limit


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
    """Seconds with their bars."""
    heads = {"size": "", "what": "", "expected s": ".1f", "from": ".1f", "to": ".1f",
        "upper bound": ".1f", "limit": ".1f"}  # fmt: skip
    lines = [
        (row.gpu, row.size, row.what, row.seconds, row.fastest_s, row.slowest_s, row.bound_s,
         row.limit_s)
        for row in rows
    ]  # fmt: skip
    return f"{TITLE}\n{columns(heads, lines)}"


def projection_figures(rows: Sequence[ProjectionRow]) -> list[Figure]:
    """The noise of what is expected is half of the bar; a bound has none."""
    found = []
    for row in rows:
        name, half = f"{row.arch} {row.size} {row.what}", (row.slowest_s - row.fastest_s) / 2
        for kind, seconds, noise in (
            (EXPECTED, row.seconds, half),
            (UPPER_BOUND, row.bound_s, 0.0),
        ):
            found.append(Figure(f"{name}, {kind}", seconds, "s", noise, "lower", "estimate"))
    return found


def projection_pictures(rows: Sequence[ProjectionRow], folder: Path, stem: str) -> list[Path]:
    """Draws seconds of a forward with their bars, and the limits."""
    forwards = [row for row in rows if row.what == "one forward"]
    places = range(len(forwards))
    labels = [
        f"{row.gpu}, {row.size}\n{row.seconds:.1f} s ({row.fastest_s:.1f} to {row.slowest_s:.1f})"
        for row in forwards
    ]
    seconds = [row.seconds for row in forwards]
    faster = [row.seconds - row.fastest_s for row in forwards]
    slower = [row.slowest_s - row.seconds for row in forwards]
    fig, [axes] = pictures.figure(9.0, 1.8 + 0.6 * len(forwards))
    axes.errorbar(
        seconds, places, xerr=[faster, slower], fmt="o", capsize=6, lw=2.5, ms=8,
        color=pictures.COLOURS[0], label="expected",
    )  # fmt: skip
    for label, seconds, colour in (
        ("upper bound of speed: all overlaps perfect", [row.bound_s for row in forwards], 1),
        ("limit at the rated clock, whatever the code", [row.limit_s for row in forwards], 3),
    ):
        axes.plot(seconds, places, "|", ms=20, mew=3, color=pictures.COLOURS[colour], label=label)
    axes.set_yticks(places, labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds of one forward")
    fig.suptitle("Projected from machine code: not measured on these GPUs", fontsize=12)
    fig.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return pictures.save(fig, folder, stem)


SUITE = Suite(measure_projection, projection_table, projection_figures, projection_pictures)
