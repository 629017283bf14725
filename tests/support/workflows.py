"""Our workflows with inputs and nodes changed, and what is told of them."""

import json
from pathlib import Path

from engine.jobs.workflow import read_workflow

OURS = Path(__file__).resolve().parents[2] / "workflows"
LINKED = "Linked another way than it is done: "
MEDIA = {"n106_image": "ref.png", "n130_video": "dance.mp4"}


def workflow(name="dance-scail-bplan", nodes=None, **changes):
    """One of ours, with nodes added and inputs changed: n107_width=5 sets the input of node 107.

    Ellipsis takes an input away. Nodes are (class type, inputs) by their ids.
    """
    made = json.loads((OURS / f"{name}.json").read_text(encoding="utf-8"))
    for node, (kind, inputs) in (nodes or {}).items():
        made[node] = {"class_type": kind, "inputs": inputs}
    for place, value in changes.items():
        node, _, key = place[1:].partition("_")
        if value is ...:
            del made[node]["inputs"][key]
        else:
            made[node]["inputs"][key] = value
    return made


def told(given):
    """Returns what is told of a workflow and not of ours without a change, in one text."""
    usual = read_workflow(workflow()).warnings
    return " ".join(said for said in read_workflow(given).warnings if said not in usual)


def linked(given):
    """Returns what is told of links, as a list."""
    found = [said for said in read_workflow(given).warnings if said.startswith(LINKED)]
    return found[0].removeprefix(LINKED).removesuffix(".").split("; ") if found else []


def inputs_of(node, **changes):
    """The inputs of a node of ours, with some changed."""
    return {**workflow()[node]["inputs"], **changes}
