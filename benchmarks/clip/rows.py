"""The rows of suite `clip`, shown as a table, as figures, and as a picture of stacked bars."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import pictures
from benchmarks.clip.stages import FORWARDS, STAGES
from benchmarks.record import Figure
from benchmarks.timing import Row, columns

PER_TABLE = 3  # clips side by side: 100 columns

# what a picture tells apart: as many as there are colours
GROUPS = {
    "fetch": ("fetch",),
    "decode": ("decode",),
    "render": ("render",),
    "encoders": ("text encoder", "image encoder", "VAE encode"),
    "forwards, one after another": (FORWARDS,),
    "around forwards": ("context", "sampler"),
    "VAE decode": ("VAE decode",),
    "video encode": ("video encode",),
}


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
    # in order; the `ms` of the run whose clip took the median time, so that they add up to it
    stages: tuple[Row, ...]
    forward_ms: tuple[float, ...]  # each evaluation of that run; with guidance one is two forwards
    peak_mib: float
    peak_of: str  # "GPU memory", or "RSS" of this process without ffmpeg's

    @property
    def name(self) -> str:
        return f"{self.recipe} {self.weights} {self.height}x{self.width}x{self.frames}"


def clip_table(rows: Sequence[ClipRow]) -> str:
    """Clips side by side, a line for each stage, then the whole clip."""
    tables = [_table(rows[n : n + PER_TABLE]) for n in range(0, len(rows), PER_TABLE)]
    place = f"on {rows[0].device}, runs of each clip, the first not counted: {rows[0].runs}"
    note = "Motion capture is not measured, the dance is taken to be known."
    return "\n\n".join([place, *tables, note])


def _table(rows: Sequence[ClipRow]) -> str:
    clips = [{one.name: f"{one.ms:.0f} +-{one.noise_ms:.0f}" for one in row.stages} for row in rows]
    lines = [(name, *(clip.get(name, "") for clip in clips)) for name in STAGES]
    seconds = [f"{row.s:.2f} +-{(row.worst_s - row.best_s) / 2:.2f}" for row in rows]
    memory = [f"{row.peak_mib:.0f} {row.peak_of}" for row in rows]
    lines += [("s a clip", *seconds), ("peak MiB", *memory)]
    return columns({row.name: "" for row in rows}, lines, "ms +- noise")


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
    handles, parts = shares.get_legend_handles_labels()
    fig.legend(handles, parts, loc="outside lower center", ncols=3)
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
