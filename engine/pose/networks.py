"""The motion capture networks of a models folder: found, hashed for the cache, loaded once."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from engine.diskcache import remembered_sha256
from engine.errors import MissingModel
from engine.pose.arrays import Frames
from engine.pose.boxes import Detection
from engine.pose.detect import Detector, DetectorFiles, find_detector, find_nlf, open_detector
from engine.pose.nlf import Nlf, load_nlf
from engine.pose.onnx import gpu_bytes, weight_files


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

    def gpu_bytes(self) -> int:
        """Counts what the networks keep of the GPU from the first dance on; 0 where there are none.

        What they compute with meanwhile is not counted: it is given back before a clip is planned.
        """
        if self._device.type != "cuda":
            return 0
        try:
            held = gpu_bytes(self._pair.persons) + gpu_bytes(self._pair.keypoints)
        except (MissingModel, OSError):  # a job with a dance will say so
            return 0
        try:
            return held + self._files.nlf.stat().st_size
        except (MissingModel, OSError):  # framing looks for joints without it
            return held

    def locator(self) -> Nlf:
        """The network for 3D joints, loaded once. Raises `MissingModel`, `BadCheckpoint`."""
        if self._locator is None:
            self._locator = load_nlf(self._files.nlf, self._device)
        return self._locator

    def detector(self) -> Detector:
        """The networks for 2D keypoints, loaded once. Raises `MissingModel`, `BadCheckpoint`."""
        if self._detector is None:
            gpu = self._device.type == "cuda"
            self._detector = open_detector(self._pair, gpu=gpu)
        return self._detector

    def look(self, frames: Frames) -> Iterator[Detection]:
        """Finds keypoints in frames of one clip, in order: the NLF model is not needed.

        Raises as `detector` does.
        """
        return self.detector().detect(frames)

    @cached_property
    def _files(self) -> NetworkFiles:
        return NetworkFiles(find_nlf(self._models), self._pair)

    @cached_property
    def _pair(self) -> DetectorFiles:
        return find_detector(self._models)
