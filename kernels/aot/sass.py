"""Counts the instructions of a kernel's main loop in nvdisasm's listing of its machine code."""

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from kernels.aot.cubin import Mix
from kernels.spec import BuildError

_LABEL = re.compile(r"^(\.L_\w+):")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_TARGET = re.compile(r"\.L_\w+")
# HMMA, IMMA, QMMA on registers; HGMMA, IGMMA, QGMMA of warpgroups
_MMA = re.compile(r"[A-Z]*MMA\b")


@dataclass(frozen=True, slots=True)
class _Line:
    label: str | None = None  # a place that can be jumped to
    name: str = ""  # or an instruction
    operands: str = ""


def disassemble(cubin: Path) -> str:
    """Returns the listing of a cubin by the nvdisasm that comes with Triton."""
    triton = find_spec("triton")
    if triton is None or triton.origin is None:
        raise BuildError("nvdisasm comes with Triton, which is not installed here")
    program = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    command = [str(program), "--print-code", str(cubin)]
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", errors="replace", check=False
    )
    if done.returncode:
        raise BuildError(f"nvdisasm cannot read {cubin.name}: {done.stderr.strip()}")
    return done.stdout


def main_loop(listing: str) -> Mix | None:
    """Finds the loop with the most matrix instructions, the smallest of several; None without."""
    lines = _lines(listing)
    places = {line.label: at for at, line in enumerate(lines) if line.label}
    loops = []
    for at, line in enumerate(lines):
        target = _TARGET.search(line.operands) if line.name == "BRA" else None
        begin = places.get(target[0], at) if target else at
        if begin < at:
            loops.append(_mix([body.name for body in lines[begin : at + 1] if body.name]))
    return max(loops, key=lambda mix: (sum(mix.mma.values()), -mix.instructions), default=None)


def _lines(listing: str) -> list[_Line]:
    lines = []
    for text in listing.splitlines():
        if label := _LABEL.match(text):
            lines.append(_Line(label=label[1]))
        elif instruction := _INSTRUCTION.match(text):
            lines.append(_Line(name=instruction[1], operands=instruction[2]))
    return lines


def _mix(names: list[str]) -> Mix:
    mma = Counter(name for name in names if _MMA.match(name))
    others = Counter(name.partition(".")[0] for name in names if not _MMA.match(name))
    return Mix(len(names), dict(mma), dict(others))
