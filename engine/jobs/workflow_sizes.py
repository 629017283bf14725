"""Reads the sides of a picture in a workflow, through the nodes that hand on or compute them."""

import ast
import math
import operator
from collections.abc import Callable, Mapping

from engine.errors import BadRequest
from engine.jobs.fields import number, shown, text, whole
from engine.jobs.workflow_graph import Graph, WorkflowNode

_MAX_STEPS = 20  # from node to node
_MAX_SUMS = 4  # one behind the other
_MAX_CHARS, _MAX_INPUTS = 100, 4  # of one expression
_CALCULATOR = "SimpleCalculatorKJ"
_RESIZES = "ImageResizeKJv2"
# Nodes with a side of a picture among their outputs: the first of width and height
_SIDES = {_RESIZES: 1, "GetImageSizeAndCount": 1, "GetImageSize": 0, "GetImageSizeKJ": 0}
_NAMES = ("width", "height")

_BINARY: Mapping[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_CALLS: Mapping[str, Callable[..., float]] = {
    "abs": math.fabs,
    "ceil": math.ceil,
    "floor": math.floor,
    "int": lambda value: int(value),
    "round": lambda value: round(value),
}


def side(graph: Graph, node: WorkflowNode, name: str, opened: float | None = None) -> int | None:
    """Returns the number of pixels that an input says; `opened` for what is left open.

    Raises `BadRequest` for what is no number of pixels, or comes from a node that is not known.
    """
    found = _number(graph, node, name, whole, opened, 0)
    return None if found is None else int(found)


def _number(
    graph: Graph,
    node: WorkflowNode,
    name: str,
    read: Callable[[object], float],
    opened: float | None,
    steps: int,
) -> float | None:
    if steps > _MAX_STEPS:
        raise BadRequest(f"The input {name} of {node} goes through too many nodes, or in a circle.")
    link = graph.link(node, name)
    if link is not None and link.node.kind == _CALCULATOR:
        return _computed(graph, link.node, opened, steps + _MAX_STEPS // _MAX_SUMS)
    if link is not None and (first := _SIDES.get(link.node.kind)) is not None:
        if not 0 <= link.output - first < len(_NAMES):
            raise BadRequest(f"The input {name} of {node} comes from {link}, which is no side.")
        resized = _resized(graph, link.node, steps)
        return _number(graph, resized, _NAMES[link.output - first], whole, opened, steps + 1)
    found = graph.value(node, name, read)
    return opened if found is None else found


def _resized(graph: Graph, node: WorkflowNode, steps: int) -> WorkflowNode:
    """Finds the node that made the picture whose size a node tells."""
    for _ in range(steps, _MAX_STEPS):
        if node.kind == _RESIZES:
            return node
        link = graph.link(node, "image")
        if link is None or link.output != 0:
            break
        node = link.node
    raise BadRequest(f"The size that {node} tells is not that of a {_RESIZES}.")


def _computed(graph: Graph, node: WorkflowNode, opened: float | None, steps: int) -> float | None:
    """Computes the sum of a calculator: arithmetic of its inputs, and no more than that."""
    said = graph.value(node, "expression", text)
    if said is None:
        return opened
    try:
        if len(said) > _MAX_CHARS:
            raise ValueError
        tree = ast.parse(said.strip(), mode="eval").body
        names = {part.id for part in ast.walk(tree) if isinstance(part, ast.Name)} - _CALLS.keys()
        if len(names) > _MAX_INPUTS:
            raise ValueError
        held = {name: _number(graph, node, name, number, opened, steps) for name in sorted(names)}
        known = {name: value for name, value in held.items() if value is not None}
        return float(int(_value(tree, known))) if len(known) == len(held) else None
    except (ValueError, TypeError, ArithmeticError, SyntaxError, RecursionError, MemoryError):
        raise BadRequest(
            f"The input expression of {node} is {shown(said)}; arithmetic of its inputs is "
            "expected."
        ) from None


def _value(tree: ast.expr, known: Mapping[str, float]) -> float:
    """Computes an expression. Raises `ValueError` for what is no arithmetic."""
    if isinstance(tree, ast.Constant):
        return number(tree.value)
    if isinstance(tree, ast.Name):
        return float(known[tree.id]) if tree.id in known else number(None)
    if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub):
        return -_value(tree.operand, known)
    if isinstance(tree, ast.BinOp) and (compute := _BINARY.get(type(tree.op))) is not None:
        return compute(_value(tree.left, known), _value(tree.right, known))
    if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and not tree.keywords:
        compute = _CALLS.get(tree.func.id, _no_call)
        return compute(*(_value(part, known) for part in tree.args))
    raise ValueError("arithmetic")


def _no_call(*_: float) -> float:
    raise ValueError("arithmetic")
