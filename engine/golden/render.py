"""Golden data of the capsule renderer and of the 2D overlay.

Files hold capsules and the frames drawn from them, most also the joints the capsules came from,
some the 2D points and the frames with the overlay. Of equally near bones the official program
shows either, as rounding falls, so frames are compared by measures and not pixel by pixel; the
limits are those of docs/reference/pose.md 9.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.golden.arrays import Arrays, read_arrays
from engine.golden.check import Check, at_most, compare
from engine.pose.bones import Bones, bones, palettes
from engine.pose.camera import camera_from_matrix
from engine.pose.keypoints import Keypoints
from engine.pose.overlay import composite, overlay
from engine.pose.render import ALPHA, render

ALPHA_SHARE, ALPHA_PIXELS = 0.001, 25  # pixels of bones in one clip only
FAR_LEVELS, FAR_SHARE = 8, 0.01  # a colour this far off is another bone's
P99_LEVELS, MEAN_LEVELS = 2, 0.3  # of the other pixels
LEAST_PSNR = 47.0  # dB, whole pictures
MATERIAL = 1e-6


def recognises(names: frozenset[str], metadata: Mapping[str, str]) -> bool:
    return {"cyl_start", "cyl_end", "cyl_rgba", "cyl_count", "frames_rgba", "K"} <= names


def checks(path: Path) -> Iterator[Check]:
    arrays = read_arrays(path)
    name, clip, want = path.name, _capsules(arrays), arrays["frames_rgba"]
    if "joints" in arrays:
        drawn = [bones(frame, palettes(arrays["joints"].shape[1])) for frame in arrays["joints"]]
        yield from _same_capsules(name, drawn, arrays)
        clip = drawn
    camera, (height, width) = camera_from_matrix(arrays["K"]), want.shape[1:3]
    got = np.stack(list(render(clip, camera, height, width, radius=float(arrays["radius"]))))
    yield from frame_checks(f"{name} frames_rgba", got, want)
    if "frames_rgba_with2d" in arrays:
        points = [_keypoints(arrays, frame) for frame in range(len(want))]
        overlaid = with_overlay(want, [overlay(shown, height, width) for shown in points])
        yield compare(f"{name} frames_rgba_with2d", overlaid, arrays["frames_rgba_with2d"], 0)


def frame_checks(name: str, got: NDArray[np.uint8], want: NDArray[np.uint8]) -> Iterator[Check]:
    """Compares one clip [T, H, W, 4] without overlay by its measures."""
    if got.shape != want.shape:
        yield Check(f"{name}: shape {got.shape}, not {want.shape}", None, None, False)
        return
    wrong = got[..., 3] != want[..., 3]
    got_bone, want_bone = got[..., 3] > 0, want[..., 3] > 0
    either, both = got_bone | want_bone, got_bone & want_bone
    yield at_most(f"{name} alpha pixels", float(wrong.sum()), ALPHA_PIXELS)
    yield at_most(f"{name} alpha share", float(wrong.sum() / max(either.sum(), 1)), ALPHA_SHARE)
    values = np.setdiff1d(got[..., 3], (0, ALPHA))
    yield at_most(f"{name} alpha values other than 0 and {ALPHA}", float(len(values)), 0)

    levels = np.abs(got[..., :3].astype(np.int16) - want[..., :3])  # [T, H, W, 3]
    bone = levels[both]
    near = bone.max(axis=1, initial=0) <= FAR_LEVELS
    share = float(np.mean(~near)) if len(bone) else 0.0
    yield at_most(f"{name} share more than {FAR_LEVELS} levels off", share, FAR_SHARE)
    rest = bone[near] if near.any() else np.zeros((1, 3))
    p99 = float(np.percentile(rest.max(axis=1), 99))
    yield at_most(f"{name} levels p99", p99, P99_LEVELS)
    yield at_most(f"{name} levels mean", float(rest.mean()), MEAN_LEVELS)
    squares = max(float(np.mean(levels.astype(np.float32) ** 2, dtype=np.float64)), 1e-12)
    below = LEAST_PSNR - 10 * float(np.log10(255**2 / squares))
    yield at_most(f"{name} PSNR below {LEAST_PSNR:g} dB", below, 0)


def with_overlay(frames: NDArray[np.uint8], canvases: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Frames [T, H, W, 4] with a canvas [H, W, 3] over each; alpha stays."""
    rgb = [composite(frame[..., :3], canvas) for frame, canvas in zip(frames, canvases)]
    return np.concatenate([np.stack(rgb), frames[..., 3:]], axis=-1)


def _capsules(arrays: Arrays) -> list[Bones]:
    cuts = np.cumsum(arrays["cyl_count"])[:-1]
    columns = (arrays["cyl_start"], arrays["cyl_end"], arrays["cyl_rgba"][:, :3])
    return [Bones(*frame) for frame in zip(*(np.split(column, cuts) for column in columns))]


def _same_capsules(name: str, drawn: list[Bones], arrays: Arrays) -> Iterator[Check]:
    counts = [len(frame.start) for frame in drawn]
    yield compare(f"{name} cyl_count", counts, arrays["cyl_count"], 0)
    start = np.concatenate([frame.start for frame in drawn])
    end = np.concatenate([frame.end for frame in drawn])
    rgb = np.concatenate([frame.rgb for frame in drawn])
    yield compare(f"{name} cyl_start", start, arrays["cyl_start"], 0)
    yield compare(f"{name} cyl_end", end, arrays["cyl_end"], 0)
    yield compare(f"{name} cyl_rgba", rgb, arrays["cyl_rgba"][:, :3], MATERIAL)


def _keypoints(arrays: Arrays, frame: int) -> Keypoints:
    """Hands as the official program draws them: rows 2i and 2i + 1 belong to person i."""
    body = arrays["dw_candidate"][frame]
    visible = arrays["dw_subset"][frame] != -1
    hands = arrays["dw_hands"][frame].reshape(len(body), 2, -1, 2)
    return Keypoints(body, visible, arrays["dw_faces"][frame], hands)
