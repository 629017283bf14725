"""Golden data of the alignment: whole clips, and fits of the camera alone.

Files of clips hold joints, the driving and the reference 2D points, what became of them, and the
pictures drawn. Files of fits hold problems `00_p3`, `00_p2`, ... and where the official minimiser
stopped. `official` must reproduce that; `exact` must never cost more, and may differ only where
the official minimiser stopped early. (golden README; spec/pose.md 5.2, 9)
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from engine.golden.check import Check, at_most, compare
from engine.golden.render import frame_checks, with_overlay
from engine.pose.align import (
    M_RANGE,
    S_RANGE,
    WEIGHTS,
    Alignment,
    face_scale,
    fit,
    scale_faces,
    shift,
    solve,
)
from engine.pose.bones import bones, palettes
from engine.pose.camera import Camera, base_camera
from engine.pose.keypoints import Keypoints
from engine.pose.overlay import overlay
from engine.pose.render import render

Arrays = Mapping[str, NDArray]

CAMERA = 1e-6  # relative
POINTS = 1e-5  # shares of the picture
SAME_PX = 1e-3  # exact and official, projected, where official did not stop early
ROUNDING = 1e-9  # relative


def recognises(names: frozenset[str], metadata: Mapping[str, str]) -> bool:
    return _is_clip(names) or _is_solver(names)


def checks(path: Path) -> Iterator[Check]:
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    if _is_clip(frozenset(arrays)):
        yield from _clip(path.name, arrays)
    else:
        for index in range(int(arrays["n"])):
            yield from _problem(f"{path.name} {index:02d}", arrays, f"{index:02d}_")


def _is_clip(names: frozenset[str]) -> bool:
    return {"joints", "in_candidate", "ref_candidate", "out_candidate", "K_new"} <= names


def _is_solver(names: frozenset[str]) -> bool:
    return {"n", "00_hw", "00_p3", "00_p2", "00_ms"} <= names


def _clip(name: str, arrays: Arrays) -> Iterator[Check]:
    height, width, joints = int(arrays["H"]), int(arrays["W"]), arrays["joints"][:, 0]
    driving, reference = _keypoints(arrays, "in"), _keypoints(arrays, "ref")[0]
    base, camera = base_camera(height, width), arrays["K_new"]
    alignment = fit(joints[0], reference, height, width, "official")
    yield _relative(f"{name} K0", base.matrix, arrays["K0"])
    yield from _camera(name, alignment, camera, (arrays["m"], arrays["s"]))
    yield at_most(f"{name} mode", float(alignment.body != str(arrays["mode"])), 0)
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


def _problem(name: str, arrays: Arrays, prefix: str) -> Iterator[Check]:
    points, pixels = arrays[prefix + "p3"], arrays[prefix + "p2"]
    height, width = (int(side) for side in arrays[prefix + "hw"])
    body = "down" if str(arrays[prefix + "mode"]) == "down" else "central"
    want = arrays[prefix + "K"]
    official = solve(points, pixels, body, height, width, "official")
    yield from _camera(name, official, want, arrays[prefix + "ms"])

    exact = solve(points, pixels, body, height, width, "exact")
    yield at_most(f"{name} exact: outside the bounds", _outside(exact), ROUNDING)
    first, other = WEIGHTS[body]
    weights = np.array([first] + [other] * (len(points) - 1), np.float64)
    there, here = _project(points, want), _project(points, exact.camera.matrix)
    cost, best = (weights @ ((seen - pixels) ** 2).sum(-1) for seen in (there, here))
    above = float((best - cost) / max(cost, ROUNDING))
    yield at_most(f"{name} exact: cost above official, relative", above, ROUNDING)
    # The cost is quadratic: points d away from those of the true optimum cost at least w d^2 more.
    # So what remains of d beyond official's excess says how far exact is from that optimum.
    apart = weights @ ((there - here) ** 2).sum(-1) - (cost - best)
    yield at_most(
        f"{name} exact: pixels from official beyond its early stop",
        float(np.sqrt(max(apart, 0.0) / weights.sum())),
        SAME_PX,
    )


def _outside(alignment: Alignment) -> float:
    """How far m and s lie outside their bounds."""
    pairs = ((alignment.m, M_RANGE), (alignment.s, S_RANGE))
    return max(max(low - value, value - high, 0.0) for value, (low, high) in pairs)


def _project(points: NDArray, camera: NDArray) -> NDArray[np.float64]:
    """[n, 3] mm -> [n, 2] pixels."""
    seen = points.astype(np.float64) @ camera.T
    return seen[:, :2] / seen[:, 2:]


def _relative(name: str, got: ArrayLike, want: ArrayLike) -> Check:
    """Largest error of any number, as a share of what it should be; a 0 must be met exactly."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    scale = np.where(want == 0, CAMERA, np.abs(want))
    return compare(name, got / scale, want / scale, CAMERA)


def _camera(name: str, got: Alignment, camera: NDArray, ms: ArrayLike) -> Iterator[Check]:
    m, s = np.asarray(ms)
    yield _relative(f"{name} m", got.m, m)
    yield _relative(f"{name} s", got.s, s)
    yield _relative(f"{name} K_new", got.camera.matrix, camera)


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
