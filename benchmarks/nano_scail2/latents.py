"""Encodes scenes once, as the transformer sees them: videos by the VAE, masks as 28 channels."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.nano.latents import to_network
from benchmarks.nano_scail2.scenes import MODES, Frames, Scene, driving_mask, picture_mask, read
from engine.masks.colours import driving_channels, reference_channels
from engine.media.framing import image_to_network, skeleton_to_network
from engine.models.vae import Vae
from engine.models.vision import VisionEncoder
from kernels.whole_file import whole_file

SHARES = 64  # a share of a mask's cell, of 8 x 8 pixels, is kept as so many times itself


@dataclass(frozen=True, slots=True)
class Encoded:
    """One scene in both modes. Latents are kept in half precision, masks as `SHARES`."""

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
    picture = _picture(scene.picture.frames)
    driving = skeleton_to_network(torch.from_numpy(scene.driving.frames))
    targets = {
        mode: vae.encode([to_network(torch.from_numpy(scene.targets[mode].frames))]).half()
        for mode in MODES
    }
    masks = {
        f"{mode}_{name}_mask": (SHARES * made).byte()
        for mode in MODES
        for name, made in (
            ("driving", driving_channels(torch.from_numpy(driving_mask(scene, mode)))),
            ("reference", reference_channels(_picture(picture_mask(scene, mode)))),
        )
    }
    return Encoded(
        driving=vae.encode([driving]).half(),
        reference=vae.encode([picture[:, None]]).half(),
        vision=vision(picture).half(),
        **targets,
        **masks,
    )


def _picture(frames: Frames) -> Tensor:
    """The only frame of a clip as pictures come to the network: [3, H, W]."""
    return image_to_network(torch.from_numpy(frames[0]))


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
