"""Motion capture in three steps: find joints and keypoints, fit the camera, draw the skeleton.

The first step takes minutes and depends on the dance alone, so its result is kept on disk; the
other two also look at the picture and take milliseconds.
"""

import io
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engine.clock import Progress, over
from engine.diskcache import DiskCache
from engine.flow import Check, go_on
from engine.pose.align import Mode, fit, place
from engine.pose.arrays import Floats, Frame, Frames
from engine.pose.boxes import Detection
from engine.pose.camera import base_camera
from engine.pose.detect import Detector
from engine.pose.keypoints import Keypoints
from engine.pose.match import match
from engine.pose.nlf import FramesDone, People
from engine.pose.skeleton import draw_skeleton
from engine.pose.tracking import prominence, track

log = logging.getLogger(__name__)

CACHE_BYTES = 256 * 2**20  # about 600 clips of 326 frames
CACHE_VERSION = 2  # raise it when the same video and networks give other joints or keypoints

_PARTS = ("body", "visible", "faces", "hands")


@dataclass(frozen=True, slots=True)
class Dance:
    """A dance to look at: with the networks, all that a `CapturedMotion` depends on."""

    sha256: str  # of the video file
    size: tuple[int, int]  # height and width that its frames are cropped to
    frames: int  # how many are asked for; a damaged video may hold fewer
    fps: float
    persons: int = 1  # how many are followed


@dataclass(frozen=True, slots=True)
class CapturedMotion:
    """The joints and keypoints that the networks found, a column for each followed person."""

    joints: Floats  # [T, P, 24, 3] mm, camera space; 0 where missing
    keypoints: list[Keypoints]  # one a frame, P persons each; hidden where missing


class Locator(Protocol):
    """A network that finds 3D joints."""

    def locate(self, frames: Frames, progress: FramesDone | None = None, /) -> list[People]: ...


class CaptureNetworks(Protocol):
    """The networks of a models folder, as `engine.pose.networks` finds them."""

    def hashes(self) -> list[str]: ...
    def locator(self) -> Locator: ...
    def detector(self) -> Detector: ...


class PoseExtractor:
    """Owns the cache of dances; asks for the networks only when one is not in it."""

    def __init__(self, networks: CaptureNetworks, state: Path) -> None:
        self._networks = networks
        self._cache = DiskCache(state / "motion", CACHE_BYTES)

    def motion(
        self, dance: Dance, read: Callable[[], NDArray[np.uint8]], check: Check = go_on
    ) -> CapturedMotion:
        """Joints and keypoints of the most prominent persons; at least one of them is seen.

        `read` gives the frames [T, *size, 3] u8 and is called only if they must be looked at.
        `check` is asked before each frame that a network takes. Raises `MissingModel`,
        `BadCheckpoint`, `NobodyFound` and what `read` and `check` raise.
        """
        key = json.dumps([CACHE_VERSION, *astuple(dance), *self._networks.hashes()])
        kept = self._cache.read(key)
        if kept is not None:
            motion = _unpacked(kept)
            log.info("motion of %d frames found in the cache", len(motion.joints))
            return motion
        motion = self._capture(read(), dance, check)
        self._cache.write(key, _packed(motion))
        return motion

    def skeleton(
        self,
        motion: CapturedMotion,
        picture: Frame | None,
        height: int,
        width: int,
        mode: Mode = "exact",
    ) -> Iterator[Frame]:
        """Frames [height, width, 3] u8 of the dance, fitted to the person in `picture`.

        `picture` has the shape of the frames that `motion` was found in. Without one, and with
        several persons, they are drawn where they danced: which of them the picture shows is not
        known.
        """
        camera, keypoints = base_camera(height, width), motion.keypoints
        dancer = motion.joints[:, 0]
        if picture is not None and motion.joints.shape[1] == 1:
            reference = self._reference(picture)
            first = int(dancer.any(axis=(1, 2)).argmax())
            alignment = fit(dancer[first], reference, height, width, mode)
            if alignment.body != "none":
                camera = alignment.camera
                keypoints = [_without_absent(frame) for frame in keypoints]
                keypoints = place(keypoints, dancer, reference, alignment)
        return draw_skeleton(motion.joints, height, width, camera=camera, keypoints=keypoints)

    def _capture(self, frames: NDArray[np.uint8], dance: Dance, check: Check) -> CapturedMotion:
        height, width = frames.shape[1:3]
        with Progress("joints", len(frames), "frame") as progress:
            people = self._networks.locator().locate(asking(frames, check), progress.reach)
        tracks = track(
            [each.joints for each in people], [each.boxes for each in people],
            height, width, dance.fps, persons=dance.persons,
        )  # fmt: skip
        # Somebody who was wanted and never seen would only change the colours of the others.
        joints = tracks.joints[:, tracks.joints.any(axis=(0, 2, 3))]
        shown = over([*frames], "keypoints", "frame")
        seen = self._networks.detector().detect(asking(shown, check))
        found = [detection.keypoints for detection in seen]
        return CapturedMotion(
            joints, match(found, joints, base_camera(height, width), height, width)
        )

    def _reference(self, picture: Frame) -> Keypoints:
        """The most prominent person of the picture; the dancer is chosen in the same way."""
        detection = next(iter(self._networks.detector().detect([picture])))
        if not len(detection.boxes):
            log.warning(
                "nobody was found in the picture; the skeleton is fitted to what looks like body "
                "points in the whole of it, if anything does"
            )
        return _main_person(detection, *picture.shape[:2])


def asking(frames: Frames, check: Check) -> Iterator[Frame]:
    """Hands on the frames and asks `check` before each."""
    for frame in frames:
        check()
        yield frame


def _main_person(detection: Detection, height: int, width: int) -> Keypoints:
    """The most prominent person found; without boxes there is only one."""
    corners = detection.boxes.astype(np.float64)
    boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
    ranks = [prominence(box, height, width) for box in boxes]
    main = int(np.argmax(ranks)) if ranks else 0
    return _persons(detection.keypoints, slice(main, main + 1))


def _without_absent(frame: Keypoints) -> Keypoints:
    """The frame without its only person if that one is hidden: nothing is there to move."""
    return frame if frame.visible.any() else _persons(frame, slice(0))


def _persons(frame: Keypoints, rows: slice) -> Keypoints:
    return Keypoints(frame.body[rows], frame.visible[rows], frame.faces[rows], frame.hands[rows])


def _packed(motion: CapturedMotion) -> bytes:
    body, visible, faces, hands = (
        np.stack([getattr(one, part) for one in motion.keypoints]) for part in _PARTS
    )
    file = io.BytesIO()
    np.savez_compressed(
        file, joints=motion.joints, body=body, visible=visible, faces=faces, hands=hands
    )
    return file.getvalue()


def _unpacked(value: bytes) -> CapturedMotion:
    with np.load(io.BytesIO(value), allow_pickle=False) as held:
        frames = zip(*(held[part] for part in _PARTS))
        return CapturedMotion(held["joints"], [Keypoints(*parts) for parts in frames])
