"""Counts what a Python process has in use, told by the process itself at a signal.

Resident memory tells what the heap has grown to: a worker gives nothing back of it
(`engine.machine.heap`), and what is kept for long cuts what is free into pieces. A leak shows in
what is in use, to the byte, as soon as it begins.
"""

import os
import signal
import statistics
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

MOST_S = 30.0
READINGS, BETWEEN_S = 5, 0.05
NAME = "in-use"
# sitecustomize runs before the program. The fields are those of mallinfo2(3), of glibc 2.33 on.
TELLS = """
import ctypes, gc, os, signal, sys
FIELDS = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
class Heap(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in FIELDS.split()]
of_all_threads = ctypes.CDLL(None).mallinfo2
of_all_threads.restype = Heap
def tell(*_):
    gc.collect()
    heap = of_all_threads()
    path = {path!r}
    with open(path + ".part", "w") as part:
        part.write(f"{{heap.uordblks + heap.hblkhd}} {{sys.getallocatedblocks()}}")
    os.replace(path + ".part", path)
signal.signal(signal.SIGUSR1, tell)
"""


class InUse(NamedTuple):
    """What is allocated and not freed: bytes of the C heap, and Python's small objects."""

    heap_bytes: int
    blocks: int


def telling(folder: Path) -> dict[str, str]:
    """Writes into `folder` what makes a program tell; returns the environment to start it in."""
    place = folder / "tells"
    place.mkdir()
    text = TELLS.format(path=str(folder / NAME))
    (place / "sitecustomize.py").write_text(text, encoding="utf-8")
    others = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join([str(place), *([others] if others else [])])}


def in_use(process: int, folder: Path) -> InUse:
    """Asks a program in the environment of `telling`, which collects garbage first, some times: the
    least counts, as a connection that is being closed is there for a moment.
    """
    told = []
    for _ in range(READINGS):
        told.append(_asked(process, folder / NAME))
        time.sleep(BETWEEN_S)
    return InUse(*map(min, zip(*told, strict=True)))


def _asked(process: int, path: Path) -> InUse:
    ends = time.monotonic() + MOST_S
    path.unlink(missing_ok=True)
    os.kill(process, signal.SIGUSR1)
    while not path.exists():
        assert time.monotonic() < ends, f"the process said nothing within {MOST_S} s"
        time.sleep(0.01)
    return InUse(*map(int, path.read_text(encoding="utf-8").split()))


def grown(counts: Sequence[InUse]) -> InUse:
    """The usual growth from one count to the next: a table of the interpreter that is made anew,
    twice as large, is no leak.
    """
    steps = [[b - a for a, b in zip(*pair, strict=True)] for pair in pairwise(counts)]
    return InUse(*(int(statistics.median(kind)) for kind in zip(*steps, strict=True)))
