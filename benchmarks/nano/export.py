"""Writes what was trained as the files that the engine loads: FP16, official names.

python -m benchmarks.nano.export vae FOLDER MODELS --scenes SCENES      # before latents are made
python -m benchmarks.nano.export transformer FOLDER MODELS
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.nano.latents import to_network
from benchmarks.nano.scenes import read
from benchmarks.nano.start import normalise
from benchmarks.nano.train_vae import WIDTH
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
    parser.add_argument("part", choices=["vae", "transformer"])
    parser.add_argument("folder", type=Path, help="of the training")
    parser.add_argument("models", type=Path, help="where the engine will look")
    parser.add_argument("--scenes", type=Path, help="for the VAE")
    args = parser.parse_args(argv)
    if args.part == "vae" and args.scenes is None:
        parser.error("vae needs --scenes: latents are measured on them")
    if args.part == "vae":
        vae = Vae(WIDTH)
        vae.load_state_dict(_trained(args.folder / "vae.pt"))
        paths = sorted(args.scenes.glob("*[0-9].npz"))[:SAMPLES]
        normalise(vae, torch.stack([to_network(torch.from_numpy(read(p).frames)) for p in paths]))
        tiny = demo_weights(state_dir()).models
        for name in FOLDERS:
            shutil.copytree(tiny / name, args.models / name, dirs_exist_ok=True)
        save(vae, args.models / AUTOENCODER)
    else:
        model = Scail(NANO)
        model.load_state_dict(_trained(args.folder / "average.pt"))
        save(model, args.models / TRANSFORMER)


def _trained(path: Path) -> dict[str, Tensor]:
    return torch.load(path, weights_only=True)["model"]


def save(model: nn.Module, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.half().contiguous() for name, weight in model.state_dict().items()}
    save_file(weights, path)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
