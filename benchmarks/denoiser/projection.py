"""How long a forward and a clip may take on GPUs that nobody here has, and how sure that is.

Given times of sm90, each step's share of its limit there is carried over in two ways: as it is, and
scaled as machine code estimates differ between the two architectures. The projection is their
geometric mean; the bar spans both, and clocks. Without measured times it is the estimate alone, and
the bar reaches to what the best public systems get. Nothing here was measured on the GPU it names.
"""

import json
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from benchmarks import pictures
from benchmarks.denoiser.forward_place import name_of
from benchmarks.denoiser.launches import STEPS, candidates
from benchmarks.denoiser.suite import (
    SIZES,
    ForwardCase,
    Kernels,
    StepRow,
    estimated_rows,
    kernels_of,
)
from benchmarks.figures import Figure
from benchmarks.kernel.cases import SCAIL_14B as SIZES_14B
from benchmarks.kernel.cases import KernelCase, cases
from benchmarks.kernel.model import GPUS, limits_ms
from benchmarks.timing import WrongResult
from engine.config import HEAD_SIZE, SCAIL_14B
from engine.errors import BadRequest
from engine.flow import Recipe
from engine.memory import ClipShape
from engine.recipes import RECIPES
from kernels.arch import ARCHS, SM90, Arch

# Of the 8-bit rate, by the best public system on each GPU (docs/reference/performance.md C0).
PEERS = {
    "sm89": (0.32, "LightX2V, Wan2.1-I2V-14B 480p"),
    "sm90": (0.36, "LightX2V, Wan2.1-I2V-14B 480p"),
    "sm120": (0.37, "TurboDiffusion, Wan2.1-T2V-14B 720p"),
}
BOOST = 0.9  # of the rated clock, that a GPU at its power limit keeps: assumed
HUGE = 2**53  # no token count and no time is that large
FASTEST = 1.1  # of a limit at rated clocks: above it a time is no time of this work
MODEL = "machine code"
MEASURED = "shares of sm90"

KernelsOf: TypeAlias = Mapping[Arch, Kernels]


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
    archs: Sequence[str], measured: Path | None = None, sizes: Sequence[ClipShape] = SIZES
) -> tuple[str, list[ProjectionRow]]:
    """`measured`: gpu.jsonl of `gpu.sh`, or JSON of `run.py` on sm90; it must hold every step.

    Raises `WrongResult` for a file that does not, `BadRequest` for an unknown architecture.
    """
    shares = None if measured is None else measured_shares(measured)
    known = {arch.name: arch for arch in ARCHS}
    for name in archs:
        if name not in known:
            raise BadRequest(f"There is no architecture {name!r}. Choose from {', '.join(known)}.")
    kernels = {arch: kernels_of(arch) for arch in {SM90, *(known[name] for name in archs)}}
    rows = []
    for name in archs:
        for size in sizes:
            rows += projected(known[name], size, shares, kernels)
    if measured is None:
        return "nothing: no time was measured, machine code alone is behind it", rows
    return f"the limits of sm90, which none of its times in {measured.name} is below", rows


def assumptions(rows: Sequence[ProjectionRow]) -> list[str]:
    """All that a projection takes for granted, in sentences."""
    found = [
        "A clip is its denoising alone: encoders, VAE and files are not in it. It is one window.",
        *(f"{name}: {_recipe_words(recipe)}." for name, recipe in RECIPES.items()),
        "A clock is the rated one; the bar goes from the highest that others saw in kernels ("
        + ", ".join(f"{GPUS[a].name} {GPUS[a].seen_ghz:g} GHz" for a in ARCHS)
        + f") to {BOOST:.0%} of the rated one at the power limit.",
    ]
    if any(row.basis == MODEL for row in rows):
        shares = ", ".join(f"{name} {share:.0%} ({who})" for name, (share, who) in PEERS.items())
        found.append(
            "Without measured times the figure is what main loops allow. It knows nothing of "
            "tails, epilogues and power, so the truth is likelier above it than below. The bar "
            f"ends where the best public systems are, as shares of the 8-bit rate: {shares}."
        )
    if any(row.basis != MODEL for row in rows):
        found.append(
            "A share of the limit measured on sm90 is carried over as it is (one end of the bar), "
            "and scaled by the ratio of the estimates of both architectures, at most to 100 % "
            "(the other end). sm90 multiplies by warpgroups and the others by warps, so attention "
            "is the least certain."
        )
    return found


