"""Finds the segments of a ComfyUI workflow of SCAIL-2, from the video that it saves backwards.

A clip of one segment has one `WanSCAILToVideo` with one sampler. A longer one is a chain: each
segment is given the frames that the one before made. Such a chain is one long clip here, cut by
this engine's own plan (docs/reference/scail2.md 6).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from engine.errors import BadRequest
from engine.jobs.workflow_core_nodes import SAMPLERS, SEGMENT, SamplerKind, must
from engine.jobs.workflow_graph import Graph, WorkflowNode

_MAX_SEGMENTS = 30  # more frames than a clip may have
_SAVERS = ("CreateVideo", "VHS_VideoCombine")
_PREVIOUS = "previous_frames"


@dataclass(frozen=True, slots=True)
class Stretch:
    """A segment: the node that prepares it and the one that denoises it."""

    node: WorkflowNode
    sampler: WorkflowNode

    @property
    def kind(self) -> SamplerKind:
        return SAMPLERS[self.sampler.kind]


@dataclass(frozen=True, slots=True)
class Chain:
    """The segments of the clip in their order, and the node that makes it a video."""

    result: WorkflowNode
    stretches: Sequence[Stretch]
    others: Sequence[WorkflowNode]  # that make videos of parts of it

    @property
    def first(self) -> Stretch:
        return self.stretches[0]


def find_chain(graph: Graph) -> Chain:
    """Finds the parts. Raises `BadRequest` for a workflow that saves no such clip."""
    held = [node for node in graph.nodes.values() if node.kind == SEGMENT]
    if len(held) > _MAX_SEGMENTS:
        raise BadRequest(f"The workflow has {len(held)} {SEGMENT}; at most {_MAX_SEGMENTS} do.")
    result, others = _result(graph)
    samplers = _samplers(graph, result)
    behind = {
        node.id: [one for one in graph.ancestors(node) if one.kind == SEGMENT]
        for node in _segments(graph, result)
    }
    ordered = sorted(behind, key=lambda name: len(behind[name]))
    if not all(_follows(graph, graph.nodes[name], ordered[:n]) for n, name in enumerate(ordered)):
        raise BadRequest(
            f"The {len(ordered)} {SEGMENT} of the workflow are no chain: each but the first must "
            f"have the frames of the one before it as {_PREVIOUS}."
        )
    stretches = [_stretch(graph.nodes[name], samplers) for name in ordered]
    return Chain(result, stretches, others)


def _follows(graph: Graph, node: WorkflowNode, before: Sequence[str]) -> bool:
    """Tells whether a segment is given frames that all segments `before` it had a part in."""
    if not before:
        return _segments(graph, node) == [node]
    link = graph.link(node, _PREVIOUS)
    return link is not None and {one.id for one in _segments(graph, link.node)} == {*before}


def _segments(graph: Graph, node: WorkflowNode) -> list[WorkflowNode]:
    return [one for one in graph.ancestors(node) if one.kind == SEGMENT]


def _result(graph: Graph) -> tuple[WorkflowNode, Sequence[WorkflowNode]]:
    """Finds the video that all segments are in; others show parts of it."""
    savers = [node for node in graph.nodes.values() if node.kind in _SAVERS]
    clips = {node.id: len(_segments(graph, node)) for node in savers[:_MAX_SEGMENTS]}
    most = max(clips.values(), default=0)
    whole = [name for name, count in clips.items() if count == most > 0]
    if len(whole) != 1:
        raise BadRequest(
            f"The workflow makes {len(whole)} videos of a {SEGMENT} through {_SAVERS[0]} or "
            f"{_SAVERS[1]}; exactly one is expected."
        )
    parts = [name for name, count in clips.items() if count and name != whole[0]]
    return graph.nodes[whole[0]], [graph.nodes[name] for name in parts]


def _samplers(graph: Graph, result: WorkflowNode) -> dict[str, list[WorkflowNode]]:
    """Finds the samplers by the segment whose latents they denoise."""
    found: dict[str, list[WorkflowNode]] = {}
    for node in graph.ancestors(result):
        if node.kind in SAMPLERS:
            segment, _ = must(graph, node, SAMPLERS[node.kind].latent, (SEGMENT,))
            found.setdefault(segment.id, []).append(node)
    return found


def _stretch(segment: WorkflowNode, samplers: dict[str, list[WorkflowNode]]) -> Stretch:
    found = samplers.get(segment.id, [])
    if len(found) != 1:
        known = ", ".join(SAMPLERS)
        raise BadRequest(
            f"The {segment} has {len(found)} samplers; exactly one is expected, of "
            f"the classes {known}."
        )
    return Stretch(segment, found[0])
