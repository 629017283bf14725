"""The motion capture models of a volume, under the names and in the folders people have.

2D keypoints come from one of two pairs of networks: DWPose, the official recipe, is preferred;
ViTPose with YOLOv10, the recipe of the ComfyUI worker, is the other.

Sources: docs/reference/pose.md 3.2 and 3.3, docs/reference/runpod.md A.6.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from engine.errors import MissingModel
from engine.models.locate import KnownModel, search
from engine.pose.arrays import Frames
from engine.pose.boxes import Detection
from engine.pose.dwpose import open_dwpose
from engine.pose.vitpose import open_vitpose

FOLDERS = (
    *("", "detection", "DWPose", "dwpose", "nlf", "torch_cache"),
    "../torch_cache",  # beside the models folder on the worker's volume
)
NLF = KnownModel(
    "NLF model", FOLDERS, ("nlf_l_multi_0.3.2.torchscript", "nlf_l_multi_0.2.2.torchscript")
)

log = logging.getLogger(__name__)


class Detector(Protocol):
    """Finds 2D whole-body keypoints, frame by frame."""

    def detect(self, frames: Frames) -> Iterator[Detection]:
        """Frames [H, W, 3] u8 RGB of one clip, in order. Raises `BadMedia`."""
        ...


@dataclass(frozen=True, slots=True)
class NetworkPair:
    """Two networks that make a detector together."""

    recipe: str
    persons: KnownModel
    keypoints: KnownModel

    def __str__(self) -> str:
        names = (" | ".join(known.names) for known in (self.persons, self.keypoints))
        return f"{' and '.join(names)} ({self.recipe})"


DWPOSE = NetworkPair(
    "DWPose",
    persons=KnownModel("person detector of DWPose", FOLDERS, ("yolox_l.onnx",)),
    keypoints=KnownModel("keypoint network of DWPose", FOLDERS, ("dw-ll_ucoco_384.onnx",)),
)
VITPOSE = NetworkPair(
    "ViTPose",
    persons=KnownModel("person detector of ViTPose", FOLDERS, ("yolov10m.onnx",)),
    keypoints=KnownModel(
        "keypoint network of ViTPose",
        FOLDERS,
        (
            "vitpose_h_wholebody_model.onnx",
            "vitpose-h-wholebody.onnx",
            "vitpose-l-wholebody.onnx",
        ),
    ),
)
PAIRS = (DWPOSE, VITPOSE)  # best first


@dataclass(frozen=True, slots=True)
class DetectorFiles:
    """The two files of a complete pair."""

    pair: NetworkPair
    persons: Path
    keypoints: Path


def find_detector(models: Path) -> DetectorFiles:
    """The best complete pair below the models folder.

    Raises `MissingModel` with every name and folder looked for.
    """
    for pair in PAIRS:
        persons, keypoints = search(models, pair.persons), search(models, pair.keypoints)
        if persons is not None and keypoints is not None:
            log.info("2D keypoints by %s: %s and %s", pair.recipe, persons, keypoints)
            return DetectorFiles(pair, persons, keypoints)
        if persons is not None or keypoints is not None:
            log.warning("%s is passed over: %s is alone", pair.recipe, persons or keypoints)
    choices = " or ".join(map(str, PAIRS))
    raise MissingModel(f"No 2D keypoint networks: put {choices} into {_places(models)}.")


def open_detector(files: DetectorFiles, *, gpu: bool) -> Detector:
    """Opens a pair. Raises `BadCheckpoint` if a file is damaged or another network's."""
    if files.pair is DWPOSE:
        return open_dwpose(files.persons, files.keypoints, gpu=gpu)
    return open_vitpose(files.persons, files.keypoints, gpu=gpu)


def find_nlf(models: Path) -> Path:
    """The NLF model below the models folder. Raises `MissingModel` with every name looked for."""
    found = search(models, NLF)
    if found is None:
        raise MissingModel(f"No NLF model: put {' | '.join(NLF.names)} into {_places(models)}.")
    log.info("3D joints by %s", found)
    return found


def _places(models: Path) -> str:
    return f"{models} or its {', '.join(folder for folder in FOLDERS if folder)}"