def projected(
    arch: Arch, size: ClipShape, shares: Mapping[str, float] | None, kernels: KernelsOf
) -> list[ProjectionRow]:
    """A forward and the clips of each recipe. `shares`: of the limit on sm90, by step."""
    bars = []
    for tokens in (size.tokens, without_pose(size)):
        here, there = (
            estimated_rows(ForwardCase(a, SCAIL_14B, size, tokens), kernels[a])
            for a in (arch, SM90)
        )
        bars.append(bar(arch, here, there, shares))
    rows = []
    counted = {f"{name} clip": evaluations(recipe) for name, recipe in RECIPES.items()}
    for what, counts in ({"one forward": (1, 0)} | counted).items():
        figure, fastest, slowest, limit = (
            sum(n * part[at] for n, part in zip(counts, bars)) for at in range(4)
        )
        basis = MODEL if shares is None else MEASURED
        rows.append(
            ProjectionRow(
                arch.name, GPUS[arch].name, name_of(size), what, figure, fastest, slowest, limit,
                basis,
            )
        )  # fmt: skip
    return rows


def bar(
    arch: Arch,
    here: Sequence[StepRow],
    there: Sequence[StepRow],
    shares: Mapping[str, float] | None,
) -> tuple[float, float, float, float]:
    """Seconds of a forward: the figure, the fastest, the slowest, the limit. `there`: sm90."""
    limit = sum(row.limit_ms for row in here) / 1000
    quick = GPUS[arch].seen_ghz / GPUS[arch].ghz
    if shares is None:
        figure = sum(row.ms for row in here) / 1000
        fastest = sum(row.ms / (quick if row.tflop else 1) for row in here) / 1000
        work = 1e12 * sum(row.tflop for row in here)
        best = limits_ms(work, 0, 0, 8, arch)["tensor"] / 1000
        return figure, fastest, max(figure, best / PEERS[arch.name][0]), limit
    figure = fastest = slowest = 0.0
    for row, other in zip(here, there, strict=True):
        own, same = row.share, other.share
        assert own is not None and same is not None
        carried = shares[row.step]
        scaled = min(1.0, carried * own / same)
        low, high = sorted(row.limit_ms / share / 1000 for share in (carried, scaled))
        figure += math.sqrt(low * high)
        fastest += low / (quick if row.tflop else 1)
        slowest += high / (BOOST if row.tflop else 1)
    return figure, fastest, slowest, limit


def without_pose(size: ClipShape) -> int:
    """S of an evaluation that does not see the skeleton."""
    time, area = size.grid
    return area * (1 + time)


def evaluations(recipe: Recipe) -> tuple[int, int]:
    """Of a clip in one window: those that see the skeleton, those that do not."""
    places = [n / recipe.steps for n in range(recipe.steps)]
    seen = sum(recipe.pose_from <= place < recipe.pose_until for place in places)
    times = 1 if recipe.cfg == 1 else 2
    return times * seen, times * (recipe.steps - seen)


def _recipe_words(recipe: Recipe) -> str:
    seen, unseen = evaluations(recipe)
    rest = f", {unseen} without its tokens" if unseen else ""
    return f"{recipe.steps} steps, CFG {recipe.cfg:g}: {seen} forwards with the skeleton{rest}"


# --- what was measured


