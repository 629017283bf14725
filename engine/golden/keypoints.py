"""Golden data of the 2D keypoints: what surrounds the four networks, without the networks.

Six layouts, told apart by their tensors: YOLOX, DWPose crop, DWPose pose, YOLOv10, ViTPose crop
and ViTPose pose. Inputs are rebuilt from patterns and samples by the rules of the data's README,
which also gives every tolerance.
"""

import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.golden.arrays import Arrays, read_arrays
from engine.golden.check import Check, at_most, compare
from engine.pose import dwpose, vitpose
from engine.pose.arrays import Floats
from engine.pose.boxes import (
    decode_yolox,
    letterbox,
    letterbox_size,
    stretch,
    usable,
    whole,
    yolo10_objects,
    yolo10_person,
    yolox_objects,
    yolox_persons,
)

Reader = Callable[[Path, Arrays], Iterator[Check]]

_EXACT = 0.0
_PIXEL, _SHARE, _SCORE = 1e-3, 1e-6, 1e-6
_LEVEL, _MEAN_LEVEL, _SUM = 1.0, 0.11, 2e-3
_WARP_LEVEL, _WARP_MEAN_LEVEL, _WARP_INPUT = 4.0, 0.3, 0.07
_REGION, _MATRIX, _STRETCH, _CROP = 1e-9, 1e-4, 1e-5, 1e-4
_CELL, _VIT_PIXEL, _VIT_SHARE = 1e-4, 2e-3, 1e-5


def recognises(names: frozenset[str], metadata: Mapping[str, str]) -> bool:
    return not metadata and _reader(names) is not None


def checks(path: Path) -> Iterator[Check]:
    data = read_arrays(path)
    reader = _reader(frozenset(data))
    if reader is not None:
        yield from reader(path, data)


def _yolox(path: Path, data: Arrays) -> Iterator[Check]:
    sizes = [letterbox_size(int(h), int(w)) for h, w in data["lb_hw"]]
    yield compare(f"{path.name}: lb_new_hw", [size[:2] for size in sizes], data["lb_new_hw"], 0)
    yield compare(f"{path.name}: lb_r", [size[2] for size in sizes], data["lb_r"], _EXACT)
    for image in sorted(name[: -len("_hwk")] for name in data if re.fullmatch(r"img\d+_hwk", name)):
        name = f"{path.name}: {image}"
        net, ratio = letterbox(_picture(data, image))
        yield compare(f"{name} r", ratio, data[f"{image}_r"], _EXACT)
        got = net.ravel()[data[f"{image}_idx"]]
        yield from _levels(f"{name} val", got, data[f"{image}_val"], _LEVEL, _MEAN_LEVEL)
        sums, want = net[0].sum((1, 2), dtype=np.float64), data[f"{image}_sum"]
        yield compare(f"{name} sum", sums / want, np.ones_like(want), _SUM)
    for case in map(str, data["cases"]):
        name = f"{path.name}: {case}"
        boxes, objects, persons = _yolox_case(data, case)
        yield compare(f"{name} xyxy", boxes[data[f"{case}_idx"]], data[f"{case}_xyxy"], _PIXEL)
        yield from _objects(f"{name} dets", objects, data[f"{case}_dets"], _PIXEL)
        yield compare(f"{name} boxes", persons, data[f"{case}_boxes"], _PIXEL)


def _dwpose_crop(path: Path, data: Arrays) -> Iterator[Check]:
    bgr = _picture(data, "img")
    regions = [dwpose.region(box) for box in data["boxes"]]
    yield compare(f"{path.name}: center", [r[0] for r in regions], data["center"], _EXACT)
    yield compare(f"{path.name}: scale", [r[1] for r in regions], data["scale"], _EXACT)
    matrices = [dwpose.forward_matrix(*region) for region in regions]
    yield compare(f"{path.name}: matrix", matrices, data["matrix"], _MATRIX)
    crops = [dwpose.crop(bgr, matrix) for matrix in matrices]
    limits = _WARP_LEVEL, _WARP_MEAN_LEVEL
    yield from _levels(f"{path.name}: crop0", crops[0], data["crop0"], *limits)
    samples = np.stack([crop.ravel()[data["idx"]] for crop in crops])
    yield from _levels(f"{path.name}: crop_val", samples, data["crop_val"], *limits)
    inputs = [dwpose.to_input(crop).ravel()[data["input_idx"]] for crop in crops]
    yield compare(f"{path.name}: input_val", inputs, data["input_val"], _WARP_INPUT)


