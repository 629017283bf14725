"""What suite `quality` found: tables for a terminal, figures to compare, pictures to look at."""

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator
from numpy.typing import NDArray
from PIL import Image

from benchmarks.figures import Figure
from benchmarks.pictures import COLOURS, figure, save
from benchmarks.quality.blocks import BlockError
from benchmarks.quality.suite import EQUAL_DB, QualityRow
from benchmarks.timing import require

T = TypeVar("T")
SHOWN_BLOCKS = 6  # at most, of a model with many
BRIGHTER = 8  # times the difference of a worst frame


def quality_table(rows: Sequence[QualityRow]) -> str:
    """Frames and latents of every row, then the tokens after blocks. 100 columns."""
    lines: list[str] = []
    for scene in _in_order(row.scene for row in rows):
        held = [row for row in rows if row.scene == scene]
        head = f"{'latents':>10}{'PSNR dB':>10}{'worst, frame':>16}{'SSIM':>9}{'worst':>9}"
        lines += [f"{scene + ':':38}{head}"]
        lines += [_frame_line(row) for row in held]
        groups = _in_order((row.recipe, row.weights) for row in held)
        lines += ["", "  tokens after a block: relative error fed the exact tokens, fed the 8-bit "
            "ones, and its cosine"]  # fmt: skip
        for recipe, weights in groups:
            same = [row for row in held if (row.recipe, row.weights) == (recipe, weights)]
            lines += [f"  {recipe}, {weights}", *_block_lines(same)]
        lines.append("")
    lines.append(
        f"{EQUAL_DB:.0f} dB: no difference. All of it is measured; the JSON has every block."
    )
    return "\n".join(lines)


def quality_figures(rows: Sequence[QualityRow]) -> list[Figure]:
    """Rounded to what means something; half of the last digit is their noise."""
    return [found for row in rows for found in _figures(row)]


def quality_pictures(rows: Sequence[QualityRow], folder: Path, stem: str) -> list[Path]:
    """For each scene the worst frame of each form of weights, and the errors of all blocks.

    The frames are those of the last run on this machine. Raises `WrongResult` if they are gone.
    """
    made: list[Path] = []
    for scene in _in_order(row.scene for row in rows):
        held = [row for row in rows if row.scene == scene]
        made += draw_frames(_worst_of_weights(held), folder, f"{stem}-{scene}-frames")
        made += draw_blocks(held, folder, f"{stem}-{scene}-blocks")
    return made


def draw_frames(rows: Sequence[QualityRow], folder: Path, stem: str) -> list[Path]:
    """A line for each row: the exact frame, the 8-bit one, and their difference made brighter."""
    pairs = [_pair(row) for row in rows]
    height, width = pairs[0][0].shape[:2]
    tall = 3.0 * height / width + 0.45  # inches of a line of frames with its labels
    fig, _ = figure(9.2, len(rows) * tall + 0.3)
    fig.clear()
    fig.suptitle(f"{rows[0].scene}: the worst frame of each form of weights")
    for line, row, (exact, ours) in zip(fig.subplots(len(rows), 3, squeeze=False), rows, pairs):
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
    fig, _ = figure(9.2, 3.9)
    fig.clear()
    parts = fig.subplots(1, len(forms), squeeze=False, sharey=True)[0]
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


def _figures(row: QualityRow) -> list[Figure]:
    measured = partial(Figure, source="measured")
    higher, lower = partial(measured, better="higher"), partial(measured, better="lower")
    last = row.blocks[-1].through_error
    return [
        higher(f"{row.name}: PSNR", round(row.psnr_db, 1), "dB", 0.05),
        higher(f"{row.name}: worst PSNR", round(row.worst_psnr_db, 1), "dB", 0.05),
        higher(f"{row.name}: SSIM", round(row.ssim, 3), "", 0.0005),
        lower(f"{row.name}: latents", round(100 * row.latent_error, 2), "%", 0.005),
        lower(f"{row.name}: last block", round(100 * last, 2), "%", 0.005),
    ]


def _frame_line(row: QualityRow) -> str:
    what = f"  {row.recipe:11}{row.weights:17}{row.attention:8}"
    frames = f"{row.psnr_db:10.1f}{row.worst_psnr_db:11.1f}, {row.worst_frame:3}"
    return f"{what}{100 * row.latent_error:8.2f} %{frames}{row.ssim:9.4f}{row.worst_ssim:9.4f}"


def _block_lines(rows: Sequence[QualityRow]) -> list[str]:
    """A column for each attention, a line for each block, of many only some."""
    count = len(rows[0].blocks)
    places = sorted({round(n) for n in np.linspace(0, count - 1, SHOWN_BLOCKS)})
    lines = [" " * 8 + "".join(f"{row.attention:>23}" for row in rows)]
    for place in places:
        lines.append(f"{place:8}" + "".join(_block_cells(row.blocks[place]) for row in rows))
    return lines


def _block_cells(error: BlockError) -> str:
    own, through = 100 * error.own_error, 100 * error.through_error
    return f"{own:7.2f}{through:7.2f}{error.through_cosine:9.5f}"


def _worst_of_weights(rows: Sequence[QualityRow]) -> list[QualityRow]:
    return [
        min((row for row in rows if row.weights == weights), key=lambda row: row.worst_psnr_db)
        for weights in _in_order(row.weights for row in rows)
    ]


def _pair(row: QualityRow) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    what = f"The worst frame of {row.name} is not kept here; run the suite again"
    require(row.picture.is_file(), what)
    both = np.array(Image.open(row.picture).convert("RGB"))
    left, right = np.split(both, 2, axis=1)
    return left, right


def _in_order(found: Iterable[T]) -> list[T]:
    """Each once, as they come."""
    return list(dict.fromkeys(found))
