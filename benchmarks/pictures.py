"""The look of every picture of a suite, which is written as PNG to look at and SVG to print."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture
from matplotlib.typing import RcKeyType

# Okabe and Ito's, told apart by colour-blind eyes; the yellow last but one, as it is pale on white
COLOURS: tuple[str, ...] = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#999999", "#F0E442",
    "#000000",
)  # fmt: skip
DPI = 130  # 9 inches are 1170 pixels, what a page of RESULTS.md shows without shrinking
STYLE: dict[RcKeyType, object] = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.labelsize": 11,
    "legend.fontsize": 10,
    "legend.frameon": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "scail",  # the same picture is the same file
}


def figure(width_in: float, height_in: float, parts: int = 1) -> tuple[Picture, list[Axes]]:
    """An empty picture with `parts` axes beside each other."""
    matplotlib.use("Agg")  # no window, on any machine
    matplotlib.rcParams.update(STYLE)
    fig = Picture(figsize=(width_in, height_in), layout="constrained", facecolor="white")
    return fig, list(fig.subplots(1, parts, squeeze=False, sharey=True)[0])


def stacked_bars(
    axes: Axes, bars: Sequence[Mapping[str, Sequence[float]]], parts: Sequence[str]
) -> list[float]:
    """Draws a lying bar for each of `bars`, the first at the top; returns where each ends.

    A bar holds the widths of each of its `parts`; of several widths every one shows. More parts
    than colours are hatched.
    """
    ends = [0.0] * len(bars)
    for number, part in enumerate(parts):
        hatch = "//" if number >= len(COLOURS) else None
        for place, bar in enumerate(bars):
            widths = bar.get(part, ())
            for width in widths:
                axes.barh(
                    place, width, left=ends[place], color=COLOURS[number % len(COLOURS)],
                    hatch=hatch, edgecolor="white", linewidth=0.5 if len(widths) > 1 else 0.0,
                )  # fmt: skip
                ends[place] += width
        axes.barh(0, 0, color=COLOURS[number % len(COLOURS)], hatch=hatch, label=part)
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    return ends


def save(fig: Picture, folder: Path, stem: str) -> list[Path]:
    """Writes `stem`.png and `stem`.svg, which say no date, and forgets the picture."""
    folder.mkdir(parents=True, exist_ok=True)
    png, svg = folder / f"{stem}.png", folder / f"{stem}.svg"
    fig.savefig(png, dpi=DPI, metadata={"Software": None})
    fig.savefig(svg, metadata={"Date": None})
    fig.clear()
    return [png, svg]
