"""Small files with the real interfaces of the motion capture models, for machines without them.

The ONNX networks put fixed numbers at fixed places and add a share of their input's mean, so that
what they say depends on the picture. The NLF stand-in finds the bright part of a picture and
stands a skeleton in it.
"""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from engine.pose.nlf import register_nms


@dataclass(frozen=True)
class Output:
    """Zero but at `places` [k, rank], where it is `values` + `slopes` * mean(input)."""

    name: str
    shape: tuple[int, ...]
    places: np.ndarray
    values: np.ndarray
    slopes: np.ndarray | float = 0.0


def save_network(path, input_name, input_shape, *outputs, external=None):
    """`external`: the name of a file beside it that takes the weights."""
    nodes = [helper.make_node("ReduceMean", [input_name], ["mean"], keepdims=0)]
    weights = []
    for output in outputs:
        name = output.name
        arrays = {
            "shape": np.array(output.shape, np.int64),
            "places": np.asarray(output.places, np.int64),
            "values": np.asarray(output.values, np.float32),
            "slopes": np.broadcast_to(output.slopes, np.shape(output.values)).astype(np.float32),
        }
        weights += [numpy_helper.from_array(a, f"{name}.{key}") for key, a in arrays.items()]
        nodes += [
            helper.make_node("ConstantOfShape", [f"{name}.shape"], [f"{name}.zeros"]),
            helper.make_node("Mul", ["mean", f"{name}.slopes"], [f"{name}.shares"]),
            helper.make_node("Add", [f"{name}.values", f"{name}.shares"], [f"{name}.updates"]),
            helper.make_node(
                "ScatterND", [f"{name}.zeros", f"{name}.places", f"{name}.updates"], [name]
            ),
        ]
    graph = helper.make_graph(
        nodes,
        "standin",
        [helper.make_tensor_value_info(input_name, TensorProto.FLOAT, input_shape)],
        [helper.make_tensor_value_info(o.name, TensorProto.FLOAT, o.shape) for o in outputs],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    onnx.checker.check_model(model)
    if external is None:
        onnx.save(model, path)
    else:
        onnx.save(model, path, save_as_external_data=True, location=external, size_threshold=1024)
    return path


def save_yolox(path, persons=((320.0, 320.0, 200.0, 500.0, 0.9),), slope=0.0):
    """`persons`: centre x, y, width, height in the 640 square, and score.

    `slope`: by how many strides a box moves right for each level of the input's mean.
    """
    places, values, slopes = [], [], []
    for anchor, (x, y, width, height, score) in enumerate(persons):
        row = 40 * 80 + anchor  # stride 8, grid row 40
        raw = [x / 8 - anchor, y / 8 - 40, math.log(width / 8), math.log(height / 8), score, 1.0]
        places += [[0, row, column] for column in range(6)]
        values += raw
        slopes += [slope, 0, 0, 0, 0, 0]
    places = np.array(places).reshape(-1, 3)
    output = Output("output", (1, 8400, 85), places, np.array(values), np.array(slopes))
    return save_network(path, "images", (1, 3, 640, 640), output)


def save_dwpose(path, score=0.8):
    """Point j peaks at bins x = 100 + 2j, y = 200 + 4j; in a bright crop 50 bins further right."""
    points = np.arange(133)
    rows, zeros = np.tile(points, 2), np.zeros(266, int)
    x = np.stack([zeros, rows, np.concatenate([100 + 2 * points, 150 + 2 * points])], axis=1)
    values = np.repeat([score, score], 133)
    slopes = np.repeat([0.0, 0.1], 133)  # the mean of a normalised crop is about -2..2
    y = np.stack([zeros[:133], points, 200 + 4 * points], axis=1)
    return save_network(
        path,
        "input",
        (1, 3, 384, 288),
        Output("simcc_x", (1, 133, 576), x, values, slopes),
        Output("simcc_y", (1, 133, 768), y, np.full(133, score + 0.5)),
    )


def save_yolo10(path, persons=((220.0, 70.0, 420.0, 570.0, 0.9),), slope=0.0):
    """`persons`: x1, y1, x2, y2 in the 640 square, and score. `slope`: pixels for a mean of 1."""
    rows = np.array([(*person, 0.0) for person in persons], np.float32).reshape(-1, 6)
    places = [[0, row, column] for row in range(len(rows)) for column in range(6)]
    slopes = np.tile([slope, 0, slope, 0, 0, 0], len(rows))
    output = Output("output0", (1, 300, 6), np.reshape(places, (-1, 3)), rows.ravel(), slopes)
    return save_network(path, "images", (1, 3, 640, 640), output)


def vitpose_cells():
    """The map cells (x, y) [133, 2] of the ViTPose stand-in's peaks."""
    point = np.arange(133)
    return np.stack([6 + point % 36, 6 + point % 52], axis=1)


def save_vitpose(path, score=0.8, slope=0.0, external=None):
    """A Gaussian hill of sigma 2 cells, 5 cells wide to each side, for every point."""
    y, x = (axis.ravel() for axis in np.mgrid[-5:6, -5:6])
    hill = score * np.exp(-(x**2 + y**2) / 8)
    cells = vitpose_cells()
    places = np.stack(
        [
            np.zeros(133 * 121, int),
            np.repeat(np.arange(133), 121),
            (cells[:, 1, None] + y).ravel(),
            (cells[:, 0, None] + x).ravel(),
        ],
        axis=1,
    )
    output = Output(
        "output_0", (1, 133, 64, 48), places, np.tile(hill, 133), slope * np.tile(hill, 133)
    )
    return save_network(path, "input_0", (1, 3, 256, 192), output, external=external)


def save_detectors(models: Path):
    """Both pairs of 2D networks, in the folders and under the names of a real volume."""
    for folder in ("DWPose", "detection"):
        (models / folder).mkdir(parents=True, exist_ok=True)
    save_yolox(models / "DWPose" / "yolox_l.onnx", slope=0.01)
    save_dwpose(models / "DWPose" / "dw-ll_ucoco_384.onnx")
    save_yolo10(models / "detection" / "yolov10m.onnx", slope=20.0)
    save_vitpose(
        models / "detection" / "vitpose_h_wholebody_model.onnx",
        external="vitpose_h_wholebody_data.bin",
    )


class NlfStandIn(torch.nn.Module):
    """`detect_smpl_batched` as of NLF 0.3.2: the bright part of a picture is the person."""

    skeleton: torch.Tensor  # [24, 3] mm

    def __init__(self):
        super().__init__()
        self.register_buffer("skeleton", torch.tensor(_SKELETON_MM))

    @torch.jit.export
    def detect_smpl_batched(self, images: torch.Tensor) -> dict[str, list[torch.Tensor]]:
        joints: list[torch.Tensor] = []
        boxes: list[torch.Tensor] = []
        focal = 0.960491 * float(max(images.shape[2], images.shape[3]))
        for image in images:
            bright = image.float().mean(0) > 128.0
            place = torch.nonzero(bright)
            found = torch.zeros([0, 4])
            if place.shape[0] > 0:
                low = place.amin(0).flip(0).float()
                high = place.amax(0).flip(0).float() + 1.0
                box = torch.cat([low, high])
                found = torch.stack([box, box + 1.0, box])  # what a detector sees twice
            scores = torch.tensor([0.9, 0.8, 0.9])[: found.shape[0]]
            found = found[torch.ops.torchvision.nms(found, scores, 0.7)]
            size = found[:, 2:] - found[:, :2]
            depth = focal * 1700.0 / torch.clamp(size[:, 1], min=1.0)
            middle = (found[:, :2] + found[:, 2:]) / 2.0
            centre = torch.tensor([(image.shape[2] - 1) / 2.0, (image.shape[1] - 1) / 2.0])
            root = torch.cat([(middle - centre) * depth[:, None] / focal, depth[:, None]], dim=1)
            joints.append(self.skeleton[None] + root[:, None])
            boxes.append(torch.cat([found[:, :2], size, torch.full_like(size[:, :1], 0.9)], dim=1))
        return {"joints3d_nonparam": joints, "boxes": boxes, "trans": joints}


def save_script(path, module, pin=True):
    """A scripted module; with `pin`, its hash lies beside it as an operator would write it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    register_nms()
    torch.jit.script(module).save(str(path))
    if pin:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        path.with_name(path.name + ".sha256").write_text(f"{digest}  {path.name}\n")
    return path


def save_nlf(models: Path, pin=True):
    return save_script(models / "nlf" / "nlf_l_multi_0.3.2.torchscript", NlfStandIn(), pin)


def driving_frames(video: Path, count: int) -> list[np.ndarray]:
    """The first frames of a video, [H, W, 3] u8, thinned to a quarter of the size."""
    reader = imageio_ffmpeg.read_frames(str(video))
    width, height = next(reader)["source_size"]
    frames = [
        np.frombuffer(next(reader), np.uint8).reshape(height, width, 3)[::4, ::4]
        for _ in range(count)
    ]
    reader.close()
    return frames


# A standing person around its middle: millimetres, x right, y down; the person's left is at +x.
_SKELETON_MM = [
    *[[0.0, -60.0, 0.0], [90.0, 20.0, 0.0], [-90.0, 20.0, 0.0], [0.0, -160.0, 0.0]],
    *[[100.0, 400.0, 0.0], [-100.0, 400.0, 0.0], [0.0, -280.0, 0.0], [100.0, 780.0, 20.0]],
    *[[-100.0, 780.0, 20.0], [0.0, -340.0, 0.0], [110.0, 840.0, -100.0], [-110.0, 840.0, -100.0]],
    *[[0.0, -540.0, 0.0], [70.0, -480.0, 0.0], [-70.0, -480.0, 0.0], [0.0, -640.0, -20.0]],
    *[[170.0, -480.0, 0.0], [-170.0, -480.0, 0.0], [250.0, -240.0, 0.0], [-250.0, -240.0, 0.0]],
    *[[280.0, 0.0, -20.0], [-280.0, 0.0, -20.0], [285.0, 80.0, -30.0], [-285.0, 80.0, -30.0]],
]
