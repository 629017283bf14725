"""Reads a ComfyUI workflow as settings of a job: of which family it is, and whether that is served.

Each kind of model has a family of nodes of its own. What a workflow of the other family says is not
understood by half: it ends in a sentence.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from engine.config import KINDS
from engine.errors import BadRequest
from engine.flow import KindName
from engine.jobs.job import Draft
from engine.jobs.served import PREVIEW, Served
from engine.jobs.workflow_core import read_core
from engine.jobs.workflow_graph import Graph, read_graph
from engine.jobs.workflow_wrapper import read_wrapper


@dataclass(frozen=True, slots=True)
class Family:
    """The workflows of a kind of model."""

    marks: tuple[str, ...]  # classes that no workflow of the other family has
    read: Callable[[Graph], Draft]


FAMILIES: Mapping[KindName, Family] = {
    "preview": Family(("WanVideoAddSCAILPoseEmbeds", "WanVideoSamplerv2"), read_wrapper),
    "scail2": Family(("WanSCAILToVideo",), read_core),
}


def read_workflow(given: object, served: Served = PREVIEW) -> Draft:
    """Reads a workflow, an object of nodes. Settings that a template leaves open are None.

    Raises `BadRequest` for what is no workflow of the model that is served.
    """
    graph = read_graph(given)
    found = {node.kind: node for node in graph.nodes.values()}
    own = FAMILIES[served.kind.name]
    for kind, family in FAMILIES.items():
        mark = next((found[name] for name in family.marks if name in found), None)
        if mark is None or family is own or any(name in found for name in own.marks):
            continue
        raise BadRequest(
            f"The workflow is for {KINDS[kind].title}: it has {mark}. {served.who.capitalize()} "
            f"serves {served.kind.title}."
        )
    return own.read(graph)
