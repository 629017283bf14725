"""Bones -> shaded capsules, RGBA: what the official sphere tracer draws, in closed form.

A ray leaves the camera through each pixel along (X, Y, 1) and stops where it first enters a
capsule: a cylinder around a bone, closed by half spheres. All bones of a frame are solved at once,
as one flat list of the (bone, pixel) pairs that can meet:

    spans     per bone and row, the pixels between the projections of its two end spheres
    meet      distance along the ray to the bone, float64; the smallest of a pixel is its hit
    choose    which bone the hit point lies on, decided in float32 as the official program does
    shade     one colour for each hit pixel

Source: docs/reference/pose.md 6 and 11. Vectors are kept components first: [3, N].
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from engine.pose.arrays import AnyFloats, Bools, Frame, Indices
from engine.pose.bones import Bones
from engine.pose.camera import Camera

RADIUS = 21.5  # mm
ALPHA = 204  # of a bone's pixel; 0 elsewhere

_NEAR = 0.1  # mm; rays start here
_TOUCH = 1e-3  # mm; a ray this close to a surface has hit it
_STEP = np.float32(1e-3)  # mm; the official normal is a difference over this step
_SHORT = 1e-8  # mm; a shorter bone is a sphere
_PARALLEL = 1e-12  # sine squared; below it a ray runs along the bone
_LEVEL = 1e-6  # pixels; a bone that falls less is level
_TINY = np.float32(1e-30)
_PAIRS = 1 << 16  # pairs solved at once: bounds the memory when bones fill the picture


@dataclass(frozen=True, slots=True)
class Depths:
    """The smallest and largest z of all bone ends of a clip: brightness falls between them."""

    nearest: float  # mm
    farthest: float  # mm


def depths(clip: Iterable[Bones]) -> Depths | None:
    """The depths of a clip, or None if it has no bones."""
    ends = [z for frame in clip for z in (frame.start[:, 2], frame.end[:, 2]) if len(z)]
    if not ends:
        return None
    return Depths(float(min(z.min() for z in ends)), float(max(z.max() for z in ends)))


def render(
    clip: Sequence[Bones],
    camera: Camera,
    height: int,
    width: int,
    *,
    radius: float = RADIUS,
    within: Depths | None = None,
) -> Iterator[Frame]:
    """Frames [H, W, 4] u8, one at a time; a pixel without a bone is 0.

    `within`: the depths of the whole clip, where only a part of it is drawn here.
    """
    found = within or depths(clip) or Depths(0.0, 0.0)  # without bones nothing is drawn
    canvas = _Canvas(camera, height, width, radius, found)
    for frame in clip:
        yield canvas.draw(frame)


@dataclass(frozen=True, slots=True)
class _Axes:
    """The bones of one frame in the terms of the ray equations, computed in one precision."""

    start: AnyFloats  # [3, B]
    unit: AnyFloats  # [3, B] from start to end; 0 for a sphere
    length: AnyFloats  # [B]


@dataclass(frozen=True, slots=True)
class _Capsules:
    exact: _Axes  # decides what a ray meets
    rounded: _Axes  # decides which bone it is, as in the official program
    rgb: AnyFloats  # [3, B]


@dataclass(frozen=True, slots=True)
class _Spans:
    """Runs of pixels that a bone may cover, ordered as the bones are."""

    bone: Indices  # [R]
    y: Indices  # [R]
    x: Indices  # [R] first column
    width: Indices  # [R] at least 1


@dataclass(frozen=True, slots=True)
class _Pairs:
    """A bone and a pixel whose ray meets it, ordered as the bones are."""

    bone: Indices  # [N]
    pixel: Indices  # [N] y * W + x
    ray: AnyFloats  # [3, N] unit vectors


class _Canvas:
    """The constants of a clip, and buffers that are left clean between two frames."""

    def __init__(
        self, camera: Camera, height: int, width: int, radius: float, found: Depths
    ) -> None:
        self.camera, self.height, self.width, self.radius = camera, height, width, radius
        self.reach = max(min(found.farthest, 25000.0), 10000.0)  # rays end here
        self.bright = np.float32(max(found.nearest, _NEAR))  # full brightness up to here
        self.fading = np.float32(min(found.farthest + 6000.0, 20000.0) - 0.1)
        self.x = (np.arange(width) - camera.cx) / camera.fx  # X of each column
        self.y = (np.arange(height) - camera.cy) / camera.fy  # Y of each row
        self.hit = np.full(height * width, np.inf)  # distance along the ray to the first bone
        self.gap = np.full(height * width, np.inf, np.float32)  # from there to the nearest axis
        self.owner = np.zeros(height * width, np.intp)  # the pair that colours the pixel

    def draw(self, bones: Bones) -> Frame:
        frame = np.zeros((self.height, self.width, 4), np.uint8)
        capsules = _capsules(bones)
        spans = _spans(capsules.exact, self.camera, self.radius, self.height, self.width)
        if len(spans.bone):
            pairs = _joined([self._meet(capsules, portion) for portion in _portions(spans)])
            pixels, colours = self._colour(capsules, pairs)
            # One 4-byte store for each pixel: numpy writes rows of 4 bytes ten times slower.
            frame.view(np.uint32).reshape(-1)[pixels] = colours.view(np.uint32)[:, 0]
        return frame

    def _meet(self, capsules: _Capsules, spans: _Spans) -> _Pairs:
        """The pairs of these spans that meet; `hit` keeps the smallest distance of each pixel."""
        row = np.repeat(np.arange(len(spans.bone)), spans.width)
        before = np.cumsum(spans.width) - spans.width
        column = np.arange(len(row)) + np.repeat(spans.x - before, spans.width)
        x, y = self.x.take(column), self.y[spans.y]
        stretch = np.sqrt(np.repeat(y * y + 1, spans.width) + x * x)  # |(X, Y, 1)|
        distance = stretch * _depth(capsules.exact, spans, x, y, self.radius)
        if _surrounds(capsules.rounded, self.radius).any():
            ray = np.stack([x, y.take(row), np.ones_like(x)]) / stretch
            inside = _begins_inside(capsules.rounded, spans.bone.take(row), ray, self.radius)
            distance[inside] = _NEAR

        meets = np.flatnonzero((distance >= _NEAR) & (distance <= self.reach))  # not NaN
        row, x, stretch = row.take(meets), x.take(meets), stretch.take(meets)
        pixel = (spans.y * self.width).take(row) + column.take(meets)
        np.minimum.at(self.hit, pixel, distance.take(meets))
        ray = np.stack([x / stretch, y.take(row) / stretch, 1 / stretch]).astype(np.float32)
        return _Pairs(spans.bone.take(row), pixel, ray)

    def _colour(self, capsules: _Capsules, pairs: _Pairs) -> tuple[Indices, NDArray[np.uint8]]:
        """The pixels that were hit and their RGBA [N, 4]. Of equally near bones the first shows."""
        point = pairs.ray * self.hit.take(pairs.pixel).astype(np.float32)
        outward = _off_axis(capsules.rounded, pairs.bone, point)
        gap = _norm(outward)
        np.minimum.at(self.gap, pairs.pixel, gap)
        nearest = np.flatnonzero(gap == self.gap.take(pairs.pixel))[::-1]
        pixel = pairs.pixel.take(nearest)
        self.owner[pixel] = nearest  # the last to be written is the first bone
        shown = nearest[self.owner.take(pixel) == nearest]
        self.hit[pairs.pixel], self.gap[pairs.pixel] = np.inf, np.inf

        rgb = capsules.rgb.take(pairs.bone.take(shown), axis=1)
        outward, point, ray = (v.take(shown, axis=1) for v in (outward, point, pairs.ray))
        return pairs.pixel.take(shown), self._shade(rgb, outward, point, ray)

    def _shade(
        self, rgb: AnyFloats, outward: AnyFloats, point: AnyFloats, ray: AnyFloats
    ) -> NDArray[np.uint8]:
        """RGBA [N, 4] under a light at the camera, along z (docs/reference/pose.md 6.5)."""
        # The official normal is a difference quotient whose step is rounded to float32.
        normal = outward * ((point + _STEP) - (point - _STEP))
        normal /= np.maximum(_norm(normal), _TINY)  # on the axis there is none: 0
        halfway = -ray
        halfway[2] -= 1
        facing = np.maximum(-normal[2], 0)
        shine = np.maximum((normal * halfway).sum(axis=0) / _norm(halfway), 0)
        for _ in range(5):
            shine *= shine  # to the power of 32
        fade = np.clip(1 - (point[2] - self.bright) / self.fading, 0, 1)
        colour = rgb * ((0.3 + 0.7 * facing) * fade) + 0.5 * shine * fade
        pixels = np.full((len(fade), 4), ALPHA, np.uint8)
        pixels[:, :3] = (np.clip(colour, 0, 1) * 255).T  # truncated
        return pixels


def _capsules(bones: Bones) -> _Capsules:
    exact, rounded = _axes(bones, np.float64), _axes(bones, np.float32)
    return _Capsules(exact, rounded, np.ascontiguousarray(bones.rgb.T))


def _axes(bones: Bones, precision: type[np.float32 | np.float64]) -> _Axes:
    start = np.ascontiguousarray(bones.start.T, precision)
    along = bones.end.T.astype(precision) - start
    length = _norm(along)
    length[length < _SHORT] = 0
    return _Axes(start, along / np.where(length > 0, length, precision(np.inf)), length)


def _spans(axes: _Axes, camera: Camera, radius: float, height: int, width: int) -> _Spans:
    """Pixels between two moving boxes: a capsule is what its sphere sweeps from end to end."""
    ends = np.stack([axes.start, axes.start + axes.length * axes.unit])
    x, y, z = ends[:, 0], ends[:, 1], ends[:, 2]  # [2, B]
    ahead = (z - radius >= 1).all(axis=0)  # else the bone may show anywhere in the picture
    depth = np.where(ahead, z, 2 * radius + 2)  # for those any depth does
    x, half_x = _box(x, depth, radius, camera.fx, camera.cx)
    y, half_y = _box(y, depth, radius, camera.fy, camera.cy)
    half_x[~ahead], half_y[~ahead] = np.inf, np.inf

    top = np.clip(np.ceil(y.min(axis=0) - half_y), 0, height)
    bottom = np.clip(np.floor(y.max(axis=0) + half_y), -1, height - 1)
    rows = np.maximum(bottom - top + 1, 0).astype(np.intp)
    bone = np.repeat(np.arange(len(rows)), rows)
    row = np.arange(len(bone)) + (top.astype(np.intp) - np.cumsum(rows) + rows)[bone]

    # The shares of the way from start to end at which the box enters and leaves a row.
    fall = y[1] - y[0]
    fall[np.abs(fall) < _LEVEL] = _LEVEL
    shares = ((row - y[0, bone]) + np.array([[-1], [1]]) * half_y[bone]) / fall[bone]
    middle = x[0, bone] + np.clip(shares, 0, 1) * (x[1] - x[0])[bone]
    left = np.clip(np.ceil(middle.min(axis=0) - half_x[bone]), 0, width).astype(np.intp)
    right = np.clip(np.floor(middle.max(axis=0) + half_x[bone]), -1, width - 1).astype(np.intp)
    seen = right >= left
    return _Spans(bone[seen], row[seen], left[seen], (right - left + 1)[seen])


def _box(
    place: AnyFloats, depth: AnyFloats, radius: float, focal: float, centre: float
) -> tuple[AnyFloats, AnyFloats]:
    """Cubes around the end spheres in the picture: middles [2, B], the larger half size [B]."""
    corners = [(place + i * radius) / (depth + j * radius) for i in (-1, 1) for j in (-1, 1)]
    low, high = np.min(corners, axis=0) * focal + centre, np.max(corners, axis=0) * focal + centre
    half = ((high - low) / 2).max(axis=0) + 1  # and a pixel for rounding
    return (low + high) / 2, half


def _portions(spans: _Spans) -> Iterator[_Spans]:
    """Cuts the spans into portions of about `_PAIRS` pixels."""
    portion = np.cumsum(spans.width) // _PAIRS
    cuts = [0, *(np.flatnonzero(np.diff(portion)) + 1), len(portion)]
    for first, end in pairwise(cuts):
        part = slice(first, end)
        yield _Spans(spans.bone[part], spans.y[part], spans.x[part], spans.width[part])


def _joined(parts: Sequence[_Pairs]) -> _Pairs:
    if len(parts) == 1:
        return parts[0]
    return _Pairs(
        np.concatenate([part.bone for part in parts]),
        np.concatenate([part.pixel for part in parts]),
        np.concatenate([part.ray for part in parts], axis=1),
    )


def _depth(axes: _Axes, spans: _Spans, x: AnyFloats, y: AnyFloats, radius: float) -> AnyFloats:
    """z [N] at which the rays (x, y, 1) enter their bones; NaN where they pass by.

    x [N] is of the pixels, y [R] of the rows. A point z ray is inside the endless cylinder while
    A z^2 + 2 B z + C < 0, and z q - u.start along the bone, with q = u.ray.
    """

    def spread(of_rows: AnyFloats) -> AnyFloats:
        return np.repeat(of_rows, spans.width)

    start, unit = axes.start[:, spans.bone], axes.unit[:, spans.bone]  # [3, R]
    along, square = (unit * start).sum(axis=0), (start * start).sum(axis=0)
    q = spread(unit[1] * y + unit[2]) + spread(unit[0]) * x
    s = spread(start[1] * y + start[2]) + spread(start[0]) * x  # start.ray
    ray = spread(y * y + 1) + x * x  # |ray|^2
    with np.errstate(invalid="ignore"):  # the root of a negative number: no meeting
        a, b = np.maximum(ray - q * q, _PARALLEL), spread(along) * q - s
        z = (-b - np.sqrt(b * b - a * spread(square - along * along - radius**2))) / a
        place = z * q - spread(along)
        # Beyond an end of the bone the ray enters the sphere around that end, or nothing.
        length = spread(axes.length[spans.bone])
        beyond = np.flatnonzero((place < 0) | (place > length))
        foot = np.clip(place.take(beyond), 0, length.take(beyond))
        s, ray = s.take(beyond) + foot * q.take(beyond), ray.take(beyond)
        along, square = spread(along).take(beyond), spread(square).take(beyond)
        centre = square + foot * (2 * along + foot)  # squared distance of the sphere
        z[beyond] = (s - np.sqrt(s * s - ray * (centre - radius**2))) / ray
    return z


def _surrounds(axes: _Axes, radius: float) -> Bools:
    """True for each bone [B] that the camera is in or at."""
    camera = np.zeros((3, 1), np.float32)
    return _norm(_off_axis(axes, np.arange(len(axes.length)), camera)) < radius + 1


def _begins_inside(axes: _Axes, bone: Indices, ray: AnyFloats, radius: float) -> Bools:
    """True for each ray [N] that begins inside its bone."""
    first = (ray * _NEAR).astype(np.float32)
    return _norm(_off_axis(axes, bone, first)) < radius + _TOUCH


def _off_axis(axes: _Axes, bone: Indices, point: AnyFloats) -> AnyFloats:
    """The vectors [3, N] from the bone's axis to the points, rounded as the official ones.

    Source: docs/reference/pose.md 11.
    """
    unit = axes.unit.take(bone, axis=1)
    away = point - axes.start.take(bone, axis=1)
    along = (away[0] * unit[0] + away[1] * unit[1]) + away[2] * unit[2]
    return away - np.clip(along, 0, axes.length.take(bone)) * unit


def _norm(vectors: AnyFloats) -> AnyFloats:
    return np.sqrt((vectors[0] ** 2 + vectors[1] ** 2) + vectors[2] ** 2)
