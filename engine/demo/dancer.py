"""The sample picture and the sample dance, made by the project itself and shipped with it.

python -m engine.demo.dancer            # rewrites dancer.png and dance.npz
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from engine.demo.dance import dance, standing
from engine.demo.drawing import Look, draw_dancer

HERE = Path(__file__).resolve().parent
PICTURE, DANCE = HERE / "dancer.png", HERE / "dance.npz"
HEIGHT, WIDTH = 896, 512
FRAMES, FPS, SEED = 65, 16.0, 0


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--out", type=Path, default=HERE, metavar="DIR")
    folder = parser.parse_args(argv).out
    picture = Image.fromarray(draw_dancer(standing(), HEIGHT, WIDTH, Look()))
    picture.save(folder / PICTURE.name, optimize=True)
    joints = dance(FRAMES, FPS, SEED)
    np.savez(folder / DANCE.name, joints=joints, fps=FPS, height=HEIGHT, width=WIDTH)


if __name__ == "__main__":
    main()
