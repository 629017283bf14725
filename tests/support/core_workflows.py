"""Our workflows of SCAIL-2 with inputs and nodes changed."""

from engine.jobs.workflow import read_workflow
from tests.support.job_bodies import SCAIL2
from tests.support.workflows import workflow

TURBO, FULL, LONG = "scail2-turbo", "scail2-full", "scail2-replacement-long"
FILLED = {"n10_image": "me.png", "n11_file": "dance.mp4", "n20_text": "he dances"}


def core(name=TURBO, nodes=None, **changes):
    return workflow(name, nodes, **FILLED | changes)


def read(given):
    return read_workflow(given, SCAIL2)


def told(given):
    """Returns what is told of a workflow, in one text."""
    return " ".join(read(given).warnings)