def _dwpose_pose(path: Path, data: Arrays) -> Iterator[Check]:
    for case in map(str, data["cases"]):
        own = {key: data[f"{case}_{key}"] for key in _keys(data, case)}
        boxes = _detected(path, own)
        if boxes is None:
            name = f"{path.name}: {case}: no YOLOX set with its boxes lies beside it"
            yield Check(name, None, None, ok=False)
            continue
        yield from _dwpose_case(f"{path.name}: {case}", own, boxes)


def _dwpose_case(name: str, want: Arrays, boxes: NDArray) -> Iterator[Check]:
    height, width = (int(side) for side in want["hw"])
    yield compare(f"{name} n", max(len(boxes), 1), want["n"], _EXACT)
    shares = boxes / [width, height, width, height]
    yield compare(f"{name} boxes_norm", shares, want["boxes_norm"], _SHARE)
    regions = [dwpose.region(box) for box in (boxes if len(boxes) else [whole(height, width)])]
    yield compare(f"{name} center", [r[0] for r in regions], want["center"], _PIXEL)
    yield compare(f"{name} scale", [r[1] for r in regions], want["scale"], _PIXEL)
    x, y = (_simcc(want, axis, bins) for axis, bins in (("x", 576), ("y", 768)))
    read = [dwpose.read_simcc(x[person, None], y[person, None]) for person in range(len(x))]
    points = [dwpose.to_picture(found, *region) for (found, _), region in zip(read, regions)]
    yield compare(f"{name} kp133", points, want["kp133"], _PIXEL)
    yield compare(f"{name} score133", [score for _, score in read], want["score133"], _SCORE)
    ordered = [dwpose.openpose(found, score) for found, (_, score) in zip(points, read)]
    points134, scores134 = (np.stack(values) for values in zip(*ordered))
    yield compare(f"{name} kp134", points134, want["kp134"], _PIXEL)
    yield compare(f"{name} score134", scores134, want["score134"], _SCORE)
    scores = {"face_score": scores134[:, 24:92]}
    scores["hand_score"] = np.concatenate([scores134[:, 92:113], scores134[:, 113:]])
    for key, got in scores.items():
        yield compare(f"{name} {key}", got, want[key], _SCORE)
    found = dwpose.keypoints(points134, scores134, height, width)
    subset = np.where(found.visible, np.arange(24), -1)
    hands = np.concatenate([found.hands[:, 0], found.hands[:, 1]])  # all left, then all right
    yield compare(f"{name} candidate", found.body, want["candidate"], _SHARE)
    yield compare(f"{name} subset", subset, want["subset"], _EXACT)
    for key, got in {"faces": found.faces, "hands": hands}.items():
        yield compare(f"{name} {key}", got, want[key], _SHARE)
        yield compare(f"{name} {key} hidden", got == -1, want[key] == -1, _EXACT)


def _yolo10(path: Path, data: Arrays) -> Iterator[Check]:
    height, width = (int(side) for side in data["hw"])
    net = stretch(vitpose.to_unit(_picture(data, "img")))
    got = net.ravel()[data["input_idx"]]
    yield compare(f"{path.name}: input_val", got, data["input_val"], _STRETCH)
    nobody = np.append(whole(height, width), -1.0)
    for case in map(str, data["cases"]):
        name = f"{path.name}: {case}"
        rows = np.zeros((300, 6), np.float32)
        rows[: len(data[f"{case}_rows"])] = data[f"{case}_rows"]
        objects = yolo10_objects(rows, height, width)
        yield from _objects(f"{name} nms", objects, data[f"{case}_nms"], _EXACT)
        person = yolo10_person(objects)
        box, want = nobody if person is None else person, data[f"{case}_bbox"]
        yield compare(f"{name} bbox", box[:4], want[:4], _EXACT)
        yield compare(f"{name} bbox score", box[4], want[4], _SCORE)
        person = usable(person)
        used = whole(height, width) if person is None else person[:4]
        yield compare(f"{name} used", used, data[f"{case}_used"], _EXACT)


