"""Tracking: persons found frame by frame, in any order -> the same person in the same column.

    tracklets  follow everyone from frame to frame: each person is expected to move on as before,
               and all persons and detections of a frame are paired at once
    chains     join tracklets across absences where place, time and body size allow it
    choice     the main person is the largest and most central in the first frame with anyone
    fill       short absences are interpolated, long ones left empty; both are reported

Everyone is followed, also when one person is wanted: only so can somebody who passes in front be
told from the person behind.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from engine.errors import BadMedia, BadRequest, NobodyFound
from engine.pose.arrays import Doubles, Floats, Indices
from engine.pose.bones import FARTHEST, SMPL_JOINTS

log = logging.getLogger(__name__)

PARENTS = (0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19, 20, 21)  # SMPL

FORGET_S = 0.5  # a person unseen for longer ends the tracklet; also the default of `max_gap`
NOISE_MM = 100.0  # spread of a pelvis about where it is expected ...
SPEED_MM_S = 1000.0  # ... and how it grows with time unseen
DEPTH_TRUST = 1 / 3  # one camera sees depth about three times less exactly than place
AGILITY = 1 / 3  # share of the newest motion in the expected one: detections tremble
REACH = 3.0  # spreads; beyond it a jump is not believed
SIZE_RATIO, SIZE_NOISE = 1.3, 0.1  # of bone lengths, log: beyond the first it is somebody else
END, CUT = 40.0, 30.0  # cost of a last appearance and of a cut: above every plausible return


@dataclass(frozen=True, slots=True)
class Gap:
    """Frames `first` to `last`, both included, in which a person was not found."""

    person: int
    first: int
    last: int
    filled: bool  # interpolated; otherwise the joints are zeros and nothing is drawn

    def __str__(self) -> str:
        frames = f"{self.first}" if self.first == self.last else f"{self.first}-{self.last}"
        return f"{frames} {'interpolated' if self.filled else 'empty'}"


@dataclass(frozen=True, slots=True)
class Tracks:
    """The persons in columns, the main one first, and a record of what was not seen."""

    joints: Floats  # [T, P, 24, 3] mm, camera space; 0 where missing
    rows: Indices  # [T, P] the detection taken in each frame; -1: none
    gaps: tuple[Gap, ...]
    cuts: tuple[tuple[int, int], ...]  # (person, frame): followed across an implausible jump
    lost_joints: int  # single joints missing of a person who was seen: interpolated or 0


@dataclass(frozen=True, slots=True)
class _Detection:
    """One person in one frame."""

    row: int  # in the detector's list
    pose: Doubles  # [24, 3] mm, NaN where missing
    place: Doubles  # [3] mm
    box: Doubles  # [4] x, y, w, h, pixels
    prominence: float


@dataclass(slots=True)
class _Track:
    """One person while in sight, and later through the clip. Grows frame by frame."""

    frames: list[int]
    seen: list[_Detection]
    motion: Doubles = field(default_factory=lambda: np.zeros(5))  # of place and corner, a frame
    cuts: list[int] = field(default_factory=list)  # frames at which it goes on after a film cut


def track(
    joints: Sequence[Floats],
    boxes: Sequence[Floats],
    height: int,
    width: int,
    fps: float,
    *,
    persons: int = 1,
    max_gap: int | None = None,
) -> Tracks:
    """Follows the `persons` most prominent persons through the clip.

    joints, boxes: for each of T frames [n, 24, 3] mm in camera space and [n, 5] x, y, w, h, score
    in pixels, in any order. A joint that is not finite or exactly zero is missing; a detection
    without joints or box is nobody. The columns are ordered by `prominence` in the first frame
    with anyone, then by its sum over all frames; columns without a person are empty. Absences of
    up to `max_gap` frames (half a second if not given) are interpolated, joint by joint.
    Raises `NobodyFound` if no frame shows anyone.
    """
    _check(joints, boxes, persons, fps, max_gap)
    frames = [_detections(pose, box, height, width) for pose, box in zip(joints, boxes)]
    if not any(frames):
        raise NobodyFound(
            f"Nobody was found in any of the {len(frames)} frames looked at (0 to "
            f"{len(frames) - 1}; {sum(map(len, joints))} detections had no usable joints or box). "
            "Use a video in which the dancer is in view."
        )
    memory = max(round(FORGET_S * fps), 1)
    pieces = _tracklets(frames, memory, fps)
    chains = _chains(pieces, _returns(pieces, memory, fps))
    first = min(chain.frames[0] for chain in chains)
    chains.sort(key=lambda chain: _rank(chain, first), reverse=True)
    return _columns(chains[:persons], len(frames), persons, memory if max_gap is None else max_gap)


def _check(
    joints: Sequence[Floats],
    boxes: Sequence[Floats],
    persons: int,
    fps: float,
    max_gap: int | None,
) -> None:
    if persons < 1 or not 0 < fps < math.inf or (max_gap is not None and max_gap < 0):
        raise BadRequest(
            f"Cannot follow {persons} persons at {fps} fps over gaps of {max_gap} frames. "
            "Persons must be at least 1, fps above 0 and the gap not negative."
        )
    if len(joints) != len(boxes) or not joints:
        raise BadMedia(
            f"There are joints of {len(joints)} frames and boxes of {len(boxes)}. "
            "Both must come from the same frames, at least one."
        )


def prominence(box: Doubles, height: int, width: int) -> float:
    """The share of the picture of a box x, y, w, h in pixels, times its centrality: 0 to 1.

    The share is that of the part inside the picture. Centrality falls evenly with the distance of
    that part's centre from the picture's, from 1 in the centre to 0 in a corner.
    """
    size = np.array([width, height], np.float64)
    near = np.clip(box[:2], 0, size)
    far = np.clip(box[:2] + box[2:4], near, size)
    offset = np.linalg.norm(near + far - size) / np.linalg.norm(size)
    return float((far - near).prod() / size.prod() * (1 - offset))


def _detections(joints: Floats, boxes: Floats, height: int, width: int) -> list[_Detection]:
    """Detections with a box and a place: the pelvis, else the middle of the known joints."""
    poses = np.asarray(joints, np.float64).reshape(-1, SMPL_JOINTS, 3)
    areas = np.asarray(boxes, np.float64).reshape(-1, 5)[:, :4]
    if len(poses) != len(areas):
        raise BadMedia(f"A frame has joints of {len(poses)} persons and boxes of {len(areas)}.")
    known = np.asarray((np.abs(poses) < FARTHEST).all(axis=-1))  # [n, 24]; False for NaN
    known &= np.where(known[..., None], poses, 0).sum(-1) != 0
    poses = np.where(known[..., None], poses, np.nan)
    found = []
    for row in np.flatnonzero(known.any(-1) & np.isfinite(areas).all(-1)):
        pose, area = poses[row], areas[row]
        place = pose[0] if known[row, 0] else pose[known[row]].mean(0)
        found.append(_Detection(int(row), pose, place, area, prominence(area, height, width)))
    return found


def _tracklets(frames: Sequence[Sequence[_Detection]], memory: int, fps: float) -> list[_Track]:
    """Everyone's appearances; an absence of up to `memory` frames does not end one."""
    ended: list[_Track] = []
    live: list[_Track] = []
    for now, found in enumerate(frames):
        ended += [one for one in live if now - one.frames[-1] > memory + 1]
        live = [one for one in live if now - one.frames[-1] <= memory + 1]
        costs = np.full((len(live), len(found)), np.inf)
        for i, one in enumerate(live):
            costs[i] = [_cost(one, detection, now, fps) for detection in found]
        alone = [_edge((now - one.frames[-1]) / fps) for one in live]
        paired = pairs(costs, alone)
        for i, k in paired:
            _extend(live[i], found[k], now)
        taken = {k for _, k in paired}
        live += [_Track([now], [one]) for k, one in enumerate(found) if k not in taken]
    return ended + live


