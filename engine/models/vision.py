"""CLIP image encoder: a picture -> one class token and a grid of patch tokens.

The transformer is given the input of the tower's last block, without any norm behind it
(docs/reference/encoders.md 3), so that block is never built.
"""

import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.errors import BadCheckpoint, BadMedia
from engine.models.fill import Stored, depth, dims, fill
from engine.models.tensorfile import TensorFile

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
EPS = 1e-5
HEAD_SIZE = 80  # K
BLOCKS = {1280: 32}  # by width: a file of ViT-H cut between two blocks must not pass as whole

# transformers -> official (docs/reference/encoders.md 3.3)
OFFICIAL_NAMES = {
    "embeddings.class_embedding": "cls_embedding",
    "embeddings.position_embedding.weight": "pos_embedding",
    "embeddings.patch_embedding.weight": "patch_embedding.weight",
    "pre_layrnorm": "pre_norm",
    "post_layernorm": "post_norm",
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "self_attn.out_proj": "attn.proj",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.2",
}
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")  # one tensor in official files


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
        self._device, self._dtype = device, dtype
        self._tower, self._size = _tower(file, _is_official(file), heads, device, dtype)

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
        return self._tower(pixels[None]).last_hidden_state[0].float()


def _is_official(file: TensorFile) -> bool:
    official, other = "visual.patch_embedding.weight", _stored("embeddings.class_embedding", False)
    if official in file:
        return True
    if other.name in file:
        return False
    raise BadCheckpoint(
        f"{file.path.name} is not a CLIP image encoder: it has neither {official} nor {other.name}."
    )


def _tower(
    file: TensorFile,
    official: bool,
    heads: int | None,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[nn.Module, int]:
    """All blocks but the last with their weights, and the side of the picture in pixels."""
    from transformers import CLIPVisionConfig, CLIPVisionModel  # seconds to import: only when used

    last = r"visual\.transformer" if official else r"vision_model\.encoder\.layers"
    blocks = depth(file, re.compile(rf"{last}\.(?P<n>\d+)\."))
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
    side = _grid_side(file, official)
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=blocks - 1,
        num_attention_heads=heads,
        image_size=side * patch,
        patch_size=patch,
        hidden_act="gelu",  # exact; the library's default, quick_gelu, is another model's
        layer_norm_eps=EPS,
    )
    with torch.device("meta"):
        tower = CLIPVisionModel(config).eval()
    tower.set_attn_implementation("sdpa")  # equal to the official tower to the bit
    stored = {target: _stored(target, official) for target in tower.state_dict()}
    unused = r"textual\.|log_scale$|visual\.head$" if official else r"visual_projection\.weight$"
    buffer = r"vision_model\.embeddings\.position_ids$"  # written by old versions of the library
    ignored = re.compile(rf"{last}\.{blocks - 1}\.|{unused}|{buffer}")
    fill(tower, file, stored, ignored, device, dtype)
    # not a weight: built on the meta device and not loaded
    positions = torch.arange(side * side + 1, device=device)[None]
    tower.embeddings.position_ids = nn.Buffer(positions, persistent=False)
    return tower, side * patch


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
