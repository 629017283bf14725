"""Reads all that `engine.masks.saved` writes: the engine itself asks for labels and a hash."""

import json

import numpy as np
import torch

from engine.flow import Warned
from engine.masks.made import MadeMasks


def load_made(path):
    with np.load(path, allow_pickle=False) as held:
        shown = torch.from_numpy(held["reference"])[0] if "reference" in held else None
        return MadeMasks(
            labels=torch.from_numpy(held["masks"]),
            reference=shown,
            boxes=torch.from_numpy(held["boxes"]),
            scores=torch.from_numpy(held["scores"]),
            fps=float(held["fps"]),
            source_sha256=str(held["source_sha256"]),
            order=tuple(held["order"].tolist()),
            model=str(held["model"]),
            image_sha256=str(held["image_sha256"]),
            warned=tuple(Warned(*one) for one in json.loads(str(held["warned"]))),
            version=int(held["version"]),
        )
