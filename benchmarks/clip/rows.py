"""The rows of suite `clip`, shown as a table, as figures, and as a picture of stacked bars."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

from matplotlib.patches import Patch

from benchmarks import pictures
from benchmarks.clip.stages import FORWARDS, STAGES
from benchmarks.record import Figure
from benchmarks.timing import columns

PER_TABLE = 4  # clips side by side: 100 columns

# what a picture tells apart: as many as there are colours
GROUPS = {
    "fetch": ("fetch",),
    "decode": ("decode",),
    "motion capture": ("motion capture",),
    "render": ("render",),
    "encoders": ("text encoder", "image encoder", "VAE encode"),
    "forwards, one after another": (FORWARDS,),
    "around forwards": ("context", "sampler"),
    "VAE decode": ("VAE decode",),
    "video encode": ("video encode",),
}


@dataclass(frozen=True, slots=True)
class StageTime:
    """A stage in all runs of a clip."""

    name: str  # one of `clip.stages.STAGES`
    ms: float  # in the run whose clip took the median time, so that stages add up to it
    best_ms: float
    worst_ms: float

    @property
    def noise_ms(self) -> float:
        return (self.worst_ms - self.best_ms) / 2


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
    peak_mib: float
    peak_of: str  # "GPU memory", or "RSS" of this process without ffmpeg's
    unmeasured: str  # "" or why a stage is absent

    @property
    def name(self) -> str:
        return f"{self.recipe} {self.weights} {self.height}x{self.width}x{self.frames}"


def clip_table(rows: Sequence[ClipRow]) -> str:
    """Clips side by side, a line for each stage, then what is not as a reader may expect."""
    tables = [_table(rows[n : n + PER_TABLE]) for n in range(0, len(rows), PER_TABLE)]
    place = f"on {rows[0].device}, runs of each clip, the first not counted: {rows[0].runs}"
    notes = [fill(note, 100) for note in dict.fromkeys(row.unmeasured for row in rows) if note]
    return "\n\n".join([place, *tables, *notes])


def _table(rows: Sequence[ClipRow]) -> str:
    def stage(name: str) -> Callable[[ClipRow], str]:
        return lambda row: next(
            (f"{one.ms:.0f} +-{one.noise_ms:.0f}" for one in row.stages if one.name == name), ""
        )

    shown: dict[str, Callable[[ClipRow], str]] = {
        "": lambda row: f"{row.height}x{row.width}x{row.frames}",
        "ms +- noise": lambda row: "",
        **{f"  {name}": stage(name) for name in STAGES},
        "a forward": lambda row: f"{_forward_ms(row):.1f}",
        "forwards": lambda row: f"{row.forwards}",
        "s a clip": lambda row: f"{row.s:.2f} +-{(row.worst_s - row.best_s) / 2:.2f}",
        "s the first": lambda row: f"{row.first_s:.2f}",
        "peak MiB": lambda row: f"{row.peak_mib:.0f} {row.peak_of}",
    }
    heads = {f"{row.recipe} {row.weights}" + " " * n: "" for n, row in enumerate(rows)}
    return columns(heads, [(name, *map(cell, rows)) for name, cell in shown.items()])


def _forward_ms(row: ClipRow) -> float:
    """The median of all; guidance looks twice in one evaluation."""
    return statistics.median(row.forward_ms) * len(row.forward_ms) / row.forwards


def clip_figures(rows: Sequence[ClipRow]) -> list[Figure]:
    """Times of clips and stages, and the most memory; none of a single run, whose noise is not
    known.
    """
    found = []
    for row in rows:
        if row.runs > 1:
            found.append(Figure(f"{row.name}: clip", row.s, "s", (row.worst_s - row.best_s) / 2))
            for one in row.stages:
                found.append(Figure(f"{row.name}: {one.name}", one.ms, "ms", one.noise_ms))
            found.append(Figure(f"{row.name}: peak {row.peak_of}", row.peak_mib, "MiB", 0.0))
    return found


def clip_pictures(rows: Sequence[ClipRow], folder: Path, stem: str) -> list[Path]:
    """Stacked bars: the shares of each clip, in which every forward shows, and its seconds."""
    fig, [shares, seconds] = pictures.figure(9, 2.1 + 0.6 * len(rows), parts=2)
    longest = max(row.s for row in rows)
    wholes = [sum(one.ms for one in row.stages) for row in rows]
    percent = [_parts(row, 100 / whole) for row, whole in zip(rows, wholes)]
    pictures.stacked_bars(shares, percent, [*GROUPS])
    pictures.stacked_bars(seconds, [_parts(row, 1e-3) for row in rows], [*GROUPS])
    for place, row in enumerate(rows):
        seconds.text(row.s + longest / 50, place, f"{row.s:.2f} s", va="center")
    labels = [f"{r.recipe} {r.weights}\n{r.height}x{r.width}, {r.frames} frames" for r in rows]
    shares.set_yticks(range(len(rows)), labels)
    shares.set(xlabel="% of the clip", xlim=(0, 100))
    seconds.set(xlabel="seconds, median run", xlim=(0, 1.3 * longest))
    shown = {each.name for row in rows for each in row.stages}
    handles = [
        Patch(color=colour, label=name if shown & {*names} else f"{name} (not measured)")
        for (name, names), colour in zip(GROUPS.items(), pictures.COLOURS, strict=True)
    ]
    fig.legend(handles=handles, loc="outside lower center", ncols=3)
    fig.suptitle(f"Where the time of a clip goes: {rows[0].device}")
    return pictures.save(fig, folder, stem)


def _parts(row: ClipRow, scale: float) -> dict[str, list[float]]:
    """The time of each group of stages, of the forwards each one. `scale` is for milliseconds."""
    held = {one.name: scale * one.ms for one in row.stages}
    forwards = [scale * ms for ms in row.forward_ms]
    return {
        name: forwards if FORWARDS in names else [sum(held.get(n, 0.0) for n in names)]
        for name, names in GROUPS.items()
    }
