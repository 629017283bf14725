"""Tensors of an original SAM 2 file under the names that transformers gives them.

The released files keep the names of the program that trained them. Nothing is renamed but what
stands here. Source: docs/reference/masks.md 7.2.
"""

import re
from collections.abc import Iterable

import torch
from torch import Tensor

from engine.models.tensorfile import TensorFile

_POINTS, _POINT_COUNT = "prompt_encoder.point_embed.weight", 4
_POINT = re.compile(r"prompt_encoder\.point_embeddings\.(\d)\.weight")
_GRID = "prompt_encoder.shared_embedding.positional_embedding"
_GRID_AGAIN = "shared_image_embedding.positional_embedding"

# each is tried once, in this order
_RENAMES = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        (r"^image_encoder\.trunk\.", "vision_encoder.backbone."),
        (r"^image_encoder\.neck\.convs\.(\d+)\.conv\.", r"vision_encoder.neck.convs.\1."),
        (r"\.patch_embed\.proj\.", ".patch_embed.projection."),
        (r"^sam_(prompt_encoder|mask_decoder)\.", r"\1."),
        (r"\.mask_downscaling\.0\.", ".mask_embed.conv1."),
        (r"\.mask_downscaling\.1\.", ".mask_embed.layer_norm1."),
        (r"\.mask_downscaling\.3\.", ".mask_embed.conv2."),
        (r"\.mask_downscaling\.4\.", ".mask_embed.layer_norm2."),
        (r"\.mask_downscaling\.6\.", ".mask_embed.conv3."),
        (r"\.output_upscaling\.0\.", ".upscale_conv1."),
        (r"\.output_upscaling\.1\.", ".upscale_layer_norm."),
        (r"\.output_upscaling\.3\.", ".upscale_conv2."),
        (r"\.pe_layer\.positional_encoding_gaussian_matrix$",
         ".shared_embedding.positional_embedding"),
        (r"^memory_encoder\.out_proj\.", "memory_encoder.projection."),
        (r"^memory_encoder\.pix_feat_proj\.", "memory_encoder.feature_projection."),
        (r"^memory_encoder\.fuser\.", "memory_encoder.memory_fuser."),
        (r"\.dwconv\.", ".depthwise_conv."),
        (r"\.pwconv([12])\.", r".pointwise_conv\1."),
        (r"\.gamma$", ".scale"),
        (r"\.out_proj\.", ".o_proj."),
        (r"\.norm", ".layer_norm"),
        (r"^maskmem_tpos_enc$", "memory_temporal_positional_encoding"),
        (r"^no_mem_embed$", "no_memory_embedding"),
        (r"^no_mem_pos_enc$", "no_memory_positional_encoding"),
        (r"^no_obj_embed_spatial$", "occlusion_spatial_embedding_parameter"),
        (r"^no_obj_ptr$", "no_object_pointer"),
        (r"^obj_ptr_tpos_proj\.", "temporal_positional_encoding_projection_layer."),
        (r"^obj_ptr_proj\.", "object_pointer_proj."),
    )
)  # fmt: skip
_MASK_SAMPLER = re.compile(r"(\.mask_downsampler)\.encoder\.(\d+)\.")
_MLP = re.compile(
    r"(.*(?:\.mlp|\.iou_prediction_head|\.pred_obj_score_head|\.output_hypernetworks_mlps\.\d+"
    r"|^object_pointer_proj))\.layers\.(\d+)\."
)


def is_original(names: Iterable[str]) -> bool:
    """Tells whether names are those of an original file."""
    return any(name.startswith(("image_encoder.trunk.", "sam_mask_decoder.")) for name in names)


def renamed(names: Iterable[str]) -> dict[str, str]:
    """Gives each original name that of transformers; the embeddings of points keep theirs."""
    first = {name: _renamed(name) for name in names}
    last: dict[str, int] = {}
    for name in first.values():
        if found := _MLP.match(name):
            last[found[1]] = max(last.get(found[1], 0), int(found[2]))
    return {name: _of_mlp(new, last) for name, new in first.items()}


def original_tensors(file: TensorFile) -> dict[str, Tensor]:
    """Reads all tensors of an original file, under their names in transformers."""
    tensors: dict[str, Tensor] = {}
    for name, new in renamed(file).items():
        with file.open(name) as tensor:
            tensors[new] = tensor.float()
    points = {int(found[1]): name for name in tensors if (found := _POINT.fullmatch(name))}
    if sorted(points) == list(range(_POINT_COUNT)):
        tensors[_POINTS] = torch.cat([tensors.pop(points[n]) for n in range(_POINT_COUNT)])
    return with_grid(tensors)


def with_grid(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Adds the embedding of places to the picture's, where a file holds it but once."""
    for held, lacking in ((_GRID, _GRID_AGAIN), (_GRID_AGAIN, _GRID)):
        if held in tensors and lacking not in tensors:
            return tensors | {lacking: tensors[held]}
    return tensors


def _renamed(name: str) -> str:
    for pattern, new in _RENAMES:
        name = pattern.sub(new, name, count=1)
    return _MASK_SAMPLER.sub(_of_sampler, name)


def _of_sampler(found: re.Match[str]) -> str:
    """Three entries make a layer: convolution, norm and what has no weights; 12 is the last."""
    layer, part = divmod(int(found[2]), 3)
    if layer == 4:
        return f"{found[1]}.final_conv."
    return f"{found[1]}.layers.{layer}.{'conv' if part == 0 else 'layer_norm'}."


def _of_mlp(name: str, last: dict[str, int]) -> str:
    if (found := _MLP.match(name)) is None:
        return name
    layer, rest = int(found[2]), name[found.end() :]
    if layer == 0:
        return f"{found[1]}.proj_in.{rest}"
    if layer == last[found[1]]:
        return f"{found[1]}.proj_out.{rest}"
    return f"{found[1]}.layers.{layer - 1}.{rest}"
