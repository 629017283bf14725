"""The networks of a models folder that masks are made with: found, hashed, loaded once."""

from functools import cached_property
from math import prod
from pathlib import Path

import torch

from engine.diskcache import remembered_sha256
from engine.errors import BadCheckpoint, MissingModel
from engine.masks.kept import MaskNetworks
from engine.masks.person_boxes import BoxFinder, BoxNetwork, find_box_network, open_boxes
from engine.masks.sam2_find import find_segmenter, require_time
from engine.masks.sam2_load import files_of, load_sam2, look_at, require_library
from engine.masks.sam2_sizes import Sam2Kind
from engine.masks.segmenter import Segmenter
from engine.models.tensorfile import TensorFile
from engine.pose.onnx import weight_files

WORK_BYTES = 1536 * 2**20  # for what it computes and remembers; set by hand, not measured

_SHOWN_HEX = 12  # of a hash in a name


class MaskFiles:
    """Owns SAM 2 and the detector of persons, from when they are first asked for."""

    def __init__(
        self, models: Path, device: torch.device, state: Path, wanted: Path | None = None
    ) -> None:
        """`wanted`: a folder or a file of SAM 2; None: the best below the models folder."""
        self._models, self._device, self._wanted = models, device, wanted
        self._memos = state / "hashes"
        self._segmenter: Segmenter | None = None
        self._finder: BoxFinder | None = None

    def require(self) -> None:
        """Raises `MissingModel`, `BadCheckpoint`, or `Unavailable` without what runs them,
        now rather than after a video was decoded.
        """
        require_library()
        _ = self._path, self._boxes, self.kind

    def require_time(self, frames: int, persons: int, slow: bool) -> None:
        """Says how long masks take on a CPU. Raises `BadRequest` unless that was asked for."""
        require_time(self.kind, frames, persons, self._device, slow)

    @cached_property
    def kind(self) -> Sam2Kind | None:
        """What SAM 2 it is; None for a size of somebody's own."""
        return look_at(self._path)

    def hashes(self) -> list[str]:
        """SHA-256 of every file that masks depend on. Raises `MissingModel`, `BadCheckpoint`."""
        _, boxes = self._boxes
        try:
            used = [*files_of(self._path), boxes, *weight_files(boxes)]
            return [remembered_sha256(file, self._memos) for file in used]
        except OSError as error:
            raise MissingModel(f"{error.filename} cannot be read: {error.strerror}.") from error

    def segmenter(self) -> Segmenter:
        """SAM 2, loaded once. Raises `MissingModel`, `BadCheckpoint`."""
        if self._segmenter is None:
            digest = remembered_sha256(files_of(self._path)[-1], self._memos)[:_SHOWN_HEX]
            name = f"{self.kind or self._path.name} {digest}"
            self._segmenter = load_sam2(self._path, self._device, name)
        return self._segmenter

    def finder(self) -> BoxFinder:
        """The detector of persons, loaded once. Raises `MissingModel`, `BadCheckpoint`."""
        if self._finder is None:
            self._finder = open_boxes(*self._boxes, gpu=self._device.type == "cuda")
        return self._finder

    def gpu_bytes(self) -> int:
        """Counts what SAM 2 takes of the GPU while it makes masks; 0 where there is none.

        Nothing of it is left when they are made.
        """
        if self._device.type != "cuda":
            return 0
        try:
            stored = (TensorFile(path, top_key="model") for path in files_of(self._path)[-1:])
            values = sum(prod(file.shape(name)) for file in stored for name in file)
            return values * torch.bfloat16.itemsize + WORK_BYTES
        except (MissingModel, BadCheckpoint, OSError):  # a job that wants masks will say so
            return 0

    def release(self) -> None:
        """Gives the GPU's memory back: the transformer needs it next."""
        self._segmenter = self._finder = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def networks(self) -> MaskNetworks:
        return MaskNetworks(self.hashes, self.segmenter, self.finder)

    @cached_property
    def _path(self) -> Path:
        return find_segmenter(self._models, self._wanted)

    @cached_property
    def _boxes(self) -> tuple[BoxNetwork, Path]:
        return find_box_network(self._models)
