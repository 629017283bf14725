"""Which motion capture models a volume holds, under the names and in the folders people have.

2D keypoints come from one of two pairs of networks: DWPose, the official recipe, is preferred, and
ViTPose with YOLOv10, that of the ComfyUI worker, is the other. Source: docs/reference/pose.md 3.2,
3.3 and docs/reference/runpod.md A.6.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from engine.errors import MissingModel
from engine.pose.arrays import Frames
from engine.pose.boxes import Detection
from engine.pose.dwpose import open_dwpose
from engine.pose.vitpose import open_vitpose

FOLDERS = (
    *("", "detection", "DWPose", "dwpose", "nlf", "torch_cache"),
    "../torch_cache",  # beside the models folder on the worker's volume
)
NLF_NAMES = ("nlf_l_multi_0.3.2.torchscript", "nlf_l_multi_0.2.2.torchscript")

log = logging.getLogger(__name__)


class Detector(Protocol):
    """2D whole-body keypoints, frame by frame."""

    def detect(self, frames: Frames) -> Iterator[Detection]:
        """Frames [H, W, 3] u8 RGB of one clip, in order. Raises `BadMedia`."""
        ...


@dataclass(frozen=True, slots=True)
class Pair:
    """Two networks that make a detector, each under its possible names, best first."""

    recipe: str
    persons: tuple[str, ...]
    keypoints: tuple[str, ...]


DWPOSE = Pair("DWPose", persons=("yolox_l.onnx",), keypoints=("dw-ll_ucoco_384.onnx",))
VITPOSE = Pair(
    "ViTPose",
    persons=("yolov10m.onnx",),
    keypoints=(
        "vitpose_h_wholebody_model.onnx",
        "vitpose-h-wholebody.onnx",
        "vitpose-l-wholebody.onnx",
    ),
)
PAIRS = (DWPOSE, VITPOSE)  # best first


@dataclass(frozen=True, slots=True)
class DetectorFiles:
    """The files of a pair that is complete."""

    pair: Pair
    persons: Path
    keypoints: Path


def find_detector(models: Path) -> DetectorFiles:
    """The best complete pair below the models folder.

    Raises `MissingModel` with every name and folder looked for.
    """
    for pair in PAIRS:
        persons, keypoints = find(models, pair.persons), find(models, pair.keypoints)
        if persons is not None and keypoints is not None:
            log.info("2D keypoints by %s: %s and %s", pair.recipe, persons, keypoints)
            return DetectorFiles(pair, persons, keypoints)
        if persons is not None or keypoints is not None:
            log.warning("%s is passed over: %s is alone", pair.recipe, persons or keypoints)
    choices = " or ".join(
        f"{' | '.join(pair.persons)} and {' | '.join(pair.keypoints)} ({pair.recipe})"
        for pair in PAIRS
    )
    raise MissingModel(f"No 2D keypoint networks: put {choices} into {_places(models)}.")


def open_detector(files: DetectorFiles, *, gpu: bool) -> Detector:
    """Raises `BadCheckpoint` if a file is damaged or another network's."""
    if files.pair is DWPOSE:
        return open_dwpose(files.persons, files.keypoints, gpu=gpu)
    return open_vitpose(files.persons, files.keypoints, gpu=gpu)


def find_nlf(models: Path) -> Path:
    """The NLF model below the models folder. Raises `MissingModel` with every name looked for."""
    found = find(models, NLF_NAMES)
    if found is None:
        raise MissingModel(f"No NLF model: put {' | '.join(NLF_NAMES)} into {_places(models)}.")
    log.info("3D joints by %s", found)
    return found


def find(models: Path, names: Sequence[str]) -> Path | None:
    """The first name that is there, in any of the folders; a better name beats a nearer folder."""
    places = (models / folder / name for name in names for folder in FOLDERS)
    return next((place for place in places if place.is_file()), None)


def _places(models: Path) -> str:
    return f"{models} or its {', '.join(folder for folder in FOLDERS if folder)}"
