"""NLF: frames -> 24 SMPL joints of every person, in millimetres, in the camera's space.

The model is TorchScript: loading it runs code. So its file is read once, its SHA-256 must be one
that somebody vouched for, and exactly the bytes that were hashed are loaded. Of the model's outputs
only `joints3d_nonparam` and `boxes` are used. Source: docs/reference/pose.md 2.
"""

import hashlib
import importlib
import importlib.util
import io
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.errors import BadCheckpoint, BadMedia, MissingModel, Unavailable
from engine.pose.arrays import Floats, Frame, Frames
from engine.pose.bones import SMPL_JOINTS
from engine.pose.boxes import checked, nms

# Files whose content was checked by somebody we trust. Empty: the real file could not be fetched
# where this was written, so its hash is not known here and every operator pins their own file.
KNOWN_SHA256: frozenset[str] = frozenset()

_SHA256 = re.compile(r"[0-9a-f]{64}")
_NMS = "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_OUT_OF_MEMORY = re.compile(  # as in engine/machine/exhausted.py, with the CPU's words
    r"out of memory|can't allocate memory|ALLOC(?:ATION)?_FAILED|unable to find an engine"
    r"|[Uu]nable to find a valid cuDNN algorithm|CUDNN_STATUS_NOT_SUPPORTED"
)
# What one call takes of a GPU. Estimates, not measurements: running out halves the batch.
_FIXED_BYTES = 3 << 30  # 64 crops of 384 x 384 in the backbone, whatever the batch
_DETECTOR_BYTES = 128 << 20  # one frame in the person detector
_PIXEL_BYTES = 3 * (1 + 2 + 4 + 4)  # RGB as uint8, fp16 linear light and two fp32 copies
_USABLE = 0.8  # of the free memory: the allocator never packs perfectly
_MAX_BATCH, _CPU_BATCH = 64, 2

log = logging.getLogger(__name__)

FramesDone = Callable[[int], None]  # is told how many frames are done


@dataclass(frozen=True, slots=True)
class People:
    """The persons of one frame in the model's own order, which may change from frame to frame."""

    joints: Floats  # [n, 24, 3] mm, x right, y down, z forward; n = 0: nobody
    boxes: Floats  # [n, 5] x, y, width, height in pixels, and score


class SmplModel(Protocol):
    """The part of the TorchScript model in use."""

    def detect_smpl_batched(self, images: Tensor, /) -> Mapping[str, Sequence[Tensor]]: ...


