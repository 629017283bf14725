"""Draws the loss of the transformer and the PSNR of the VAE while they were trained.

python -m benchmarks.nano_scail2.curve FOLDER     where `make` left vae.csv and scail2.csv
"""

import argparse
import csv
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from benchmarks.pictures import COLOURS, figure, save

HERE = Path(__file__).resolve().parent
SPAN = 40  # steps of a kind that a point is the mean of
VAE_KINDS = {"1": "pictures", "5": "5 frames", "9": "9 frames", "9h": "9 frames, half size"}
LENGTHS = {"1": "1 latent frame", "2": "2", "4": "4", "5": "5 latent frames"}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--out", type=Path, default=HERE, metavar="DIR")
    args = parser.parse_args(argv)
    drawing, _ = figure(9, 3.2)
    drawing.clear()
    left, right = drawing.subplots(1, 2)
    vae = read(args.folder / "vae.csv", column=4)
    for colour, (kind, name) in zip(COLOURS, VAE_KINDS.items(), strict=False):
        left.plot(*smooth(vae[kind]), color=colour, label=name)
    left.set(title="VAE", xlabel="minutes", ylabel="PSNR of crops, dB")
    losses = read(args.folder / "scail2.csv", column=3)
    for colour, (length, name) in zip(COLOURS, LENGTHS.items(), strict=False):
        rows = sorted(row for kind, rows in losses.items() if kind[0] == length for row in rows)
        right.plot(*smooth(rows), color=colour, label=name)
    right.set(title="Transformer", xlabel="minutes", ylabel="loss of velocities")
    for axes in (left, right):
        axes.legend()
    print(*save(drawing, args.out, "loss"))


def read(path: Path, column: int) -> dict[str, list[tuple[float, float]]]:
    """The minutes and a figure of each step, by the kind of step."""
    rows: dict[str, list[tuple[float, float]]] = defaultdict(list)
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.reader(file):
            rows[row[2]].append((float(row[1]) / 60, float(row[column])))
    return rows


def smooth(rows: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Means over `SPAN` steps, or as many as there are."""
    span = max(1, min(SPAN, len(rows) // 2))
    minutes, values = [], []
    for end in range(span, len(rows) + 1):
        some = rows[end - span : end]
        minutes.append(sum(minute for minute, _ in some) / span)
        values.append(sum(value for _, value in some) / span)
    return minutes, values


if __name__ == "__main__":
    main()
