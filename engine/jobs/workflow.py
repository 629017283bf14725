"""Reads a ComfyUI workflow of the WanVideoWrapper SCAIL kind as settings of a job.

Nodes are found by class type and links, from the video that the workflow saves backwards. Their
ids mean nothing here, but programs fill in values by id (docs/reference/runpod.md A.4): where the
usual id is not that of the node that is read, a warning says so. Others name every setting that
this engine does its own way.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from engine.config import LIMITS
from engine.errors import BadRequest
from engine.flow import Recipe
from engine.jobs.fields import glance, number, shown, text, whole, word
from engine.jobs.job import Draft
from engine.jobs.workflow_graph import Graph, WorkflowNode, is_open, read_graph
from engine.jobs.workflow_settings import difference, differences, listed
from engine.recipes import RECIPES

_MAX_SAVERS = 8  # each is looked through

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


@dataclass(frozen=True, slots=True)
class _Parts:
    """The nodes that say something about the clip."""

    nodes: Sequence[WorkflowNode]  # all that the result is made of
    result: WorkflowNode
    sampler: WorkflowNode
    scheduler: WorkflowNode
    prompts: WorkflowNode
    loader: WorkflowNode
    embeds: WorkflowNode
    pose: WorkflowNode
    render: WorkflowNode
    picture: WorkflowNode  # resized
    image: WorkflowNode
    dance: WorkflowNode  # resized
    video: WorkflowNode
    context: WorkflowNode | None

    def by_usual_id(self, graph: Graph) -> dict[str, WorkflowNode | None]:
        """Maps the ids of `_USUAL` to nodes that are read; 137 saves the skeleton and is not."""
        return {
            "22": self.loader, "99": self.embeds, "106": self.image, "130": self.video,
            "137": graph.nodes.get("137"), "139": self.result,
            "203": graph.linked(self.picture, "width"),
            "204": graph.linked(self.picture, "height"),
            "238": graph.linked(self.sampler, "cfg"), "348": self.sampler,
            "349": self.scheduler, "355": self.context, "368": self.prompts,
        }  # fmt: skip


def read_workflow(given: object) -> Draft:
    """Reads a workflow, an object of nodes. Settings that a template leaves open are None.

    Raises `BadRequest` for what is no such workflow.
    """
    graph = read_graph(given)
    parts = _find(graph)
    keep = graph.value(parts.picture, "keep_proportion", word)
    fps = graph.value(parts.result, "frame_rate", number)
    return Draft(
        recipe=_recipe(graph, parts),
        image=graph.value(parts.image, "image", text),
        video=graph.value(parts.video, "video", text),
        attention=graph.value(parts.loader, "attention_mode", word),
        prompt=graph.value(parts.prompts, "positive_prompt", text),
        negative_prompt=graph.value(parts.prompts, "negative_prompt", text),
        seed=graph.value(parts.sampler, "seed", whole),
        width=_side(graph, parts, "width"),
        height=_side(graph, parts, "height"),
        fps=fps,
        frames=_frames(graph, parts),
        audio=graph.linked(parts.result, "audio") is not None,
        fit="crop" if keep == "crop" else "resize" if keep == "resize" else None,
        warnings=tuple(_warnings(graph, parts, fps)),
    )


def _find(graph: Graph) -> _Parts:
    result, nodes = _result(graph)
    sampler = _only(nodes, "WanVideoSamplerv2")
    reference = _only(nodes, "WanVideoAddSCAILReferenceEmbeds")
    picture = graph.follow(reference, "ref_image", "ImageResizeKJv2")
    dance = graph.follow(_only(nodes, "NLFPredict"), "images", "ImageResizeKJv2")
    is_windowed = any(node.kind == "WanVideoContextOptions" for node in nodes)
    return _Parts(
        nodes,
        result,
        sampler,
        scheduler=graph.follow(sampler, "scheduler", "WanVideoSchedulerv2"),
        prompts=graph.follow(sampler, "text_embeds", "WanVideoTextEncodeCached"),
        loader=_behind(graph, sampler, "WanVideoModelLoader", "model"),
        embeds=_behind(graph, sampler, "WanVideoEmptyEmbeds", "image_embeds", "embeds"),
        pose=_only(nodes, "WanVideoAddSCAILPoseEmbeds"),
        render=_only(nodes, "RenderNLFPoses"),
        picture=picture,
        image=_behind(graph, picture, "LoadImage", "image"),
        dance=dance,
        video=_behind(graph, dance, "VHS_LoadVideo", "image"),
        context=_only(nodes, "WanVideoContextOptions") if is_windowed else None,
    )


def _result(graph: Graph) -> tuple[WorkflowNode, Sequence[WorkflowNode]]:
    """Finds the node that saves the clip, and all nodes that the clip is made of."""
    savers = [node for node in graph.nodes.values() if node.kind == "VHS_VideoCombine"]
    if len(savers) > _MAX_SAVERS:
        raise BadRequest(f"The workflow saves {len(savers)} videos; one is made.")
    made = [(saver, graph.ancestors(saver)) for saver in savers]
    clips = [(saver, of) for saver, of in made if any(n.kind == "WanVideoDecode" for n in of)]
    clips = [clip for clip in clips if clip[0].id == "139"] or clips
    if len(clips) != 1:
        raise BadRequest(
            f"The workflow saves {len(clips)} videos of a WanVideoDecode through VHS_VideoCombine; "
            "exactly one is expected."
        )
    return clips[0]


def _only(nodes: Sequence[WorkflowNode], kind: str) -> WorkflowNode:
    found = [node for node in nodes if node.kind == kind]
    if len(found) != 1:
        raise BadRequest(
            f"The clip of the workflow is made with {len(found)} nodes {kind}; exactly one is "
            "expected, as in the workflows of SCAIL for WanVideoWrapper."
        )
    return found[0]


def _behind(graph: Graph, node: WorkflowNode, kind: str, *names: str) -> WorkflowNode:
    """Finds the first node of a kind along a chain of inputs."""
    for found in graph.chain(node, *names):
        if found.kind == kind:
            return found
    raise BadRequest(f"There is no {kind} behind the input {names[0]} of {node}.")


def _recipe(graph: Graph, parts: _Parts) -> Recipe:
    """Reads the recipe. Values that are left open are those of production."""
    said = {
        "sampler": graph.value(parts.scheduler, "scheduler", word),
        "steps": graph.value(parts.scheduler, "steps", whole),
        "shift": graph.value(parts.scheduler, "shift", number),
        "cfg": graph.value(parts.sampler, "cfg", number),
        "pose_from": graph.value(parts.pose, "start_percent", number),
        "pose_until": graph.value(parts.pose, "end_percent", number),
        "pose_strength": graph.value(parts.pose, "strength", number),
        "window_frames": LIMITS.max_frames,  # without windows the clip is denoised at once
        "half_render": _is_half(graph, parts),
    }
    if parts.context is not None:
        said["window_frames"] = graph.value(parts.context, "context_frames", whole)
        said["overlap_frames"] = graph.value(parts.context, "context_overlap", whole)
    known = {name: value for name, value in said.items() if value is not None}
    return dataclasses.replace(RECIPES["production"], **known)


def _is_half(graph: Graph, parts: _Parts) -> bool | None:
    """Returns True for skeletons drawn at half the size of the clip, False at its size, or None."""
    halves: list[bool | None] = []
    for name in ("width", "height"):
        whole_side = graph.linked(parts.picture, name)
        drawn = graph.linked(parts.render, name)
        if drawn is not None and drawn.kind == "SimpleCalculatorKJ":
            is_half = drawn.inputs.get("expression") in ("a / 2", "a/2")
            is_sides = whole_side is not None and graph.linked(drawn, "a") is whole_side
            halves.append(True if is_half and is_sides else None)
        else:
            side = graph.value(parts.picture, name, whole)
            drawn_side = graph.value(parts.render, name, whole)
            is_half = side is not None and drawn_side == side // 2
            halves.append(True if is_half else False if drawn_side == side else None)
    return halves[0] if halves[0] == halves[1] else None


def _side(graph: Graph, parts: _Parts, name: str) -> int | None:
    is_pictures = graph.linked(parts.embeds, name) is parts.picture
    return graph.value(parts.picture if is_pictures else parts.embeds, name, whole)


def _frames(graph: Graph, parts: _Parts) -> int | None:
    """Returns the lowest of the limits on frames, if there is one."""
    limits = [graph.value(parts.video, "frame_load_cap", whole) or None]
    if graph.linked(parts.embeds, "num_frames") is None:
        limits.append(graph.value(parts.embeds, "num_frames", whole))
    return min((limit for limit in limits if limit is not None), default=None)


def _warnings(graph: Graph, parts: _Parts, fps: float | None) -> list[str]:
    said: list[str] = []
    if moved := _moved(graph, parts):
        said.append(f"Ids of nodes are not those that programs fill in: {listed(moved)}.")
    opened = [
        f"{glance(name)} of {node}"
        for node in parts.nodes
        for name, value in node.inputs.items()
        if is_open(value)
    ]
    if opened:
        said.append(f"Left open by the workflow: {listed(opened)}.")
    if differing := _differing(graph, parts, fps):
        said.append(f"Settings done another way: {listed(differing)}.")
    return [*said, _weights(parts)]


def _moved(graph: Graph, parts: _Parts) -> list[str]:
    moved: list[str] = []
    for usual, read in parts.by_usual_id(graph).items():
        there, kind = graph.nodes.get(usual), _USUAL[usual]
        if there is None:
            moved.append(f"there is no {usual} ({kind})")
        elif there.kind != kind:
            moved.append(f"{usual} is a {glance(there.kind)}, not a {kind}")
        elif there is not read:
            moved.append(f"the {kind} {usual} is not the one in use")
    return moved


def _differing(graph: Graph, parts: _Parts, fps: float | None) -> list[str]:
    found = differences(parts.nodes)
    rate = graph.value(parts.video, "force_rate", number)
    if None not in (fps, rate) and rate != fps:
        found.append(difference(parts.video, "force_rate", fps))
    keep = parts.picture.inputs.get("keep_proportion")
    if keep not in ("crop", "resize") and not is_open(keep):
        found.append(difference(parts.picture, "keep_proportion", "crop"))
    if parts.dance.inputs.get("keep_proportion") != "crop":
        found.append(difference(parts.dance, "keep_proportion", "crop"))
    if _is_half(graph, parts) is None:
        found.append(f"the size of {parts.render}, done as half of the clip")
    return found


def _weights(parts: _Parts) -> str:
    """Names the weights and LoRAs of the workflow. They are not used: a package has its own."""
    files = [shown(parts.loader.inputs.get("model"))]
    for node in parts.nodes:
        if node.kind == "WanVideoLoraSelect":
            strength = shown(node.inputs.get("strength"))
            files.append(f"the LoRA {shown(node.inputs.get('lora'))} at {strength}")
    return f"Weights are those of this endpoint, not what the workflow names: {listed(files)}."
