"""All that can be shown of the compiled kernels without a GPU, one architecture at a time."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from kernels.aot.compile import compile_kernels
from kernels.aot.cubin import Cubin
from kernels.arch import ARCHS
from virtual_gpu.bank import VirtualBank, WrongKernel
from virtual_gpu.cases import ODD, OPS, every, table
from virtual_gpu.edges import edges
from virtual_gpu.measure import Check
from virtual_gpu.orders import ORDERS, UNWATCHED
from virtual_gpu.verdict import every_break, found_out, is_unread, sample


@dataclass(slots=True)
class Row:
    """What is known of one kernel."""

    cubin: Cubin
    launches: int = 0
    checks: int = 0
    worst: Check | None = None  # the error that is nearest to its limit
    wrong_codes: int | None = None  # None: it makes none


@dataclass(slots=True)
class Proven:
    """What was shown of one architecture. Plain data: it crosses processes."""

    arch: str
    rows: dict[str, Row] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    instructions: int = 0  # of warps


def prove_architecture(name: str, state: Path) -> Proven:
    """Runs all kernels of the 14B model at odd sizes in every order, and at the last blocks of the
    longest clip. They must have been compiled.
    """
    torch.set_num_threads(1)
    arch = next(arch for arch in ARCHS if arch.name == name)
    proven = Proven(name)
    for cubin in compile_kernels([(spec, arch) for spec in table(arch)], state):
        proven.rows[cubin.name] = Row(cubin)
    bank, large = VirtualBank(arch, state, ORDERS), VirtualBank(arch, state, [UNWATCHED])
    for op in OPS.values():
        _take(proven, op.run(bank, arch, ODD, every))
    _take(proven, edges(large))
    for held in (bank, large):
        for kernel, count in held.launches.items():
            proven.rows[kernel].launches += count
    proven.notes = sorted({f"{note.kernel}: {note.text}" for note in bank.notes})
    proven.failures += [f"{n} was not launched" for n, r in proven.rows.items() if not r.launches]
    proven.instructions = bank.machine.executed()
    return proven


def _take(proven: Proven, checks: Iterator[Check]) -> None:
    """Adds what was measured, and what stopped it."""
    try:
        for check in checks:
            row = proven.rows[check.kernel]
            row.checks += 1
            if not check.holds:
                proven.failures.append(f"{proven.arch}, {check}")
            if check.what == "wrong codes":
                row.wrong_codes = (row.wrong_codes or 0) + int(check.found)
            elif check.limit and _share(check) >= _share(row.worst):
                row.worst = check
    except WrongKernel as error:
        proven.failures.append(str(error))


def _share(check: Check | None) -> float:
    """Returns how much of its limit an error takes."""
    return check.found / check.limit if check is not None else -1.0


@dataclass(slots=True)
class Breaks:
    """What became of kernels that were broken on purpose."""

    by_kind: dict[str, tuple[int, int]] = field(default_factory=dict)  # found out, of how many
    survivors: list[str] = field(default_factory=list)
    places: int = 0  # that could have been broken
    unread: int = 0  # of those that were broken: nobody reads what is made there

    def count(self) -> tuple[int, int]:
        found, all_ = (sum(part[n] for part in self.by_kind.values()) for n in (0, 1))
        return found, all_


def try_breaks(state: Path, count: int, seed: int) -> Breaks:
    """Breaks `count` kernels of all architectures, which must have been compiled."""
    torch.set_num_threads(1)
    everything = every_break(ARCHS, state)
    tried: dict[str, list[bool]] = defaultdict(list)
    breaks = Breaks(places=len(everything))
    for number, broken in enumerate(sample(everything, count, seed), 1):
        seen = found_out(broken, state, number) is not None
        if not seen and is_unread(broken, state, number):
            breaks.unread += 1
            continue
        tried[broken.place.kind.name].append(seen)
        if not seen:
            breaks.survivors.append(f"{broken}. Harmless if {broken.place.kind.harmless}")
    breaks.by_kind = {kind: (sum(seen), len(seen)) for kind, seen in tried.items()}
    return breaks
