"""The motion capture networks of a models folder: found, hashed for the cache, loaded once."""

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from engine.diskcache import remembered_sha256
from engine.errors import MissingModel
from engine.pose.detect import Detector, DetectorFiles, find_detector, find_nlf, open_detector
from engine.pose.nlf import Nlf, load_nlf

_GRAPH_BYTES = 64 * 2**20  # an ONNX file whose weights lie in other files is smaller


@dataclass(frozen=True, slots=True)
class NetworkFiles:
    nlf: Path
    detector: DetectorFiles


class Networks:
    """Owns the loaded networks."""

    def __init__(self, models: Path, device: torch.device, state: Path) -> None:
        self._models, self._device, self._memos = models, device, state / "hashes"
        self._locator: Nlf | None = None
        self._detector: Detector | None = None

    def require(self) -> None:
        """Raises `MissingModel` now rather than after minutes spent on something else."""
        _ = self._files

    def hashes(self) -> list[str]:
        """SHA-256 of every file that the networks' answers depend on. Raises `MissingModel`."""
        nlf, detector = self._files.nlf, self._files.detector
        try:
            used = [nlf]
            for network in (detector.persons, detector.keypoints):
                used += [network, *weight_files(network)]
            return [remembered_sha256(file, self._memos) for file in used]
        except OSError as error:
            raise MissingModel(f"{error.filename} cannot be read: {error.strerror}.") from error

    def locator(self) -> Nlf:
        """The network for 3D joints, loaded once. Raises `MissingModel`, `BadCheckpoint`."""
        if self._locator is None:
            self._locator = load_nlf(self._files.nlf, self._device)
        return self._locator

    def detector(self) -> Detector:
        """The networks for 2D keypoints, loaded once. Raises `MissingModel`, `BadCheckpoint`."""
        if self._detector is None:
            gpu = self._device.type == "cuda"
            self._detector = open_detector(self._files.detector, gpu=gpu)
        return self._detector

    @cached_property
    def _files(self) -> NetworkFiles:
        return NetworkFiles(find_nlf(self._models), find_detector(self._models))


def weight_files(network: Path) -> Iterator[Path]:
    """The files beside an ONNX file that hold its weights: those whose names it mentions.

    ViTPose-H has more weights than one ONNX file may hold.
    """
    if not 0 < network.stat().st_size <= _GRAPH_BYTES:
        return
    with network.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as graph:
        for beside in sorted(network.parent.iterdir()):
            if beside != network and beside.is_file() and graph.find(beside.name.encode()) >= 0:
                yield beside
