"""Soft parts of a drawing: blends of round cones, outlined, coloured and lit.

Antialiasing comes from exact distances, so nothing is drawn larger than it is shown.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.nano.dance import Array, ease
from engine.pose.camera import Camera

Tint = tuple[int, int, int]
Cone = tuple[Array, Array, float, float]  # two ends [3] mm and their radii, mm

FINE = 896  # pixels of a picture's longer side at which outlines have the widths given here


@dataclass(frozen=True, slots=True)
class ConePart:
    """One colour, blended from round cones, perhaps cut to other shapes."""

    cones: Sequence[Cone]
    colour: Tint
    blend: float = 0.0  # mm over which the cones melt into each other
    ink: float = 1.0  # strength of the outline
    shade: float = 1.0  # strength of light and shadow
    opacity: float = 1.0
    within: Sequence[Cone] = ()
    without: Sequence[Cone] = ()
    seam: Sequence[Cone] = ()  # where there is neither outline nor shade
    hem: Cone | None = None  # ends the part with a straight edge across the end of this cone


def paint(canvas: Array, part: ConePart, camera: Camera) -> None:
    """Lays one part over the canvas: an outline, its colour, light from above left.

    A fourth channel of the canvas, if it has one, says how much of a pixel was painted over, 0..1.
    """
    flat = _project(part.cones, camera)
    scale = max(canvas.shape[:2]) / FINE
    box = _box(flat, canvas.shape, 4 * scale)
    rows, columns = (np.arange(edge.start, edge.stop) + 0.5 for edge in box)
    points = np.stack(np.meshgrid(columns, rows), -1)  # [h, w, 2]
    if not points.size:
        return
    unit = camera.fx / float(np.mean([end[2] for cone in part.cones for end in cone[:2]]))
    blend = part.blend * unit

    def field(offset: float = 0.0) -> Array:
        """Signed distance, as seen when the part moves so many mm towards the light."""
        shift = offset * unit * np.array([-0.6, -0.8])
        return _distance(points - shift, flat, blend)

    shape = field()
    for others, sign in ((part.within, 1), (part.without, -1)):
        if others:
            shape = np.maximum(shape, sign * _distance(points, _project(others, camera), blend))
    if part.hem:
        shape = np.maximum(shape, _past(points, part.hem, camera))
    base, view = np.array(part.colour, np.float64), canvas[box]
    open_edge = np.ones(shape.shape)
    if part.seam:
        seam = _distance(points, _project(part.seam, camera), 0)
        open_edge = np.clip(seam / (8 * scale), 0, 1)
    _lay(view, base * (0.50, 0.44, 0.48), inside(shape - 1.1 * scale) * part.ink * open_edge)
    colour = np.broadcast_to(base, (*shape.shape, 3)).copy()
    if part.shade:
        rim = 0.36 * float(np.mean([cone[2:] for cone in part.cones]))
        dark = ease(field(rim) / (2.4 * scale) + 0.5)
        cover(colour, base * (0.84, 0.79, 0.84), part.shade * open_edge * dark)
    _lay(view, colour, inside(shape) * part.opacity)


def _project(cones: Sequence[Cone], camera: Camera) -> list[tuple[Array, Array, float, float]]:
    """Cones in pixels: two ends [2] and their radii."""

    def pixel(point: Array) -> Array:
        return np.array([camera.fx, camera.fy]) * point[:2] / point[2] + (camera.cx, camera.cy)

    return [
        (pixel(a), pixel(b), camera.fx * ra / a[2], camera.fx * rb / b[2]) for a, b, ra, rb in cones
    ]


def _box(cones: Sequence[Cone], shape: tuple[int, ...], margin: float) -> tuple[slice, slice]:
    """The rows and columns that the cones can touch."""
    ends = [(end, radius) for a, b, ra, rb in cones for end, radius in ((a, ra), (b, rb))]
    low = np.floor(np.min([end - radius for end, radius in ends], axis=0) - margin).astype(int)
    high = np.ceil(np.max([end + radius for end, radius in ends], axis=0) + margin).astype(int)
    (left, top), (right, bottom) = np.maximum(low, 0), np.maximum(high, 0)
    return slice(top, min(bottom, shape[0])), slice(left, min(right, shape[1]))


def _distance(points: Array, cones: Sequence[Cone], blend: float) -> Array:
    """Distance [h, w] in pixels to a smooth union of round cones, below 0 inside."""
    total: Array | None = None
    for a, b, ra, rb in cones:
        axis = b - a
        share = np.clip((points - a) @ axis / max(float(axis @ axis), 1e-9), 0, 1)
        near = points - a - share[..., None] * axis
        one = np.sqrt((near * near).sum(-1)) - (ra + (rb - ra) * share)
        if total is None:
            total = one
        elif blend > 0:
            mix = np.maximum(blend - np.abs(total - one), 0) / blend
            total = np.minimum(total, one) - mix * mix * blend / 4
        else:
            total = np.minimum(total, one)
    assert total is not None
    return total


def _past(points: Array, cone: Cone, camera: Camera) -> Array:
    """Distance in pixels past the far rim of a cone, as wide as the rim seen at its slant."""
    ((start, end, _, rim),) = _project([cone], camera)
    axis = end - start
    seen = float(np.linalg.norm(axis))
    length = float(np.linalg.norm(cone[1] - cone[0])) * camera.fx / cone[1][2]
    slant = np.sqrt(max(0.0, 1 - (seen / max(length, 1e-6)) ** 2))
    return (points - end) @ (axis / max(seen, 1e-6)) - rim * slant


def inside(distance: Array) -> Array:
    """The share of a pixel, 0..1, that a shape at this distance from its centre covers."""
    return np.clip(0.5 - distance, 0, 1)


def _lay(view: Array, colour: Array, share: Array) -> None:
    cover(view[..., :3], colour, share)
    view[..., 3:] += share[..., None] * (1 - view[..., 3:])


def cover(under: Array, colour: Array, share: Array) -> None:
    under += share[..., None] * (colour - under)
