"""The sample pictures and dances, made by the project itself and shipped with it.

One pair has the size and the distance of real clips, the other those that the nano model knows.

python -m benchmarks.nano.dancer            # rewrites them where the demo finds them
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.nano.dance import dance, standing
from benchmarks.nano.drawing import Look, draw_dancer
from engine.pose.joints import JointClip, save_joints

DEMO = Path(__file__).resolve().parents[2] / "engine" / "demo"
PICTURE, DANCE = DEMO / "dancer.png", DEMO / "dance.npz"
HEIGHT, WIDTH = 896, 512
FRAMES, FPS, SEED = 65, 16.0, 0
NANO_HEIGHT, NANO_WIDTH = 640, 384  # four times the clip
NANO_FRAMES, NANO_FPS, NANO_SEED = 97, 24.0, 4
NANO_NEARER = 900.0  # mm


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--out", type=Path, default=DEMO, metavar="DIR")
    folder = parser.parse_args(argv).out
    picture = Image.fromarray(draw_dancer(standing(), HEIGHT, WIDTH, Look()))
    picture.save(folder / PICTURE.name, optimize=True)
    joints = dance(FRAMES, FPS, SEED)
    np.savez(folder / DANCE.name, joints=joints, fps=FPS, height=HEIGHT, width=WIDTH)
    write_nano(folder / "nano")


def write_nano(folder: Path) -> None:
    """A dancer that stands nearer, and more than four seconds."""
    folder.mkdir(exist_ok=True)
    nearer = np.array([0, 0, NANO_NEARER])
    picture = draw_dancer(standing() - nearer, NANO_HEIGHT, NANO_WIDTH, Look())
    Image.fromarray(picture).save(folder / PICTURE.name, optimize=True)
    joints = (dance(NANO_FRAMES, NANO_FPS, NANO_SEED) - nearer).astype(np.float32)
    save_joints(folder / DANCE.name, JointClip(joints, NANO_FPS, (NANO_HEIGHT, NANO_WIDTH)))


if __name__ == "__main__":
    main()
