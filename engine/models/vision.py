"""CLIP image encoder: a picture -> one class token and a grid of patch tokens.

The transformer is given the input of the tower's last block, without any norm behind it
(docs/reference/encoders.md 3), so that block is never built.
"""

import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.errors import BadCheckpoint, BadMedia
from engine.models.clip import Tower, TowerShape
from engine.models.fill import Stored, depth, dims, fill
from engine.models.tensorfile import TensorFile

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
HEAD_SIZE = 80  # K
BLOCKS = {1280: 32}  # by width: a file of ViT-H cut between two blocks must not pass as whole

# transformers -> official (docs/reference/encoders.md 3.3)
OFFICIAL_NAMES = {
    "embeddings.class_embedding": "cls_embedding",
    "embeddings.position_embedding.weight": "pos_embedding",
    "embeddings.patch_embedding.weight": "patch_embedding.weight",
    "pre_layrnorm": "pre_norm",
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "self_attn.out_proj": "attn.proj",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.2",
}
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")  # one tensor in official files
# tensors that a file may hold and the tower has no use for: the text tower, what follows the last
# block, and a buffer that old versions of transformers wrote
UNUSED = r"vision_model\.(post_layernorm\.|embeddings\.position_ids$)|visual_projection\.weight$"
UNUSED_OFFICIAL = r"textual\.|log_scale$|visual\.(head$|post_norm\.)"


def preprocess(image: Tensor, size: int = 224) -> Tensor:
    """Picture [3, H, W] in about -1..1 -> normalised pixels [3, size, size] fp32.

    Bicubic without antialias, neither cropped nor clamped, as in training
    (docs/reference/encoders.md 3.2).
    """
    if image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point():
        raise BadMedia(
            f"The picture is {tuple(image.shape)} {image.dtype}, expected [3, H, W] in -1..1."
        )
    pixels = F.interpolate(image.float()[None], (size, size), mode="bicubic", align_corners=False)
    mean, std = (image.new_tensor(each, dtype=torch.float32)[:, None, None] for each in (MEAN, STD))
    return (pixels[0] * 0.5 + 0.5 - mean) / std


class VisionEncoder:
    """The CLIP image tower on `device`, computing in `dtype`.

    Reads the official file, whole or visual part alone, and the transformers layout of
    clip_vision_h.safetensors, in 16 or 32 bits. `heads` cannot be told from the shapes; by default
    a head has 80 channels. Raises `MissingModel` or `BadCheckpoint`.
    """

    def __init__(
        self, path: Path, device: torch.device, dtype: torch.dtype, heads: int | None = None
    ) -> None:
        file = TensorFile(path)
        official = _is_official(file)
        shape = _shape(file, official, heads)
        with torch.device("meta"):
            self._tower = Tower(shape).eval()
        stored = {target: _stored(target, official) for target in self._tower.state_dict()}
        last = rf"{_blocks(official)}{shape.blocks}\."
        unused = re.compile(f"{last}|{UNUSED_OFFICIAL if official else UNUSED}")
        fill(self._tower, file, stored, unused, device, dtype)
        self._device, self._dtype, self._size = device, dtype, shape.pixels

    @property
    def nbytes(self) -> int:
        """Bytes of its weights."""
        return sum(weight.nbytes for weight in self._tower.parameters())

    def move(self, device: torch.device) -> None:
        self._device = device
        self._tower.to(device)

    @torch.inference_mode()
    def __call__(self, image: Tensor) -> Tensor:
        """Picture [3, H, W] in about -1..1 -> tokens [1 + n, C] fp32, the class token first."""
        pixels = preprocess(image.to(self._device), self._size).to(self._dtype)
        return self._tower(pixels).float()


def _is_official(file: TensorFile) -> bool:
    official, other = "visual.patch_embedding.weight", _stored("embeddings.class_embedding", False)
    if official in file:
        return True
    if other.name in file:
        return False
    raise BadCheckpoint(
        f"{file.path.name} is not a CLIP image encoder: it has neither {official} nor {other.name}."
    )


def _shape(file: TensorFile, official: bool, heads: int | None) -> TowerShape:
    """The sizes of all blocks but the last, read from the shapes of the tensors."""
    blocks = depth(file, re.compile(rf"{_blocks(official)}(?P<n>\d+)\."))
    name = _stored("embeddings.patch_embedding.weight", official).name
    width, _, patch, _ = dims(file, name, 4)
    if blocks < 2 or blocks != BLOCKS.get(width, blocks):
        expected = BLOCKS.get(width, "at least 2")
        raise BadCheckpoint(f"{file.path.name} has {blocks} blocks, expected {expected}.")
    heads = heads or width // HEAD_SIZE
    if heads == 0 or width % heads:
        raise BadCheckpoint(f"{file.path.name}: width {width} does not divide into {heads} heads.")
    fc1 = _stored("encoder.layers.0.mlp.fc1.weight", official).name
    hidden, _ = dims(file, fc1, 2)
    return TowerShape(width, heads, hidden, blocks - 1, patch, _grid_side(file, official))


def _blocks(official: bool) -> str:
    """What the names of the blocks' tensors begin with, as a pattern."""
    return r"visual\.transformer\." if official else r"vision_model\.encoder\.layers\."


def _grid_side(file: TensorFile, official: bool) -> int:
    """Patches a side, counted in the position table, which has one more row for the class token."""
    name = _stored("embeddings.position_embedding.weight", official).name
    *_, tokens, _ = dims(file, name, 3 if official else 2)
    side = math.isqrt(tokens - 1)
    if side == 0 or side * side != tokens - 1:
        raise BadCheckpoint(
            f"{file.path.name}: {name} has {tokens} rows, expected a square number and one more."
        )
    return side


def _stored(target: str, official: bool) -> Stored:
    """The place in the file of a parameter of the tower."""
    if not official:
        return Stored(f"vision_model.{target}")
    if target in OFFICIAL_NAMES:
        return Stored(f"visual.{OFFICIAL_NAMES[target]}")
    layer, _, kind = target.rpartition(".")
    if not layer.startswith("encoder.layers."):
        return Stored(f"visual.{OFFICIAL_NAMES[layer]}.{kind}")
    block, _, inner = layer.removeprefix("encoder.layers.").partition(".")
    if inner in QKV:
        return Stored(f"visual.transformer.{block}.attn.to_qkv.{kind}", QKV.index(inner), len(QKV))
    return Stored(f"visual.transformer.{block}.{OFFICIAL_NAMES[inner]}.{kind}")
