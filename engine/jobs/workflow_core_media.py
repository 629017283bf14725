"""The pictures and masks of a ComfyUI workflow of SCAIL-2: the files that its links lead to.

Masks that a node makes are no files, and nothing is cut out of what is read: both are told.
"""

from collections.abc import Iterator

from engine.errors import BadRequest
from engine.jobs.fields import text
from engine.jobs.workflow_core_nodes import (
    BATCHES,
    COLOURS,
    FILE_OF,
    PICTURES,
    VIDEOS,
    core_way,
    must,
)
from engine.jobs.workflow_graph import Graph, WorkflowNode

_MAX_PICTURES = 50  # followed through nodes that put pictures behind each other
_MASKS = ("pose_video_mask", "reference_image_mask")
_CUTS = "ImageFromBatch"
_EYE = "CLIPVisionEncode"


def files_of(
    graph: Graph, node: WorkflowNode, name: str, kinds: tuple[str, ...]
) -> list[str | None]:
    """Reads the names of the files in a batch in their order; None for one that is left open, or
    that a node makes. The first picture of a batch is the character.
    """
    found: list[WorkflowNode] = []
    waiting, looked = [(node, name)], 0
    while waiting:
        here, key = waiting.pop(0)
        looked += 1
        end, _ = must(graph, here, key, (*kinds, *BATCHES))
        if end.kind in BATCHES:
            waiting = [(end, one) for one in sorted(end.inputs) if "image" in one] + waiting
        else:
            found.append(end)
        if looked > _MAX_PICTURES:
            raise BadRequest(f"The input {name} of {node} leads through too many nodes.")
    if not found:
        raise BadRequest(f"The input {name} of {node} leads to a batch without pictures.")
    return [
        None if end.kind == COLOURS else graph.value(end, FILE_OF.get(end.kind, "video"), text)
        for end in found
    ]


def masks_of(graph: Graph, node: WorkflowNode, name: str) -> list[str | None]:
    """Reads the names of files with masks; none if there are none, None where a node makes one."""
    kinds = (*VIDEOS, *PICTURES, COLOURS)
    if not core_way(graph, node, name, (*kinds, *BATCHES)).ends:
        return []
    return files_of(graph, node, name, kinds)


def told_of_media(graph: Graph, node: WorkflowNode) -> Iterator[str]:
    """Tells of pictures and masks that are linked otherwise than they are taken here."""
    for name in _MASKS:
        way = core_way(graph, node, name, (*VIDEOS, *PICTURES, COLOURS, *BATCHES))
        if not way.ends and node.inputs.get(name) is not None:
            here = "is no link" if way.first is None else f"comes from {way.first}"
            yield f"{name} of {node} {here}, done without: masks come from files"
    pictures = files_of(graph, node, "reference_image", PICTURES)
    if (more := len(masks_of(graph, node, _MASKS[1])) - len(pictures)) > 0:
        yield f"{_MASKS[1]} of {node} has {more} more than there are pictures, which are left out"
    for name in ("pose_video", "reference_image", *_MASKS):
        way = core_way(graph, node, name, (*VIDEOS, *PICTURES, COLOURS, *BATCHES))
        for cut in (one for one in way.passed if one.kind == _CUTS):
            yield f"{cut} is left out: all frames count"
    yield from _told_of_eye(graph, node)


def _told_of_eye(graph: Graph, node: WorkflowNode) -> Iterator[str]:
    """Tells if CLIP sees nothing, or something else than the character's picture."""
    done = "done with the picture seen by CLIP"
    way = core_way(graph, node, "clip_vision_output", (_EYE,))
    if not way.ends:
        yield f"clip_vision_output of {node} comes from {way.first or 'nothing'}, {done}"
        return
    seen = core_way(graph, way.ends[0].node, "image", (*PICTURES, *BATCHES)).ends
    shown = core_way(graph, node, "reference_image", (*PICTURES, *BATCHES)).ends
    while shown and shown[0].node.kind in BATCHES:
        first = min((one for one in shown[0].node.inputs if "image" in one), default="")
        shown = core_way(graph, shown[0].node, first, (*PICTURES, *BATCHES)).ends
    if seen and shown and not graph.is_same(seen[0], shown[0]):
        yield f"image of {way.ends[0].node} comes from {seen[0]}, {done}"
