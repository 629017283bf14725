"""Reads a ComfyUI workflow of WanVideoWrapper, for SCAIL-Preview, as settings of a job.

What each node is for is found by `workflow_parts`. The ids of nodes mean nothing here, but programs
fill in values by id (docs/reference/runpod.md A.4): where the usual id is not that of the node that
is read, a warning says so. Others name what is linked in another way than here, every setting that
this engine does its own way, and the files that are not those of the endpoint.
"""

import dataclasses
from collections.abc import Iterator

from engine.config import LIMITS
from engine.errors import BadRequest
from engine.flow import Recipe, RecipeName
from engine.jobs.fields import glance, number, shown, text, whole, word
from engine.jobs.job import Draft
from engine.jobs.workflow_graph import Graph, Link, WorkflowNode, is_equal, is_open
from engine.jobs.workflow_parts import Parts, find_parts
from engine.jobs.workflow_settings import difference, differences, listed, told_of_nodes
from engine.jobs.workflow_sizes import side
from engine.recipes import RECIPES

_LIKE: RecipeName = "production"  # the recipe that such a workflow changes
_INFO = 3  # the output of a loaded video that tells of it
_LOADED_FPS = (("VHS_VideoInfo", 5), ("VHS_VideoInfoLoaded", 0))
_ANY_SIDE = 1344.0  # stands for a side that is left open, where only its share counts

# The ids of nodes that programs fill in, and the class type that they expect there
_USUAL = {
    "22": "WanVideoModelLoader",
    "99": "WanVideoEmptyEmbeds",
    "106": "LoadImage",
    "130": "VHS_LoadVideo",
    "137": "VHS_VideoCombine",
    "139": "VHS_VideoCombine",
    "203": "INTConstant",
    "204": "INTConstant",
    "238": "FloatConstant",
    "348": "WanVideoSamplerv2",
    "349": "WanVideoSchedulerv2",
    "355": "WanVideoContextOptions",
    "368": "WanVideoTextEncodeCached",
}

# The files that an endpoint has, by the part that names them: the link to the node that does, its
# inputs, and how the usual files are called (docs/reference/runpod.md A.6). Of others it is told
# that they are not used.
_FILES = (
    ("vae", "", ("model_name",), ("wan2.1_vae", "wan_2.1_vae", "wan2_1_vae_bf16")),
    ("prompts", "", ("model_name",), ("umt5-xxl-enc-bf16",)),
    ("prompts", "t5", ("model_name",), ("umt5-xxl-enc-bf16",)),
    ("vision", "clip_vision", ("clip_name",), ("clip_vision_h",)),
    ("joints", "model", ("url",), ("nlf_l_multi_0.3.2",)),
    ("keypoints", "vitpose_model", ("vitpose_model", "yolo_model"),
     ("vitpose-l-wholebody", "vitpose_h_wholebody_model", "yolov10m")),
    ("stance", "vitpose_model", ("vitpose_model", "yolo_model"),
     ("vitpose-l-wholebody", "vitpose_h_wholebody_model", "yolov10m")),
)  # fmt: skip
_USUAL_PRECISION = "bf16"


def read_wrapper(graph: Graph) -> Draft:
    """Reads a workflow. Settings that a template leaves open are None.

    Raises `BadRequest` for what is no such workflow.
    """
    parts = find_parts(graph)
    keep = graph.value(parts["picture"], "keep_proportion", word)
    fps = _fps(graph, parts)
    draft = Draft(
        like=_LIKE,
        recipe=_recipe(graph, parts),
        image=graph.value(parts["image"], "image", text),
        video=graph.value(parts["video"], "video", text),
        attention=graph.value(parts["loader"], "attention_mode", word),
        prompt=graph.value(parts["prompts"], "positive_prompt", text),
        negative_prompt=graph.value(parts["prompts"], "negative_prompt", text),
        seed=graph.value(parts["sampler"], "seed", whole),
        width=side(graph, *_box(graph, parts, "width")),
        height=side(graph, *_box(graph, parts, "height")),
        fps=fps,
        frames=_frames(graph, parts),
        audio=graph.link(parts["result"], "audio") is not None,
        fit=None if keep is None else "resize" if keep == "resize" else "crop",
    )
    return dataclasses.replace(draft, warnings=tuple(_warnings(graph, parts, draft)))


