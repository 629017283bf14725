"""Golden data of the alignment: whole clips, and fits of the camera alone.

Files of clips hold joints, the driving and the reference 2D points, what became of them, and the
pictures drawn. Files of fits hold problems `00_p3`, `00_p2`, ... and where the official minimiser
stopped. Source: docs/reference/pose.md 5.2 and 9.

Where that minimiser (scipy's L-BFGS-B) stops depends on the processor: it follows finite
differences, so the last bits of the cost decide when a step is too small to go on. On most problems
every processor reaches the optimum, and there the cameras are compared; on a few one of them stops
early, with m or s off by up to 22 %, and there all that can be asked is that the cost lies between
the optimum's and the start's. The closed form of `exact` says where the optimum is.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from engine.golden.arrays import Arrays, read_arrays
from engine.golden.check import Check, at_most, compare
from engine.golden.render import frame_checks, with_overlay
from engine.pose.align import (
    M_RANGE,
    S_RANGE,
    Alignment,
    Matches,
    face_scale,
    fit,
    matches,
    scale_faces,
    shift,
    solve,
)
from engine.pose.bones import bones, palettes
from engine.pose.camera import Camera, base_camera, camera_from_matrix
from engine.pose.keypoints import Keypoints
from engine.pose.overlay import overlay
from engine.pose.render import render

WRITTEN = 1e-6  # relative: a golden camera against the m and s in the same file
POINTS = 1e-5  # shares of the picture
AT_OPTIMUM = 1e-6  # relative cost above the closed form's, below which a minimiser has reached it
SAME_PX = 0.01  # between joints through two cameras that both reached the optimum
SAME_SCALE = 1e-4  # of m and s, there
EARLY_STOPS = 1 / 6  # of the problems of a file: 8 of 48
EXACT_PX = 1e-3  # exact and official, projected, where official did not stop early
ROUNDING = 1e-9  # relative


def recognises(names: frozenset[str], metadata: Mapping[str, str]) -> bool:
    return _is_clip(names) or _is_solver(names)


def checks(path: Path) -> Iterator[Check]:
    arrays = read_arrays(path)
    if _is_clip(frozenset(arrays)):
        yield from _clip(path.name, arrays)
    else:
        yield from _problems(path.name, arrays)


def _is_clip(names: frozenset[str]) -> bool:
    return {"joints", "in_candidate", "ref_candidate", "out_candidate", "K_new"} <= names


def _is_solver(names: frozenset[str]) -> bool:
    return {"n", "00_hw", "00_p3", "00_p2", "00_ms"} <= names


def _clip(name: str, arrays: Arrays) -> Iterator[Check]:
    height, width, joints = int(arrays["H"]), int(arrays["W"]), arrays["joints"][:, 0]
    driving, reference = _keypoints(arrays, "in"), _keypoints(arrays, "ref")[0]
    base, camera = base_camera(height, width), arrays["K_new"]
    fitted = fit(joints[0], reference, height, width, "official")
    yield _relative(f"{name} K0", base.matrix, arrays["K0"])
    yield at_most(f"{name} mode", float(fitted.body != str(arrays["mode"])), 0)
    yield from _written(name, base, camera, arrays["m"], arrays["s"])
    if fitted.body != "none":
        both = matches(joints[0], reference, height, width, "official")
        m, s = float(arrays["m"]), float(arrays["s"])
        yield from _Fit(both, height, width).against(name, camera, m, s)
    # What follows the fit is held from the golden camera, so that an early stop does not move it.
    alignment = replace(
        fitted, camera=camera_from_matrix(camera), m=float(arrays["m"]), s=float(arrays["s"])
    )
    scale = face_scale(driving, reference, "official")
    yield _relative(f"{name} scale_face", scale, arrays["scale_face"])
    scaled = scale_faces(driving, scale, "official")
    yield from _points(name, arrays, "scaled", scaled)
    placed = [shift(frame, at, alignment) for frame, at in zip(scaled, joints)]
    yield from _points(name, arrays, "out", placed)
    yield from _pictures(name, arrays, alignment.camera)


def _pictures(name: str, arrays: Arrays, camera: Camera) -> Iterator[Check]:
    """Bones by the renderer's measures; what is drawn over them exactly, from the file's points."""
    height, width = int(arrays["H"]), int(arrays["W"])
    clip = [bones(frame, palettes(len(frame))) for frame in arrays["joints"]]
    bare, aligned = arrays["frames_rgba_aligned_no2d"], arrays["frames_rgba_aligned"]
    drawn = np.stack(list(render(clip, camera, height, width)))
    yield from frame_checks(f"{name} frames_rgba_aligned_no2d", drawn, bare)
    canvases = [overlay(points, height, width) for points in _keypoints(arrays, "out")]
    yield compare(f"{name} canvas2d_aligned", np.stack(canvases), arrays["canvas2d_aligned"], 0)
    yield compare(f"{name} frames_rgba_aligned", with_overlay(bare, canvases), aligned, 0)

    # There is no picture of the bones alone to put these points over, so both are drawn here.
    unaligned = arrays["frames_rgba_unaligned"]
    canvases = [overlay(points, height, width) for points in _keypoints(arrays, "in")]
    drawn = np.stack(list(render(clip, base_camera(height, width), height, width)))
    drawn = with_overlay(drawn, canvases)
    yield from frame_checks(f"{name} frames_rgba_unaligned", drawn, unaligned)
    canvas = np.stack(canvases)
    shown = np.where(canvas != 0, unaligned[..., :3], 0)
    yield compare(f"{name} frames_rgba_unaligned, overlay", canvas, shown, 0)


def _problems(name: str, arrays: Arrays) -> Iterator[Check]:
    count, early = int(arrays["n"]), 0
    for index in range(count):
        problem, key = f"{name} {index:02d}", f"{index:02d}_"
        height, width = (int(side) for side in arrays[key + "hw"])
        body = "down" if str(arrays[key + "mode"]) == "down" else "central"
        fit_of = _Fit(Matches(arrays[key + "p3"], arrays[key + "p2"], body, True), height, width)
        camera, (m, s) = arrays[key + "K"], arrays[key + "ms"]
        yield from _written(problem, base_camera(height, width), camera, m, s)
        yield from fit_of.against(problem, camera, m, s)
        yield from fit_of.exact_checks(problem, camera)
        early += not fit_of.both_reached(camera)
    yield at_most(f"{name} early stops", early, max(1, count * EARLY_STOPS))


class _Fit:
    """One problem solved here in both ways, to be held against a golden camera.

    The cost is quadratic: points d away from those of the true optimum cost at least w d^2 more.
    """

    def __init__(self, both: Matches, height: int, width: int) -> None:
        self.points, self.pixels = both.points, np.asarray(both.pixels, np.float64)
        self.weights = both.weights
        found = (solve(both, height, width, mode) for mode in ("exact", "official"))
        self.exact, self.official = found
        self.best = self.cost(self.exact.camera.matrix)
        self.start = self.cost(base_camera(height, width).matrix)

    def cost(self, camera: NDArray) -> float:
        """Weighted squared distance in pixels."""
        return float(self.weights @ ((_project(self.points, camera) - self.pixels) ** 2).sum(-1))

    def reached(self, camera: NDArray) -> bool:
        """True if its cost is the optimum's; where that is 0, to a thousandth of a pixel."""
        floor = self.weights.sum() * EXACT_PX**2
        return self.cost(camera) - self.best <= max(AT_OPTIMUM * self.best, floor)

    def both_reached(self, camera: NDArray) -> bool:
        return self.reached(camera) and self.reached(self.official.camera.matrix)

    def against(self, name: str, camera: NDArray, m: float, s: float) -> Iterator[Check]:
        """`official` against the golden camera: equal, or between optimum and start."""
        here = self.official.camera.matrix
        if self.both_reached(camera):
            apart = np.abs(_project(self.points, here) - _project(self.points, camera)).max()
            yield at_most(f"{name} K_new, pixels", float(apart), SAME_PX)
            yield at_most(f"{name} m", abs(self.official.m - float(m)), SAME_SCALE)
            yield at_most(f"{name} s", abs(self.official.s - float(s)), SAME_SCALE)
            return
        span = max(self.start - self.best, ROUNDING)
        for which, matrix in (("golden", camera), ("here", here)):
            share = (self.cost(matrix) - self.best) / span
            yield at_most(f"{name} stopped early, {which}: below the optimum", -share, ROUNDING)
            yield at_most(f"{name} stopped early, {which}: cost of the start", share, 1 + ROUNDING)

    def exact_checks(self, name: str, camera: NDArray) -> Iterator[Check]:
        """`exact` keeps the bounds, never costs more, and differs only beyond an early stop."""
        yield at_most(f"{name} exact: outside the bounds", _outside(self.exact), ROUNDING)
        cost = self.cost(camera)
        above = (self.best - cost) / max(cost, ROUNDING)
        yield at_most(f"{name} exact: cost above official, relative", above, ROUNDING)
        there, here = (_project(self.points, k) for k in (camera, self.exact.camera.matrix))
        apart = self.weights @ ((there - here) ** 2).sum(-1) - (cost - self.best)
        yield at_most(
            f"{name} exact: pixels from official beyond its early stop",
            float(np.sqrt(max(apart, 0.0) / self.weights.sum())),
            EXACT_PX,
        )


