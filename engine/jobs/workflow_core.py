"""Reads a workflow of ComfyUI's own nodes, for SCAIL-2, as settings of a job.

The noise levels have the shift of the model that the scheduler reads, as in ComfyUI: where it reads
the model before the node that sets a shift, that is Wan's own of 8 (docs/reference/scail2.md 5, 8).
Masks come with the request or are made here, whatever node makes them in the workflow.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import TypeVar

from engine.errors import BadRequest
from engine.flow import Recipe, RecipeName
from engine.jobs.fields import flag, number, shown, text, whole, word
from engine.jobs.job import Draft
from engine.jobs.workflow_chain import Chain, Stretch, find_chain
from engine.jobs.workflow_core_masks import persons_of, told_of_masks
from engine.jobs.workflow_core_media import files_of, masks_of, told_of_media
from engine.jobs.workflow_core_nodes import (
    COLOURS,
    CORE_NODES,
    DEFAULT_SHIFT,
    FILE_OF,
    LOADERS,
    LORA,
    PICTURES,
    PROMPTS,
    SHIFTS,
    VIDEOS,
    holder,
    is_core,
    must,
)
from engine.jobs.workflow_graph import Graph, Link, WorkflowNode, is_equal
from engine.jobs.workflow_settings import differences, listed, told_of_nodes
from engine.jobs.workflow_sizes import side
from engine.recipes import RECIPES

Value = TypeVar("Value")

_LIKE: RecipeName = "turbo"  # the recipe that such a workflow changes
# The samplers of ComfyUI with their schedulers by what they are called here, and whether that is
# the very same.
_SAMPLERS: Mapping[tuple[str, str], tuple[str, bool]] = {
    ("euler", "simple"): ("euler_simple", True),
    ("uni_pc", "simple"): ("unipc", False),
}
# What a later segment should have as the first has it: values, and links
_SAME = ("width", "height", "replacement_mode", "pose_strength", "pose_start", "pose_end")
_SAME_LINKS = (
    "positive", "negative", "pose_video", "pose_video_mask", "reference_image",
    "reference_image_mask", "clip_vision_output",
)  # fmt: skip
_FPS_OF_VIDEO = ("GetVideoComponents", 2)


def read_core(graph: Graph) -> Draft:
    """Reads a workflow. Settings that a template leaves open are None.

    Raises `BadRequest` for what is no such workflow.
    """
    chain = find_chain(graph)
    node = chain.first.node
    video, _ = must(graph, node, "pose_video", VIDEOS)
    pictures = files_of(graph, node, "reference_image", PICTURES)
    masks = [*masks_of(graph, node, "reference_image_mask"), *([None] * len(pictures))]
    width, height = _size(graph, node)
    replaces = _value(graph, node, "replacement_mode", flag, False)
    made = graph.ancestors(chain.result)
    draft = Draft(
        like=_LIKE,
        recipe=_recipe(graph, chain.first),
        image=pictures[0],
        video=graph.value(video, FILE_OF.get(video.kind, "video"), text),
        prompt=_prompt(graph, chain.first, "positive"),
        negative_prompt=_prompt(graph, chain.first, "negative"),
        seed=graph.value(*holder(graph, chain.first.sampler, chain.first.kind.seed), whole),
        width=width,
        height=height,
        fps=_fps(graph, chain.result),
        frames=_frames(graph, chain, video),
        audio=graph.link(chain.result, "audio") is not None,
        mode=None if replaces is None else "replacement" if replaces else "animation",
        makes_masks=any(one.kind == COLOURS for one in made),
        mask_persons=persons_of(graph, made),
        mask=next(iter(masks_of(graph, node, "pose_video_mask")), None),
        reference_mask=masks[0],
        references=tuple(
            (name, mask) for name, mask in zip(pictures[1:], masks[1:]) if name is not None
        ),
    )
    return dataclasses.replace(draft, warnings=tuple(_warnings(graph, chain)))


def _value(
    graph: Graph, node: WorkflowNode, name: str, read: Callable[[object], Value], usual: Value
) -> Value | None:
    """Reads an input that may be left out."""
    return graph.value(node, name, read) if name in node.inputs else usual


def _recipe(graph: Graph, stretch: Stretch) -> Recipe:
    """Reads the recipe. Values that are left open are those of turbo."""
    kind, sampler, node = stretch.kind, stretch.sampler, stretch.node
    solver = graph.value(*holder(graph, sampler, kind.sampler), word)
    scheduler = graph.value(*holder(graph, sampler, kind.scheduler), word)
    said = {
        "sampler": None if None in (solver, scheduler) else _sampler(f"{solver}", f"{scheduler}"),
        "steps": graph.value(*holder(graph, sampler, kind.steps), whole),
        "cfg": graph.value(*holder(graph, sampler, kind.cfg), number),
        "shift": _shift(graph, stretch),
        "pose_from": _value(graph, node, "pose_start", number, 0.0),
        "pose_until": _value(graph, node, "pose_end", number, 1.0),
        "pose_strength": _value(graph, node, "pose_strength", number, 1.0),
    }
    known = {name: value for name, value in said.items() if value is not None}
    return dataclasses.replace(RECIPES["scail2"][_LIKE], **known)


def _sampler(solver: str, scheduler: str) -> str:
    if (solver, scheduler) not in _SAMPLERS:
        known = " or ".join(f"{one} with {other}" for one, other in _SAMPLERS)
        raise BadRequest(
            f"The workflow samples by {shown(solver)} with the scheduler {shown(scheduler)}; "
            f"{known} is expected."
        )
    return _SAMPLERS[solver, scheduler][0]


def _shift(graph: Graph, stretch: Stretch) -> float | None:
    """Reads the shift of the model that the noise levels are made for."""
    place = holder(graph, stretch.sampler, stretch.kind.grid_model)
    _, way = must(graph, *place, LOADERS)
    last = next((node for node in way.passed if node.kind == SHIFTS), None)
    return DEFAULT_SHIFT if last is None else graph.value(last, "shift", number)


def _prompt(graph: Graph, stretch: Stretch, name: str) -> str | None:
    """Reads a prompt; one that is put to zero is empty."""
    found, _ = must(graph, stretch.node, name, PROMPTS)
    return "" if found.kind == PROMPTS[1] else graph.value(found, "text", text)


def _size(graph: Graph, node: WorkflowNode) -> tuple[int | None, int | None]:
    """Reads the size of the clip; None where it is that of something that is not there yet."""
    try:
        width, height = (side(graph, node, name) for name in ("width", "height"))
    except BadRequest:
        return None, None
    return width, height


def _fps(graph: Graph, result: WorkflowNode) -> float | None:
    """Reads the rate of the clip; None for that of the video."""
    name = "fps" if result.kind == "CreateVideo" else "frame_rate"
    told = graph.plain(result, name)
    if isinstance(told, Link) and (told.node.kind, told.output) == _FPS_OF_VIDEO:
        return None
    return graph.value(result, name, number)


def _frames(graph: Graph, chain: Chain, video: WorkflowNode) -> int | None:
    """Counts the frames of the whole chain, if each of its segments says how many it has."""
    limits = [_value(graph, video, "frame_load_cap", whole, 0) or None]
    total: int | None = 0
    for place, stretch in enumerate(chain.stretches):
        if isinstance(graph.plain(stretch.node, "length"), Link):
            total = None
            break
        length = graph.value(stretch.node, "length", whole)
        seen = _value(graph, stretch.node, "previous_frame_count", whole, 5) if place else 0
        if length is None or seen is None or total is None:
            total = None
            break
        total += length - seen
    return min((limit for limit in (*limits, total) if limit is not None), default=None)


def _warnings(graph: Graph, chain: Chain) -> Iterator[str]:
    made = graph.ancestors(chain.result)
    yield from told_of_nodes(graph, made)
    if masks := [str(node) for node in made if node.kind == COLOURS]:
        yield (
            f"{listed(masks)} is read as the wish for masks. Those that are sent as mask and "
            "reference_mask are taken, else an endpoint with a segmenter makes them; without any "
            "the clip is unmasked."
        )
    if len(chain.stretches) > 1:
        yield (
            f"The chain of {len(chain.stretches)} segments is one clip here, cut evenly; all of "
            "it has the settings of the first."
        )
    if told := [*_told(graph, chain, made)]:
        yield f"Settings done another way: {listed(told)}."
    files = _files(graph, chain)
    yield f"Weights are those of this endpoint, not what the workflow names: {files}."


def _told(graph: Graph, chain: Chain, made: list[WorkflowNode]) -> Iterator[str]:
    first = chain.first
    yield from (f"{other} makes a video too, which is left out" for other in chain.others)
    yield from (f"{node} is left out" for node in made if not is_core(node.kind))
    solver = graph.value(*holder(graph, first.sampler, first.kind.sampler), word)
    scheduler = graph.value(*holder(graph, first.sampler, first.kind.scheduler), word)
    name, is_same = _SAMPLERS.get((f"{solver}", f"{scheduler}"), ("", True))
    if not is_same:
        yield f"{solver} with the scheduler {scheduler} is done as {name}, by its own noise levels"
    if first.node.inputs.get("previous_frames") is not None:
        yield f"previous_frames of {first.node} is left out: the clip begins there"
    if not is_equal(graph.plain(first.node, "video_frame_offset") or 0, 0):
        yield f"video_frame_offset of {first.node} is left out: the video begins at 0"
    if None in _size(graph, first.node):
        yield f"the size of {first.node}, done as the picture or the request has it"
    yield from told_of_media(graph, first.node)
    yield from told_of_masks(graph, first.node, made)
    for before, later in pairwise(chain.stretches):
        yield from _told_of_later(graph, first, before, later)
    savers = [node for node in graph.nodes.values() if _saves(graph, node, chain)]
    known = [node for node in (*made, *savers) if is_core(node.kind)]
    yield from differences(graph, known, CORE_NODES)


def _told_of_later(graph: Graph, first: Stretch, before: Stretch, later: Stretch) -> Iterator[str]:
    """Tells where a segment is made otherwise than the first, or of other frames than follow."""
    for key in _SAME:
        here, there = graph.plain(first.node, key), graph.plain(later.node, key)
        if not isinstance(here, Link) and not is_equal(here, there) and here != there:
            yield f"{key} of {later.node} is {shown(there)}, done as {shown(here)}"
    for key in _SAME_LINKS:
        here, there = graph.link(first.node, key), graph.link(later.node, key)
        if here is not None and (there is None or not graph.is_same(here, there)):
            yield f"{key} of {later.node} comes from {there or 'nothing'}, done from {here}"
    usual, own = _recipe(graph, first), _recipe(graph, later)
    for field in dataclasses.fields(Recipe):
        here, there = getattr(usual, field.name), getattr(own, field.name)
        if here != there and not field.name.startswith("pose_"):
            yield f"{field.name} of {later.sampler} is {shown(there)}, done as {shown(here)}"
    offset = graph.plain(later.node, "video_frame_offset")
    if not isinstance(offset, Link) or offset.node is not before.node:
        yield f"video_frame_offset of {later.node} is left out: each segment follows the last"


def _saves(graph: Graph, node: WorkflowNode, chain: Chain) -> bool:
    video = graph.plain(node, "video")
    return isinstance(video, Link) and video.node is chain.result


def _files(graph: Graph, chain: Chain) -> str:
    """Names the weights and LoRAs of the workflow."""
    place = holder(graph, chain.first.sampler, chain.first.kind.model)
    loader, way = must(graph, *place, LOADERS)
    key = "ckpt_name" if "ckpt_name" in loader.inputs else "unet_name"
    files = [shown(graph.plain(loader, key))]
    for lora in reversed([node for node in way.passed if node.kind == LORA]):
        file, much = graph.plain(lora, "lora_name"), graph.plain(lora, "strength_model")
        files.append(f"the LoRA {shown(file)} at {shown(much)}")
    return listed(files)
