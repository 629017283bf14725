"""Writes `RESULTS.md` from the runs beside it: what was measured, where, and what was not.

python benchmarks/run.py report          after --keep has done the same

Measured figures and estimates never share a table. The latest run of a suite on a machine is shown;
what it replaced is in the older files, for `run.py compare`.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.record import BadRecord, Figure, Record, read_record, slug

RESULTS = Path(__file__).with_name("results")
REPORT = "RESULTS.md"
RECORDS = "????-??-??-*.json"
FOLDED = 30  # figures of a suite from which on a reader unfolds them

HEAD = """\
# Results

Written by `python benchmarks/run.py report` from the JSON files in this folder; changes made here
are lost. How to measure, what needs a GPU, and what was found by other programs: `README.md`.

± is half of what lies between the best and the worst run. 0: the figure has no chance in it, or
its spread is not known.
"""
MEASURED = "## Measured: a clock, or a program's own output, on the machine that is named\n"
ESTIMATED = """\
## Estimated: no clock was involved

From machine code, data sheets and formulas; the machine that is named only did the arithmetic. Here
± is half of the error bar that a suite gives; 0: it gives none, and none is not certainty.
"""


def read_records(folder: Path) -> list[Record]:
    """The runs of a folder, the oldest first. Raises `BadRecord`."""
    found = []
    for path in sorted(folder.glob(RECORDS)):
        record = read_record(path)
        if path.stem != record.stem:
            raise BadRecord(f"{path} holds the run that is called {record.stem}: rename it")
        found.append(record)
    return sorted(found, key=lambda record: record.date)


def render(records: Sequence[Record]) -> str:
    """The text of `RESULTS.md`."""
    latest = {(slug(record.machine), name): record for record in records for name in record.suites}
    ordered = sorted(latest.items(), key=lambda item: item[0])
    parts = [HEAD, _places(records)]
    for title, source in ((MEASURED, "measured"), (ESTIMATED, "estimate")):
        sections = [_section(name, record, source) for (_, name), record in ordered]
        parts += [title, *(filter(None, sections) if any(sections) else ["Nothing yet.\n"])]
    return "\n".join(parts)


def _places(records: Sequence[Record]) -> str:
    """A line for each machine, as its latest run found it."""
    if not records:
        return "No run is kept here yet: `python benchmarks/run.py SUITE... --keep`.\n"
    lines = [
        "| machine | processor | threads | memory | GPU | versions |",
        "|---|---|---|---|---|---|",
    ]
    for name, m in {slug(record.machine): record.machine for record in records}.items():
        cores = f"{m.get('cpu')}, {m.get('usable_cores')} of {m.get('cores')} cores"
        versions = f"torch {m.get('torch')}, Python {m.get('python')}"
        memory, gpu = f"{m.get('memory_gib')} GiB", m.get("gpu") or "none"
        lines.append(f"| {name} | {cores} | {m.get('threads')} | {memory} | {gpu} | {versions} |")
    return "\n".join(lines) + "\n"


def _section(name: str, record: Record, source: str) -> str:
    """Shows a suite's figures of one source. Pictures stand with the measured ones, if any."""
    suite = record.suites[name]
    figures = [figure for figure in suite.figures if figure.source == source]
    if not figures:
        return ""
    lines = [f"### {name}, {slug(record.machine)}, {record.date[:10]}", ""]
    if source == "measured":
        lines += [f"Checked by {suite.checked_by}.", ""]
    if source == "measured" or len(figures) == len(suite.figures):
        for picture in suite.pictures:
            lines += [f"![{name}]({picture})", ""]
    return "\n".join([*lines, *_table(figures), ""])


def _table(figures: Sequence[Figure]) -> Iterator[str]:
    folded = len(figures) > FOLDED
    if folded:
        yield from (f"<details><summary>{len(figures)} figures</summary>", "")
    yield from ("| figure | value | ± | unit | better |", "|---|---:|---:|---|---|")
    for one in figures:
        name = one.name.replace("|", "\\|")
        noise = _number(one.noise) if one.noise else "0"
        yield f"| {name} | {_number(one.value)} | {noise} | {one.unit} | {one.better} |"
    if folded:
        yield from ("", "</details>")


def _number(value: float) -> str:
    """Four digits, and no exponents for what is counted."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e12 else f"{value:.4g}"


def write_report(folder: Path) -> Path:
    """Writes the report of a folder's runs into it. Raises `BadRecord`."""
    path = folder / REPORT
    path.write_text(render(read_records(folder)), encoding="utf-8")
    return path