def _cost(one: _Track, detection: _Detection, now: int, fps: float) -> float:
    """The cost of taking the detection for the tracked person; inf: not believed."""
    wait, last = now - one.frames[-1], one.seen[-1]
    cost = _jump(detection.place - last.place - wait * one.motion[:3], wait / fps)
    if math.isinf(cost):
        return cost
    corner = last.box[:2] + wait * one.motion[3:]
    return cost + 1 - _overlap(np.append(corner, last.box[2:]), detection.box)


def _jump(offset: Doubles, seconds: float) -> float:
    """[3] mm from the expected place -> -log p of a normal distribution; inf: not believed."""
    spread = NOISE_MM + SPEED_MM_S * seconds
    x, y, z = offset.tolist()
    distance = math.hypot(x, y, z * DEPTH_TRUST) / spread
    return distance**2 / 2 + 2 * math.log(spread / NOISE_MM) if distance <= REACH else math.inf


def _edge(seconds: float) -> float:
    """The cost of a pair that is just believed."""
    spread = NOISE_MM + SPEED_MM_S * seconds
    return REACH**2 / 2 + 2 * math.log(spread / NOISE_MM) + 1


def _overlap(a: Doubles, b: Doubles) -> float:
    """Intersection over union of two boxes x, y, w, h."""
    sides = np.minimum(a[:2] + a[2:], b[:2] + b[2:]) - np.maximum(a[:2], b[:2])
    shared = float(np.maximum(sides, 0).prod())
    joined = float(a[2:].prod() + b[2:].prod()) - shared
    return shared / joined if joined > 0 else 0.0


