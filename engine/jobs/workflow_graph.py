"""A ComfyUI workflow in its API format: nodes by id, and their links.

    {"106": {"class_type": "LoadImage", "inputs": {"image": "a.png"}}, ...}

A link is an input whose value is [id of a node, number of its output]. Nodes that only hand on what
they are given (Reroute, SetNode, GetNode) are seen through: a link comes from what lies behind
them. Templates write "{{name}}" where a value is to be filled in: such a value is open, and reads
as None.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from engine.errors import BadRequest
from engine.jobs.fields import glance, number, shown, whole

Value = TypeVar("Value")

_MAX_NODES = 1000
_MAX_INPUTS = 100  # in one node; the largest that is known has 20
_MAX_WIRES = 50  # one after the other
_MAX_PAIRS = 200  # of nodes, that are compared before two parts count as different
_OPEN = re.compile(r"\s*\{\{[^{}]*\}\}\s*")
_OFF = (2, 4)  # muted, bypassed: marks of ComfyUI's editor, which no server reads

# Nodes that hold one value, and the inputs that it may be called
_CONSTANTS = {
    **dict.fromkeys(
        ("INTConstant", "FloatConstant", "BOOLConstant", "PrimitiveInt", "PrimitiveFloat",
         "PrimitiveBoolean", "PrimitiveString", "PrimitiveStringMultiline", "PrimitiveNode",
         "easy int", "easy float", "easy string", "easy boolean", "ImpactInt", "ImpactFloat",
         "ImpactBoolean", "JWInteger", "JWFloat", "Int", "Float", "String", "Bool"),
        ("value",),
    ),
    **dict.fromkeys(
        ("JWString", "JWStringMultiline", "Text Multiline", "CR Text", "ttN text",
         "ShowText|pysssss"),
        ("text",),
    ),
    **dict.fromkeys(
        ("Primitive string [Crystools]", "Primitive string multiline [Crystools]",
         "String Literal", "String Literal (Image Saver)"),
        ("string",),
    ),
    **dict.fromkeys(("StringConstant", "StringConstantMultiline"), ("string", "value")),
    "Int Literal": ("int",),
    "Float Literal": ("float",),
    "Primitive integer [Crystools]": ("int",),
    "Primitive float [Crystools]": ("float",),
    "Primitive boolean [Crystools]": ("boolean",),
    "CR Prompt Text": ("prompt",),
    "easy positive": ("positive",),
    "easy negative": ("negative",),
    "Seed (rgthree)": ("seed",),
    "easy seed": ("seed",),
}  # fmt: skip
_SETS, _GETS = "SetNode", "GetNode"  # the second continues at the first of the same name
_WIRES = ("Reroute", "Reroute (rgthree)", _SETS)  # have one link, whatever its input is called


@dataclass(frozen=True, slots=True, eq=False)
class WorkflowNode:
    id: str
    kind: str  # its class type
    inputs: Mapping[str, object]
    is_off: bool = False  # marked as muted or bypassed

    def __str__(self) -> str:
        return f"node {glance(self.id)} ({glance(self.kind)})"


@dataclass(frozen=True, slots=True, eq=False)
class Link:
    """What an input comes from."""

    node: WorkflowNode
    output: int

    def __str__(self) -> str:
        return str(self.node) if self.output == 0 else f"output {self.output} of {self.node}"


@dataclass(frozen=True, slots=True)
class Graph:
    nodes: Mapping[str, WorkflowNode]
    wires: Mapping[str, WorkflowNode | None]  # SetNodes by their names; None: there are several

    def link(self, node: WorkflowNode, name: str) -> Link | None:
        """Finds what an input comes from; None for one with its own value, or none at all.

        Raises `BadRequest` for a link to a node that is not there, and for wires in a circle.
        """
        given = node.inputs.get(name)
        if not isinstance(given, list):
            return None
        if (found := self._end(given)) is None:
            raise BadRequest(
                f"The input {glance(name)} of {node} is no link to a node of the workflow."
            )
        return self._behind_wires(found)

    def linked(self, node: WorkflowNode, name: str) -> WorkflowNode | None:
        """Finds the node that an input comes from, as `link` does."""
        found = self.link(node, name)
        return None if found is None else found.node

    def value(self, node: WorkflowNode, name: str, read: Callable[[object], Value]) -> Value | None:
        """Reads the value of an input, or of the constant behind it; None if it is left open.

        Raises `BadRequest` for an input that is missing, or that `read` does not take.
        """
        holder, key = self._holder(node, name)
        if key not in holder.inputs:
            raise BadRequest(f"The input {key} of {holder} is missing.")
        found = holder.inputs[key]
        if is_open(found):
            return None
        try:
            return read(found)
        except ValueError as error:
            raise BadRequest(
                f"The input {glance(key)} of {holder} is {shown(found)}; {error} is expected."
            ) from error

    def plain(self, node: WorkflowNode, name: str) -> object:
        """Returns the value of an input, or of the constant behind it, as it was written.

        What comes from another node is a `Link`; what is not there is None.
        """
        try:
            holder, key = self._holder(node, name)
            return holder.inputs.get(key)
        except BadRequest:  # from a node that is no constant, or a list that is no link
            found = self._end(given := node.inputs.get(name))
            return given if found is None else self._behind_wires(found)

    def ancestors(self, node: WorkflowNode) -> list[WorkflowNode]:
        """Lists the nodes that a node is made of, itself included, in the order of the workflow."""
        found, waiting = {node.id}, [node]
        while waiting:
            for source in self.sources(waiting.pop()):
                if source.node.id not in found:
                    found.add(source.node.id)
                    waiting.append(source.node)
        return [node for node in self.nodes.values() if node.id in found]

    def sources(self, node: WorkflowNode) -> Iterator[Link]:
        """Yields what the inputs of a node come from; a list that is no link is a value."""
        for given in node.inputs.values():
            if (found := self._end(given)) is not None:
                yield found
        if node.kind == _GETS and (wire := self._wire(node)) is not None:
            yield wire

    def is_same(self, one: Link, other: Link) -> bool:
        """Tells whether two links bring the same: one node, or two that are alike all the way."""
        waiting, seen = [(one, other)], set[tuple[str, str]]()
        while waiting:
            here, there = waiting.pop()
            if here.output != there.output:
                return False
            pair = here.node.id, there.node.id
            if here.node is there.node or pair in seen:
                continue
            seen.add(pair)
            if len(seen) > _MAX_PAIRS or not self._are_alike(here.node, there.node, waiting):
                return False
        return True

    def _are_alike(
        self, one: WorkflowNode, other: WorkflowNode, waiting: list[tuple[Link, Link]]
    ) -> bool:
        """Compares two nodes but for their links, which are put among those that wait."""
        if one.kind != other.kind or one.inputs.keys() != other.inputs.keys():
            return False
        for name in one.inputs:
            here, there = self.plain(one, name), self.plain(other, name)
            if isinstance(here, Link) and isinstance(there, Link):
                waiting.append((here, there))
            elif not is_equal(here, there):
                return False
        return True

    def _end(self, given: object) -> Link | None:
        """Reads a link as it is written; None for what is no link to a node that is there."""
        if not isinstance(given, list) or len(given) != 2 or not isinstance(given[0], (str, int)):
            return None
        try:
            output = whole(given[1])
            node = self.nodes.get(given[0] if isinstance(given[0], str) else str(whole(given[0])))
        except ValueError:
            return None
        return None if node is None or output < 0 else Link(node, output)

    def _behind_wires(self, found: Link) -> Link:
        passed = set[str]()
        while (wire := self._wire(found.node)) is not None:
            if found.node.id in passed or len(passed) == _MAX_WIRES:
                raise BadRequest(
                    f"The links of the workflow go in a circle through {found.node}, or through "
                    f"more than {_MAX_WIRES} nodes that only hand on."
                )
            passed.add(found.node.id)
            found = wire
        return found

    def _wire(self, node: WorkflowNode) -> Link | None:
        """Finds where a node that only hands on is fed; None for every other node."""
        if node.kind == _GETS:
            ends = [end for name in _texts(node) if (end := self.wires.get(name)) is not None]
            return Link(ends[0], 0) if len(ends) == 1 else None
        if node.kind in _WIRES:
            return next(self.sources(node), None)
        return None

    def _holder(self, node: WorkflowNode, name: str) -> tuple[WorkflowNode, str]:
        """Finds the node and the input that hold a value: those given, or a constant's."""
        passed = set[str]()
        while (link := self.link(node, name)) is not None:
            keys = _CONSTANTS.get(link.node.kind)
            if keys is None or link.output != 0:
                raise BadRequest(
                    f"The input {name} of {node} comes from {link}; a value or a constant is "
                    "expected."
                )
            if link.node.id in passed or len(passed) == _MAX_WIRES:
                raise BadRequest(
                    f"The links of the workflow go in a circle through {link.node}, or through "
                    f"more than {_MAX_WIRES} constants."
                )
            passed.add(link.node.id)
            node, name = link.node, next((k for k in keys if k in link.node.inputs), keys[0])
        return node, name


