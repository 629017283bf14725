"""A ComfyUI workflow in its API format: nodes by id, and their links.

    {"106": {"class_type": "LoadImage", "inputs": {"image": "a.png"}}, ...}

A link is an input whose value is [id of a node, number of its output]. Templates write
"{{name}}" where a value is to be filled in: such a value is open, and reads as None.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from engine.errors import BadRequest
from engine.jobs.fields import glance, shown

Value = TypeVar("Value")

_MAX_NODES = 1000
_MAX_INPUTS = 100  # in one node; the largest that is known has 20
_OPEN = re.compile(r"\s*\{\{[^{}]*\}\}\s*")
_CONSTANTS = ("INTConstant", "FloatConstant", "StringConstant", "PrimitiveInt", "PrimitiveFloat")


@dataclass(frozen=True, slots=True, eq=False)
class WorkflowNode:
    id: str
    kind: str  # its class type
    inputs: Mapping[str, object]

    def __str__(self) -> str:
        return f"node {glance(self.id)} ({glance(self.kind)})"


@dataclass(frozen=True, slots=True)
class Graph:
    nodes: Mapping[str, WorkflowNode]

    def linked(self, node: WorkflowNode, name: str) -> WorkflowNode | None:
        """Finds the node that an input comes from; None for one with its own value, or none at all.

        Raises `BadRequest` for a link to a node that is not there.
        """
        link = node.inputs.get(name)
        if not isinstance(link, list):
            return None
        if len(link) != 2 or not isinstance(link[0], str) or link[0] not in self.nodes:
            raise BadRequest(
                f"The input {glance(name)} of {node} is no link to a node of the workflow."
            )
        return self.nodes[link[0]]

    def follow(self, node: WorkflowNode, name: str, *kinds: str) -> WorkflowNode:
        """Finds the node behind an input. Raises `BadRequest` unless it is one of `kinds`."""
        found = self.linked(node, name)
        if found is None or found.kind not in kinds:
            here = "nothing" if found is None else str(found)
            raise BadRequest(
                f"The input {name} of {node} comes from {here}; a {' or '.join(kinds)} is expected."
            )
        return found

    def value(self, node: WorkflowNode, name: str, read: Callable[[object], Value]) -> Value | None:
        """Reads the value of an input, or of the constant behind it; None if it is left open.

        Raises `BadRequest` for an input that is missing, or that `read` does not take.
        """
        holder, key = node, name
        if (source := self.linked(node, name)) is not None:
            if source.kind not in _CONSTANTS:
                raise BadRequest(
                    f"The input {name} of {node} comes from {source}; a value or a constant is "
                    "expected."
                )
            holder, key = source, "value"
        if key not in holder.inputs:
            raise BadRequest(f"The input {key} of {holder} is missing.")
        found = holder.inputs[key]
        if is_open(found):
            return None
        try:
            return read(found)
        except ValueError as error:
            raise BadRequest(
                f"The input {key} of {holder} is {shown(found)}; {error} is expected."
            ) from error

    def chain(self, node: WorkflowNode, *names: str) -> Iterator[WorkflowNode]:
        """Yields the node behind an input, the node behind that one, and so on to the last.

        At each node the first of `names` that comes from a node is followed.
        """
        seen = {node.id}
        here: WorkflowNode | None = node
        while here is not None:
            here = next((n for name in names if (n := self.linked(here, name)) is not None), None)
            if here is not None:
                if here.id in seen:
                    raise BadRequest(f"The links of the workflow go in a circle through {here}.")
                seen.add(here.id)
                yield here

    def ancestors(self, node: WorkflowNode) -> list[WorkflowNode]:
        """Lists the nodes that a node is made of, itself included, in the order of the workflow."""
        found, waiting = {node.id}, [node]
        while waiting:
            here = waiting.pop()
            for name in here.inputs:
                source = self.linked(here, name)
                if source is not None and source.id not in found:
                    found.add(source.id)
                    waiting.append(source)
        return [node for node in self.nodes.values() if node.id in found]


def read_graph(given: object) -> Graph:
    """Reads the nodes. Raises `BadRequest` for what is no workflow in the API format."""
    if not isinstance(given, dict):
        raise BadRequest(f"The workflow is {shown(given)}; an object of nodes is expected.")
    if isinstance(given.get("nodes"), list):
        raise BadRequest(
            "The workflow is as ComfyUI's editor saves it; export it in the API format."
        )
    if len(given) > _MAX_NODES:
        raise BadRequest(f"The workflow has {len(given)} nodes; at most {_MAX_NODES} are read.")
    return Graph({str(name): _node(str(name), node) for name, node in given.items()})


def is_open(value: object) -> bool:
    """Tells whether a value is a template's "{{name}}", which is still to be filled in."""
    return isinstance(value, str) and _OPEN.fullmatch(value) is not None


def _node(name: str, given: object) -> WorkflowNode:
    if isinstance(given, dict):
        kind, inputs = given.get("class_type"), given.get("inputs", {})
        if isinstance(kind, str) and isinstance(inputs, dict):
            if len(inputs) > _MAX_INPUTS:
                raise BadRequest(
                    f"The workflow's node {glance(name)} has {len(inputs)} inputs; at most "
                    f"{_MAX_INPUTS} are read."
                )
            return WorkflowNode(name, kind, inputs)
    raise BadRequest(
        f"The workflow's node {glance(name)} is no node; class_type and inputs are expected."
    )
