"""Proves of Hopper's machine code that no register of a wgmma is touched before its wait.

A wgmma reads A and writes its sums while other instructions run, until a wait covers it. ptxas up
to 12.9 may give the registers of A away too early (triton-lang/triton#11781, mended in CUDA 13.3):
PTX does not show that, machine code does. The listing is read from the top, and each loop twice:
what is under way at its end meets the instructions at its head.
"""

import re
from dataclasses import dataclass

_LABEL = re.compile(r"^(\.L_\w+):")
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_WGMMA = re.compile(r"[A-Z]GMMA\.\d+x(\d+)x\d+\.(F16)?")
_TARGET = re.compile(r"\.L_\w+")
_GROUP_ENDS = "gsb0"  # on the last wgmma of a group, and on a wait for groups
# Instructions whose first operand is no result.
_NO_RESULT = ("ST", "BAR", "LDGSTS", "RED", "BRA", "EXIT", "DEPBAR", "LDGDEPBAR", "WARPSYNC")


@dataclass(frozen=True, slots=True)
class _Line:
    address: str
    name: str
    rest: str


@dataclass(frozen=True, slots=True)
class _UnderWay:
    address: str
    operands: frozenset[int]  # registers that it reads
    sums: frozenset[int]  # registers that it writes


def hazards(listing: str) -> list[str]:
    """Returns a sentence for each instruction of nvdisasm's listing that touches a register of a
    wgmma which was not waited for.
    """
    lines, places = _lines(listing)
    found: dict[str, None] = {}
    groups: list[list[_UnderWay]] = [[]]  # the last is not complete
    repeated, at = set(), 0
    while at < len(lines):
        line = lines[at]
        at += 1
        if wgmma := _WGMMA.match(line.name):
            groups[-1].append(_issued(line, int(wgmma[1]), bool(wgmma[2])))
            if _GROUP_ENDS in line.rest:
                groups.append([])
        elif line.name.startswith("WARPGROUP.DEPBAR"):
            allowed = int(line.rest.split(",")[-1], 0)
            groups = groups[max(0, len(groups) - 1 - allowed) :]
        else:
            found |= dict.fromkeys(_touched(line, groups))
        target = _TARGET.search(line.rest) if line.name == "BRA" else None
        place = places.get(target[0], at) if target else at
        if place < at and at not in repeated:
            repeated.add(at)
            at = place
    return list(found)


def _lines(listing: str) -> tuple[list[_Line], dict[str, int]]:
    """Returns the instructions, and the place of each label among them."""
    lines: list[_Line] = []
    places: dict[str, int] = {}
    for text in listing.splitlines():
        if label := _LABEL.match(text):
            places[label[1]] = len(lines)
        elif instruction := _INSTRUCTION.match(text):
            lines.append(_Line(*instruction.groups()))
    return lines, places


def _touched(line: _Line, groups: list[list[_UnderWay]]) -> list[str]:
    under_way = [one for group in groups for one in group]
    if not under_way:
        return []
    read, written = _registers(line.name, line.rest)
    return [
        f"{line.name} {line.rest.strip()} at {line.address} touches a register of the wgmma at "
        f"{one.address}, which was not waited for"
        for one in under_way
        if written & one.operands or (read | written) & one.sums
    ]


def _issued(line: _Line, columns: int, is_half: bool) -> _UnderWay:
    sums, left = (part.strip() for part in line.rest.split(",")[:2])
    first = int(sums.removeprefix("R").partition(".")[0])
    count = columns // 4 if is_half else columns // 2
    in_registers = re.match(r"R(\d+)", left)
    operands = range(int(in_registers[1]), int(in_registers[1]) + 4) if in_registers else ()
    return _UnderWay(line.address, frozenset(operands), frozenset(range(first, first + count)))


def _registers(name: str, rest: str) -> tuple[set[int], set[int]]:
    """Returns the registers that an instruction reads, and those that it writes."""
    size = 4 if ".128" in name else 2 if ".64" in name or ".WIDE" in name else 1
    used = {int(number) for number in re.findall(r"(?<!U)\bR(\d+)", rest)}
    result = None if name.startswith(_NO_RESULT) else re.match(r"R(\d+)", rest.strip())
    first = int(result[1]) if result else 0
    return used, set(range(first, first + size)) if result else set()
