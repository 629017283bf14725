"""Makes the nano SCAIL-2: scenes, the VAE, latents, the transformer, and the files engines load.

python -m benchmarks.nano_scail2.make FOLDER     seeded; each part goes on where it was stopped

It begins as the nano Preview that is shipped. The files are FP16 under official names, in
FOLDER/models.
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.nano.latents import to_network
from benchmarks.nano.make import AUTOENCODER, FOLDERS, SAMPLES, save, trained
from benchmarks.nano.start import normalise
from benchmarks.nano.train_vae import WIDTH
from benchmarks.nano_scail2 import scenes
from benchmarks.nano_scail2.latents import encode_scenes
from benchmarks.nano_scail2.train import train_transformer
from benchmarks.nano_scail2.train_vae import train_vae
from engine.config import NANO_SCAIL2
from engine.demo.presets import NANO_HOME
from engine.models.dit import Scail
from engine.models.locate import IMAGE_ENCODER, VAE, find_model
from engine.models.vae import Vae, load_vae
from engine.models.vision import VisionEncoder

TRANSFORMER = Path("diffusion_models", "scail2_nano_fp16.safetensors")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--scenes", type=int, default=800, metavar="N")
    parser.add_argument("--vae-minutes", type=float, default=16.0, metavar="N")
    parser.add_argument("--minutes", type=float, default=80.0, metavar="N", help="transformer")
    args = parser.parse_args(argv)
    folder, drawn, models = args.folder, args.folder / "scenes", args.folder / "models"
    drawn.mkdir(parents=True, exist_ok=True)
    for number in tqdm(range(args.scenes), "scenes", disable=None):
        scenes.write(number, drawn)
    train_vae(drawn, folder, args.vae_minutes)
    export_vae(folder, drawn, models)
    encode_all(drawn, folder / "latents", models)
    train_transformer(folder / "latents", folder, models, args.minutes)
    export_transformer(folder, models)


def export_vae(folder: Path, drawn: Path, models: Path) -> None:
    """Writes the VAE, its latents of mean 0 and spread 1, and the encoders of the nano Preview."""
    vae = Vae(WIDTH)
    vae.load_state_dict(trained(folder / "vae.pt", "model"))
    paths = sorted(drawn.glob("*[0-9].npz"))[:SAMPLES]
    clips = [to_network(torch.from_numpy(scenes.read(path).driving.frames)) for path in paths]
    normalise(vae, torch.stack(clips))
    for name in FOLDERS:
        shutil.copytree(NANO_HOME / name, models / name, dirs_exist_ok=True)
    save(vae, models / AUTOENCODER)


def encode_all(drawn: Path, latents: Path, models: Path) -> None:
    """Writes the latents of all scenes that have none yet."""
    device = torch.device("cpu")
    vae = load_vae(find_model(models, VAE), device, torch.float32)
    vision = VisionEncoder(find_model(models, IMAGE_ENCODER), device, torch.float32)
    paths = sorted(drawn.glob("*[0-9].npz"))
    encode_scenes(tqdm(paths, "latents", disable=None), latents, vae, vision)


def export_transformer(folder: Path, models: Path) -> None:
    model = Scail(NANO_SCAIL2)
    model.load_state_dict(trained(folder / "scail2.pt", "average"))
    save(model, models / TRANSFORMER)


if __name__ == "__main__":
    main()
