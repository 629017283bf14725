"""A scene of the project's dancers with exact masks, and networks that know them.

The stand-in for SAM 2 has Sam2VideoModel's call and answers from the drawn masks; on demand it
shifts them, takes one person for another, or sees nothing.
"""

from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.nano.dance import dance
from benchmarks.nano.drawing import Room, draw_person, draw_room, random_look
from engine.masks.segmenter import Segmenter

HEIGHT, WIDTH, FPS = 96, 192, 12.0
POSES, PERSONS = 3, 8
SIDE, GRID = 128, (HEIGHT, WIDTH)


@cache
def dancers():
    """Painted persons [POSES, h, w, 4] around their middles, each in clothes of their own."""
    rng = np.random.default_rng(5)
    painted = []
    for person in range(PERSONS):
        look = random_look(rng, person / PERSONS)
        joints = dance(2 * POSES, FPS, person)[::2, 0].astype(np.float64)
        joints[..., 0] -= joints[:, :1, 0]
        painted.append(np.stack([draw_person(pose, HEIGHT, WIDTH, look) for pose in joints]))
    return painted


@cache
def room(kind):
    walls = ((235, 225, 205), (20, 30, 60))
    shades = Room(wall=walls[kind], disc=walls[kind], floor=walls[1 - kind])
    return draw_room([], HEIGHT, WIDTH, shades)


@dataclass
class DrawnScene:
    frames: np.ndarray  # [T, H, W, 3] u8
    owners: np.ndarray  # [T, H, W]: 0 nobody, else the person from 1
    boxes: list  # of each frame [n, 5], in an order of its own
    blind: set = field(default_factory=set)  # frames in which the detector sees nobody

    def __post_init__(self):
        self.numbers = {frame.tobytes(): t for t, frame in enumerate(self.frames)}
        self.asked = 0

    def finder(self, frame):
        self.asked += 1
        number = self.numbers[np.ascontiguousarray(frame).tobytes()]
        return np.empty((0, 5)) if number in self.blind else self.boxes[number]


def draw(count, *paths, rooms=lambda t: 0, seed=0):
    """`paths`: x of each person's middle in frame t, or None; later ones stand in front."""
    rng = np.random.default_rng(seed)
    frames, owners, boxes = [], [], []
    for t in range(count):
        canvas, owner, found = room(rooms(t)).copy(), np.zeros((HEIGHT, WIDTH), np.uint8), []
        for person, path in enumerate(paths):
            if (x := path(t)) is None:
                continue
            layer = shifted(dancers()[person][t // 2 % POSES], round(x - WIDTH / 2))
            canvas = canvas * (1 - layer[..., 3:]) + layer[..., :3]
            owner[layer[..., 3] > 0.5] = person + 1
            rows, columns = np.nonzero(layer[..., 3] > 0.5)
            found.append((person, [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]))
        rows = [[*box, 0.9] for person, box in found if (owner == person + 1).any()]
        frames.append(np.rint(canvas.clip(0, 255)).astype(np.uint8))
        frames[-1][0, 0] = t % 256, t // 256, seed  # no two frames are alike
        owners.append(owner)
        boxes.append(rng.permutation(np.array(rows, np.float64).reshape(-1, 5)))
    return DrawnScene(np.stack(frames), np.stack(owners), boxes)


def shifted(layer, x):
    """[h, w, ..] moved x pixels to the right, empty where nothing comes from."""
    moved = np.zeros_like(layer)
    if x >= 0:
        moved[:, x:] = layer[:, : layer.shape[1] - x]
    else:
        moved[:, :x] = layer[:, -x:]
    return moved


class DrawnSession:
    """Holds what the engine puts into a session, under the names that SAM 2 has for it."""

    def __init__(self):
        self.processed_frames = None
        self.obj_with_new_inputs = []
        self.points, self.masks = {}, {}
        self.output_dict_per_obj = {}
        self.frames_tracked_per_obj = {}
        self.cache = object()
        self.whom = None  # the drawn person who is followed

    def obj_id_to_idx(self, person):
        self.output_dict_per_obj.setdefault(
            person, {"cond_frame_outputs": {}, "non_cond_frame_outputs": {}}
        )
        self.frames_tracked_per_obj.setdefault(person, {})
        return person

    def add_point_inputs(self, person, frame, inputs):
        self.points[frame] = inputs

    def remove_point_inputs(self, person, frame):
        self.points.pop(frame, None)

    def add_mask_inputs(self, person, frame, mask):
        self.masks[frame] = mask

    def remove_mask_inputs(self, person, frame):
        self.masks.pop(frame, None)


@dataclass
class Answer:
    pred_masks: torch.Tensor
    object_score_logits: torch.Tensor


class DrawnModel:
    """SAM 2's call.

    `takes`: (person, frame, frame in which they were shown) -> who is taken for them; None: nobody.
    """

    def __init__(self, scene, takes=None, shift=0):
        self.scene, self.takes, self.shift = (
            scene,
            takes or (lambda person, frame, told: person),
            shift,
        )
        self.calls = []

    def __call__(self, session, *, frame, frame_idx, reverse):
        assert frame.shape == (3, SIDE, SIDE)
        session.processed_frames = {frame_idx: frame}
        self.calls.append((frame_idx, reverse))
        is_told = bool(session.obj_with_new_inputs)
        if is_told:
            session.obj_with_new_inputs = []
            session.whom, session.told = self.told(session, frame_idx), frame_idx
        assert session.whom is not None, "nobody was shown"
        kind = "cond_frame_outputs" if is_told else "non_cond_frame_outputs"
        session.output_dict_per_obj[0][kind][frame_idx] = {}
        whom = session.whom if is_told else self.takes(session.whom, frame_idx, session.told)
        mask = self.scene.owners[frame_idx] == (-1 if whom is None else whom)
        if not is_told:
            mask = shifted(mask, self.shift)
        shares = F.interpolate(torch.from_numpy(mask).float()[None, None], GRID, mode="area")
        score = torch.full((1, 1), 8.0 if mask.any() else -8.0)
        return Answer((shares - 0.5) * 20, score)

    def told(self, session, frame):
        owner = self.scene.owners[frame]
        if frame in session.masks:
            shape = F.interpolate(session.masks[frame], owner.shape)[0, 0].numpy() > 0
            shares = {one: (shape & (owner == one)).sum() for one in np.unique(owner) if one}
            return max(shares, key=shares.get)
        inputs = session.points[frame]
        scale = np.array([WIDTH / SIDE, HEIGHT / SIDE])
        points, labels = inputs["point_coords"][0, 0].numpy() * scale, inputs["point_labels"][0, 0]
        if labels[0] != 2:
            x, y = points[0].astype(int)
            return int(owner[y, x]) or None
        told = {}
        for one in np.unique(owner[owner > 0]):
            rows, columns = np.nonzero(owner == one)
            box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            told[int(one)] = -np.abs(points.ravel() - box).sum()
        return max(told, key=told.get)


def segmenter(scene, takes=None, shift=0, kept=3):
    model = DrawnModel(scene, takes, shift)
    return Segmenter(
        "drawn", model, lambda height, width: DrawnSession(), SIDE, kept, torch.device("cpu"),
        torch.float32,
    )  # fmt: skip