def _written(
    name: str, base: Camera, camera: NDArray, m: ArrayLike, s: ArrayLike
) -> Iterator[Check]:
    """The focal lengths of a golden camera are those of the m and s beside it."""
    focal = float(np.asarray(m)) * base.fx
    yield _relative(f"{name} K_new, focal", focal, camera[0, 0])
    yield _relative(f"{name} K_new, vertical focal", focal * float(np.asarray(s)), camera[1, 1])


def _outside(alignment: Alignment) -> float:
    """The distance of m or s from their bounds, whichever is larger; 0 inside of them."""
    pairs = ((alignment.m, M_RANGE), (alignment.s, S_RANGE))
    return max(max(low - value, value - high, 0.0) for value, (low, high) in pairs)


def _project(points: NDArray, camera: NDArray) -> NDArray[np.float64]:
    """[n, 3] mm -> [n, 2] pixels."""
    seen = points.astype(np.float64) @ camera.T
    return seen[:, :2] / seen[:, 2:]


def _relative(name: str, got: ArrayLike, want: ArrayLike) -> Check:
    """Largest error of any number, as a share of what it should be; a 0 must be met exactly."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    scale = np.where(want == 0, WRITTEN, np.abs(want))
    return compare(name, got / scale, want / scale, WRITTEN)


def _points(name: str, arrays: Arrays, stage: str, got: list[Keypoints]) -> Iterator[Check]:
    want = _keypoints(arrays, stage)
    for field, label in (("body", "candidate"), ("faces", "faces"), ("hands", "hands")):
        yield compare(
            f"{name} {stage}_{label}",
            np.stack([getattr(frame, field) for frame in got]),
            np.stack([getattr(frame, field) for frame in want]),
            POINTS,
        )
    yield compare(
        f"{name} {stage}_subset",
        np.stack([frame.visible for frame in got]),
        np.stack([frame.visible for frame in want]),
        0,
    )


def _keypoints(arrays: Arrays, stage: str) -> list[Keypoints]:
    body, subset = arrays[f"{stage}_candidate"], arrays[f"{stage}_subset"]
    faces, hands = arrays[f"{stage}_faces"], arrays[f"{stage}_hands"]
    return [
        Keypoints(points, index != -1, face, hand.reshape(-1, 2, 21, 2))
        for points, index, face, hand in zip(body, subset, faces, hands)
    ]
