"""The picture, the driving video and their masks that the demo of the nano SCAIL-2 shows.

python -m benchmarks.nano_scail2.demo            # rewrites them where the demo finds them

The video's mask is a file of labels, the picture's a picture of colours; either serves both modes,
as what lies behind people is known by the mode (docs/reference/masks.md 1.3).
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.nano_scail2.scenes import (
    BEHIND,
    FPS,
    HELD_OUT,
    layers,
    mask,
    plan,
    put_into,
)
from engine.demo.presets import NANO_SCAIL2_HOME
from engine.media.mp4 import encode_mp4

PICTURE, PICTURE_MASK = "dancer.png", "dancer_mask.png"
DRIVING, DRIVING_MASK = "driving.mp4", "driving_mask.npz"
SCENE, FRAMES = HELD_OUT + 105, 97
LARGER, SHARPER = 2, 4  # times as high and wide as the clip: the video, the picture
CRF = 16


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=NANO_SCAIL2_HOME, metavar="DIR")
    parser.add_argument("--scene", type=int, default=SCENE, metavar="N")
    args = parser.parse_args(argv)
    write_demo(args.out, args.scene)


def write_demo(folder: Path, number: int = SCENE, frames: int = FRAMES) -> None:
    """Writes the four files of a scene that nothing was trained on."""
    folder.mkdir(parents=True, exist_ok=True)
    planned = plan(number, frames)
    still = planned.pictured[:, None]
    picture = put_into(planned.studio, still, layers(planned.heroes, still, SHARPER))
    Image.fromarray(picture.frames[0]).save(folder / PICTURE, optimize=True)
    _, behind = BEHIND["animation"]
    Image.fromarray(mask(picture.owners, behind)[0]).save(folder / PICTURE_MASK, optimize=True)
    dance = layers(planned.dancers, planned.joints, LARGER)
    driving = put_into(planned.stage, planned.joints, dance)
    clip = torch.from_numpy(driving.frames)
    encode_mp4(iter([clip]), FPS, folder / DRIVING, crf=CRF)
    np.savez_compressed(folder / DRIVING_MASK, masks=driving.owners)


if __name__ == "__main__":
    main()
