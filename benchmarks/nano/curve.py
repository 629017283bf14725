"""Draws what both trainings wrote down.

python -m benchmarks.nano.curve FOLDER nano
"""

import argparse
import csv
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.pictures import COLOURS, figure, save

SMOOTH = 40  # steps of one kind in a mean
KINDS = {  # of steps, as the logs call them
    "vae": {"1": "pictures", "5": "5 frames", "9": "9 frames", "9s": "skeletons"},
    "scail": {"1": "1 latent frame", "2": "2", "3": "3", "5": "5 latent frames"},
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="of the training")
    parser.add_argument("out", type=Path)
    args = parser.parse_args(argv)
    drawing, _ = figure(10, 3.6)
    drawing.clear()
    left, right = drawing.subplots(1, 2)
    vae, scail = (read(args.folder / f"{name}.csv") for name in KINDS)
    for colour, (kind, label) in zip(COLOURS, KINDS["vae"].items(), strict=False):
        minutes, _, psnr = vae[kind]
        left.plot(*smooth(minutes, psnr), color=colour, label=label)
    left.set(title="VAE", xlabel="minutes on one core", ylabel="PSNR of crops, dB")
    for colour, (kind, label) in zip(COLOURS, KINDS["scail"].items(), strict=False):
        minutes, loss, _ = scail[kind]
        right.plot(*smooth(minutes, loss), color=colour, label=label)
    right.set(title="Transformer", xlabel="minutes on one core", ylabel="loss of velocities")
    for axes in (left, right):
        axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=4)
    save(drawing, args.out, "loss")


def read(path: Path) -> dict[str, np.ndarray]:
    """For each kind of step minutes, loss, and the other number: [3, n]."""
    found: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    with path.open() as file:
        for _, seconds, kind, loss, other in csv.reader(file):
            found[kind].append((float(seconds) / 60, float(loss), float(other)))
    return {kind: np.array(rows).T for kind, rows in found.items()}


def smooth(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Running means over `SMOOTH` steps, or over all where there are fewer."""
    width = min(SMOOTH, len(y))
    window = np.ones(width) / width
    return np.convolve(x, window, "valid"), np.convolve(y, window, "valid")


if __name__ == "__main__":
    main()
