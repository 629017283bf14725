"""Writes a small SCAIL transformer in every layout that people have."""

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.config import ModelConfig
from engine.models.checkpoint import SAT_NAMES, Checkpoint, load_transformer
from engine.models.dit import Scail

SMALL = ModelConfig(layers=2, dim=128, ffn=192, text_dim=32, clip_dim=48)
SMALL_SCAIL2 = replace(SMALL, mask_dim=28)


def small_weights(seed: int = 0, config: ModelConfig = SMALL) -> dict[str, Tensor]:
    """Random weights under converted names, exactly representable in BF16."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: weight.shape for name, weight in Scail(config).state_dict().items()}
    return {
        name: (torch.randn(shape, generator=generator) * 0.1).bfloat16().float()
        for name, shape in shapes.items()
    }


def to_sat(weights: dict[str, Tensor], prefix: str = "model.diffusion_model.") -> dict[str, Tensor]:
    """The names and the fused tensors of the official file."""
    held = dict(weights)
    sat = {}
    layers = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    for n in range(layers):
        for stored, targets in SAT_NAMES.items():
            for suffix in ("", ".weight", ".bias"):
                names = [target.replace("{n}", str(n)) + suffix for target in targets]
                if all(name in held for name in names):
                    rows = [held.pop(name) for name in names]
                    name = prefix + stored.replace("{n}", str(n)) + suffix
                    sat[name] = torch.cat(rows) if len(rows) > 1 else rows[0]
    assert not held
    return sat


def to_fp8(weights: dict[str, Tensor], scale_name: str = "scale_weight") -> dict[str, Tensor]:
    """The linears of the blocks in E4M3 with a scale each; the rest in BF16 and FP16."""
    stored: dict[str, Tensor] = {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}
    for n, (name, weight) in enumerate(weights.items()):
        if name.startswith("blocks.") and name.endswith(".weight") and weight.ndim == 2:
            scale = weight.abs().max() / 448
            stored[name] = (weight / scale).to(torch.float8_e4m3fn)
            stem = name.removesuffix("weight")
            stored[stem + scale_name] = scale if n % 2 else scale[None]
            stored[stem + "scale_input"] = torch.ones(())
        else:
            stored[name] = weight.to(torch.bfloat16 if n % 3 else torch.float16)
    stored["blocks.0.ffn.0.comfy_quant"] = torch.tensor(
        list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8
    )
    return stored


def save(tensors: dict[str, Tensor], path: Path) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def loaded(path, dtype=torch.float32):
    """The weights of a file as a transformer on the CPU has them."""
    return load_transformer(Checkpoint(path), torch.device("cpu"), dtype).state_dict()


def assert_equal(got, want):
    """Requires the same names, and the same numbers whatever their types."""
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name].float(), tensor.float()), name