def measured_shares(path: Path) -> dict[str, float]:
    """Of its limit on sm90, for each step, at the most tokens that were timed.

    Raises `WrongResult` for a file that says less, or what cannot be, and `OSError`.
    """
    found: dict[str, dict[int, float]] = {step.name: {} for step in STEPS}
    by_name = {case.name: case for case in cases(SM90, SIZES_14B)}
    for fact in _facts(path):
        if fact.get("arch") != SM90.name or fact.get("ms") is None:
            continue
        if "limit_ms" in fact and fact.get("source") == "measured":
            steps, limit = [str(fact.get("step"))], _number(path, fact, "limit_ms")
            if steps[0] not in found or limit == 0:
                continue
        else:
            name = str(fact.get("name"))
            steps = [s.name for s in STEPS if name in candidates(s, SCAIL_14B, SM90)]
            if not steps:
                continue
            limit = _limit_ms(by_name[name], int(_number(path, fact, "tokens")))
        share = limit / _number(path, fact, "ms")
        if share > FASTEST:
            raise WrongResult(f"{path}: {fact} would be {share:.0%} of what an H200 can do.")
        for step in steps:
            at = found[step]
            tokens = int(_number(path, fact, "tokens"))
            at[tokens] = max(share, at.get(tokens, 0.0))  # of several the fastest would be taken
    missing = [step for step, at in found.items() if not at]
    if missing:
        raise WrongResult(
            f"{path} has no sm90 times of {', '.join(missing)}. Make them on a Hopper GPU with "
            "benchmarks/gpu.sh, or with: python benchmarks/run.py denoiser --json FILE"
        )
    return {step: at[max(at)] for step, at in found.items()}


def _limit_ms(case: KernelCase, tokens: int) -> float:
    work, wide = case.flop(tokens), case.name == "cross_attention"
    attends = wide or case.name.startswith("attention")
    exponentials = work / (4 * HEAD_SIZE) if attends else 0.0
    moved = case.moved(tokens)
    return max(limits_ms(work, moved, exponentials, 16 if wide else 8, SM90).values())


def _facts(path: Path) -> Iterator[Mapping[str, object]]:
    """Rows, of a JSON object of `run.py` or of lines of JSON."""
    text = path.read_text(errors="replace")
    try:
        whole = [json.loads(text)]
    except ValueError:
        try:
            whole = [json.loads(line) for line in text.splitlines() if line.strip()]
        except ValueError as error:
            raise WrongResult(f"{path} is neither JSON nor lines of JSON: {error}") from error
    for one in whole:
        if not isinstance(one, dict):
            raise WrongResult(f"{path} holds {str(one)[:40]} where an object was expected.")
        suites = [one.get(suite) for suite in ("kernels", "denoiser")]
        held = [rows for suite in suites if isinstance(suite, dict) for rows in [suite.get("rows")]]
        for rows in held or [[one]]:
            yield from (row for row in rows or [] if isinstance(row, dict))


def _number(path: Path, fact: Mapping[str, object], key: str) -> float:
    value = fact.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < HUGE:
        raise WrongResult(f"{path}: {key} is {value!r} in {fact}, a number was expected.")
    if value == 0 and key != "limit_ms":
        raise WrongResult(f"{path}: {key} is 0 in {fact}.")
    return float(value)


# --- shown


def projection_table(rows: Sequence[ProjectionRow]) -> str:
    """Seconds with their bars, then what they rest on."""
    lines = [
        "PROJECTED, measured on none of these GPUs",
        f"{'':10}{'size':13}{'what':18}{'seconds':>9}{'from':>9}{'to':>9}{'limit':>9}  based on",
    ]
    for row in rows:
        lines.append(
            f"{row.gpu:10}{row.size:13}{row.what:18}{row.seconds:9.1f}{row.fastest_s:9.1f}"
            f"{row.slowest_s:9.1f}{row.limit_s:9.1f}  {row.basis}"
        )
    lines.append("Assumptions")
    for sentence in assumptions(rows):
        lines += textwrap.wrap(sentence, 98, initial_indent="  - ", subsequent_indent="    ")
    return "\n".join(lines)


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
    """One picture: seconds of a forward with their bars, and the limits."""
    forwards = [row for row in rows if row.what == "one forward"]
    labels = [f"{row.gpu}\n{row.size}" for row in forwards]
    fig, axes = pictures.figure(9.0, 1.8 + 0.6 * len(forwards))
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
    fig.suptitle(f"Projected from {forwards[0].basis}: not measured on these GPUs", fontsize=12)
    fig.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return pictures.save(fig, folder, stem)
