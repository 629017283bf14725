"""A small random SAM 2 that says that everybody is there, and its original names.

With random weights it would call everybody absent, and empty masks prove nothing: the bias of its
score is raised, and its matrices are made larger.
"""

import re

import torch
from transformers.models.sam2.configuration_sam2 import Sam2HieraDetConfig, Sam2VisionConfig
from transformers.models.sam2_video.configuration_sam2_video import (
    Sam2VideoConfig,
    Sam2VideoMaskDecoderConfig,
    Sam2VideoPromptEncoderConfig,
)
from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoModel

SIDE = WIDTH = 128


def tiny_config(**changes):
    backbone = Sam2HieraDetConfig(
        hidden_size=8,
        image_size=[SIDE, SIDE],
        window_positional_embedding_background_size=[4, 4],
        blocks_per_stage=[1, 1, 2, 1],
        embed_dim_per_stage=[8, 16, 32, 64],
        num_attention_heads_per_stage=[1, 1, 2, 2],
        window_size_per_stage=[8, 4, 8, 4],
        global_attention_blocks=[3],
        mlp_ratio=2.0,
    )
    vision = Sam2VisionConfig(
        backbone_config=backbone,
        backbone_channel_list=[64, 32, 16, 8],
        backbone_feature_sizes=[[32, 32], [16, 16], [8, 8]],
        fpn_hidden_size=WIDTH,
    )
    prompts = Sam2VideoPromptEncoderConfig(
        hidden_size=WIDTH, image_size=SIDE, mask_input_channels=8
    )
    decoder = Sam2VideoMaskDecoderConfig(
        hidden_size=WIDTH, mlp_dim=64, num_hidden_layers=1, num_attention_heads=2,
        iou_head_depth=2, iou_head_hidden_dim=WIDTH,
    )  # fmt: skip
    return Sam2VideoConfig(
        vision_config=vision,
        prompt_encoder_config=prompts,
        mask_decoder_config=decoder,
        image_size=SIDE,
        num_maskmem=3,
        max_object_pointers_in_encoder=4,
        memory_attention_hidden_size=WIDTH,
        memory_attention_num_layers=1,
        memory_attention_feed_forward_hidden_size=64,
        memory_attention_rope_feat_sizes=[8, 8],
        memory_encoder_hidden_size=WIDTH,
        memory_encoder_output_channels=64,
        mask_downsampler_embed_dim=WIDTH,
        memory_fuser_num_layers=1,
        memory_fuser_embed_dim=WIDTH,
        memory_fuser_intermediate_dim=64,
        **changes,
    )


def lively(model):
    """Makes a random model call everybody present, in masks that are not flat."""
    with torch.no_grad():
        for name, held in model.state_dict().items():
            if held.ndim > 1 and name.endswith("weight"):
                held *= 4
            elif not held.any() and "bias" not in name:
                held.normal_(std=0.1)  # embeddings that begin as zeros
        grid = model.prompt_encoder.shared_embedding.positional_embedding
        model.shared_image_embedding.positional_embedding.copy_(grid)  # one, in trained models
        model.mask_decoder.pred_obj_score_head.proj_out.bias.fill_(10)
    return model.eval()


def tiny_model(**changes):
    torch.manual_seed(0)
    return lively(Sam2VideoModel(tiny_config(**changes)))


# from transformers' names to those of the original program, written from the latter's modules
_BACK = (
    (r"^vision_encoder\.backbone\.", "image_encoder.trunk."),
    (r"^vision_encoder\.neck\.convs\.(\d+)\.", r"image_encoder.neck.convs.\1.conv."),
    (r"patch_embed\.projection", "patch_embed.proj"),
    (r"^prompt_encoder\.shared_embedding\.positional_embedding",
     "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"),
    (r"mask_embed\.conv1", "mask_downscaling.0"),
    (r"mask_embed\.layer_norm1", "mask_downscaling.1"),
    (r"mask_embed\.conv2", "mask_downscaling.3"),
    (r"mask_embed\.layer_norm2", "mask_downscaling.4"),
    (r"mask_embed\.conv3", "mask_downscaling.6"),
    (r"upscale_conv1", "output_upscaling.0"),
    (r"upscale_layer_norm", "output_upscaling.1"),
    (r"upscale_conv2", "output_upscaling.3"),
    (r"^(prompt_encoder|mask_decoder)\.", r"sam_\1."),
    (r"mask_downsampler\.layers\.(\d)\.conv",
     lambda m: f"mask_downsampler.encoder.{3 * int(m[1])}"),
    (r"mask_downsampler\.layers\.(\d)\.layer_norm",
     lambda m: f"mask_downsampler.encoder.{3 * int(m[1]) + 1}"),
    (r"mask_downsampler\.final_conv", "mask_downsampler.encoder.12"),
    (r"memory_encoder\.projection", "memory_encoder.out_proj"),
    (r"feature_projection", "pix_feat_proj"),
    (r"memory_fuser", "fuser"),
    (r"depthwise_conv", "dwconv"),
    (r"pointwise_conv", "pwconv"),
    (r"(fuser\.layers\.\d+)\.scale", r"\1.gamma"),
    (r"o_proj", "out_proj"),
    (r"layer_norm", "norm"),
    (r"^memory_temporal_positional_encoding", "maskmem_tpos_enc"),
    (r"^no_memory_embedding", "no_mem_embed"),
    (r"^no_memory_positional_encoding", "no_mem_pos_enc"),
    (r"^occlusion_spatial_embedding_parameter", "no_obj_embed_spatial"),
    (r"^no_object_pointer", "no_obj_ptr"),
    (r"^temporal_positional_encoding_projection_layer", "obj_ptr_tpos_proj"),
    (r"^object_pointer_proj", "obj_ptr_proj"),
)  # fmt: skip
_MLP = re.compile(
    r"(.*(?:\.mlp|\.iou_prediction_head|\.pred_obj_score_head|\.output_hypernetworks_mlps\.\d"
    r"|obj_ptr_proj))\.(proj_in|proj_out|layers\.(\d+))\."
)


def original(state):
    """Tensors under transformers' names -> under those of the original program."""
    named = {}
    for name, held in state.items():
        if name == "shared_image_embedding.positional_embedding":
            continue
        if name == "prompt_encoder.point_embed.weight":
            for number, row in enumerate(held):
                named[f"sam_prompt_encoder.point_embeddings.{number}.weight"] = row[None].clone()
            continue
        for pattern, old in _BACK:
            name = re.sub(pattern, old, name)
        named[name] = held
    layers = {}
    for name in named:
        if found := _MLP.match(name):
            layers[found[1]] = max(layers.get(found[1], 2), int(found[3] or -1) + 3)
    return {_mlp(name, layers): held for name, held in named.items()}


def _mlp(name, layers):
    if (found := _MLP.match(name)) is None:
        return name
    last = layers[found[1]] - 1
    layer = {"proj_in": 0, "proj_out": last}.get(found[2], int(found[3] or 0) + 1)
    return f"{found[1]}.layers.{layer}.{name[found.end() :]}"