def _vitpose_crop(path: Path, data: Arrays) -> Iterator[Check]:
    regions = [vitpose.region(box) for box in data["geo_box"]]
    edges = [vitpose.corners(*region) for region in regions]
    yield compare(f"{path.name}: geo_center", [r[0] for r in regions], data["geo_center"], _REGION)
    yield compare(f"{path.name}: geo_scale", [r[1] for r in regions], data["geo_scale"], _REGION)
    yield compare(f"{path.name}: geo_ul", [edge[0] for edge in edges], data["geo_ul"], _EXACT)
    yield compare(f"{path.name}: geo_br", [edge[1] for edge in edges], data["geo_br"], _EXACT)
    picture = vitpose.to_unit(_picture(data, "img"))
    edges = [vitpose.corners(*vitpose.region(box)) for box in data["boxes"]]
    got = [(*upper, lower[0] - upper[0], lower[1] - upper[1]) for upper, lower in edges]
    yield compare(f"{path.name}: corner_xywh", got, data["corner_xywh"], _EXACT)
    nets = [vitpose.to_input(vitpose.crop(picture, *edge))[0] for edge in edges]
    yield compare(f"{path.name}: input0", nets[0], data["input0"], _CROP)
    samples = [net.ravel()[data["idx"]] for net in nets]
    yield compare(f"{path.name}: input_val", samples, data["input_val"], _CROP)


def _vitpose_pose(path: Path, data: Arrays) -> Iterator[Check]:
    height, width = (int(side) for side in data["hw"])
    body20: Floats | None = None
    for frame, heat in enumerate(_heat_maps(data)):
        name = f"{path.name}: frame {frame}"
        want = {key: data[key][frame] for key in _VITPOSE_FRAME}
        centre, scale = vitpose.region(data["boxes"][frame])
        yield compare(f"{name} center", centre, want["center"], _REGION)
        yield compare(f"{name} scale", scale, want["scale"], _REGION)
        cells, highest = vitpose.peaks(heat)
        yield compare(f"{name} argmax", cells, want["argmax"], _EXACT)
        cells = vitpose.refine(heat, cells, highest)
        yield compare(f"{name} loc", cells, want["loc"], _CELL)
        points = vitpose.to_picture(cells, highest, centre, scale)
        yield compare(f"{name} kp", points[:, :2], want["kp"][:, :2], _VIT_PIXEL)
        yield compare(f"{name} probability", points[:, 2], want["kp"][:, 2], _SCORE)
        body20 = vitpose.body(points, body20, height, width)
        yield compare(f"{name} body20", body20, want["body20"], _VIT_SHARE)
        found = vitpose.keypoints(body20, points, height, width)
        subset = np.where(found.visible, np.arange(18), -1)
        yield compare(f"{name} subset", subset, want["subset"], _EXACT)
        # The data says where it has right hands before left; here left comes before right.
        order = -1 if np.all(data["swap_hands"]) else 1
        scores = np.stack([points[91:112, 2], points[112:133, 2]])[::order]
        got = {"candidate": found.body, "faces": found.faces, "hands": found.hands[0][::order]}
        got |= {"hand_score": scores, "face_score": points[None, 23:91, 2]}
        for key, value in got.items():
            yield compare(f"{name} {key}", value, want[key], _VIT_SHARE)


_VITPOSE_FRAME = (
    *("center", "scale", "argmax", "loc", "kp", "body20", "candidate", "subset"),
    *("faces", "hands", "hand_score", "face_score"),
)
# The names that a file of each layout must hold; one that begins with "_" ends a case's name.
_LAYOUTS: dict[frozenset[str], Reader] = {
    frozenset({"lb_hw", "lb_new_hw", "lb_r", "cases", "_raw", "_dets"}): _yolox,
    frozenset({"img_hwk", "boxes", "matrix", "crop0", "crop_val", "input_val"}): _dwpose_crop,
    frozenset({"cases", "_det_case", "_simcc_x_win", "_simcc_y_win"}): _dwpose_pose,
    frozenset({"hw", "img_hwk", "input_val", "cases", "_rows", "_nms", "_used"}): _yolo10,
    frozenset({"geo_box", "geo_ul", "geo_br", "img_hwk", "corner_xywh"}): _vitpose_crop,
    frozenset({"hw", "win_start", "win", "bg", "dense_ids", *_VITPOSE_FRAME}): _vitpose_pose,
}


def _reader(names: frozenset[str]) -> Reader | None:
    for needed, reader in _LAYOUTS.items():
        if all(
            any(name.endswith(key) for name in names) if key.startswith("_") else key in names
            for key in needed
        ):
            return reader
    return None


def _keys(data: Arrays, case: str) -> list[str]:
    return [name.removeprefix(f"{case}_") for name in data if name.startswith(f"{case}_")]


