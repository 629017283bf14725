"""The nodes of ComfyUI itself that workflows of SCAIL-2 are made of (docs/reference/scail2.md 8).

What each input is for is written down here as far as this engine knows it. Nodes of other classes
are passed and told as left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from engine.errors import BadRequest
from engine.jobs.workflow_graph import Graph, WorkflowNode
from engine.jobs.workflow_parts import Way, find_way, lost
from engine.jobs.workflow_settings import WRAPPER_NODES, Settled

SEGMENT = "WanSCAILToVideo"
COLOURS = "SCAIL2ColoredMask"
LOADERS = ("UNETLoader", "UnetLoaderGGUF", "CheckpointLoaderSimple")
PICTURES = ("LoadImage",)
VIDEOS = ("LoadVideo", "VHS_LoadVideo", "VHS_LoadVideoPath")
FILE_OF: Mapping[str, str] = {"LoadImage": "image", "LoadVideo": "file"}  # else "video"
PROMPTS = ("CLIPTextEncode", "ConditioningZeroOut")
BATCHES = ("ImageBatch", "BatchImagesNode")  # put pictures one behind the other
SHIFTS, LORA = "ModelSamplingSD3", "LoraLoaderModelOnly"
DEFAULT_SHIFT = 8.0  # of Wan in ComfyUI, where no node says another

_FREE_BATCH = " ".join(f"images.image{place}" for place in range(10))
# As `workflow_settings.WRAPPER_NODES`: inputs that are read or are no matter, and those with what
# this engine does.
CORE_NODES: Settled = {
    SEGMENT: (
        "positive negative vae width height length pose_video pose_video_mask replacement_mode "
        "pose_strength pose_start pose_end reference_image reference_image_mask "
        "clip_vision_output video_frame_offset previous_frames",
        {"batch_size": (1,), "previous_frame_count": (5,)},
    ),
    COLOURS: (
        "driving_track_data ref_track_data object_indices replacement_mode reference_masks",
        {"sort_by": ("left_to_right",)},
    ),
    "SAM3_VideoTrack": (
        "images model conditioning detection_threshold max_objects detect_interval",
        {},
    ),
    "KSampler": (
        "model positive negative latent_image seed steps cfg sampler_name scheduler "
        "control_after_generate",
        {"denoise": (1,)},
    ),
    "SamplerCustom": (
        "model positive negative latent_image sampler sigmas noise_seed cfg control_after_generate",
        {"add_noise": (True,)},
    ),
    "SamplerCustomAdvanced": ("noise guider sampler sigmas latent_image", {}),
    "KSamplerSelect": ("sampler_name", {}),
    "BasicScheduler": ("model scheduler steps", {"denoise": (1,)}),
    "RandomNoise": ("noise_seed control_after_generate", {}),
    "CFGGuider": ("model positive negative cfg", {}),
    SHIFTS: ("model shift", {}),
    LORA: ("model lora_name strength_model", {}),
    "UNETLoader": ("unet_name weight_dtype", {}),
    "UnetLoaderGGUF": ("unet_name", {}),
    "CheckpointLoaderSimple": ("ckpt_name", {}),
    "CLIPLoader": ("clip_name type device", {}),
    "CLIPTextEncode": ("text clip", {}),
    "ConditioningZeroOut": ("conditioning", {}),
    "VAELoader": ("vae_name", {}),
    "VAEDecode": ("samples vae", {}),
    "VAEDecodeTiled": ("samples vae tile_size overlap temporal_size temporal_overlap", {}),
    "CLIPVisionLoader": ("clip_name", {}),
    "CLIPVisionEncode": ("clip_vision image", {"crop": ("none", "center")}),
    "LoadImage": ("image upload choose_file_to_upload", {}),
    "LoadVideo": ("file video upload choose_file_to_upload", {}),
    "GetVideoComponents": ("video", {}),
    "ImageScale": ("image upscale_method width height crop", {}),
    "ImageFromBatch": ("image batch_index length", {}),
    "ImageBatch": ("image1 image2", {}),
    "BatchImagesNode": (_FREE_BATCH, {}),
    "CreateVideo": ("images fps audio", {}),
    "SaveVideo": (
        "video filename_prefix video-preview",
        {"format": ("auto", "mp4"), "codec": ("auto", "h264")},
    ),
    **{
        kind: WRAPPER_NODES[kind]
        for kind in ("VHS_VideoCombine", "VHS_LoadVideo", "VHS_LoadVideoPath", "ImageResizeKJv2")
    },
}
# Nodes that add something to what they are given, and the input that it comes by
_THROUGH: Mapping[str, str] = {
    LORA: "model",
    SHIFTS: "model",
    "GetVideoComponents": "video",
    "ImageScale": "image",
    "ImageResizeKJv2": "image",
    "ImageFromBatch": "image",
}


@dataclass(frozen=True, slots=True)
class SamplerKind:
    """Where a class of samplers has its settings: "sigmas.steps" is an input of a linked node."""

    latent: str
    seed: str
    steps: str
    cfg: str
    sampler: str
    scheduler: str
    model: str
    grid_model: str  # whose shift the noise levels have
    positive: str
    negative: str


SAMPLERS: Mapping[str, SamplerKind] = {
    "KSampler": SamplerKind(
        "latent_image", "seed", "steps", "cfg", "sampler_name", "scheduler", "model", "model",
        "positive", "negative",
    ),
    "SamplerCustom": SamplerKind(
        "latent_image", "noise_seed", "sigmas.steps", "cfg", "sampler.sampler_name",
        "sigmas.scheduler", "model", "sigmas.model", "positive", "negative",
    ),
    "SamplerCustomAdvanced": SamplerKind(
        "latent_image", "noise.noise_seed", "sigmas.steps", "guider.cfg", "sampler.sampler_name",
        "sigmas.scheduler", "guider.model", "sigmas.model", "guider.positive", "guider.negative",
    ),
}  # fmt: skip
_BESIDE: Mapping[str, str] = {  # the nodes that a sampler has its settings from, by the input
    "sigmas": "BasicScheduler",
    "sampler": "KSamplerSelect",
    "noise": "RandomNoise",
    "guider": "CFGGuider",
}


def is_core(kind: str) -> bool:
    """Tells whether a class of nodes has a part in the clips of SCAIL-2 that are made here."""
    return kind in CORE_NODES


def core_way(graph: Graph, node: WorkflowNode, name: str, kinds: tuple[str, ...]) -> Way:
    """Follows an input as `find_way` does, through the nodes of ComfyUI."""
    return find_way(graph, node, name, kinds, _THROUGH, is_core)


def must(
    graph: Graph, node: WorkflowNode, name: str, kinds: tuple[str, ...]
) -> tuple[WorkflowNode, Way]:
    """Finds the one node that an input leads to. Raises `BadRequest` for none and for several."""
    way = core_way(graph, node, name, kinds)
    if not way.ends:
        raise BadRequest(lost(node, name, kinds, way))
    if any(not graph.is_same(way.ends[0], end) for end in way.ends[1:]):
        raise BadRequest(
            f"The input {name} of {node} leads to {way.ends[0]} and to {way.ends[1]}; link the one "
            "that is meant."
        )
    return way.ends[0].node, way


def holder(graph: Graph, sampler: WorkflowNode, place: str) -> tuple[WorkflowNode, str]:
    """Finds the node and the input that hold a setting of a sampler.

    Raises `BadRequest` where another node than the usual one is linked.
    """
    first, dot, name = place.partition(".")
    if not dot:
        return sampler, first
    found, wanted = graph.linked(sampler, first), _BESIDE[first]
    if found is None or found.kind != wanted:
        here = "nothing" if found is None else found
        raise BadRequest(
            f"The input {first} of {sampler} comes from {here}; a {wanted} is expected."
        )
    return found, name
