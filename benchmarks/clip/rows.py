"""What suite `clip` found: its rows as a table, as figures, and as a picture of stacked bars."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

from matplotlib.axes import Axes
from matplotlib.patches import Patch

from benchmarks.clip.stages import FORWARDS, STAGES
from benchmarks.figures import Figure
from benchmarks.pictures import COLOURS, figure, save

PER_TABLE = 4  # clips side by side: 100 columns

# what a picture tells apart: as many as there are colours
GROUPS = {
    "fetch": ("fetch",),
    "decode": ("decode",),
    "motion capture": ("motion capture",),
    "render": ("render",),
    "encoders": ("text encoder", "image encoder", "VAE encode"),
    "forwards, one after another": ("forwards",),
    "around forwards": ("context", "sampler"),
    "VAE decode": ("VAE decode",),
    "video encode": ("video encode",),
}


@dataclass(frozen=True, slots=True)
class StageTime:
    """A stage in all runs of a clip."""

    name: str  # one of `clip_stages.STAGES`
    ms: float  # in the run whose clip took the median time, so that stages add up to it
    best_ms: float
    worst_ms: float


@dataclass(frozen=True, slots=True)
class ClipRow:
    """One recipe at one size."""

    recipe: str
    weights: str  # "tiny", "14B"
    height: int
    width: int
    frames: int  # of the MP4
    device: str
    runs: int
    s: float  # median, from the download to the file
    best_s: float
    worst_s: float
    first_s: float  # of the run before those, with a new prompt if the clip is this process' first
    stages: tuple[StageTime, ...]  # in order; motion capture is absent where it was not measured
    forward_ms: tuple[float, ...]  # each evaluation of that run; with guidance one is two forwards
    forwards: int  # of the transformer
    vae_alone_ms: float  # the same latents decoded once more and nothing else: an own wall clock
    frames_per_s: float
    peak_mib: float
    peak_of: str  # "GPU memory", or "RSS" of this process without ffmpeg's
    usd: float | None  # an estimate: time and price; None: no price is known
    price: str  # where the price is from, or why there is none
    unmeasured: str  # "" or why a stage is absent

    @property
    def name(self) -> str:
        return f"{self.recipe} {self.weights} {self.height}x{self.width}x{self.frames}"


def clip_table(rows: Sequence[ClipRow]) -> str:
    """Clips side by side, a line for each stage, then what is not as a reader may expect."""
    tables = [_table(rows[n : n + PER_TABLE]) for n in range(0, len(rows), PER_TABLE)]
    notes = [f"USD a clip: {_cost_from(row)}." for row in rows]
    notes += [row.unmeasured for row in rows if row.unmeasured]
    place = f"on {rows[0].device}, runs of each clip, the first not counted: {rows[0].runs}"
    return "\n\n".join(
        [place, *tables, "\n".join(fill(note, 100) for note in dict.fromkeys(notes))]
    )


def _cost_from(row: ClipRow) -> str:
    known = f"an estimate, the time by the price in {row.price}"
    return f"unknown, {row.price}" if row.usd is None else known


def _table(rows: Sequence[ClipRow]) -> str:
    def line(name: str, cell: Callable[[ClipRow], str]) -> str:
        return f"{name:20}{''.join(f'{cell(row):>20}' for row in rows)}".rstrip()

    def stage(name: str) -> Callable[[ClipRow], str]:
        return lambda row: _spread({each.name: each for each in row.stages}.get(name))

    lines = [
        line("", lambda row: f"{row.recipe} {row.weights}"),
        line("", lambda row: f"{row.height}x{row.width}x{row.frames}"),
        "ms +- noise",
        *(line(f"  {name}", stage(name)) for name in STAGES),
        line("VAE decode alone", lambda row: f"{row.vae_alone_ms:.0f}       "),
        line("a forward", lambda row: f"{_forward_ms(row):.1f}       "),
        line("forwards", lambda row: f"{row.forwards}       "),
        line("s a clip", lambda row: _pair(row.s, (row.worst_s - row.best_s) / 2, 2)),
        line("s the first", lambda row: f"{row.first_s:.2f}       "),
        line("frames a second", lambda row: f"{row.frames_per_s:.2f}       "),
        line("peak MiB", lambda row: f"{row.peak_mib:.0f}       "),
        line("  of", lambda row: row.peak_of),
        line("USD a clip", lambda row: "unknown" if row.usd is None else f"{row.usd:.5f}       "),
    ]
    return "\n".join(lines)


def _pair(value: float, noise: float, digits: int) -> str:
    return f"{value:.{digits}f} +-{noise:<4.{digits}f}" if noise else f"{value:.{digits}f}       "


def _spread(stage: StageTime | None) -> str:
    if stage is None:
        return "not measured"
    return _pair(stage.ms, (stage.worst_ms - stage.best_ms) / 2, 0)


def _forward_ms(row: ClipRow) -> float:
    """Median of all; guidance looks twice in one evaluation."""
    return statistics.median(row.forward_ms) * len(row.forward_ms) / row.forwards


def clip_figures(rows: Sequence[ClipRow]) -> list[Figure]:
    """Times of clips and stages, and the most memory; all measured. None of a single run, whose
    noise is not known.
    """
    found = []
    for row in rows:
        if row.runs == 1:
            continue
        noise_s = (row.worst_s - row.best_s) / 2
        found.append(Figure(f"{row.name}: clip", row.s, "s", noise_s, "lower", "measured"))
        for one in row.stages:
            noise_ms = (one.worst_ms - one.best_ms) / 2
            name = f"{row.name}: {one.name}"
            found.append(Figure(name, one.ms, "ms", noise_ms, "lower", "measured"))
        name = f"{row.name}: peak {row.peak_of}"
        found.append(Figure(name, row.peak_mib, "MiB", 0.0, "lower", "measured"))
    return found


def clip_pictures(rows: Sequence[ClipRow], folder: Path, stem: str) -> list[Path]:
    """Stacked bars: the shares of each clip, in which every forward shows, and its seconds."""
    fig, axes = figure(9, 2.1 + 0.6 * len(rows))
    axes.remove()
    shares, seconds = fig.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    longest = max(row.s for row in rows)
    for place, row in enumerate(rows):
        whole = sum(one.ms for one in row.stages)
        _bar(shares, place, row, 100 / whole, edge=0.5)
        _bar(seconds, place, row, 1e-3, edge=0.0)
        seconds.text(row.s + longest / 50, place, f"{row.s:.2f} s", va="center")
    shares.set_yticks(range(len(rows)), [_label(row) for row in rows])
    shares.invert_yaxis()
    shares.set(xlabel="% of the clip", xlim=(0, 100))
    seconds.set(xlabel="seconds, median run", xlim=(0, 1.3 * longest))
    for one in (shares, seconds):
        one.grid(visible=False, axis="y")
    shown = {each.name for row in rows for each in row.stages}
    handles = [
        Patch(color=colour, label=name if shown & {*names} else f"{name} (not measured)")
        for (name, names), colour in zip(GROUPS.items(), COLOURS, strict=True)
    ]
    fig.legend(handles=handles, loc="outside lower center", ncols=3)
    fig.suptitle(f"Where the time of a clip goes: {rows[0].device}")
    return save(fig, folder, stem)


def _bar(axes: Axes, place: int, row: ClipRow, scale: float, edge: float) -> None:
    """The stages of a clip one after another; `scale` is for milliseconds, `edge` for forwards."""
    held, left = {one.name: one.ms for one in row.stages}, 0.0
    for names, colour in zip(GROUPS.values(), COLOURS, strict=True):
        is_forwards = FORWARDS in names
        parts = row.forward_ms if is_forwards else [sum(held.get(name, 0.0) for name in names)]
        line = edge if is_forwards else 0.0
        for part in parts:
            wide = scale * part
            axes.barh(place, wide, left=left, color=colour, edgecolor="white", linewidth=line)
            left += wide


def _label(row: ClipRow) -> str:
    return f"{row.recipe} {row.weights}\n{row.height}x{row.width}, {row.frames} frames"
