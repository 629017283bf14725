"""Compares two runs: what changed, and whether it is worse by more than chance.

python benchmarks/run.py compare BEFORE.json AFTER.json          exit 1 if anything is worse
python benchmarks/run.py compare BEFORE.json AFTER.json --across   of two machines: nothing is worse

A figure changed if it moved by more than the noise of both runs together. A measured time, rate or
memory must also move by 5 %: the noise is that of runs one after the other in one process, and two
processes differ by more, in where their memory lies and what else the machine does.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.record import PLACE, BadRecord, Figure, Record, read_record

FLOOR = 0.05  # of a measured figure, in a unit of `TIMED`
TIMED = {"us", "ms", "s", "ms/frame", "frames/s", "fps", "GB/s", "MB/s", "TFLOPS", "MiB", "GiB"}
REFUSED = 2  # exit status; 1 is a regression

Verdict = Literal["worse", "better", "same", "new", "missing"]
# What tells figures apart: a suite, a name, a unit, and if a clock or arithmetic gave it.
Key = tuple[str, str, str, str]


@dataclass(frozen=True, slots=True)
class FigureChange:
    """One figure of both runs; at least one has it."""

    key: Key
    before: Figure | None
    after: Figure | None

    @property
    def verdict(self) -> Verdict:
        if self.before is None or self.after is None:
            return "new" if self.before is None else "missing"
        moved = self.after.value - self.before.value
        if abs(moved) <= allowed(self.before, self.after):
            return "same"
        return "better" if (moved < 0) == (self.after.better == "lower") else "worse"


def allowed(before: Figure, after: Figure) -> float:
    """The distance that a figure may move by chance, in its unit."""
    timed = after.source == "measured" and after.unit in TIMED
    return max(before.noise + after.noise, FLOOR * abs(before.value) if timed else 0.0)


def compare(before: Record, after: Record) -> list[FigureChange]:
    """Pairs every figure of either run, in the order of the later one. Raises `BadRecord`."""
    old, new = _figures(before), _figures(after)
    if not old.keys() & new.keys():
        raise BadRecord("The two runs have no figure in common: there is nothing to compare")
    return [FigureChange(key, old.get(key), new.get(key)) for key in new | old]


def _figures(record: Record) -> dict[Key, Figure]:
    return {
        (name, figure.name, figure.unit, figure.source): figure
        for name, suite in record.suites.items()
        for figure in suite.figures
    }


def other_place(before: Record, after: Record) -> str:
    """Says what sets the machines of two runs apart; nothing for one machine."""
    return ", ".join(
        f"{key} {before.machine.get(key)} and {after.machine.get(key)}"
        for key in PLACE
        if before.machine.get(key) != after.machine.get(key)
    )


def compare_table(changes: Sequence[FigureChange]) -> str:
    """Lists what changed, worst news first; the last line says how much did not."""
    lines, counts = [], []
    for verdict in ("worse", "missing", "new", "better"):
        held = [change for change in changes if change.verdict == verdict]
        lines += [line for change in held for line in _lines(change)]
        counts.append(f"{len(held)} {verdict}")
    same = sum(change.verdict == "same" for change in changes)
    return "\n".join([*lines, f"{same} within noise, {', '.join(counts)}"])


def _lines(change: FigureChange) -> Iterator[str]:
    suite, name, _, source = change.key
    before, after = change.before, change.after
    yield f"{change.verdict:10}{suite}: {name}"
    ratio = ""
    if before is not None and after is not None and before.value:
        chance = allowed(before, after) / abs(before.value)
        ratio = f"  {after.value / before.value - 1:+.1%}, {chance:.1%} may be chance"
    yield f"{'':10}{_shown(before)} -> {_shown(after)} ({source}){ratio}"


def _shown(figure: Figure | None) -> str:
    if figure is None:
        return "nothing"
    return f"{figure.value:.4g} ± {figure.noise:.2g} {figure.unit}"


def main(argv: Sequence[str]) -> None:
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="run.py compare", description=about)
    parser.add_argument("before", type=Path, metavar="BEFORE.json")
    parser.add_argument("after", type=Path, metavar="AFTER.json")
    parser.add_argument("--across", action="store_true", help="the machines may differ")
    args = parser.parse_args(argv)
    try:
        before, after = read_record(args.before), read_record(args.after)
        apart = other_place(before, after)
        if apart and not args.across:
            raise BadRecord(
                f"The runs are of different machines ({apart}): what differs is no change of the "
                "program. Add --across to see it."
            )
        changes = compare(before, after)
    except BadRecord as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(REFUSED)
    for key in after.machine:
        if before.machine.get(key) != after.machine[key]:
            print(f"{key}: {before.machine.get(key)} -> {after.machine[key]}")
    print(compare_table(changes))
    if apart:
        print(f"Different machines ({apart}): nothing here is a regression.")
    elif any(change.verdict == "worse" for change in changes):
        sys.exit(1)
