"""The rows of suite `quality`, shown as a table, as figures, and as pictures."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator
from PIL import Image

from benchmarks.pictures import COLOURS, figure, save
from benchmarks.quality.blocks import BlockError
from benchmarks.record import Figure
from benchmarks.timing import columns
from engine.config import state_dir

T = TypeVar("T")
KEPT = "quality"  # the folder below `state_dir()` for the worst frames
BRIGHTER = 8  # times the difference of a worst frame


@dataclass(frozen=True, slots=True)
class QualityRow:
    """One package with one attention in one recipe, against the exact model."""

    scene: str
    recipe: str
    weights: str
    attention: str
    latent_error: float
    psnr_db: float  # mean of the frames
    worst_psnr_db: float
    worst_frame: int
    ssim: float  # mean of the frames
    blocks: tuple[BlockError, ...]

    @property
    def name(self) -> str:
        return f"{self.scene} {self.recipe} {self.weights} {self.attention}"

    @property
    def picture(self) -> Path:
        """The worst frame, the exact one to the left of the 8-bit one; of the last run here."""
        return state_dir() / KEPT / f"{self.name.replace(' ', '-')}.png"


def quality_table(rows: Sequence[QualityRow]) -> str:
    """Columns for a terminal, as errors and levels against the exact model."""
    heads = {"latents %": ".2f", "last block %": ".2f", "PSNR dB": ".1f", "worst": ".1f",
        "SSIM": ".4f"}  # fmt: skip
    lines = [
        (row.name, 100 * row.latent_error, 100 * row.blocks[-1].through_error, row.psnr_db,
         row.worst_psnr_db, row.ssim)
        for row in rows
    ]  # fmt: skip
    return columns(heads, lines)


def quality_figures(rows: Sequence[QualityRow]) -> list[Figure]:
    """Figures rounded to what means something; half of the last digit is their noise."""
    found = []
    for row in rows:
        last = row.blocks[-1].through_error
        found += [
            Figure(f"{row.name}: PSNR", round(row.psnr_db, 1), "dB", 0.05, "higher"),
            Figure(f"{row.name}: worst PSNR", round(row.worst_psnr_db, 1), "dB", 0.05, "higher"),
            Figure(f"{row.name}: SSIM", round(row.ssim, 3), "", 0.0005, "higher"),
            Figure(f"{row.name}: latents", round(100 * row.latent_error, 2), "%", 0.005),
            Figure(f"{row.name}: last block", round(100 * last, 2), "%", 0.005),
        ]
    return found


def quality_pictures(rows: Sequence[QualityRow], folder: Path, stem: str) -> list[Path]:
    """Draws for each scene the worst frame of each form of weights, and the errors of all blocks.

    The frames are those of the last run on this machine.
    """
    made: list[Path] = []
    for scene in _in_order(row.scene for row in rows):
        held = [row for row in rows if row.scene == scene]
        made += draw_frames(held, folder, f"{stem}-{scene}-frames")
        made += draw_blocks(held, folder, f"{stem}-{scene}-blocks")
    return made


def draw_frames(rows: Sequence[QualityRow], folder: Path, stem: str) -> list[Path]:
    """A line for each form of weights: the exact frame, the 8-bit one, and their difference made
    brighter.
    """
    worst = [
        min((row for row in rows if row.weights == weights), key=lambda row: row.worst_psnr_db)
        for weights in _in_order(row.weights for row in rows)
    ]
    pictures = [np.array(Image.open(row.picture).convert("RGB")) for row in worst]
    pairs = [np.split(picture, 2, axis=1) for picture in pictures]
    height, width = pairs[0][0].shape[:2]
    tall = 3.0 * height / width + 0.45  # inches of a line of frames with its labels
    fig, _ = figure(9.2, len(worst) * tall + 0.3)
    fig.clear()
    fig.suptitle(f"{rows[0].scene}: the worst frame of each form of weights")
    for line, row, (exact, ours) in zip(fig.subplots(len(worst), 3, squeeze=False), worst, pairs):
        apart = np.abs(ours.astype(np.int32) - exact) * BRIGHTER
        shown = (exact, ours, np.minimum(apart, 255).astype(np.uint8))
        said = f"{row.weights}, attention {row.attention}: {row.worst_psnr_db:.1f} dB"
        titles = (f"exact, {row.recipe}, frame {row.worst_frame}", said, f"difference x{BRIGHTER}")
        for axes, frame, title in zip(line, shown, titles):
            axes.imshow(frame, interpolation="nearest")
            axes.set_title(title, fontsize=10)
            axes.set_axis_off()
    return save(fig, folder, stem)


def draw_blocks(rows: Sequence[QualityRow], folder: Path, stem: str) -> list[Path]:
    """A part for each form of weights, a line for each attention: the worst of the recipes."""
    forms = _in_order(row.weights for row in rows)
    fig, parts = figure(9.2, 3.9, len(forms))
    for axes, weights in zip(parts, forms):
        _draw_part(axes, [row for row in rows if row.weights == weights])
        axes.set_title(weights)
        axes.set_xlabel("block")
    parts[0].set_ylabel("relative error of the tokens, %")
    parts[0].set_yscale("log")
    parts[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    parts[0].yaxis.set_major_formatter("{x:g}")
    parts[0].yaxis.set_minor_locator(NullLocator())
    handles, labels = parts[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=4)
    fig.suptitle(f"{rows[0].scene}: solid fed the 8-bit tokens, dashed the exact ones")
    return save(fig, folder, stem)


def _draw_part(axes: Axes, rows: Sequence[QualityRow]) -> None:
    for colour, attention in zip(COLOURS, _in_order(row.attention for row in rows)):
        clips = [row.blocks for row in rows if row.attention == attention]
        places = [error.block for error in clips[0]]
        through = [100 * max(e.through_error for e in same) for same in zip(*clips)]
        own = [100 * max(e.own_error for e in same) for same in zip(*clips)]
        axes.plot(places, through, "o-", color=colour, markersize=4, label=attention)
        axes.plot(places, own, "--", color=colour)
    axes.locator_params(axis="x", integer=True)


def _in_order(found: Iterable[T]) -> list[T]:
    """Everything once, as it comes."""
    return list(dict.fromkeys(found))
