"""Judges the nano SCAIL-2 on scenes that it was never shown, and what it makes of wrong inputs.

python -m benchmarks.nano_scail2.suite [--scenes N] [--models DIR] [--pictures DIR]

In each mode: as many scenes with one person and as many with two. Controls are the same scenes told
wrongly: the colours of the picture's mask exchanged, the frames of the dance shuffled, masks zero.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import numpy as np
from PIL import Image

from benchmarks.nano_scail2.judge import Verdict, judge
from benchmarks.nano_scail2.perform import PRESET, Given, exact, given, perform
from benchmarks.nano_scail2.scenes import (
    HELD_OUT,
    MODES,
    PALETTE,
    Frames,
    Mode,
    Scene,
    ScenePlan,
    plan,
    scene,
)
from benchmarks.timing import columns
from engine.config import state_dir
from engine.demo.weights import DemoWeights
from engine.pipeline import Pipeline

CLIPS = 8


@dataclass(frozen=True, slots=True)
class Row:
    """The verdicts of some scenes that were told in one way."""

    mode: Mode
    persons: int
    told: str
    verdicts: tuple[Verdict, ...]

    @property
    def limb_iou(self) -> float:
        return fmean(one.limb_iou for one in self.verdicts)

    @property
    def right_colours(self) -> int:
        """Counts the scenes in which everybody has the colours of the picture."""
        return sum(one.right_colours for one in self.verdicts)

    @property
    def background_db(self) -> float:
        return fmean(one.background_db for one in self.verdicts)


def right(inputs: Given) -> Given:
    return inputs


def swapped_masks(inputs: Given) -> Given:
    """Exchanges blue and red in the mask of the picture."""
    blue, red = (np.array(colour, np.uint8) for colour in PALETTE)
    mask = inputs.picture_mask
    is_blue, is_red = ((mask == colour).all(-1)[..., None] for colour in (blue, red))
    return replace(inputs, picture_mask=np.where(is_blue, red, np.where(is_red, blue, mask)))


def shuffled_dance(inputs: Given) -> Given:
    """Changes the order of the driving frames, and that of their masks with them."""
    order = np.random.default_rng(0).permutation(len(inputs.driving))
    return replace(inputs, driving=inputs.driving[order], driving_mask=inputs.driving_mask[order])


def zero_masks(inputs: Given) -> Given:
    return replace(
        inputs,
        picture_mask=np.zeros_like(inputs.picture_mask),
        driving_mask=np.zeros_like(inputs.driving_mask),
    )


TOLD: dict[str, Callable[[Given], Given]] = {
    "right": right,
    "swapped masks": swapped_masks,
    "shuffled dance": shuffled_dance,
    "zero masks": zero_masks,
}


def held_out(persons: int, count: int) -> Iterator[tuple[ScenePlan, Scene]]:
    for number in range(count):
        planned = plan(HELD_OUT + number, persons=persons)
        yield planned, scene(planned)


def measure(pipeline: Pipeline, count: int, pictures: Path | None) -> Iterator[Row]:
    """Gives a row for each mode, number of persons and way to tell."""
    for persons in (1, 2):
        scenes = list(held_out(persons, count))
        for mode in MODES:
            for name, tell in TOLD.items():
                if persons == 1 and tell is swapped_masks:
                    continue
                made = [
                    perform(pipeline, tell(given(true, mode)), seed)
                    for seed, (_, true) in enumerate(scenes)
                ]
                if pictures is not None:
                    save_pictures(made, scenes, mode, pictures / f"{mode} {persons} {name}.png")
                verdicts = tuple(
                    judge(frames, planned, true, mode)
                    for frames, (planned, true) in zip(made, scenes, strict=True)
                )
                yield Row(mode, persons, name, verdicts)


def save_pictures(
    made: Sequence[Frames], scenes: Sequence[tuple[ScenePlan, Scene]], mode: Mode, path: Path
) -> None:
    """Writes a row for each scene: picture, then driving, made and true at four times."""
    rows: list[Frames] = []
    for frames, (_, true) in zip(made, scenes, strict=True):
        cells = [true.picture.frames[0]]
        for t in np.linspace(0, len(frames) - 1, 4).astype(int):
            cells += [true.driving.frames[t], frames[t], true.targets[mode].frames[t]]
        rows.append(np.concatenate(cells, axis=1))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(rows)).save(path)


def table(rows: Sequence[Row]) -> str:
    heads = {"limb IoU": ".3f", "colours": "s", "background dB": ".1f", "PSNR dB": ".1f"}
    return columns(heads, [
        (f"{row.mode} {row.persons} {row.told}", row.limb_iou,
         f"{row.right_colours}/{len(row.verdicts)}", row.background_db,
         fmean(one.psnr for one in row.verdicts))
        for row in rows
    ])  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--scenes", type=int, default=CLIPS, metavar="N")
    parser.add_argument("--models", type=Path, metavar="DIR", help="other than what is shipped")
    parser.add_argument("--pictures", type=Path, metavar="DIR")
    args = parser.parse_args(argv)
    weights = PRESET.weights(state_dir())
    if args.models is not None:
        name = Path(*weights.checkpoint.parts[-2:])
        weights = DemoWeights(args.models / name, args.models)
    print(table(list(measure(exact(weights), args.scenes, args.pictures))))


if __name__ == "__main__":
    main()
