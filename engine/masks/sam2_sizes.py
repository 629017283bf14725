"""The sizes of SAM 2, told by the shapes of its tensors, and what each costs.

A file says nothing of itself: patch width and number of blocks tell the size, two tensors tell
SAM 2.1 from SAM 2 of 2024. Source: docs/reference/masks.md 7.1, 7.2.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.errors import BadCheckpoint

if TYPE_CHECKING:
    from transformers.models.sam2_video.configuration_sam2_video import Sam2VideoConfig

Shapes = Mapping[str, tuple[int, ...]]

_PATCH = "vision_encoder.backbone.patch_embed.projection.weight"
_BLOCK = re.compile(r"vision_encoder\.backbone\.blocks\.(\d+)\.")
_POINTERS = "temporal_positional_encoding_projection_layer.weight"
_OCCLUSION = "occlusion_spatial_embedding_parameter"


@dataclass(frozen=True, slots=True)
class Sam2Size:
    """One size of SAM 2 as released. Facts, not settings."""

    name: str
    hidden: int  # width of a patch
    blocks: tuple[int, int, int, int]  # of each stage
    heads: tuple[int, int, int, int]
    windows: tuple[int, int, int, int]
    global_blocks: tuple[int, int, int]  # of these, attention sees the whole picture
    background: int  # side of the embedding that windows share
    parameters: int  # millions, rounded up
    cpu_s: float  # of its encoder for a frame, on one thread of a CPU


PERSON_CPU_S = 12.0  # for a person in a frame beside the encoder, on one thread, in any size

SIZES = (
    Sam2Size("large", 144, (2, 6, 36, 4), (2, 4, 8, 16), (8, 4, 16, 8), (23, 33, 43), 7, 225, 26),
    Sam2Size(
        "base_plus", 112, (2, 3, 16, 3), (2, 4, 8, 16), (8, 4, 14, 7), (12, 16, 20), 14, 81, 10
    ),
    Sam2Size("small", 96, (1, 2, 11, 2), (1, 2, 4, 8), (8, 4, 14, 7), (7, 10, 13), 7, 47, 5.3),
    Sam2Size("tiny", 96, (1, 2, 7, 2), (1, 2, 4, 8), (8, 4, 14, 7), (5, 7, 9), 7, 39, 4.8),
)


@dataclass(frozen=True, slots=True)
class Sam2Kind:
    """What a file holds."""

    size: Sam2Size
    is_21: bool  # SAM 2.1 of September 2024, not SAM 2 of July

    def __str__(self) -> str:
        return f"SAM {'2.1' if self.is_21 else '2'} {self.size.name}"


def tell(shapes: Shapes, name: str) -> Sam2Kind:
    """Tells the size by the shapes of tensors under transformers' names.

    `name` is what sentences call the file. Raises `BadCheckpoint` for a size that never was.
    """
    patch = shapes.get(_PATCH, ())
    blocks = len({found[1] for tensor in shapes if (found := _BLOCK.match(tensor))})
    hidden = patch[0] if patch else 0
    for size in SIZES:
        if (size.hidden, sum(size.blocks)) == (hidden, blocks):
            return Sam2Kind(size, _POINTERS in shapes and _OCCLUSION in shapes)
    known = ", ".join(f"{size.name} {size.hidden} and {sum(size.blocks)}" for size in SIZES)
    raise BadCheckpoint(
        f"{name} is no size of SAM 2: its patches are {hidden} wide and it has {blocks} blocks; "
        f"{known} are known. Fetch it again."
    )


def config_of(kind: Sam2Kind) -> "Sam2VideoConfig":
    """The configuration of transformers' model for what a file holds."""
    from transformers.models.sam2.configuration_sam2 import (  # slow to import: only when used
        Sam2HieraDetConfig,
        Sam2VisionConfig,
    )
    from transformers.models.sam2_video.configuration_sam2_video import Sam2VideoConfig

    size = kind.size
    widths = [size.hidden * 2**stage for stage in range(4)]
    backbone = Sam2HieraDetConfig(
        hidden_size=size.hidden,
        embed_dim_per_stage=widths,
        blocks_per_stage=list(size.blocks),
        num_attention_heads_per_stage=list(size.heads),
        window_size_per_stage=list(size.windows),
        global_attention_blocks=list(size.global_blocks),
        window_positional_embedding_background_size=[size.background] * 2,
    )
    return Sam2VideoConfig(
        vision_config=Sam2VisionConfig(
            backbone_config=backbone, backbone_channel_list=widths[::-1]
        ),
        enable_temporal_pos_encoding_for_object_pointers=kind.is_21,
        enable_occlusion_spatial_embedding=kind.is_21,
    )
