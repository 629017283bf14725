"""Everybody's boxes in a picture, by a detector of persons.

Motion capture needs one person's box and keeps the rest to itself; whom to paint is known only
when everybody is seen. YOLOX comes first; YOLOv10 is taken where a user has put it.
Source: docs/reference/masks.md 7.4.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from engine.errors import MissingModel
from engine.models.locate import KnownModel, search
from engine.pose.arrays import Doubles, Frame
from engine.pose.boxes import (
    checked,
    decode_yolox,
    letterbox,
    stretch,
    yolo10_objects,
    yolox_objects,
)
from engine.pose.detect import DWPOSE, FOLDERS, VITPOSE
from engine.pose.onnx import Net, OnnxNetwork
from engine.pose.vitpose import to_unit

LEAST_SCORE = 0.3  # below, a person is none
YOLO10_LICENCE = "AGPL-3.0: whoever offers it as a service must publish their source"

_PERSON = 0  # class
_SIDE = 640

BoxFinder = Callable[[Frame], Doubles]  # [H, W, 3] u8 -> [n, 5] x1, y1, x2, y2, score; any order

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BoxNetwork:
    """A detector that boxes are found with."""

    name: str
    known: KnownModel
    ports: tuple[int | None, ...]  # of its output
    find: Callable[[Net, Frame], Doubles]  # rows [k, 6]: box, score, class


def _yolox(net: Net, frame: Frame) -> Doubles:
    picture, ratio = letterbox(np.asarray(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR), np.uint8))
    return yolox_objects(*decode_yolox(net(picture)[0], ratio))


def _yolo10(net: Net, frame: Frame) -> Doubles:
    return yolo10_objects(net(stretch(to_unit(frame)))[0][0], *frame.shape[:2])


YOLOX = BoxNetwork("YOLOX", DWPOSE.persons, (1, 8400, 85), _yolox)
YOLO10 = BoxNetwork("YOLOv10", VITPOSE.persons, (1, None, 6), _yolo10)
NETWORKS = (YOLOX, YOLO10)  # the first that is there is taken


def find_box_network(models: Path) -> tuple[BoxNetwork, Path]:
    """The detector below the models folder. Raises `MissingModel` with every name looked for."""
    for network in NETWORKS:
        if (path := search(models, network.known)) is not None:
            log.info("boxes of persons by %s, %s", network.name, path)
            return network, path
    names = " or ".join(name for network in NETWORKS for name in network.known.names)
    places = ", ".join(folder for folder in FOLDERS if folder)
    raise MissingModel(
        f"Nothing finds persons for masks: put {names} into {models} or its {places}."
    )


def open_boxes(network: BoxNetwork, path: Path, *, gpu: bool) -> BoxFinder:
    """Opens a detector. Raises as `OnnxNetwork` does; what it finds with raises `BadMedia`."""
    net = OnnxNetwork(path, (1, 3, _SIDE, _SIDE), [network.ports], gpu=gpu)
    return lambda frame: persons(network.find(net, checked(frame)))


def persons(objects: Doubles) -> Doubles:
    """Boxes and scores [n, 5] of the persons among objects [k, 6], by descending score."""
    found = objects[(objects[:, 5] == _PERSON) & (objects[:, 4] > LEAST_SCORE), :5]
    return found[np.argsort(-found[:, 4], kind="stable")]
