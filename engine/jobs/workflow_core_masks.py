"""What the nodes of a ComfyUI workflow say of the masks that they make, and what is done of it.

Masks are made here by another segmenter: of all persons that the picture shows, in order of first
appearance and from left to right, as `sort_by` left_to_right has it. A tracker that follows one
object at most asks for one person. All else is told (docs/reference/masks.md 6.5).
"""

from collections.abc import Iterator, Sequence

from engine.config import LIMITS
from engine.jobs.fields import flag, shown, whole
from engine.jobs.workflow_core_nodes import BATCHES, COLOURS, PICTURES, PROMPTS, VIDEOS, core_way
from engine.jobs.workflow_graph import Graph, Link, WorkflowNode, is_equal, is_open

TRACKER = "SAM3_VideoTrack"
_MOST, _WORDS = "max_objects", "conditioning"
# The inputs of a tracker that another segmenter has no use for, and their usual values
_OWN = {"detection_threshold": 0.5, "detect_interval": 1}
_PERSON = ("human", "person", "people", "character", "man", "woman", "dancer", "")
# What each mask of a clip is made of: the output, the tracker's input, and the media that it is of
_SIDES = (
    ("pose_video_mask", 0, "driving_track_data", "pose_video", VIDEOS),
    ("reference_image_mask", 1, "ref_track_data", "reference_image", (*PICTURES, *BATCHES)),
)


def persons_of(graph: Graph, made: Sequence[WorkflowNode]) -> int | None:
    """Finds how many persons the masks shall tell apart; None for as many as the picture shows.

    Of a larger number of objects the tracker takes as many as there are, so it is no order.
    """
    most = {_most(graph, tracker) for tracker in _trackers(graph, made, "driving_track_data")}
    return 1 if most == {1} else None


def told_of_masks(graph: Graph, node: WorkflowNode, made: Sequence[WorkflowNode]) -> Iterator[str]:
    """Tells what is done otherwise where masks are made for `node`, the first of its chain."""
    for painter in (one for one in made if one.kind == COLOURS):
        if _replaces(graph, painter) not in (None, _replaces(graph, node)):
            yield f"replacement_mode of {painter} is not that of {node}, done as the latter has it"
        few = graph.plain(painter, "object_indices")
        if isinstance(few, Link) or (few not in ("", None) and not is_open(few)):
            said = f"comes from {few}" if isinstance(few, Link) else f"is {shown(few)}"
            yield f"object_indices of {painter} {said}, done as all; who and persons say others"
        if (masks := graph.link(painter, "reference_masks")) is not None:
            yield f"reference_masks of {painter} comes from {masks}, done without"
    yield from _told_of_sides(graph, node)
    yield from _told_of_trackers(graph, made)


def _told_of_sides(graph: Graph, node: WorkflowNode) -> Iterator[str]:
    """Tells of a mask that is the other output of its node, or is made of other media."""
    for name, output, track, media, kinds in _SIDES:
        for end in core_way(graph, node, name, (COLOURS,)).ends:
            if end.output != output:
                yield f"{name} of {node} comes from {end}, done with its output {output}"
            tracker = graph.linked(end.node, track)
            if tracker is None or tracker.kind != TRACKER:
                here = "nothing" if tracker is None else tracker
                yield f"{track} of {end.node} comes from {here}, done with what {node} has"
                continue
            seen = core_way(graph, tracker, "images", kinds).ends
            used = core_way(graph, node, media, kinds).ends
            if not seen or (used and not graph.is_same(seen[0], used[0])):
                here = seen[0] if seen else graph.link(tracker, "images") or "nothing"
                yield f"images of {tracker} comes from {here}, done with {media} of {node}"


def _told_of_trackers(graph: Graph, made: Sequence[WorkflowNode]) -> Iterator[str]:
    told = set[str]()
    for track in ("driving_track_data", "ref_track_data"):
        for tracker in _trackers(graph, made, track):
            if tracker.id not in told:
                told.add(tracker.id)
                yield from _told_of_tracker(graph, tracker, track == "driving_track_data")


def _told_of_tracker(graph: Graph, tracker: WorkflowNode, is_driving: bool) -> Iterator[str]:
    most = _most(graph, tracker)
    if most is None:
        yield f"{_MOST} of {tracker} is no number, done as all in the picture"
    elif 0 < most < LIMITS.max_identities and (most > 1 or not is_driving):
        yield f"{_MOST} of {tracker} is {most}, done as all in the picture; persons says another"
    for name, usual in _OWN.items():
        value = graph.plain(tracker, name)
        if value is not None and not is_open(value) and not is_equal(value, usual):
            yield f"{name} of {tracker} is left out: masks are made by another segmenter"
    for end in core_way(graph, tracker, _WORDS, PROMPTS).ends:
        words = graph.plain(end.node, "text")
        if isinstance(words, str) and not is_open(words) and words.strip().lower() not in _PERSON:
            yield f"text of {end.node} is {shown(words)}, done as person: {tracker} finds others"


def _trackers(graph: Graph, made: Sequence[WorkflowNode], track: str) -> Iterator[WorkflowNode]:
    """Yields the trackers that an input of the nodes which paint masks comes from."""
    for painter in (one for one in made if one.kind == COLOURS):
        tracker = graph.linked(painter, track)
        if tracker is not None and tracker.kind == TRACKER:
            yield tracker


def _most(graph: Graph, tracker: WorkflowNode) -> int | None:
    """The most objects that a tracker follows, 0 for any number; None for what is no number."""
    value = graph.plain(tracker, _MOST)
    if value is None or is_open(value):
        return 0
    try:
        return max(whole(value), 0)
    except ValueError:
        return None


def _replaces(graph: Graph, node: WorkflowNode) -> bool | None:
    """Reads the mode of a node; None if it is left open or no mode."""
    value = graph.plain(node, "replacement_mode")
    try:
        return False if value is None else flag(value)
    except ValueError:
        return None