def _fps(graph: Graph, parts: Parts) -> float | None:
    """Reads the rate of the result: its own, or that at which the video is loaded."""
    result, video = parts["result"], parts["video"]
    told = graph.plain(result, "frame_rate")
    if isinstance(told, Link) and (told.node.kind, told.output) in _LOADED_FPS:
        source = graph.link(told.node, "video_info")
        forced = graph.value(video, "force_rate", number)
        if source is not None and graph.is_same(source, Link(video, _INFO)) and forced:
            return forced
    return graph.value(result, "frame_rate", number)


def _recipe(graph: Graph, parts: Parts) -> Recipe:
    """Reads the recipe. Values that are left open are those of production."""
    scheduler, pose, context = parts["scheduler"], parts["pose"], parts.get("context")
    said = {
        "sampler": graph.value(scheduler, "scheduler", word),
        "steps": graph.value(scheduler, "steps", whole),
        "shift": graph.value(scheduler, "shift", number),
        "cfg": graph.value(parts["sampler"], "cfg", number),
        "pose_from": graph.value(pose, "start_percent", number),
        "pose_until": graph.value(pose, "end_percent", number),
        "pose_strength": graph.value(pose, "strength", number),
        "window_frames": LIMITS.max_frames,  # without windows the clip is denoised at once
        "half_render": _is_half(graph, parts),
    }
    if context is not None:
        said["window_frames"] = graph.value(context, "context_frames", whole)
        said["overlap_frames"] = graph.value(context, "context_overlap", whole)
    known = {name: value for name, value in said.items() if value is not None}
    return dataclasses.replace(RECIPES["preview"][_LIKE], **known)


def _box(graph: Graph, parts: Parts, name: str) -> tuple[WorkflowNode, str]:
    """Finds the input that says a side of the clip: of the picture's box, where that is handed on.

    A side that the picture turned out to have is not known before it is there.
    """
    embeds, picture = parts["embeds"], parts["picture"]
    link = graph.link(embeds, name)
    outputs = {1: "width", 2: "height"}
    if link is not None and link.node is picture and link.output in outputs:
        return picture, outputs[link.output]
    return embeds, name


def _is_half(graph: Graph, parts: Parts) -> bool | None:
    """Returns True for skeletons drawn at half the size of the clip, False at its size, or None."""
    halves: list[bool | None] = []
    for name in ("width", "height"):
        try:
            asked = side(graph, *_box(graph, parts, name), _ANY_SIDE)
            drawn = side(graph, parts["render"], name, _ANY_SIDE)
        except BadRequest:
            return None
        is_half = asked is not None and drawn == asked // 2
        halves.append(True if is_half else False if drawn == asked else None)
    return halves[0] if halves[0] == halves[1] else None


def _frames(graph: Graph, parts: Parts) -> int | None:
    """Returns the lowest of the limits on frames, if there is one."""
    limits = [graph.value(parts["video"], "frame_load_cap", whole) or None]
    if not isinstance(graph.plain(parts["embeds"], "num_frames"), Link):
        limits.append(graph.value(parts["embeds"], "num_frames", whole))
    return min((limit for limit in limits if limit is not None), default=None)


def _warnings(graph: Graph, parts: Parts, draft: Draft) -> Iterator[str]:
    made = graph.ancestors(parts["result"])
    if moved := _moved(graph, parts):
        yield f"Ids of nodes are not those that programs fill in: {listed(moved)}."
    yield from told_of_nodes(graph, made)
    linked = [*parts.told, *_sizes(graph, parts, draft), *_counts(graph, parts)]
    if linked := [*linked, *(f"{node} is left out" for node in parts.left_out)]:
        yield f"Linked another way than it is done: {listed(linked)}."
    if differing := _differing(graph, parts, draft):
        yield f"Settings done another way: {listed(differing)}."
    yield _weights(graph, parts)


def _moved(graph: Graph, parts: Parts) -> list[str]:
    read = {
        "22": parts["loader"], "99": parts["embeds"], "106": parts["image"], "130": parts["video"],
        "137": graph.nodes.get("137"),  # saves the skeleton, and is not read
        "139": parts["result"], "203": graph.linked(parts["picture"], "width"),
        "204": graph.linked(parts["picture"], "height"),
        "238": graph.linked(parts["sampler"], "cfg"), "348": parts["sampler"],
        "349": parts["scheduler"], "355": parts.get("context"), "368": parts["prompts"],
    }  # fmt: skip
    moved: list[str] = []
    for usual, node in read.items():
        there, kind = graph.nodes.get(usual), _USUAL[usual]
        if there is None:
            moved.append(f"there is no {usual} ({kind})")
        elif there.kind != kind:
            moved.append(f"{usual} is a {glance(there.kind)}, not a {kind}")
        elif there is not node:
            moved.append(f"the {kind} {usual} is not the one in use")
    return moved


