"""From files to a pipeline that is ready for its first job."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from engine.capture import capture_skeleton
from engine.conditioning import Encoders
from engine.exact import ExactDenoiser
from engine.models.attention import find_attention
from engine.models.checkpoint import Checkpoint
from engine.models.locate import IMAGE_ENCODER, TEXT_ENCODER, VAE, find_model
from engine.models.lora import Lora
from engine.models.text import embed_prompts
from engine.models.vae import load_vae
from engine.models.vision import VisionEncoder
from engine.pipeline import Pipeline
from engine.pose.extract import PoseExtractor
from engine.pose.networks import Networks

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class Settings:
    """How the models are run."""

    device: torch.device
    precision: str  # a key of PRECISIONS
    attention: str
    state: Path  # what can be recomputed is kept here


def load_exact(
    checkpoint: Path,
    loras: Sequence[tuple[Path, float]],
    models: Path,
    networks: Networks,
    settings: Settings,
) -> Pipeline:
    """The plain PyTorch model of a checkpoint, and the other models from a models folder.

    All files are found and checked before the first weight is read, but for the motion capture
    `networks`: not every job needs them.
    """
    device, dtype = settings.device, PRECISIONS[settings.precision]
    torch.backends.cudnn.allow_tf32 = False  # FP32 convolutions shall be FP32
    attention = find_attention(settings.attention)
    opened = Checkpoint(checkpoint, loras=[Lora(path, strength) for path, strength in loras])
    text, vision, vae = (find_model(models, kind) for kind in (TEXT_ENCODER, IMAGE_ENCODER, VAE))
    # UMT5 overflows in FP16 (spec/encoders.md 2.3)
    text_dtype = torch.bfloat16 if dtype == torch.float16 else dtype
    encoders = Encoders(
        text=partial(
            embed_prompts,
            encoder=text,
            models=models,
            cache=settings.state / "prompts",
            device=device,
            dtype=text_dtype,
        ),
        vision=VisionEncoder(vision, device, dtype),
        vae=load_vae(vae, device, dtype),
    )
    capture = partial(capture_skeleton, PoseExtractor(networks, settings.state))
    return Pipeline(ExactDenoiser(opened, device, dtype, attention), encoders, capture)