def _picture(data: Arrays, image: str) -> NDArray[np.uint8]:
    """Rebuilds a picture, a pattern on a coarse base, by the rules of the data's README."""
    height, width, cell = (int(value) for value in data[f"{image}_hwk"])
    y, x, c = np.ogrid[:height, :width, :3]
    base = data[f"{image}_base"].astype(np.int64)[y // cell, x // cell, c]
    return (base // 2 + (7 * x + 13 * y + 29 * c) % 64).astype(np.uint8)


def _yolox_case(data: Arrays, case: str) -> tuple[NDArray, NDArray, NDArray]:
    """Decoded boxes [8400, 4], objects [k, 6] and persons [n, 4] of one case."""
    raw = np.zeros((1, 8400, 85), np.float32)
    raw[0, data[f"{case}_idx"]] = data[f"{case}_raw"]
    boxes, scores = decode_yolox(raw, letterbox_size(*map(int, data[f"{case}_hw"]))[2])
    objects = yolox_objects(boxes, scores)
    return boxes, objects, yolox_persons(objects)


def _detected(path: Path, want: Arrays) -> NDArray | None:
    """Boxes for a DWPose case from the YOLOX set in the same folder that holds its detections.

    Of several sets with such a case the one whose boxes come nearest is meant.
    """
    case, (height, width) = str(want["det_case"]), want["hw"]
    found: list[tuple[float, NDArray]] = []
    for other in sorted(path.parent.glob("*.npz")):
        held = _neighbour(other)
        if _reader(frozenset(held)) is not _yolox or f"{case}_raw" not in held:
            continue
        if not np.array_equal(held[f"{case}_hw"], want["hw"]):
            continue
        boxes = _yolox_case(held, case)[2]
        shares = boxes / [width, height, width, height]
        same = shares.shape == want["boxes_norm"].shape
        away = float(np.abs(shares - want["boxes_norm"]).max(initial=0.0)) if same else np.inf
        found.append((away, boxes))
    return min(found, key=lambda pair: pair[0])[1] if found else None


def _neighbour(path: Path) -> Arrays:
    """The arrays of another file of the folder; none if it is damaged, which is its own failure."""
    if not path.is_file():
        return {}
    try:
        return read_arrays(path)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):
        return {}


def _simcc(want: Arrays, axis: str, bins: int) -> Floats:
    """Rows [n, 133, bins]: a level each, with a window of 13 bins pasted in."""
    start, window, level = (want[f"simcc_{axis}_{key}"] for key in ("start", "win", "bg"))
    rows = np.repeat(level[..., None].astype(np.float32), bins, axis=-1)
    places = start[..., None] + np.arange(window.shape[-1])
    np.put_along_axis(rows, places, window.astype(np.float32), axis=-1)
    return rows


def _heat_maps(data: Arrays) -> Iterator[Floats]:
    """Maps [133, 64, 48] frame by frame: a level each, with a window pasted in and clipped."""
    size = data["win"].shape[-1]
    for frame, level in enumerate(data["bg"]):
        shape = (len(level), vitpose.MAP_HEIGHT + 2 * size, vitpose.MAP_WIDTH + 2 * size)
        wide = np.empty(shape, np.float32)
        wide[:] = level[:, None, None]
        for heat, window, (y, x) in zip(wide, data["win"][frame], data["win_start"][frame] + size):
            heat[y : y + size, x : x + size] = window
        maps = wide[:, size:-size, size:-size]
        if frame == data["dense_frame"]:
            maps[data["dense_ids"]] = data["dense"]
        yield np.ascontiguousarray(maps)


def _levels(name: str, got: NDArray, want: NDArray, most: float, mean: float) -> Iterator[Check]:
    """Checks the largest and the mean difference of 8-bit values."""
    yield compare(name, got, want, most)
    if got.shape == want.shape:
        away = np.abs(got.astype(np.float64) - want)
        yield at_most(f"{name} mean", float(away.mean()), mean)


def _objects(name: str, got: NDArray, want: NDArray, pixels: float) -> Iterator[Check]:
    """Checks rows of box, score and class, whose order and class must be exact."""
    yield compare(name, got[:, :4], want[:, :4], pixels)
    yield compare(f"{name} score", got[:, 4], want[:, 4], _SCORE)
    yield compare(f"{name} class", got[:, 5], want[:, 5], _EXACT)
