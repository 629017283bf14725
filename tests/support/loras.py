"""Makes LoRA files for a small SCAIL transformer, and merges them."""

import torch

from engine.models.checkpoint import Checkpoint
from engine.models.lora import Lora
from tests.support.checkpoints import save, small_weights

RANK = 4


def merged(tmp_path, lora, strength=1.0, weights=None):
    path = save(weights or small_weights(), tmp_path / "model.safetensors")
    lora_path = save(lora, tmp_path / "lora.safetensors")
    checkpoint = Checkpoint(path, loras=[Lora(lora_path, strength)])
    out = {}
    for name in checkpoint:
        out[name] = torch.full(checkpoint.shape(name), torch.nan)
        checkpoint.read_into(name, out[name])
    return out


def pair(module, rows, columns, down="lora_down", up="lora_up"):
    return {
        f"diffusion_model.{module}.{down}.weight": torch.randn(RANK, columns).bfloat16(),
        f"diffusion_model.{module}.{up}.weight": torch.randn(rows, RANK).bfloat16(),
    }


def with_alpha(alpha):
    return pair("blocks.0.ffn.0", 192, 128) | {"diffusion_model.blocks.0.ffn.0.alpha": alpha}


ONE = pair("blocks.0.ffn.0", 192, 128)
