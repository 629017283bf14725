"""How every picture of a suite looks, and how it is written: PNG to look at, SVG to print."""

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
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


def figure(width_in: float, height_in: float) -> tuple[Figure, Axes]:
    """An empty picture with one pair of axes. For several: `fig.clear()`, then `fig.subplots`."""
    matplotlib.use("Agg")  # no window, on any machine
    matplotlib.rcParams.update(STYLE)
    fig = Figure(figsize=(width_in, height_in), layout="constrained", facecolor="white")
    return fig, fig.subplots()


def save(fig: Figure, folder: Path, stem: str) -> list[Path]:
    """Writes `stem`.png and `stem`.svg, which say no date, and forgets the picture."""
    folder.mkdir(parents=True, exist_ok=True)
    png, svg = folder / f"{stem}.png", folder / f"{stem}.svg"
    fig.savefig(png, dpi=DPI, metadata={"Software": None})
    fig.savefig(svg, metadata={"Date": None})
    fig.clear()
    return [png, svg]
