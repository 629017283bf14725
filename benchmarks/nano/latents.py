"""Encodes scenes once, by the trained VAE and the image encoder, as the transformer sees them."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from benchmarks.nano.scenes import Scene, read
from engine.media.framing import skeleton_to_network
from engine.models.locate import IMAGE_ENCODER, VAE, find_model
from engine.models.vae import Vae, load_vae
from engine.models.vision import VisionEncoder
from kernels.whole_file import whole_file


@dataclass(frozen=True, slots=True)
class Encoded:
    """One scene, kept in half precision."""

    clip: Tensor  # [16, t, h, w]
    pose: Tensor  # [16, t, h/2, w/2]
    reference: Tensor  # [16, 1, h, w]
    vision: Tensor  # [257, clip_dim]


def encode(scene: Scene, vae: Vae, vision: VisionEncoder) -> Encoded:
    picture = to_network(torch.from_numpy(scene.picture)[None])[:, 0]
    frames = to_network(torch.from_numpy(scene.frames))
    skeleton = skeleton_to_network(torch.from_numpy(scene.skeleton))
    return Encoded(
        clip=vae.encode([frames]).half(),
        pose=vae.encode([skeleton]).half(),
        reference=vae.encode([picture[:, None]]).half(),
        vision=vision(picture).half(),
    )


def to_network(frames: Tensor) -> Tensor:
    """[T, H, W, 3] u8 -> [3, T, H, W] in -1..1."""
    return (frames.permute(3, 0, 1, 2).float() - 127.5) / 127.5


def write(encoded: Encoded, path: Path) -> None:
    with whole_file(path) as draft:
        save_file({name: getattr(encoded, name).contiguous() for name in Encoded.__slots__}, draft)


def load(path: Path) -> Encoded:
    return Encoded(**load_file(path))


def encode_scenes(scenes: Path, latents: Path, models: Path) -> None:
    """Writes the latents of every scene that has none yet."""
    latents.mkdir(parents=True, exist_ok=True)
    device = torch.device("cpu")
    vae = load_vae(find_model(models, VAE), device, torch.float32)
    vision = VisionEncoder(find_model(models, IMAGE_ENCODER), device, torch.float32)
    for path in tqdm(sorted(scenes.glob("*[0-9].npz")), "latents", disable=None):
        target = latents / f"{path.stem}.safetensors"
        if not target.exists():
            write(encode(read(path), vae, vision), target)
