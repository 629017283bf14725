"""Masks by content: what was found once is found again without the networks.

Key: the video's hash, size, frames and rate, the picture's hash and mask, the networks' hashes,
how many are wanted, mode, growth and corrections. `who` is not in it: it only gives colours.
Source: docs/reference/masks.md 7.8.
"""

import hashlib
import io
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from engine.diskcache import DiskCache
from engine.flow import Check, go_on
from engine.masks.events import Event
from engine.masks.made import MadeMasks
from engine.masks.make import Driving, Frames, Looked, Progress, Wish, colour, look
from engine.masks.person_boxes import BoxFinder
from engine.masks.segmenter import Segmenter
from engine.masks.still import Picture, Pictured

CACHE_BYTES = 512 * 2**20
CACHE_VERSION = 1  # raise it when the same files give other masks

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Clip:
    """A video to be looked at, before it is decoded."""

    sha256: str
    size: tuple[int, int]  # height and width of the whole frames
    frames: int  # how many are asked for
    fps: float


@dataclass(frozen=True, slots=True)
class MaskNetworks:
    """The two networks, found and hashed, loaded only where masks are not known yet."""

    hashes: Callable[[], list[str]]
    segmenter: Callable[[], Segmenter]
    finder: Callable[[], BoxFinder]


class MaskMaker:
    """Owns the cache of masks; asks for the networks only when some are not in it."""

    def __init__(self, networks: MaskNetworks, state: Path) -> None:
        self._networks = networks
        self._cache = DiskCache(state / "masks", CACHE_BYTES)

    def masks(
        self,
        clip: Clip,
        read: Callable[[], Frames],
        picture: Picture | None,
        wish: Wish,
        check: Check = go_on,
        progress: Progress | None = None,
        about_to_look: Callable[[], None] = lambda: None,
    ) -> MadeMasks:
        """The masks of a clip. `read` gives its frames and is called only if they are not known.

        `about_to_look` is called before that, and may refuse. Raises as `make.look`,
        `MissingModel`, `BadCheckpoint`, and what the functions given raise.
        """
        key = self._key(clip, picture, wish)
        kept = self._cache.read(key)
        if kept is not None:
            looked = _unpacked(kept)
            log.info("masks of %d frames found in the cache", len(looked.labels))
            frames = np.zeros((0, *clip.size, 3), np.uint8)
            return colour(looked, Driving(frames, clip.fps, clip.sha256), picture, wish)
        about_to_look()
        driving = Driving(read(), clip.fps, clip.sha256)
        looked = look(
            driving, picture, self._networks.segmenter(), self._networks.finder(), wish, check,
            progress,
        )  # fmt: skip
        self._cache.write(key, _packed(looked))
        return colour(looked, driving, picture, wish)

    def _key(self, clip: Clip, picture: Picture | None, wish: Wish) -> str:
        shown = None
        if picture is not None:
            labels = picture.labels
            shown = [
                picture.sha256,
                None if labels is None else hashlib.sha256(labels.numpy().tobytes()).hexdigest(),
            ]
        corrections = [one.key() for one in wish.corrections]
        return json.dumps([
            CACHE_VERSION, clip.sha256, clip.size, clip.frames, clip.fps, shown, wish.mode,
            wish.persons, wish.grow, corrections, self._networks.hashes(),
        ])  # fmt: skip


def _packed(looked: Looked) -> bytes:
    pictured = looked.pictured
    file = io.BytesIO()
    told = json.dumps({"events": [asdict(event) for event in looked.events], "model": looked.model})
    arrays = {} if pictured is None else {
        "picture": pictured.labels.numpy(), "numbers": np.array(pictured.numbers, np.int64),
        "picture_boxes": pictured.boxes,
    }  # fmt: skip
    np.savez_compressed(
        file, labels=looked.labels, there=looked.there, scores=looked.scores, told=np.array(told),
        **arrays,
    )  # fmt: skip
    return file.getvalue()


def _unpacked(value: bytes) -> Looked:
    with np.load(io.BytesIO(value), allow_pickle=False) as held:
        told = json.loads(str(held["told"]))
        pictured = None
        if "picture" in held:
            pictured = Pictured(
                torch.from_numpy(held["picture"]),
                tuple(int(number) for number in held["numbers"]),
                held["picture_boxes"],
            )
        events = tuple(
            Event(one["kind"], one["said"], tuple(one["persons"]), one["frame"])
            for one in told["events"]
        )
        return Looked(
            held["labels"], held["there"], held["scores"], pictured, events, told["model"]
        )