def _sizes(graph: Graph, parts: Parts, draft: Draft) -> Iterator[str]:
    """Names the sides of pictures that are not those of the clip."""
    for part in ("embeds", "picture", "dance"):
        for name, made in (("width", draft.width), ("height", draft.height)):
            node = parts[part]
            try:
                asked = side(graph, node, name, made)
            except BadRequest:
                asked = None
            link = graph.plain(node, name)
            is_of_picture = isinstance(link, Link) and link.node is parts["picture"]
            is_of_another = isinstance(link, Link) and link.output != 0 and not is_of_picture
            if (asked != made and made is not None) or (part == "embeds" and is_of_another):
                yield difference(graph, node, name, "in the picture" if made is None else made)


def _counts(graph: Graph, parts: Parts) -> Iterator[str]:
    """Tells of a number of frames that is that of something else than the dance."""
    counted = graph.plain(parts["embeds"], "num_frames")
    if not isinstance(counted, Link):
        return
    if counted.node.kind == "GetImageSizeAndCount" and counted.output == 3:
        counted = graph.link(counted.node, "image")
        wanted = [Link(parts["dance"], 0), Link(parts["video"], 0)]
    else:
        wanted = [Link(parts["video"], 1)]
    if counted is None or not any(graph.is_same(counted, one) for one in wanted):
        found = "nothing" if counted is None else counted
        yield f"num_frames of {parts['embeds']} comes from {found}, done with {wanted[0]}"


def _differing(graph: Graph, parts: Parts, draft: Draft) -> list[str]:
    found = differences(graph, parts.known(graph))
    picture, dance, video = parts["picture"], parts["dance"], parts["video"]
    rate = graph.value(video, "force_rate", number)
    if None not in (draft.fps, rate) and rate != draft.fps:
        found.append(difference(graph, video, "force_rate", draft.fps))
    keep = graph.plain(picture, "keep_proportion")
    if keep not in ("crop", "resize") and not is_open(keep):
        found.append(difference(graph, picture, "keep_proportion", "crop"))
    if graph.plain(dance, "keep_proportion") != "crop":
        found.append(difference(graph, dance, "keep_proportion", "crop"))
    if _is_half(graph, parts) is None:
        found.append(f"the size of {parts['render']}, done as half of the clip")
    return found


def _weights(graph: Graph, parts: Parts) -> str:
    """Names the weights and LoRAs of the workflow. They are not used: a package has its own."""
    files = [shown(graph.plain(parts["loader"], "model"))]
    for lora in parts.loras(graph):
        files += _selected(graph, lora)
    for part, name, keys, usual in _FILES:
        for said in _others(graph, parts.get(part), name, keys, usual):
            files += [said] if said not in files else []
    return f"Weights are those of this endpoint, not what the workflow names: {listed(files)}."


def _others(
    graph: Graph,
    node: WorkflowNode | None,
    name: str,
    keys: tuple[str, ...],
    usual: tuple[str, ...],
) -> Iterator[str]:
    """Names the files of a node that are not the usual ones, or the node that loads them."""
    if node is not None and name:
        found = graph.plain(node, name)
        node = found.node if isinstance(found, Link) else None
    if node is None:
        return
    for key in keys:
        if not name and key not in node.inputs:
            return
        held = graph.plain(node, key)
        if not isinstance(held, str):
            yield f"what {node} loads"
            return
        stem = held.replace("\\", "/").rpartition("/")[2].rpartition(".")[0].lower()
        if stem not in usual and not is_open(held):
            yield shown(held)
    precision = graph.plain(node, "precision")
    if precision is not None and not is_equal(precision, _USUAL_PRECISION):
        yield f"the precision {shown(precision)} of {node}"


def _selected(graph: Graph, node: WorkflowNode) -> Iterator[str]:
    slots = [("lora", "strength"), ("lora_name", "strength")]
    slots += [(f"lora_{n}", f"strength_{n}") for n in range(5)]
    held = [(graph.plain(node, name), graph.plain(node, much)) for name, much in slots]
    files = [(file, much) for file, much in held if file is not None]
    if not files:
        yield f"what {node} adds"
    for file, much in files:
        if file != "none":
            yield f"the LoRA {shown(file)} at {shown(much)}"
