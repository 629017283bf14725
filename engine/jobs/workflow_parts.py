"""Finds the part that each node of a workflow plays, from the video that it saves backwards.

What a node is for is where its links lead and who links to it, not its class: two nodes may load a
picture, and one of them is the picture of the clip. The graph that this engine does is written
down once, as parts and the inputs between them. The walk gives each part to the node that is
there. An input that leads elsewhere is told if the clip can be made without it, and an error if it
cannot. A node that is not known is passed, and told as left out, where all ways through it end at
the same node.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from engine.errors import BadRequest
from engine.jobs.workflow_graph import Graph, Link, WorkflowNode
from engine.jobs.workflow_settings import is_known

_MAX_SAVERS = 8  # each is looked through
_MAX_PASSED = 50  # on one way; those in use have four
_MAX_ENDS = 8  # that are compared, where unknown nodes lead to several
_SAVER = "VHS_VideoCombine"
_USUAL_SAVER = "139"  # its id, where there are several
_YES = (True, "true", "True")

_KINDS = {
    "decode": ("WanVideoDecode",),
    "sampler": ("WanVideoSamplerv2",),
    "scheduler": ("WanVideoSchedulerv2",),
    "prompts": ("WanVideoTextEncodeCached", "WanVideoTextEncode"),
    "extra": ("WanVideoSamplerExtraArgs",),
    "context": ("WanVideoContextOptions",),
    "loader": ("WanVideoModelLoader",),
    "embeds": ("WanVideoEmptyEmbeds",),
    "pose": ("WanVideoAddSCAILPoseEmbeds",),
    "reference": ("WanVideoAddSCAILReferenceEmbeds",),
    "picture": ("ImageResizeKJv2",),
    "image": ("LoadImage",),
    "render": ("RenderNLFPoses",),
    "joints": ("NLFPredict",),
    "dance": ("ImageResizeKJv2",),
    "video": ("VHS_LoadVideo", "VHS_LoadVideoPath"),
    "keypoints": ("PoseDetectionVitPoseToDWPose",),
    "stance": ("PoseDetectionVitPoseToDWPose",),  # keypoints of the picture
    "vision": ("WanVideoClipVisionEncode",),
    "vae": ("WanVideoVAELoader",),
}
# Nodes that add something to what they are given, and the input that it comes by
_THROUGH = {
    "WanVideoSetLoRAs": "model",
    "WanVideoSetBlockSwap": "model",
    "WanVideoAddSCAILPoseEmbeds": "embeds",
    "WanVideoAddSCAILReferenceEmbeds": "embeds",
    "GetImageSizeAndCount": "image",
}
# The inputs that lead to the parts that no clip can be made without: from, input, to
_MUST = (
    ("result", "images", "decode"),
    ("decode", "samples", "sampler"),
    ("sampler", "scheduler", "scheduler"),
    ("sampler", "text_embeds", "prompts"),
    ("sampler", "model", "loader"),
    ("sampler", "image_embeds", "embeds"),
    ("reference", "ref_image", "picture"),
    ("picture", "image", "image"),
    ("pose", "pose_images", "render"),
    ("render", "nlf_poses", "joints"),
    ("joints", "images", "dance"),
    ("dance", "image", "video"),
)
# Those that lead to the other parts, and what is done where they do not. Nothing is told of an
# input that is not there if nothing is done for it.
_MAY = (
    ("sampler", "extra_args", "extra", ""),
    ("extra", "context_options", "context", ""),
    ("decode", "vae", "vae", "with the VAE of this endpoint"),
    ("render", "dw_poses", "keypoints", "with the keypoints of the dance"),
    ("render", "ref_dw_pose", "stance", "aligned to the keypoints of the picture"),
    ("reference", "clip_embeds", "vision", "with the picture seen by CLIP"),
)
# The inputs that must bring what another part is, and its output
_SAME = (
    ("result", "audio", "video", 2),
    ("pose", "vae", "vae", 0),
    ("reference", "vae", "vae", 0),
    ("vision", "image_1", "picture", 0),
    ("keypoints", "images", "dance", 0),
    ("stance", "images", "picture", 0),
)


@dataclass(frozen=True, slots=True)
class Parts:
    """The nodes by the part that they play in the clip, and what is linked otherwise than here."""

    of: Mapping[str, WorkflowNode]  # by the names of `_KINDS`, and "result"
    passed: Sequence[WorkflowNode]  # on the ways between them
    told: Sequence[str]
    left_out: Sequence[WorkflowNode]  # of those that were passed, the unknown ones

    def __getitem__(self, part: str) -> WorkflowNode:
        return self.of[part]

    def get(self, part: str) -> WorkflowNode | None:
        return self.of.get(part)

    def known(self, graph: Graph) -> list[WorkflowNode]:
        """Lists all of known classes, with their LoRAs, in the order of the workflow."""
        found = (*self.of.values(), *self.passed, *self.loras(graph))
        ids = {node.id for node in found if is_known(node.kind)}
        return [node for node in graph.nodes.values() if node.id in ids]

    def loras(self, graph: Graph) -> Iterator[WorkflowNode]:
        """Yields the nodes that name LoRAs, on the way from the loader to the sampler."""
        ends = [
            graph.plain(node, "lora")
            for node in (self["loader"], *self.passed)
            if node.kind in ("WanVideoModelLoader", "WanVideoSetLoRAs")
        ]
        seen = set[str]()
        for end in ends:
            while isinstance(end, Link) and end.node.id not in seen:
                seen.add(end.node.id)
                yield end.node
                end = graph.plain(end.node, "prev_lora")


@dataclass(frozen=True, slots=True)
class Way:
    """Where an input leads."""

    first: Link | None  # None: nowhere
    ends: Sequence[Link]  # at nodes of the classes that are looked for
    passed: Sequence[WorkflowNode]
    again: WorkflowNode | None  # met twice


def find_parts(graph: Graph) -> Parts:
    """Walks the graph. Raises `BadRequest` for one that no clip can be made of."""
    walk = _Walk(graph)
    result, others = _result(graph)
    walk.parts["result"] = result
    walk.told += [f"{other} saves a video too, which is not made" for other in others]
    for start, name, part in _MUST:
        walk.must(start, name, part)
    _require_one(graph.ancestors(result), walk.parts["sampler"].kind)
    for start, name, part, done in _MAY:
        walk.may(start, name, part, done)
    for start, name, part, output in _SAME:
        walk.same(start, name, part, output)
    passed = {node.id: node for node in walk.passed}
    left_out = [node for node in passed.values() if not is_known(node.kind)]
    return Parts(walk.parts, tuple(passed.values()), walk.told, left_out)


class _Walk:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.parts: dict[str, WorkflowNode] = {}
        self.passed: list[WorkflowNode] = []
        self.told: list[str] = []

    def must(self, start: str, name: str, part: str) -> None:
        """Gives a part to the node that an input leads to. Raises `BadRequest` without one."""
        node, kinds = self.parts[start], _KINDS[part]
        way = find_way(self.graph, node, name, kinds)
        if not way.ends:
            raise BadRequest(lost(node, name, kinds, way))
        if not self._agree(way.ends):
            raise BadRequest(
                f"The input {name} of {node} leads to {way.ends[0]} and to {way.ends[1]} through "
                f"{way.passed[0]}, which is not known here; link the one that is meant."
            )
        self._take(part, name, node, way)
        if part == "embeds":
            for added in ("pose", "reference"):
                self.parts[added] = _require_one(way.passed, _KINDS[added][0])

    def may(self, start: str, name: str, part: str, done: str) -> None:
        """Gives a part to the node that an input leads to, or tells what is done without it."""
        node = self.parts.get(start)
        if node is None:
            return
        way = find_way(self.graph, node, name, _KINDS[part])
        if way.ends and self._agree(way.ends):
            self._take(part, name, node, way)
        elif way.first is None:
            if done:
                self.told.append(f"{name} of {node} comes from nothing, done {done}")
        else:
            self.told.append(f"{name} of {node} comes from {way.first}, done {done or 'without'}")

    def same(self, start: str, name: str, part: str, output: int) -> None:
        """Tells of an input that brings something else than a part that has been found."""
        node, wanted = self.parts.get(start), self.parts.get(part)
        if node is None or wanted is None:
            return
        way = find_way(self.graph, node, name, (wanted.kind,))
        done = str(Link(wanted, output))
        if way.first is None:
            if start != "result":
                self.told.append(f"{name} of {node} comes from nothing, done with {done}")
            elif node.inputs.get(name) is not None:  # else it is a video without sound
                self.told.append(f"{name} of {node} is no link, done without sound")
        elif way.ends and self._agree([Link(wanted, output), *way.ends]):
            self.passed += way.passed
        else:
            found = way.ends[0] if len(way.ends) == 1 else way.first
            self.told.append(f"{name} of {node} comes from {found}, done with {done}")

    def _take(self, part: str, name: str, node: WorkflowNode, way: Way) -> None:
        end = way.ends[0]
        self.parts[part] = end.node
        self.passed += way.passed
        if end.output != 0:
            self.told.append(f"{name} of {node} comes from {end}, done with its output 0")

    def _agree(self, ends: Sequence[Link]) -> bool:
        few = {(end.node.id, end.output): end for end in ends}
        return len(few) <= _MAX_ENDS and all(
            self.graph.is_same(ends[0], end) for end in few.values()
        )


def find_way(
    graph: Graph,
    node: WorkflowNode,
    name: str,
    kinds: Sequence[str],
    through: Mapping[str, str] = _THROUGH,
    is_known: Callable[[str], bool] = is_known,
) -> Way:
    """Follows an input to the nodes of `kinds`, through those that add to them or are unknown.

    `through` names the input that a node of a known class adds something to.
    """
    first = graph.link(node, name)
    waiting = [] if first is None else [first]
    ends: list[Link] = []
    passed: dict[str, WorkflowNode] = {}
    again = None
    for link in waiting:  # which grows
        here = link.node
        if here.kind in kinds:
            ends.append(link)
        elif here.id in passed or here is node:
            again = here
        elif link.output == 0 and (onward := through.get(here.kind)) is not None:
            passed[here.id] = here
            waiting += [source] if (source := graph.link(here, onward)) is not None else []
        elif not is_known(here.kind):
            passed[here.id] = here
            waiting += [found for key in here.inputs if (found := _source(graph, here, key))]
        if len(passed) > _MAX_PASSED:
            raise BadRequest(
                f"The input {name} of {node} leads through more than {_MAX_PASSED} nodes; link it "
                f"to a {kinds[0]} by a shorter way."
            )
    return Way(first, ends, tuple(passed.values()), again)


def _source(graph: Graph, node: WorkflowNode, name: str) -> Link | None:
    """Finds what an input of a node of an unknown class comes from; a list may be a value there."""
    found = graph.plain(node, name)
    return found if isinstance(found, Link) else None


def lost(node: WorkflowNode, name: str, kinds: Sequence[str], way: Way) -> str:
    """Says why an input leads to none of the nodes that it must lead to."""
    wanted = " or ".join(kinds)
    if way.again is not None:
        return f"The links of the workflow go in a circle through {way.again}."
    if way.first is None or not way.passed:
        here = "nothing" if way.first is None else str(way.first)
        return f"The input {name} of {node} comes from {here}; a {wanted} is expected."
    return f"There is no {wanted} behind the input {name} of {node}."


def _require_one(nodes: Iterable[WorkflowNode], kind: str) -> WorkflowNode:
    found = [node for node in nodes if node.kind == kind]
    if len(found) != 1:
        raise BadRequest(
            f"The clip of the workflow is made with {len(found)} nodes {kind}; exactly one is "
            "expected, as in the workflows of SCAIL for WanVideoWrapper."
        )
    return found[0]


def _result(graph: Graph) -> tuple[WorkflowNode, Sequence[WorkflowNode]]:
    """Finds the node that saves the clip, and others that save what is made of it."""
    savers = [node for node in graph.nodes.values() if node.kind == _SAVER]
    if len(savers) > _MAX_SAVERS:
        raise BadRequest(f"The workflow saves {len(savers)} videos; one is made.")
    decode = _KINDS["decode"]
    clips = [saver for saver in savers if any(n.kind in decode for n in graph.ancestors(saver))]
    bare = [saver for saver in clips if not _unknown_before(graph, saver)]
    kept = [saver for saver in clips if graph.plain(saver, "save_output") in _YES]
    usual = [saver for saver in clips if saver.id == _USUAL_SAVER]
    for chosen in (clips, usual, kept, bare):
        if len(chosen) == 1:
            return chosen[0], [saver for saver in clips if saver is not chosen[0]]
    raise BadRequest(
        f"The workflow saves {len(clips)} videos of a {decode[0]} through {_SAVER}; exactly one is "
        "expected."
    )


def _unknown_before(graph: Graph, saver: WorkflowNode) -> bool:
    way = find_way(graph, saver, "images", _KINDS["decode"])
    return not way.ends or any(not is_known(node.kind) for node in way.passed)
