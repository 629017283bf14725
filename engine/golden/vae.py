"""Golden data of the video VAE: clips and latents of a tiny model, its weights in the same file.

`encode.CASE.input` becomes `encode.CASE.latent`; `decode.CASE.latent` becomes `.raw`, and `.video`
after clamping. Weights are `weights.` and the official name.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from engine.golden.check import Check, compare
from engine.models.vae import History, Vae

TOLERANCE = 2e-5
_WEIGHTS = "weights."
_WIDTH = f"{_WEIGHTS}encoder.conv1.weight"  # a 3D convolution of pixels to [width] channels


def recognises(names: frozenset[str], metadata: Mapping[str, str]) -> bool:
    return _WIDTH in names and any(n.startswith(("encode.", "decode.")) for n in names)


@torch.inference_mode()
def checks(path: Path) -> Iterator[Check]:
    tensors = load_file(path)
    vae = Vae(width=len(tensors[_WIDTH]))
    vae.load_state_dict(
        {n.removeprefix(_WEIGHTS): w for n, w in tensors.items() if n.startswith(_WEIGHTS)}
    )
    for name, given in tensors.items():
        case, _, kind = name.rpartition(".")
        if case.startswith("encode.") and kind == "input":
            results = {"latent": vae.encode([given])}
        elif case.startswith("decode.") and kind == "latent":
            video = torch.cat(list(vae.decode(given, step=3)), dim=1)
            results = {"raw": _decode_raw(vae, given), "video": video}
        else:
            continue
        for result, got in results.items():
            want = tensors.get(f"{case}.{result}")
            if want is not None:
                yield compare(f"{path.name}: {case}.{result}", got, want, TOLERANCE)


def _decode_raw(vae: Vae, latents: Tensor) -> Tensor:
    """Decodes one latent a step, so that the two results of a case are cut differently."""
    history: History = {}
    return torch.cat([vae.decode_step(z, history) for z in latents.split(1, dim=1)], dim=1)