@dataclass(frozen=True, slots=True)
class Nlf:
    """A loaded model and the device that it runs on."""

    model: SmplModel
    name: str  # of its file
    device: torch.device
    free_bytes: Callable[[], int | None]  # of the device; None: a CPU

    def locate(self, frames: Frames, progress: FramesDone | None = None) -> list[People]:
        """Finds the people of every frame ([H, W, 3] u8 RGB, all of one size).

        Raises `BadMedia` for a frame of another size, `Unavailable` if not even one frame fits in
        memory, `BadCheckpoint` if the model's answer is not that of NLF.
        """
        start = time.perf_counter()
        people: list[People] = []
        batch = 0
        source = _same_size(frames)
        for first in source:
            batch = batch or batch_size(self.free_bytes(), *first.shape[:2])
            waiting = [first, *islice(source, batch - 1)]
            while waiting:
                found = self._try(waiting[:batch])
                if found is None:
                    batch = self._halved(min(batch, len(waiting)), first)
                    continue
                people += found
                del waiting[: len(found)]
                if progress is not None:
                    progress(len(people))
        log.info("NLF: %d frames, %.0f ms", len(people), 1000 * (time.perf_counter() - start))
        return people

    def _try(self, frames: Sequence[Frame]) -> list[People] | None:
        """The people of a batch, or None if it does not fit in memory."""
        images = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).contiguous()
        try:
            with torch.inference_mode():
                answer = self.model.detect_smpl_batched(images.to(self.device))
            return _people(answer, len(frames), self.name)
        except RuntimeError as error:
            # The TorchScript interpreter turns torch.OutOfMemoryError into a plain RuntimeError.
            if not _OUT_OF_MEMORY.search(str(error)):
                raise
        return None

    def _halved(self, batch: int, frame: Frame) -> int:
        if batch == 1:
            raise Unavailable(
                f"{self.name} ran out of memory on {self.device} with a single frame of "
                f"{frame.shape[1]}x{frame.shape[0]}. Use smaller frames or a larger GPU."
            )
        log.warning("NLF: out of memory with %d frames at once, now %d", batch, batch // 2)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return batch // 2


def load_nlf(path: Path, device: torch.device, sha256: str | None = None) -> Nlf:
    """Loads the model from its TorchScript file if somebody has vouched for its content.

    `sha256`: the operator's pin. Without it, `<path>.sha256` beside the model is the pin, else the
    hash must be one of `KNOWN_SHA256`. Raises `MissingModel`, `BadCheckpoint`.
    """
    if not path.is_file():
        raise MissingModel(f"There is no file {path}.")
    data = path.read_bytes()
    _require_pin(path, hashlib.sha256(data).hexdigest(), sha256)
    register_nms()
    try:
        model = torch.jit.load(io.BytesIO(data), map_location=device)
    except (RuntimeError, ValueError) as error:
        raise BadCheckpoint(
            f"{path.name} ({len(data)} bytes) cannot be loaded as TorchScript: "
            f"{(str(error).strip().splitlines() or ['no reason given'])[0]}"
        ) from error
    if not hasattr(model, "detect_smpl_batched"):
        raise BadCheckpoint(
            f"{path.name} is TorchScript without detect_smpl_batched, so not the whole NLF model. "
            "Use nlf_l_multi_0.3.2.torchscript, not the bare crop model."
        )
    return Nlf(model.eval(), path.name, device, lambda: _free_bytes(device))


@cache
def register_nms() -> object:
    """Makes the operator `torchvision::nms` known, which the model's code calls.

    It is torchvision's own where that is installed. The result must stay alive: the cache does it.
    """
    if importlib.util.find_spec("torchvision") is not None:
        return importlib.import_module("torchvision")
    library = torch.library.Library("torchvision", "DEF")
    library.define(_NMS)
    library.impl("nms", _nms, "CompositeExplicitAutograd")
    return library


def batch_size(free_bytes: int | None, height: int, width: int) -> int:
    """Frames for one call: as many as should fit in the free memory of a GPU, 1 to 64."""
    if free_bytes is None:
        return _CPU_BATCH
    frame_bytes = _DETECTOR_BYTES + height * width * _PIXEL_BYTES
    room = int(free_bytes * _USABLE) - _FIXED_BYTES
    return max(1, min(_MAX_BATCH, room // frame_bytes))


def _require_pin(path: Path, found: str, given: str | None) -> None:
    """Raises `BadCheckpoint` unless the hash `found` is the pinned one or a known one."""
    sidecar = path.with_name(f"{path.name}.sha256")
    if given is not None:
        source, pin = "the pin given", given
    elif sidecar.is_file():
        source, pin = sidecar.name, sidecar.read_text(encoding="utf-8", errors="replace")
    elif found in KNOWN_SHA256:
        return
    else:
        raise BadCheckpoint(
            f"{path.name} is TorchScript, which runs code when loaded, and nobody has vouched for "
            f"it: its SHA-256 is {found}. If you trust where it came from, write that hash to "
            f"{sidecar}."
        )
    wanted = (pin.split() or [""])[0].lower()  # sha256sum writes the file's name after the hash
    if not _SHA256.fullmatch(wanted):
        raise BadCheckpoint(
            f"{path.name}: {source} holds {wanted[:80]!r}, not a SHA-256 of 64 hexadecimal digits."
        )
    if wanted != found:
        raise BadCheckpoint(
            f"{path.name} has SHA-256 {found}, but {source} says {wanted}. The file is damaged or "
            "another one: fetch it again, or correct the pin if you trust this one."
        )


def _same_size(frames: Frames) -> Iterator[Frame]:
    size = None
    for index, frame in enumerate(frames):
        shape = checked(frame).shape
        size = size or shape
        if shape != size:
            raise BadMedia(
                f"Frame {index} is {frame.shape[1]}x{frame.shape[0]}, but the first is "
                f"{size[1]}x{size[0]}; expected frames of one size."
            )
        yield frame


def _people(answer: Mapping[str, Sequence[Tensor]], frames: int, name: str) -> list[People]:
    joints = _rows(answer, "joints3d_nonparam", (SMPL_JOINTS, 3), frames, name)
    boxes = _rows(answer, "boxes", (5,), frames, name)
    counts = [(len(each), len(own)) for each, own in zip(joints, boxes)]
    if any(have != want for have, want in counts):
        raise BadCheckpoint(
            f"{name} gave other numbers of persons in joints3d_nonparam and boxes: {counts}."
        )
    return [People(*pair) for pair in zip(joints, boxes)]


def _rows(
    answer: Mapping[str, Sequence[Tensor]], key: str, row: tuple[int, ...], frames: int, name: str
) -> list[Floats]:
    """One array [n, *row] for each frame. A model that found nobody may give any empty tensor."""
    if not isinstance(answer, Mapping) or key not in answer:
        held = ", ".join(answer) if isinstance(answer, Mapping) else type(answer).__name__
        raise BadCheckpoint(f"{name} gave {held}; expected {key}. It is not an NLF SMPL model.")
    found = [each.float().cpu().numpy() for each in answer[key]]
    if not any(each.size for each in found):
        return [np.empty((0, *row), np.float32)] * frames
    shapes = [each.shape for each in found]
    if len(found) != frames or any(each.size and each.shape[1:] != row for each in found):
        raise BadCheckpoint(
            f"{name} gave {key} of shapes {shapes[:4]} for {frames} frames; expected "
            f"[n, {', '.join(map(str, row))}] for each. It is not an NLF SMPL model."
        )
    return [each.reshape(-1, *row) for each in found]


def _nms(dets: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """`torchvision::nms` by its definition: dets [n, 4], scores [n] -> kept rows, best first."""
    kept = nms(_on_host(dets), _on_host(scores), iou_threshold)
    return torch.from_numpy(kept).to(dets.device)


def _on_host(values: Tensor) -> NDArray:
    """The values as an array; half precision is widened, as torchvision does."""
    wide = values if values.dtype == torch.float64 else values.float()
    return wide.detach().cpu().numpy()


def _free_bytes(device: torch.device) -> int | None:
    """Memory that a call may take; what torch holds but does not use counts as free."""
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused
