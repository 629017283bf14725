"""Encodes scenes once, as the transformer sees them: videos by the VAE, masks as 28 channels."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.nano.latents import to_network
from benchmarks.nano_scail2.scenes import MODES, Frames, Scene, driving_mask, picture_mask, read
from engine.media.framing import image_to_network, skeleton_to_network
from engine.models.vae import Vae
from engine.models.vision import VisionEncoder
from kernels.whole_file import whole_file

CELL = 8  # pixels of a mask that one number stands for, in rows and in columns
ON = 225  # a colour's channel is on above it
GROUP = 4  # frames in a latent
# (red, green, blue) of the classes, in their order (docs/reference/scail2.md 4.1)
CLASSES = ((1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1))


@dataclass(frozen=True, slots=True)
class Encoded:
    """One scene in both modes. Latents are kept in half precision, masks in 64ths."""

    driving: Tensor  # [16, t, h/2, w/2]
    animation: Tensor  # [16, t, h, w] latent of the target
    replacement: Tensor  # [16, t, h, w]
    reference: Tensor  # [16, 1, h, w]
    vision: Tensor  # [257, clip_dim]
    animation_driving_mask: Tensor  # [28, t, h/2, w/2] u8
    replacement_driving_mask: Tensor
    animation_reference_mask: Tensor  # [28, 1, h, w] u8
    replacement_reference_mask: Tensor


@torch.no_grad()
def encode(scene: Scene, vae: Vae, vision: VisionEncoder) -> Encoded:
    picture = image_to_network(torch.from_numpy(scene.picture.frames[0]))
    driving = skeleton_to_network(torch.from_numpy(scene.driving.frames))
    targets = {
        mode: vae.encode([to_network(torch.from_numpy(scene.targets[mode].frames))]).half()
        for mode in MODES
    }
    masks = {
        f"{mode}_{name}_mask": (64 * made).byte()
        for mode in MODES
        for name, made in (
            ("driving", mask_channels(driving_mask(scene, mode), half=True)),
            ("reference", mask_channels(picture_mask(scene, mode), half=False)),
        )
    }
    return Encoded(
        driving=vae.encode([driving]).half(),
        reference=vae.encode([picture[:, None]]).half(),
        vision=vision(picture).half(),
        **targets,
        **masks,
    )


def mask_channels(colours: Frames, half: bool) -> Tensor:
    """Colours [4k + 1, H, W, 3] u8 -> [28, k + 1, H/8, W/8], or of half that size.

    Sides are multiples of 8, or of 16. Source: docs/reference/scail2.md 4.2.
    """
    sums = torch.from_numpy(colours.astype(np.int32))  # of one pixel, or of four
    if half:
        t, h, w, _ = sums.shape
        sums = sums.view(t, h // 2, 2, w // 2, 2, 3).sum((2, 4))
    on = sums > (4 * ON if half else ON)  # [T, H, W, 3]
    classes = torch.stack([(on == torch.tensor(row).bool()).all(-1) for row in CLASSES], dim=1)
    cells = F.avg_pool2d(classes.float(), CELL)  # [T, 7, h, w]
    grouped = torch.cat([cells[:1].expand(GROUP - 1, -1, -1, -1), cells])
    return grouped.unflatten(0, (-1, GROUP)).flatten(1, 2).transpose(0, 1).contiguous()


def write(encoded: Encoded, path: Path) -> None:
    with whole_file(path) as draft:
        save_file({name: getattr(encoded, name).contiguous() for name in Encoded.__slots__}, draft)


def load(path: Path) -> Encoded:
    return Encoded(**load_file(path))


def encode_scenes(scenes: Iterable[Path], latents: Path, vae: Vae, vision: VisionEncoder) -> None:
    """Writes the latents of every scene that has none yet."""
    latents.mkdir(parents=True, exist_ok=True)
    for path in scenes:
        target = latents / f"{path.stem}.safetensors"
        if not target.exists():
            write(encode(read(path), vae, vision), target)
