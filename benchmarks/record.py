"""A run of the suites as a JSON file: where it was, when, and what each suite found."""

import json
import os
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from kernels.whole_file import whole_file

SCHEMA = 1
# Runs that differ in one of these are of different machines. Versions may differ: they are what is
# compared.
PLACE = ("cpu", "cores", "usable_cores", "threads", "gpu")


class BadRecord(Exception):
    """A file holds no run that can be read, or not the one that was asked for."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One number of a suite, in the form in which runs are compared."""

    name: str  # unique within the suite, the same in every run of the same thing
    value: float
    unit: str  # "ms", "s", "MiB", "dB", "TFLOPS", ...
    noise: float  # half of the spread between runs, in the same unit; 0 for what has none
    better: Literal["lower", "higher"] = "lower"
    source: Literal["measured", "estimate"] = "measured"


@dataclass(frozen=True, slots=True)
class Suite:
    """The functions of a suite that `run.py` calls. Every suite's module has one called `SUITE`.

    `Any` is the suite's own frozen row.
    """

    measure: Callable[..., tuple[str, Sequence[Any]]]  # how results were checked, and rows
    table: Callable[[Sequence[Any]], str]  # for a terminal, at most 100 columns
    figures: Callable[[Sequence[Any]], list[Figure]]
    pictures: Callable[[Sequence[Any], Path, str], list[Path]] | None = None


@dataclass(frozen=True, slots=True)
class SuiteResult:
    """The findings of a suite."""

    checked_by: str  # how its results were checked before they were timed
    rows: list[dict[str, Any]]  # its table, in the suite's own fields
    figures: list[Figure]
    pictures: list[str]  # PNG files beside the record, by relative paths


@dataclass(frozen=True, slots=True)
class Record:
    """One run of some suites on a machine."""

    date: str  # ISO 8601, UTC
    machine: Mapping[str, object]
    suites: Mapping[str, SuiteResult]
    peak_mib: int  # of the process that ran the suites

    @property
    def stem(self) -> str:
        """The name of its file: date and machine."""
        return f"{self.date[:10]}-{slug(self.machine)}"


def machine() -> dict[str, object]:
    """Facts of this machine that times depend on; nothing says whose it is."""
    import torch  # here: the process that measures cold starts must not hold PyTorch's files

    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": version("numpy"),
    }


def _cpu_model() -> str:
    """The processor as Linux names it; elsewhere the kind of machine."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8", errors="replace") if info.is_file() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.machine()


def slug(place: Mapping[str, object]) -> str:
    """A machine as part of a file's name: "cpu-epyc-2", "rtx-4090"."""
    gpu = place.get("gpu")
    named = str(gpu) if gpu else f"cpu {place.get('cpu')} {place.get('cores')}"
    words = re.sub(r"\(r\)|\(tm\)|\s*@.*?ghz|\d+-core|[^a-z0-9]+", " ", named.lower()).split()
    return "-".join(w for w in words if w not in {"amd", "intel", "nvidia", "geforce", "processor"})


def encode(record: Record) -> dict[str, object]:
    """The record as JSON holds it.

    Raises `BadRecord` for a number that JSON does not have, and for two figures of one name.
    """
    for name, suite in record.suites.items():
        names = [figure.name for figure in suite.figures]
        twice = next((one for one in names if names.count(one) > 1), None)
        if twice is not None:
            raise BadRecord(f"Two figures of {name} are called {twice}: no run could be compared")
        try:
            json.dumps(asdict(suite), allow_nan=False)
        except ValueError as error:
            why = "a number is not finite; a suite gives None for what it cannot say"
            raise BadRecord(f"{name}: {why}") from error
    return {"schema": SCHEMA, **asdict(record)}


def write_record(path: Path, record: Record) -> None:
    write_json(path, encode(record))


def write_json(path: Path, found: object) -> None:
    """Writes the whole file or nothing."""
    with whole_file(path) as draft:
        draft.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def read_record(path: Path) -> Record:
    """Reads what `write_record` wrote. Raises `BadRecord`, with the file's name."""
    try:
        held = json.loads(path.read_bytes())
        if held["schema"] != SCHEMA:
            raise BadRecord(f"{path} has schema {held['schema']!r}, expected {SCHEMA}")
        suites = {name: _suite(suite) for name, suite in held["suites"].items()}
        return Record(held["date"], held["machine"], suites, held["peak_mib"])
    except OSError as error:
        raise BadRecord(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"{type(error).__name__}: {str(error)[:100]}"
        raise BadRecord(f"{path} is no run of benchmarks/run.py: {why}") from error


def _suite(held: dict[str, Any]) -> SuiteResult:
    figures = [Figure(**one) for one in held["figures"]]
    return SuiteResult(held["checked_by"], held["rows"], figures, held["pictures"])


def merged(older: Record, newer: Record) -> Record:
    """Both runs as one: what was measured again is the newer's. Raises `BadRecord`."""
    if older.machine != newer.machine:
        keys = {**older.machine, **newer.machine}
        changed = [key for key in keys if older.machine.get(key) != newer.machine.get(key)]
        raise BadRecord(
            f"Another run of {newer.date[:10]} differs in {', '.join(changed)}. "
            "Move its file out of the results, or run as it was run."
        )
    suites = {**older.suites, **newer.suites}
    return replace(newer, suites=suites, peak_mib=max(older.peak_mib, newer.peak_mib))