def read_graph(given: object) -> Graph:
    """Reads the nodes. Raises `BadRequest` for what is no workflow in the API format."""
    if not isinstance(given, dict):
        raise BadRequest(f"The workflow is {shown(given)}; an object of nodes is expected.")
    if isinstance(given.get("nodes"), list):
        raise BadRequest(
            "The workflow is as ComfyUI's editor saves it; export it in the API format."
        )
    wrapped = given.get("prompt")  # as in the body that ComfyUI's own server takes
    given = wrapped if isinstance(wrapped, dict) and "class_type" not in wrapped else given
    if len(given) > _MAX_NODES:
        raise BadRequest(f"The workflow has {len(given)} nodes; at most {_MAX_NODES} are read.")
    nodes = {str(name): _node(str(name), node) for name, node in given.items()}
    wires: dict[str, WorkflowNode | None] = {}
    for node in nodes.values():
        if node.kind == _SETS:
            wires.update({name: None if name in wires else node for name in _texts(node)})
    return Graph(nodes, wires)


def is_open(value: object) -> bool:
    """Tells whether a value is a template's "{{name}}", which is still to be filled in."""
    return isinstance(value, str) and _OPEN.fullmatch(value) is not None


def is_equal(one: object, other: object) -> bool:
    """Tells whether two plain values say the same; a number may be a string."""
    try:
        return number(one) == number(other)
    except ValueError:
        pass
    kinds = (str, bool, int, float, type(None))  # what lies deeper is not compared
    return isinstance(one, kinds) and type(one) is type(other) and one == other


def _texts(node: WorkflowNode) -> set[str]:
    return {value for value in node.inputs.values() if isinstance(value, str)}


def _node(name: str, given: object) -> WorkflowNode:
    if isinstance(given, dict):
        kind, inputs = given.get("class_type"), given.get("inputs", {})
        if isinstance(kind, str) and isinstance(inputs, dict):
            if len(inputs) > _MAX_INPUTS:
                raise BadRequest(
                    f"The workflow's node {glance(name)} has {len(inputs)} inputs; at most "
                    f"{_MAX_INPUTS} are read."
                )
            inputs = {str(key): value for key, value in inputs.items()}
            return WorkflowNode(name, kind, inputs, given.get("mode") in _OFF)
    raise BadRequest(
        f"The workflow's node {glance(name)} is no node; class_type and inputs are expected."
    )
