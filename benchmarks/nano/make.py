"""Makes the nano model: scenes, the VAE, latents, the transformer, and the files the engine loads.

python -m benchmarks.nano.make FOLDER            seeded; each part goes on where it was stopped

The files are FP16 under official names, in FOLDER/models.
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.nano import scenes
from benchmarks.nano.latents import encode_scenes, to_network
from benchmarks.nano.start import normalise
from benchmarks.nano.train import train_transformer
from benchmarks.nano.train_vae import WIDTH, train_vae
from engine.config import NANO, state_dir
from engine.demo.weights import demo_weights
from engine.models.dit import Scail
from engine.models.vae import Vae

SAMPLES = 64  # scenes from which the spread of latents is measured
FOLDERS = ("text_encoders", "clip_vision")  # random weights, as the tiny preset writes them
TRANSFORMER = Path("diffusion_models", "scail_nano_fp16.safetensors")
AUTOENCODER = Path("vae", "wan_2.1_vae.safetensors")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--scenes", type=int, default=1400, metavar="N")
    parser.add_argument("--vae-minutes", type=float, default=16.0, metavar="N")
    parser.add_argument("--minutes", type=float, default=56.0, metavar="N", help="transformer")
    args = parser.parse_args(argv)
    folder, drawn, models = args.folder, args.folder / "scenes", args.folder / "models"
    drawn.mkdir(parents=True, exist_ok=True)
    for number in tqdm(range(args.scenes), "scenes", disable=None):
        scenes.write(number, drawn)
    train_vae(drawn, folder, args.vae_minutes)
    export_vae(folder, drawn, models)
    encode_scenes(drawn, folder / "latents", models)
    train_transformer(folder / "latents", folder, models, args.minutes)
    model = Scail(NANO)
    model.load_state_dict(trained(folder / "scail.pt", "average"))
    save(model, models / TRANSFORMER)


def export_vae(folder: Path, drawn: Path, models: Path) -> None:
    """Writes the VAE, its latents now of mean 0 and spread 1, and encoders of random weights."""
    vae = Vae(WIDTH)
    vae.load_state_dict(trained(folder / "vae.pt", "model"))
    clips = [scenes.read(path).frames for path in sorted(drawn.glob("*[0-9].npz"))[:SAMPLES]]
    normalise(vae, torch.stack([to_network(torch.from_numpy(clip)) for clip in clips]))
    tiny = demo_weights(state_dir()).models
    for name in FOLDERS:
        shutil.copytree(tiny / name, models / name, dirs_exist_ok=True)
    save(vae, models / AUTOENCODER)


def trained(path: Path, part: str) -> dict[str, Tensor]:
    return torch.load(path, weights_only=True)[part]


def save(model: nn.Module, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.half().contiguous() for name, weight in model.state_dict().items()}
    save_file(weights, path)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
