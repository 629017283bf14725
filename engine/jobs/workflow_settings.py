"""Finds the settings of a ComfyUI workflow that this engine does in its own way, or not at all."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

from engine.jobs.fields import flag, glance, shown
from engine.jobs.workflow_graph import Graph, Link, WorkflowNode, is_equal, is_open

_NAMED = 12  # so many differences are told one by one; of the rest, the number

_PROMPTS = (
    "positive_prompt negative_prompt model_name precision quantization use_disk_cache device t5 "
    "force_offload model_to_offload"
)

# Maps a class type to two lists. First the inputs with any value: those that are read elsewhere,
# and those that say where something is computed or kept. Then the inputs with the values that this
# engine does, the usual one first.
Settled: TypeAlias = Mapping[str, tuple[str, Mapping[str, tuple[object, ...]]]]
WRAPPER_NODES: Settled = {
    "VHS_VideoCombine": (
        "frame_rate images audio filename_prefix save_metadata save_output videopreview",
        {"format": ("video/h264-mp4",), "pix_fmt": ("yuv420p",), "crf": (19,), "loop_count": (0,),
         "trim_to_audio": (False,), "pingpong": (False,)},
    ),
    "GetImageSizeAndCount": ("image", {}),
    "WanVideoDecode": (
        "vae samples enable_vae_tiling tile_x tile_y tile_stride_x tile_stride_y",
        {"normalization": ("default",)},
    ),
    "WanVideoVAELoader": ("model_name precision use_cpu_cache verbose compile_args", {}),
    "WanVideoSamplerv2": (
        "cfg seed model image_embeds scheduler text_embeds extra_args force_offload",
        {"add_noise_to_samples": (False,)},
    ),
    "WanVideoSchedulerv2": (
        "scheduler steps shift",
        {"start_step": (0,), "end_step": (-1,), "enhance_hf": (False,)},
    ),
    "WanVideoTextEncodeCached": (_PROMPTS, {}),
    "WanVideoTextEncode": (_PROMPTS, {}),
    "WanVideoSamplerExtraArgs": (
        "context_options",
        {"riflex_freq_index": (0,), "rope_function": ("comfy", "default", "comfy_chunked")},
    ),
    "WanVideoContextOptions": (
        "context_frames context_overlap verbose",
        {"context_schedule": ("uniform_standard",), "context_stride": (4,), "freenoise": (True,),
         "fuse_method": ("linear",)},
    ),
    "WanVideoAddSCAILPoseEmbeds": (
        "strength start_percent end_percent embeds vae pose_images", {}
    ),
    "WanVideoAddSCAILReferenceEmbeds": (
        "embeds vae ref_image clip_embeds",
        {"strength": (1,), "start_percent": (0,), "end_percent": (1,)},
    ),
    "WanVideoEmptyEmbeds": ("width height num_frames", {}),
    "WanVideoClipVisionEncode": (
        "clip_vision image_1 strength_2 combine_embeds ratio force_offload",
        {"strength_1": (1,), "crop": ("disabled",), "tiles": (0,)},
    ),
    "CLIPVisionLoader": ("clip_name", {}),
    "RenderNLFPoses": (
        "width height nlf_poses dw_poses ref_dw_pose render_device render_backend",
        {"draw_face": (True,), "draw_hands": (True,), "scale_hands": (True,)},
    ),
    "NLFPredict": ("model images per_batch", {}),
    "DownloadAndLoadNLFModel": ("url warmup", {}),
    "PoseDetectionVitPoseToDWPose": ("vitpose_model images", {}),
    "OnnxDetectionModelLoader": ("vitpose_model yolo_model onnx_device", {}),
    "ImageResizeKJv2": (
        "image width height keep_proportion pad_color device",
        {"upscale_method": ("bicubic",), "crop_position": ("center",), "divisible_by": (32,)},
    ),
    "LoadImage": ("image upload choose_file_to_upload", {}),
    "VHS_LoadVideo": (
        "video force_rate frame_load_cap choose_video_to_upload videopreview",
        {"select_every_nth": (1,), "skip_first_frames": (0,), "custom_width": (0,),
         "custom_height": (0,), "format": ("AnimateDiff", "None", "Wan", "Hunyuan")},
    ),
    "VHS_LoadVideoPath": (
        "video force_rate frame_load_cap videopreview",
        {"select_every_nth": (1,), "skip_first_frames": (0,), "custom_width": (0,),
         "custom_height": (0,), "format": ("AnimateDiff", "None", "Wan", "Hunyuan")},
    ),
    "WanVideoModelLoader": (
        "model base_precision quantization load_device attention_mode rms_norm_function "
        "compile_args block_swap_args vram_management_args lora",
        {},
    ),
    "WanVideoSetBlockSwap": ("model block_swap_args", {}),
    "WanVideoSetLoRAs": ("model lora", {}),
    "WanVideoLoraSelect": ("lora strength low_mem_load merge_loras prev_lora", {}),
    "WanVideoLoraSelectByName": ("lora_name strength low_mem_load merge_loras prev_lora", {}),
    "WanVideoLoraSelectMulti": (
        "lora_0 lora_1 lora_2 lora_3 lora_4 strength_0 strength_1 strength_2 strength_3 strength_4 "
        "low_mem_load merge_loras prev_lora",
        {},
    ),
}  # fmt: skip


def is_known(kind: str) -> bool:
    """Tells whether a class of nodes has a part in the clips that are made here."""
    return kind in WRAPPER_NODES


def told_of_nodes(graph: Graph, made: Sequence[WorkflowNode]) -> Iterator[str]:
    """Tells what the nodes of a clip leave open, and which of them are marked as left out."""
    opened = [
        f"{glance(name)} of {node}"
        for node in made
        for name, value in node.inputs.items()
        if is_open(value)
    ]
    if opened:
        yield f"Left open by the workflow: {listed(opened)}."
    if off := [str(node) for node in made if node.is_off]:
        yield f"Muted or bypassed, but in an API workflow done all the same: {listed(off)}."


def differences(
    graph: Graph, nodes: Iterable[WorkflowNode], known: Settled = WRAPPER_NODES
) -> list[str]:
    """Lists the inputs of known nodes that are left out, or have another value than is done.

    What such an input is linked to comes first: it is more than a setting.
    """
    linked: list[str] = []
    found: list[str] = []
    for node in nodes:
        free, done = known[node.kind]
        for name in node.inputs:
            if name.replace(" ", "_") in free.split():
                continue
            value = graph.plain(node, name)
            if name not in done:
                said = linked if isinstance(value, Link) else found
                said.append(f"{glance(name)} of {node} is left out")
            elif not any(_is_done(value, one) for one in done[name]):
                found.append(difference(graph, node, name, done[name][0]))
    return [*linked, *found]


def difference(graph: Graph, node: WorkflowNode, name: str, done: object) -> str:
    """Names an input that says one thing where another is done."""
    value = graph.plain(node, name)
    said = f"comes from {value}" if isinstance(value, Link) else f"is {shown(value)}"
    return f"{glance(name)} of {node} {said}, done as {shown(done)}"


def listed(things: Sequence[str]) -> str:
    """Joins the first `_NAMED` of `things`, and says how many more there are."""
    more = [f"{len(things) - _NAMED} more"] if len(things) > _NAMED else []
    return "; ".join([*things[:_NAMED], *more])


def _is_done(value: object, done: object) -> bool:
    if isinstance(done, bool):
        try:
            return flag(value) == done
        except ValueError:
            return False
    return is_equal(value, done)