def _extend(one: _Track, detection: _Detection, now: int) -> None:
    wait, last = now - one.frames[-1], one.seen[-1]
    moved = np.append(detection.place - last.place, detection.box[:2] - last.box[:2]) / wait
    one.motion += (moved - one.motion) * (AGILITY if len(one.frames) > 1 else 1.0)
    one.frames.append(now)
    one.seen.append(detection)


def pairs(costs: Doubles, alone: Sequence[float]) -> list[tuple[int, int]]:
    """The cheapest pairing of rows with columns; `alone`: the cost of an unpaired row."""
    from scipy.optimize import linear_sum_assignment  # slow to import: only when used

    rows, columns = costs.shape
    believed = np.isfinite(costs)
    refused = 1e6  # more than any sum of costs, and finite, as the solver needs it
    own = np.full((rows, rows), refused)
    np.fill_diagonal(own, alone)
    table = np.concatenate([np.where(believed, costs, refused), own], axis=1)
    chosen = zip(*linear_sum_assignment(table))
    return [(int(i), int(k)) for i, k in chosen if k < columns and believed[i, k]]


def _returns(pieces: Sequence[_Track], memory: int, fps: float) -> Doubles:
    """The cost [n, n] of taking tracklet k for the return of i; infinite: not believed."""
    bones = [_bone_lengths(one) for one in pieces]
    costs = np.full((len(pieces), len(pieces)), np.inf)
    for i, a in enumerate(pieces):
        known_until = max(one.frames[-1] for one in pieces if one.frames[0] <= a.frames[-1])
        for k, b in enumerate(pieces):
            wait = b.frames[0] - a.frames[-1]
            if wait <= 0 or (size := abs(_log_ratio(bones[i], bones[k]))) > math.log(SIZE_RATIO):
                continue
            cost = _jump(b.seen[0].place - a.seen[-1].place, wait / fps)
            # Everyone is gone and everyone is new: the film was cut, and places mean nothing.
            if not math.isfinite(cost) and known_until < b.frames[0] and wait <= memory + 1:
                cost = CUT + 1 - _overlap(a.seen[-1].box, b.seen[0].box)
            costs[i, k] = cost + (size / SIZE_NOISE) ** 2 / 2
    return costs


def _chains(pieces: Sequence[_Track], returns: Doubles) -> list[_Track]:
    """Joins tracklets into persons."""
    chains = []
    for numbers in linked(returns):
        chain = _Track([], [])
        for number in numbers:
            chain.frames.extend(pieces[number].frames)
            chain.seen.extend(pieces[number].seen)
        for before, after in pairwise(numbers):
            if returns[before, after] >= CUT:
                chain.cuts.append(pieces[after].frames[0])
        chains.append(chain)
    return chains


def linked(returns: Doubles) -> list[list[int]]:
    """The numbers of the tracklets of each person in order, by what each return costs [n, n]."""
    following = dict(pairs(returns, [END] * len(returns)))
    chains = []
    for start in sorted(set(range(len(returns))) - set(following.values())):
        chain = [start]
        while chain[-1] in following:
            chain.append(following[chain[-1]])
        chains.append(chain)
    return chains


def _bone_lengths(one: _Track) -> Doubles:
    """Logarithms [23] of the median lengths in mm; NaN for a bone that was never seen."""
    poses = np.stack([detection.pose for detection in one.seen])
    lengths = np.linalg.norm(poses[:, 1:] - poses[:, PARENTS[1:]], axis=-1)  # [n, 23]
    lengths[lengths == 0] = np.nan
    seen = np.isfinite(lengths).any(0)
    medians = np.full(lengths.shape[1], np.nan)
    medians[seen] = np.log(np.nanmedian(lengths[:, seen], axis=0))
    return medians


def _log_ratio(a: Doubles, b: Doubles) -> float:
    """The median of a - b over the bones that both show; 0 if they share none."""
    ratios = (a - b)[np.isfinite(a - b)]
    return float(np.median(ratios)) if ratios.size else 0.0


def _rank(chain: _Track, first: int) -> tuple[float, float]:
    """Prominence in the first frame with anyone, then over all frames."""
    there = chain.seen[0].prominence if chain.frames[0] == first else -1.0
    return there, sum(detection.prominence for detection in chain.seen)


def _columns(chains: Sequence[_Track], total: int, persons: int, max_gap: int) -> Tracks:
    joints = np.full((total, persons, SMPL_JOINTS, 3), np.nan)
    rows = np.full((total, persons), -1, np.intp)
    gaps: list[Gap] = []
    cuts: list[tuple[int, int]] = []
    lost = 0
    nobody = [_Track([], [])] * (persons - len(chains))
    for person, chain in enumerate([*chains, *nobody]):
        column = joints[:, person]  # a view: filling it fills the result
        if chain.seen:
            column[chain.frames] = [detection.pose for detection in chain.seen]
            rows[chain.frames, person] = [detection.row for detection in chain.seen]
            lost += int(np.isnan(column[chain.frames, :, 0]).sum())
        for start, stop in pairwise([0, *chain.cuts, total]):
            _fill(column[start:stop], max_gap)
        absent = _gaps(person, rows[:, person], column)
        _report(person, total, absent, chain.cuts)
        gaps += absent
        cuts += [(person, frame) for frame in chain.cuts]
    known = np.nan_to_num(joints).astype(np.float32)
    return Tracks(known, rows, tuple(gaps), tuple(cuts), lost)


def _fill(column: Doubles, max_gap: int) -> None:
    """Interpolates each joint of [T, 24, 3] over up to `max_gap` frames of NaN, in place."""
    frames = np.arange(len(column))
    for joint in range(column.shape[1]):
        seen = np.flatnonzero(np.isfinite(column[:, joint, 0]))
        if not seen.size:
            continue
        after = np.searchsorted(seen, frames)
        inside = (after > 0) & (after < len(seen))
        wait = np.diff(seen, prepend=seen[0])[np.minimum(after, len(seen) - 1)]
        use = inside & (wait <= max_gap + 1)
        for axis in range(3):
            column[use, joint, axis] = np.interp(frames[use], seen, column[seen, joint, axis])


def _gaps(person: int, rows: Indices, column: Doubles) -> list[Gap]:
    edges = np.flatnonzero(np.diff((rows < 0).astype(int), prepend=0, append=0))
    return [
        Gap(person, int(start), int(stop) - 1, bool(np.isfinite(column[start]).any()))
        for start, stop in edges.reshape(-1, 2)
    ]


def _report(person: int, total: int, gaps: Sequence[Gap], cuts: Sequence[int]) -> None:
    absent = sum(gap.last - gap.first + 1 for gap in gaps)
    found = f"person {person}: seen in {total - absent} of {total} frames"
    if gaps:
        found += "; not in " + ", ".join(map(str, gaps))
    if cuts:
        found += "; followed across a cut at " + ", ".join(map(str, cuts))
    log.log(logging.WARNING if gaps or cuts else logging.INFO, "%s", found)
